//! A machine of memory and a bus that writes down what it sees.

use ringfort_engine::{CpuState, Hypervisor, Kick, MachineBus, Vcpu, VcpuExit, Vm};
use ringfort_engine_kvm::{KvmHypervisor, KvmOptions};
use ringfort_memory::{Bytes, GuestAddress, GuestMemory};
use ringfort_x86::cpuid::{CpuBuilder, Hypervisor as Leaves, Topology};
use ringfort_x86::segment::{ACCESSED, CODE, CS, DB, GRANULAR, LONG, PRESENT, RW, S, Segment, TableRegister};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Set where this program runs in the lab.
pub const IN_LAB: &str = "RINGFORT_IN_LAB";
/// Guest memory.
pub const MEMORY: u64 = 4 << 20;
/// Where programs are.
pub const CODE_AT: u64 = 0x10_0000;
/// Where they keep data.
pub const DATA_AT: u64 = 0x30_0000;
/// A write there ends the run.
const END: u16 = 0xf4;
/// No short guest takes so long, also where it is interpreted.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn in_lab() -> bool {
    std::env::var_os(IN_LAB).is_some()
}

/// KVM with these options, or `None` where there is none, which is said.
pub fn kvm_with(options: KvmOptions) -> Option<KvmHypervisor> {
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("skipped: there is no /dev/kvm");
        return None;
    }
    Some(ringfort_engine_kvm::open(options).expect("KVM"))
}

/// As [`kvm_with`], with what `ringfort run` uses.
pub fn kvm() -> Option<KvmHypervisor> {
    kvm_with(KvmOptions::default())
}

/// What the guest did outside of CPU and RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Out(u16, Vec<u8>),
    In(u16, usize),
    Store(u64, Vec<u8>),
    Load(u64, usize),
    Eoi(u8),
    ExtInt,
}

/// What is done at a port write.
type OnOut = Box<dyn Fn(u16, &[u8]) + Send + Sync>;

/// A bus without devices.
#[derive(Default)]
pub struct Bus {
    pub seen: Mutex<Vec<Seen>>,
    /// Given to loads and IN, counting up.
    next: Mutex<u8>,
    /// Called at the end of the guest, or at every port write that it wants.
    pub kicker: OnceLock<Arc<dyn Kick>>,
    pub on_out: OnceLock<OnOut>,
}

impl Bus {
    fn note(&self, s: Seen) {
        self.seen.lock().unwrap().push(s);
    }
    fn fill(&self, data: &mut [u8]) {
        let mut n = self.next.lock().unwrap();
        data.fill(0);
        data[0] = *n;
        *n += 1;
    }
    /// What was seen up to now.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
    /// How often a port was written.
    pub fn outs(&self, port: u16) -> usize {
        self.seen.lock().unwrap().iter().filter(|s| matches!(s, Seen::Out(p, _) if *p == port)).count()
    }
}

impl MachineBus for Bus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Seen::In(port, data.len()));
        self.fill(data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if let Some(f) = self.on_out.get() {
            f(port, data);
        }
        if port == END {
            if let Some(k) = self.kicker.get() {
                k.kick();
            }
            return;
        }
        self.note(Seen::Out(port, data.to_vec()));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.note(Seen::Load(address, data.len()));
        self.fill(data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.note(Seen::Store(address, data.to_vec()));
    }
    fn extint_vector(&self) -> u8 {
        self.note(Seen::ExtInt);
        0x31
    }
    fn ioapic_eoi(&self, vector: u8) {
        self.note(Seen::Eoi(vector));
    }
}

/// A VM with one or more vCPUs.
pub struct Guest {
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub vm: Arc<dyn Vm>,
    pub bus: Arc<Bus>,
    pub memory: GuestMemory,
}

/// The CPUs of all tests: a model that every KVM and the software engine have.
pub fn cpus(engine: &dyn Hypervisor, count: u32) -> CpuBuilder {
    let offered = engine.capabilities();
    let leaves =
        Leaves { features: offered.paravirt, hints: 0, tsc_khz: offered.tsc_khz, apic_khz: offered.apic_khz };
    CpuBuilder::new(&"qemu64,-cx16".parse().expect("a model"), &offered.cpuid, Topology::flat(count), leaves)
        .0
}

/// Four megabytes with page tables at 0x10000 (the first 4 GiB mapped to themselves), a GDT at 0x21000 and an IDT at 0x20000 that is empty.
pub fn new_memory() -> GuestMemory {
    let memory = ringfort_memory::allocate(&[(0, MEMORY)]).expect("memory");
    let put = |at: u64, v: u64| memory.write_obj(v, GuestAddress(at)).expect("in memory");
    put(0x10000, 0x11003);
    for gib in 0..4 {
        put(0x11000 + gib * 8, (0x12000 + gib * 0x1000) | 3);
        for i in 0..512 {
            put(0x12000 + gib * 0x1000 + i * 8, gib << 30 | i << 21 | 0x83);
        }
    }
    // Null, 64-bit code, data, 32-bit code.
    for (n, d) in (0..).zip([0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff_u64]) {
        put(0x21000 + n * 8, d);
    }
    memory
}

impl Guest {
    pub fn new(engine: &dyn Hypervisor, count: u32) -> Guest {
        Guest::over(engine, count, new_memory(), &cpus(engine, count))
    }

