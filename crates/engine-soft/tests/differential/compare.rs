//! Both sides of the comparison.

use super::generate::{self, BRANCH_TO, Generated};
use super::native::{CODE, CODE_SIZE, DATA, DATA_SIZE, Fault, Runner, State};
use super::programs::{self, Program};
use fastrand::Rng;
use iced_x86::{Instruction, Mnemonic as M};
use ringfort_engine_soft::cpu::{CodeSize, RIP};
use ringfort_engine_soft::cpuid::host_is_amd;
use ringfort_engine_soft::decode::{self, Mode};
use ringfort_engine_soft::testing::{Machine, TestMode, layout};
use ringfort_engine_soft::translate::Translator;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Flags that are compared: arithmetic and DF.
const FLAGS: u64 = 0xcd5;
/// Mismatches after which a run ends early.
const ENOUGH: usize = 60;
/// Guest physical addresses of code and data.
const GUEST_CODE: u64 = layout::DATA;
const GUEST_DATA: u64 = layout::DATA + 0x1_0000;

/// How the engine executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Instruction by instruction, each decoded anew.
    Steps,
    /// By blocks from the cache.
    Blocks,
    /// By blocks, translated at once.
    Translated,
}

/// Runs cases and collects what differs.
pub struct Bench {
    way: Way,
    native: Runner,
    guest: Machine,
    content: Vec<u8>,
    /// By form: the first mismatch, and how many there were.
    failed: BTreeMap<String, (String, u32)>,
    total: usize,
}

struct Outcome {
    state: State,
    fault: Option<Fault>,
    data: Vec<u8>,
}

impl Bench {
    pub fn new(way: Way) -> Bench {
        let native = Runner::new();
        let mut guest = Machine::new(TestMode::Long64);
        if way == Way::Translated {
            let mut t = Translator::new().expect("memory for code");
            t.hot = 1;
            guest.cpu.translator = Some(t);
        }
        guest.set_user();
        for page in (0..CODE_SIZE as u64).step_by(0x1000) {
            guest.map(CODE + page, GUEST_CODE + page, 5);
        }
        for page in (0..DATA_SIZE as u64).step_by(0x1000) {
            guest.map(DATA + page, GUEST_DATA + page, 7);
        }
        // Where the host has nothing, neither has the guest.
        for page in (0..layout::RAM).step_by(0x1000) {
            guest.map(page, 0, 0);
        }
        guest.refresh();
        Bench { way, native, guest, content: vec![0; DATA_SIZE], failed: BTreeMap::new(), total: 0 }
    }

    /// Whether the engine has a handler for the instruction.
    pub fn has_handler(&self, i: &Instruction, bytes: &[u8], bits: u32) -> bool {
        let code = match bits {
            16 => CodeSize::Bits16,
            32 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        };
        let mode = Mode { code, stack: (bits / 8) as u8, ..self.guest.cpu.mode };
        let op = decode::lower(i, bytes, 0, mode, &self.guest.cpu.features);
        !std::ptr::fn_addr_eq(op.run, decode::undefined as decode::Handler)
    }

    /// Whether the guest has the instruction (and so the host).
    pub fn offers(&self, i: &Instruction) -> bool {
        self.guest.cpu.features.allows(i)
    }

    pub fn mismatches(&self) -> usize {
        self.total
    }

    /// Report, and fail if anything differed.
    pub fn finish(self, cases: u64) {
        let mut text = String::new();
        for (first, count) in self.failed.values() {
            let _ = writeln!(text, "{first}({count} mismatches of this form)\n");
        }
        assert!(self.failed.is_empty(), "{} forms of {cases} cases differ:\n{text}", self.failed.len());
        if let Some(t) = &self.guest.cpu.translator {
            println!("{} blocks translated, {} flushes", t.blocks, t.flushes);
            assert!(t.blocks > cases / 2, "little was translated");
        }
    }

    fn fresh_content(&mut self, rng: &mut Rng) {
        if rng.u32(0..8) == 0 {
            for l in self.content.chunks_exact_mut(8) {
                l.copy_from_slice(&generate::lane(rng).to_le_bytes());
            }
        } else {
            let at = rng.usize(0..DATA_SIZE / 64) * 64;
            for l in self.content[at..at + 64].chunks_exact_mut(8) {
                l.copy_from_slice(&generate::lane(rng).to_le_bytes());
            }
        }
    }

