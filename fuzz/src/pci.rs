//! PCI: configuration space by both mechanisms, and the BARs of a virtio function, while the guest moves them about.

use std::sync::Arc;

use ringfort_bus::{Mmio, MmioBus, MsiMessage, MsiSink, NoIrq, PioBus, PortIo};
use ringfort_devices::pci::{Bdf, ConfigPorts, Ecam, HostBridge, Lpc, PciBus};
use ringfort_memory::RamMap;
use ringfort_virtio::{pci::VirtioPci, rng::Rng};

use crate::Input;

struct Nowhere;

impl MsiSink for Nowhere {
    fn send(&self, _: MsiMessage) {}
}

const VIRTIO: Bdf = Bdf::new(0, 2, 0);
const ECAM: u64 = 0xb000_0000;
/// Accesses of one input.
const STEPS: usize = 512;

/// Steps of 12 bytes: what kind of access, where, and with which value.
pub fn pci_config(data: &[u8]) {
    let (mmio, pio) = (Arc::new(MmioBus::default()), Arc::new(PioBus::default()));
    let bus = PciBus::new(mmio.clone(), pio.clone(), |_| {});
    let memory = ringfort_memory::allocate(&[(0, 1 << 16)]).expect("memory");
    let ram = Arc::new(RamMap::new(&memory));
    let rng =
        VirtioPci::new(Arc::new(Rng::new()), ram, Arc::new(Nowhere), Arc::new(NoIrq)).expect("function");
    bus.add(HostBridge::BDF, HostBridge::new(&bus, Some(ECAM))).expect("bridge");
    bus.add(Lpc::BDF, Lpc::new(Some(0x600), [Some(10); 8])).expect("bridge");
    bus.add(VIRTIO, Arc::new(rng)).expect("function");
    let ports = ConfigPorts::new(bus.clone(), None);
    let ecam = Ecam::new(&bus);

    let mut input = Input(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let kind = input.u8();
        let width = [1, 2, 4, 8][usize::from(input.u8() & 3)];
        let at = input.u16();
        let value = input.bytes::<8>();
        let mut out = [0; 8];
        let config_width = width.min(4);
        match kind & 7 {
            0 => bus.config_write(pick(kind), at & 0xfff, &value[..config_width]),
            1 => bus.config_read(pick(kind), at & 0xfff, &mut out[..config_width]),
            2 => PortIo::write(&ports, 0xcf8 + (at & 7), &value[..config_width]),
            3 => PortIo::read(&ports, 0xcf8 + (at & 7), &mut out[..config_width]),
            4 => ecam.write(u64::from_le_bytes(value) & 0xfff_ffff, &value[..width]),
            5 => ecam.read(u64::from_le_bytes(value) & 0xfff_ffff, &mut out[..width]),
            // Into whatever is mapped now: BARs that were moved, the ECAM window.
            _ => {
                let ranges = mmio.ranges();
                if let Some((base, len, _)) = ranges.get(usize::from(kind >> 3) % ranges.len().max(1)) {
                    let address = base + u64::from(at) % len;
                    if kind & 1 == 0 {
                        mmio.write(address, &value[..width]);
                    } else {
                        mmio.read(address, &mut out[..width]);
                    }
                }
            }
        }
    }
    // What any guest did to it can be saved, and taken back.
    let saved = bus.save();
    bus.load(&saved).expect("own state");
    bus.reset();
}

fn pick(kind: u8) -> Bdf {
    [HostBridge::BDF, Lpc::BDF, VIRTIO, Bdf::new(kind, kind >> 3, 7)][usize::from(kind >> 3 & 3)]
}
