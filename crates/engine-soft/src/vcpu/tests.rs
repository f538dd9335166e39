//! Small guests on several vCPUs, through the engine seam: from the reset vector by real and protected mode into 64-bit code.

use super::{Tier, open};
use crate::testing::host_cpuid;
use ringfort_engine::{CpuidTable, Hypervisor, Kick, MachineBus, Vcpu, VcpuExit, Vm};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};
use ringfort_x86::cpuid::Leaf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

mod guests;

use guests::Program;

/// Where things lie in guest memory.
mod at {
    pub const TABLES: u64 = 0x1000;
    pub const IDT: u64 = 0x6000;
    pub const GDTR: u64 = 0x7000;
    pub const GDT: u64 = 0x7010;
    pub const IDTR: u64 = 0x7080;
    /// Real-mode start, for the boot processor and (start-up vector 8) the others.
    pub const START: u64 = 0x8000;
    pub const PROGRAM: u64 = 0x1_0000;
    /// The programs' data; its first pages.
    pub const DATA: u64 = 0x10_0000;
    /// Number of vCPUs, for the program.
    pub const COUNT: u64 = DATA + 0x800;
    /// A number of rounds, for the program.
    pub const ROUNDS: u64 = DATA + 0x808;
}

/// Code that goes from real mode at 0x800:0 to 64-bit mode and jumps to the program with the APIC ID in EDI.
fn start_code() -> Vec<u8> {
    let mut c: Vec<u8> = Vec::new();
    // cli; xor ax, ax; mov ds, ax; lgdt [GDTR]
    c.extend([0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0x0f, 0x01, 0x16]);
    c.extend((at::GDTR as u16).to_le_bytes());
    // mov eax, cr0; or al, 1; mov cr0, eax
    c.extend([0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0]);
    // jmp 0x18:next
    c.extend([0x66, 0xea]);
    c.extend((at::START as u32 + c.len() as u32 + 6).to_le_bytes());
    c.extend([0x18, 0]);
    // mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax
    c.extend([0x66, 0xb8, 0x10, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]);
    // mov eax, cr4; or eax, PAE|OSFXSR|OSXMMEXCPT; mov cr4, eax
    c.extend([0x0f, 0x20, 0xe0, 0x0d, 0x20, 6, 0, 0, 0x0f, 0x22, 0xe0]);
    // mov eax, TABLES; mov cr3, eax
    c.push(0xb8);
    c.extend((at::TABLES as u32).to_le_bytes());
    c.extend([0x0f, 0x22, 0xd8]);
    // mov ecx, EFER; rdmsr; or eax, LME; wrmsr
    c.extend([0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x0d, 0, 1, 0, 0, 0x0f, 0x30]);
    // mov eax, cr0; or eax, PG|WP|PE; mov cr0, eax
    c.extend([0x0f, 0x20, 0xc0, 0x0d, 1, 0, 1, 0x80, 0x0f, 0x22, 0xc0]);
    // jmp 8:next
    c.push(0xea);
    c.extend((at::START as u32 + c.len() as u32 + 6).to_le_bytes());
    c.extend([8, 0]);
    // lidt [IDTR]
    c.extend([0x0f, 0x01, 0x1c, 0x25]);
    c.extend((at::IDTR as u32).to_le_bytes());
    // mov eax, 1; cpuid; shr ebx, 24; mov edi, ebx
    c.extend([0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0xc1, 0xeb, 24, 0x89, 0xdf]);
    // lea ecx, [rbx + 1]; shl ecx, 12; add ecx, 0x4_0000; mov esp, ecx
    c.extend([0x8d, 0x4b, 1, 0xc1, 0xe1, 12, 0x81, 0xc1, 0, 0, 4, 0, 0x89, 0xcc]);
    // mov eax, PROGRAM; jmp rax
    c.push(0xb8);
    c.extend((at::PROGRAM as u32).to_le_bytes());
    c.extend([0xff, 0xe0]);
    c
}

