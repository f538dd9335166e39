//! Errors of the host in real guests: told to the guest, or the machine stands until they are mended; and what a client of
//! the control socket hears of it.

mod support;

use ringfort_guest::TEST_PROMPT;
use serde_json::json;
use std::path::Path;
use std::process::Command;
use support::control::Control;
use support::*;

/// A guest whose machine is started by `wrapper` and whose machine's remarks come with what it says.
fn start(wrapper: &str, options: &[&str], disks: &[String]) -> Guest {
    let mut c = Command::new("sh");
    c.args(["-c", &format!("{wrapper} \"$@\" 2>&1"), "sh", env!("CARGO_BIN_EXE_ringfort")]);
    c.args(test_run_args(options, disks));
    let mut g = Guest::start(c);
    g.expect(TEST_PROMPT);
    g
}

fn power_off(mut g: Guest) {
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
}

fn set_len(file: &Path, len: u64) {
    std::fs::OpenOptions::new().write(true).open(file).and_then(|f| f.set_len(len)).expect("another length");
}

/// Wait for this error, not of space; a slow request may be told of more than once. Gives the reason.
fn failed(control: &mut Control, operation: &str, device: &str, action: &str) -> String {
    failed_so(control, operation, device, action, false)
}

fn failed_so(control: &mut Control, operation: &str, device: &str, action: &str, full: bool) -> String {
    let want = json!([device, device, operation, action, full]);
    loop {
        let e = control.event("BLOCK_IO_ERROR");
        if json!([e["device"], e["node-name"], e["operation"], e["action"], e["nospace"]]) == want {
            return e["reason"].as_str().unwrap_or_default().to_owned();
        }
    }
}

