//! The verbs that change images, beside qemu-img.

mod common;

use common::{Dir, io, json, mixed, ok, ours, theirs};

/// Both tools find the image sound, and it holds what the raw file `want` holds.
fn sound(path: &str, want: &str) {
    ok(theirs(&["check", path]));
    let said = ours(&["check", path]);
    assert_eq!(said.0, 0, "{}", said.1);
    ok(theirs(&["compare", "-f", "qcow2", "-F", "raw", path, want]));
}

fn flat(path: &str, to: &str) {
    ok(theirs(&["convert", "-O", "raw", path, to]));
}

fn commands(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

/// A chain of three: base, mid, top.
fn chain(d: &Dir, options: &str) -> [String; 3] {
    let (raw, base, mid, top) = (d.path("a.raw"), d.path("base"), d.path("mid"), d.path("top"));
    std::fs::write(&raw, mixed((6 << 20) + 1536, 11)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &base]));
    ok(ours(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "qcow2", &mid, "9M"]));
    io(
        "qcow2",
        &mid,
        &commands(&["write -P 7 1M 1M", "write -z 3M 1M", "discard 5M 64k", "write -P 8 8M 512"]),
    );
    ok(ours(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "mid", "-F", "qcow2", &top, "10M"]));
    io("qcow2", &top, &commands(&["write -P 9 1500k 200k", "write -z 5500k 700k", "write -P 3 9M 1000"]));
    [base, mid, top]
}

#[test]
fn commit_moves_what_the_overlay_holds() {
    for options in ["cluster_size=64k", "extended_l2=on,cluster_size=32k", "compat=0.10,cluster_size=4k"] {
        let d = Dir::new("commit");
        let [base, mid, top] = chain(&d, options);
        let want = d.path("want");
        flat(&top, &want);
        assert_eq!(ok(ours(&["commit", &top])), "Image committed.\n");
        sound(&mid, &want);
        sound(&top, &want);
        let info = json(&ok(theirs(&["map", "--output=json", &top])));
        assert!(info.as_array().is_some_and(|l| l.iter().all(|p| p["depth"] != 0)), "emptied: {info}");
        // Further down, and the top stays as it is.
        io("qcow2", &top, &commands(&["write -P 10 2M 200k"]));
        flat(&top, &want);
        let progress = ok(ours(&["commit", "-q", "-b", &base, &top]));
        assert_eq!(progress, "");
        sound(&base, &want);
        sound(&top, &want);
        // No further than it goes.
        let said = ours(&["commit", &base]);
        assert!(said.0 == 1 && said.2.contains("does not have a backing file"), "{}", said.2);
        assert_eq!(ours(&["commit", "-b", "nowhere", &top]).0, 1);
    }
}

#[test]
fn commit_into_a_raw_base_and_without_emptying() {
    let d = Dir::new("commit-raw");
    let (base, top, want) = (d.path("base.raw"), d.path("top"), d.path("want"));
    std::fs::write(&base, mixed(3 << 20, 12)).expect("a file");
    ok(ours(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top, "4M"]));
    io("qcow2", &top, &commands(&["write -P 9 1500k 200k", "write -z 2M 100k", "write -P 4 3500k 8k"]));
    flat(&top, &want);
    ok(ours(&["commit", "-d", "-p", &top]));
    assert!(std::fs::read(&base).expect("the base") == std::fs::read(&want).expect("the copy"));
    sound(&top, &want);
}

