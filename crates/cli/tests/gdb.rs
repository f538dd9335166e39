//! Debian's gdb on a guest's kernel: from its first instructions to user space.

mod support;

use ringfort_guest::{TEST_PROMPT, TestGuest};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::tiny::Code;
use support::*;

/// gdb, with what it is told and what it says.
struct Gdb(Guest);

impl Gdb {
    /// None where there is no gdb: the test is skipped.
    fn start() -> Option<Gdb> {
        if Command::new("gdb").arg("--version").output().is_err() {
            println!("skipped: there is no gdb here");
            return None;
        }
        // What a target says to `monitor` comes out as errors do.
        let mut command = Command::new("sh");
        command.args(["-c", "exec gdb \"$@\" 2>&1", "gdb"]);
        command.args([
            "-q",
            "-nx",
            "-iex",
            "set pagination off",
            "-iex",
            "set width 0",
            "-iex",
            "set confirm off",
        ]);
        // On a busy machine an answer may take longer than the two seconds that gdb waits.
        command.args(["-iex", "set remotetimeout 120"]);
        let mut gdb = Gdb(Guest::start(command));
        gdb.0.expect("(gdb) ");
        Some(gdb)
    }

    /// Give a command; what it said.
    fn ask(&mut self, command: &str) -> String {
        self.0.send(&format!("{command}\n"));
        self.0.expect("(gdb) ")
    }

    /// Give a command that says all of `parts`.
    fn says(&mut self, command: &str, parts: &[&str]) -> String {
        let said = self.ask(command);
        for part in parts {
            assert!(said.contains(part), "`{command}` said, without {part:?}:\n{said}");
        }
        said
    }

    /// Connect to a guest once it listens.
    fn connect(&mut self, g: &mut Guest, socket: &Path) {
        while !socket.exists() {
            assert!(g.is_running(), "{}", g.tail());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        self.ask(&format!("target remote {}", text(socket)));
    }

    /// Connect to the test guest with this kernel, at addresses that are known beforehand.
    fn linux(&mut self, engine: &str, guest: &TestGuest, kernel: &Path, cpus: u32, socket: &Path) -> Guest {
        let (place, cpus) = (format!("unix:{}", text(socket)), cpus.to_string());
        let cmdline = format!("{} nokaslr", guest.cmdline);
        let options = ["--memory", "256M", "--cpus", &cpus, "--net", "none", "--gdb", &place];
        let mut g = Guest::run(&run_args(engine, kernel, &guest.initrd, &cmdline, &options));
        self.connect(&mut g, socket);
        g
    }
}

/// A guest of a few instructions under gdb.
struct Tiny {
    g: Guest,
    /// Where gdb connects.
    socket: PathBuf,
    _scratch: Scratch,
}

impl Tiny {
    /// Under an engine: 64 rounds that store ECX at 90000h (mov ecx, 64; mov [90000h], ecx; dec ecx; jnz), then echo. It stands
    /// behind its first instruction.
    fn start(gdb: &mut Gdb, engine: &str) -> Tiny {
        Tiny::with(gdb, engine, &[])
    }

