//! Interrupt routes, irqfds and ioeventfds.

use crate::error::host;
use crate::irqchip::IOAPIC_FIRST;
use crate::vm::{IOAPIC_PINS, VmShared, locked};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use ringfort_engine::{Doorbell, DoorbellAddress, EngineError, EventFds};
use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use vmm_sys_util::eventfd::EventFd;

/// First route of an irqfd: after the inputs of controllers, wherever they are.
const FIRST: u32 = IOAPIC_FIRST + IOAPIC_PINS;
/// Routes that a VM can have (KVM_MAX_IRQ_ROUTES).
const ROUTES: u32 = 4096;

/// An MSI's address for KVM: bits 11:5 are the destination's bits 14:8 (the extension that guests are offered), which KVM takes in the
/// upper half.
pub(crate) fn msi_address(address: u64) -> (u32, u32) {
    let extension = (address >> 5 & 0x7f) as u32;
    ((address as u32) & !0xfe0, (address >> 32) as u32 | extension << 8)
}

fn entry(gsi: u32, (address, data): (u64, u32)) -> kvm_irq_routing_entry {
    let (address_lo, address_hi) = msi_address(address);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo,
                address_hi,
                data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
            },
        },
        ..Default::default()
    }
}

struct Interrupt {
    fd: EventFd,
    message: Option<(u64, u32)>,
    /// The kernel watches the descriptor.
    connected: bool,
}

#[derive(Default)]
struct State {
    /// Messages of the I/O APIC's pins: KVM reports EOIs of the level-triggered ones.
    pins: [Option<(u64, u32)>; IOAPIC_PINS as usize],
    /// Interrupts by route.
    interrupts: BTreeMap<u32, Interrupt>,
    /// Routes of controllers in the kernel.
    chips: Vec<kvm_irq_routing_entry>,
}

/// The VM's interrupt routes.
pub(crate) struct Routes(Mutex<State>);

impl Routes {
    /// No routes but those of controllers in the kernel, if there are such.
    pub(crate) fn new(fd: &VmFd, kernel_irqchip: bool) -> Result<Routes, EngineError> {
        let mut state = State::default();
        if kernel_irqchip {
            state.chips = crate::irqchip::routes();
            state.apply(fd)?;
        }
        Ok(Routes(Mutex::new(state)))
    }

    /// What pin `pin` of the I/O APIC sends. A masked pin keeps its route: its last interrupt may still be in service.
    pub(crate) fn set_pin(&self, fd: &VmFd, pin: u8, address: u64, data: u32, masked: bool) {
        let mut s = locked(&self.0);
        let Some(route) = s.pins.get_mut(usize::from(pin)) else { return };
        let new = match (masked, data & 0xff) {
            // Never programmed, or no vector that an APIC takes.
            (_, 0..16) => None,
            (true, _) => return,
            (false, _) => Some((address, data)),
        };
        if std::mem::replace(route, new) != new {
            // What can fail is the host's memory; then a level-triggered interrupt comes once too few, and the guest times out.
            let _ = s.apply(fd);
        }
    }
}

impl State {
    fn apply(&self, fd: &VmFd) -> Result<(), EngineError> {
        let pins = (0..).zip(self.pins).filter_map(|(n, m)| Some(entry(n, m?)));
        let others = self.interrupts.iter().filter_map(|(&n, i)| Some(entry(n, i.message?)));
        let entries: Vec<kvm_irq_routing_entry> =
            self.chips.iter().copied().chain(pins).chain(others).collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| EngineError::Internal(format!("{} interrupt routes are too many", entries.len())))?;
        fd.set_gsi_routing(&routing).map_err(host("setting interrupt routes"))
    }
}

fn own(fd: BorrowedFd<'_>) -> Result<EventFd, EngineError> {
    let owned = fd
        .try_clone_to_owned()
        .map_err(|source| EngineError::Host { what: "duplicating an eventfd".into(), source })?;
    // SAFETY: the descriptor is owned and given away here.
    Ok(unsafe { EventFd::from_raw_fd(owned.into_raw_fd()) })
}

/// A use of event descriptors that this KVM lacks, or that was not wanted.
fn off(what: &str) -> EngineError {
    EngineError::Internal(format!("no {what} here"))
}

fn no_such(interrupt: u32) -> EngineError {
    EngineError::Internal(format!("there is no interrupt {interrupt}"))
}

fn address(a: DoorbellAddress) -> IoEventAddress {
    match a {
        DoorbellAddress::Port(p) => IoEventAddress::Pio(p.into()),
        DoorbellAddress::Mmio(m) => IoEventAddress::Mmio(m),
    }
}

