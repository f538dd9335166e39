//! Disks of real guests when things go wrong: a full host, and ends without warning.
//!
//! `RINGFORT_KILLS=200` makes the tests that end guests at random moments do so 200 times.

mod support;

use ringfort_guest::TEST_PROMPT;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::*;

/// How often guests are ended at random moments.
fn kills() -> u32 {
    std::env::var("RINGFORT_KILLS").ok().map_or(3, |v| v.parse().expect("RINGFORT_KILLS is a number"))
}

fn test_run(disks: &[String]) -> Guest {
    let args = test_run_args(&[], disks);
    Guest::start(ringfort(&args.iter().map(String::as_str).collect::<Vec<_>>()))
}

fn qemu_img(args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img (Debian package qemu-utils)");
    let said = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&said).into_owned())
}

fn make(args: &[&str]) {
    let (status, said) = qemu_img(args);
    assert_eq!(status, Some(0), "qemu-img {args:?}: {said}");
}

/// qemu-img's check of an image that was left behind: leaks at worst, which `ringfort img check` mends.
fn check_and_mend(image: &Path) {
    let (status, said) = qemu_img(&["check", text(image)]);
    // 3: leaks and nothing worse (qemu-img(1)).
    assert!(matches!(status, Some(0 | 3)), "{said}");
    if status == Some(3) {
        let done = ringfort(&["img", "check", "-q", "-r", "leaks", text(image)]).status().expect("ringfort");
        assert!(done.success());
        let (status, said) = qemu_img(&["check", text(image)]);
        assert_eq!(status, Some(0), "{said}");
    }
}

