//! A test machine with an interrupt table: every handler is one HLT, so that a guest stops at the first thing it raises.

use iced_x86::code_asm::CodeAssembler;
use ringfort_engine::CpuidTable;
use ringfort_engine_soft::cpu::{Activity, Cpu, RIP, gpr};
use ringfort_engine_soft::testing::{Machine, TestMode, layout, selector};

/// Handlers lie here, 16 bytes apart.
pub const HANDLERS: u64 = 0x2_0000;
/// Instructions after which a guest counts as stuck.
const LIMIT: usize = 200_000;

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// HLT outside the handlers, at this address.
    Halted(u64),
    /// In the handler of this vector.
    Vector(u8),
    /// Triple fault.
    Shutdown,
}

/// A test machine.
pub struct Guest {
    /// It.
    pub m: Machine,
    bits: u32,
}

/// Assemble `f` for `bits`-bit code at `at`.
pub fn assemble_at(bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("a width");
    f(&mut a);
    a.assemble(at).expect("assembles")
}

impl Guest {
    /// In `mode`, with all vectors set up.
    pub fn new(mode: TestMode) -> Guest {
        Guest::of(Machine::new(mode), mode)
    }

    /// As [`Guest::new`], with another CPUID.
    pub fn with_cpuid(mode: TestMode, cpuid: CpuidTable) -> Guest {
        Guest::of(Machine::with_cpuid(mode, cpuid), mode)
    }

    fn of(mut m: Machine, mode: TestMode) -> Guest {
        if crate::TRANSLATED {
            m.translate(1, 1 << 20);
        }
        let bits = match mode {
            TestMode::Real | TestMode::Protected16 => 16,
            TestMode::Long64 => 64,
            _ => 32,
        };
        let mut g = Guest { m, bits };
        g.m.fill(HANDLERS, 0x1000, 0xf4);
        for v in 0..=255u8 {
            let at = HANDLERS + u64::from(v) * 16;
            match mode {
                TestMode::Real => {
                    let seg = (HANDLERS >> 4) as u16 + u16::from(v);
                    g.m.write(u64::from(v) * 4, &[0, 0, seg as u8, (seg >> 8) as u8]);
                }
                TestMode::Long64 | TestMode::Compat32 => g.gate64(v, selector::CODE64, at, 0x8e, 0),
                _ => g.gate32(v, selector::CODE32, at as u32, 0x8e),
            }
        }
        g
    }

