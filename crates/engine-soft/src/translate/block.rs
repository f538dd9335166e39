//! One block: from guest instructions to host code.

use super::asm::{CPU, Code, Hole, RAX, SP, T0, T1, T2};
use super::choose::{How, condition, how, writes_memory};
use super::flags::{self, ALL};
use super::stubs::{ARITH, BUDGET, PINNED, REQUESTS, TLB, reg_at};
use super::{Stubs, Translator};
use crate::cache::Block;
use crate::cpu::{CodeSize, Cpu, RIP, ZERO};
use crate::decode::{self, Fetched, Op, op_flags};
use crate::mmu::{TLB_ENTRIES, TlbEntry};
use iced_x86::{Code as I, Encoder, Instruction, OpKind, Register};
use std::mem::offset_of;

/// Most host bytes that one guest instruction becomes, slow path included; blocks are not begun with less room than this for each op.
const MOST_PER_OP: usize = 400;

/// From a jump that waits to be linked to the physical page that it lies in.
pub(super) const SLOT_PAGE: usize = 16;

/// Where the guest's arithmetic flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// In the host's flags only.
    Host,
    /// In [`Cpu::arith`] only.
    Memory,
    /// In both.
    Both,
}

/// The slow path of a memory access: the op's handler does all of it.
struct Slow {
    from: Hole,
    op: *const Op,
    back: usize,
    /// Flags must be in the host's flags afterwards.
    flags: bool,
}

struct Emit<'a> {
    c: Code,
    base: usize,
    stubs: &'a Stubs,
    encoder: &'a mut Encoder,
    at: At,
    slow: Vec<Slow>,
    /// Offset in code memory of the piece's first byte.
    start: usize,
    /// Guest physical page of the block.
    page: u64,
}

impl Cpu {
    /// Translate `b`; false if that cannot be done (now).
    #[cold]
    pub(super) fn translate_block(&mut self, b: &Block) -> bool {
        if self.mode.code != CodeSize::Bits64 || !b.one_page() {
            b.heat.set(0);
            return false;
        }
        let Some((slot, offset)) = self.mmu.ram.find(b.gpa) else { return false };
        let left = 0x1000 - (b.gpa & 0xfff) as usize;
        let mut bytes = [0u8; 4096];
        // SAFETY: `left` bytes from the offset lie in the same RAM page.
        unsafe { std::ptr::copy_nonoverlapping(slot.host.add(offset as usize), bytes.as_mut_ptr(), left) };
        let bytes = &bytes[..left];
        let page = {
            let mut page = [0u8; 4096];
            // SAFETY: the whole page that holds the offset lies in RAM, which is mapped in pages.
            unsafe {
                let from = slot.host.add((offset & !0xfff) as usize);
                std::ptr::copy_nonoverlapping(from, page.as_mut_ptr(), 4096);
            }
            page
        };
        // What was copied is what the block was decoded from only if nobody has written meanwhile.
        if !b.is_fresh() {
            return false;
        }
        let Some(t) = self.translator.as_mut() else { return false };
        if t.memory.size() - t.used < (b.ops.len() + 4) * MOST_PER_OP {
            self.drop_translations();
            return false;
        }
        let mut decoder = decode::decoder(bytes, self.mode, self.decode_options);
        let mut instructions = Vec::with_capacity(b.ops.len());
        for _ in 0..b.ops.len() {
            match decode::next(&mut decoder) {
                Fetched::Instruction(i) => instructions.push(i),
                _ => return false,
            }
        }
        let Translator { memory, used, stubs, encoder, blocks, .. } = &mut **t;
        let start = *used;
        let emit = Emit {
            c: Code::default(),
            base: memory.address(start),
            stubs,
            encoder,
            at: At::Memory,
            slow: Vec::new(),
            start,
            page: b.gpa & !0xfff,
        };
        let first = (b.gpa & 0xfff) as usize;
        let look = |distance: i64| {
            let at = first as i64 + distance;
            match usize::try_from(at).ok().filter(|&at| at < 4096) {
                Some(at) => flags::wanted(&page[at..], self.mode, self.decode_options),
                None => ALL,
            }
        };
        let code = emit.block(&b.ops, &instructions, first, b.bytes.into(), look);
        memory.write(start, &code);
        *used = (start + code.len()).next_multiple_of(16);
        *blocks += 1;
        b.code.set(memory.address(start));
        true
    }

