//! Interrupt lines: from devices to the 8259 pair and the I/O APIC, and from those to the engine.

use ringfort_bus::{DoorbellSink, IrqLine, MsiChannel, MsiMessage, MsiSink, Shared, lock};
use ringfort_devices::acpi_pm::AcpiPm;
use ringfort_devices::ioapic::{IoApic, PINS, RouteListener};
use ringfort_devices::line::{Fan, input};
use ringfort_devices::pci::{LpcListener, WiredOr};
use ringfort_devices::pic::Pic;
use ringfort_engine::{Doorbell, DoorbellAddress, Vm};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock};

/// The engine's VM, which exists only after the machine does. Messages before that go nowhere: there is no CPU that could
/// take them.
#[derive(Default)]
pub(super) struct VmLink(pub OnceLock<Arc<dyn Vm>>);

impl MsiSink for VmLink {
    fn send(&self, msg: MsiMessage) {
        if let Some(vm) = self.0.get() {
            vm.send_msi(msg.address, msg.data);
        }
    }

    fn channel(&self) -> Option<Box<dyn MsiChannel>> {
        let vm = self.0.get()?.clone();
        let event: File = ringfort_base::event().ok()?.into();
        let interrupt = vm.eventfds()?.add_interrupt(event.as_fd()).ok()?;
        Some(Box::new(Channel { vm, event, interrupt, message: None }))
    }
}

/// An interrupt of the engine's host, raised by an event descriptor.
struct Channel {
    vm: Arc<dyn Vm>,
    event: File,
    interrupt: u32,
    message: Option<MsiMessage>,
}

impl MsiChannel for Channel {
    fn send(&mut self, msg: MsiMessage) -> bool {
        if self.message != Some(msg) {
            self.message = None;
            let to = Some((msg.address, msg.data));
            if self.vm.eventfds().is_none_or(|e| e.set_message(self.interrupt, to).is_err()) {
                return false;
            }
            self.message = Some(msg);
        }
        // An event descriptor takes one more at any time but after 2^64 that nobody took.
        self.event.write_all(&1u64.to_ne_bytes()).is_ok()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let Some(e) = self.vm.eventfds() {
            // It is there; what may fail is the host's memory, for a VM that loses nothing by it.
            let _ = e.remove_interrupt(self.interrupt);
        }
    }
}

fn bell(address: u64) -> Doorbell {
    Doorbell { address: DoorbellAddress::Mmio(address), len: 0, value: None }
}

impl DoorbellSink for VmLink {
    fn connect(&self, address: u64, fd: BorrowedFd<'_>) -> bool {
        let eventfds = self.0.get().and_then(|vm| vm.eventfds());
        eventfds.is_some_and(|e| e.add_doorbell(&bell(address), fd).is_ok())
    }

    fn disconnect(&self, address: u64, fd: BorrowedFd<'_>) {
        if let Some(e) = self.0.get().and_then(|vm| vm.eventfds()) {
            // It was connected.
            let _ = e.remove_doorbell(&bell(address), fd);
        }
    }
}

/// Ports where a byte does nothing before the next access to the same device: it selects a register of the real-time clock, or was written
/// to wait a moment.
const QUEUED: [DoorbellAddress; 2] = [
    DoorbellAddress::Port(ringfort_devices::rtc::BASE),
    DoorbellAddress::Port(ringfort_devices::system_port::PAGES),
];

impl VmLink {
    /// Let stores wait where that makes no difference but for fewer exits. Not those to `0xCF8`: the register that resets the machine
    /// lies inside of it.
    pub fn queue_stores(&self, host_irqchip: bool) {
        let Some(e) = self.0.get().and_then(|vm| vm.eventfds()) else { return };
        // A host that cannot makes an exit of each.
        if !host_irqchip {
            // It selects another register.
            let _ = e.coalesce(DoorbellAddress::Mmio(crate::layout::IOAPIC_BASE), 4);
        }
        for port in QUEUED {
            let _ = e.coalesce(port, 1);
        }
    }
}

impl RouteListener for VmLink {
    fn route_changed(&self, pin: u8, message: MsiMessage, masked: bool) {
        if let Some(vm) = self.0.get() {
            vm.ioapic_route(pin, message.address, message.data, masked);
        }
    }
}

/// INTR of the master 8259.
pub(super) struct ExtInt(pub Arc<VmLink>);

impl IrqLine for ExtInt {
    fn set(&self, high: bool) {
        if let Some(vm) = self.0.0.get() {
            vm.set_extint(high);
        }
    }
}

/// An input of a controller in the engine's host.
struct HostInput {
    vm: Arc<VmLink>,
    n: u8,
    ioapic: bool,
}

impl IrqLine for HostInput {
    fn set(&self, high: bool) {
        let Some(chip) = self.vm.0.get().and_then(|vm| vm.irqchip()) else { return };
        if self.ioapic {
            chip.set_ioapic(self.n, high);
        } else {
            chip.set_pic(self.n, high);
        }
    }
}