    /// Code that begins with `bytes` and leaves at its end, and at [`BRANCH_TO`].
    fn program(&self, bytes: &[u8]) -> Vec<u8> {
        let mut p = vec![0xcc; 0x100];
        p[..bytes.len()].copy_from_slice(bytes);
        for at in [bytes.len(), BRANCH_TO as usize] {
            // JMP [RIP+0]; the address follows.
            p[at..at + 6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
            p[at + 6..at + 14].copy_from_slice(&self.native.exit().to_le_bytes());
        }
        p
    }

    fn run_native(&mut self, bytes: &[u8], start: &State) -> Outcome {
        let p = self.program(bytes);
        self.native.code()[..p.len()].copy_from_slice(&p);
        self.native_from(start, CODE)
    }

    /// What the host makes of the code that is in place.
    fn native_from(&mut self, start: &State, at: u64) -> Outcome {
        self.native.data().copy_from_slice(&self.content);
        let mut state = *start;
        let fault = self.native.run(&mut state, at);
        Outcome { state, fault, data: self.native.data().to_vec() }
    }

    fn run_guest(&mut self, bytes: &[u8], start: &State) -> Outcome {
        let p = self.program(bytes);
        self.guest.write(GUEST_CODE, &p);
        self.guest_from(start, CODE, &[CODE + bytes.len() as u64, CODE + BRANCH_TO], self.way)
    }

    /// What the engine makes of the code that is in place, until it leaves it or comes to one of `ends`.
    fn guest_from(&mut self, start: &State, at: u64, ends: &[u64], way: Way) -> Outcome {
        self.guest.write(GUEST_DATA, &self.content);
        let c = &mut self.guest.cpu;
        c.fpu_load();
        c.regs[..16].copy_from_slice(&start.gpr);
        c.regs[usize::from(RIP)] = at;
        c.set_rflags_raw(start.flags | 0x202);
        for (r, v) in c.vec.ymm.iter_mut().zip(&start.ymm) {
            r.0 = *v;
        }
        let mut mxcsr = [0; 4];
        mxcsr.copy_from_slice(&start.fx.0[24..28]);
        c.vec.mxcsr = u32::from_le_bytes(mxcsr);
        c.fpu.image[..160].copy_from_slice(&start.fx.0[..160]);
        let mut fault = None;
        // A block takes the jump at the end along: to the host's exit.
        let exit = self.native.exit();
        for _ in 0..2000 {
            let r = if way == Way::Steps { self.guest.step() } else { self.guest.step_block() };
            if let Err(t) = r {
                fault = Some(Fault {
                    vector: t.vector,
                    error: t.error,
                    address: if t.vector == 14 { t.address } else { 0 },
                });
                break;
            }
            let rip = self.guest.rip();
            if ends.contains(&rip) || rip == exit {
                break;
            }
        }
        let c = &mut self.guest.cpu;
        // The x87 state may have stayed in the host's registers.
        c.fpu_save();
        let mut state = *start;
        state.gpr.copy_from_slice(&c.regs[..16]);
        state.flags = c.rflags();
        state.rip = c.regs[usize::from(RIP)];
        for (v, r) in state.ymm.iter_mut().zip(&c.vec.ymm) {
            *v = r.0;
        }
        state.fx.0[..160].copy_from_slice(&c.fpu.image[..160]);
        state.fx.0[24..28].copy_from_slice(&c.vec.mxcsr.to_le_bytes());
        Outcome { state, fault, data: self.guest.read(GUEST_DATA, DATA_SIZE) }
    }

    /// Compare one instruction from one random state.
    pub fn single(&mut self, g: &Generated, rng: &mut Rng) {
        self.split(g, g, rng);
    }

    /// As [`Bench::single`], with another encoding for the guest.
    pub fn split(&mut self, native: &Generated, guest: &Generated, rng: &mut Rng) {
        if self.failed.len() >= ENOUGH {
            return;
        }
        self.fresh_content(rng);
        let mut content = std::mem::take(&mut self.content);
        let start = generate::state(native, rng, &mut content);
        self.content = content;
        let want = self.run_native(&native.bytes, &start);
        let got = self.run_guest(&guest.bytes, &start);
        let diff = self.differences(&start, &want, &got, &native.instruction);
        if !diff.is_empty() {
            let what = format!("{:?}", native.instruction.code());
            self.note(what, &native.bytes, &start, &diff);
        }
        self.content = want.data;
    }

    /// Compare several instructions in a row.
    pub fn sequence(&mut self, parts: &[Generated], rng: &mut Rng) {
        if self.failed.len() >= ENOUGH {
            return;
        }
        self.fresh_content(rng);
        let mut content = std::mem::take(&mut self.content);
        let mut start = generate::any_state(rng);
        for g in parts.iter().rev() {
            generate::aim(g, rng, &mut start, &mut content);
        }
        // Whatever the last one aimed at, the stack stays in the window, and repetitions stay short.
        start.gpr[1] &= 0xff;
        self.content = content;
        let mut parts: Vec<&Generated> = parts.iter().collect();
        let mut diff = self.try_sequence(&parts, &start);
        if !diff.is_empty() {
            // The shortest part of it that still differs.
            let mut n = 0;
            while n < parts.len() && parts.len() > 1 {
                let mut fewer = parts.clone();
                fewer.remove(n);
                let d = self.try_sequence(&fewer, &start);
                if d.is_empty() {
                    n += 1;
                } else {
                    (parts, diff) = (fewer, d);
                }
            }
            let what: Vec<String> = parts.iter().map(|g| format!("{:?}", g.instruction.code())).collect();
            let bytes: Vec<u8> = parts.iter().flat_map(|g| g.bytes.clone()).collect();
            self.note(what.join(" "), &bytes, &start, &diff);
        }
    }

    fn try_sequence(&mut self, parts: &[&Generated], start: &State) -> String {
        let bytes: Vec<u8> = parts.iter().flat_map(|g| g.bytes.clone()).collect();
        // RIP-relative parts move with what was left out, on both sides alike.
        let want = self.run_native(&bytes, start);
        let got = self.run_guest(&bytes, start);
        let last = parts.last().map(|g| g.instruction).unwrap_or_default();
        let both_fault = want.fault.is_some() && got.fault.is_some() && want.state.rip == got.state.rip;
        let compares = parts.iter().map(|g| g.instruction).find(reads_two);
        self.differences(start, &want, &got, &compares.filter(|_| both_fault).unwrap_or(last))
    }

    /// Compare a program from several states, the first time untranslated code and later what has been linked. With `segments` the
    /// interpreter instead of the host says what is right: the host's own FS is not to be touched.
    pub fn program_runs(&mut self, p: &Program, rng: &mut Rng, segments: bool) {
        if self.failed.len() >= ENOUGH {
            return;
        }
        let mut text = vec![0xcc; CODE_SIZE];
        text[p.at..p.at + p.bytes.len()].copy_from_slice(&p.bytes);
        let end = p.at + p.bytes.len();
        text[end..end + 6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
        text[end + 6..end + 14].copy_from_slice(&self.native.exit().to_le_bytes());
        self.native.code().copy_from_slice(&text);
        self.guest.write(GUEST_CODE, &text);
        let at = CODE + p.at as u64;
        for _ in 0..4 {
            self.fresh_content(rng);
            let start = programs::state(rng);
            if segments {
                for n in [4, 5] {
                    self.guest.cpu.seg[n].base = rng.u64(0..0x800).wrapping_sub(0x400);
                }
            }
            let want = if segments {
                let t = self.guest.cpu.translator.take();
                let o = self.guest_from(&start, at, &[], Way::Steps);
                self.guest.cpu.translator = t;
                o
            } else {
                self.native_from(&start, at)
            };
            let got = self.guest_from(&start, at, &[], self.way);
            let diff = self.differences(&start, &want, &got, &Instruction::default());
            if !diff.is_empty() {
                self.note(format!("program at {at:#x}, {} bytes", p.bytes.len()), &p.bytes, &start, &diff);
            }
            self.content = want.data;
        }
    }

    fn note(&mut self, what: String, bytes: &[u8], start: &State, diff: &str) {
        self.total += 1;
        let entry = self.failed.entry(what.clone()).or_insert_with(|| {
            let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            let mut t = format!("{what}: {}\n", hex.join(" "));
            let mut d = iced_x86::Decoder::with_ip(64, bytes, CODE, iced_x86::DecoderOptions::AMD);
            while d.can_decode() {
                let mut s = String::new();
                iced_x86::FastFormatter::new().format(&d.decode(), &mut s);
                let _ = writeln!(t, "    {s}");
            }
            for (n, names) in GPR.chunks(4).enumerate() {
                let _ = write!(t, "  ");
                for (k, name) in names.iter().enumerate() {
                    let _ = write!(t, "  {name}={:#x}", start.gpr[n * 4 + k]);
                }
                t.push('\n');
            }
            let _ = writeln!(t, "    flags={:#x}", start.flags);
            t.push_str(diff);
            (t, 0)
        });
        entry.1 += 1;
    }

    /// Flags that need not be equal.
    fn free_flags(&self, i: &Instruction, both_fault: bool) -> u64 {
        use iced_x86::RflagsBits as R;
        const OF: u64 = 0x800;
        if !host_is_amd() {
            match i.mnemonic() {
                // Undefined unless it is by one (Intel SDM 2B, RCL/RCR/ROL/ROR).
                M::Rol | M::Ror => return OF,
                // Intel gives the flags of before (SDM 2B, REP), AMD those of the elements that were done (APM 3, REP).
                _ if both_fault && repeats(i) => return FLAGS,
                _ => {}
            }
        }
        if self.way != Way::Translated || !Bench::loose_flags(i.mnemonic()) {
            return 0;
        }
        // The architecture leaves them undefined, the host leaves them alone, and translated code does not carry them that far.
        let undefined = i.rflags_undefined();
        [(R::OF, 0x800), (R::SF, 0x80), (R::ZF, 0x40), (R::AF, 0x10), (R::PF, 4), (R::CF, 1)]
            .into_iter()
            .filter(|&(bit, _)| undefined & bit != 0)
            .map(|(_, flag)| flag)
            .sum()
    }

    /// Instructions whose undefined flags translated code does not reproduce.
    pub fn loose_flags(m: M) -> bool {
        matches!(
            m,
            M::Mul | M::Imul | M::Div | M::Idiv | M::Lzcnt | M::Tzcnt | M::Bt | M::Bts | M::Btr | M::Btc
        )
    }

    /// What differs, as text; empty if nothing does.
    fn differences(&self, start: &State, want: &Outcome, got: &Outcome, i: &Instruction) -> String {
        let mut t = String::new();
        if exempt(i, want, got) {
            return t;
        }
        if !same_fault(want.fault, got.fault) {
            let _ = writeln!(t, "  fault: host {:x?}, engine {:x?}", want.fault, got.fault);
        }
        if want.fault.is_some() && got.fault.is_some() && want.state.rip != got.state.rip {
            let _ = writeln!(t, "  RIP: host {:#x}, engine {:#x}", want.state.rip, got.state.rip);
        }
        let both_fault = want.fault.is_some() && got.fault.is_some();
        // Which of them a repetition with 32-bit addresses has written when it does nothing or faults differs: the upper halves do.
        let halves = !host_is_amd() && repeats(i) && short_addresses(i);
        for (n, name) in GPR.iter().enumerate() {
            let (w, g) = (want.state.gpr[n], got.state.gpr[n]);
            let mask = if halves && matches!(n, 1 | 6 | 7) { 0xffff_ffff } else { u64::MAX };
            if (w ^ g) & mask != 0 {
                let _ = writeln!(t, "  {name}: host {w:#x}, engine {g:#x}");
            }
        }
        let flags = FLAGS & !self.free_flags(i, both_fault);
        if (want.state.flags ^ got.state.flags) & flags != 0 {
            let _ = writeln!(
                t,
                "  flags: host {:#x}, engine {:#x}",
                want.state.flags & FLAGS,
                got.state.flags & FLAGS
            );
        }
        for n in 0..16 {
            let (w, g) = (want.state.ymm[n], got.state.ymm[n]);
            if w != g {
                let _ = writeln!(
                    t,
                    "  ymm{n}: was    {}\n        host   {}\n        engine {}",
                    hex(&start.ymm[n]),
                    hex(&w),
                    hex(&g)
                );
            }
        }
        // FCW, FSW, FTW, MXCSR, and the registers' 10 bytes; instruction and data pointers are the native side's own.
        for (name, at, len) in [("FCW", 0, 2), ("FSW", 2, 2), ("FTW", 4, 1), ("MXCSR", 24, 4)] {
            let (w, g) = (&want.state.fx.0[at..at + len], &got.state.fx.0[at..at + len]);
            if w != g {
                let _ = writeln!(
                    t,
                    "  {name}: was {}, host {}, engine {}",
                    hex(&start.fx.0[at..at + len]),
                    hex(w),
                    hex(g)
                );
            }
        }
        for n in 0..8 {
            let r = 32 + n * 16..42 + n * 16;
            let (w, g) = (&want.state.fx.0[r.clone()], &got.state.fx.0[r.clone()]);
            if w != g {
                let _ =
                    writeln!(t, "  ST({n}): was {}, host {}, engine {}", hex(&start.fx.0[r]), hex(w), hex(g));
            }
        }
        // Intel has stored the return address when it finds that it cannot go there.
        let stored = !host_is_amd() && both_fault && i.mnemonic() == M::Call;
        if want.data != got.data && !stored {
            let n = want.data.iter().zip(&got.data).position(|(a, b)| a != b).unwrap_or(0);
            let end = (n + 16).min(DATA_SIZE);
            let _ = writeln!(
                t,
                "  memory at {:#x}: was {}, host {}, engine {}",
                DATA + n as u64,
                hex(&self.content[n..end]),
                hex(&want.data[n..end]),
                hex(&got.data[n..end])
            );
        }
        t
    }
}

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

fn hex(b: &[u8]) -> String {
    b.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// Whether host and engine raised the same. The host's kernel may have taken a page away that is not used, a read-only one as well: a page fault
/// there says "not present" where the page tables of the test, and the engine, say "protected".
fn same_fault(host: Option<Fault>, engine: Option<Fault>) -> bool {
    match (host, engine) {
        (Some(h), Some(e)) if h.vector == 14 && h.error & 1 == 0 => h == Fault { error: e.error & !1, ..e },
        _ => host == engine,
    }
}

/// A string instruction with a repetition prefix.
pub fn repeats(i: &Instruction) -> bool {
    i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix())
}

/// Whether a string instruction's addresses have 32 bits.
fn short_addresses(i: &Instruction) -> bool {
    use iced_x86::OpKind as K;
    (0..i.op_count()).any(|n| {
        matches!(
            i.op_kind(n),
            K::MemorySegSI
                | K::MemorySegESI
                | K::MemoryESDI
                | K::MemoryESEDI
                | K::MemorySegDI
                | K::MemorySegEDI
        )
    })
}

/// CMPS: two memory operands.
fn reads_two(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsq) || i.code() == iced_x86::Code::Cmpsd_m32_m32
}

/// Differences that are not the engine's fault, each for a reason.
fn exempt(i: &Instruction, want: &Outcome, got: &Outcome) -> bool {
    match i.mnemonic() {
        // The manuals have it read two bytes; AMD reads four.
        M::Movsxd if i.op0_register().size() == 2 => want.fault != got.fault,
        // Bit 17 of MXCSR (misaligned exception mask) is AMD's, and not offered to guests.
        M::Ldmxcsr | M::Vldmxcsr => want.fault.is_none() && got.fault.is_some_and(|f| f.vector == 13),
        // Both operands may fault, and which is read first is the host's choice, not always the same.
        _ if reads_two(i) => want.fault.is_some() && got.fault.is_some() && want.fault != got.fault,
        // AMD accesses bytes that the mask does not select; whether they fault, and what CR2 says, is the implementation's choice.
        M::Maskmovdqu | M::Maskmovq | M::Vmaskmovdqu => want.fault.is_some() && want.fault != got.fault,
        // What an instruction has done when it faults: by AMD's CPUs, whose ways the engine has, nothing.
        _ if !host_is_amd() && faults_in_its_own_way(i) => want.fault.is_some() || got.fault.is_some(),
        _ => false,
    }
}

/// Instructions that leave something behind, or name another byte, when they fault, as the implementation has it: elements of gathers that were
/// there already and their mask (Intel SDM 2C, VGATHERDPS), bytes that a mask does not select, the change to MMX and the flags in MXCSR and FSW
/// before a store.
pub fn faults_in_its_own_way(i: &Instruction) -> bool {
    let to_memory = i.op0_kind() == iced_x86::OpKind::Memory;
    let x87 = |m| matches!(m, M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp);
    matches!(
        i.mnemonic(),
        M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Maskmovdqu
            | M::Maskmovq
            | M::Vmaskmovdqu
            | M::Vcvtps2ph
    ) || to_memory && (x87(i.mnemonic()) || i.op_count() == 2 && i.op1_register().is_mm())
}
