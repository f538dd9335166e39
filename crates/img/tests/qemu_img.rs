//! Every verb beside qemu-img: what one makes the other reads, and both say the same.

mod common;

use common::{Dir, json, mixed, ok, ours, theirs};
use serde_json::Value;

#[test]
fn create_says_and_makes_what_qemu_img_does() {
    let d = Dir::new("create");
    for (i, options) in [
        vec!["-f", "qcow2"],
        vec!["-fqcow2", "-o", "cluster_size=4k,lazy_refcounts=on"],
        vec!["-f", "qcow2", "-o", "compat=0.10"],
        vec!["-f", "qcow2", "-o", "extended_l2=on,refcount_bits=64", "-o", "compression_type=zstd"],
        vec!["-f", "qcow2", "-o", "cluster_size=2M,refcount_bits=1"],
        vec!["-f", "raw"],
        vec![],
    ]
    .into_iter()
    .enumerate()
    {
        let (a, b) = (d.path(&format!("{i}.ours")), d.path(&format!("{i}.theirs")));
        let with = |path: &str| {
            let mut v = vec!["create"];
            v.extend(&options);
            [v.as_slice(), &[path, "300M"]].concat().iter().map(|s| (*s).to_owned()).collect::<Vec<String>>()
        };
        let (x, y) = (with(&a), with(&b));
        let said = ok(ours(&x.iter().map(String::as_str).collect::<Vec<_>>()));
        let they = ok(theirs(&y.iter().map(String::as_str).collect::<Vec<_>>()));
        let they = they.replace(&b, &a);
        assert_eq!(said.contains("fmt=qcow2"), they.contains("fmt=qcow2"));
        for word in said.split_whitespace() {
            assert!(they.contains(word), "{word} of {said:?} is in {they:?}");
        }
        if said.contains("qcow2") {
            ok(theirs(&["check", &a]));
            ok(theirs(&["compare", "-f", "qcow2", "-F", "qcow2", &a, &b]));
        }
        // Each tool says the same of each image.
        for path in [&a, &b] {
            let (o, t) = (
                json(&ok(ours(&["info", "--output=json", path]))),
                json(&ok(theirs(&["info", "--output=json", path]))),
            );
            for (k, v) in o.as_object().expect("an object") {
                if !matches!(k.as_str(), "children") {
                    assert_eq!(json_part(v), json_part(&t[k]), "{k} of {path}");
                }
            }
            let (o, t) = (ok(ours(&["info", path])), ok(theirs(&["info", path])));
            same_lines(&o, &t);
        }
    }
}

/// What `info` says to people; versions before 8.1 do not show the file below.
fn same_lines(ours: &str, theirs: &str) {
    let mut child = false;
    for line in ours.lines() {
        child = line.starts_with("Child node") || child && line.starts_with("    ");
        if !child || theirs.contains("Child node") {
            assert!(theirs.lines().any(|l| l == line), "{line:?} in {theirs}");
        }
    }
}

/// Newer versions of qemu-img add fields inside: what ours has must be there.
fn json_part(v: &Value) -> Value {
    match v.get("data") {
        Some(data) => data.clone(),
        None => v.clone(),
    }
}

