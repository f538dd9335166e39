//! What kernels write instead of RET and of indirect jumps against speculation: safe returns and retpolines. Executed literally, each
//! would leave a call that never returns, and the return would be to where no call came from; they are translated as what they mean.
//!
//! Only for supervisor code. The guard holds the linear address, the address space, and the code of each
//! page that was looked at; if it fails, the interpreter executes the instruction as it stands.

use super::MOST_PER_OP;
use super::asm::T0;
use super::block::Emit;
use super::choose::How;
use super::control::context_at;
use super::flags::ALL;
use crate::cache::Block;
use crate::cpu::Cpu;
use crate::decode::Op;
use iced_x86::{Code as I, Instruction};
use std::sync::atomic::AtomicU32;

/// Jumps followed until a RET must have been seen.
const DEPTH: u32 = 3;

/// The code words of pages, with the values that they must have.
type Stamps = Vec<(*const AtomicU32, u32)>;

/// What a CALL that is a block of its own means.
enum Meaning {
    /// RET.
    Return,
    /// JMP to what is in this general register.
    Jump(u8),
}

impl Cpu {
    /// Translate `b`, whose one instruction is the relative CALL `i`, if it is one of these idioms. `None` if it is none.
    pub(super) fn translate_idiom(&mut self, b: &Block, ops: &[Op], i: &Instruction) -> Option<bool> {
        let [op] = ops else { return None };
        if i.code() != I::Call_rel32_64 || self.cpl != 0 {
            return None;
        }
        let page = self.page_of(b);
        let target = page.wrapping_add(op.imm);
        let mut stamps = Stamps::new();
        let meaning = self.meaning(target, &mut stamps)?;
        let context = self.cache.context;
        let at = context_at(context == self.mmu.global_context);
        let t = self.translator.as_mut()?;
        if t.room() < 4 * MOST_PER_OP {
            self.drop_translations();
            return Some(false);
        }
        let mut emit = Emit::new(t, b);
        emit.here = op.off.into();
        emit.hows.push(How::Call);
        emit.wanted.push(ALL);
        emit.guard(&stamps, at, context, page);
        match meaning {
            Meaning::Return => emit.ret(i, op),
            Meaning::Jump(register) => emit.jump_register(op, register),
        }
        emit.begin_cold();
        emit.emit_slow();
        emit.emit_outs();
        let code = emit.finish();
        t.add(b, code);
        b.guarded.set(true);
        Some(true)
    }

    /// What a call of `lin` means.
    fn meaning(&mut self, lin: u64, stamps: &mut Stamps) -> Option<Meaning> {
        let bytes = self.code_at(lin, stamps)?;
        match bytes {
            // lea rsp, [rsp + 8]; ret
            [0x48, 0x8d, 0x64, 0x24, 0x08, 0xc3, ..] => Some(Meaning::Return),
            // mov [rsp], register; then a return
            [rex @ (0x48 | 0x4c), 0x89, modrm, 0x24, ..] if modrm & 0xc7 == 4 => {
                let register = modrm >> 3 & 7 | (rex & 4) << 1;
                (register != 4 && self.returns(lin + 4, stamps, DEPTH)).then_some(Meaning::Jump(register))
            }
            _ => None,
        }
    }

    /// Whether the code at `lin` is a return.
    fn returns(&mut self, lin: u64, stamps: &mut Stamps, depth: u32) -> bool {
        let Some(bytes) = self.code_at(lin, stamps) else { return false };
        let relative = || {
            let by = i32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
            lin.wrapping_add(5).wrapping_add(i64::from(by) as u64)
        };
        match bytes[0] {
            0xc3 => true,
            0xe9 if depth != 0 => self.returns(relative(), stamps, depth - 1),
            0xe8 if depth != 0 => matches!(self.meaning(relative(), stamps), Some(Meaning::Return)),
            _ => false,
        }
    }

    /// Eight bytes of code at `lin`, if they lie in one page of RAM; its stamp is added.
    fn code_at(&mut self, lin: u64, stamps: &mut Stamps) -> Option<[u8; 8]> {
        if lin & 0xfff > 0xff8 {
            return None;
        }
        let from = self.fetch_translate(lin).ok()?;
        self.mmu.note_fetched(lin, &from);
        let found = self.mmu.ram.find(from.gpa).map(|(s, off)| (s.host, off, s.tracker.clone()));
        let (host, offset, tracker) = found?;
        let stamp = self.code_stamp(&tracker, offset, from.gpa);
        if !stamps.contains(&stamp) {
            stamps.push(stamp);
        }
        // SAFETY: eight bytes from the offset lie in the same RAM page.
        Some(unsafe { host.add(offset as usize).cast::<[u8; 8]>().read_unaligned() })
    }
}

impl Emit<'_> {
    /// JMP to what is in a general register.
    fn jump_register(&mut self, op: &Op, register: u8) {
        let value = self.value(register, T0);
        if value != T0 {
            self.c.mov(T0, value);
        }
        let wild = self.wild();
        self.slow_path(wild, op, None);
        self.go_indirect();
    }
}