/// What the guest reports: OUT of 4 bytes to port 0xf4.
struct TestBus {
    reports: Mutex<Sender<u32>>,
    eois: Mutex<Vec<u8>>,
}

impl MachineBus for TestBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        assert_ne!(port, 0xf5, "port 0xf5 is a defect on purpose");
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if let (0xf4, Ok(v)) = (port, data.try_into()) {
            let _ = self.reports.lock().unwrap().send(u32::from_le_bytes(v));
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn extint_vector(&self) -> u8 {
        0x30
    }
    fn ioapic_eoi(&self, vector: u8) {
        self.eois.lock().unwrap().push(vector);
    }
}

struct Running {
    vm: Arc<dyn Vm>,
    memory: GuestMemory,
    bus: Arc<TestBus>,
    reports: Receiver<u32>,
    stop: Arc<AtomicBool>,
    kicks: Vec<Arc<dyn Kick>>,
    threads: Vec<JoinHandle<Result<u64, String>>>,
    /// vCPUs that do not run yet.
    made: Mutex<Vec<Box<dyn Vcpu>>>,
    /// Where they come back after `stop`.
    vcpus: Mutex<Receiver<Box<dyn Vcpu>>>,
    give_back: Sender<Box<dyn Vcpu>>,
}

fn cpuid(id: u32) -> CpuidTable {
    let mut t = host_cpuid();
    for l in &mut t.leaves {
        if l.function == 1 {
            l.ebx = l.ebx & 0x00ff_ffff | id << 24;
            // x2APIC, TSC deadline.
            l.ecx |= 1 << 21 | 1 << 24;
        }
    }
    for (function, [eax, ebx, ecx, edx]) in [
        (0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        (0x4000_0001, [super::paravirt_features(), 0, 0, 0]),
    ] {
        t.leaves.push(Leaf { function, index: None, eax, ebx, ecx, edx });
    }
    t
}

/// Thread CPU time in nanoseconds.
fn cpu_time() -> u64 {
    super::time::clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

impl Running {
    /// Start `program` on `cpus` vCPUs.
    fn start(program: &Program, cpus: u32, rounds: u32) -> Running {
        let r = Running::prepare(program, cpus, rounds);
        let vcpus = std::mem::take(&mut *r.made.lock().unwrap());
        r.go_with(vcpus)
    }

    /// Make a machine that holds `program`.
    fn prepare(program: &Program, cpus: u32, rounds: u32) -> Running {
        let memory = ringfort_memory::allocate(&[(0, 4 << 20), (0xffff_0000, 0x1_0000)]).unwrap();
        let put = |gpa: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
        let word = |gpa: u64, v: u64| put(gpa, &v.to_le_bytes());
        // Identity map: 1 GiB by 2 MiB pages, and the last GiB below 4 GiB for the APIC.
        word(at::TABLES, at::TABLES + 0x1003);
        word(at::TABLES + 0x1000, at::TABLES + 0x2003);
        word(at::TABLES + 0x1000 + 3 * 8, 0xc000_0083);
        (0..512).for_each(|n| word(at::TABLES + 0x2000 + n * 8, n << 21 | 0x83));
        // 64-bit code, data, 32-bit code.
        let gdt = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffffu64];
        gdt.iter().enumerate().for_each(|(n, &e)| word(at::GDT + n as u64 * 8, e));
        let table = |limit: u64, base: u64| limit | base << 16;
        word(at::GDTR, table(31, at::GDT));
        word(at::IDTR, table(0xfff, at::IDT));
        for &(vector, offset) in &program.handlers {
            let to = at::PROGRAM + offset;
            word(at::IDT + vector * 16, to & 0xffff | 8 << 16 | 0x8e << 40 | (to >> 16 & 0xffff) << 48);
        }
        put(at::START, &start_code());
        put(0xffff_fff0, &[0xea, 0, 0, 0, 0x08]);
        put(at::PROGRAM, program.code);
        word(at::COUNT, cpus.into());
        word(at::ROUNDS, rounds.into());
        let (tx, reports) = channel();
        let bus = Arc::new(TestBus { reports: Mutex::new(tx), eois: Mutex::default() });
        let vm = open(Tier::default()).unwrap().create_vm(memory.clone(), bus.clone()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let made = Mutex::new((0..cpus).map(|id| vm.create_vcpu(id, cpuid(id)).unwrap()).collect());
        let (give_back, vcpus) = channel();
        let vcpus = Mutex::new(vcpus);
        Running { vm, memory, bus, reports, stop, kicks: vec![], threads: vec![], made, vcpus, give_back }
    }

    /// Let these vCPUs run, each on its thread.
    fn go_with(mut self, vcpus: Vec<Box<dyn Vcpu>>) -> Running {
        for mut v in vcpus {
            self.kicks.push(v.kicker());
            let (stop, give_back) = (self.stop.clone(), self.give_back.clone());
            self.threads.push(std::thread::spawn(move || {
                loop {
                    match v.run() {
                        Ok(VcpuExit::Kicked) if stop.load(Ordering::SeqCst) => {
                            let _ = give_back.send(v);
                            return Ok(cpu_time());
                        }
                        Ok(VcpuExit::Kicked) => {}
                        Ok(other) => return Err(format!("{other:?}")),
                        Err(e) => return Err(e.to_string()),
                    }
                }
            }));
        }
        self
    }

    /// What the guest reports next.
    fn report(&self) -> u32 {
        match self.reports.recv_timeout(Duration::from_secs(60)) {
            Ok(v) => v,
            Err(_) => {
                let dump: Vec<String> =
                    (0..16).map(|n| format!("{:x}", self.word(at::DATA + n * 8))).collect();
                let ended: Vec<_> = self.threads.iter().map(JoinHandle::is_finished).collect();
                panic!("the guest is silent; data {dump:?}, ended {ended:?}, {:?}", self.vm.statistics());
            }
        }
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        self.memory.read_slice(&mut b, GuestAddress(gpa)).unwrap();
        u64::from_le_bytes(b)
    }

    /// Stop all vCPUs; what each used of the host's CPU, in nanoseconds.
    fn stop(self) -> Vec<Result<u64, String>> {
        self.stop.store(true, Ordering::SeqCst);
        self.kicks.iter().for_each(|k| k.kick());
        self.threads.into_iter().map(|t| t.join().unwrap()).collect()
    }

    /// Stop, and expect that every vCPU went on until then.
    fn end(self) {
        for r in self.stop() {
            r.unwrap();
        }
    }
}

/// How often a test repeats: `RINGFORT_STRESS` times.
fn repeats() -> usize {
    std::env::var("RINGFORT_STRESS").ok().and_then(|v| v.parse().ok()).unwrap_or(1)
}

#[test]
fn fifteen_processors_come_up() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::bring_up(), 16, 0);
        assert_eq!(r.report(), 16);
        // Each one has left its mark.
        for id in 0..16 {
            assert_eq!(r.word(at::DATA + 0x100 + id * 8), 0x5a00 + id);
        }
        r.end();
    }
}