#[test]
fn mistakes_end_with_the_same_status() {
    let d = Dir::new("mistakes");
    let (x, raw) = (d.path("x"), d.path("raw"));
    std::fs::write(&raw, [1; 4096]).expect("a file");
    let base = d.path("base");
    ok(ours(&["create", "-q", "-f", "qcow2", &base, "1M"]));
    for args in [
        vec!["create", "-f", "foo", &x, "1"],
        vec!["create", "-f", "qcow2", &x],
        vec!["create", "-f", "qcow2", &x, "1z"],
        vec!["create", "-f", "qcow2", "-b", &base, &x],
        vec!["create", "-f", "raw", "-b", &base, "-F", "qcow2", &x],
        vec!["create", "-f", "qcow2", "-o", "cluster_size=3k", &x, "1M"],
        vec!["create", "-f", "qcow2", "-o", "bogus=1", &x, "1M"],
        vec!["bogus"],
        vec!["info", "/nowhere/at/all"],
        vec!["check", "-f", "raw", &raw],
        vec!["snapshot", "-d", "none", &base],
        vec!["resize", "-f", "raw", &raw, "1k"],
        vec!["compare", &raw],
        vec!["compare", &raw, "/nowhere"],
        vec!["convert", "-c", "-O", "raw", &base, &x],
        vec!["convert", "/nowhere", &x],
    ] {
        let (o, t) = (ours(&args), theirs(&args));
        assert_eq!(o.0, t.0, "{args:?}: {} / {}", o.2, t.2);
        assert!(o.2.starts_with("ringfort img: ") && o.2.lines().count() == 1, "{args:?}: {:?}", o.2);
        assert!(!std::path::Path::new(&x).exists(), "{args:?} leaves nothing");
    }
}

#[test]
fn convert_goes_both_ways_with_every_option() {
    let d = Dir::new("convert");
    let raw = d.path("a.raw");
    // The end lies in the middle of a cluster.
    let data = mixed((9 << 20) + 512 * 7, 1);
    std::fs::write(&raw, &data).expect("a file");
    for (i, options) in [
        vec![],
        vec!["-c"],
        vec!["-c", "-o", "compression_type=zstd,cluster_size=128k"],
        vec!["-o", "cluster_size=512"],
        vec!["-o", "extended_l2=on", "-m", "8"],
        vec!["-o", "compat=0.10,cluster_size=4k", "-c"],
        vec!["-S", "0", "-m", "1"],
        vec!["-S", "64k", "-W"],
    ]
    .into_iter()
    .enumerate()
    {
        let (q, back, back2) = (d.path(&format!("{i}.qcow2")), d.path("back.raw"), d.path("back2.raw"));
        let args = [&["convert", "-f", "raw", "-O", "qcow2"], options.as_slice(), &[&raw, &q]].concat();
        ok(ours(&args));
        ok(theirs(&["check", &q]));
        ok(theirs(&["compare", "-f", "raw", "-F", "qcow2", &raw, &q]));
        assert_eq!(ours(&["check", &q]).0, 0);
        ok(ours(&["convert", "-O", "raw", &q, &back]));
        ok(theirs(&["convert", "-O", "raw", &q, &back2]));
        assert!(std::fs::read(&back).expect("the copy") == data, "{options:?}");
        assert!(std::fs::read(&back2).expect("their copy") == data, "{options:?}");
        // What qemu-img writes is read.
        let t = d.path("theirs.qcow2");
        let args = [&["convert", "-f", "raw", "-O", "qcow2"], options.as_slice(), &[&raw, &t]].concat();
        ok(theirs(&args));
        assert_eq!(ok(ours(&["compare", "-f", "raw", "-F", "qcow2", &raw, &t])), "Images are identical.\n");
        // A compressed image is smaller, and both tools compress alike.
        if options.contains(&"-c") {
            let (a, b) =
                (std::fs::metadata(&q).expect("ours").len(), std::fs::metadata(&t).expect("theirs").len());
            assert!(a < b * 11 / 10 + 65536, "{a} is not much more than {b}");
        }
    }
    // Into an image that holds something else.
    let target = d.path("n.qcow2");
    ok(ours(&["create", "-q", "-f", "qcow2", &target, "12M"]));
    std::fs::write(d.path("other.raw"), vec![0x55; 12 << 20]).expect("a file");
    ok(ours(&["convert", "-n", "-f", "raw", "-O", "qcow2", &d.path("other.raw"), &target]));
    let said = ok(ours(&["convert", "-p", "-n", "-f", "raw", "-O", "qcow2", &raw, &target]));
    assert!(said.contains("(0.00/100%)") && said.ends_with("(100.00/100%)\r\n"), "{said:?}");
    let q = ok(theirs(&["convert", "-O", "raw", &target, &d.path("n.raw")]));
    assert_eq!(q, "");
    assert!(std::fs::read(d.path("n.raw")).expect("the copy")[..data.len()] == data);
    assert_eq!(
        std::fs::read_dir(&d.0)
            .expect("the folder")
            .filter(|e| e.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().contains("part")))
            .count(),
        0
    );
}