#[test]
fn bad_sectors_are_told_to_the_guest_or_make_it_stand() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-eio");
    let script = s.file("bad_sectors.py", include_bytes!("support/bad_sectors.py"));
    let (reports, stands, ignores) =
        (s.disk("reports.raw", 16 << 20), s.disk("stands.raw", 16 << 20), s.disk("ignores.raw", 16 << 20));
    let socket = s.0.join("control");
    // Nothing of what the machine reads itself (its kernel, by mapping or from the start) is there: 9 to 10 MiB.
    let wrapper = format!("exec python3 {} 0x900000 0xa00000", text(&script));
    let disk = |path: &Path, more: &str| format!("path={},format=raw,aio=threads,{more}", text(path));
    let mut g = start(
        &wrapper,
        &["--control", text(&socket)],
        &[
            disk(&reports, "cache=none"),
            disk(&stands, "werror=stop,rerror=stop"),
            disk(&ignores, "werror=ignore,rerror=ignore"),
        ],
    );
    let mut control = Control::connect(&socket);
    g.shell("head -c 2097152 /dev/urandom >/tmp/x");
    // Told: the guest's own I/O error, for writes and for reads; what lies beside is written and read.
    g.send("dd if=/tmp/x of=/dev/vda bs=1M seek=9 count=1 oflag=direct; echo rf-'status':$?\n");
    g.expect_each(&["write error: Input/output error (os error 5); the guest was told so", "rf-status:1"]);
    let reason = failed(&mut control, "write", "virtio0", "report");
    assert!(reason.contains("Input/output error"), "{reason}");
    g.send("dd if=/dev/vda of=/dev/null bs=1M skip=9 count=1 iflag=direct; echo rf-'status':$?\n");
    g.expect_each(&["read error: Input/output error (os error 5); the guest was told so", "rf-status:1"]);
    failed(&mut control, "read", "virtio0", "report");
    g.shell("dd if=/tmp/x of=/dev/vda bs=1M seek=8 count=1 oflag=direct conv=fsync 2>/dev/null");
    assert_eq!(control.ask("query-status", json!({}))["status"], "running");
    // Ignored, as asked.
    g.send("dd if=/tmp/x of=/dev/vdc bs=1M seek=9 count=1 oflag=direct 2>/dev/null; echo rf-'status':$?\n");
    g.expect_each(&["ignored, as the disk's options say", "rf-status:0"]);
    failed(&mut control, "write", "virtio2", "ignore");
    // The machine stands, and does so again as long as nothing is mended.
    g.send("dd if=/tmp/x of=/dev/vdb bs=1M seek=9 count=1 oflag=direct\n");
    g.expect("stands.raw: write error: Input/output error (os error 5); the guest stands: mend it");
    failed(&mut control, "write", "virtio1", "stop");
    control.event("STOP");
    assert_eq!(control.ask("query-status", json!({})), json!({ "running": false, "status": "io-error" }));
    assert_eq!(control.ask("query-block", json!({}))[1]["io-status"], "failed");
    control.ask("cont", json!({}));
    control.event("RESUME");
    control.event("STOP");
    // A reset gives it up.
    control.ask("system_reset", json!({}));
    assert_eq!(control.event("RESET"), json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    control.event("RESUME");
    g.expect("user space at");
    g.expect(TEST_PROMPT);
    assert_eq!(control.ask("query-block", json!({}))[1]["io-status"], "ok");
    control.ask("quit", json!({}));
    assert_eq!(control.event("SHUTDOWN"), json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert_eq!(g.wait().code(), Some(0));
    // What was written beside the bad sectors is there.
    let there = std::fs::read(&reports).expect("a disk");
    assert!(there[8 << 20..9 << 20].iter().any(|b| *b != 0) && there[9 << 20..].iter().all(|b| *b == 0));
}

/// EIO and ENOSPC out of the kernel itself, so that io_uring meets them as the threads do.
fn a_bad_disk(aio: &str) {
    let _turn = one_at_a_time();
    if !Command::new("unshare").args(["-rm", "test", "-w", "/dev/fuse"]).status().is_ok_and(|s| s.success()) {
        eprintln!("skipped: no file system of one's own is to be had here (unshare -rm, /dev/fuse)");
        return;
    }
    let s = Scratch::new(&format!("bad-disk-{aio}"));
    let script = s.file("bad_disk.py", include_bytes!("support/bad_disk.py"));
    let (folder, mended, socket) = (s.0.join("disks"), s.0.join("mended"), s.0.join("control"));
    std::fs::create_dir(&folder).expect("a folder");
    let mend = || std::fs::write(&mended, "").expect("mended");
    let spoil = || std::fs::remove_file(&mended).expect("spoilt");
    let wrapper = format!("exec unshare -rm python3 {} {} {}", text(&script), text(&folder), text(&mended));
    let disk = |name: &str, what: &str| {
        let path = folder.join(name);
        format!("path={},format=raw,cache=none,aio={aio},werror={what},rerror={what}", text(&path))
    };
    let mut g =
        start(&wrapper, &["--control", text(&socket)], &[disk("reports", "report"), disk("stands", "stop")]);
    let mut control = Control::connect(&socket);
    if aio == "io_uring" && ringfort_block::aio::io_uring_available() {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", g.pid())).expect("its files").flatten();
        let ring = |fd: std::fs::DirEntry| {
            std::fs::read_link(fd.path()).is_ok_and(|l| l.to_string_lossy().contains("io_uring"))
        };
        assert!(fds.into_iter().any(ring), "io_uring is used");
    }
    g.shell("head -c 1048576 /dev/urandom >/tmp/x; md5sum </tmp/x >/tmp/sum");
    let write = |disk: &str, at: u32| format!("dd if=/tmp/x of=/dev/{disk} bs=1M seek={at} oflag=direct");
    let read = |disk: &str, at: u32| format!("dd if=/dev/{disk} bs=1M skip={at} count=1 iflag=direct");
    let told = "; the guest was told so";
    for (work, operation, error, full) in [
        (write("vda", 9), "write", "write error: Input/output error (os error 5)", false),
        (read("vda", 9), "read", "read error: Input/output error (os error 5)", false),
        (write("vda", 11), "write", "write error: No space left on device (os error 28)", true),
    ] {
        g.send(&format!("{work} >/dev/null; echo rf-'status':$?\n"));
        g.expect_each(&[&format!("{error}{told}"), "rf-status:1"]);
        // A disk's second failed write within a while is not told of by the socket.
        if !full {
            failed(&mut control, operation, "virtio0", "report");
        }
    }
    // What lies between is sound.
    g.shell(&format!("{} 2>/dev/null", write("vda", 10)));
    g.shell(&format!("{} 2>/dev/null | md5sum | cmp - /tmp/sum", read("vda", 10)));

    // The machine stands before a write and before a read, and does them when all is mended.
    let read_back = format!("{} 2>/dev/null | md5sum | cmp - /tmp/sum", read("vdb", 9));
    for (work, operation) in [(write("vdb", 9), "write"), (read_back, "read")] {
        g.send(&format!("{work} 2>/dev/null; echo rf-'status':$?\n"));
        let error = format!("{operation} error: Input/output error (os error 5)");
        g.expect(&format!("stands: {error}; the guest stands: mend it"));
        failed(&mut control, operation, "virtio1", "stop");
        control.event("STOP");
        mend();
        control.ask("cont", json!({}));
        control.event("RESUME");
        g.expect("rf-status:0");
        spoil();
    }
    // Space comes back by itself, and the guest goes on by itself.
    g.send(&format!("{} 2>/dev/null; echo rf-'status':$?\n", write("vdb", 11)));
    g.expect("the guest stands until there is space");
    failed_so(&mut control, "write", "virtio1", "stop", true);
    control.event("STOP");
    mend();
    g.expect_each(&["the guest goes on", "rf-status:0"]);
    control.event("RESUME");
    g.shell(&format!("{} 2>/dev/null | md5sum | cmp - /tmp/sum", read("vdb", 11)));
    power_off(g);
}

#[test]
fn a_bad_disk_by_io_uring() {
    a_bad_disk("io_uring");
}

#[test]
fn a_bad_disk_by_threads() {
    a_bad_disk("threads");
}

#[test]
fn what_failed_is_done_when_it_is_mended() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-mended");
    let (stands, short) = (s.disk("stands.raw", 32 << 20), s.file("short.raw", &vec![0x55; 16 << 20]));
    let socket = s.0.join("control");
    // The host lets nothing be written behind 12 MiB: EFBIG (setrlimit(2)), until the limit is lifted.
    let mut g = start(
        "ulimit -S -f 24576; exec",
        &["--control", text(&socket)],
        &[
            format!("path={},format=raw,werror=stop", text(&stands)),
            format!("path={},format=raw,rerror=stop", text(&short)),
        ],
    );
    let mut control = Control::connect(&socket);
    let pid = g.pid();
    g.shell("head -c 4194304 /dev/urandom >/tmp/x");
    g.shell("dd if=/tmp/x of=/dev/vda bs=1M conv=notrunc,fsync 2>/dev/null");
    g.send("dd if=/tmp/x of=/dev/vda bs=1M seek=16 conv=notrunc,fsync 2>/dev/null; echo rf-'status':$?\n");
    g.expect("write error: File too large (os error 27); the guest stands: mend it, then press Ctrl-A c");
    failed(&mut control, "write", "virtio0", "stop");
    control.event("STOP");
    let lifted = Command::new("prlimit").args(["--fsize=unlimited:", "--pid", &pid.to_string()]).status();
    assert!(lifted.expect("prlimit (Debian package util-linux)").success());
    control.ask("cont", json!({}));
    control.event("RESUME");
    g.expect("rf-status:0");
    g.shell("md5sum </tmp/x >/tmp/sum; blockdev --flushbufs /dev/vda");
    g.shell("dd if=/dev/vda bs=1M skip=16 count=4 2>/dev/null | md5sum | cmp - /tmp/sum");
    // The same for a read: the file has become too short, and then has its length again.
    set_len(&short, 1 << 20);
    g.send(
        "dd if=/dev/vdb bs=1M skip=8 count=4 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c; echo rf-'end'\n",
    );
    g.expect("read error: ");
    g.expect("the guest stands: mend it");
    failed(&mut control, "read", "virtio1", "stop");
    control.event("STOP");
    set_len(&short, 16 << 20);
    g.send("\x01c");
    control.event("RESUME");
    assert!(g.expect("rf-end").contains("\n0\r\n"));
    // Nothing is left of it.
    patient("an end of the trouble", || control.ask("query-block", json!({}))[1]["io-status"] == "ok");
    control.nothing();
    power_off(g);
}