    /// Drop all translations: code memory is full, or the blocks are going.
    pub(crate) fn drop_translations(&mut self) {
        if let Some(t) = self.translator.as_mut() {
            t.clear();
            t.flushes += 1;
        }
        self.cache.forget_code();
    }
}

/// The host register that holds a guest general register, if one does.
pub(super) fn pinned(guest: u8) -> Option<u8> {
    PINNED.iter().find(|p| p.0 == guest).map(|p| p.1)
}

/// The number of the general register that `r` is (a part of).
pub(super) fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

/// Register `n` in the width of `like`.
fn in_width(n: u8, like: Register) -> Register {
    let base = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ if n < 4 => Register::AL,
        // AH to BH lie between BL and SPL.
        _ => {
            return Register::try_from(Register::SPL as usize + usize::from(n) - 4).unwrap_or(Register::None);
        }
    };
    Register::try_from(base as usize + usize::from(n)).unwrap_or(Register::None)
}

impl Emit<'_> {
    /// Flags go to memory if they are only in the host's.
    fn save_flags(&mut self) {
        if self.at == At::Host {
            self.c.mov(T2, RAX);
            self.c.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
            self.c.raw(&[0x66, 0x41, 0x89, 0x87]); // mov [r15 + arith], ax
            self.c.raw(&ARITH.to_le_bytes());
            self.c.mov(RAX, T2);
            self.at = At::Both;
        }
    }

    /// Flags come into the host's if they are only in memory.
    fn load_flags(&mut self) {
        if self.at == At::Memory {
            self.flags_from_memory();
            self.at = At::Both;
        }
    }

    fn flags_from_memory(&mut self) {
        self.c.mov(T2, RAX);
        self.c.raw(&[0x41, 0x0f, 0xb7, 0x87]); // movzx eax, word [r15 + arith]
        self.c.raw(&ARITH.to_le_bytes());
        self.c.raw(&[0x04, 0x7f, 0x9e]); // add al, 7fh: OF if al was 1; sahf
        self.c.mov(RAX, T2);
    }

    /// A guest register's value: the host register that holds it, or `temp` after a load.
    fn value(&mut self, guest: u8, temp: u8) -> u8 {
        pinned(guest).unwrap_or_else(|| {
            self.c.load(temp, CPU, reg_at(guest));
            temp
        })
    }

    /// The linear address of the memory operand into [`T0`]; uses [`T1`].
    fn address(&mut self, op: &Op) {
        let disp = op.disp as i64;
        let near = i32::try_from(disp);
        let base = match op.base {
            ZERO => None,
            RIP => {
                self.c.load(T0, CPU, reg_at(RIP));
                Some(T0)
            }
            n => Some(self.value(n, T0)),
        };
        let index = (op.index != ZERO).then(|| (self.value(op.index, T1), op.scale));
        match near {
            Ok(d) => self.c.lea(T0, base, index, d),
            Err(_) => {
                // Only absolute addresses and RIP-relative ones folded by the decoder are that far away.
                self.c.lea(T0, base, index, 0);
                self.c.imm64(T1, op.disp);
                self.c.rr(0x01, T1, T0);
            }
        }
        if op.flags & op_flags::FLAT32 != 0 {
            self.c.raw(&[0x45, 0x89, 0xed]); // mov r13d, r13d
        } else if op.flags & op_flags::FLAT == 0 {
            let at = offset_of!(Cpu, seg) + usize::from(op.seg) * size_of::<ringfort_x86::Segment>();
            let at = at + offset_of!(ringfort_x86::Segment, base);
            self.c.rm(0x03, T0, CPU, at as i32);
        }
    }

    /// Probe the TLB for the linear address in [`T0`]; afterwards it holds the host address. Uses [`T1`], [`T2`] and the flags.
    fn probe(&mut self, size: usize, write: bool) -> Hole {
        const SHIFT: u8 = 12 - size_of::<TlbEntry>().trailing_zeros() as u8;
        const MASK: u32 = (TLB_ENTRIES as u32 - 1) << (12 - SHIFT);
        let tag = if write { offset_of!(TlbEntry, write) } else { offset_of!(TlbEntry, read) };
        self.c.mov(T1, T0);
        self.c.raw(&[0x49, 0xc1, 0xee, SHIFT]); // shr r14
        self.c.raw(&[0x41, 0x81, 0xe6]); // and r14d
        self.c.raw(&MASK.to_le_bytes());
        self.c.rm(0x03, T1, CPU, TLB); // add r14, [tlb]
        if size > 1 {
            self.c.raw(&[0x4d, 0x8d, 0x5d, size as u8 - 1]); // lea r11, [r13 + size - 1]
        } else {
            self.c.mov(T2, T0);
        }
        self.c.raw(&[0x49, 0x81, 0xe3, 0x00, 0xf0, 0xff, 0xff]); // and r11, -4096
        self.c.raw(&[0x4d, 0x3b, 0x5e, tag as u8]); // cmp r11, [r14 + tag]
        let slow = self.c.jcc(5);
        self.c.raw(&[0x4d, 0x03, 0x6e, offset_of!(TlbEntry, addend) as u8]); // add r13, [r14 + addend]
        slow
    }

    /// The handler executes `op`.
    fn call(&mut self, op: *const Op) {
        self.c.imm64(T0, op as u64);
        let (base, to) = (self.base, self.stubs.call);
        self.c.far(0xe8, base, to);
    }

    /// The handler executes `op`, which finds and leaves the flags in memory.
    fn by_handler(&mut self, op: *const Op) {
        self.save_flags();
        self.call(op);
        self.at = At::Memory;
    }

    /// Encode a host instruction; false if it has no encoding.
    fn host(&mut self, i: &Instruction) -> bool {
        let done = self.encoder.encode(i, 0).is_ok();
        let bytes = self.encoder.take_buffer();
        if done {
            self.c.raw(&bytes);
        }
        self.encoder.set_buffer(bytes_for_reuse(bytes));
        done
    }

    /// RIP becomes the block's plus `distance`, also in [`T0`].
    fn move_rip(&mut self, distance: i64) {
        self.c.load(T0, CPU, reg_at(RIP));
        match i32::try_from(distance) {
            Ok(d) => self.c.lea(T0, Some(T0), None, d),
            Err(_) => {
                self.c.imm64(T1, distance as u64);
                self.c.lea(T0, Some(T0), Some((T1, 0)), 0);
            }
        }
        self.c.store(T0, CPU, reg_at(RIP));
    }

    /// Go to the block `distance` bytes from this one's beginning. `first` is this one's place in its page.
    fn go(&mut self, first: usize, distance: i64) {
        self.move_rip(distance);
        let in_page = usize::try_from(first as i64 + distance).is_ok_and(|at| at < 4096);
        if in_page {
            // A jump to the next instruction, until it is linked.
            let slot = self.start + self.c.at();
            self.c.raw(&[0xe9, 0, 0, 0, 0, 0x41, 0xbe]); // jmp; mov r14d, slot
            self.c.raw(&(slot as u32).to_le_bytes());
            let (base, to) = (self.base, self.stubs.link);
            self.c.far(0xe9, base, to);
            self.c.raw(&self.page.to_le_bytes());
        } else {
            let (base, to) = (self.base, self.stubs.look_up);
            self.c.far(0xe9, base, to);
        }
    }

    /// A memory access's slow path, for when the fast one goes on here.
    fn slow_path(&mut self, from: Hole, op: *const Op, wanted: u32) {
        let flags = wanted != 0 && self.at != At::Memory;
        self.slow.push(Slow { from, op, back: self.c.at(), flags });
    }

    fn block(
        mut self,
        ops: &[Op],
        instructions: &[Instruction],
        first: usize,
        len: i64,
        look: impl Fn(i64) -> u32,
    ) -> Vec<u8> {
        let (base, poll) = (self.base, self.stubs.poll);
        self.c.load(T0, CPU, REQUESTS);
        self.c.raw(&[0x41, 0x83, 0x7d, 0x00, 0x00]); // cmp dword [r13], 0
        self.c.far_jcc(5, base, poll);
        self.c.raw(&[0x41, 0x83, 0xaf]); // sub dword [r15 + budget], 1
        self.c.raw(&BUDGET.to_le_bytes());
        self.c.raw(&[1]);
        self.c.far_jcc(8, base, poll);

        let hows: Vec<How> = instructions.iter().zip(ops).map(|(i, op)| how(i, op)).collect();
        let wanted = wanted_after(instructions, &hows, ops, len, look);
        let mut ended = false;
        for (n, (i, op)) in instructions.iter().zip(ops).enumerate() {
            ended = self.instruction(i, op, hows[n], wanted[n], first);
        }
        if !ended {
            if wanted.last().is_none_or(|&w| w != 0) {
                self.save_flags();
            }
            self.go(first, len);
        }
        for s in std::mem::take(&mut self.slow) {
            self.c.land(s.from);
            self.call(s.op);
            if s.flags {
                self.flags_from_memory();
            }
            let back = self.c.jmp();
            self.c.fill(back, s.back);
        }
        self.c.bytes
    }

    /// Emit one instruction; `wanted` are the flags read after it. True if it ends the block.
    fn instruction(&mut self, i: &Instruction, op: &Op, how: How, wanted: u32, first: usize) -> bool {
        let u = flags::of(i);
        let before = u.reads | wanted & !u.kills;
        match how {
            How::Nothing => {}
            How::Call => self.by_handler(op),
            How::Lea => {
                if i.code() == I::Lea_r64_m
                    && let Some(dst) = pinned(op.dst / 8)
                {
                    self.address_of_lea(op);
                    self.c.mov(dst, T0);
                } else {
                    self.address_of_lea(op);
                    if i.code() == I::Lea_r32_m {
                        self.c.raw(&[0x45, 0x89, 0xed]); // mov r13d, r13d
                    }
                    match pinned(op.dst / 8) {
                        Some(dst) => self.c.mov(dst, T0),
                        None => self.c.store(T0, CPU, reg_at(op.dst / 8)),
                    }
                }
            }
            How::Same => self.same(i, op, &u, before, wanted),
            How::Push => {
                self.spare_flags();
                self.c.lea(T0, Some(SP), None, -8);
                let slow = self.probe(8, true);
                let value = if i.op0_kind() == OpKind::Register {
                    self.value(op.dst / 8, T1)
                } else {
                    self.c.imm64(T1, op.imm);
                    T1
                };
                self.c.store(value, T0, 0);
                self.c.lea(SP, Some(SP), None, -8);
                self.slow_path(slow, op, wanted);
            }
            How::Pop => {
                self.spare_flags();
                self.c.mov(T0, SP);
                let slow = self.probe(8, false);
                self.c.load(T1, T0, 0);
                self.c.lea(SP, Some(SP), None, 8);
                match pinned(op.dst / 8) {
                    Some(dst) => self.c.mov(dst, T1),
                    None => self.c.store(T1, CPU, reg_at(op.dst / 8)),
                }
                self.slow_path(slow, op, wanted);
            }
            How::Leave => {
                self.spare_flags();
                self.c.mov(T0, 5);
                let slow = self.probe(8, false);
                self.c.lea(SP, Some(5), None, 8);
                self.c.load(5, T0, 0);
                self.slow_path(slow, op, wanted);
            }
            How::Jump => {
                if wanted != 0 {
                    self.save_flags();
                }
                self.go(first, op.imm as i64);
                return true;
            }
            How::Conditional => {
                self.load_flags();
                if wanted != 0 {
                    self.save_flags();
                }
                let taken = self.c.jcc(condition(i));
                let next = i64::from(op.off) + i64::from(op.len);
                self.go(first, next);
                self.c.land(taken);
                self.go(first, op.imm as i64);
                return true;
            }
            How::CallRelative => {
                // The callee's wants are not known when it lies in another page.
                self.spare_flags();
                self.c.lea(T0, Some(SP), None, -8);
                let slow = self.probe(8, true);
                self.c.load(T1, CPU, reg_at(RIP));
                self.c.lea(T1, Some(T1), None, i32::from(op.off) + i32::from(op.len));
                self.c.store(T1, T0, 0);
                self.c.lea(SP, Some(SP), None, -8);
                self.slow_path(slow, op, 0);
                self.go(first, op.imm as i64);
                return true;
            }
            How::Return => {
                self.spare_flags();
                self.c.mov(T0, SP);
                let slow = self.probe(8, false);
                self.c.load(T0, T0, 0);
                // A non-canonical target faults here, not there.
                self.c.mov(T1, T0);
                self.c.raw(&[0x49, 0xc1, 0xfe, 0x2f]); // sar r14, 47
                self.c.raw(&[0x49, 0x83, 0xc6, 0x01]); // add r14, 1
                self.c.raw(&[0x49, 0x83, 0xfe, 0x01]); // cmp r14, 1
                let wild = self.c.jcc(7);
                let more = if i.code() == I::Retnq_imm16 { i32::from(i.immediate16()) } else { 0 };
                self.c.lea(SP, Some(SP), None, 8 + more);
                self.c.store(T0, CPU, reg_at(RIP));
                let (base, to) = (self.base, self.stubs.look_up);
                self.c.far(0xe9, base, to);
                self.slow_path(slow, op, 0);
                self.slow_path(wild, op, 0);
                return true;
            }
        }
        false
    }

    /// Before a TLB probe clobbers the host's flags: the guest's go to memory, where also the handler of a fault finds them.
    fn spare_flags(&mut self) {
        self.save_flags();
        self.at = At::Memory;
    }

    /// LEA's address: no segment.
    fn address_of_lea(&mut self, op: &Op) {
        let flat = Op { flags: op.flags | op_flags::FLAT, ..op.clone() };
        let disp = i32::try_from(flat.disp as i64);
        if disp.is_ok() {
            // Without a segment and a far displacement no host flags change.
            self.address(&flat);
        } else {
            self.c.imm64(T0, flat.disp);
            if flat.base != ZERO {
                let base = if flat.base == RIP {
                    self.c.load(T1, CPU, reg_at(RIP));
                    T1
                } else {
                    self.value(flat.base, T1)
                };
                self.c.lea(T0, Some(T0), Some((base, 0)), 0);
            }
            if flat.index != ZERO {
                let index = self.value(flat.index, T1);
                self.c.lea(T0, Some(T0), Some((index, flat.scale)), 0);
            }
        }
    }

    /// An instruction that stays as it is but for its registers and its memory operand.
    fn same(&mut self, i: &Instruction, op: &Op, u: &flags::Use, before: u32, wanted: u32) {
        let memory = op.flags & op_flags::MEM != 0;
        let (begin, flags_at) = (self.c.at(), self.at);
        let mut new = *i;
        let mut slow = None;
        if memory {
            self.spare_flags();
            self.address(op);
            let write = writes_memory(i);
            slow = Some(self.probe(op.memsize.into(), write));
            new.set_memory_base(Register::R13);
            new.set_memory_index(Register::None);
            new.set_memory_index_scale(1);
            new.set_memory_displacement64(0);
            new.set_memory_displ_size(1);
            new.set_segment_prefix(Register::None);
        }
        // What it does not set must be there already, and what it reads as well.
        if u.reads != 0 || u.writes && before != 0 {
            self.load_flags();
        }
        let mut temps = if memory { vec![T2, T1] } else { vec![T2, T1, T0] };
        let mut homes: Vec<(u8, u8)> = Vec::new();
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register {
                continue;
            }
            let r = i.op_register(n);
            if (Register::AH..=Register::BH).contains(&r) {
                continue;
            }
            let guest = number(r);
            let at = pinned(guest)
                .or_else(|| homes.iter().find(|h| h.0 == guest).map(|h| h.1))
                .unwrap_or_else(|| {
                    // At most as many operands as there are scratch registers.
                    let temp = temps.pop().unwrap_or(T0);
                    self.c.load(temp, CPU, reg_at(guest));
                    homes.push((guest, temp));
                    temp
                });
            new.set_op_register(n, in_width(at, r));
        }
        if !self.host(&new) {
            // Not encodable with its operands moved: the handler does it.
            self.c.bytes.truncate(begin);
            self.at = flags_at;
            return self.by_handler(op);
        }
        for (guest, temp) in homes {
            self.c.store(temp, CPU, reg_at(guest));
        }
        if u.writes {
            self.at = At::Host;
        }
        if let Some(slow) = slow {
            self.slow_path(slow, op, wanted);
        }
    }
}

