//! Whether the host's KVM is one that a guest can be run on, found out by running one.
//!
//! A /dev/kvm that opens says little: some hosts have one that interprets privileged guest code in the kernel, where a
//! stock kernel takes hours to boot or dies of an instruction that the interpreter does not know. So a guest of a
//! few instructions runs in 64-bit mode, ring 0, and is timed.

use std::{io, sync::mpsc, time::Duration};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};

use crate::host::{Access, access};

/// Below this many instructions a second in 64-bit ring 0, KVM is software and of no use to a guest.
pub const FIT_SPEED: f64 = 100e6;

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub enum KvmFitness {
    /// Guests run at the speed given, in instructions a second of a tight loop in ring 0.
    Fit {
        /// Instructions a second.
        speed: f64,
    },
    /// It runs guests, but far too slowly: no hardware is behind it.
    Slow {
        /// Instructions a second.
        speed: f64,
    },
    /// It opens, and then running a guest fails.
    Broken {
        /// What failed and how.
        reason: String,
    },
    /// /dev/kvm is there, but not for this user.
    Denied,
    /// There is no /dev/kvm.
    Absent,
}

/// How long the guest may take before it is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// Loop rounds of the first try, and of the last, for a figure worth the name. Each try is ten times as long as the one before, so that the
/// time of an entry and exit weighs less and less.
const FIRST: u64 = 10_000;
const LAST: u64 = 20_000_000;
/// A try that takes so long tells enough.
const ENOUGH: Duration = Duration::from_millis(100);
/// Tries at most where the verdict is close: within a host that is itself a guest, CPU time has in it what that host was kept waiting.
const TRIES: u32 = 8;
/// Instructions of one round: a decrement and a jump.
const PER_ROUND: u64 = 2;

/// Try KVM. Takes a few milliseconds where it is fit, and a second or so where it is not.
#[must_use]
pub fn probe() -> KvmFitness {
    match access(std::path::Path::new("/dev/kvm")) {
        Access::Absent => return KvmFitness::Absent,
        Access::Denied => return KvmFitness::Denied,
        Access::Usable => {}
    }
    // In a thread of its own, because a KVM that loops inside the kernel cannot be called back. If it never returns, the
    // thread stays behind until the process ends.
    let (tx, rx) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        let _ = tx.send(measure());
    });
    if let Err(e) = spawned {
        return KvmFitness::Broken { reason: format!("cannot start a thread: {e}") };
    }
    match rx.recv_timeout(PATIENCE) {
        Ok(Ok(speed)) if speed >= FIT_SPEED => KvmFitness::Fit { speed },
        Ok(Ok(speed)) => KvmFitness::Slow { speed },
        Ok(Err(reason)) => KvmFitness::Broken { reason },
        Err(_) => KvmFitness::Broken {
            reason: format!("a guest of a few instructions did not end in {PATIENCE:?}"),
        },
    }
}

fn measure() -> Result<f64, String> {
    let mut rounds = FIRST;
    loop {
        let mut time = run(rounds)?;
        let speed = |time: Duration| (rounds * PER_ROUND) as f64 / time.as_secs_f64().max(1e-9);
        if time >= ENOUGH {
            // Whatever else held it up is not likely to do so again; but for a KVM that only interprets the first two tries tell enough.
            let mut tries = 1;
            while tries == 1 || tries < TRIES && (FIT_SPEED / 20.0..FIT_SPEED).contains(&speed(time)) {
                time = time.min(run(rounds)?);
                tries += 1;
            }
        }
        if time >= ENOUGH || rounds == LAST {
            return Ok(speed(time));
        }
        rounds = (rounds * 10).min(LAST);
    }
}

/// The CPU time of this thread, the guest's included: a host that is busy with others does not make KVM seem slow.
fn thread_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writes, and every thread has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

const MEMORY: usize = 0x10_0000;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const CODE: usize = 0x8000;