#[test]
fn a_full_host_makes_the_guest_stand_until_there_is_space() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("full");
    if !Command::new("unshare").args(["-rm", "true"]).status().is_ok_and(|s| s.success()) {
        eprintln!("skipped: no mount namespace of one's own is to be had here (unshare -rm)");
        return;
    }
    let dir = text(&scratch.0).to_owned();
    let disks = [
        format!("path={dir}/stands.img,format=raw"),
        format!("path={dir}/reports.qcow2,format=qcow2,werror=report"),
    ];
    // A file system of 40 MiB of which 32 are taken, seen by nobody else; it goes away with the guest.
    let script = format!(
        "mount -t tmpfs -o size=40m none {dir} && cd {dir} && truncate -s 64M stands.img &&
         qemu-img create -q -f qcow2 reports.qcow2 64M && head -c 32M /dev/zero >ballast && exec \"$@\" 2>&1"
    );
    let mut command = Command::new("unshare");
    command
        .args(["-rm", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_ringfort")])
        .args(test_run_args(&[], &disks));
    let mut g = Guest::start(command);
    g.expect(TEST_PROMPT);
    g.shell("head -c 16777216 /dev/urandom >/tmp/data");
    // One disk tells the guest of the error.
    g.send("dd if=/tmp/data of=/dev/vdb bs=1M conv=fsync; echo rf-'failed':$?\n");
    g.expect_each(&["No space left on device (os error 28); the guest was told so", "rf-failed:1"]);
    // The other makes it stand.
    g.send("dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null; echo $? >/tmp/status\n");
    g.expect("the guest stands until there is space");
    let inside = PathBuf::from(format!("/proc/{}/root{dir}", g.pid()));
    std::fs::remove_file(inside.join("ballast")).expect("the ballast");
    g.expect("the guest goes on");
    assert_eq!(g.shell("until [ -s /tmp/status ]; do sleep 0.1; done; cat /tmp/status"), "0");
    let sum = g.shell("md5sum </tmp/data");
    g.shell("blockdev --flushbufs /dev/vda");
    assert_eq!(g.shell("dd if=/dev/vda bs=1M count=16 2>/dev/null | md5sum"), sum);
    // A disk with an error behind it goes on as well.
    g.shell("dd if=/tmp/data of=/dev/vdb bs=64k count=16 conv=fsync 2>/dev/null");
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
}

/// Bytes of one write of the writers below.
const WRITE: usize = 64 << 10;
/// Places that each writer writes to.
const PLACES: usize = 24;
const WRITERS: usize = 3;

/// Writers that stamp their places with the number of the write, and say the number once it is flushed. Each write is one
/// system call from a file: of a pipe, which gives less at a time, the guest's kernel may write a sector out half way.
const WRITER: &str = "w() { n=$1; i=$2; while :; do i=$((i+1)); k=$(((i*7)%24)); \
    yes $(printf 'w%d-%010dxx' $n $i) | head -c 65536 >/tmp/b$n; \
    dd if=/tmp/b$n of=/dev/vda bs=64k seek=$((n*24+k)) conv=notrunc,fsync 2>/dev/null && echo \"ack $n $k $i.\"; done; }";

/// What was acknowledged for each place.
type Acks = Vec<[u64; PLACES]>;

/// The numbers that a sector of a place is stamped with.
fn stamp(sector: &[u8], writer: usize) -> Option<u64> {
    if sector.iter().all(|b| *b == 0) {
        return Some(0);
    }
    let line = &sector[..16];
    let head = format!("w{writer}-");
    let number = line.strip_prefix(head.as_bytes())?.strip_suffix(b"xx\n")?;
    // The same line throughout, or the sector is torn.
    sector.chunks(16).all(|c| c == line).then(|| std::str::from_utf8(number).ok()?.parse().ok())?
}

/// Every sector is as its last acknowledged write left it, or as a later one that was under way.
fn check_stamps(disk: &[u8], acks: &Acks) {
    for (writer, places) in acks.iter().enumerate() {
        for (place, acked) in places.iter().enumerate() {
            let at = (writer * PLACES + place) * WRITE;
            for (n, sector) in disk[at..at + WRITE].chunks(512).enumerate() {
                let found = stamp(sector, writer);
                assert!(
                    found.is_some_and(|f| f >= *acked),
                    "writer {writer}, place {place}, sector {n}: {found:?} is there, {acked} was acknowledged"
                );
            }
        }
    }
}

#[test]
fn what_was_flushed_outlives_the_end_of_the_process_at_any_moment() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("kills");
    let base = scratch.disk("base.img", 8 << 20);
    let image = scratch.0.join("top.qcow2");
    make(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&image), "8M"]);
    let mut rng = fastrand::Rng::new();
    let seed = rng.get_seed();
    let mut acks: Acks = vec![[0; PLACES]; WRITERS];
    let mut begin = 0u64;
    for round in 0..kills() {
        let cache =
            ["writeback", "none,aio=io_uring", "none,aio=threads", "writethrough"][round as usize % 4];
        let mut g = test_run(&[format!("path={},format=qcow2,cache={cache}", text(&image))]);
        g.expect(TEST_PROMPT);
        g.send(&format!("{WRITER}\n"));
        let starts: Vec<String> = (0..WRITERS).map(|n| format!("w {n} {begin} &")).collect();
        g.send(&format!("{}\n", starts.join(" ")));
        for _ in 0..rng.u32(5..40) {
            g.expect("ack ");
        }
        g.signal("KILL");
        let said = g.wait_said();
        for line in said.split("ack ").skip(1) {
            let Some((numbers, _)) = line.split_once('.') else { continue };
            let n: Vec<u64> = numbers.split(' ').filter_map(|w| w.parse().ok()).collect();
            if let [writer, place, i] = n[..] {
                let last = &mut acks[writer as usize][place as usize];
                *last = i.max(*last);
            }
        }
        assert!(acks.iter().flatten().any(|a| *a > begin), "nothing was acknowledged in round {round}");
        check_and_mend(&image);
        let raw = scratch.0.join("now.raw");
        make(&["convert", "-O", "raw", text(&image), text(&raw)]);
        check_stamps(&std::fs::read(&raw).expect("the disk"), &acks);
        // Later numbers are higher than any that may be under way.
        begin = acks.iter().flatten().max().copied().unwrap_or(0) + 1000;
        eprintln!("round {round} (seed {seed:#x}, cache={cache}): up to {}", begin - 1000);
    }
}

/// fio in the guest; gives what it says, and panics if it does not end well.
fn fio(g: &mut Guest, args: &str) -> String {
    g.shell(&format!(
        "{} --name=j --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --bs=4k --size=4m \
         --verify=crc32c --verify_fatal=1 {args}",
        ringfort_guest::FIO
    ))
}

