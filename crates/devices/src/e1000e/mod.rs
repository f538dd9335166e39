//! Intel 82574L, a gigabit network card for guests without drivers of virtio (Intel 82574 GbE Controller Family data sheet, revision
//! 3.4): descriptor rings in all three forms, checksums and segmentation, two queues each way with receive-side scaling, VLANs and
//! filters, INTx, MSI and MSI-X with throttling, EEPROM and PHY. It has no time stamps, wake-up, flash or management.

mod interrupt;
mod phy;
mod regs;
mod rx;
#[cfg(test)]
mod tests;
mod tx;

use crate::pci::{
    BarKind, BarWindow, CAP_ID_MSI, CAP_ID_PM, ConfigSpace, Identity, MsixLayout, MsixState, PciConfig,
    PciConfigState, PciError, PciFunction, PcieKind,
};
use interrupt::VECTORS;
use phy::{NVM_WORDS, Phy};
use regs::{
    CTRL, EECD, EERD, EEWR, EITR, GOTCL, HEAD, ICR, ICS, IMC, IMS, LEDCTL, LEN, MDIC, PBA, QUEUE, RAL, RDBAL,
    RSSRK, SPACE, STATISTICS, STATUS, SWSM, TAIL, TDBAL, VET, WORDS, cause, ctrl, eecd, status,
};
use ringfort_bus::{Format, IrqLine, MsiSink, Section, StateError, lock};
use ringfort_memory::GuestMemory;
use ringfort_net::hash::Toeplitz;
use ringfort_net::{MacAddr, NetBackend, NetEvents, Offloads, Statistics, VnetHeader};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;
use tx::Assembly;

const KIND: &str = "e1000e";
const STATE_VERSION: u32 = 1;
/// How the state is laid out.
pub(crate) const FORMAT: Format = Format::of::<Saved>(KIND, STATE_VERSION);
/// Bytes of the I/O window, BAR 2.
const IO_LEN: u64 = 32;
const MSIX_BAR: u8 = 3;
const MSIX_LEN: u64 = 0x4000;

/// What the worker is to do.
#[derive(Default)]
struct Work {
    /// There is something to send or to receive.
    ring: bool,
    /// Not before this.
    at: Option<Instant>,
    link: Option<bool>,
    paused: bool,
    stop: bool,
    /// The worker is at the device.
    busy: bool,
}

/// Wakes the worker. Its lock is never held while another is taken.
#[derive(Default)]
struct Bell {
    work: Mutex<Work>,
    changed: Condvar,
}

impl Bell {
    fn change(&self, f: impl FnOnce(&mut Work)) {
        f(&mut lock(&self.work));
        self.changed.notify_all();
    }

    fn ring(&self) {
        self.change(|w| w.ring = true);
    }

    fn at(&self, t: Instant) {
        self.change(|w| w.at = Some(w.at.map_or(t, |a| a.min(t))));
    }
}

struct Events(Weak<Bell>);

impl NetEvents for Events {
    fn readable(&self, _pair: u16) {
        if let Some(b) = self.0.upgrade() {
            b.ring();
        }
    }
    fn writable(&self, pair: u16) {
        self.readable(pair);
    }
    fn link(&self, up: bool) {
        if let Some(b) = self.0.upgrade() {
            b.change(|w| w.link = Some(up));
        }
    }
}

/// What the device is connected to.
struct Wiring {
    backend: Arc<dyn NetBackend>,
    memory: GuestMemory,
    config: Arc<PciConfig>,
    msix: Arc<MsixState>,
    sink: Arc<dyn MsiSink>,
    bell: Arc<Bell>,
    msi_cap: u16,
}

struct Inner {
    wiring: Wiring,
    mac: [u8; 6],
    regs: Vec<u32>,
    phy: Phy,
    nvm: Vec<u16>,
    tx: [Assembly; 2],
    /// Frames that the back end had no room for.
    outbox: VecDeque<(VnetHeader, Vec<u8>)>,
    /// A frame, and whether it waits for the driver's buffers.
    inbox: Vec<u8>,
    inbox_full: bool,
    /// Frames of its own that come back to it.
    looped: VecDeque<Vec<u8>>,
    scratch: Vec<u8>,
    toeplitz: OnceLock<Toeplitz>,
    /// The cable is plugged in.
    link: bool,
    /// For the user; the registers of the same meaning are the driver's, and clear when it reads them.
    passed: Statistics,
    io_address: u32,
    /// Enabled causes that were told.
    told: u32,
    /// When each vector was told last, and when it is to be told that was held back.
    last: [Option<Instant>; VECTORS],
    held: [Option<Instant>; VECTORS],
}

