//! 8259 pair, I/O APIC and 8254 in the kernel.
//!
//! Each input has a route of its own: 0 to 15 to the 8259 pair, from [`IOAPIC_FIRST`] on to the I/O APIC. Number 0 goes to both, since the
//! kernel's 8254 drives it.

use crate::error::host;
use crate::vm::VmShared;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_config,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use ringfort_bus::irqchip::{IOAPIC_PINS, IoApicRegisters, PicRegisters, PitChannel, PitRegisters};
use ringfort_engine::{EngineError, Irqchip};

/// Route of the I/O APIC's first input.
pub(crate) const IOAPIC_FIRST: u32 = 24;
/// I/O APIC in a PC's memory map.
const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bits of a redirection entry that exist, but for the delivery status.
const ENTRY: u64 = 0xff00_0000_0001_efff;
/// Inputs that may be level-triggered, master and slave.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];
/// States of the kernel's two-byte accesses: high byte next.
const WORD1: u8 = 4;
const WORD0: u8 = 3;

/// The kernel's mode of a channel that was not programmed: it does not count.
const NOT_PROGRAMMED: u8 = 0xff;

/// Make them. Before any vCPU.
pub(crate) fn create(fd: &VmFd) -> Result<(), EngineError> {
    fd.create_irq_chip().map_err(host("making the interrupt controllers"))?;
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    fd.create_pit2(config).map_err(host("making the interval timer"))
}

/// Routes of all inputs.
pub(crate) fn routes() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi: u32, irqchip: u32, pin: u32| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let master = (0..8).filter(|n| *n != 2).map(|n| entry(n, KVM_IRQCHIP_PIC_MASTER, n));
    let slave = (0..8).map(|n| entry(8 + n, KVM_IRQCHIP_PIC_SLAVE, n));
    let ioapic = (0..IOAPIC_PINS as u32).map(|n| entry(IOAPIC_FIRST + n, KVM_IRQCHIP_IOAPIC, n));
    // The timer's interrupt is input 2 of the I/O APIC.
    master.chain(slave).chain(ioapic).chain([entry(0, KVM_IRQCHIP_IOAPIC, 2)]).collect()
}

fn take_pic(s: &kvm_pic_state) -> PicRegisters {
    PicRegisters {
        irr: s.irr,
        imr: s.imr,
        isr: s.isr,
        lines: s.last_irr & !s.elcr | s.irr & s.elcr,
        elcr: s.elcr,
        lowest: s.priority_add.wrapping_add(7) & 7,
        base: s.irq_base & 0xf8,
        expect: if s.init_state == 0 { 0 } else { (s.init_state + 1).min(4) },
        need_icw4: s.init4 != 0,
        auto_eoi: s.auto_eoi != 0,
        rotate_on_aeoi: s.rotate_on_auto_eoi != 0,
        special_mask: s.special_mask != 0,
        special_fully_nested: s.special_fully_nested_mode != 0,
        poll: s.poll != 0,
        read_isr: s.read_reg_select != 0,
    }
}

fn to_pic(s: &PicRegisters, elcr_mask: u8) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: s.lines,
        irr: s.irr,
        imr: s.imr,
        isr: s.isr,
        priority_add: (s.lowest + 1) & 7,
        irq_base: s.base,
        read_reg_select: s.read_isr.into(),
        poll: s.poll.into(),
        special_mask: s.special_mask.into(),
        init_state: s.expect.saturating_sub(1),
        auto_eoi: s.auto_eoi.into(),
        rotate_on_auto_eoi: s.rotate_on_aeoi.into(),
        special_fully_nested_mode: s.special_fully_nested.into(),
        init4: s.need_icw4.into(),
        elcr: s.elcr,
        elcr_mask,
    }
}

fn take_channel(s: &kvm_pit_channel_state, now: i64) -> PitChannel {
    PitChannel {
        count: s.count.clamp(1, 0x10000),
        mode: if s.mode > 5 { s.mode & 3 } else { s.mode },
        bcd: s.bcd != 0,
        access: s.rw_mode & 3,
        gate: s.gate != 0,
        elapsed_ns: (s.mode <= 5).then(|| match s.count_load_time {
            // Channel 0's time is a timer of the kernel's that it does not tell: its count begins anew.
            0 => 0,
            at => u64::try_from(now - at).unwrap_or(0),
        }),
        low_byte: (s.write_state == WORD1).then_some(s.write_latch),
        read_high: s.read_state == WORD1,
        latched: (s.count_latched != 0).then_some(s.latched_count),
        latched_status: (s.status_latched != 0).then_some(s.status),
    }
}

fn to_channel(s: &PitChannel) -> kvm_pit_channel_state {
    let word = |high: bool| match (s.access, high) {
        (3, true) => WORD1,
        (3, false) => WORD0,
        (one, _) => one,
    };
    kvm_pit_channel_state {
        count: s.count,
        latched_count: s.latched.unwrap_or(0),
        count_latched: if s.latched.is_some() { s.access } else { 0 },
        status_latched: s.latched_status.is_some().into(),
        status: s.latched_status.unwrap_or(0),
        read_state: word(s.read_high),
        write_state: word(s.low_byte.is_some()),
        write_latch: s.low_byte.unwrap_or(0),
        rw_mode: s.access,
        mode: if s.elapsed_ns.is_some() { s.mode } else { NOT_PROGRAMMED },
        bcd: s.bcd.into(),
        gate: s.gate.into(),
        count_load_time: 0,
    }
}

/// The clock by which the kernel notes when counts were loaded.
fn monotonic_ns() -> i64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writes, and the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