    pub fn over(engine: &dyn Hypervisor, count: u32, memory: GuestMemory, cpus: &CpuBuilder) -> Guest {
        let bus = Arc::new(Bus::default());
        let vm = engine.create_vm(memory.clone(), bus.clone()).expect("a VM");
        let vcpus: Vec<_> = (0..count).map(|n| vm.create_vcpu(n, cpus.table(n)).expect("a vCPU")).collect();
        bus.kicker.set(vcpus[0].kicker()).unwrap_or_else(|_| panic!("set once"));
        Guest { vcpus, vm, bus, memory }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
    }

    pub fn read(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).expect("in memory")
    }

    /// Put code at `at` and let the first vCPU begin there as `mode` says.
    pub fn load(&mut self, code: &[u8], at: u64, mode: fn(&mut CpuState)) {
        self.write(at, code);
        self.set(|s| {
            mode(s);
            s.rip = at;
        });
    }

    /// A program in 64-bit mode.
    pub fn load_long(&mut self, code: &[u8]) {
        self.load(code, CODE_AT, long);
    }

    /// Change the first vCPU's state.
    pub fn set(&mut self, change: impl FnOnce(&mut CpuState)) {
        let mut s = self.vcpus[0].state().expect("its state");
        change(&mut s);
        self.vcpus[0].set_state(&s).expect("a new state");
    }

    /// A 64-bit interrupt gate for `vector`.
    pub fn gate(&self, vector: u8, handler: u64) {
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.write(0x20000 + u64::from(vector) * 16, &low.to_le_bytes());
        self.write(0x20008 + u64::from(vector) * 16, &(handler >> 32).to_le_bytes());
    }

    /// Run the first vCPU until it ends the run by the port, or something else does.
    pub fn run(&mut self) -> VcpuExit {
        run(self.vcpus[0].as_mut())
    }

    /// Run the first vCPU on a thread of its own until `until` holds.
    pub fn run_until(&mut self, until: impl Fn(&Guest) -> bool) {
        let mut vcpu = self.vcpus.remove(0);
        let kicker = vcpu.kicker();
        let runner = std::thread::spawn(move || {
            let exit = run(vcpu.as_mut());
            (exit, vcpu)
        });
        let end = Instant::now() + PATIENCE;
        while !until(self) && !runner.is_finished() {
            assert!(Instant::now() < end, "it did not come; seen: {:?}", self.bus.take());
            std::thread::yield_now();
        }
        kicker.kick();
        let (exit, vcpu) = runner.join().expect("the vCPU's thread");
        self.vcpus.insert(0, vcpu);
        assert_eq!(exit, VcpuExit::Kicked);
    }
}

/// Whether this KVM can move a guest's TSC. Time must stand still.
pub fn moves_tsc(vcpu: &mut dyn Vcpu) -> bool {
    let mut s = vcpu.state().expect("its state");
    let tsc = s.msrs.iter_mut().find(|m| m.0 == ringfort_x86::msr::IA32_TSC).expect("the TSC");
    tsc.1 = tsc.1.wrapping_add(1 << 40);
    let want = *tsc;
    vcpu.set_state(&s).expect("a new state");
    let moves = vcpu.state().expect("its state").msrs.contains(&want);
    if !moves {
        assert!(!in_lab(), "hardware moves it");
        println!("skipped in part: this KVM cannot move a guest's TSC");
    }
    moves
}

/// Run to the end of the run; one that takes too long fails.
pub fn run(vcpu: &mut dyn Vcpu) -> VcpuExit {
    let kicker = vcpu.kicker();
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let late = ended.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late {
            kicker.kick();
        }
        late
    });
    let exit = vcpu.run();
    drop(done);
    assert!(!watch.join().expect("the watch"), "the guest did not end");
    exit.unwrap_or_else(|e| panic!("{e}"))
}

const CODE64: u16 = PRESENT | S | CODE | RW | ACCESSED | LONG | GRANULAR;
const CODE32: u16 = PRESENT | S | CODE | RW | ACCESSED | DB | GRANULAR;
const DATA: u16 = PRESENT | S | RW | ACCESSED | DB | GRANULAR;

/// Real mode, all segments zero.
pub fn real(s: &mut CpuState) {
    for g in &mut s.segments {
        (g.selector, g.base) = (0, 0);
    }
    s.gpr[4] = 0x7000;
}

/// 32-bit protected mode, flat.
pub fn protected(s: &mut CpuState) {
    s.segments = [Segment::flat(0x10, DATA); 6];
    s.segments[CS] = Segment::flat(0x18, CODE32);
    s.gdtr = TableRegister { base: 0x21000, limit: 0x1f };
    s.cr0 = 0x11;
    s.gpr[4] = 0x20_0000;
}

/// 64-bit mode.
pub fn long(s: &mut CpuState) {
    protected(s);
    s.segments[CS] = Segment::flat(8, CODE64);
    s.idtr = TableRegister { base: 0x20000, limit: 0xfff };
    s.cr0 = 0x8000_0011;
    s.cr3 = 0x10000;
    s.cr4 = 0x20;
    s.efer = 0x500;
}

/// Switch the local APIC on, with a spurious vector.
pub fn apic_on(s: &mut CpuState) {
    s.apic[0xf0..0xf2].copy_from_slice(&0x1ffu16.to_le_bytes());
}