#[test]
fn locks_and_atomics_hold() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::spinlock(), 4, 5000);
        assert_eq!(r.report(), 4);
        assert_eq!((r.word(at::DATA + 64), r.word(at::DATA + 128)), (20_000, 20_000));
        r.end();
    }
}

#[test]
fn ipis_wake_halted_processors() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::ping_pong(), 2, 3000);
        let start = Instant::now();
        assert_eq!(r.report(), 3000);
        eprintln!("{:?} for an IPI to a halted vCPU and back", start.elapsed() / 3000);
        r.end();
    }
}

#[test]
fn deadlines_are_kept() {
    let mut worst = 0;
    for _ in 0..repeats() {
        let r = Running::start(&guests::deadlines(), 1, 100);
        assert_eq!(r.report(), 100);
        // Sum and maximum of how late the handler ran, in ticks; never early.
        let us = |ticks: u64| ticks as f64 * 1e6 / crate::vcpu::time::HostClock::get().hz() as f64;
        assert_eq!(r.word(at::DATA + 24), 0, "an interrupt came early");
        worst = worst.max(r.word(at::DATA + 16));
        eprintln!("late by {:.1} us on average, {:.1} at worst", us(r.word(at::DATA + 8)) / 100.0, us(worst));
        // Average; the machine that runs the tests may be busy.
        assert!(us(r.word(at::DATA + 8)) / 100.0 < 50_000.0);
        r.end();
    }
}

