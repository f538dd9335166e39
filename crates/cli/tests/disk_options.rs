//! What a guest sees of its disks: options, sizes that change, limits, and machines that are saved.

mod support;

use ringfort_guest::TEST_PROMPT;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use support::control::Control;
use support::*;

/// A guest at its prompt, whose machine's remarks come with what it says. `before` is done by the shell that starts it.
fn start(before: &str, options: &[&str], disks: &[String]) -> Guest {
    let mut c = Command::new("sh");
    c.args(["-c", &format!("{before} exec \"$@\" 2>&1"), "sh", env!("CARGO_BIN_EXE_ringfort")]);
    c.args(test_run_args(options, disks));
    let mut g = Guest::start(c);
    g.expect(TEST_PROMPT);
    g
}

fn power_off(mut g: Guest) {
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
}

fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img (Debian package qemu-utils)");
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "qemu-img {args:?}: {said}");
    said
}

/// Bytes that a file takes on the host.
fn taken(path: &Path) -> u64 {
    std::fs::metadata(path).expect("the file").blocks() * 512
}

#[test]
fn a_guest_sees_what_its_disks_are() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-options");
    let path = |name: &str| s.0.join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path("a.qcow2")), "64M"]);
    for cache in ["writethrough", "unsafe", "directsync"] {
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path(cache)), "4M"]);
    }
    let read = s.file("read.raw", &[0x41; 1 << 20]);
    let thrown = s.file("thrown.raw", &[0x42; 1 << 20]);
    let raw = s.disk("raw", 64 << 20);
    let of = |name: &str| text(&path(name)).to_owned();
    let mut g = start(
        "",
        &["--cpus", "2"],
        &[
            format!("path={},format=qcow2,discard=unmap,queues=2,serial=RF-0001", of("a.qcow2")),
            format!("path={},format=raw,readonly=on", text(&read)),
            format!("path={},format=raw,snapshot=on,cache=none", text(&thrown)),
            format!("path={},format=qcow2,cache=writethrough", of("writethrough")),
            format!("path={},format=qcow2,cache=unsafe", of("unsafe")),
            format!("path={},format=qcow2,cache=directsync,aio=threads,queues=1", of("directsync")),
            format!("path={},discard=unmap,cache=none,aio=io_uring", text(&raw)),
        ],
    );
    // What the driver was told.
    assert_eq!(g.shell("cat /sys/block/vda/serial"), "RF-0001");
    assert_eq!(g.shell("ls /sys/block/vda/mq | wc -l"), "2");
    assert_eq!(g.shell("ls /sys/block/vdf/mq | wc -l"), "1");
    assert_eq!(g.shell("cat /sys/block/vdb/ro /sys/block/vda/ro | tr '\\n' ' '"), "1 0");
    let caches: Vec<String> =
        "adef".chars().map(|d| g.shell(&format!("cat /sys/block/vd{d}/queue/write_cache"))).collect();
    assert_eq!(caches, ["write back", "write through", "write back", "write through"]);
    // Nothing is written to a disk that may not be.
    g.shell("! dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>/dev/null");
    assert_eq!(g.shell("dd if=/dev/vdb bs=4k count=1 2>/dev/null | tr -d A | wc -c"), "0");
    // What is thrown away is there for now.
    g.shell("tr '\\0' C </dev/zero | dd of=/dev/vdc bs=4k count=100 iflag=fullblock conv=fsync 2>/dev/null");
    g.shell("blockdev --flushbufs /dev/vdc");
    assert_eq!(g.shell("dd if=/dev/vdc bs=4k count=101 2>/dev/null | tr -d C | wc -c"), "4096");
    // Both vCPUs at once, through both queues, in every cache mode.
    g.shell("head -c 3000000 /dev/urandom >/tmp/x && md5sum </tmp/x >/tmp/sum");
    for d in "adefg".chars() {
        g.shell(&format!(
            "for i in 0 1; do taskset $((i+1)) dd if=/tmp/x of=/dev/vd{d} bs=1000000 skip=$i seek=$i \
             count=$((2-i+i)) conv=notrunc,fsync 2>/dev/null & done; wait; blockdev --flushbufs /dev/vd{d}; \
             head -c 3000000 /dev/vd{d} | md5sum | cmp - /tmp/sum"
        ));
    }
    // Files that go give their space back (fstrim), and so do ranges (blkdiscard), in qcow2 and raw images.
    for (d, image) in [("vda", path("a.qcow2")), ("vdg", raw.clone())] {
        let mut shell = |c: &str| g.shell(&c.replace('@', d));
        shell("mke2fs -F /dev/@ >/dev/null 2>&1 && mkdir -p /mnt && mount -t ext4 -o nodelalloc /dev/@ /mnt");
        shell("head -c 25165824 /dev/urandom >/mnt/file && sync");
        let full = taken(&image);
        assert!(full > 24 << 20, "{full} bytes of {d}");
        shell("rm /mnt/file && sync && fstrim /mnt && umount /mnt && blockdev --flushbufs /dev/@");
        patient("space given back", || taken(&image) < full - (20 << 20));
        let trimmed = taken(&image);
        shell(
            "tr '\\0' D </dev/zero | dd of=/dev/@ bs=1M seek=40 count=8 iflag=fullblock conv=fsync 2>/dev/null",
        );
        assert!(taken(&image) > trimmed + (7 << 20));
        shell("blkdiscard -o 41943040 -l 8388608 /dev/@ && blockdev --flushbufs /dev/@ && sync");
        shell("dd if=/dev/@ bs=1M skip=40 count=8 2>/dev/null | tr -d '\\0' | wc -c | grep -qx 0");
        // It is given back once the next flush has made the tables durable.
        shell("dd if=/tmp/x of=/dev/@ bs=4k count=1 conv=notrunc,fsync 2>/dev/null");
        shell("dd if=/tmp/x of=/dev/@ bs=4k count=1 conv=notrunc,fsync 2>/dev/null");
        patient("ranges given back", || taken(&image) < trimmed + (1 << 20));
    }
    // A guest cannot choose what its raw image is taken for when nobody has said what it is.
    g.send("printf 'QFI\\373' | dd of=/dev/vdg bs=512 conv=notrunc,sync,fsync; echo rf-'status':$?\n");
    g.expect("rf-status:1");
    power_off(g);
    for image in ["a.qcow2", "writethrough", "unsafe", "directsync"] {
        qemu_img(&["check", "-q", text(&path(image))]);
    }
    assert!(std::fs::read(&read).expect("the file").iter().all(|b| *b == 0x41));
    assert!(std::fs::read(&thrown).expect("the file").iter().all(|b| *b == 0x42));
    assert_ne!(&std::fs::read(&raw).expect("the file")[..4], b"QFI\xfb");
}

