//! One block: from guest instructions to host code.

use super::asm::{Address, Code, Holes, SP, T0, T1};
use super::buffers::{Buffers, Source, emptied};
pub(super) use super::choose::How;
use super::choose::{alignment, condition, how, writes_memory};
use super::control::{Later, Out, context_at};
use super::flags::{self, ALL};
use super::group::Group;
use super::memory::{Miss, Operand, Wanted};
use super::recall::Recall;
use super::replay::{At, Producer};
use super::slow::Slow;
use super::stubs::{LIVE, PINNED, RIP_AT, live, reg_at};
use super::uses::{Registers, registers, vector_needs, wanted_after};
use super::{Link, Stubs, Translator};
use crate::cache::{Block, Place};
use crate::cpu::{CodeSize, Cpu};
use crate::decode::{self, Fetched, Op, op_flags};
use crate::native;
use iced_x86::{Code as I, Encoder, Instruction, InstructionInfoFactory, OpKind, Register};
use std::sync::atomic::AtomicU32;

/// Most host bytes that one guest instruction becomes, slow path included; blocks are not begun with less room than this for each op.
pub(super) const MOST_PER_OP: usize = 600;

/// Bytes looked at of what a block leads to.
const AHEAD: usize = 64;

pub(super) struct Emit<'a> {
    pub(super) c: Code,
    pub(super) buffers: &'a mut Buffers,
    pub(super) base: usize,
    pub(super) stubs: &'a Stubs,
    encoder: &'a mut Encoder,
    info: &'a mut InstructionInfoFactory,
    pub(super) links: &'a mut Vec<Link>,
    /// PEXT is a fast instruction here.
    pub(super) fast_pext: bool,
    /// Shifts that leave the flags alone are there.
    pub(super) bmi2: bool,
    pub(super) recall: &'a mut Recall,
    /// The block's key.
    pub(super) key: u64,
    /// What code names the block by.
    pub(super) number: u32,
    /// Which instructions do not remember pages.
    pub(super) probing: u64,
    /// The block goes back to its own beginning.
    pub(super) loops: bool,
    pub(super) at: At,
    /// What gave the flags their values, while its registers still hold what they held.
    pub(super) producer: Option<Producer>,
    /// The instruction at hand is the producer.
    pub(super) fresh: bool,
    /// The instruction at hand.
    pub(super) n: usize,
    /// Its offset in the page.
    pub(super) here: i64,
    pub(super) hows: Vec<How>,
    /// For each instruction the flags that are read after it.
    pub(super) wanted: Vec<u32>,
    /// Of a conditional jump at the end those that are read where it leads, and behind it.
    pub(super) edges: (u32, u32),
    pub(super) uses: Vec<Registers>,
    /// For each instruction whether it accesses memory.
    pub(super) touches: Vec<bool>,
    pub(super) slow: Vec<Slow>,
    /// The group that is being emitted, where its probe misses, and what gives the flags from before it if they are lost.
    group: Option<(Group, Miss, Option<Producer>, *const Op)>,
    pub(super) outs: Vec<Out>,
    /// Conditional jumps whose targets take more than a jump.
    pub(super) later: Vec<Later>,
    /// What of the vector state the block needs ([`live`]).
    vectors: u8,
    /// From where the block's beginning goes if that is not live, and where it goes on.
    dead_vectors: Option<(Holes, usize)>,
    /// Offset in code memory of the piece's first byte.
    start: usize,
    /// The same of what seldom executes, and its address.
    cold_start: usize,
    cold_base: usize,
    /// Bytes of the piece before that.
    hot_size: usize,
    /// Guest physical page of the block.
    pub(super) page: u64,
}

/// Offsets in the guard of a block that crosses a page boundary, from its code's first byte ([`Emit::guard`]).
mod crossing {
    /// Which context must be in force: the offset in the `Cpu`.
    pub const CONTEXT_AT: usize = 27;
    /// The context's low half.
    pub const CONTEXT: usize = 31;
    /// Linear address of the page.
    pub const PAGE: usize = 43;
}

impl Cpu {
    /// Translate `b`; false if that cannot be done (now).
    pub(super) fn translate_block(&mut self, b: &Block) -> bool {
        let done = self.try_to_translate(b);
        if done {
            self.cache.grown(b.key());
        }
        done
    }