#[test]
fn fio_verifies_what_guests_left_behind_that_ended_under_it() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("fio");
    let cache = ringfort_guest::cache_dir().expect("a cache folder");
    let guest = ringfort_guest::ensure_fio(&cache, &mut ()).expect("the guest with fio");
    let base = scratch.disk("base.img", 8 << 20);
    let image = scratch.0.join("top.qcow2");
    make(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&image), "8M"]);
    let start = |options: &str| {
        let disk = format!("path={},format=qcow2,{options}", text(&image));
        let mut g = Guest::run(&run_args(
            "soft",
            &guest.kernel,
            &guest.initrd,
            &format!("{} quiet", guest.cmdline),
            &["--memory", "1G", "--net", "none", "--disk", &disk],
        ));
        g.expect(TEST_PROMPT);
        g
    };
    let mut rng = fastrand::Rng::new();
    // Every block is fio's from the start, so that every block can be verified ever after.
    let mut g = start("cache=writeback");
    fio(&mut g, "--rw=write --do_verify=0 --end_fsync=1");
    let rounds = kills().div_ceil(2);
    for round in 0..rounds {
        g.send(&format!(
            "{} --name=w --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --bs=4k --size=4m \
             --rw=randwrite --verify=crc32c --do_verify=0 --fsync=32 --loops=100000 --eta=always \
             --eta-newline=250ms --randseed={}\n",
            ringfort_guest::FIO,
            rng.u32(..)
        ));
        // Its progress comes four times a second.
        for _ in 0..rng.u32(2..8) {
            g.expect("Jobs: 1");
        }
        g.signal("KILL");
        g.wait_said();
        check_and_mend(&image);
        g = start(
            ["cache=none,aio=io_uring", "cache=none,aio=threads", "cache=writeback"][round as usize % 3],
        );
        fio(&mut g, "--rw=read");
    }
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    assert_eq!(qemu_img(&["check", text(&image)]).0, Some(0));
}

/// Debian packages with many files, in a tar archive: what dpkg unpacks one file at a time with care.
fn packages(scratch: &Scratch, count: u32) -> PathBuf {
    let root = scratch.0.join("packages");
    for n in 0..count {
        let package = root.join(format!("p{n:02}"));
        std::fs::create_dir_all(package.join("DEBIAN")).expect("a folder");
        let data = package.join(format!("usr/share/p{n:02}"));
        std::fs::create_dir_all(&data).expect("a folder");
        let control = format!(
            "Package: rf-p{n:02}\nVersion: 1\nArchitecture: all\nMaintainer: none <none@example.invalid>\n\
             Description: files to install\n"
        );
        std::fs::write(package.join("DEBIAN/control"), control).expect("a file");
        for f in 0..60 {
            let line = format!("package {n} file {f}\n");
            std::fs::write(data.join(format!("f{f:03}")), line.repeat(20 + f * 13)).expect("a file");
        }
        let built = Command::new("dpkg-deb")
            .args(["-Znone", "--root-owner-group", "--build", text(&package), text(&root)])
            .output()
            .expect("dpkg-deb (Debian package dpkg)");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    }
    let tar = scratch.0.join("packages.tar");
    let done = Command::new("sh")
        .args([
            "-c",
            "cd \"$1\" && tar -cf \"$2\" *.deb && truncate -s %4096 \"$2\"",
            "sh",
            text(&root),
            text(&tar),
        ])
        .status()
        .expect("tar");
    assert!(done.success());
    tar
}