#[test]
fn limits_of_speed_hold_a_guest_back() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-limits");
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let guest = ringfort_guest::ensure_fio(&cache, &mut ()).expect("the guest with fio");
    let limits = ["iops=40", "bps=1M", "iops_rd=20,iops_rd_max=200", "iops_wr=20", "iops=30,iops_size=4k"];
    let mut c = ringfort(&["run", "--accel", "soft", "--memory", "1G", "--net", "none", "--cpus", "2"]);
    c.args(["--kernel", text(&guest.kernel), "--initrd", text(&guest.initrd), "--cmdline", &guest.cmdline]);
    for (n, limit) in limits.iter().enumerate() {
        let disk = s.disk(&format!("d{n}"), 16 << 20);
        c.args(["--disk", &format!("path={},format=raw,{limit}", text(&disk))]);
    }
    let mut g = Guest::start(c);
    g.expect(TEST_PROMPT);
    // Milliseconds that fio's requests took, by the guest's clock. Limits hold whatever the depth.
    let mut took = |disk: char, how: &str| -> u64 {
        let out = g.shell(&format!(
            "{} --name=j --filename=/dev/vd{disk} --direct=1 --ioengine=libaio --iodepth=8 --size=16m \
             --output-format=terse --terse-version=3 {how}",
            ringfort_guest::FIO
        ));
        let line = out.lines().find(|l| l.starts_with("3;")).unwrap_or_else(|| panic!("fio says {out:?}"));
        // Run times are the ninth field and, for writes, the fiftieth (fio's HOWTO, "Terse output").
        let fields: Vec<u64> = line.split(';').map(|f| f.parse().unwrap_or(0)).collect();
        fields[8] + fields[49]
    };
    // The first tenth of a second's worth may come at once, as in QEMU.
    for (disk, how, at_least) in [
        ('a', "--rw=randread --bs=512 --number_ios=120", 2500),
        ('a', "--rw=randrw --bs=4k --number_ios=120", 2500),
        ('b', "--rw=write --bs=256k --io_size=4m", 3500),
        ('b', "--rw=randread --bs=4k --io_size=3m", 2500),
        // A burst of 200 a second lasts one second; then 20 a second are left.
        ('c', "--rw=randread --bs=4k --number_ios=240", 1500),
        ('d', "--rw=randwrite --bs=4k --number_ios=60", 2500),
        // One request of 16 KiB counts as four.
        ('e', "--rw=randread --bs=16k --number_ios=24", 2500),
    ] {
        let ms = took(disk, how);
        assert!(ms >= at_least, "disk {disk}, {how}: {ms} ms are less than {at_least}");
    }
    // Reads are none of a write limit's business.
    let ms = took('d', "--rw=randread --bs=4k --number_ios=2000");
    assert!(ms < 50_000, "2000 reads with a limit of 20 writes a second took {ms} ms");
    power_off(g);
}