    #[cold]
    fn try_to_translate(&mut self, b: &Block) -> bool {
        if self.mode.code != CodeSize::Bits64 {
            b.cool();
            return false;
        }
        if !b.one_page() {
            return self.translate_crossing(b);
        }
        let Some(t) = self.translator.as_mut() else { return false };
        let mut source = std::mem::take(&mut t.buffers.source);
        let done = self.translate_page(b, &mut source);
        if let Some(t) = self.translator.as_mut() {
            t.buffers.source = source;
        }
        done
    }

    /// Translate a block that lies in one page.
    fn translate_page(&mut self, b: &Block, source: &mut Source) -> bool {
        let Some((slot, offset)) = self.mmu.ram.find(b.gpa()) else { return false };
        // SAFETY: the offset lies in the mapping.
        let (host, first) = unsafe { (slot.host.add(offset as usize), b.first() as usize) };
        let Source { bytes, instructions } = source;
        // One whose second page is no RAM is not to be had.
        bytes.resize(usize::from(b.bytes).min(0x1000 - first), 0);
        // SAFETY: the block lies in one RAM page.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
        let Some(ops) = self.ops_of(b) else { return false };
        // SAFETY: no other ops are had back, and no block gets a translation, until this one has it.
        let ops = unsafe { &*ops };
        let Some(t) = self.translator.as_mut() else { return false };
        if t.room() < (b.count() + 4) * MOST_PER_OP {
            self.drop_translations();
            return false;
        }
        let mut decoder = decode::decoder(bytes, b.first(), self.mode, self.decode_options);
        instructions.clear();
        for _ in ops {
            match decode::next(&mut decoder) {
                Fetched::Instruction(i) => instructions.push(i),
                _ => return false,
            }
        }
        // What was copied is what the block was decoded from only if nobody has written meanwhile.
        if !b.is_fresh() {
            return false;
        }
        if let Some(done) = instructions.first().and_then(|i| self.translate_idiom(b, ops, i)) {
            return done;
        }
        let Some(t) = self.translator.as_mut() else { return false };
        let emit = Emit::new(t, b);
        let look = |to: i64| match usize::try_from(to).ok().filter(|&at| at < 4096) {
            Some(at) => {
                let mut bytes = [0; AHEAD];
                let bytes = &mut bytes[..AHEAD.min(0x1000 - at)];
                // SAFETY: all of the page that holds the block lies in RAM, which is mapped in pages.
                unsafe {
                    std::ptr::copy_nonoverlapping(host.sub(first).add(at), bytes.as_mut_ptr(), bytes.len())
                };
                flags::wanted(bytes, self.mode, self.decode_options)
            }
            None => ALL,
        };
        let code = emit.block(ops, instructions, look);
        // The same of what it leads to.
        if !b.is_fresh() {
            return false;
        }
        t.add(b, code);
        true
    }

    /// Translate a block that is one instruction across a page boundary, if the second page is still what and where it was: it says so itself.
    fn translate_crossing(&mut self, b: &Block) -> bool {
        let context = self.cache.context;
        let context_at = context_at(context == self.mmu.global_context);
        let page = self.page_of(b);
        let Some(ops) = self.ops_of(b) else { return false };
        // SAFETY: as in `try_to_translate`.
        let ops = unsafe { &*ops };
        let Some((next, word, value)) = b.second_page() else { return false };
        let (Some(head), Some(tail)) = (self.mmu.ram.host(b.gpa()), self.mmu.ram.host(next)) else {
            return false;
        };
        let mut bytes = [0; 15];
        let (here, all) = ((0x1000 - b.first()) as usize, usize::from(b.bytes));
        if here >= all || all > bytes.len() {
            return false;
        }
        // SAFETY: so many bytes end the first page, and the others begin the second; both are RAM.
        unsafe {
            std::ptr::copy_nonoverlapping(head, bytes.as_mut_ptr(), here);
            std::ptr::copy_nonoverlapping(tail, bytes.as_mut_ptr().add(here), all - here);
        }
        if !b.is_fresh() {
            return false;
        }
        let mut decoder = decode::decoder(&bytes[..all], b.first(), self.mode, self.decode_options);
        let Fetched::Instruction(i) = decode::next(&mut decoder) else { return false };
        let Some(t) = self.translator.as_mut() else { return false };
        if t.room() < 4 * MOST_PER_OP {
            self.drop_translations();
            return false;
        }
        let mut emit = Emit::new(t, b);
        emit.here = b.first() as i64;
        emit.guard(&[(word, value)], context_at, context, page);
        debug_assert_eq!(emit.c.bytes[crossing::CONTEXT..][..4], (context as u32).to_le_bytes());
        debug_assert_eq!(emit.c.bytes[crossing::PAGE..][..8], page.to_le_bytes());
        let code = emit.block(ops, &[i], |_| ALL);
        t.add(b, code);
        b.guarded.set(true);
        true
    }

