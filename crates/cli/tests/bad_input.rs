//! What cannot be used: one line that names the thing and the way out, exit status 2, nothing left behind.

mod support;

use std::io::{BufRead as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use support::tiny::Code;
use support::*;

/// What a refused run said: exactly one line on standard error, nothing on standard output, status 2, at once.
fn refused(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().expect("ringfort");
    let said = String::from_utf8(out.stderr).expect("text");
    assert_eq!(out.status.code(), Some(2), "{command:?}: {said}");
    assert!(out.stdout.is_empty(), "{command:?} printed");
    assert_eq!(said.lines().count(), 1, "{command:?} said: {said}");
    assert!(said.starts_with("ringfort: ") && said.ends_with('\n'), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// A folder with a kernel that runs, in which commands are given.
struct Place {
    scratch: Scratch,
}

impl Place {
    fn new(name: &str) -> Place {
        let scratch = Scratch::new(name);
        scratch.file("good", &Code::new().power_off().multiboot());
        Place { scratch }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut c = ringfort(&["run"]);
        // Nothing here may reach for the default guest.
        c.args(args).current_dir(&self.scratch.0).env("XDG_CACHE_HOME", self.scratch.0.join("no-cache"));
        c
    }

    /// A run with `args` is refused in words that contain all of `parts`, and leaves no file.
    fn refuses(&self, args: &[&str], parts: &[&str]) {
        let before = self.files();
        let said = refused(&mut self.command(args));
        for part in parts {
            assert!(said.contains(part), "{args:?}: no {part:?} in: {said}");
        }
        assert_eq!(self.files(), before, "{args:?} left something behind");
    }

    fn files(&self) -> Vec<(String, u64)> {
        let mut all: Vec<_> = std::fs::read_dir(&self.scratch.0)
            .expect("the folder")
            .map(|e| {
                let e = e.expect("an entry");
                (e.file_name().to_string_lossy().into_owned(), e.metadata().expect("its data").len())
            })
            .collect();
        all.sort();
        all
    }

    /// The good kernel with these options is refused.
    fn refuses_options(&self, options: &[&str], parts: &[&str]) {
        let mut args = vec!["--kernel", "good"];
        args.extend(options);
        self.refuses(&args, parts);
    }
}

#[test]
fn kernels() {
    let p = Place::new("bad-kernels");
    p.refuses(&["--kernel", "missing"], &["--kernel missing", "no such file", "check the path"]);
    p.refuses(&["--kernel", "."], &["--kernel .: is a directory; name a file"]);
    p.refuses(&["--kernel", "/dev/zero"], &["/dev/zero", "is no regular file"]);
    let made = Command::new("mkfifo").arg(p.scratch.0.join("pipe")).status().expect("mkfifo");
    assert!(made.success());
    p.refuses(&["--kernel", "pipe"], &["pipe", "is no regular file"]);
    for (name, content) in [("empty", &b""[..]), ("text", b"#!/bin/sh\n"), ("zeros", &[0; 4096])] {
        p.scratch.file(name, content);
        p.refuses(&["--kernel", name], &[name, "no kernel that can be booted", "name a bzImage"]);
    }
    // A program for Linux is an ELF file, too.
    p.refuses(&["--kernel", env!("CARGO_BIN_EXE_ringfort")], &["no kernel", "name a kernel"]);
    p.refuses(&["--kernel", "good", "--initrd", "missing"], &["--initrd missing", "no such file"]);
    p.refuses(&["--kernel", "good", "--initrd", "."], &["--initrd .: is a directory"]);
    p.refuses(&["--initrd", "good"], &["--initrd needs --kernel"]);
}

#[test]
fn a_kernel_that_may_not_be_read() {
    use std::os::unix::fs::PermissionsExt as _;
    let p = Place::new("bad-permissions");
    let kernel = p.scratch.0.join("good");
    std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o000)).expect("permissions");
    let mut command = p.command(&["--kernel", "good"]);
    if std::fs::File::open(&kernel).is_ok() {
        // Root reads everything unless it gives up the right to.
        let mut fewer = Command::new("setpriv");
        fewer.args(["--bounding-set", "-dac_override,-dac_read_search", "--"]);
        fewer.arg(command.get_program()).args(command.get_args()).current_dir(&p.scratch.0);
        command = fewer;
    }
    let said = refused(&mut command);
    assert!(said.contains("--kernel good: may not be read; change its permissions"), "{said}");
}

#[test]
fn kernels_that_are_cut_short_or_lie() {
    let p = Place::new("bad-headers");
    let real = std::fs::read(test_guest().kernel).expect("the kernel");
    let refuses = |name: &str, content: &[u8], part: &str| {
        p.scratch.file("k", content);
        println!("{name}");
        let said = refused(&mut p.command(&["--kernel", "k"]));
        assert!(said.contains("k: ") && said.contains(part), "{name}: no {part:?} in: {said}");
    };
    for length in [0x205, 0x260, 0x1000, 100_000, real.len() / 2, real.len() - 5000] {
        refuses(&format!("bzImage of {length}"), &real[..length], "");
    }
    refuses("half a bzImage", &real[..real.len() / 2], "cut short");
    // Linux boot protocol: setup_sects, syssize, version, init_size.
    let mut lying = real.clone();
    lying[0x1f4..0x1f8].fill(0xff);
    refuses("syssize", &lying, "");
    let mut lying = real.clone();
    lying[0x206..0x208].copy_from_slice(&[0, 1]);
    refuses("protocol version", &lying, "");
    let mut lying = real;
    lying[0x260..0x264].fill(0xff);
    refuses("init_size", &lying, "more memory");

    let elf = Code::new().power_off().pvh();
    for length in [5, 63, 64, 100, 176, 190, elf.len() - 1] {
        refuses(&format!("ELF of {length}"), &elf[..length], "");
    }
    let lie = |what: &str, at: usize, value: &[u8]| {
        let mut f = elf.clone();
        f[at..at + value.len()].copy_from_slice(value);
        refuses(what, &f, "");
    };
    lie("program header table beyond the end", 32, &[0xff; 8]);
    lie("program headers without number", 56, &[0xff; 2]);
    lie("program headers without size", 54, &[0; 2]);
    lie("a segment from beyond the end", 64 + 8, &[0xff; 8]);
    lie("a segment to beyond the RAM", 64 + 24, &[0xff; 8]);
    lie("a segment without end", 64 + 40, &[0xff; 8]);
    lie("a segment larger in the file than in memory", 64 + 40, &[1, 0, 0, 0, 0, 0, 0, 0]);
    lie("another machine", 18, &[183, 0]);

    let flat = Code::new().power_off().multiboot();
    let lie = |what: &str, at: usize, value: u32| {
        let mut f = flat.clone();
        f[at..at + 4].copy_from_slice(&value.to_le_bytes());
        refuses(what, &f, "");
    };
    lie("Multiboot checksum", 8, 1);
    lie("Multiboot load address beyond the RAM", 16, 0xf000_0000);
    lie("Multiboot load end beyond the file", 20, 0x0fff_ffff);
    lie("Multiboot bss without end", 24, 0xffff_fff0);
}

#[test]
fn an_initrd_larger_than_memory() {
    let p = Place::new("bad-initrd");
    p.scratch.disk("large", 1 << 33);
    let kernel = test_guest().kernel;
    p.refuses(
        &["--memory", "512M", "--kernel", text(&kernel), "--initrd", "large"],
        &["large", "initrd", "do not fit", "more memory"],
    );
    p.refuses_options(&["--initrd", "large"], &["large", "do not fit", "more memory"]);
}

#[test]
fn memory_and_cpus() {
    let p = Place::new("bad-sizes");
    for (size, part) in [
        ("0", "0 is too little; give at least 8M"),
        ("1M", "1M is too little"),
        ("9999T", "more than this host has"),
        ("18446744073709551615", "too large"),
        ("lots", "'lots' is no size; write for instance 512M"),
        ("-1", "--memory"),
        ("", "--memory"),
    ] {
        // The later of two is taken.
        let args = format!("--memory={size}");
        let said = refused(ringfort(&["run", &args, "--kernel", "good"]).current_dir(&p.scratch.0));
        assert!(said.contains("--memory") && said.contains(part), "{size}: {said}");
    }
    for cpus in ["0", "17", "4294967296", "two"] {
        p.refuses_options(&["--cpus", cpus], &["--cpus", cpus]);
    }
    let kernel = test_guest().kernel;
    // Enough for a machine, not for Debian's kernel.
    let said = refused(&mut ringfort(&["run", "--memory", "8M", "--kernel", text(&kernel)]));
    assert!(said.contains("do not fit") && said.contains("more memory"), "{said}");
}

/// What `--net` does not take.
fn networks(p: &Place) {
    p.refuses_options(&["--net", "wifi"], &["wifi", "the networks are"]);
    p.refuses_options(&["--net", "user,mac=12:34"], &["'12:34'", "six bytes in hex"]);
    p.refuses_options(&["--net", "user,mac=01:00:5e:00:00:01"], &["01:00:5e:00:00:01", "the first one even"]);
    p.refuses_options(&["--net", "user,net=10.0.2.0/40"], &["net=10.0.2.0/40", "10.0.2.0/24"]);
    p.refuses_options(&["--net", "user,net=10.0.2.0/31"], &["--net (number 1) net", "give 8 to 30"]);
    p.refuses_options(&["--net", "user,hostfwd=tcp:22-22"], &["hostfwd=tcp:22-22", "write for instance"]);
    p.refuses_options(&["--net", "none", "--net", "user"], &["--net", "none stands alone"]);
    p.refuses_options(&["--net", "passt,path=/no/such/passt"], &["--net", "/no/such/passt", "install passt"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = taken.local_addr().expect("its address");
    let told = format!("cannot listen on tcp {at}");
    p.refuses_options(
        &["--net", &format!("user,hostfwd=tcp:{at}-:22")],
        &["--net", &told, "choose another port"],
    );
}

#[test]
fn options() {
    let p = Place::new("bad-options");
    p.refuses_options(&["--bogus"], &["--bogus", "`ringfort run --help`"]);
    p.refuses_options(&["-Z"], &["-Z"]);
    p.refuses_options(&["stray"], &["stray"]);
    p.refuses_options(&["--cmdline"], &["--cmdline"]);
    p.refuses_options(&["--accel", "hvf"], &["hvf", "give auto, kvm or soft"]);
    networks(&p);
    p.refuses_options(&["--name", "a/b"], &["--name", "without control characters"]);
    p.refuses_options(&["--name", ""], &["--name", "give 1 to 64"]);
    p.refuses_options(&["--cmdline", &"x".repeat(3000)], &["--cmdline", "3000 bytes", "2047"]);
    p.refuses_options(&["--keep"], &["--keep", "--kernel"]);
    // All mistakes of a configuration at once, still on one line.
    p.refuses_options(&["--cpus", "99", "--cpu", "486", "--name", ""], &["--cpus", "--cpu: ", "--name"]);
    let said = refused(&mut ringfort(&["rnu"]));
    assert!(said.contains("rnu") && said.contains("`ringfort --help`"), "{said}");
    // Told before the default guest is built.
    p.refuses(&["--cpus", "99"], &["--cpus", "1 to 16"]);
}

#[test]
fn cpu_models_and_features() {
    let p = Place::new("bad-cpus");
    p.refuses_options(
        &["--cpu", "Z80"],
        &["--cpu", "\"Z80\" is not known", "qemu64", "Nehalem", "EPYC", "host"],
    );
    p.refuses_options(&["--cpu", "max,+avx3"], &["--cpu", "\"avx3\" is not known", "did you mean", "avx2"]);
    p.refuses_options(&["--cpu", "max,+qqqqqqq"], &["\"qqqqqqq\" is not known", "--cpu help"]);
    p.refuses_options(&["--cpu", "max,avx2"], &["--cpu", "\"avx2\" is not understood", "+feature"]);
    p.refuses_options(&["--cpu", ""], &["--cpu"]);
    // Known, but nothing that this engine does.
    p.refuses_options(&["--cpu", "max,+vmx,+avx512f"], &["--cpu", "vmx", "avx512f", "leave them out"]);
    let out = ringfort(&["run", "--cpu", "help"]).output().expect("ringfort");
    let listed = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && listed.contains("Skylake") && listed.contains("avx2"), "{listed}");
}

#[test]
fn disks() {
    let p = Place::new("bad-disks");
    p.scratch.disk("disk", 1 << 20);
    p.scratch.file("empty", b"");
    p.scratch.file("qcow2", b"QFI\xfb\0\0\0\x03");
    p.refuses_options(&["--disk", "path=missing"], &["--disk", "missing", "no such file"]);
    p.refuses_options(&["--disk", "path=."], &["--disk", "is a directory"]);
    p.refuses_options(&["--disk", "path=empty"], &["--disk", "empty"]);
    p.refuses_options(&["--disk", "path=disk,format=vmdk"], &["format=vmdk"]);
    p.refuses_options(&["--disk", "path=disk,format=qcow2"], &["--disk", "disk", "qcow2"]);
    p.refuses_options(&["--disk", "path=qcow2"], &["--disk", "qcow2"]);
    p.refuses_options(&["--disk", "path=disk,colour=red"], &["'colour'", "known are path"]);
    p.refuses_options(&["--disk", "path=disk,readonly=perhaps"], &["readonly=perhaps", "on or off"]);
    p.refuses_options(&["--disk", "format=raw"], &["path=FILE"]);
    p.refuses_options(&["--disk", "path=disk,queues=0"], &["--disk (number 1) queues", "1 to 16"]);
    p.refuses_options(&["--disk", "disk", "--disk", "disk"], &["--disk (number 2) path", "given twice"]);
    p.refuses_options(&["--disk", "disk", "--disk", "./disk"], &["./disk", "in use"]);
    let many: Vec<String> = (0..17).map(|n| format!("--disk=d{n}")).collect();
    p.refuses_options(&many.iter().map(String::as_str).collect::<Vec<_>>(), &["--disk: 17 disks"]);
}

#[test]
fn a_disk_in_use_by_another_process() {
    let p = Place::new("bad-busy");
    let disk = p.scratch.disk("disk", 1 << 20);
    let kernel = p.scratch.file("waits", &Code::new().print("up\n").halt().multiboot());
    let busy = ["in use by another process", "readonly=on"];

    // By another machine of ours, which also keeps QEMU's tools off.
    let drive = format!("path={}", text(&disk));
    let mut other =
        Guest::start(ringfort(&["run", "--memory", "64M", "--kernel", text(&kernel), "--disk", &drive]));
    other.expect("up");
    p.refuses_options(&["--disk", "path=disk"], &busy);
    p.refuses_options(&["--disk", "path=disk,readonly=on"], &["in use by another process"]);
    let out = Command::new("qemu-io").args(["-f", "raw", "-c", "read 0 512", text(&disk)]).output();
    let out = out.expect("qemu-io (Debian package qemu-utils)");
    assert!(!out.status.success(), "QEMU's tools opened a disk that a machine uses");
    other.send("\x01x");
    assert_eq!(other.wait().code(), Some(0));

    // By QEMU's tools, and by QEMU.
    let mut tool = Command::new("qemu-io");
    tool.args(["-f", "raw", text(&disk)]);
    let mut tool = Child(tool.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-io"));
    let mut stdin = tool.0.stdin.take().expect("piped");
    stdin.write_all(b"read 0 512\n").expect("a command");
    let mut lines = std::io::BufReader::new(tool.0.stdout.take().expect("piped")).lines();
    assert!(lines.any(|l| l.expect("text").contains("read 512/512")), "qemu-io read nothing");
    p.refuses_options(&["--disk", "path=disk"], &busy);
    drop(stdin);
    tool.0.wait().expect("qemu-io");

    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-qmp", "stdio", "-drive"]);
    qemu.arg(format!("if=virtio,format=raw,file={}", text(&disk)));
    let mut qemu =
        Child(qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-system-x86_64"));
    let mut stdin = qemu.0.stdin.take().expect("piped");
    let mut lines = std::io::BufReader::new(qemu.0.stdout.take().expect("piped")).lines();
    // It greets when its devices stand.
    assert!(lines.any(|l| l.expect("text").contains("QMP")), "QEMU did not start");
    p.refuses_options(&["--disk", "path=disk"], &busy);
    stdin.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}\n").expect("a command");
    qemu.0.wait().expect("QEMU");

    // A run that worked leaves the disk free again.
    let out = p.command(&["--kernel", "good", "--disk", "path=disk"]).output().expect("ringfort");
    assert_eq!(out.status.code(), Some(0));
    // Two readers do not hinder each other.
    let reader = format!("path={},readonly=on", text(&disk));
    let mut other =
        Guest::start(ringfort(&["run", "--memory", "64M", "--kernel", text(&kernel), "--disk", &reader]));
    other.expect("up");
    let out = p.command(&["--kernel", "good", "--disk", "path=disk,readonly=on"]).output().expect("ringfort");
    assert_eq!(out.status.code(), Some(0));
    p.refuses_options(&["--disk", "path=disk"], &["in use by another process"]);
}

#[test]
fn serial_ports_and_consoles() {
    let p = Place::new("bad-serial");
    p.scratch.file("taken", b"mine");
    for option in ["--serial", "--console"] {
        for (place, part) in [
            ("file:/nowhere/x", "/nowhere/x"),
            ("file:.", "."),
            ("unix:/nowhere/x", "/nowhere/x"),
            ("unix:taken", "exists and is no socket; choose another path"),
            ("file:", "a path must follow"),
            ("telnet:1", "give stdio, file:PATH, pty, unix:PATH or none"),
        ] {
            p.refuses_options(&[option, place], &[option, part]);
        }
    }
    p.refuses_options(
        &["--serial", "stdio", "--console", "stdio"],
        &["--console", "give one of them another"],
    );
    assert_eq!(std::fs::read(p.scratch.0.join("taken")).expect("the file"), b"mine");
    let _listener = UnixListener::bind(p.scratch.0.join("socket")).expect("a socket");
    p.refuses_options(
        &["--serial", "unix:socket"],
        &["socket", "another process listens", "choose another path"],
    );
    // A file is neither made nor emptied by a run that comes to nothing, whatever is wrong.
    for wrong in [&["--kernel", "missing"][..], &["--kernel", "good", "--disk", "missing"]] {
        for place in ["file:new", "file:taken", "unix:new"] {
            let mut args = vec!["--serial", place, "--console", "none"];
            args.extend(wrong);
            p.refuses(&args, &["missing"]);
        }
    }
    assert_eq!(std::fs::read(p.scratch.0.join("taken")).expect("the file"), b"mine");
}

#[test]
fn a_host_on_which_no_guest_can_be_built() {
    let p = Place::new("bad-host");
    // Every mirror out of reach. Progress is shown before it comes to that; the last line tells.
    let mut command = p.command(&[]);
    for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
        command.env(proxy, "http://127.0.0.1:1");
    }
    let out = command.stdin(Stdio::null()).output().expect("ringfort");
    let said = String::from_utf8_lossy(&out.stderr);
    let last = said.lines().last().expect("a line");
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(last.starts_with("ringfort: ") && last.contains("--kernel") && last.contains("--disk"), "{said}");
    // A cache folder that cannot be made.
    let mut command = p.command(&[]);
    command.env("XDG_CACHE_HOME", Path::new("/dev/null/x"));
    let said = refused(&mut command);
    assert!(said.contains("/dev/null/x"), "{said}");
}
