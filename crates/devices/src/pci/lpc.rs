//! The LPC bridge of an ICH9 (8086:2918): PIRQ routing and the ACPI base address.

use super::{BarKind, BarWindow, Bdf, ConfigSpace, Identity, PciConfig, PciConfigState, PciFunction};
use ringfort_bus::{Format, NoIrq, Section, StateError, lock};
use std::sync::{Arc, Mutex};

const PMBASE: u16 = 0x40;
const ACPI_CNTL: u16 = 0x44;
/// PIRQA..D; E..H follow at 0x68 (ICH9 data sheet section 13.1.18).
const PIRQ_AD: u16 = 0x60;
const PIRQ_EH: u16 = 0x68;

/// Who wants to know that the guest changed something on the LPC bridge.
pub trait LpcListener: Send + Sync {
    /// PIRQ `n` (0 for A to 7 for H) now leads to 8259 input `irq`, or nowhere.
    fn pirq_changed(&self, n: u8, irq: Option<u8>);
    /// The ACPI register block is at this port now, or switched off.
    fn acpi_base_changed(&self, base: Option<u16>);
}

struct Seen {
    pirq: [Option<u8>; 8],
    acpi: Option<u16>,
    listener: Option<Arc<dyn LpcListener>>,
}

/// Function 00:1f.0.
pub struct Lpc {
    config: PciConfig,
    seen: Mutex<Seen>,
}

impl Lpc {
    /// Where it sits.
    pub const BDF: Bdf = Bdf::new(0, 0x1f, 0);
    const KIND: &'static str = "ich9-lpc";
    /// How the state is laid out.
    pub(crate) const FORMAT: Format = Format::of::<PciConfigState>(Self::KIND, 1);

    /// A bridge. `acpi_base` is where the ACPI registers are after reset (as firmware would have put them), `pirq`
    /// the 8259 inputs that PIRQA to H lead to after reset (`None`: not routed).
    pub fn new(acpi_base: Option<u16>, pirq: [Option<u8>; 8]) -> Arc<Lpc> {
        let mut s = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: 0x06_01_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        // PMBASE: I/O base 15:7 (bit 0 says I/O); ACPI_CNTL: enable bit 7, SCI select 2:0.
        s.set_u32(PMBASE, u32::from(acpi_base.unwrap_or(0) & 0xff80) | 1);
        s.allow(PMBASE, &[0x80, 0xff]);
        s.set_u8(ACPI_CNTL, if acpi_base.is_some() { 0x80 } else { 0 });
        s.allow(ACPI_CNTL, &[0x87]);
        for (n, route) in (0..8).zip(pirq) {
            s.set_u8(pirq_register(n), route.filter(|&r| routable(r)).unwrap_or(0x80));
            s.allow(pirq_register(n), &[0x8f]);
        }
        // LPC decode ranges, serial IRQ control, power management configuration, root complex base: storage.
        s.set_u8(0x64, 0x10);
        s.allow(0x64, &[0xff]);
        s.allow(0x80, &[0xff, 0xff, 0xff, 0xff, 0xfd, 0xff, 0xff, 0x00, 0xfd, 0xff, 0xff]);
        s.allow(0xa0, &[0xff; 8]);
        s.allow(0xf0, &[0x01, 0xc0, 0xff, 0xff]);
        let lpc = Lpc {
            config: PciConfig::new(s, None, Arc::new(NoIrq)),
            seen: Mutex::new(Seen { pirq: [None; 8], acpi: None, listener: None }),
        };
        lpc.follow();
        Arc::new(lpc)
    }

    /// Tell `listener` of changes from now on; it is told the present state at once.
    pub fn set_listener(&self, listener: Arc<dyn LpcListener>) {
        let mut seen = lock(&self.seen);
        for (n, irq) in (0..8).zip(seen.pirq) {
            listener.pirq_changed(n, irq);
        }
        listener.acpi_base_changed(seen.acpi);
        seen.listener = Some(listener);
    }

    /// The 8259 input that PIRQ `n` (0 for A to 7 for H) leads to.
    pub fn pirq(&self, n: u8) -> Option<u8> {
        let v = self.config.with(|s| s.u8(pirq_register(n)));
        (v & 0x80 == 0 && routable(v & 15)).then_some(v & 15)
    }

    /// Where the ACPI registers are, when they are on.
    pub fn acpi_base(&self) -> Option<u16> {
        self.config
            .with(|s| (s.u8(ACPI_CNTL) & 0x80 != 0).then(|| s.u16(PMBASE) & 0xff80))
            .filter(|&b| b != 0)
    }

    /// Tell the listener what is new. The lock keeps two writers' news in order.
    fn follow(&self) {
        let mut seen = lock(&self.seen);
        for n in 0..8u8 {
            let irq = self.pirq(n);
            if std::mem::replace(&mut seen.pirq[usize::from(n)], irq) != irq
                && let Some(l) = &seen.listener
            {
                l.pirq_changed(n, irq);
            }
        }
        let base = self.acpi_base();
        if std::mem::replace(&mut seen.acpi, base) != base
            && let Some(l) = &seen.listener
        {
            l.acpi_base_changed(base);
        }
    }
}

fn pirq_register(n: u8) -> u16 {
    if n < 4 { PIRQ_AD + u16::from(n) } else { PIRQ_EH + u16::from(n & 3) }
}

/// Inputs of the 8259 pair that PIRQs may lead to; 0, 1, 2, 8 and 13 are reserved.
fn routable(irq: u8) -> bool {
    !matches!(irq, 0..=2 | 8 | 13 | 16..)
}

impl PciFunction for Lpc {
    fn kind(&self) -> &'static str {
        Self::KIND
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.follow();
    }
    fn windows(&self) -> [Option<BarWindow>; 7] {
        self.config.windows()
    }
    fn bars(&self) -> [Option<(BarKind, u64)>; 7] {
        self.config.bars()
    }
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn reset(&self) {
        self.config.reset();
        self.follow();
    }
    fn save(&self) -> Section {
        Section::new(Self::KIND, 0, 1, &self.config.save())
    }
    fn load(&self, section: &Section) -> Result<(), StateError> {
        let s: PciConfigState = section.decode(Self::KIND, 1)?;
        self.config.load(&s).map_err(|e| section.invalid(e))?;
        self.follow();
        Ok(())
    }
}