#[test]
fn compare_finds_what_qemu_img_finds() {
    let d = Dir::new("compare");
    let (a, b) = (d.path("a"), d.path("b"));
    let data = mixed(5 << 20, 2);
    std::fs::write(&a, &data).expect("a file");
    for (change, len) in [
        (None, 5 << 20),
        (Some(3_333_333), 5 << 20),
        (None, 6 << 20),
        (Some((5 << 20) + 777), 6 << 20),
        (None, 4 << 20),
    ] {
        let mut other = data.clone();
        other.resize(len, 0);
        if let Some(at) = change {
            other[at] ^= 0xff;
        }
        std::fs::write(&b, &other).expect("a file");
        for flags in [
            &["-f", "raw", "-F", "raw"][..],
            &["-s", "-f", "raw", "-F", "raw"],
            &["-q", "-f", "raw", "-F", "raw"],
        ] {
            let args = [&["compare"], flags, &[&a, &b]].concat();
            let (o, t) = (ours(&args), theirs(&args));
            assert_eq!(o.0, t.0, "{args:?} {change:?} {len}");
            let plain = |s: &str| s.split(" at offset").next().unwrap_or("").to_owned();
            assert_eq!(plain(&o.1), plain(&t.1));
        }
    }
}

#[test]
fn map_shows_chains_as_qemu_img_does() {
    let d = Dir::new("map");
    let (base, top, raw) = (d.path("base.qcow2"), d.path("top.qcow2"), d.path("x.raw"));
    std::fs::write(&raw, mixed(4 << 20, 3)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", &raw, &base]));
    ok(ours(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", &top, "6M"]));
    ok(theirs(&["check", &top]));
    for args in [
        vec!["map", "--output=json", &top],
        vec!["map", "--output=json", "--start-offset=100k", "--max-length", "1M", &top],
        vec!["map", "--output=json", &base],
    ] {
        let (o, t) = (json(&ok(ours(&args))), json(&ok(theirs(&args))));
        assert_eq!(o.as_array().map(Vec::len), t.as_array().map(Vec::len), "{o} {t}");
        for (x, y) in o.as_array().expect("a list").iter().zip(t.as_array().expect("a list")) {
            for (k, v) in x.as_object().expect("an object").iter().filter(|(k, _)| *k != "compressed") {
                assert_eq!(Some(v), y.get(k), "{k}: {x} {y}");
            }
        }
    }
    for args in [["map", &top], ["map", &base]] {
        assert_eq!(ok(ours(&args)), ok(theirs(&args)));
    }
    let (o, t) =
        (ok(ours(&["info", "--backing-chain", &top])), ok(theirs(&["info", "--backing-chain", &top])));
    same_lines(&o, &t);
    let chain = json(&ok(ours(&["info", "--backing-chain", "--output=json", &top])));
    assert_eq!(chain.as_array().map(Vec::len), Some(2));
}

#[test]
fn resize_and_snapshots_go_together_with_qemu_img() {
    let d = Dir::new("resize");
    let (raw, q) = (d.path("a.raw"), d.path("a.qcow2"));
    let data = mixed(3 << 20, 4);
    std::fs::write(&raw, &data).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", &raw, &q]));
    ok(ours(&["snapshot", "-c", "one", &q]));
    ok(theirs(&["check", &q]));
    ok(theirs(&["snapshot", "-c", "two", &q]));
    assert_eq!(ours(&["check", &q]).0, 0);
    let lines = |t: String| {
        t.lines().map(|l| l.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(
        lines(ok(ours(&["snapshot", "-l", &q])))[2..],
        lines(ok(theirs(&["snapshot", "-l", &q])))[2..]
    );
    ok(ours(&["resize", &q, "+2M"]));
    ok(theirs(&["check", &q]));
    let other = d.path("b.raw");
    std::fs::write(&other, mixed(5 << 20, 9)).expect("a file");
    ok(ours(&["convert", "-n", "-f", "raw", "-O", "qcow2", &other, &q]));
    ok(theirs(&["compare", "-f", "raw", "-F", "qcow2", &other, &q]));
    ok(ours(&["snapshot", "-a", "two", &q]));
    ok(theirs(&["check", &q]));
    ok(theirs(&["compare", "-f", "raw", "-F", "qcow2", &raw, &q]));
    ok(ours(&["snapshot", "-d", "1", &q]));
    ok(ours(&["snapshot", "-d", "two", &q]));
    ok(theirs(&["check", &q]));
    assert_eq!(ok(theirs(&["snapshot", "-l", &q])), "");
    assert_eq!(ours(&["resize", &q, "1M"]).0, 1);
    ok(ours(&["resize", "--shrink", &q, "-1M"]));
    ok(theirs(&["check", &q]));
    let info = json(&ok(theirs(&["info", "--output=json", &q])));
    assert_eq!(info["virtual-size"], 2 << 20);
}

#[test]
fn an_image_in_use_is_not_replaced() {
    let d = Dir::new("locks");
    let q = d.path("a.qcow2");
    ok(ours(&["create", "-q", "-f", "qcow2", &q, "1M"]));
    let options = ringfort_block::ImageOptions::default();
    let held = ringfort_block::open_image(std::path::Path::new(&q), &options).expect("opens");
    assert_ne!(theirs(&["check", &q]).0, 0, "qemu-img respects the lock");
    for args in [
        vec!["create", "-f", "qcow2", &q, "2M"],
        vec!["check", "-r", "all", &q],
        vec!["resize", &q, "2M"],
        vec!["convert", "-O", "raw", &q, &q],
    ] {
        let said = ours(&args);
        assert_eq!(said.0, 1, "{args:?}");
        assert!(said.2.contains("in use"), "{args:?}: {}", said.2);
    }
    drop(held);
}

#[test]
fn check_mends_what_qemu_img_finds_broken() {
    let d = Dir::new("mend");
    let (raw, q) = (d.path("a.raw"), d.path("a.qcow2"));
    std::fs::write(&raw, mixed(3 << 20, 6)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", &raw, &q]));
    let good = std::fs::read(&q).expect("the image");
    // Refcount table in the second cluster, first refcount block in the third.
    for (at, bytes, status) in [(8192 + 2 * 590, [0, 1], 3), (8192 + 2 * 8, [0, 0], 2)] {
        let mut bad = good.clone();
        bad.resize(600 * 4096, 0);
        bad[at..at + 2].copy_from_slice(&bytes);
        std::fs::write(&q, &bad).expect("the image");
        let (o, t) = (ours(&["check", &q]), theirs(&["check", &q]));
        assert_eq!((o.0, t.0), (status, status), "{} {}", o.1, t.1);
        let report = json(&ours(&["check", "--output=json", &q]).1);
        let their = json(&theirs(&["check", "--output=json", &q]).1);
        for (k, v) in report.as_object().expect("an object") {
            assert_eq!(Some(v), their.get(k), "{k}");
        }
        assert_eq!(ours(&["check", "-r", if status == 3 { "leaks" } else { "all" }, &q]).0, 0);
        ok(theirs(&["check", &q]));
        ok(theirs(&["compare", "-f", "raw", "-F", "qcow2", &raw, &q]));
    }
}
