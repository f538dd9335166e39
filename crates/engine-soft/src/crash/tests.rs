//! Each kind of fault in a process of its own, which is this test once more.

use super::*;
use crate::testing::{Machine, TestMode, layout};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// What the child is to do.
const KIND: &str = "RINGFORT_TEST_CRASH";

/// A loop: mov ecx, 1000000; 1: lea rdx, [rcx + rcx]; mov r12, rdx; dec ecx; jnz 1b.
const CODE: [u8; 16] =
    [0xb9, 0x40, 0x42, 0x0f, 0, 0x48, 0x8d, 0x14, 0x09, 0x49, 0x89, 0xd4, 0xff, 0xc9, 0x75, 0xf5];
const LOOP: u64 = layout::CODE + 5;

/// Break the machine in the given way, on purpose.
fn crash(kind: &str) {
    install();
    if kind == "elsewhere" {
        let _ = std::thread::Builder::new()
            .name("small".into())
            .spawn(|| std::process::abort())
            .map(|t| t.join());
    }
    let mut m = Machine::new(TestMode::Long64);
    m.translate(2, 4 << 20);
    m.load_code(&CODE);
    for _ in 0..8 {
        m.step_block().expect("no fault of the guest's");
    }
    let bytes: &[u8] = match kind {
        "ill" => &[0x0f, 0x0b],                       // ud2
        "segv" => &[0x8a, 0x04, 0x25, 0x10, 0, 0, 0], // mov al, [16]
        "fpe" => &[0x31, 0xc9, 0xf7, 0xf1],           // xor ecx, ecx; div ecx
        _ => &[],
    };
    let block = m.cpu.cache.translated().find(|b| b.gpa() == LOOP).map(ptr::from_ref).expect("translated");
    if !bytes.is_empty() {
        let t = m.cpu.translator.as_mut().expect("a translator");
        // SAFETY: the cache keeps a block until another is decoded.
        t.sabotage(unsafe { &*block }, 2, bytes);
    }
    let _executing = Executing::new(&raw const *m.cpu);
    if kind == "abort" {
        std::process::abort();
    }
    let _ = m.step_block();
}

fn run(kind: &str) -> (Option<i32>, String) {
    let out = Command::new(std::env::current_exe().expect("this test's program"))
        .args(["--exact", "crash::tests::faults_are_reported", "--nocapture", "--test-threads=1"])
        .env(KIND, kind)
        .output()
        .expect("a child");
    (out.status.signal(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn faults_are_reported() {
    if let Ok(kind) = std::env::var(KIND) {
        // No core file of a fault on purpose.
        // SAFETY: sets a limit.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
        crash(&kind);
        panic!("still here after {kind}");
    }
    for (kind, signal, name, host_bytes) in [
        ("ill", libc::SIGILL, "SIGILL", " 0f 0b"),
        ("segv", libc::SIGSEGV, "SIGSEGV", " 8a 04 25 10 00 00 00"),
        ("fpe", libc::SIGFPE, "SIGFPE", " f7 f1"),
    ] {
        let (ended, said) = run(kind);
        assert_eq!(ended, Some(signal), "{kind}: {said}");
        let lines: Vec<&str> =
            said.lines().filter(|l| l.starts_with("ringfort: ") || l.starts_with("  ")).collect();
        let [head, guest, block, host, registers @ ..] = &lines[..] else { panic!("{kind}: {said}") };
        assert!(head.starts_with(&format!("ringfort: {name} in thread ")), "{said}");
        assert!(head.contains(" at host RIP 0x"), "{said}");
        // DEC ECX, the third instruction of the block.
        let rip = format!("in translated code, guest CS:RIP 0x8:{:#x}", layout::CODE + 12);
        assert!(guest.starts_with("  vCPU 0, CPL 0, ") && guest.ends_with(&rip), "{said}");
        let bytes: String = CODE[5..].iter().map(|b| format!(" {b:02x}")).collect();
        assert_eq!(*block, format!("  block at guest physical {LOOP:#x}, 11 bytes:{bytes}"));
        assert!(host.contains(&format!(" bytes into the block's code:{host_bytes}")), "{said}");
        let value = |name: &str| {
            let at = registers.iter().find_map(|l| l.split_once(name)).expect(name).1;
            u64::from_str_radix(&at[..16], 16).expect(name)
        };
        // The loop has set both to the same.
        assert_eq!(value("R12 "), value("RDX "), "{said}");
        if kind == "segv" {
            assert!(head.ends_with("fault address 0x10"), "{said}");
        }
    }
}

#[test]
fn an_abort_of_the_engine_says_where_the_guest_is() {
    let (ended, said) = run("abort");
    assert_eq!(ended, Some(libc::SIGABRT), "{said}");
    assert!(said.contains("ringfort: SIGABRT in thread "), "{said}");
    let rip = format!("in the engine's own code, guest CS:RIP 0x8:{LOOP:#x}");
    assert!(said.contains(&rip), "{said}");
}

/// Threads without a vCPU have no more than the standard library's stack for signals: one page or two beside the kernel's frame.
#[test]
fn a_thread_that_executes_no_vcpu_is_named() {
    let (ended, said) = run("elsewhere");
    assert_eq!(ended, Some(libc::SIGABRT), "{said}");
    assert!(said.contains("ringfort: SIGABRT in thread small at host RIP 0x"), "{said}");
}
