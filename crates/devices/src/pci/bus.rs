//! The functions of a PCI segment, and the mapping of their BARs.

use super::config::{BarSpace, BarWindow, reg};
use super::{Bdf, Ecam, PciError, PciFunction};
use ringfort_bus::{Mmio, MmioBus, PioBus, PortIo, Section, StateError, lock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Where one-line remarks about a guest's odd doings go.
type Log = Arc<dyn Fn(&str) + Send + Sync>;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Mapping {
    window: BarWindow,
    /// False: something else answers there; tried again when a range goes away.
    live: bool,
}

struct EcamMapping {
    window: (u64, u64),
    live: bool,
    target: Arc<Ecam>,
}

#[derive(Default)]
struct Mappings {
    bars: BTreeMap<(Bdf, u8), Mapping>,
    ecam: Option<EcamMapping>,
    told: BTreeSet<(Bdf, u8)>,
    told_ecam: bool,
}

/// A PCI segment: all functions by their place, reached by [`super::ConfigPorts`] and [`Ecam`].
///
/// Bridges would change which bus numbers lead where; look-ups go through one function, so they have their place.
pub struct PciBus {
    functions: RwLock<BTreeMap<Bdf, Arc<dyn PciFunction>>>,
    mappings: Mutex<Mappings>,
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    log: Log,
}

/// A BAR as a target on the machine's buses.
struct BarTarget {
    function: Arc<dyn PciFunction>,
    bar: u8,
    base: u64,
}

impl Mmio for BarTarget {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

impl PortIo for BarTarget {
    fn read(&self, port: u16, data: &mut [u8]) {
        self.function.bar_read(self.bar, u64::from(port).saturating_sub(self.base), data);
    }
    fn write(&self, port: u16, data: &[u8]) {
        self.function.bar_write(self.bar, u64::from(port).saturating_sub(self.base), data);
    }
}

impl PciBus {
    /// An empty segment whose BARs will appear on these buses. `log` gets a line, once per BAR, when a guest puts a
    /// BAR where something else answers.
    pub fn new(
        mmio: Arc<MmioBus>,
        pio: Arc<PioBus>,
        log: impl Fn(&str) + Send + Sync + 'static,
    ) -> Arc<PciBus> {
        Arc::new(PciBus {
            functions: RwLock::default(),
            mappings: Mutex::default(),
            mmio,
            pio,
            log: Arc::new(log),
        })
    }

    /// Put a function in its place.
    ///
    /// # Errors
    /// When the place is taken.
    pub fn add(&self, bdf: Bdf, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        let mut all = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if all.contains_key(&bdf) {
            return Err(PciError::Taken(bdf));
        }
        all.insert(bdf, function);
        drop(all);
        self.refresh(bdf);
        Ok(())
    }

    /// Take a function out; its BARs are unmapped. `None` when there is none.
    pub fn remove(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        let f = self.functions.write().unwrap_or_else(PoisonError::into_inner).remove(&bdf);
        self.refresh_of(bdf, f.as_ref());
        f
    }

    /// The function at a place.
    pub fn find(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&bdf).cloned()
    }

    /// All functions, by place.
    pub fn functions(&self) -> Vec<(Bdf, Arc<dyn PciFunction>)> {
        let all = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(&b, f)| (b, f.clone())).collect()
    }

    /// First device number on bus 0 with no function, from `from` on.
    pub fn free_slot(&self, from: u8) -> Option<Bdf> {
        let all = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        (from..32).find(|&d| !all.keys().any(|b| b.bus == 0 && b.device == d)).map(|d| Bdf::new(0, d, 0))
    }

    /// The guest reads configuration space: any length and alignment. Absent functions and bytes past the end
    /// read as ones.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(f) = self.find(bdf) else { return };
        for (at, range) in pieces(offset, data.len()) {
            let piece = &mut data[range];
            f.config_read(at, piece);
            // Function 0 says whether there are more (PCI 3.0 section 6.2.1, header type bit 7).
            if bdf.function == 0
                && (at..at + piece.len() as u16).contains(&0x0e)
                && self.has_more_functions(bdf)
            {
                piece[usize::from(0x0e - at)] |= 0x80;
            }
        }
    }

    /// The guest writes configuration space: any length and alignment.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(f) = self.find(bdf) else { return };
        for (at, range) in pieces(offset, data.len()) {
            f.config_write(at, &data[range]);
        }
        // A function-level reset, at an offset that only the function knows, changes BARs as well.
        let header_only = (0x34..0x40).contains(&offset);
        if !header_only && offset >= reg::COMMAND & !3 {
            self.refresh(bdf);
        }
    }

    fn has_more_functions(&self, bdf: Bdf) -> bool {
        let all = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        all.range(Bdf { function: 1, ..bdf }..=Bdf { function: 7, ..bdf }).next().is_some()
    }

    /// Map a function's BARs as its registers say now.
    pub fn refresh(&self, bdf: Bdf) {
        self.refresh_of(bdf, None);
    }

    /// As [`refresh`](Self::refresh); `gone` was the function there.
    fn refresh_of(&self, bdf: Bdf, gone: Option<&Arc<dyn PciFunction>>) {
        let mut m = lock(&self.mappings);
        let function = self.find(bdf);
        let want = function.as_ref().map_or([None; 7], |f| f.windows());
        let mut freed = false;
        for bar in 0..7u8 {
            let old = m.bars.get(&(bdf, bar)).copied();
            let new = want[usize::from(bar)];
            if old.map(|o| o.window) == new {
                continue;
            }
            if let Some(old) = old {
                m.bars.remove(&(bdf, bar));
                if old.live
                    && old.window.space == BarSpace::Memory
                    && let Some(f) = gone.or(function.as_ref())
                {
                    f.mapped(bar, None);
                }
                freed |= self.unmap(old);
            }
            if let Some(window) = new {
                m.bars.insert((bdf, bar), Mapping { window, live: false });
                freed = true;
            }
        }
        if freed {
            self.settle(&mut m);
        }
    }

    fn unmap(&self, old: Mapping) -> bool {
        old.live
            && match old.window.space {
                BarSpace::Memory => self.mmio.remove(old.window.base),
                BarSpace::Io => self.pio.remove(old.window.base),
            }
    }

    /// Map whatever is not live and has room: who came first stays.
    fn settle(&self, m: &mut Mappings) {
        if let Some(e) = m.ecam.as_mut().filter(|e| !e.live) {
            let (base, len) = e.window;
            e.live = self.mmio.insert("pci-ecam", base, len, e.target.clone()).is_ok();
        }
        let Mappings { bars, told, .. } = m;
        for (&(bdf, bar), mapping) in bars.iter_mut().filter(|(_, b)| !b.live) {
            let Some(function) = self.find(bdf) else { continue };
            let BarWindow { space, base, len } = mapping.window;
            let name = format!("{} {bdf} BAR {bar}", function.kind());
            let target = Arc::new(BarTarget { function: function.clone(), bar, base });
            let done = match space {
                BarSpace::Memory => self.mmio.insert(&name, base, len, target),
                BarSpace::Io => self.pio.insert(&name, base, len, target),
            };
            match done {
                Ok(()) => {
                    mapping.live = true;
                    if space == BarSpace::Memory {
                        function.mapped(bar, Some(base));
                    }
                }
                Err(e) if told.insert((bdf, bar)) => {
                    (self.log)(&format!("{e}; the guest's BAR stays unmapped"))
                }
                Err(_) => {}
            }
        }
    }

    /// Put the ECAM window at `base..base + len`, or nowhere (the host bridge's PCIEXBAR says).
    pub fn set_ecam(self: &Arc<Self>, window: Option<(u64, u64)>) {
        let mut m = lock(&self.mappings);
        if m.ecam.as_ref().map(|e| e.window) == window {
            return;
        }
        if let Some(old) = m.ecam.take().filter(|e| e.live) {
            self.mmio.remove(old.window.0);
        }
        m.ecam = window.map(|window| EcamMapping { window, live: false, target: Arc::new(Ecam::new(self)) });
        self.settle(&mut m);
        let homeless = m.ecam.as_ref().filter(|e| !e.live).map(|e| e.window.0);
        if let Some(base) = homeless.filter(|_| !m.told_ecam) {
            m.told_ecam = true;
            (self.log)(&format!(
                "PCI configuration window at {base:#x} overlaps another range; it stays unmapped"
            ));
        }
    }

    /// Power-on state for all functions; BARs are unmapped.
    pub fn reset(&self) {
        for (bdf, f) in self.functions() {
            f.reset();
            self.refresh(bdf);
        }
    }

    /// The sections of all functions; instance is the requester ID.
    pub fn save(&self) -> Vec<Section> {
        let one = |(b, f): (Bdf, Arc<dyn PciFunction>)| Section { instance: u32::from(b.id()), ..f.save() };
        self.functions().into_iter().map(one).collect()
    }

    /// Load every function's section out of `sections` (others are left alone) and map BARs as they say.
    ///
    /// # Errors
    /// When one is missing or does not fit. Functions before it have their new state by then: the machine is
    /// not to be run.
    pub fn load(&self, sections: &[Section]) -> Result<(), StateError> {
        for (bdf, f) in self.functions() {
            let mine = |s: &&Section| s.kind == f.kind() && s.instance == u32::from(bdf.id());
            let s = sections.iter().find(mine);
            f.load(s.ok_or_else(|| StateError::Missing(format!("{} at PCI {bdf}", f.kind())))?)?;
        }
        for (bdf, _) in self.functions() {
            self.refresh(bdf);
        }
        Ok(())
    }
}

/// Cut an access into pieces of 1, 2 or 4 bytes, each aligned and inside one doubleword and inside the space.
fn pieces(offset: u16, len: usize) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> {
    let len = len.min(super::CONFIG_SIZE.saturating_sub(usize::from(offset)));
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = usize::from(offset) + done;
        let left = len - done;
        let size = [4, 2, 1].into_iter().find(|s| at % s == 0 && left >= *s)?;
        done += size;
        Some((at as u16, done - size..done))
    })
}