#[test]
fn a_client_stops_a_guest_and_lets_it_go_on() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-stop");
    let disk = s.disk("a.raw", 16 << 20);
    let socket = s.0.join("control");
    let mut g = start("exec", &["--control", text(&socket)], &[format!("path={},format=raw", text(&disk))]);
    let mut control = Control::connect(&socket);
    g.send("(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); echo \"turn $n.\"; done) &\n");
    g.expect("turn 10.");
    control.ask("stop", json!({}));
    control.event("STOP");
    assert_eq!(control.ask("query-status", json!({})), json!({ "running": false, "status": "paused" }));
    control.ask("stop", json!({}));
    control.nothing();
    // Its disk can change meanwhile; a reset does not start it.
    control.ask("block_resize", json!({ "device": "virtio0", "size": 24 << 20 }));
    control.ask("cont", json!({}));
    control.event("RESUME");
    control.ask("cont", json!({}));
    control.nothing();
    g.expect("turn ");
    g.shell("touch /tmp/stop; wait; until [ $(cat /sys/block/vda/size) = 49152 ]; do sleep 0.1; done");
    control.ask("stop", json!({}));
    control.event("STOP");
    control.ask("system_reset", json!({}));
    control.event("RESET");
    assert_eq!(control.ask("query-status", json!({}))["status"], "paused");
    control.ask("cont", json!({}));
    control.event("RESUME");
    g.expect("user space at");
    g.expect(TEST_PROMPT);
    control.nothing();
    g.send("poweroff -f\n");
    assert_eq!(control.event("SHUTDOWN"), json!({ "guest": true, "reason": "guest-shutdown" }));
    assert_eq!(g.wait().code(), Some(0));
}