#[test]
fn disks_of_a_running_guest_get_another_size() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-resize");
    let (raw, fixed, thrown) =
        (s.disk("a.raw", 16 << 20), s.disk("b.raw", 1 << 20), s.disk("c.raw", 1 << 20));
    let (base, image) = (s.file("base.raw", &[0x46; 24 << 20]), s.0.join("a.qcow2"));
    let over = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", text(&base), "-F", "raw"];
    qemu_img(&[&over[..], &[text(&image), "16M"]].concat());
    let socket = s.0.join("control");
    let mut g = start(
        "",
        &["--cpus", "2", "--control", text(&socket)],
        &[
            format!("path={}", text(&image)),
            format!("path={},format=raw,iops=100000", text(&raw)),
            format!("path={},format=raw,readonly=on", text(&fixed)),
            format!("path={},format=raw,snapshot=on", text(&thrown)),
        ],
    );
    let mut control = Control::connect(&socket);
    let disks = control.ask("query-block", json!({}));
    assert_eq!(disks[0]["inserted"]["drv"], "qcow2");
    assert_eq!(disks[1]["inserted"]["image"]["virtual-size"], 16 << 20);
    assert_eq!(disks[2]["inserted"]["ro"], true);
    for (device, size, says) in [
        ("virtio2", 2 << 20, "readonly=on"),
        ("virtio3", 2 << 20, "snapshot=on"),
        ("virtio9", 2 << 20, "there is no disk number 9"),
        ("virtio0", 1_000_001, "multiple of 512"),
        ("virtio0", 0, "multiple of 512"),
        ("virtio0", 1i64 << 62, "cannot be resized"),
    ] {
        let said = control.say("block_resize", json!({ "device": device, "size": size }));
        assert!(said["error"]["desc"].as_str().is_some_and(|d| d.contains(says)), "{device}: {said}");
    }
    // They grow and shrink under load, and what lies below does not come to light.
    g.shell("head -c 4194304 /dev/urandom >/tmp/x && md5sum </tmp/x >/tmp/sum");
    g.send(
        "load() { while [ ! -e /tmp/stop ]; do dd if=/tmp/x of=/dev/$1 bs=64k conv=notrunc,fsync 2>/dev/null || \
         echo load-'failed'; done; }; load vda & load vdb &\n",
    );
    for size in [17u64 << 20, 40 << 20, 20 << 20, 32 << 20] {
        for (n, disk) in ["vda", "vdb"].iter().enumerate() {
            control.ask("block_resize", json!({ "device": format!("virtio{n}"), "size": size }));
            g.shell(&format!("until [ $(cat /sys/block/{disk}/size) = {} ]; do sleep 0.1; done", size / 512));
        }
    }
    g.shell("touch /tmp/stop; wait");
    assert!(!g.said.contains("load-failed"), "{}", g.tail());
    g.shell("blockdev --flushbufs /dev/vda; blockdev --flushbufs /dev/vdb");
    for disk in ["vda", "vdb"] {
        g.shell(&format!("head -c 4194304 /dev/{disk} | md5sum | cmp - /tmp/sum"));
        g.shell(&format!("dd if=/tmp/x of=/dev/{disk} bs=1M seek=28 conv=notrunc,fsync 2>/dev/null"));
        g.shell(&format!("blockdev --flushbufs /dev/{disk}"));
        g.shell(&format!("dd if=/dev/{disk} bs=1M skip=28 2>/dev/null | md5sum | cmp - /tmp/sum"));
    }
    // Behind the old end there are zeroes, although the base has something there.
    assert_eq!(g.shell("dd if=/dev/vda bs=1M skip=16 count=12 2>/dev/null | tr -d '\\0' | wc -c"), "0");
    assert_eq!(g.shell("dd if=/dev/vda bs=1M skip=8 count=8 2>/dev/null | tr -d F | wc -c"), "0");
    // The machine ends on command, and says that it does.
    assert_eq!(control.ask("query-status", json!({}))["status"], "running");
    control.ask("quit", json!({}));
    assert_eq!(g.wait().code(), Some(0));
    assert!(!socket.exists());
    qemu_img(&["check", "-q", text(&image)]);
    let info: Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", text(&image)])).expect("JSON");
    assert_eq!(info["virtual-size"], 32 << 20);
    assert_eq!(std::fs::metadata(&raw).expect("the file").len(), 32 << 20);
}

