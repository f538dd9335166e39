//! Support for tests of the engine: one vCPU over a few MiB of RAM, set up for a mode, with a bus that records.
//!
//! Layout of guest physical memory: see the constants of [`layout`]. All of RAM is mapped to the same linear addresses, writable and
//! (where the mode pages) accessible to user code.

use crate::cpu::{Cpu, RIP, TrapInfo, gpr};
pub use crate::crash::GREGS;
use crate::vcpu::{Env, VcpuShared, VmShared};
use ringfort_engine::{CpuidTable, MachineBus};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory, RamMap};
use ringfort_x86::cpuid::Leaf;
use ringfort_x86::cr::*;
use ringfort_x86::segment::{CODE, CS, DB, DS, ES, FS, GS, LONG, PRESENT, RW, S, SS, Segment, TableRegister};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Where things lie in a test machine's RAM.
pub mod layout {
    /// Bytes of RAM.
    pub const RAM: u64 = 16 << 20;
    /// Global descriptor table.
    pub const GDT: u64 = 0x1000;
    /// Interrupt descriptor table: 256 entries of up to 16 bytes, all zero at first.
    pub const IDT: u64 = 0x2000;
    /// Task state segment.
    pub const TSS: u64 = 0x3000;
    /// Code is loaded here, and RIP points here.
    pub const CODE: u64 = 0x1_0000;
    /// The stack pointer at first.
    pub const STACK_TOP: u64 = 0x8_0000;
    /// Free for data.
    pub const DATA: u64 = 0x10_0000;
    /// Page tables, from here upwards.
    pub const TABLES: u64 = 0xe0_0000;
}

/// Selectors in the test machine's GDT.
pub mod selector {
    /// 64-bit code, DPL 0.
    pub const CODE64: u16 = 0x08;
    /// Flat data, DPL 0.
    pub const DATA: u16 = 0x10;
    /// Flat 32-bit code, DPL 0.
    pub const CODE32: u16 = 0x18;
    /// 16-bit code, base 0, limit 64 KiB, DPL 0.
    pub const CODE16: u16 = 0x20;
    /// 16-bit data, base 0, limit 64 KiB, DPL 0.
    pub const DATA16: u16 = 0x28;
    /// Flat data, DPL 3 (RPL 3).
    pub const USER_DATA: u16 = 0x33;
    /// 64-bit code, DPL 3.
    pub const USER_CODE64: u16 = 0x3b;
    /// Flat 32-bit code, DPL 3.
    pub const USER_CODE32: u16 = 0x43;
    /// Task state segment (16 bytes long in long mode).
    pub const TSS: u16 = 0x48;
}

/// The mode that a test machine starts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestMode {
    /// Real mode, all segments 0.
    Real,
    /// 16-bit protected mode, no paging.
    Protected16,
    /// 32-bit flat protected mode, no paging.
    Protected32,
    /// 32-bit compatibility mode (long mode is active).
    Compat32,
    /// 64-bit mode, 4-level paging.
    Long64,
}

/// One thing that happened on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusEvent {
    /// IN of so many bytes.
    In(u16, usize),
    /// OUT.
    Out(u16, Vec<u8>),
    /// An MMIO load of so many bytes.
    Read(u64, usize),
    /// An MMIO store.
    Write(u64, Vec<u8>),
    /// End of a level-triggered interrupt.
    Eoi(u8),
}

/// A [`MachineBus`] that records, answers IN with what was set (or all ones), and keeps bytes stored by MMIO (all ones at first).
#[derive(Debug, Default)]
pub struct RecordingBus {
    events: Mutex<Vec<BusEvent>>,
    ports: Mutex<BTreeMap<u16, u32>>,
    bytes: Mutex<BTreeMap<u64, u8>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RecordingBus {
    /// What happened since the last call.
    pub fn take(&self) -> Vec<BusEvent> {
        std::mem::take(&mut *lock(&self.events))
    }
    /// What IN from `port` gives from now on.
    pub fn set_port(&self, port: u16, value: u32) {
        lock(&self.ports).insert(port, value);
    }
}

impl MachineBus for RecordingBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        lock(&self.events).push(BusEvent::In(port, data.len()));
        let v = lock(&self.ports).get(&port).copied().unwrap_or(u32::MAX).to_le_bytes();
        data.copy_from_slice(&v[..data.len()]);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        lock(&self.events).push(BusEvent::Out(port, data.to_vec()));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        lock(&self.events).push(BusEvent::Read(address, data.len()));
        let bytes = lock(&self.bytes);
        for (n, d) in data.iter_mut().enumerate() {
            *d = bytes.get(&(address + n as u64)).copied().unwrap_or(0xff);
        }
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        lock(&self.events).push(BusEvent::Write(address, data.to_vec()));
        let mut bytes = lock(&self.bytes);
        for (n, d) in data.iter().enumerate() {
            bytes.insert(address + n as u64, *d);
        }
    }
    fn extint_vector(&self) -> u8 {
        0x20
    }
    fn ioapic_eoi(&self, vector: u8) {
        lock(&self.events).push(BusEvent::Eoi(vector));
    }
}