impl VmShared {
    fn chip(&self, chip_id: u32) -> Result<kvm_irqchip, EngineError> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.fd.get_irqchip(&mut chip).map_err(host("reading an interrupt controller"))?;
        Ok(chip)
    }

    fn set_chip(&self, chip: &kvm_irqchip) -> Result<(), EngineError> {
        self.fd.set_irqchip(chip).map_err(host("setting an interrupt controller"))
    }
}

impl Irqchip for VmShared {
    fn set_pic(&self, input: u8, high: bool) {
        // Inputs that do not exist have no route; nothing else can fail.
        let _ = self.fd.set_irq_line(input.into(), high);
    }

    fn set_ioapic(&self, pin: u8, high: bool) {
        let _ = self.fd.set_irq_line(IOAPIC_FIRST + u32::from(pin), high);
    }

    fn pics(&self) -> Result<[PicRegisters; 2], EngineError> {
        let one = |id| -> Result<PicRegisters, EngineError> {
            let chip = self.chip(id)?;
            // SAFETY: for the number of an 8259 the kernel fills this member of the union.
            Ok(take_pic(unsafe { &chip.chip.pic }))
        };
        Ok([one(KVM_IRQCHIP_PIC_MASTER)?, one(KVM_IRQCHIP_PIC_SLAVE)?])
    }

    fn ioapic(&self) -> Result<IoApicRegisters, EngineError> {
        let chip = self.chip(KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: for the number of the I/O APIC the kernel fills this member of the union.
        let s = unsafe { &chip.chip.ioapic };
        Ok(IoApicRegisters {
            select: s.ioregsel as u8,
            id: s.id as u8 & 15,
            lines: s.irr & 0xff_ffff,
            // SAFETY: both views of an entry are 64 bits.
            entries: std::array::from_fn(|n| unsafe { s.redirtbl[n].bits } & ENTRY),
        })
    }

    fn pit(&self) -> Result<PitRegisters, EngineError> {
        let s = self.fd.get_pit2().map_err(host("reading the interval timer"))?;
        let now = monotonic_ns();
        Ok(PitRegisters {
            channels: s.channels.each_ref().map(|c| take_channel(c, now)),
            speaker: s.flags & SPEAKER_ON != 0,
        })
    }

    fn set(
        &self,
        pics: &[PicRegisters; 2],
        ioapic: &IoApicRegisters,
        pit: &PitRegisters,
    ) -> Result<(), EngineError> {
        for (n, id) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().enumerate() {
            let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
            chip.chip.pic = to_pic(&pics[n], ELCR_MASK[n]);
            self.set_chip(&chip)?;
        }
        let mut chip = self.chip(KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: for the number of the I/O APIC this member of the union is the one in use.
        let s = unsafe { &mut chip.chip.ioapic };
        s.base_address = IOAPIC_BASE;
        s.ioregsel = ioapic.select.into();
        s.id = ioapic.id.into();
        // The kernel raises what is in here: levels that ask. An edge on an open input has been sent.
        s.irr = (0..IOAPIC_PINS)
            .filter(|&n| ioapic.lines >> n & 1 != 0 && ioapic.entries[n] & LEVEL != 0)
            .fold(0, |bits, n| bits | 1 << n);
        for (to, from) in s.redirtbl.iter_mut().zip(ioapic.entries) {
            to.bits = from;
        }
        self.set_chip(&chip)?;
        let mut state = kvm_pit_state2 {
            channels: pit.channels.each_ref().map(to_channel),
            flags: if pit.speaker { SPEAKER_ON } else { 0 },
            ..Default::default()
        };
        self.fd
            .set_pit2(&state)
            .or_else(|e| {
                // Kernels before 5.19 do not know that flag.
                if state.flags == 0 {
                    return Err(e);
                }
                state.flags = 0;
                self.fd.set_pit2(&state)
            })
            .map_err(host("setting the interval timer"))
    }
}

/// Redirection entry: level-triggered.
const LEVEL: u64 = 1 << 15;
/// KVM_PIT_FLAGS_SPEAKER_DATA_ON.
const SPEAKER_ON: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_survive_both_ways() {
        let pic = PicRegisters {
            irr: 0x21,
            imr: 0xfe,
            isr: 1,
            lines: 0x21,
            elcr: 0x20,
            lowest: 3,
            base: 0x30,
            expect: 3,
            need_icw4: true,
            auto_eoi: true,
            special_mask: true,
            read_isr: true,
            ..PicRegisters::default()
        };
        assert_eq!(take_pic(&to_pic(&pic, 0xf8)), pic);
        let after_reset = PicRegisters { lowest: 7, ..PicRegisters::default() };
        assert_eq!(to_pic(&after_reset, 0xf8).priority_add, 0);
        assert_eq!(take_pic(&to_pic(&after_reset, 0xf8)), after_reset);
    }

    #[test]
    fn channels_survive_both_ways() {
        let c = PitChannel {
            count: 11932,
            mode: 2,
            access: 3,
            gate: true,
            elapsed_ns: Some(5000),
            low_byte: Some(0x9c),
            read_high: true,
            latched: Some(77),
            latched_status: Some(0x34),
            bcd: false,
        };
        let kernel = kvm_pit_channel_state { count_load_time: 1_000_000, ..to_channel(&c) };
        assert_eq!(take_channel(&kernel, 1_005_000), c);
        assert_eq!(take_channel(&to_channel(&c), 7).elapsed_ns, Some(0));
        let idle = PitChannel { mode: 3, access: 3, count: 0x10000, gate: true, ..PitChannel::default() };
        assert_eq!(take_channel(&to_channel(&idle), 7), idle);
    }
}