/// Time that a guest takes for `rounds` of its loop.
fn run(rounds: u64) -> Result<Duration, String> {
    let say = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {e}");
    let kvm = Kvm::new().map_err(say("open /dev/kvm"))?;
    if kvm.get_api_version() != 12 {
        return Err(format!("KVM API version {} instead of 12", kvm.get_api_version()));
    }
    let memory = Pages::new(MEMORY).map_err(|e| format!("memory for a guest: {e}"))?;
    // Identity-mapped first 2 MiB in one large page (Intel SDM vol. 3A, 4.5): present, writable, page size.
    memory.write(PML4, &(PDPT as u64 | 3).to_le_bytes());
    memory.write(PDPT, &(PD as u64 | 3).to_le_bytes());
    memory.write(PD, &0x83u64.to_le_bytes());
    // dec rcx; jnz -5; hlt
    memory.write(CODE, &[0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4]);

    let vm = loop {
        match kvm.create_vm() {
            // A signal says nothing about the host.
            Err(e) if e.errno() == libc::EINTR => {}
            vm => break vm,
        }
    };
    let vm = vm.map_err(|e| match e.errno() {
        // What the processor's virtualization is switched on for already (Intel SDM 3C section 24.7, AMD APM 2 section 15.4).
        libc::EBUSY => "the processor's virtualization is in use by another hypervisor".into(),
        _ => say("create a VM")(e),
    })?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.address as u64,
    };
    // SAFETY: the pages stay mapped until `memory` is dropped, and locals are dropped in reverse order of making: `vcpu`
    // and `vm`, made later, go first, and with them the last use of the slot.
    unsafe { vm.set_user_memory_region(region) }.map_err(say("give a VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(say("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(say("read vCPU state"))?;
    // 64-bit mode: CR4.PAE, EFER.LME and LMA, CR0.PE and PG, and a code segment with L.
    sregs.cr3 = PML4 as u64;
    sregs.cr4 = 1 << 5;
    sregs.efer = 1 << 8 | 1 << 10;
    sregs.cr0 = 1 | 1 << 4 | 1 << 31;
    sregs.cs = segment(8, 0xb, true);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *data = segment(16, 3, false);
    }
    vcpu.set_sregs(&sregs).map_err(say("set vCPU state"))?;
    let regs =
        kvm_regs { rip: CODE as u64, rcx: rounds, rsp: MEMORY as u64 - 16, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(say("set vCPU registers"))?;

    let start = thread_time();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break,
            Ok(exit) => return Err(format!("a guest of a few instructions stopped with {exit:?}")),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(format!("run a guest: {e}")),
        }
    }
    let time = thread_time() - start;
    let end = vcpu.get_regs().map_err(say("read vCPU registers"))?;
    if end.rcx != 0 {
        return Err(format!("the guest counted wrongly: {} left of {rounds}", end.rcx));
    }
    Ok(time)
}

fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Anonymous zeroed memory.
struct Pages {
    address: *mut u8,
    length: usize,
}

impl Pages {
    fn new(length: usize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.cast(), length })
    }

    fn write(&self, at: usize, data: &[u8]) {
        assert!(at.checked_add(data.len()).is_some_and(|end| end <= self.length));
        // SAFETY: the range was checked to lie in the mapping, and no guest runs on it yet.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.address.add(at), data.len()) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever used it is gone.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_fits_the_device() {
        let found = probe();
        match access(std::path::Path::new("/dev/kvm")) {
            Access::Absent => assert_eq!(found, KvmFitness::Absent),
            Access::Denied => assert_eq!(found, KvmFitness::Denied),
            Access::Usable => match found {
                KvmFitness::Fit { speed } => assert!((FIT_SPEED..1e11).contains(&speed), "{speed}"),
                KvmFitness::Slow { speed } => assert!(speed > 0.0 && speed < FIT_SPEED, "{speed}"),
                KvmFitness::Broken { reason } => assert!(!reason.is_empty() && !reason.contains('\n')),
                other => panic!("{other:?} although /dev/kvm opens"),
            },
        }
    }
}