#[test]
fn rebase_keeps_the_content() {
    for options in ["cluster_size=64k", "cluster_size=2M", "extended_l2=on", "compat=0.10,cluster_size=512"] {
        let d = Dir::new("rebase");
        let [base, mid, top] = chain(&d, options);
        let (want, other, raw) = (d.path("want"), d.path("other"), d.path("other.raw"));
        flat(&top, &want);
        // A base that is larger and holds something everywhere, and one that is shorter.
        std::fs::write(&raw, vec![0xee; 12 << 20]).expect("a file");
        ok(ours(&["rebase", "-b", "other.raw", "-F", "raw", &top]));
        sound(&top, &want);
        ok(ours(&["create", "-q", "-f", "qcow2", &other, "1M"]));
        ok(ours(&["rebase", "-p", "-b", &other, "-F", "qcow2", &top]));
        sound(&top, &want);
        ok(ours(&["rebase", "-b", "", &top]));
        sound(&top, &want);
        assert!(!ok(theirs(&["info", &top])).contains("backing"));
        // Within its own chain: only what mid held is taken over.
        flat(&mid, &want);
        ok(ours(&["rebase", "-b", "base", "-F", "qcow2", &mid]));
        sound(&mid, &want);
        // The name only.
        ok(ours(&["rebase", "-u", "-b", "gone", "-F", "raw", &mid]));
        let info = json(&ok(theirs(&["info", "--output=json", &mid])));
        assert_eq!(
            (info["backing-filename"].as_str(), info["backing-filename-format"].as_str()),
            (Some("gone"), Some("raw"))
        );
        ok(ours(&["rebase", "-u", "-b", &base, "-F", "qcow2", &mid]));
        sound(&mid, &want);
    }
}

#[test]
fn loops_and_missing_files_are_refused() {
    let d = Dir::new("loops");
    let [base, mid, top] = chain(&d, "cluster_size=64k");
    for b in [&base, &mid, &top] {
        let said = ours(&["rebase", "-b", &top, "-F", "qcow2", b]);
        assert!(said.0 == 1 && said.2.contains("infinite loop"), "{}", said.2);
    }
    ok(ours(&["rebase", "-u", "-b", &top, "-F", "qcow2", &base]));
    for args in [
        vec!["convert", "-O", "raw", &top, "x"],
        vec!["info", "--backing-chain", &top],
        vec!["commit", "-b", "nowhere", &top],
        vec!["map", &top],
        vec!["measure", "-O", "qcow2", &top],
    ] {
        let said = ours(&args);
        assert!(
            said.0 == 1 && (said.2.contains("itself") || said.2.contains("loop")),
            "{args:?}: {}",
            said.2
        );
    }
    ok(ours(&["rebase", "-u", "-b", "missing", "-F", "qcow2", &base]));
    let said = ours(&["convert", "-O", "raw", &top, &d.path("x")]);
    assert!(said.0 == 1 && said.2.contains("missing") && said.2.contains(&base), "{}", said.2);
    assert!(!std::path::Path::new(&d.path("x")).exists());
}