/// Register or unregister a doorbell, whose width and value are types to the wrapper.
macro_rules! doorbell {
    ($vm:expr, $call:ident, $fd:expr, $d:expr) => {{
        let at = address($d.address);
        match ($d.value, $d.len) {
            (Some(v), 1) => $vm.fd.$call($fd, &at, v as u8),
            (Some(v), 2) => $vm.fd.$call($fd, &at, v as u16),
            (Some(v), 4) => $vm.fd.$call($fd, &at, v as u32),
            (Some(v), 8) => $vm.fd.$call($fd, &at, v),
            (None, 0) => $vm.fd.$call($fd, &at, NoDatamatch),
            _ => return Err(EngineError::Internal(format!("a doorbell cannot be {:?}", $d))),
        }
    }};
}

impl EventFds for VmShared {
    fn add_doorbell(&self, doorbell: &Doorbell, fd: BorrowedFd<'_>) -> Result<(), EngineError> {
        if !self.events.doorbells {
            return Err(off("ioeventfd"));
        }
        let fd = own(fd)?;
        doorbell!(self, register_ioevent, &fd, doorbell).map_err(host("connecting a doorbell"))
    }

    fn remove_doorbell(&self, doorbell: &Doorbell, fd: BorrowedFd<'_>) -> Result<(), EngineError> {
        let fd = own(fd)?;
        doorbell!(self, unregister_ioevent, &fd, doorbell).map_err(host("disconnecting a doorbell"))
    }

    fn add_interrupt(&self, fd: BorrowedFd<'_>) -> Result<u32, EngineError> {
        if !self.events.interrupts {
            return Err(off("irqfd"));
        }
        let fd = own(fd)?;
        let mut s = locked(&self.routes.0);
        let free = (FIRST..ROUTES).find(|n| !s.interrupts.contains_key(n));
        let number = free.ok_or_else(|| EngineError::Internal("all interrupt routes are in use".into()))?;
        s.interrupts.insert(number, Interrupt { fd, message: None, connected: false });
        Ok(number)
    }

    fn set_message(&self, interrupt: u32, message: Option<(u64, u32)>) -> Result<(), EngineError> {
        let mut s = locked(&self.routes.0);
        let i = s.interrupts.get_mut(&interrupt).ok_or_else(|| no_such(interrupt))?;
        if i.message == message && i.connected == message.is_some() {
            return Ok(());
        }
        // Connected only while it has a message: what is written before that stays in the eventfd, and is sent then.
        if i.connected && message.is_none() {
            self.fd.unregister_irqfd(&i.fd, interrupt).map_err(host("disconnecting an interrupt"))?;
            i.connected = false;
        }
        let before = std::mem::replace(&mut i.message, message);
        if let Err(e) = s.apply(&self.fd) {
            // The kernel has the old routes still.
            s.interrupts.entry(interrupt).and_modify(|i| i.message = before);
            return Err(e);
        }
        let i = s.interrupts.get_mut(&interrupt).ok_or_else(|| no_such(interrupt))?;
        if !i.connected && message.is_some() {
            self.fd.register_irqfd(&i.fd, interrupt).map_err(host("connecting an interrupt"))?;
            i.connected = true;
        }
        Ok(())
    }

    fn remove_interrupt(&self, interrupt: u32) -> Result<(), EngineError> {
        let end = self.set_message(interrupt, None);
        locked(&self.routes.0).interrupts.remove(&interrupt).ok_or_else(|| no_such(interrupt))?;
        end
    }

    fn settle(&self) -> Result<(), EngineError> {
        // The kernel may deliver from a work item. Disconnecting waits for it; what is written meanwhile is seen with the connection.
        for (&number, i) in &mut locked(&self.routes.0).interrupts {
            if i.message.is_none() {
                continue;
            }
            if i.connected {
                self.fd.unregister_irqfd(&i.fd, number).map_err(host("disconnecting an interrupt"))?;
                i.connected = false;
            }
            self.fd.register_irqfd(&i.fd, number).map_err(host("connecting an interrupt"))?;
            i.connected = true;
        }
        Ok(())
    }

    fn coalesce(&self, at: DoorbellAddress, len: u32) -> Result<(), EngineError> {
        let can = match at {
            DoorbellAddress::Mmio(_) => self.events.queued_mmio,
            DoorbellAddress::Port(_) => self.events.queued_ports,
        };
        if !can {
            return Err(off("queue of stores"));
        }
        self.fd.register_coalesced_mmio(address(at), len).map_err(host("queueing stores"))?;
        self.coalescing.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_beyond_255_go_to_the_upper_half() {
        assert_eq!(msi_address(0xfee0_5000), (0xfee0_5000, 0));
        // Destination 0x105, logical, redirection hint.
        assert_eq!(msi_address(0xfee0_502c), (0xfee0_500c, 1 << 8));
        assert_eq!(msi_address(0x1_0000_0000 | 0xfee0_5000), (0xfee0_5000, 1));
    }
}