/// What is saved.
#[derive(Serialize, Deserialize)]
struct Saved {
    config: PciConfigState,
    /// Registers that are not 0.
    regs: Vec<(u16, u32)>,
    phy: Phy,
    nvm: Vec<u16>,
    tx: [Assembly; 2],
    link: bool,
    io_address: u32,
    told: u32,
}

/// The device.
pub struct E1000e {
    config: Arc<PciConfig>,
    msix: Arc<MsixState>,
    inner: Arc<Mutex<Inner>>,
    bell: Arc<Bell>,
    worker: Option<JoinHandle<()>>,
}

/// Why the card cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum E1000eError {
    /// It cannot be described.
    #[error("e1000e: {0}")]
    Pci(#[from] PciError),
    /// The host gives no thread.
    #[error("e1000e: no thread for its frames: {0}")]
    Thread(#[from] io::Error),
}

fn describe(sink: &Arc<dyn MsiSink>) -> Result<(ConfigSpace, Arc<MsixState>, u16), PciError> {
    let mut space = ConfigSpace::new(&Identity {
        vendor: 0x8086,
        device: 0x10d3,
        revision: 0,
        class: 0x02_00_00,
        subsystem_vendor: 0x8086,
        subsystem: 0xa01f,
    });
    space.add_bar(0, BarKind::Mem32 { prefetchable: false }, SPACE)?;
    space.add_bar(2, BarKind::Io, IO_LEN)?;
    space.add_bar(MSIX_BAR, BarKind::Mem32 { prefetchable: false }, MSIX_LEN)?;
    let layout = MsixLayout { table_bar: MSIX_BAR, table_offset: 0, pba_bar: MSIX_BAR, pba_offset: 0x2000 };
    let msix = Arc::new(MsixState::new(VECTORS as u16, layout, sink.clone())?);
    space.add_pcie(PcieKind::RootComplexEndpoint)?;
    space.add_msix(&msix)?;
    // 64-bit MSI with one message; enable, address and data are the driver's.
    let msi_cap = space.add_capability(
        CAP_ID_MSI,
        &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0x01, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    )?;
    // Power management 3, state kept when it wakes; the power state is the driver's.
    space.add_capability(CAP_ID_PM, &[0x03, 0, 0x08, 0, 0, 0], &[0, 0, 0x03, 0x01, 0, 0])?;
    space.set_interrupt_pin(1);
    Ok((space, msix, msi_cap))
}

impl E1000e {
    /// A card with this address whose frames `backend` carries. MSI goes to `msi`; `line` is the INTx line of its place.
    ///
    /// # Errors
    /// [`E1000eError`].
    pub fn new(
        backend: Arc<dyn NetBackend>,
        mac: MacAddr,
        memory: GuestMemory,
        msi: Arc<dyn MsiSink>,
        line: Arc<dyn IrqLine>,
    ) -> Result<Arc<E1000e>, E1000eError> {
        let (space, msix, msi_cap) = describe(&msi)?;
        let config = Arc::new(PciConfig::new(space, Some(msix.clone()), line));
        let bell: Arc<Bell> = Arc::default();
        // Checksums of what comes are complete: the guest may pass it on as it is.
        backend.set_offloads(Offloads::default());
        let wiring = Wiring {
            backend: backend.clone(),
            memory,
            config: config.clone(),
            msix: msix.clone(),
            sink: msi,
            bell: bell.clone(),
            msi_cap,
        };
        let mut inner = Inner {
            wiring,
            mac: mac.bytes(),
            regs: vec![0; WORDS],
            phy: Phy::new(true),
            nvm: phy::nvm(mac.bytes()),
            tx: Default::default(),
            outbox: VecDeque::new(),
            inbox: Vec::new(),
            inbox_full: false,
            looped: VecDeque::new(),
            scratch: Vec::new(),
            toeplitz: OnceLock::new(),
            link: true,
            passed: Statistics::default(),
            io_address: 0,
            told: 0,
            last: [None; VECTORS],
            held: [None; VECTORS],
        };
        inner.reset();
        let inner = Arc::new(Mutex::new(inner));
        let (of_worker, its_bell) = (inner.clone(), bell.clone());
        // It stands still until the machine runs.
        lock(&bell.work).paused = true;
        let worker =
            std::thread::Builder::new().name("e1000e".into()).spawn(move || work(&its_bell, &of_worker))?;
        backend.attach(Arc::new(Events(Arc::downgrade(&bell))));
        Ok(Arc::new(E1000e { config, msix, inner, bell, worker: Some(worker) }))
    }

    /// Plug the cable in or pull it.
    pub fn set_link(&self, up: bool) {
        lock(&self.inner).set_link(up);
    }

    /// Whether the cable is plugged in.
    pub fn link(&self) -> bool {
        lock(&self.inner).link
    }

    /// What passed so far.
    pub fn statistics(&self) -> Statistics {
        lock(&self.inner).passed
    }

    /// What its network counts besides: names and numbers.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        lock(&self.inner).wiring.backend.counters()
    }

    /// Stop; on return guest memory is not touched.
    pub fn pause(&self) {
        let mut w = lock(&self.bell.work);
        w.paused = true;
        while w.busy {
            w = self.bell.changed.wait(w).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Go on.
    pub fn resume(&self) {
        self.bell.change(|w| (w.paused, w.ring) = (false, true));
    }
}

impl Drop for E1000e {
    fn drop(&mut self) {
        self.bell.change(|w| w.stop = true);
        if let Some(t) = self.worker.take() {
            let _ = t.join();
        }
    }
}

/// The worker: takes what comes, sends what was left, tells interrupts that were held back.
fn work(bell: &Bell, inner: &Mutex<Inner>) {
    let mut w = lock(&bell.work);
    loop {
        if w.stop {
            return;
        }
        let now = Instant::now();
        let due = w.ring || w.link.is_some() || w.at.is_some_and(|t| t <= now);
        if w.paused || !due {
            w = match w.at.filter(|_| !w.paused) {
                Some(t) => {
                    let left = t.saturating_duration_since(now);
                    bell.changed.wait_timeout(w, left).map_or_else(|e| e.into_inner().0, |x| x.0)
                }
                None => bell.changed.wait(w).unwrap_or_else(PoisonError::into_inner),
            };
            continue;
        }
        let (link, ring) = (w.link.take(), std::mem::take(&mut w.ring));
        w.at = None;
        w.busy = true;
        drop(w);
        {
            let mut i = lock(inner);
            if let Some(up) = link {
                i.set_link(up);
            }
            if ring {
                i.transmit();
                if i.receive() {
                    bell.ring();
                }
            }
            if let Some(t) = i.release() {
                bell.at(t);
            }
        }
        w = lock(&bell.work);
        w.busy = false;
        bell.changed.notify_all();
    }
}

impl Inner {
    fn get(&self, at: u32) -> u32 {
        self.regs.get(at as usize / 4).copied().unwrap_or(0)
    }

    fn set(&mut self, at: u32, value: u32) {
        if let Some(r) = self.regs.get_mut(at as usize / 4) {
            *r = value;
        }
    }

    fn may_dma(&self) -> bool {
        self.wiring.config.bus_master()
    }

    fn count(&mut self, at: u32, n: u32) {
        self.set(at, self.get(at).saturating_add(n));
    }

    fn count_bytes(&mut self, low: u32, n: usize) {
        let value = u64::from(self.get(low)) | u64::from(self.get(low + 4)) << 32;
        let value = value.saturating_add(n as u64);
        self.set(low, value as u32);
        self.set(low + 4, (value >> 32) as u32);
    }

    /// Whether what it sends comes back to it.
    fn loops(&self) -> bool {
        self.get(regs::RCTL) >> regs::RCTL_LOOPBACK_SHIFT & 3 == 1 || self.phy.loops()
    }

    /// Count `n` frames of `len` bytes, check sequence included, among those of their length; `first` is the counter of the shortest.
    fn count_length(&mut self, first: u32, len: usize, n: u32) {
        let class = [64, 127, 255, 511, 1023].iter().take_while(|most| len > **most).count();
        self.count(first + 4 * class as u32, n);
    }

    /// The state after power-on or a reset by the driver; the cable stays as it is.
    fn reset(&mut self) {
        self.regs.fill(0);
        self.tx = Default::default();
        self.outbox.clear();
        self.inbox_full = false;
        self.looped.clear();
        self.toeplitz = OnceLock::new();
        self.io_address = 0;
        self.told = 0;
        (self.last, self.held) = ([None; VECTORS], [None; VECTORS]);
        self.phy.set_link(self.link);
        for (at, v) in [
            (CTRL, 0x0018_0240 | ctrl::SLU),
            (
                STATUS,
                status::FD | status::SPEED_1000 | status::MASTER | if self.link { status::LU } else { 0 },
            ),
            (EECD, eecd::PRES | eecd::AUTO_RD),
            (VET, 0x8100),
            (LEDCTL, 0x0707_0602),
            (PBA, 0x0014_0014),
        ] {
            self.set(at, v);
        }
        let m = self.mac;
        self.set(RAL, u32::from_le_bytes([m[0], m[1], m[2], m[3]]));
        self.set(RAL + 4, u32::from_le_bytes([m[4], m[5], 0, 0x80]));
        self.wiring.config.set_intx(false);
    }

    fn set_link(&mut self, up: bool) {
        if self.link != up {
            self.link = up;
            self.phy.set_link(up);
            self.follow_link();
        }
    }

    fn follow_link(&mut self) {
        let s = self.get(STATUS) & !status::LU;
        self.set(STATUS, s | if self.link { status::LU } else { 0 });
        self.raise(cause::LSC);
    }

    fn read(&mut self, at: u32) -> u32 {
        match at {
            ICR => self.read_causes(),
            ICS | IMC => 0,
            SWSM => {
                // The first bit is taken by whoever reads it as 0 (section 10.2.10.7).
                let v = self.get(SWSM);
                self.set(SWSM, v | 1);
                v
            }
            _ if STATISTICS.contains(&at) => {
                let v = self.get(at);
                // Of a counter of 64 bits the high half clears both.
                let (first, last) = (GOTCL - 8, GOTCL + 4);
                let wide = (first..=last).contains(&at) || (0x40c0..=0x40cc).contains(&at);
                if !wide {
                    self.set(at, 0);
                } else if at & 4 != 0 {
                    self.set(at, 0);
                    self.set(at - 4, 0);
                }
                v
            }
            _ => self.get(at),
        }
    }

    fn write(&mut self, at: u32, value: u32) {
        match at {
            CTRL => self.write_ctrl(value),
            // Of the status only "PHY was reset" can be cleared, by writing 0.
            STATUS if value & status::PHYRA == 0 => self.set(STATUS, self.get(STATUS) & !status::PHYRA),
            STATUS => {}
            EECD => {
                let fixed = eecd::PRES | eecd::AUTO_RD;
                let grant = if value & eecd::REQ != 0 { eecd::GNT } else { 0 };
                self.set(EECD, value & 0x4f | fixed | grant);
            }
            EERD if value & 1 != 0 => {
                let word = self.nvm.get((value >> 2 & 0x3fff) as usize).copied().unwrap_or(0xffff);
                self.set(EERD, value & 0xffff & !1 | 2 | u32::from(word) << 16);
            }
            EEWR => {
                if value & 1 != 0
                    && let Some(w) = self.nvm.get_mut((value >> 2 & 0x3fff) as usize)
                {
                    *w = (value >> 16) as u16;
                }
                self.set(EEWR, value & !1 | 2);
            }
            MDIC => {
                let link = self.link;
                let (answer, restarted) = self.phy.access(value, link);
                self.set(MDIC, answer & !(1 << 29));
                let done = if value & 1 << 29 != 0 { cause::MDAC } else { 0 };
                if restarted {
                    self.follow_link();
                }
                if done != 0 {
                    self.raise(done);
                }
            }
            ICR => {
                self.set(ICR, self.get(ICR) & !value);
                self.update();
            }
            ICS => self.raise(value & !cause::ASSERTED),
            IMS => {
                self.set(IMS, self.get(IMS) | value & 0x01f0_ffff);
                self.update();
            }
            IMC => {
                self.set(IMS, self.get(IMS) & !value);
                self.update();
            }
            SWSM => self.set(SWSM, value & 0xf),
            _ if STATISTICS.contains(&at) => {}
            _ if (EITR..EITR + 4 * VECTORS as u32).contains(&at) => self.set(at, value & 0xffff),
            _ => self.write_queue(at, value),
        }
    }

    fn write_queue(&mut self, at: u32, value: u32) {
        for base in [RDBAL, RDBAL + QUEUE, TDBAL, TDBAL + QUEUE] {
            match at.wrapping_sub(base) {
                // Multiples of 128 bytes, 1 MiB at most (section 10.2.5.9).
                LEN => return self.set(at, value & 0xf_ff80),
                HEAD => return self.set(at, value & 0xffff),
                TAIL => {
                    self.set(at, value & 0xffff);
                    if base >= TDBAL {
                        self.transmit();
                    } else {
                        self.wiring.bell.ring();
                    }
                    return;
                }
                _ => {}
            }
        }
        self.set(at, value & regs::bits(at));
        if (RSSRK..RSSRK + 40).contains(&at) {
            self.toeplitz = OnceLock::new();
        }
        match at {
            regs::RCTL => self.wiring.bell.ring(),
            regs::TCTL => self.transmit(),
            _ => {}
        }
    }

    fn write_ctrl(&mut self, value: u32) {
        if value & ctrl::RST != 0 {
            return self.reset();
        }
        if value & ctrl::PHY_RST != 0 {
            self.phy = Phy::new(self.link);
            self.set(STATUS, self.get(STATUS) | status::PHYRA);
        }
        let before = self.get(CTRL);
        self.set(CTRL, value & !(ctrl::RST | ctrl::PHY_RST));
        // Nothing is under way between two accesses, so that the bus is given up at once.
        let s = self.get(STATUS) & !status::MASTER;
        self.set(STATUS, s | if value & ctrl::MASTER_DISABLE == 0 { status::MASTER } else { 0 });
        if value & !before & ctrl::SLU != 0 {
            self.follow_link();
        }
    }

    /// The I/O window: an address, and the register there (section 10.1.1.3).
    fn io_read(&mut self, offset: u64) -> u32 {
        match offset {
            0 => self.io_address,
            4 if u64::from(self.io_address) < SPACE => self.read(self.io_address & !3),
            _ => 0,
        }
    }

    fn io_write(&mut self, offset: u64, value: u32) {
        match offset {
            0 => self.io_address = value,
            4 if u64::from(self.io_address) < SPACE => self.write(self.io_address & !3, value),
            _ => {}
        }
    }
}

impl PciFunction for E1000e {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let events = self.config.write(offset, data);
        let mut i = lock(&self.inner);
        if events.function_reset {
            i.reset();
        }
        // The way that interrupts go may have changed.
        i.update();
        drop(i);
        if events.bus_master {
            self.bell.ring();
        }
    }

    fn windows(&self) -> [Option<BarWindow>; 7] {
        self.config.windows()
    }

    fn bars(&self) -> [Option<(BarKind, u64)>; 7] {
        self.config.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if self.msix.bar_read(bar, offset, data) {
            return;
        }
        let value = match bar {
            0 => lock(&self.inner).read(offset as u32 & !3),
            2 => lock(&self.inner).io_read(offset & !3),
            _ => 0,
        };
        // Registers are words; a part of one is read as such.
        let from = (offset & 3) as usize;
        for (d, v) in data.iter_mut().zip(&value.to_le_bytes()[from..]) {
            *d = *v;
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        // Registers take whole words only (section 10.1.1.1).
        if self.msix.bar_write(bar, offset, data) || data.len() < 4 || offset & 3 != 0 {
            return;
        }
        let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
        match bar {
            0 => lock(&self.inner).write(offset as u32, value),
            2 => lock(&self.inner).io_write(offset, value),
            _ => {}
        }
    }

    fn reset(&self) {
        let mut i = lock(&self.inner);
        i.phy = Phy::new(i.link);
        i.reset();
        drop(i);
        self.config.reset();
    }

    fn save(&self) -> Section {
        let i = lock(&self.inner);
        let regs = i.regs.iter().enumerate().filter(|(_, v)| **v != 0).map(|(n, v)| (n as u16, *v)).collect();
        let saved = Saved {
            config: self.config.save(),
            regs,
            phy: i.phy.clone(),
            nvm: i.nvm.clone(),
            tx: i.tx.clone(),
            link: i.link,
            io_address: i.io_address,
            told: i.told,
        };
        Section::new(KIND, 0, STATE_VERSION, &saved)
    }

    fn load(&self, section: &Section) -> Result<(), StateError> {
        let saved: Saved = section.decode(KIND, STATE_VERSION)?;
        if !saved.phy.is_sound()
            || saved.nvm.len() != NVM_WORDS
            || saved.regs.iter().any(|r| usize::from(r.0) >= WORDS)
        {
            return Err(section.invalid("registers that this device does not have"));
        }
        let mut i = lock(&self.inner);
        self.config.load(&saved.config).map_err(|e| section.invalid(e))?;
        i.reset();
        i.regs.fill(0);
        saved.regs.iter().for_each(|&(n, v)| i.regs[usize::from(n)] = v);
        (i.phy, i.nvm, i.tx) = (saved.phy, saved.nvm, saved.tx);
        (i.link, i.io_address, i.told) = (saved.link, saved.io_address, saved.told);
        i.update();
        drop(i);
        self.bell.ring();
        Ok(())
    }
}