    /// With options beside that.
    fn with(gdb: &mut Gdb, engine: &str, more: &[&str]) -> Tiny {
        let scratch = Scratch::new(&format!("gdb-tiny-{}{}", engine.replace([',', '='], "-"), more.len()));
        let code = Code::new()
            .raw(&[0xb9, 64, 0, 0, 0, 0x89, 0x0d, 0, 0, 9, 0, 0x49, 0x75, 0xf7])
            .print("up\n")
            .echo();
        let kernel = scratch.file("kernel", &code.multiboot());
        let socket = scratch.0.join("gdb");
        let place = format!("unix:{}", text(&socket));
        let options =
            ["run", "--accel", engine, "--memory", "32M", "--net", "none", "--kernel", text(&kernel)];
        let mut g = Guest::start(ringfort(&[&options[..], more, &["--gdb", &place]].concat()));
        gdb.connect(&mut g, &socket);
        // The image's header is 32 bytes long.
        gdb.says("p/x $rip", &["0x100020"]);
        gdb.ask("stepi");
        gdb.says("p/x $rip", &["0x100025"]);
        gdb.says("p $rcx", &["= 64"]);
        gdb.ask("set $xmm3.uint128 = 0x112233");
        gdb.says("p/x $xmm3.uint128", &["0x112233"]);
        // What gdb has no commands of its own for.
        gdb.says("monitor help", &["xp ADDRESS [COUNT]", "powerdown"]);
        gdb.says("monitor vcpus", &["* vCPU 0: running, rip 0x100025, cr3 0x0, ring 0"]);
        gdb.says("monitor translate 0x90008", &["at physical address 0x90008"]);
        gdb.ask("set *(unsigned long long *)0x90008 = 0x1122334455667788");
        gdb.says("monitor xp 0x90008 2", &["0x0000000000090008: 0x1122334455667788", "90010: 0x"]);
        gdb.says("monitor xp 0xffffffffffff0000", &["there is no RAM"]);
        gdb.says("monitor system_reset", &["'system_reset' is no command here; `monitor help`"]);
        Tiny { g, socket, _scratch: scratch }
    }
}

/// Addresses of symbols of the test guest's kernel, placed where it was linked.
fn symbols(guest: &TestGuest, engine: &str, names: &[&str]) -> HashMap<String, String> {
    let cmdline = format!("{} nokaslr", guest.cmdline);
    let mut g = Guest::run(&run_args(
        engine,
        &guest.kernel,
        &guest.initrd,
        &cmdline,
        &["--memory", "256M", "--net", "none"],
    ));
    g.expect(TEST_PROMPT);
    let all = names
        .iter()
        .map(|n| {
            (
                n.to_string(),
                format!("0x{}", g.shell(&format!("grep -m1 ' {n}$' /proc/kallsyms | cut -d' ' -f1"))),
            )
        })
        .collect();
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    all
}

/// What the issue asks for: start_kernel, steps, registers, a watchpoint, on to user space.
fn a_kernel_is_debugged(engine: &str) {
    let _turn = one_at_a_time();
    let Some(mut gdb) = Gdb::start() else { return };
    let guest = test_guest();
    let names = ["start_kernel", "system_state", "linux_banner", "__x64_sys_openat", "kernel_init"];
    let at = symbols(&guest, engine, &names);
    let at = |n: &str| at[n].as_str();
    let scratch = Scratch::new(&format!("gdb-{}", engine.replace([',', '='], "-")));
    let socket = scratch.0.join("gdb");
    let mut g = gdb.linux(engine, &guest, &guest.kernel, 2, &socket);
    gdb.says("info threads", &["vCPU 0: running", "vCPU 1: not started"]);
    assert_eq!(g.said, "", "it ran before gdb let it");
    // Before the kernel has its page tables: nothing is mapped at its addresses.
    let start = at("start_kernel");
    gdb.says(&format!("break *{start}"), &["Breakpoint 1"]);
    gdb.says("continue", &["Breakpoint 1, ", start]);
    gdb.says("p/x $rip", &[start]);
    gdb.says("p/x $cs", &["0x10"]);
    gdb.says("p $eflags", &["["]);
    gdb.says("p $efer & 0x500", &["1280"]);
    gdb.says("p/x $cr0 & 0x80000001", &["0x80000001"]);
    gdb.says(&format!("x/s {}", at("linux_banner")), &["Linux version 6."]);
    // Steps: each to another instruction, the first ones straight on.
    let mut seen = vec![gdb.ask("p/x $rip")];
    for _ in 0..5 {
        gdb.ask("stepi");
        let now = gdb.ask("p/x $rip");
        assert_ne!(seen.last().and_then(|s| s.split('=').nth(1)), now.split('=').nth(1));
        seen.push(now);
    }
    // Registers can be changed: R15 is the callee's to keep, so it is put back.
    let kept = gdb.ask("p/x $r15");
    let kept = kept.split("= ").nth(1).expect("a value").trim().to_owned();
    gdb.ask("set $r15 = 0x1234567887654321");
    gdb.says("p/x $r15", &["0x1234567887654321"]);
    gdb.ask(&format!("set $r15 = {kept}"));
    gdb.ask("set $xmm3.uint128 = 0x112233");
    gdb.says("p/x $xmm3.uint128", &["0x112233"]);
    gdb.ask("set $xmm3.uint128 = 0");
    // A watchpoint: SYSTEM_BOOTING becomes SYSTEM_SCHEDULING.
    let watched = format!("*(int *){}", at("system_state"));
    gdb.says(&format!("watch {watched}"), &["Hardware watchpoint 2"]);
    gdb.says("continue", &["Hardware watchpoint 2", "Old value = 0", "New value = 1"]);
    gdb.ask("delete");
    // A breakpoint in memory, at the threads' way to the first process.
    gdb.says(&format!("break *{}", at("kernel_init")), &["Breakpoint 3"]);
    gdb.says("continue", &["Breakpoint 3, ", at("kernel_init")]);
    // gdb shows what the guest has there, not the breakpoint.
    assert!(!gdb.ask("x/1xb $rip").contains("0xcc"));
    gdb.ask("stepi");
    gdb.ask("delete");
    // User space calls.
    gdb.says(&format!("hbreak *{}", at("__x64_sys_openat")), &["Hardware assisted breakpoint 4"]);
    gdb.says("continue", &["Breakpoint 4, ", at("__x64_sys_openat")]);
    gdb.says("info threads", &["vCPU 0", "vCPU 1"]);
    gdb.ask("delete");
    gdb.ask("continue &");
    g.expect(TEST_PROMPT);
    assert_eq!(g.shell("cat /sys/devices/system/cpu/online"), "0-1");
    // What Ctrl-C does, and back.
    gdb.0.send("interrupt\n");
    gdb.0.expect("SIGINT");
    gdb.says("thread 2", &["Switching to thread"]);
    gdb.ask("x/i $rip");
    gdb.ask("detach");
    assert_eq!(g.shell("echo still here"), "still here");
    let problems = g.shell("dmesg | grep -icE 'stall|BUG:|lockup|int3' || true");
    assert_eq!(problems, "0", "{}", g.shell("dmesg | tail -30"));
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_kernel_is_debugged_under_the_translator() {
    a_kernel_is_debugged("soft");
}

#[test]
fn a_guest_is_debugged_under_the_interpreter() {
    let Some(mut gdb) = Gdb::start() else { return };
    let Tiny { mut g, socket, _scratch } = Tiny::start(&mut gdb, "soft,tier=interp");
    gdb.says("watch *(int *)0x90000", &["Hardware watchpoint 1"]);
    for (old, new) in [("0", "64"), ("64", "63"), ("63", "62")] {
        gdb.says("continue", &[&format!("Old value = {old}"), &format!("New value = {new}")]);
    }
    gdb.ask("delete");
    gdb.says("break *0x10002b", &["Breakpoint 2"]);
    gdb.says("continue", &["Breakpoint 2, "]);
    gdb.says("p $rcx", &["= 61"]);
    gdb.says("continue", &["Breakpoint 2, "]);
    gdb.says("p $rcx", &["= 60"]);
    gdb.ask("set $rcx = 1");
    gdb.ask("delete");
    gdb.says("x/2xb 0x10002b", &["0x49", "0x75"]);
    gdb.ask("detach");
    g.expect("up\n");
    // Another debugger, and one that ends the machine.
    gdb.ask(&format!("target remote {}", text(&socket)));
    gdb.says("p/x $rip", &["0x10"]);
    gdb.0.send("kill\n");
    assert_eq!(g.wait().code(), Some(0));
}

/// The halves of YMM registers, where the CPU has them.
#[test]
fn vector_registers_are_shown() {
    let Some(mut gdb) = Gdb::start() else { return };
    let Tiny { g, socket: _, _scratch } = Tiny::with(&mut gdb, "soft", &["--cpu", "max"]);
    gdb.says("info registers ymm3", &["v4_int64 = {0x112233, 0x0, 0x0, 0x0}"]);
    gdb.ask("set $ymm3.v8_int32[6] = 0x445566");
    gdb.ask("set $ymm15.v8_int32[7] = 77");
    // From the guest, not from what gdb remembers.
    gdb.ask("stepi");
    gdb.ask("maintenance flush register-cache");
    gdb.says("p/x $ymm3.v8_int32", &["{0x112233, 0x0, 0x0, 0x0, 0x0, 0x0, 0x445566, 0x0}"]);
    gdb.says("p $ymm15.v8_int32", &["{0, 0, 0, 0, 0, 0, 0, 77}"]);
    gdb.ask("kill");
    assert_eq!(g.wait().code(), Some(0));
}

/// Steps, breakpoints by address and registers. INT3 and watchpoints are left out: KVM without hardware behind it has none.
#[test]
fn a_guest_is_debugged_under_kvm() {
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return;
    }
    let Some(mut gdb) = Gdb::start() else { return };
    let Tiny { mut g, socket, _scratch } = Tiny::start(&mut gdb, "kvm");
    gdb.says("hbreak *0x10002b", &["Hardware assisted breakpoint 1"]);
    gdb.says("continue", &["Breakpoint 1, "]);
    gdb.says("p $rcx", &["= 64"]);
    gdb.says("continue", &["Breakpoint 1, "]);
    gdb.says("p $rcx", &["= 63"]);
    gdb.says("p *(int *)0x90000", &["= 63"]);
    gdb.ask("set $rcx = 1");
    gdb.says("p $rcx", &["= 1"]);
    gdb.ask("delete");
    gdb.ask("detach");
    g.expect("up\n");
    // Another debugger; what Ctrl-C does, in the loop that waits for input; and the end.
    gdb.ask(&format!("target remote {}", text(&socket)));
    gdb.ask("continue &");
    g.send("still here");
    g.expect("still here");
    gdb.0.send("interrupt\n");
    gdb.0.expect("SIGINT");
    gdb.says("p $rcx", &["= 0"]);
    gdb.0.send("kill\n");
    assert_eq!(g.wait().code(), Some(0));
}

/// The ELF file in a bzImage, found by the boot protocol's `payload_offset` and `payload_length` (Documentation/arch/x86/boot.rst) and
/// unpacked by the program that its first bytes call for. None where that program is not installed: the test is skipped.
fn unpacked(bzimage: &Path, scratch: &Scratch) -> Option<PathBuf> {
    let image = std::fs::read(bzimage).expect("the kernel");
    let word = |at: usize| {
        u32::from_le_bytes(image[at..at + 4].try_into().expect("a boot protocol header")) as usize
    };
    let sectors = usize::from(image[0x1f1]);
    let at = (sectors + 1) * 512 + word(0x248);
    let mut payload = &image[at..at + word(0x24c)];
    let program = match payload {
        [0x1f, 0x8b, ..] => "gzip",
        [0xfd, b'7', b'z', b'X', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        other => panic!("a kernel packed in an unknown way: {:x?}", &other[..8]),
    };
    // The kernel's build puts the unpacked length behind it; gzip's format has it itself.
    if program != "gzip" {
        payload = &payload[..payload.len() - 4];
    }
    let packed = scratch.file("vmlinux.packed", payload);
    let out = match Command::new(program).arg("-dc").stdin(File::open(packed).expect("the payload")).output()
    {
        Ok(out) => out,
        Err(e) => {
            println!("skipped: {program}: {e}");
            return None;
        }
    };
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
    Some(scratch.file("vmlinux", &out.stdout))
}

/// A kernel that is already unpacked is at `start_kernel` after a few million instructions, which a KVM without hardware interprets in
/// seconds.
#[test]
fn a_kernels_start_is_debugged_under_kvm() {
    if let Err(e) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return;
    }
    let _turn = one_at_a_time();
    let Some(mut gdb) = Gdb::start() else { return };
    let guest = test_guest();
    let scratch = Scratch::new("gdb-kvm");
    let Some(kernel) = unpacked(&guest.kernel, &scratch) else { return };
    let at = symbols(&guest, "soft", &["start_kernel", "linux_banner"]);
    let at = |n: &str| at[n].as_str();
    let socket = scratch.0.join("gdb");
    let g = gdb.linux("kvm", &guest, &kernel, 1, &socket);
    gdb.says("p/x $cr0 & 0x80000001", &["0x1"]);
    let start = at("start_kernel");
    gdb.says(&format!("hbreak *{start}"), &["Hardware assisted breakpoint 1"]);
    gdb.says("continue", &["Breakpoint 1, ", start]);
    gdb.says("p/x $rip", &[start]);
    gdb.says("p/x $cs", &["0x10"]);
    gdb.says("p $efer & 0x500", &["1280"]);
    gdb.says("p/x $cr0 & 0x80000001", &["0x80000001"]);
    gdb.says(&format!("x/s {}", at("linux_banner")), &["Linux version 6."]);
    // Steps: each to another instruction.
    let rip = |gdb: &mut Gdb| gdb.ask("p/x $rip").split_once("= ").expect("a value").1.to_owned();
    let mut last = rip(&mut gdb);
    for _ in 0..5 {
        gdb.ask("stepi");
        let now = rip(&mut gdb);
        assert_ne!(now, last);
        last = now;
    }
    // Registers can be changed, and it goes on with them.
    gdb.ask("set $r15 = 0x1234567887654321");
    gdb.ask("stepi");
    gdb.says("p/x $r15", &["0x1234567887654321"]);
    gdb.0.send("kill\n");
    assert_eq!(g.wait().code(), Some(0));
    assert!(!socket.exists());
}
