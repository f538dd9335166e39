//! Registers between KVM's form and [`CpuState`]'s.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use ringfort_engine::CpuState;
use ringfort_x86::segment::{CS, DS, ES, FS, GS, PRESENT, SS, Segment, TableRegister};

pub(super) fn segment(s: &kvm_segment) -> Segment {
    let bit = |v: u8, n: u32| u16::from(v & 1) << n;
    let present = if s.unusable != 0 { 0 } else { s.present };
    let attrs = u16::from(s.type_ & 15)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15);
    Segment { selector: s.selector, attrs, limit: s.limit, base: s.base }
}

pub(super) fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.attrs >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attrs & 15) as u8,
        present: bit(7),
        dpl: (s.attrs >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(s.attrs & PRESENT == 0),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> TableRegister {
    TableRegister { base: t.base, limit: t.limit }
}

fn to_table(t: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

pub(super) fn take_regs(state: &mut CpuState, r: &kvm_regs) {
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

pub(super) fn to_regs(s: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: s.rip,
        rflags: s.rflags,
    }
}

pub(super) fn take_sregs(state: &mut CpuState, s: &kvm_sregs) {
    for (n, g) in [(ES, &s.es), (CS, &s.cs), (SS, &s.ss), (DS, &s.ds), (FS, &s.fs), (GS, &s.gs)] {
        state.segments[n] = segment(g);
    }
    state.tr = segment(&s.tr);
    state.ldtr = segment(&s.ldt);
    state.gdtr = table(&s.gdt);
    state.idtr = table(&s.idt);
    state.cr0 = s.cr0;
    state.cr2 = s.cr2;
    state.cr3 = s.cr3;
    state.cr4 = s.cr4;
    state.cr8 = s.cr8;
    state.efer = s.efer;
}

pub(super) fn to_sregs(s: &CpuState, apic_base: u64) -> kvm_sregs {
    kvm_sregs {
        cs: to_segment(&s.segments[CS]),
        ds: to_segment(&s.segments[DS]),
        es: to_segment(&s.segments[ES]),
        fs: to_segment(&s.segments[FS]),
        gs: to_segment(&s.segments[GS]),
        ss: to_segment(&s.segments[SS]),
        tr: to_segment(&s.tr),
        ldt: to_segment(&s.ldtr),
        gdt: to_table(&s.gdtr),
        idt: to_table(&s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_both_ways() {
        for attrs in [0xa09b, 0xc093, 0x008b, 0x0000, 0xd0f3, 0x0093] {
            let s = Segment { selector: 0x33, attrs, limit: 0xffff_ffff, base: 0x1234_5000 };
            assert_eq!(segment(&to_segment(&s)), s, "{attrs:#x}");
        }
        let null = kvm_segment { present: 1, unusable: 1, ..Default::default() };
        assert_eq!(segment(&null).attrs & PRESENT, 0);
    }

    #[test]
    fn registers_survive_both_ways() {
        let mut s = CpuState { rip: 77, rflags: 2, ..CpuState::default() };
        for (n, r) in (100..).zip(&mut s.gpr) {
            *r = n;
        }
        let mut back = CpuState::default();
        take_regs(&mut back, &to_regs(&s));
        assert_eq!(back, s);
    }
}