#[test]
fn nmis_reach_a_processor_that_takes_no_interrupts() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::nmi(), 2, 500);
        assert_eq!(r.report(), 500);
        // Handlers never nested.
        assert_eq!(r.word(at::DATA + 16), 0);
        // And from outside.
        let before = r.word(at::DATA);
        r.vm.inject_nmi(1);
        let start = Instant::now();
        while r.word(at::DATA) == before {
            assert!(start.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
        r.end();
    }
}

#[test]
fn code_that_another_processor_writes_is_seen() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::cross_modify(), 2, 2000);
        assert_eq!(r.report(), 2000);
        assert_eq!(r.word(at::DATA + 16), 0, "stale code was executed");
        r.end();
    }
}

#[test]
fn code_that_changes_itself_in_a_page_that_two_processors_change() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::self_modify(), 2, 20_000);
        assert_eq!(r.report(), 0, "stale code was executed");
        r.end();
    }
}

#[test]
fn messages_and_the_8259_interrupt_a_halted_guest() {
    let r = Running::start(&guests::wait_for_interrupts(), 1, 0);
    assert_eq!(r.report(), 0);
    for n in 1..=200 {
        r.vm.send_msi(0xfee0_0000, 0x31);
        assert_eq!(r.report(), 0x31_0000 + n);
    }
    // Level triggered: the I/O APIC hears of the end.
    r.vm.send_msi(0xfee0_0000, 0x32 | 3 << 14);
    assert_eq!(r.report(), 0x32_0000 + 201);
    r.vm.send_msi(0xfee0_0000, 0x31);
    assert_eq!(r.report(), 0x31_0000 + 202);
    assert_eq!(*r.bus.eois.lock().unwrap(), [0x32]);
    // The 8259's line; the handler of vector 0x30 reports while it is still up, so it comes again until it falls.
    r.vm.set_extint(true);
    assert_eq!(r.report(), 0x30_0000 + 203);
    r.vm.set_extint(false);
    // 204 reports; the counters are brought up to date when the vCPU sleeps.
    let vm = r.vm.clone();
    r.end();
    let count = |name: &str| vm.statistics().into_iter().find(|s| s.0 == name).unwrap().1;
    assert_eq!(
        (count("vcpu0.port-accesses"), count("vcpu0.interrupts"), count("vcpu0.kicks")),
        (204, 203, 1)
    );
}

#[test]
fn x2apic_priorities_and_hypercalls() {
    let r = Running::start(&guests::x2apic(), 1, 0);
    let order: Vec<u32> = (0..5).map(|_| r.report()).collect();
    assert_eq!(order, [0, 3, 0x321, 0x321, 0x3211]);
    r.end();
}