    /// The vCPU.
    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.m.cpu
    }

    /// Set a 16-byte gate.
    pub fn gate64(&mut self, vector: u8, cs: u16, offset: u64, attrs: u8, ist: u8) {
        let low = offset & 0xffff
            | u64::from(cs) << 16
            | u64::from(ist) << 32
            | u64::from(attrs) << 40
            | (offset >> 16 & 0xffff) << 48;
        let at = layout::IDT + u64::from(vector) * 16;
        self.m.write(at, &low.to_le_bytes());
        self.m.write(at + 8, &(offset >> 32).to_le_bytes());
    }

    /// Set an 8-byte gate.
    pub fn gate32(&mut self, vector: u8, cs: u16, offset: u32, attrs: u8) {
        let o = u64::from(offset);
        let raw = o & 0xffff | u64::from(cs) << 16 | u64::from(attrs) << 40 | (o >> 16) << 48;
        self.m.write(layout::IDT + u64::from(vector) * 8, &raw.to_le_bytes());
    }

    /// Set GDT entry `selector` to `raw`, enlarging the table as needed.
    pub fn descriptor(&mut self, selector: u16, raw: u64) {
        let at = u64::from(selector & !7);
        self.m.write(layout::GDT + at, &raw.to_le_bytes());
        let c = self.cpu();
        c.gdtr.limit = c.gdtr.limit.max(at as u16 + 7);
    }

    /// Assemble into the usual place and point RIP there.
    pub fn code(&mut self, f: impl FnOnce(&mut CodeAssembler)) {
        let bits = self.bits;
        let at = match self.m.cpu.seg[1].base {
            0 => layout::CODE,
            _ => 0,
        };
        let code = assemble_at(bits, at, f);
        self.m.load_code(&code);
    }

    /// Assemble code for `bits` and put it at the linear address `lin`, which is its offset too.
    pub fn code_at(&mut self, bits: u32, lin: u64, f: impl FnOnce(&mut CodeAssembler)) {
        let code = assemble_at(bits, lin, f);
        self.m.write(lin, &code);
    }

    /// Run until HLT or shutdown.
    pub fn run(&mut self) -> End {
        for _ in 0..LIMIT {
            match self.m.cpu.activity {
                Activity::Running => {
                    self.m.cpu.step_block();
                }
                Activity::Shutdown => return End::Shutdown,
                _ => {
                    self.m.cpu.activity = Activity::Running;
                    let cs = self.m.cpu.seg[1];
                    let at = cs.base.wrapping_add(self.m.rip()) - 1;
                    if (HANDLERS..HANDLERS + 0x1000).contains(&at) {
                        return End::Vector(((at - HANDLERS) / 16) as u8);
                    }
                    return End::Halted(at);
                }
            }
        }
        panic!("the guest does not end; it is at {:#x}", self.m.rip());
    }

    /// Assemble, run, and give the vector it ends with.
    #[track_caller]
    pub fn vector_of(&mut self, f: impl FnOnce(&mut CodeAssembler)) -> u8 {
        self.code(f);
        match self.run() {
            End::Vector(v) => v,
            other => panic!("no exception, but {other:x?}"),
        }
    }

    /// Assemble, run, and expect the guest's own HLT.
    #[track_caller]
    pub fn halts(&mut self, f: impl FnOnce(&mut CodeAssembler)) {
        self.code(f);
        let end = self.run();
        assert!(matches!(end, End::Halted(_)), "{end:x?}, error {:#x}", self.stack(0));
    }

    /// Slot `n` of the stack, in units of the current code's stack slots (8 bytes in 64-bit code, else 4; 2 in real mode).
    pub fn stack(&self, n: u64) -> u64 {
        let c = &self.m.cpu;
        let size = if c.code64() {
            8
        } else if c.protected() {
            4
        } else {
            2
        };
        self.slot(n, size)
    }

    /// Slot `n` of the stack, of `size` bytes.
    pub fn slot(&self, n: u64, size: u64) -> u64 {
        let c = &self.m.cpu;
        let sp = match c.stack_size() {
            2 => c.regs[gpr::RSP] & 0xffff,
            4 => c.regs[gpr::RSP] & 0xffff_ffff,
            _ => c.regs[gpr::RSP],
        };
        let base = if c.code64() { 0 } else { c.seg[2].base };
        let bytes = self.m.read(base + sp + n * size, size as usize);
        let mut v = [0; 8];
        v[..bytes.len()].copy_from_slice(&bytes);
        u64::from_le_bytes(v)
    }

    /// A general register.
    pub fn reg(&self, n: usize) -> u64 {
        self.m.cpu.regs[n]
    }

    /// Set RIP.
    pub fn set_rip(&mut self, ip: u64) {
        self.m.cpu.regs[usize::from(RIP)] = ip;
    }

    /// Give the TSS a ring-0 stack and the three interrupt stacks.
    pub fn tss64(&mut self, rsp0: u64, ist: [u64; 3]) {
        self.m.write(layout::TSS + 4, &rsp0.to_le_bytes());
        for (n, s) in ist.into_iter().enumerate() {
            self.m.write(layout::TSS + 36 + n as u64 * 8, &s.to_le_bytes());
        }
    }

    /// Give the 32-bit TSS a ring-0 stack.
    pub fn tss32(&mut self, esp0: u32) {
        self.m.write(layout::TSS + 4, &esp0.to_le_bytes());
        self.m.write(layout::TSS + 8, &u32::from(selector::DATA).to_le_bytes());
    }
}
