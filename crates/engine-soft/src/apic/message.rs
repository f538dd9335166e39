//! Interrupt messages: from devices, I/O APICs and other local APICs.

use super::reg;
use crate::vcpu::{VcpuShared, VmShared, request};
use std::sync::atomic::Ordering;

/// Delivery mode: bits 8 to 10 of ICR, of message data and of LVT entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Delivery {
    /// To all destinations.
    Fixed = 0,
    /// To the destination that runs at the lowest priority.
    LowestPriority = 1,
    /// System management interrupt; not offered.
    Smi = 2,
    /// Reserved.
    Reserved = 3,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT.
    Init = 5,
    /// Start-up.
    StartUp = 6,
    /// The 8259 gives the vector.
    ExtInt = 7,
}

impl Delivery {
    /// From the low three bits of `bits`.
    pub fn from_bits(bits: u32) -> Delivery {
        match bits & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            6 => Delivery::StartUp,
            7 => Delivery::ExtInt,
            _ => Delivery::Reserved,
        }
    }
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// An APIC ID.
    Physical {
        /// The ID.
        id: u32,
        /// The value that means all: 0xff for messages and xAPIC, 0xffff_ffff for x2APIC.
        broadcast: u32,
    },
    /// A set of logical IDs, matched by LDR and DFR.
    Logical {
        /// Message destination address.
        mda: u32,
        /// The value that means all.
        broadcast: u32,
    },
}

impl Destination {
    /// From the fields of a message or an ICR.
    pub fn new(dest: u32, logical: bool, broadcast: u32) -> Destination {
        if logical {
            Destination::Logical { mda: dest, broadcast }
        } else {
            Destination::Physical { id: dest, broadcast }
        }
    }
}

/// ICR bits 18 and 19.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination field counts.
    None,
    /// The sender.
    Own,
    /// All, the sender too.
    All,
    /// All but the sender.
    Others,
}

/// One message.
#[derive(Debug, Clone, Copy)]
pub struct Message {
    /// Vector.
    pub vector: u8,
    /// Delivery mode.
    pub delivery: Delivery,
    /// Level triggered.
    pub level: bool,
    /// INIT level de-assert: has no effect on any current processor.
    pub deassert: bool,
    /// Whom for.
    pub to: Destination,
    /// Only to the lowest-priority one of the destinations.
    pub redirect: bool,
    /// Replaces `to`.
    pub shorthand: Shorthand,
}

impl Message {
    /// A message-signalled interrupt (Intel SDM 3A section 12.11). Address bits 5 to 11 carry destination bits 8 to 14 (the extended
    /// destination ID that KVM and Hyper-V guests know), and bits 40 to 63 destination bits 8 to 31. `None` if the address is not in the
    /// interrupt range.
    pub fn from_msi(address: u64, data: u32) -> Option<Message> {
        if address >> 20 & 0xfff != 0xfee {
            return None;
        }
        let low = address >> 12 & 0xff;
        let middle = address >> 5 & 0x7f;
        let dest = low as u32 | (middle as u32) << 8 | (address >> 32) as u32 & 0xffff_ff00;
        Some(Message {
            vector: data as u8,
            delivery: Delivery::from_bits(data >> 8),
            level: data >> 15 & 1 != 0,
            deassert: false,
            to: Destination::new(dest, address & 4 != 0, 0xff),
            redirect: address & 8 != 0,
            shorthand: Shorthand::None,
        })
    }

    /// What a write to ICR sends. `high` is the destination: ICR bits 56 to 63 in xAPIC mode, 32 to 63 in x2APIC mode.
    pub fn from_icr(low: u32, high: u32, x2apic: bool) -> Message {
        let broadcast = if x2apic { u32::MAX } else { 0xff };
        let delivery = Delivery::from_bits(low >> 8);
        let level = low >> 15 & 1 != 0;
        Message {
            vector: low as u8,
            delivery,
            // Trigger mode counts for INIT only: IPIs are edges.
            level: false,
            deassert: delivery == Delivery::Init && level && low >> 14 & 1 == 0,
            to: Destination::new(high, low >> 11 & 1 != 0, broadcast),
            redirect: false,
            shorthand: match low >> 18 & 3 {
                0 => Shorthand::None,
                1 => Shorthand::Own,
                2 => Shorthand::All,
                _ => Shorthand::Others,
            },
        }
    }
}