#[test]
fn a_running_guest_moves_to_another_vm() {
    let first = Running::start(&guests::idle(), 1, 0);
    assert_eq!(first.report(), 0);
    while first.word(at::DATA) < 5 {
        std::thread::yield_now();
    }
    first.stop.store(true, Ordering::SeqCst);
    first.kicks[0].kick();
    let mut old = first.vcpus.lock().unwrap().recv().unwrap();
    let state = old.state().unwrap();
    // Reading it twice gives the same, but for what time moves.
    let again = old.state().unwrap();
    assert_eq!((again.gpr, again.rip, &again.segments), (state.gpr, state.rip, &state.segments));
    let mut ram = vec![0; 4 << 20];
    first.memory.read_slice(&mut ram, GuestAddress(0)).unwrap();
    let ticks = first.word(at::DATA);
    // A host that was started much later or earlier: the guest's clock just goes on.
    let second = Running::prepare(&guests::idle(), 1, 0);
    second.memory.write_slice(&ram, GuestAddress(0)).unwrap();
    let mut v = second.made.lock().unwrap().remove(0);
    let tsc = |s: &ringfort_engine::CpuState| s.msrs.iter().find(|m| m.0 == 0x10).unwrap().1;
    v.set_state(&state).unwrap();
    assert!(tsc(&v.state().unwrap()) >= tsc(&state));
    let second = second.go_with(vec![v]);
    let start = Instant::now();
    while second.word(at::DATA) < ticks + 5 {
        assert!(start.elapsed() < Duration::from_secs(30), "the timer does not go on");
        std::thread::yield_now();
    }
    second.end();
}

#[test]
fn an_idle_guest_costs_little() {
    // 100 timer interrupts a second, HLT between.
    let r = Running::start(&guests::idle(), 1, 0);
    assert_eq!(r.report(), 0);
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(1000));
    let ticks = r.word(at::DATA);
    let wall = start.elapsed();
    let used = r.stop()[0].clone().unwrap();
    let share = used as f64 / wall.as_nanos() as f64;
    eprintln!("idle: {:.2} % of a core, {ticks} timer interrupts", share * 100.0);
    assert!(share < 0.03, "{share}");
    assert!((10..=200).contains(&ticks), "{ticks}");
}

#[test]
fn a_kick_is_sticky_and_ends_any_wait() {
    let memory = ringfort_memory::allocate(&[(0, 1 << 20)]).unwrap();
    let (tx, _rx) = channel();
    let bus = Arc::new(TestBus { reports: Mutex::new(tx), eois: Mutex::default() });
    let vm = open(Tier::default()).unwrap().create_vm(memory, bus).unwrap();
    let mut ap = vm.create_vcpu(1, cpuid(1)).unwrap();
    let kick = ap.kicker();
    kick.kick();
    kick.kick();
    assert_eq!(ap.run().unwrap(), VcpuExit::Kicked);
    let t = std::thread::spawn(move || (ap.run().unwrap(), ap));
    std::thread::sleep(Duration::from_millis(20));
    kick.kick();
    assert_eq!(t.join().unwrap().0, VcpuExit::Kicked);
    // One vCPU per APIC ID, and none beyond 254.
    assert!(vm.create_vcpu(1, cpuid(1)).is_err());
    assert!(vm.create_vcpu(255, cpuid(0)).is_err());
}

#[test]
fn a_defect_in_a_handler_is_an_error_and_not_an_abort() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let r = Running::start(&guests::defect(), 1, 0);
    let start = Instant::now();
    while !r.threads[0].is_finished() {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1));
    }
    let e = r.stop().remove(0).unwrap_err();
    std::panic::set_hook(hook);
    assert!(e.contains("vCPU 0 near CS:RIP 0x8:0x10") && e.contains("defect on purpose"), "{e}");
}

#[test]
fn dirty_logging_misses_no_store() {
    for _ in 0..repeats() {
        let r = Running::start(&guests::writers(), 2, 0);
        assert_eq!(r.report(), 2);
        let slots = ringfort_memory::RamMap::new(&r.memory);
        let tracker = &slots.slots()[0].tracker;
        for _ in 0..20 {
            r.vm.set_dirty_logging(true);
            tracker.take_dirty();
            r.vm.set_dirty_logging(true);
            let before = r.word(at::DATA + 0x3000);
            let start = Instant::now();
            while r.word(at::DATA + 0x3000) == before {
                assert!(start.elapsed() < Duration::from_secs(30));
                std::thread::yield_now();
            }
            let log = tracker.take_dirty();
            let page = ((at::DATA + 0x3000) >> 12) as usize;
            assert_ne!(log[page / 64] >> (page % 64) & 1, 0);
            r.vm.set_dirty_logging(false);
        }
        r.end();
    }
}
