//! The host bridge of a Q35 (Intel 82G33/P35 MCH, 8086:29c0): PCIEXBAR, and the registers that firmware expects.

use super::{BarKind, BarWindow, Bdf, ConfigSpace, Identity, PciBus, PciConfig, PciConfigState, PciFunction};
use ringfort_bus::{Format, NoIrq, Section, StateError};
use std::sync::{Arc, Weak};

const PCIEXBAR: u16 = 0x60;

/// Function 00:00.0. PCIEXBAR (offset 0x60) places the ECAM window of its bus.
pub struct HostBridge {
    config: PciConfig,
    bus: Weak<PciBus>,
}

impl HostBridge {
    /// Where it sits.
    pub const BDF: Bdf = Bdf::new(0, 0, 0);
    const KIND: &'static str = "q35-mch";
    /// How the state is laid out.
    pub(crate) const FORMAT: Format = Format::of::<PciConfigState>(Self::KIND, 1);

    /// A bridge for `bus`. With `ecam` (a base that is a multiple of 256 MiB) PCIEXBAR holds that base, enabled,
    /// after every reset, as when firmware had run; without, it is off until the guest programs it.
    pub fn new(bus: &Arc<PciBus>, ecam: Option<u64>) -> Arc<HostBridge> {
        let mut s = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        // PCIEXBAR: base 35:26, length 2:1, enable 0.
        let value = ecam.map_or(0xe000_0000, |b| (b & 0xf_f000_0000) | 1);
        s.set_u32(PCIEXBAR, value as u32);
        s.set_u32(PCIEXBAR + 4, (value >> 32) as u32);
        s.allow(PCIEXBAR, &0x0000_000f_fc00_0007u64.to_le_bytes());
        // PAM0..6, SMRAM, ESMRAMC: storage; what they switch (shadow RAM, SMM) this machine does not have.
        s.allow(0x90, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        s.set_u8(0x9d, 0x02);
        s.allow(0x9d, &[0x70]);
        let bridge =
            HostBridge { config: PciConfig::new(s, None, Arc::new(NoIrq)), bus: Arc::downgrade(bus) };
        bridge.follow();
        Arc::new(bridge)
    }

    /// The ECAM window that PCIEXBAR asks for: base and bytes.
    pub fn ecam(&self) -> Option<(u64, u64)> {
        let v = self.config.with(|s| u64::from(s.u32(PCIEXBAR)) | u64::from(s.u32(PCIEXBAR + 4)) << 32);
        let len = match v >> 1 & 3 {
            0 => 256 << 20,
            1 => 128 << 20,
            2 => 64 << 20,
            _ => return None,
        };
        (v & 1 != 0).then_some((v & 0xf_fc00_0000 & !(len - 1), len))
    }

    fn follow(&self) {
        if let Some(bus) = self.bus.upgrade() {
            bus.set_ecam(self.ecam());
        }
    }
}

impl PciFunction for HostBridge {
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