impl VcpuShared {
    /// Take a message: this APIC is a destination. From any thread.
    pub fn accept(&self, vector: u8, delivery: Delivery, level: bool) {
        if self.lapic.mode() == super::Mode::Disabled {
            return;
        }
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                if self.lapic.software_enabled() && self.lapic.post(vector, level) {
                    self.request(request::INTERRUPT);
                }
            }
            Delivery::Nmi => self.request(request::NMI),
            Delivery::Init => {
                // A start-up message before this INIT is forgotten.
                self.requests.fetch_and(!request::SIPI, Ordering::SeqCst);
                self.request(request::INIT);
            }
            Delivery::StartUp => {
                self.sipi_vector.store(vector.into(), Ordering::SeqCst);
                self.request(request::SIPI);
            }
            // No system management mode; a message of ExtINT type has no meaning without the 8259's line, which is wired to LINT0.
            Delivery::Smi | Delivery::Reserved | Delivery::ExtInt => {}
        }
    }
}

impl VmShared {
    /// Deliver `m`, sent by the APIC with initial ID `from` (if by one). Gives how many took it. From any thread.
    pub fn deliver(&self, m: &Message, from: Option<u32>) -> usize {
        if m.deassert {
            return 0;
        }
        let vcpus = self.vcpus();
        let is_for = |v: &VcpuShared| match m.shorthand {
            Shorthand::None => v.lapic.is_destination(m.to),
            Shorthand::Own => Some(v.apic_id) == from,
            Shorthand::All => true,
            Shorthand::Others => Some(v.apic_id) != from,
        };
        if m.delivery == Delivery::LowestPriority || m.redirect && m.delivery == Delivery::Fixed {
            let candidates = || vcpus.iter().filter(|v| is_for(v) && v.lapic.software_enabled());
            let Some(lowest) = candidates().map(|v| v.lapic.priority() >> 4).min() else { return 0 };
            // Equal priorities take turns.
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) as usize;
            let equals = || candidates().filter(|v| v.lapic.priority() >> 4 <= lowest);
            // A priority may have risen since; then whoever is left, or the first.
            let n = equals().count().max(1);
            let chosen = equals().nth(turn % n).or_else(|| candidates().next());
            if let Some(v) = chosen {
                v.accept(m.vector, m.delivery, m.level);
            }
            return usize::from(chosen.is_some());
        }
        let mut taken = 0;
        for v in vcpus.iter().filter(|v| is_for(v)) {
            v.accept(m.vector, m.delivery, m.level);
            taken += 1;
        }
        taken
    }

    /// The 8259's output changed: an edge or level at LINT0 of every local APIC. From any thread.
    pub fn set_extint(&self, high: bool) {
        let before = self.extint.swap(high, Ordering::SeqCst);
        for v in self.vcpus().iter() {
            let lvt = v.lapic.get(reg::LVT_LINT0);
            if v.takes_extint() {
                if high {
                    v.request(request::INTERRUPT);
                }
            } else if lvt & super::LVT_MASKED == 0 && high && !before {
                match Delivery::from_bits(lvt >> 8) {
                    Delivery::Fixed => v.accept(lvt as u8, Delivery::Fixed, false),
                    Delivery::Nmi => v.accept(2, Delivery::Nmi, false),
                    _ => {}
                }
            }
        }
    }

    /// Raise NMI on the vCPU with this APIC ID: the CPU's own pin, whatever LINT1 is programmed for. From any thread.
    pub fn inject_nmi(&self, apic_id: u32) {
        if let Some(v) = self.vcpus().iter().find(|v| v.apic_id == apic_id) {
            v.request(request::NMI);
        }
    }
}

impl VcpuShared {
    /// Whether the 8259's line reaches this CPU: LINT0 passes it on as ExtINT, or there is no APIC between.
    pub fn takes_extint(&self) -> bool {
        let lvt = self.lapic.get(reg::LVT_LINT0);
        self.lapic.mode() == super::Mode::Disabled
            || lvt & super::LVT_MASKED == 0 && Delivery::from_bits(lvt >> 8) == Delivery::ExtInt
    }
}