/// Give a buffer back to the encoder, empty.
fn bytes_for_reuse(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.clear();
    bytes
}

/// For each instruction the flags that are read after it.
fn wanted_after(
    instructions: &[Instruction],
    hows: &[How],
    ops: &[Op],
    len: i64,
    look: impl Fn(i64) -> u32,
) -> Vec<u32> {
    let mut live = match (hows.last(), ops.last()) {
        (Some(How::Jump), Some(op)) => look(op.imm as i64),
        (Some(How::Conditional), Some(op)) => look(op.imm as i64) | look(len),
        (Some(How::CallRelative), Some(op)) => look(op.imm as i64),
        (Some(How::Call | How::Return), _) | (None, _) => ALL,
        _ => look(len),
    };
    let mut wanted = vec![0; instructions.len()];
    for n in (0..instructions.len()).rev() {
        wanted[n] = live;
        let u = flags::of(&instructions[n]);
        live = u.reads | live & !u.kills;
        // What may fault shows the flags to the fault's handler, as they were before it.
        let touches_memory =
            ops[n].flags & op_flags::MEM != 0 && hows[n] != How::Lea && hows[n] != How::Nothing;
        let may_fault = matches!(
            hows[n],
            How::Call | How::Push | How::Pop | How::Leave | How::CallRelative | How::Return
        );
        if touches_memory || may_fault {
            live = ALL;
        }
    }
    wanted
}