struct Route {
    level: bool,
    irq: Option<u8>,
}

/// One PCI interrupt wire: to its I/O APIC input, and to the 8259 input that the LPC bridge routes it to.
struct Pirq {
    ioapic: Arc<dyn IrqLine>,
    pic: Vec<Arc<dyn IrqLine>>,
    route: Mutex<Route>,
}

impl Pirq {
    fn drive(&self, irq: Option<u8>, high: bool) {
        if let Some(line) = irq.and_then(|i| self.pic.get(usize::from(i))) {
            line.set(high);
        }
    }

    fn route(&self, irq: Option<u8>) {
        let mut r = lock(&self.route);
        if r.irq != irq {
            self.drive(r.irq, false);
            r.irq = irq;
            self.drive(irq, r.level);
        }
    }
}

impl IrqLine for Pirq {
    fn set(&self, high: bool) {
        let mut r = lock(&self.route);
        r.level = high;
        self.drive(r.irq, high);
        self.ioapic.set(high);
    }
}

/// All interrupt wires of the board.
pub(super) struct Wires {
    pic: Vec<Arc<WiredOr>>,
    ioapic: Vec<Arc<WiredOr>>,
    pirq: Vec<(Arc<Pirq>, Arc<WiredOr>)>,
}

impl Wires {
    pub fn new(pic: &Shared<Pic>, ioapic: &Shared<IoApic>) -> Wires {
        let pic = (0..16).map(|n| input(pic, n)).collect();
        Wires::to(pic, (0..PINS).map(|n| input(ioapic, n)).collect())
    }

    /// Wires to the controllers of the engine's host.
    pub fn to_host(vm: &Arc<VmLink>) -> Wires {
        let input = |n, ioapic| -> Arc<dyn IrqLine> { Arc::new(HostInput { vm: vm.clone(), n, ioapic }) };
        let pic = (0..16).map(|n| input(n, false)).collect();
        Wires::to(pic, (0..PINS).map(|n| input(n, true)).collect())
    }

    fn to(pic: Vec<Arc<dyn IrqLine>>, ioapic: Vec<Arc<dyn IrqLine>>) -> Wires {
        let pic: Vec<_> = pic.into_iter().map(WiredOr::new).collect();
        let ioapic: Vec<_> = ioapic.into_iter().map(WiredOr::new).collect();
        let pirq = (0..8)
            .map(|n| {
                let p = Arc::new(Pirq {
                    ioapic: ioapic[crate::layout::PCI_GSI_BASE as usize + n].input(),
                    pic: pic.iter().map(|w| w.input()).collect(),
                    route: Mutex::new(Route { level: false, irq: None }),
                });
                (p.clone(), WiredOr::new(p))
            })
            .collect();
        Wires { pic, ioapic, pirq }
    }

    /// A line to ISA interrupt `irq`: the 8259 input, and the I/O APIC's of the same number, but 2 for 0.
    pub fn isa(&self, irq: u8) -> Arc<dyn IrqLine> {
        let mut lines = Vec::new();
        lines.extend(self.pic.get(usize::from(irq)).map(|p| p.input()));
        lines.extend(self.ioapic(if irq == 0 { 2 } else { irq }));
        Arc::new(Fan(lines))
    }

    /// A line to I/O APIC input `pin` alone, if there is such an input.
    pub fn ioapic(&self, pin: u8) -> Option<Arc<dyn IrqLine>> {
        self.ioapic.get(usize::from(pin)).map(|p| p.input())
    }

    /// A line for pin `pin` (1 to 4) of PCI device `device`.
    pub fn intx(&self, device: u8, pin: u8) -> Arc<dyn IrqLine> {
        let n = crate::layout::pci_gsi(device, pin) - crate::layout::PCI_GSI_BASE;
        self.pirq[n as usize & 7].1.input()
    }
}

/// Follows what the guest programs into the LPC bridge.
pub(super) struct Follower {
    pub wires: Arc<Wires>,
    pub pio: Arc<ringfort_bus::PioBus>,
    pub pm: Shared<AcpiPm>,
    /// Where the ACPI block is mapped now.
    pub at: Mutex<Option<u16>>,
}

impl LpcListener for Follower {
    fn pirq_changed(&self, n: u8, irq: Option<u8>) {
        if let Some((p, _)) = self.wires.pirq.get(usize::from(n)) {
            p.route(irq);
        }
    }

    fn acpi_base_changed(&self, base: Option<u16>) {
        let mut at = lock(&self.at);
        if let Some(old) = at.take() {
            self.pio.remove(old.into());
        }
        let Some(base) = base else { return };
        lock(&self.pm).set_base(base);
        // A guest that puts the block over another device has no ACPI registers until it moves it away.
        let len = crate::layout::PM_SIZE.into();
        if self.pio.insert("acpi-pm", base.into(), len, self.pm.clone()).is_ok() {
            *at = Some(base);
        }
    }
}