/// CPUID of the host, raw: what tests run with.
pub fn host_cpuid() -> CpuidTable {
    let mut leaves = Vec::new();
    let mut add = |function: u32, index: Option<u32>| {
        let r = std::arch::x86_64::__cpuid_count(function, index.unwrap_or(0));
        leaves.push(Leaf { function, index, eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx });
    };
    for f in [0, 1] {
        add(f, None);
    }
    for (f, i) in [(7, 0), (7, 1), (0xd, 0), (0xd, 1), (0xd, 2)] {
        add(f, Some(i));
    }
    for f in [0x8000_0000, 0x8000_0001, 0x8000_0007, 0x8000_0008] {
        add(f, None);
    }
    CpuidTable { leaves }
}

/// A vCPU to test.
pub struct Machine {
    /// It.
    pub cpu: Box<Cpu>,
    /// Its bus.
    pub bus: Arc<RecordingBus>,
    /// Its RAM.
    pub memory: GuestMemory,
    next_table: u64,
}

impl Machine {
    /// A machine in `mode` at CPL 0, with interrupts disabled, at [`layout::CODE`].
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn new(mode: TestMode) -> Machine {
        Machine::with_cpuid(mode, host_cpuid())
    }

    /// As [`Machine::new`], with another CPUID.
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn with_cpuid(mode: TestMode, cpuid: CpuidTable) -> Machine {
        let memory = ringfort_memory::allocate(&[(0, layout::RAM)]).expect("16 MiB of memory");
        let bus = Arc::new(RecordingBus::default());
        let vm = Arc::new(VmShared::new());
        let me = Arc::new(VcpuShared::new(0));
        vm.add_vcpu(me.clone());
        let cpu = Cpu::new(RamMap::new(&memory), cpuid, Env { bus: bus.clone(), vm, me });
        let mut m = Machine { cpu, bus, memory, next_table: layout::TABLES };
        m.set_mode(mode);
        m
    }

