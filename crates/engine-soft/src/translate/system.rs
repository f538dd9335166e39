//! What kernels execute at every entry, exit and lock, without a handler: the interrupt flag, SWAPGS, AC, PUSHF; and RDTSC.
//!
//! Each but the last looks whether it is at privilege level 0 and nothing special is about, else the handler does it.

use super::asm::{SP, T0, T1, TLB};
use super::block::Emit;
use super::choose::How;
use super::stubs::{ARITH, REQUESTS, TLB_SET};
use crate::cpu::Cpu;
use crate::decode::Op;
use crate::mmu::{Mmu, mode};
use crate::vcpu::time::HostClock;
use ringfort_x86::cr::{CR4_SMAP, CR4_TSD};
use ringfort_x86::flags::{AC, IF, RF, VM};
use ringfort_x86::segment::{GS, Segment};
use std::mem::offset_of;

const CPL: i32 = offset_of!(Cpu, cpl) as i32;
const CR4: i32 = offset_of!(Cpu, cr4) as i32;
const TSC_OFFSET: i32 = offset_of!(Cpu, tsc_offset) as i32;
const HOST_TSC: i32 =
    (offset_of!(Cpu, local) + offset_of!(crate::apic::Local, clock) + HostClock::TSC) as i32;
/// Offset of the flags that are not arithmetic.
pub(super) const SYS_FLAGS: i32 = offset_of!(Cpu, sys_flags) as i32;
const HELD: i32 = (offset_of!(Cpu, local) + offset_of!(crate::apic::Local, held)) as i32;
const GS_BASE: i32 = (offset_of!(Cpu, seg) + GS * size_of::<Segment>() + offset_of!(Segment, base)) as i32;
const KERNEL_GS_BASE: i32 = offset_of!(Cpu, kernel_gs_base) as i32;
const SUPERVISOR: i32 = (offset_of!(Cpu, mmu) + Mmu::SUPERVISOR_SETS) as i32;
const ACCESS_MODE: i32 = (offset_of!(Cpu, mmu) + offset_of!(Mmu, access_mode)) as i32;

impl Emit<'_> {
    /// Emit a system instruction of one of the forms here. `last`: it is the block's last.
    pub(super) fn system(&mut self, how: How, op: &Op, last: bool) {
        if how == How::EnableInterrupts && last {
            // What follows, which no interrupt may precede, lies in another block.
            return self.by_handler(op);
        }
        self.spare_flags();
        let lost = self.lost();
        self.c.cpu32(&[0x80], 7, CPL);
        self.c.raw(&[0]); // cmp byte [cpl], 0
        let user = self.c.jcc(5);
        match how {
            How::DisableInterrupts => self.change_flags(4, !(IF as u32)),
            How::EnableInterrupts => {
                self.c.cpu32(&[0xf7], 0, SYS_FLAGS);
                self.c.raw(&(IF as u32).to_le_bytes()); // test dword [sys_flags], IF
                let enabled = self.c.jcc(5);
                // If nothing waits, nothing shows that interrupts are held off until the next instruction is done.
                self.c.cpu32(&[0x83], 7, HELD);
                self.c.raw(&[0]); // cmp dword [held], 0
                let held = self.c.jcc(5);
                self.c.load_cpu(T1, REQUESTS);
                self.c.raw(&[0x41, 0x83, 0x3e, 0x00]); // cmp dword [r14], 0
                let requested = self.c.jcc(5);
                self.change_flags(1, IF as u32);
                self.c.land(enabled);
                self.slow_path(held, op, lost);
                self.slow_path(requested, op, lost);
            }
            How::SwapGs => {
                self.c.load_cpu(T0, GS_BASE);
                self.c.load_cpu(T1, KERNEL_GS_BASE);
                self.c.store_cpu(T1, GS_BASE);
                self.c.store_cpu(T0, KERNEL_GS_BASE);
            }
            How::UserAccess(on) => {
                self.c.cpu32(&[0xf7], 0, CR4);
                self.c.raw(&(CR4_SMAP as u32).to_le_bytes());
                let no_smap = self.c.jcc(4);
                let (operation, mask, m) = if on {
                    (1, AC as u32, mode::SUPERVISOR_USER)
                } else {
                    (4, !(AC as u32), mode::SUPERVISOR)
                };
                self.change_flags(operation, mask);
                self.c.load_cpu(TLB, SUPERVISOR + 8 * m as i32);
                self.c.store_cpu(TLB, TLB_SET);
                self.c.cpu(0xc7, 0, ACCESS_MODE);
                self.c.raw(&(m as u32).to_le_bytes());
                self.slow_path(no_smap, op, lost);
            }
            How::PushFlags => {
                // The flags go to memory, from where they are put together.
                self.save_flags();
                self.at = super::replay::At::Memory;
                self.c.cpu32(&[0x0f, 0xb7], T0, ARITH); // movzx r13d, word [arith]
                self.c.raw(&[0x45, 0x89, 0xee]); // mov r14d, r13d
                self.c.raw(&[0x41, 0xc1, 0xed, 0x08]); // shr r13d, 8
                self.c.raw(&[0x41, 0x83, 0xe6, 0x01]); // and r14d, 1
                self.c.raw(&[0x41, 0xc1, 0xe6, 0x0b]); // shl r14d, 11
                self.c.raw(&[0x45, 0x09, 0xf5]); // or r13d, r14d
                self.c.cpu(0x0b, T0, SYS_FLAGS); // or r13, [sys_flags]
                self.c.raw(&[0x41, 0x81, 0xe5]); // and r13d: bit 1 is set by LAHF
                self.c.raw(&(!(VM | RF) as u32).to_le_bytes());
                self.keep(T0);
                let (o, lost) = self.stack(SP, -8, true);
                self.kept(o.spare);
                self.c.mem(0x89, o.spare, o.at);
                self.c.lea(SP, Some(SP), None, -8);
                self.slow_path(o.miss, op, lost);
            }
            _ => {}
        }
        self.slow_path(user, op, lost);
    }

    /// RDTSC where the guest's counter is the host's and an offset.
    pub(super) fn read_time(&mut self, op: &Op) {
        self.spare_flags();
        let lost = self.lost();
        self.c.cpu32(&[0xf7], 0, CR4);
        self.c.raw(&(CR4_TSD as u32).to_le_bytes()); // test dword [cr4], TSD
        let forbidden = self.c.jcc(5);
        self.c.cpu32(&[0x80], 7, HOST_TSC);
        self.c.raw(&[0]); // cmp byte [tsc], 0
        let other_clock = self.c.jcc(4);
        // The guest's own LFENCE lies too many host instructions back to say anything about the host's RDTSC.
        self.c.raw(&[0x0f, 0xae, 0xe8, 0x0f, 0x31]); // lfence; rdtsc
        self.c.raw(&[0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xc2]); // shl rdx, 32; or rdx, rax
        self.c.cpu(0x03, 2, TSC_OFFSET); // add rdx, [tsc_offset]
        self.c.raw(&[0x89, 0xd0, 0x48, 0xc1, 0xea, 0x20]); // mov eax, edx; shr rdx, 32
        self.slow_path(forbidden, op, lost);
        self.slow_path(other_clock, op, lost);
    }

    /// AND (4) or OR (1) of the flags that are not arithmetic.
    fn change_flags(&mut self, operation: u8, mask: u32) {
        self.c.cpu32(&[0x81], operation, SYS_FLAGS);
        self.c.raw(&mask.to_le_bytes());
    }
}