#[test]
fn measure_says_what_qemu_img_says() {
    let d = Dir::new("measure");
    let (raw, q) = (d.path("a.raw"), d.path("a.qcow2"));
    std::fs::write(&raw, mixed((5 << 20) + 512, 13)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", &raw, &q]));
    ok(theirs(&["bitmap", "--add", &q, "b"]));
    ok(theirs(&["snapshot", "-c", "s", &q]));
    io("qcow2", &q, &commands(&["discard 0 1M"]));
    for args in [
        vec!["-O", "qcow2", &q],
        vec!["-O", "qcow2", "-l", "s", &q],
        vec!["-O", "raw", &q],
        vec!["-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", &raw],
        vec!["-O", "qcow2", "-o", "preallocation=full", &q],
        vec!["-O", "qcow2", "--size", "123G"],
        vec!["-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=1", "--size", "7T"],
        vec!["-O", "qcow2", "-o", "extended_l2=on", "--size", "100M"],
        vec!["-O", "raw", "--size", "1000001"],
    ] {
        let with = |more: &[&str]| {
            let mut all = vec!["measure".to_owned()];
            all.extend(more.iter().chain(&args).map(|s| (*s).to_owned()));
            all
        };
        let call = |run: fn(&[&str]) -> common::Said, args: &[String]| {
            ok(run(&args.iter().map(String::as_str).collect::<Vec<_>>()))
        };
        let plain = with(&[]);
        assert_eq!(call(ours, &plain), call(theirs, &plain), "{args:?}");
        let form = with(&["--output=json"]);
        assert_eq!(json(&call(ours, &form)), json(&call(theirs, &form)), "{args:?}");
    }
}

#[test]
fn dd_copies_what_qemu_img_copies() {
    let d = Dir::new("dd");
    let (raw, a, b) = (d.path("a.raw"), d.path("ours"), d.path("theirs"));
    std::fs::write(&raw, mixed((3 << 20) + 512, 14)).expect("a file");
    for operands in [
        vec![],
        vec!["bs=1M", "count=2"],
        vec!["bs=512", "count=77", "skip=3"],
        vec!["bs=700", "count=3", "skip=1"],
        vec!["bs=64k", "skip=40"],
        vec!["count=2", "skip=5"],
    ] {
        for format in ["raw", "qcow2"] {
            let (i, o, t) = (format!("if={raw}"), format!("of={a}"), format!("of={b}"));
            let head = ["dd", "-f", "raw", "-O", format];
            ok(ours(&[&head[..], &operands, &[&i, &o]].concat()));
            ok(theirs(&[&head[..], &operands, &[&i, &t]].concat()));
            ok(theirs(&["compare", "-f", format, "-F", format, &a, &b]));
            let size = |path: &str| {
                json(&ok(theirs(&["info", "-f", format, "--output=json", path])))["virtual-size"].clone()
            };
            assert_eq!(size(&a), size(&b), "{operands:?}");
        }
    }
    assert_eq!(ours(&["dd", "if=x"]).0, 1);
    assert_eq!(ours(&["dd", "bs=0", "if=x", "of=y"]).0, 1);
}

#[test]
fn amend_changes_an_image_and_keeps_its_content() {
    let d = Dir::new("amend");
    let (raw, q) = (d.path("a.raw"), d.path("a.qcow2"));
    std::fs::write(&raw, mixed(4 << 20, 15)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", &raw, &q]));
    io("qcow2", &q, &commands(&["write -z 1M 1M", "write -z 100k 2k"]));
    flat(&q, &raw);
    for bits in ["1", "4", "64", "32", "8", "16"] {
        ok(ours(&["amend", "-o", &format!("refcount_bits={bits}"), &q]));
        sound(&q, &raw);
        let info = json(&ok(theirs(&["info", "--output=json", &q])));
        assert_eq!(info["format-specific"]["data"]["refcount-bits"].to_string(), bits);
    }
    ok(ours(&["snapshot", "-c", "s", &q]));
    let said = ours(&["amend", "-o", "refcount_bits=1", &q]);
    assert!(said.0 == 1 && said.2.contains("more than a refcount of 1 bits"), "{}", said.2);
    sound(&q, &raw);
    let said = ours(&["amend", "-o", "compat=0.10", &q]);
    assert!(said.0 == 1 && said.2.contains("delete it first"), "{}", said.2);
    ok(ours(&["snapshot", "-d", "s", &q]));
    ok(ours(&["amend", "-p", "-o", "compat=0.10", &q]));
    sound(&q, &raw);
    assert_eq!(
        json(&ok(theirs(&["info", "--output=json", &q])))["format-specific"]["data"]["compat"],
        "0.10"
    );
    ok(ours(&["amend", "-o", "compat=1.1,lazy_refcounts=on,size=5M", &q]));
    sound(&q, &raw);
    let info = json(&ok(theirs(&["info", "--output=json", &q])));
    assert_eq!(
        (info["format-specific"]["data"]["lazy-refcounts"].as_bool(), &info["virtual-size"]),
        (Some(true), &(5 << 20).into())
    );
    for options in
        ["cluster_size=4k", "backing_file=x", "bogus=1", "data_file=x", "refcount_bits=3", "compat=7"]
    {
        assert_eq!(ours(&["amend", "-o", options, &q]).0, 1, "{options}");
        assert_eq!(theirs(&["amend", "-f", "qcow2", "-o", options, &q]).0, 1, "{options}");
    }
    // An image in which clusters of a backing file are hidden by zeroes.
    let top = d.path("top");
    ok(ours(&["create", "-q", "-f", "qcow2", "-b", &q, "-F", "qcow2", &top]));
    io("qcow2", &top, &commands(&["write -z 0 1M", "write -P 1 3M 10k"]));
    flat(&top, &raw);
    ok(ours(&["amend", "-o", "compat=0.10", &top]));
    sound(&top, &raw);
}

/// Names, granularities and flags of an image's bitmaps.
fn bitmaps(path: &str, run: fn(&[&str]) -> common::Said) -> serde_json::Value {
    json(&ok(run(&["info", "--output=json", path])))["format-specific"]["data"]["bitmaps"].clone()
}

/// The pieces of the disk that a bitmap says changed, told by QEMU itself: an NBD server shows them to a client.
fn dirty(d: &Dir, path: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = d.path("nbd.sock");
    let mut server = std::process::Command::new(common::qemu("qemu-nbd"))
        .args(["-r", "-f", "qcow2", "-k", &socket, "-B", bitmap, path])
        .spawn()
        .expect("qemu-nbd (Debian package qemu-utils) is installed");
    while !std::path::Path::new(&socket).exists() {
        assert!(server.try_wait().expect("a server").is_none(), "qemu-nbd takes {path}");
        std::thread::yield_now();
    }
    let options =
        format!("driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}");
    let map = json(&ok(theirs(&["map", "--output=json", "--image-opts", &options])));
    let _ = server.wait();
    let _ = std::fs::remove_file(&socket);
    map.as_array()
        .expect("a list")
        .iter()
        .filter(|p| p["data"] == false)
        .map(|p| (p["start"].as_u64().expect("a number"), p["length"].as_u64().expect("a number")))
        .collect()
}

#[test]
fn bitmaps_record_what_changes() {
    let d = Dir::new("bitmaps");
    let (raw, q) = (d.path("a.raw"), d.path("a.qcow2"));
    std::fs::write(&raw, mixed(4 << 20, 16)).expect("a file");
    ok(ours(&["create", "-q", "-f", "qcow2", &q, "8M"]));
    ok(ours(&["bitmap", "--add", &q, "all"]));
    ok(ours(&["bitmap", "--add", "--disable", "-g", "4k", &q, "fine"]));
    ok(theirs(&["bitmap", "--add", "-g", "1M", &q, "theirs"]));
    ok(theirs(&["check", &q]));
    assert_eq!(bitmaps(&q, ours), bitmaps(&q, theirs));
    assert_eq!(ours(&["bitmap", "--add", &q, "all"]).0, 1);
    // Writes of ours are recorded in the enabled ones, by either tool's.
    let small = d.path("small");
    std::fs::write(&small, vec![1; 1 << 20]).expect("a file");
    ok(ours(&["convert", "-n", "-f", "raw", "-O", "qcow2", &small, &q]));
    ok(theirs(&["check", &q]));
    assert_eq!(bitmaps(&q, ours), bitmaps(&q, theirs));
    assert_eq!(dirty(&d, &q, "all"), [(0, 1 << 20)]);
    assert_eq!(dirty(&d, &q, "fine"), []);
    io("qcow2", &q, &commands(&["write -P 3 3M 64k"]));
    assert_eq!(dirty(&d, &q, "all"), [(0, 1 << 20), (3 << 20, 64 << 10)]);
    ok(ours(&["bitmap", "--merge", "all", &q, "fine"]));
    assert_eq!(dirty(&d, &q, "fine"), [(0, 1 << 20), (3 << 20, 64 << 10)]);
    assert_eq!(dirty(&d, &q, "theirs"), [(0, 1 << 20), (3 << 20, 1 << 20)]);
    // They go along with the disk's size, and into a copy.
    ok(ours(&["resize", &q, "+1M"]));
    ok(theirs(&["check", &q]));
    assert_eq!(dirty(&d, &q, "theirs"), [(0, 1 << 20), (3 << 20, 1 << 20)]);
    ok(ours(&["resize", "--shrink", &q, "3100k"]));
    assert_eq!(dirty(&d, &q, "fine"), [(0, 1 << 20), (3 << 20, 28 << 10)]);
    let copy = d.path("copy");
    ok(ours(&["convert", "--bitmaps", "-O", "qcow2", &q, &copy]));
    ok(theirs(&["check", &copy]));
    assert_eq!(bitmaps(&copy, theirs), bitmaps(&q, theirs));
    assert_eq!(dirty(&d, &copy, "fine"), dirty(&d, &q, "fine"));
    ok(ours(&["bitmap", "--clear", "--enable", &q, "fine"]));
    assert_eq!(dirty(&d, &q, "fine"), []);
    ok(ours(&["bitmap", "--merge", "theirs", "-b", &copy, "-F", "qcow2", &q, "fine"]));
    for name in ["all", "fine", "theirs"] {
        ok(ours(&["bitmap", "--remove", &q, name]));
        ok(theirs(&["check", &q]));
    }
    assert!(bitmaps(&q, theirs).is_null());
    let said = ours(&["bitmap", "--remove", &q, "all"]);
    assert!(said.0 == 1 && said.2.contains("not found"), "{}", said.2);
}

#[test]
fn new_images_get_their_place_at_once() {
    let d = Dir::new("preallocation");
    let raw = d.path("want");
    for how in ["off", "metadata", "falloc", "full"] {
        for more in
            ["", ",extended_l2=on", ",cluster_size=4k", ",data_file=data", ",data_file=data,data_file_raw=on"]
        {
            let (a, b) = (d.path("a"), d.path("b"));
            let options = format!("preallocation={how}{more}");
            ok(ours(&["create", "-q", "-f", "qcow2", "-o", &options, &a, "5M"]));
            ok(theirs(&["create", "-q", "-f", "qcow2", "-o", &options.replace("/data", "/their"), &b, "5M"]));
            std::fs::File::create(&raw).and_then(|f| f.set_len(5 << 20)).expect("a file");
            sound(&a, &raw);
            if how != "off" {
                // Neither is much larger than the other, and the space is there or not.
                let (x, y) = (std::fs::metadata(&a).expect("ours"), std::fs::metadata(&b).expect("theirs"));
                assert_eq!(x.len(), y.len(), "{options}");
                use std::os::unix::fs::MetadataExt;
                assert_eq!(x.blocks() > 8192, y.blocks() > 8192, "{options}");
            }
            io("qcow2", &a, &commands(&["write -P 5 100k 300k", "write -z 1M 70k"]));
            flat(&a, &raw);
            ok(ours(&["resize", "-q", &format!("--preallocation={how}"), &a, "9M"]));
            std::fs::OpenOptions::new()
                .write(true)
                .open(&raw)
                .and_then(|f| f.set_len(9 << 20))
                .expect("a file");
            sound(&a, &raw);
        }
    }
    for (how, blocks) in [("off", 0), ("falloc", 10240), ("full", 10240)] {
        use std::os::unix::fs::MetadataExt;
        let a = d.path("raw");
        ok(ours(&["create", "-q", "-f", "raw", "-o", &format!("preallocation={how}"), &a, "5M"]));
        assert_eq!(std::fs::metadata(&a).expect("ours").blocks(), blocks, "{how}");
        ok(ours(&["resize", "-q", "-f", "raw", &format!("--preallocation={how}"), &a, "6M"]));
        assert_eq!(std::fs::metadata(&a).expect("ours").blocks(), blocks / 5 * 6, "{how}");
    }
    let top = d.path("top");
    ok(ours(&["create", "-q", "-f", "raw", &raw, "5M"]));
    let over = ["create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw"];
    let said = ours(&[&over[..], &["-o", "preallocation=metadata", &top]].concat());
    assert!(said.0 == 1 && said.2.contains("extended_l2"), "{}", said.2);
    std::fs::write(&raw, mixed(5 << 20, 17)).expect("a file");
    ok(ours(&[&over[..], &["-o", "preallocation=metadata,extended_l2=on", &top]].concat()));
    sound(&top, &raw);
}

#[test]
fn convert_takes_snapshots_rows_and_backing_files() {
    let d = Dir::new("convert-more");
    let (raw, a, b, out) = (d.path("src.raw"), d.path("a"), d.path("b"), d.path("out"));
    let data = mixed((4 << 20) + 1536, 18);
    std::fs::write(&raw, &data).expect("a file");
    // Several sources stand one behind the other.
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", &raw, &raw, &raw, &a]));
    ok(theirs(&["convert", "-f", "raw", "-O", "raw", &raw, &raw, &raw, &out]));
    sound(&a, &out);
    // A snapshot, by name and by number.
    ok(ours(&["snapshot", "-c", "s1", &a]));
    io("qcow2", &a, &commands(&["write -P 9 0 3M", "discard 5M 1M"]));
    for key in ["s1", "snapshot.id=1", "snapshot.name=s1"] {
        ok(ours(&["convert", "-l", key, "-c", "-O", "qcow2", &a, &b]));
        sound(&b, &out);
    }
    assert_eq!(ours(&["convert", "-l", "none", "-O", "raw", &a, &b]).0, 1);
    // What the backing file of the copy holds is not copied.
    let [base, mid, top] = chain(&d, "cluster_size=64k");
    flat(&top, &out);
    for more in
        [&[][..], &["-c"], &["-S", "0"], &["-c", "-o", "compression_type=zstd"], &["-o", "cluster_size=2M"]]
    {
        ok(ours(&[&["convert", "-B", &mid, "-F", "qcow2", "-O", "qcow2"], more, &[&top, &b]].concat()));
        sound(&b, &out);
        let size = json(&ok(theirs(&["info", "--output=json", &b])))["actual-size"].as_u64();
        assert!(
            size.is_some_and(|s| s < 5 << 20 || more.len() > 1 && more[1] == "cluster_size=2M"),
            "{more:?} takes {size:?}"
        );
    }
    assert_eq!(ours(&["convert", "-B", &base, "-O", "qcow2", &top, &b]).0, 1);
    // Every cache mode; a whole that is named by options.
    for cache in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
        for more in [&[][..], &["-c"]] {
            let head = ["convert", "-t", cache, "-T", cache, "-f", "raw", "-O", "qcow2"];
            let said = ours(&[&head[..], more, &[&raw, &b]].concat());
            if said.0 != 0 {
                assert!(said.2.contains("direct I/O"), "{}", said.2);
                eprintln!("skipped: {cache}: {}", said.2);
                continue;
            }
            sound(&b, &raw);
        }
    }
    ok(ours(&[
        "convert",
        "--image-opts",
        "-O",
        "raw",
        &format!("driver=qcow2,file.driver=file,file.filename={b}"),
        &out,
    ]));
    let back = std::fs::read(&out).expect("the copy");
    assert_eq!((back.len(), back.iter().zip(&data).position(|(a, b)| a != b)), (data.len(), None));
    // Compressed into an image that is there.
    ok(ours(&["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", &raw, &a]));
    ok(theirs(&["check", &a]));
    // Not faster than told.
    let start = std::time::Instant::now();
    ok(ours(&["convert", "-r", "4M", "-S", "0", "-f", "raw", "-O", "raw", &raw, &out]));
    assert!(start.elapsed().as_millis() >= 900);
}