fn e2fsck(image: &Path, how: &str) -> (Option<i32>, String) {
    let out =
        Command::new("e2fsck").args(["-f", how, text(image)]).output().expect("e2fsck (package e2fsprogs)");
    (out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

#[test]
fn a_debian_guest_that_ends_while_dpkg_works_recovers() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("dpkg");
    let guest = debian_guest();
    let tar = packages(&scratch, 12);
    let image = scratch.0.join("root.qcow2");
    make(&["create", "-q", "-f", "qcow2", "-b", text(&guest.disk), "-F", "raw", text(&image)]);
    let cmdline = format!("{} init=/bin/sh", guest.cmdline);
    let start = || {
        let mut g = Guest::run(&run_args(
            "soft",
            &guest.kernel,
            &guest.initrd,
            &cmdline,
            &[
                "--memory",
                "512M",
                "--net",
                "none",
                "--disk",
                &format!("path={},format=qcow2,discard=unmap", text(&image)),
                "--disk",
                &format!("path={},format=raw,readonly=on", text(&tar)),
            ],
        ));
        g.expect("# ");
        g.send("export PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb DEBIAN_FRONTEND=noninteractive PS1='debian# '\n");
        g.expect("\ndebian# ");
        g
    };
    let mut g = start();
    g.shell("mkdir -p /root/debs && tar -xf /dev/vdb -C /root/debs && sync");
    g.send("dpkg -i /root/debs/*.deb\n");
    g.expect("Unpacking rf-p06");
    g.signal("KILL");
    g.wait_said();
    check_and_mend(&image);
    // As it is now: the journal brings it into order, and nothing else is to be mended.
    let raw = scratch.0.join("now.raw");
    make(&["convert", "-O", "raw", text(&image), text(&raw)]);
    let (status, said) = e2fsck(&raw, "-p");
    assert!(matches!(status, Some(0 | 1)), "{status:?}: {said}");
    let (status, said) = e2fsck(&raw, "-n");
    assert_eq!(status, Some(0), "{said}");
    // The guest recovers it by itself, and finishes what was begun.
    let mut g = start();
    g.shell("dpkg --configure -a && dpkg -i /root/debs/*.deb");
    assert_eq!(g.shell("dpkg --audit"), "");
    assert_eq!(g.shell("dpkg --verify rf-p00 rf-p06 rf-p11"), "");
    assert_eq!(
        g.shell("cat /usr/share/p11/* | wc -l"),
        (0..60).map(|f| 20 + f * 13).sum::<u32>().to_string()
    );
    g.shell("mount -o remount,ro / || (sync; echo u >/proc/sysrq-trigger; sleep 1)");
    g.signal("TERM");
    assert_eq!(g.wait().code(), Some(0));
    let (status, said) = qemu_img(&["check", text(&image)]);
    assert_eq!(status, Some(0), "{said}");
    make(&["convert", "-O", "raw", text(&image), text(&raw)]);
    let (status, said) = e2fsck(&raw, "-n");
    assert_eq!(status, Some(0), "{said}");
}

#[test]
fn running_guests_and_qemu_img_refuse_each_others_images() {
    let _turn = one_at_a_time();
    let scratch = Scratch::new("locks");
    let base = scratch.disk("base.img", 8 << 20);
    let image = scratch.0.join("top.qcow2");
    make(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&image)]);
    let mut g = test_run(&[format!("path={}", text(&image))]);
    g.expect(TEST_PROMPT);
    for args in [
        &["info", text(&image)][..],
        &["resize", text(&image), "16M"],
        &["check", text(&image)],
        &["commit", text(&image)],
        // The base is only read, and may not be written.
        &["resize", "-f", "raw", text(&base), "16M"],
    ] {
        let (status, said) = qemu_img(args);
        assert!(status == Some(1) && said.contains("lock"), "{args:?}: {said}");
    }
    assert_eq!(qemu_img(&["info", "-U", text(&image)]).0, Some(0));
    assert_eq!(qemu_img(&["info", text(&base)]).0, Some(0));
    let refused = ringfort(&["img", "resize", text(&image), "16M"]).output().expect("ringfort");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by another process"));
    g.send("poweroff -f\n");
    assert_eq!(g.wait().code(), Some(0));
    make(&["check", "-q", text(&image)]);
    // The other way round: qemu-img at work keeps a guest out.
    let bench = || {
        let mut c = Command::new("qemu-img");
        c.args(["bench", "-q", "-w", "-c", "100000000", "-f", "qcow2", text(&image)]);
        Child(c.spawn().expect("qemu-img"))
    };
    let mut busy = bench();
    let refused = || {
        let out = ringfort(&["img", "info", text(&image)]).output().expect("ringfort");
        String::from_utf8_lossy(&out.stderr).contains("in use by another process")
    };
    while !refused() {
        // It gives up when it comes just as we look.
        if busy.0.try_wait().expect("its status").is_some() {
            busy = bench();
        }
    }
    let args = test_run_args(&[], &[format!("path={}", text(&image))]);
    let out = ringfort(&args.iter().map(String::as_str).collect::<Vec<_>>()).output().expect("ringfort");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && said.contains("in use by another process"), "{said}");
    drop(busy);
}