    /// Put the vCPU into `mode`: descriptor tables, page tables, control registers, segments, RIP and RSP.
    pub fn set_mode(&mut self, mode: TestMode) {
        self.write_gdt();
        let c = &mut self.cpu;
        c.regs[usize::from(RIP)] = layout::CODE;
        c.regs[gpr::RSP] = layout::STACK_TOP;
        c.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE;
        c.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        c.cr0 = CR0_ET | CR0_NE | CR0_MP;
        c.efer = 0;
        c.fpu.image[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        c.cpl = 0;
        c.set_rflags_raw(2);
        if mode == TestMode::Real {
            c.regs[usize::from(RIP)] = 0;
            c.regs[gpr::RSP] = 0xfff0;
            c.seg = [Segment::real(0); 6];
            c.seg[CS] =
                Segment { attrs: PRESENT | S | CODE | RW | 1, ..Segment::real((layout::CODE >> 4) as u16) };
            c.seg[SS] = Segment::real(((layout::STACK_TOP - 0x1_0000) >> 4) as u16);
            c.idtr = TableRegister { base: 0, limit: 0x3ff };
        } else {
            c.cr0 |= CR0_PE | CR0_WP;
            c.gdtr = TableRegister { base: layout::GDT, limit: 0x5f };
            c.idtr = TableRegister { base: layout::IDT, limit: 0xfff };
            let (code, data) = match mode {
                TestMode::Protected16 => (selector::CODE16, selector::DATA16),
                TestMode::Long64 => (selector::CODE64, selector::DATA),
                _ => (selector::CODE32, selector::DATA),
            };
            for (n, s) in [(CS, code), (SS, data), (DS, data), (ES, data), (FS, data), (GS, data)] {
                let raw = self.read_u64(layout::GDT + u64::from(s & !7));
                self.cpu.seg[n] = Segment::from_descriptor(s, raw);
            }
            let c = &mut self.cpu;
            if mode == TestMode::Protected16 {
                // A 64 KiB segment does not reach the usual places.
                c.seg[CS].base = layout::CODE;
                c.regs[usize::from(RIP)] = 0;
                c.seg[SS].base = layout::STACK_TOP - 0x1_0000;
                c.regs[gpr::RSP] = 0xfff0;
            }
            c.tr = Segment { selector: selector::TSS, attrs: PRESENT | 11, limit: 0x67, base: layout::TSS };
            c.ldtr = Segment { selector: 0, attrs: 2, limit: 0xffff, base: 0 };
            if matches!(mode, TestMode::Long64 | TestMode::Compat32) {
                c.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
                c.cr4 |= CR4_PAE;
                c.cr3 = layout::TABLES;
                c.cr0 |= CR0_PG;
                self.next_table = layout::TABLES + 0x1000;
                self.fill(layout::TABLES, 0x1000, 0);
                for page in (0..layout::RAM).step_by(0x1000) {
                    self.map(page, page, 7);
                }
            }
        }
        self.refresh();
    }

    /// After direct changes of segments, control registers, CPL or page tables: recompute what follows and flush the TLB.
    pub fn refresh(&mut self) {
        self.cpu.mmu.flush_all();
        self.cpu.update_decode_mode();
        self.cpu.update_mmu_mode();
    }

    /// Go to CPL 3 with flat user segments (long modes and 32-bit protected mode).
    pub fn set_user(&mut self) {
        let code = if self.cpu.code64() { selector::USER_CODE64 } else { selector::USER_CODE32 };
        for (n, s) in [CS, SS, DS, ES].into_iter().zip([
            code,
            selector::USER_DATA,
            selector::USER_DATA,
            selector::USER_DATA,
        ]) {
            let raw = self.read_u64(layout::GDT + u64::from(s & !7));
            self.cpu.seg[n] = Segment::from_descriptor(s, raw);
        }
        self.cpu.cpl = 3;
        self.refresh();
    }

    fn write_gdt(&mut self) {
        let entry = |attrs: u16, big: bool| {
            let limit: u64 = if big { 0xf_ffff } else { 0xffff };
            let attrs = u64::from(attrs) | if big { 1 << 15 } else { 0 };
            limit & 0xffff | (limit >> 16) << 48 | (attrs & 0xf0ff) << 40
        };
        let user = 3 << 5;
        let code = PRESENT | S | CODE | RW | 1;
        let data = PRESENT | S | RW | 1;
        let tss = layout::TSS;
        let table = [
            0,
            entry(code | LONG, true),
            entry(data | DB, true),
            entry(code | DB, true),
            entry(code, false),
            entry(data, false),
            entry(data | DB | user, true),
            entry(code | LONG | user, true),
            entry(code | DB | user, true),
            0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56,
            0,
            0,
        ];
        for (n, e) in table.into_iter().enumerate() {
            self.write(layout::GDT + n as u64 * 8, &e.to_le_bytes());
        }
    }

    /// Map the 4 KiB page of `lin` to `gpa` with these low entry bits (1 present, 2 writable, 4 user) in the 4-level tables; 0 unmaps.
    /// Flush afterwards with [`Machine::refresh`].
    ///
    /// # Panics
    /// When the space for page tables is used up.
    pub fn map(&mut self, lin: u64, gpa: u64, bits: u64) {
        let mut table = layout::TABLES;
        for level in (1..4).rev() {
            let at = table + (lin >> (12 + 9 * level) & 0x1ff) * 8;
            let e = self.read_u64(at);
            table = if e & 1 != 0 {
                e & 0x000f_ffff_ffff_f000
            } else {
                let new = self.next_table;
                assert!(new < layout::RAM, "no space for page tables");
                self.next_table += 0x1000;
                self.fill(new, 0x1000, 0);
                self.write(at, &(new | 7).to_le_bytes());
                new
            };
        }
        let entry = if bits == 0 { 0 } else { gpa & !0xfff | bits };
        self.write(table + (lin >> 12 & 0x1ff) * 8, &entry.to_le_bytes());
    }

    /// Translate code from its `hot`-th execution on, with `size` bytes of code memory.
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn translate(&mut self, hot: u32, size: usize) {
        let mut t = crate::translate::Translator::with_size(size).expect("memory for code");
        t.hot = hot;
        self.cpu.translator = Some(t);
    }

    /// Write guest physical memory, as a device would.
    ///
    /// # Panics
    /// Outside RAM.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).expect("test addresses lie in RAM");
    }
    /// Fill guest physical memory.
    pub fn fill(&self, gpa: u64, len: usize, byte: u8) {
        self.write(gpa, &vec![byte; len]);
    }
    /// Read guest physical memory.
    ///
    /// # Panics
    /// Outside RAM.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.memory.read_slice(&mut v, GuestAddress(gpa)).expect("test addresses lie in RAM");
        v
    }
    /// Read 8 bytes of guest physical memory.
    pub fn read_u64(&self, gpa: u64) -> u64 {
        let mut v = [0; 8];
        v.copy_from_slice(&self.read(gpa, 8));
        u64::from_le_bytes(v)
    }

    /// Write `code` at [`layout::CODE`] and point CS:RIP there (in real and 16-bit mode offset 0 of the segment at that place).
    pub fn load_code(&mut self, code: &[u8]) {
        self.write(layout::CODE, code);
        self.cpu.regs[usize::from(RIP)] = layout::CODE.wrapping_sub(self.cpu.seg[CS].base);
    }

    /// RIP.
    pub fn rip(&self) -> u64 {
        self.cpu.regs[usize::from(RIP)]
    }

    /// Execute one instruction; what it (or its fetch) raises comes back and is not delivered, RIP then points to it.
    ///
    /// # Errors
    /// The exception.
    pub fn step(&mut self) -> Result<(), TrapInfo> {
        self.cpu.step_undelivered()
    }

    /// Execute a block of instructions, as the run loop does; what one raises comes back and is not delivered, RIP then points to it.
    ///
    /// # Errors
    /// The exception.
    pub fn step_block(&mut self) -> Result<(), TrapInfo> {
        self.cpu.step_block_undelivered()
    }

    /// Execute `n` instructions, or until one raises an exception.
    ///
    /// # Errors
    /// The exception.
    pub fn steps(&mut self, n: usize) -> Result<(), TrapInfo> {
        (0..n).try_for_each(|_| self.step())
    }

    /// Load `code` and execute all of it, straight through; ends when RIP reaches its end, or with the first exception.
    ///
    /// # Errors
    /// The exception.
    ///
    /// # Panics
    /// If 100,000 instructions do not suffice.
    pub fn run_code(&mut self, code: &[u8]) -> Result<(), TrapInfo> {
        self.load_code(code);
        let end = self.rip() + code.len() as u64;
        for _ in 0..100_000 {
            if self.rip() == end {
                return Ok(());
            }
            self.step()?;
        }
        panic!("the code does not reach its end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_executes() {
        for mode in [
            TestMode::Real,
            TestMode::Protected16,
            TestMode::Protected32,
            TestMode::Compat32,
            TestMode::Long64,
        ] {
            let mut m = Machine::new(mode);
            m.cpu.regs[gpr::RAX] = 5;
            m.cpu.regs[gpr::RCX] = 7;
            // ADD AX, CX or EAX, ECX: the mode decides.
            m.cpu.regs[gpr::RAX] |= 0xffff_0000;
            assert_eq!(m.run_code(&[0x01, 0xc8]), Ok(()), "{mode:?}");
            assert_eq!(m.cpu.regs[gpr::RAX], 0xffff_000c, "{mode:?}");
            assert!(!m.cpu.cf());
        }
    }

    #[test]
    fn faults_come_back() {
        let mut m = Machine::new(TestMode::Long64);
        m.set_user();
        m.cpu.regs[gpr::RBX] = 0x4000_0000;
        // ADD [RBX], EAX
        let t = m.run_code(&[0x01, 0x03]).unwrap_err();
        assert_eq!((t.vector, t.error, t.address), (14, 6, 0x4000_0000));
        assert_eq!(m.rip(), layout::CODE);
    }
}