#[test]
fn a_machine_with_a_qcow2_disk_is_saved_and_restored() {
    let _turn = one_at_a_time();
    let s = Scratch::new("disk-saved");
    let (base, image, state) =
        (s.file("base.raw", &[0x47; 16 << 20]), s.0.join("a.qcow2"), s.0.join("state"));
    let over = ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "-b", text(&base), "-F", "raw"];
    qemu_img(&[&over[..], &[text(&image), "32M"]].concat());
    let disk = format!("path={},format=qcow2,discard=unmap", text(&image));
    let mut g = start("", &["--cpus", "2", "--save", text(&state)], &[disk]);
    g.shell("head -c 4194304 /dev/urandom >/tmp/x && md5sum </tmp/x >/tmp/sum");
    for round in 0..3u64 {
        // Written and flushed; written and not flushed; given back; and a writer at work.
        g.shell(&format!("dd if=/tmp/x of=/dev/vda bs=1M seek={} conv=notrunc,fsync 2>/dev/null", round * 4));
        g.shell("dd if=/tmp/x of=/dev/vda bs=64k seek=384 conv=notrunc 2>/dev/null");
        g.shell("blkdiscard -o 25165824 -l 1048576 /dev/vda");
        g.send(
            "rm -f /tmp/stop; (while [ ! -e /tmp/stop ]; do dd if=/tmp/x of=/dev/vda bs=4k seek=7168 \
                conv=notrunc,fsync 2>/dev/null; done) &\n",
        );
        g.shell("true");
        g.signal("USR1");
        assert_eq!(g.wait().code(), Some(0));
        // Whatever QEMU's tools find now is no worse than leaks.
        let out = Command::new("qemu-img").args(["check", text(&image)]).output().expect("qemu-img");
        assert!(matches!(out.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&out.stdout));
        let mut c = Command::new("sh");
        c.args(["-c", "exec \"$@\" 2>&1", "sh", env!("CARGO_BIN_EXE_ringfort")]);
        c.args(["restore", text(&state), "--accel", "soft"]);
        g = Guest::start(c);
        g.send("\n");
        g.expect(TEST_PROMPT);
        g.shell("touch /tmp/stop; wait; blockdev --flushbufs /dev/vda");
        for at in (0..=round).map(|r| r * 4).chain([28]) {
            g.shell(&format!("dd if=/dev/vda bs=1M skip={at} count=4 2>/dev/null | md5sum | cmp - /tmp/sum"));
        }
        assert_eq!(g.shell("dd if=/dev/vda bs=1M skip=12 count=4 2>/dev/null | tr -d G | wc -c"), "0");
    }
    power_off(g);
    qemu_img(&["check", "-q", text(&image)]);
}