    /// Another block is going to take the place of the one at `key`: if that crosses a page boundary its first page may be as it was, and jumps
    /// from there still lead to its code.
    pub(crate) fn replace_crossing(&mut self, key: u64) {
        let Some(old) = self.cache.by_key(key) else { return };
        // SAFETY: the cache keeps a block until another is decoded.
        let old = unsafe { &*old };
        if old.code.get() != 0
            && !old.one_page()
            && let Some(t) = self.translator.as_mut()
        {
            t.redirect(old);
        }
    }

    /// Drop all translations, and blocks with them: code memory or the cache is full. Blocks stay valid until another is decoded.
    pub(crate) fn drop_translations(&mut self) {
        if let Some(t) = self.translator.as_mut() {
            t.clear();
            t.flushes += 1;
        }
        self.cache.clear();
    }
}

/// The host register that holds a guest general register while translated code runs, if one does.
pub(crate) fn pinned(guest: u8) -> Option<u8> {
    PINNED.iter().find(|p| p.0 == guest).map(|p| p.1)
}

/// The number of the general register that `r` is (a part of).
pub(super) fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

/// Register `n` in the width of `like`.
pub(super) fn in_width(n: u8, like: Register) -> Register {
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

impl Translator {
    /// `b`, which has code, has just been found in the page at `page` where `context` is in force: if it crosses a page boundary, and its guard
    /// asks for something else, let it ask for that.
    pub(super) fn renew(&mut self, b: &Block, context_at: i32, context: u64, page: u64) -> bool {
        if b.one_page() {
            return false;
        }
        let at = b.code.get() - self.memory.address(0);
        let mut wanted = [0; 8];
        wanted[..4].copy_from_slice(&context_at.to_le_bytes());
        wanted[4..].copy_from_slice(&(context as u32).to_le_bytes());
        let mut known = true;
        for (at, wanted) in [(at + crossing::CONTEXT_AT, wanted), (at + crossing::PAGE, page.to_le_bytes())] {
            if self.memory.read_array(at) != Some(wanted) {
                self.memory.write(at, &wanted);
                known = false;
            }
        }
        !known
    }

    /// The code of `b`, which others may jump to, is out of date: they have the block looked up from now on.
    pub(super) fn redirect(&mut self, b: &Block) {
        if let Some(to) = self.add_detour(b.first()) {
            self.divert(b.code.get(), to);
        }
    }

    /// Code that begins at `from` is to go on at `to`.
    pub(super) fn divert(&mut self, from: usize, to: usize) {
        let at = from - self.memory.address(0);
        let distance = to.wrapping_sub(from + 5) as u32;
        self.memory.write(at, &[0xe9]);
        self.memory.write(at + 1, &distance.to_le_bytes());
    }

    /// Code that looks up what lies `to` bytes into the page, where the jump table may lead here; its address, if there is room.
    fn add_detour(&mut self, to: u64) -> Option<usize> {
        let start = self.used;
        if self.room() < MOST_PER_OP {
            return None;
        }
        let mut c = Code::default();
        c.imm(T0, to as i64);
        c.cpu(0x03, T0, RIP_AT);
        c.far(0xe8, self.memory.address(start), self.stubs.look_up_anew);
        c.raw(&[0x41, 0xff, 0xe6]); // jmp r14
        self.memory.write(start, &c.bytes);
        self.used = (start + c.at()).next_multiple_of(16);
        Some(self.memory.address(start))
    }

    /// Put the code of `b` in force.
    pub(super) fn add(&mut self, b: &Block, code: Code) {
        let (hot, cold) = code.parts();
        let start = self.used;
        self.memory.write(start, hot);
        self.used = (start + hot.len()).next_multiple_of(16);
        self.memory.write(self.cold_used, cold);
        let place = Place {
            seldom: self.cold_used as u32,
            seldom_size: cold.len() as u16,
            size: hot.len() as u16,
            marks: code.marks.len() as u8,
        };
        self.cold_used += cold.len();
        // For reports of faults only, so where it is in nobody's way.
        for mark in &code.marks {
            self.memory.write(self.cold_used, &mark.to_le_bytes());
            self.cold_used += size_of::<u16>();
        }
        b.place.set(place);
        self.blocks += 1;
        b.code.set(self.memory.address(start));
        crate::perf_map::note(self.memory.address(start), hot.len(), || {
            format!("guest {:#x}+{:#x}", b.gpa(), b.bytes)
        });
        self.buffers.code = code.emptied();
    }
}

impl<'a> Emit<'a> {
    pub(super) fn new(t: &'a mut Translator, b: &Block) -> Emit<'a> {
        let number = t.name(b);
        let Translator {
            memory,
            used,
            cold_used,
            stubs,
            encoder,
            info,
            links,
            fast_pext,
            recall,
            buffers,
            ..
        } = t;
        let probing = recall.probing(b.key());
        let start = *used;
        Emit {
            c: std::mem::take(&mut buffers.code),
            base: memory.address(start),
            stubs,
            encoder,
            info,
            links,
            fast_pext: *fast_pext,
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            recall,
            key: b.key(),
            number,
            probing,
            loops: false,
            at: At::Memory,
            producer: None,
            fresh: false,
            n: 0,
            here: 0,
            hows: emptied(&mut buffers.hows),
            wanted: emptied(&mut buffers.wanted),
            edges: (0, 0),
            uses: emptied(&mut buffers.uses),
            touches: emptied(&mut buffers.touches),
            slow: emptied(&mut buffers.slow),
            group: None,
            outs: emptied(&mut buffers.outs),
            later: emptied(&mut buffers.later),
            buffers,
            vectors: 0,
            dead_vectors: None,
            start,
            cold_start: *cold_used,
            cold_base: memory.address(*cold_used),
            hot_size: usize::MAX,
            page: b.gpa() & !0xfff,
        }
    }

    /// Leave to the interpreter what lies [`Emit::here`] bytes into the page unless code words have their values, a context (its offset in the
    /// `Cpu`, and value) is in force, and the page lies at `page`.
    pub(super) fn guard(
        &mut self,
        stamps: &[(*const AtomicU32, u32)],
        context_at: i32,
        context: u64,
        page: u64,
    ) {
        let mut failed = Holes::default();
        for &(word, value) in stamps {
            self.c.imm64(T1, word as u64);
            self.c.raw(&[0x41, 0x81, 0x3e]); // cmp dword [r14]
            self.c.raw(&value.to_le_bytes());
            failed.push(self.c.jcc(5));
        }
        self.c.cpu32(&[0x81], 7, context_at); // cmp dword [context]
        self.c.raw(&(context as u32).to_le_bytes());
        failed.push(self.c.jcc(5));
        self.c.imm64(T1, page);
        self.c.cpu(0x39, T1, RIP_AT); // cmp [rip], r14
        failed.push(self.c.jcc(5));
        self.outs.push(Out::interpret(failed, self.here));
    }
}

impl Emit<'_> {
    /// A guest register's value: the host register that holds it, or `temp` after a load.
    pub(super) fn value(&mut self, guest: u8, temp: u8) -> u8 {
        pinned(guest).unwrap_or_else(|| {
            self.c.load_cpu(temp, reg_at(guest));
            temp
        })
    }

    /// Encode a host instruction; false if it has no encoding.
    pub(super) fn host(&mut self, i: &Instruction) -> bool {
        let done = self.encoder.encode(i, 0).is_ok();
        let bytes = self.encoder.take_buffer();
        if done {
            self.c.raw(&bytes);
        }
        self.encoder.set_buffer(bytes_for_reuse(bytes));
        done
    }

    fn block(mut self, ops: &[Op], instructions: &[Instruction], look: impl Fn(i64) -> u32) -> Code {
        self.hows.extend(instructions.iter().zip(ops).map(|(i, op)| how(i, op)));
        let next = ops.last().map_or(0, |op| i64::from(op.off) + i64::from(op.len));
        self.edges = wanted_after(instructions, &self.hows, ops, next, look, &mut self.wanted);
        self.uses.extend(instructions.iter().map(|i| registers(i, self.info)));
        self.touches.extend(instructions.iter().zip(ops).map(|(i, op)| {
            op.flags & op_flags::MEM != 0 || i.is_stack_instruction() || i.is_string_instruction()
        }));
        for (i, how) in instructions.iter().zip(&self.hows) {
            if let How::Vector { .. } = how {
                self.vectors |= vector_needs(i);
            }
        }
        self.here = ops.first().map_or(0, |op| op.off.into());
        self.need_vectors();
        let back = |op: &Op, how: &How| {
            matches!(how, How::Jump | How::Conditional) && op.imm as i64 == i64::from(ops[0].off)
        };
        self.loops = ops
            .last()
            .zip(self.hows.last())
            .is_some_and(|(op, how)| back(op, how) || matches!(how, How::JumpIndirect | How::CallIndirect));
        let mut ended = false;
        let mut groups = self.plan_groups(instructions, ops).into_iter().peekable();
        for (n, (i, op)) in instructions.iter().zip(ops).enumerate() {
            self.n = n;
            self.here = op.off.into();
            self.c.marks.push(self.c.at() as u16);
            if let Some(g) = groups.next_if(|g| g.first == n) {
                self.spare_flags();
                let lost = self.lost();
                let from = self.probe_group(&g);
                self.group = Some((g, from, lost, op));
            }
            ended = self.instruction(i, op, self.hows[n], self.wanted[n]);
            self.leave_group();
            let fresh = std::mem::take(&mut self.fresh);
            if !fresh && self.producer.is_some_and(|p| p.guests & self.uses[n].writes != 0) {
                self.producer = None;
                if self.at == At::Lost {
                    // Nobody wants them, or they would have been saved.
                    self.at = At::Memory;
                }
            }
        }
        if !ended {
            if self.wanted.last().is_none_or(|&w| w != 0) {
                self.save_flags();
            }
            self.go(next);
        }
        self.emit_later();
        self.begin_cold();
        if let Some((missing, back)) = self.dead_vectors.take() {
            for hole in missing.iter() {
                self.c.land(hole);
            }
            self.make_live(ops.first().map_or(0, |op| op.off.into()));
            let hole = self.c.jmp();
            self.c.fill(hole, back);
        }
        self.emit_slow();
        self.emit_outs();
        self.finish()
    }

    /// The base of the group that the instruction at hand belongs to.
    pub(super) fn group_base(&self) -> Option<u8> {
        self.group.as_ref().map(|(g, ..)| g.base)
    }

    /// If the instruction at hand is the last of a group, that ends here.
    pub(super) fn leave_group(&mut self) {
        let n = self.n;
        if let Some((g, from, lost, op)) = self.group.take_if(|(g, ..)| g.last == n) {
            let flags = self.wanted[n] != 0 && matches!(self.at, At::Host | At::Both);
            let count = g.last - g.first + 1;
            self.slow.push(Slow { from, op, count, back: self.c.at(), flags, lost });
        }
    }

    /// What follows seldom executes.
    pub(super) fn begin_cold(&mut self) {
        let split = self.c.at();
        self.hot_size = split;
        let farther = self.cold_base.wrapping_sub(self.base.wrapping_add(split)) as i64;
        self.c.split(farther);
        // So that this plus an offset in the piece is where it will be.
        self.base = self.cold_base.wrapping_sub(split);
    }

    /// The offset in code memory of what lies at `at` in the piece.
    pub(super) fn memory_offset(&self, at: usize) -> usize {
        if at >= self.hot_size { self.cold_start + (at - self.hot_size) } else { self.start + at }
    }

    /// Make the vector state that the block needs live, if it is not, for what begins [`Emit::here`] bytes into the page. Flags are in memory.
    fn need_vectors(&mut self) {
        // The state of registers comes with either of the others.
        let both = self.vectors & (live::AVX | live::MXCSR);
        let bits = if both == 0 { self.vectors } else { both };
        let mut missing = Holes::default();
        for bit in [live::SSE, live::AVX, live::MXCSR].into_iter().filter(|b| bits & b != 0) {
            self.c.test_cpu8(LIVE, bit);
            missing.push(self.c.jcc(4));
        }
        if !missing.is_empty() {
            self.dead_vectors = Some((missing, self.c.at()));
        }
    }

    /// The same after an op's handler.
    pub(super) fn need_vectors_after(&mut self, op: *const Op) {
        if self.vectors != 0 {
            // SAFETY: an op of the block that is being translated.
            let next = unsafe { i64::from((*op).off) + i64::from((*op).len) };
            self.make_live(next);
        }
    }

    fn make_live(&mut self, at: i64) {
        self.c.imm(T0, i64::from(self.vectors) << 16 | at);
        let (base, to) = (self.base, self.stubs.vectors);
        self.c.far(0xe8, base, to);
    }

    /// Emit one instruction; `wanted` are the flags read after it. True if it ends the block.
    fn instruction(&mut self, i: &Instruction, op: &Op, how: How, wanted: u32) -> bool {
        let u = flags::of(i);
        let before = u.reads | wanted & !u.kills;
        match how {
            How::Nothing => {}
            How::Call => self.by_handler(op),
            How::Lea => self.lea(op, i.code() == I::Lea_r64_m),
            How::Same if self.shift_by_cl(i) => {}
            how @ (How::Same | How::Vector { .. }) => self.same(i, op, &u, before, alignment(i, how)),
            How::Push => {
                let (o, lost) = self.stack(SP, -8, true);
                if i.op0_kind() == OpKind::Register {
                    let value = self.value(op.dst / 8, o.spare);
                    self.c.mem(0x89, value, o.at);
                } else {
                    self.c.mem(0xc7, 0, o.at);
                    self.c.raw(&(op.imm as u32).to_le_bytes());
                }
                self.c.lea(SP, Some(SP), None, -8);
                self.slow_path(o.miss, op, lost);
            }
            How::PushMemory => self.push_memory(op),
            How::ReadTime => self.read_time(op),
            How::Pop => {
                let (o, lost) = self.stack(SP, 0, false);
                match pinned(op.dst / 8) {
                    Some(SP) => self.c.mem(0x8b, SP, o.at),
                    Some(dst) => {
                        self.c.mem(0x8b, dst, o.at);
                        self.c.lea(SP, Some(SP), None, 8);
                    }
                    None => {
                        self.c.mem(0x8b, T0, o.at);
                        self.c.lea(SP, Some(SP), None, 8);
                        self.c.store_cpu(T0, reg_at(op.dst / 8));
                    }
                }
                self.slow_path(o.miss, op, lost);
            }
            How::Leave => {
                let (o, lost) = self.stack(5, 0, false);
                self.c.lea(SP, Some(5), None, 8);
                self.c.mem(0x8b, 5, o.at);
                self.slow_path(o.miss, op, lost);
            }
            How::Divide => self.divide(i, op),
            How::BitString => self.bit_string(i, op, u.writes && before != 0),
            How::Repeat { moves, size } => self.repeat(op, moves, size),
            How::DisableInterrupts
            | How::EnableInterrupts
            | How::SwapGs
            | How::UserAccess(_)
            | How::PushFlags => self.system(how, op, self.n + 1 == self.hows.len()),
            How::Jump => {
                if wanted != 0 {
                    self.save_flags();
                }
                self.go(op.imm as i64);
                return true;
            }
            How::Conditional => {
                self.load_flags(T1);
                let next = i64::from(op.off) + i64::from(op.len);
                self.conditional(condition(i), op.imm as i64, next);
                return true;
            }
            How::CallRelative => {
                self.call_relative(op, op.imm as i64, wanted);
                return true;
            }
            How::JumpIndirect => {
                self.jump_indirect(i, op);
                return true;
            }
            How::CallIndirect => {
                self.call_indirect(i, op);
                return true;
            }
            How::Return => {
                self.ret(i, op);
                return true;
            }
        }
        false
    }

    /// Probe for eight bytes at `[base + disp]`, a host register that holds a guest's.
    pub(super) fn stack(&mut self, base: u8, disp: i32, write: bool) -> (Operand, Option<Producer>) {
        if self.group.is_none() {
            self.spare_flags();
        }
        let o = self.operand_at(Address { base: Some(base), index: None, disp }, Wanted::stack(write));
        (o, self.lost())
    }

    /// An instruction that stays as it is but for its registers and its memory operand.
    fn same(&mut self, i: &Instruction, op: &Op, u: &flags::Use, before: u32, align: u8) {
        let memory = op.flags & op_flags::MEM != 0;
        let (begin, flags_at) = (self.c.at(), self.at);
        let mut new = *i;
        let mut miss = None;
        // Within a group the second scratch register is not free, and nothing clobbers flags.
        let mut temps: &[u8] = if self.group.is_some() { &[T0] } else { &[T0, T1] };
        let spare;
        if memory {
            if self.group.is_none() {
                self.spare_flags();
            }
            let lost = self.lost();
            let write = if self.hows[self.n] == How::Same { writes_memory(i) } else { native::stores(i) };
            let o = self.operand(op, Wanted { size: op.memsize.into(), write, align });
            new.set_memory_base(o.at.base.map_or(Register::None, |r| in_width(r, Register::RAX)));
            new.set_memory_index(o.at.index.map_or(Register::None, |(r, _)| in_width(r, Register::RAX)));
            new.set_memory_index_scale(o.at.index.map_or(1, |(_, s)| 1 << s));
            new.set_memory_displacement64(i64::from(o.at.disp) as u64);
            new.set_memory_displ_size(match o.at.disp {
                0 => 0,
                -128..=127 => 1,
                _ => 8,
            });
            new.set_segment_prefix(Register::None);
            spare = [o.spare];
            temps = &spare;
            miss = o.miss.map(|miss| (miss, lost));
        }
        // What it does not set must be there already, and what it reads as well.
        if u.reads != 0 || u.writes && before != 0 {
            self.load_flags(temps[0]);
        }
        let regs = self.uses[self.n];
        let mut guests = 0;
        let mut homes: Vec<(u8, u8)> = Vec::new();
        let mut fits = true;
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register {
                continue;
            }
            let r = i.op_register(n);
            if !r.is_gpr() {
                continue;
            }
            let guest = number(r);
            guests |= 1 << guest;
            if (Register::AH..=Register::BH).contains(&r) {
                continue;
            }
            let known = pinned(guest).or_else(|| homes.iter().find(|h| h.0 == guest).map(|h| h.1));
            let Some(at) = known.or(temps.last().copied()) else {
                fits = false;
                break;
            };
            if known.is_none() {
                temps = &temps[..temps.len() - 1];
            }
            if known.is_none() {
                if regs.reads & 1 << guest != 0 {
                    self.c.load_cpu(at, reg_at(guest));
                }
                homes.push((guest, at));
            }
            new.set_op_register(n, in_width(at, r));
        }
        let whole = u.writes && u.kills == ALL;
        let shift = fits && whole && self.keep_for_shift(&new);
        if !fits || !self.host(&new) {
            // Not encodable with its operands moved: the handler does it.
            self.c.bytes.truncate(begin);
            self.at = flags_at;
            return self.by_handler(op);
        }
        for &(guest, temp) in &homes {
            if regs.writes & 1 << guest != 0 {
                self.c.store_cpu(temp, reg_at(guest));
            }
        }
        if u.writes {
            self.at = At::Host;
            self.producer = if shift {
                Some(Producer::shift(&new))
            } else if whole {
                Producer::new(&new, 1 << number(i.op0_register()), guests, &homes)
            } else {
                None
            };
            self.fresh = true;
        }
        if let Some((miss, lost)) = miss {
            self.slow_path(miss, op, lost);
        }
    }
}

/// Give a buffer back to the encoder, empty.
fn bytes_for_reuse(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.clear();
    bytes
}
