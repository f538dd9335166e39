//! Every feature of qcow2 that qemu-img can make, alone and in combinations: read right, written right, or refused by
//! name. And what is no image, or no longer one.

mod common;

use common::{Dir, io, json, mixed, ok, ours, theirs, they_can};

/// Values of each option; the first is the usual one.
const AXES: &[(&str, &[&str])] = &[
    ("compat", &["1.1", "0.10"]),
    ("cluster_size", &["64k", "512", "4k", "16k", "2M"]),
    ("refcount_bits", &["16", "1", "2", "8", "32", "64"]),
    ("lazy_refcounts", &["off", "on"]),
    ("extended_l2", &["off", "on"]),
    ("compression_type", &["zlib", "zstd"]),
    ("preallocation", &["off", "metadata", "falloc", "full"]),
    ("data_file", &["", "data"]),
    ("data_file_raw", &["off", "on"]),
    ("backing", &["", "raw", "qcow2"]),
    ("compressed", &["", "yes"]),
    ("bitmaps", &["", "one", "three"]),
];

/// All with one option changed, all with two, and some with any.
fn combinations() -> Vec<Vec<usize>> {
    let usual = vec![0; AXES.len()];
    let mut all = vec![usual.clone()];
    for (i, (_, values)) in AXES.iter().enumerate() {
        for v in 1..values.len() {
            let mut c = usual.clone();
            c[i] = v;
            all.push(c);
        }
    }
    let mut rng = fastrand::Rng::with_seed(31);
    let more = if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 1500 } else { 20 };
    for _ in 0..more {
        let mut c = usual.clone();
        for _ in 0..rng.usize(2..6) {
            let i = rng.usize(..AXES.len());
            c[i] = rng.usize(..AXES[i].1.len());
        }
        all.push(c);
    }
    all
}

#[test]
fn what_qemu_img_makes_is_read_and_written() {
    let d = Dir::new("features");
    let (raw, base_raw, base) = (d.path("a.raw"), d.path("base.raw"), d.path("base.qcow2"));
    std::fs::write(&raw, mixed((3 << 20) + 1024, 32)).expect("a file");
    std::fs::write(&base_raw, mixed(2 << 20, 33)).expect("a file");
    ok(theirs(&["convert", "-f", "raw", "-O", "qcow2", &base_raw, &base]));
    let (mut made, mut refused) = (0, 0);
    for c in combinations() {
        let value = |name: &str| AXES.iter().zip(&c).find(|(a, _)| a.0 == name).map_or("", |(a, v)| a.1[*v]);
        let mut options: Vec<String> = AXES
            .iter()
            .zip(&c)
            .filter(|((name, _), v)| {
                **v > 0 && !matches!(*name, "backing" | "compressed" | "data_file" | "bitmaps")
            })
            .map(|((name, values), v)| format!("{name}={}", values[*v]))
            .collect();
        let (image, plain) = (d.path("image"), d.path("plain"));
        let data = |tool: &str| format!("data_file={}", d.path(&format!("data.{tool}")));
        let backing: &[&str] = match value("backing") {
            "raw" => &["-b", &base_raw, "-F", "raw"],
            "qcow2" => &["-b", &base, "-F", "qcow2"],
            _ => &[],
        };
        let with_data = !value("data_file").is_empty();
        let joined = |tool: &str| {
            let mut o = options.clone();
            if with_data {
                o.push(data(tool));
            }
            o.join(",")
        };
        let create = |tool: &str, path: &str| {
            let o = joined(tool);
            let mut args: Vec<String> = ["create", "-q", "-f", "qcow2"].map(String::from).to_vec();
            args.extend(backing.iter().map(|s| (*s).to_owned()));
            if !o.is_empty() {
                args.extend(["-o".to_owned(), o]);
            }
            args.extend([path.to_owned(), "3146752".to_owned()]);
            args
        };
        let call = |run: fn(&[&str]) -> common::Said, args: &[String]| {
            run(&args.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let (t, o) = (call(theirs, &create("theirs", &image)), call(ours, &create("ours", &plain)));
        assert_eq!(o.0, t.0, "{c:?} {options:?}: {} / {}", o.2, t.2);
        if t.0 != 0 {
            refused += 1;
            continue;
        }
        made += 1;
        // Bitmaps record what is written from now on; the last one is off.
        let bitmaps = match value("bitmaps") {
            "" => 0,
            "one" => 1,
            _ => 3,
        };
        for (tool, path) in [(theirs as fn(&[&str]) -> common::Said, &image), (ours, &plain)] {
            for n in 0..bitmaps {
                let (name, grain) = (format!("b{n}"), (4096u32 << (4 * n)).to_string());
                let on = if n == 2 { "--disable" } else { "--enable" };
                let add = ["bitmap", "--add", "-f", "qcow2", "-g", &grain, path, &name];
                // Version 2 of the format has none, for either.
                let said = tool(&add);
                assert_eq!(said.0, u8::from(value("compat") == "0.10"), "{options:?}: {}", said.2);
                if value("compat") != "0.10" {
                    ok(tool(&["bitmap", on, "-f", "qcow2", path, &name]));
                }
            }
        }
        // Both write to what they made, and to what the other made; each time both agree about it.
        let agree = |path: &str, want: &str| {
            ok(theirs(&["check", "-f", "qcow2", path]));
            let said = ours(&["check", path]);
            assert_eq!(said.0, 0, "{options:?}: {}", said.1);
            let bitmaps = |run: fn(&[&str]) -> common::Said| {
                let info = json(&ok(run(&["info", "--output=json", "-f", "qcow2", path])));
                info["format-specific"]["data"]["bitmaps"].clone()
            };
            assert_eq!(bitmaps(ours), bitmaps(theirs), "{options:?}");
            ok(ours(&["compare", "-f", "qcow2", "-F", "raw", path, want]));
            ok(theirs(&["compare", "-f", "qcow2", "-F", "raw", path, want]));
        };
        let want = d.path("want");
        for path in [&image, &plain] {
            if value("compressed").is_empty() {
                io(
                    "qcow2",
                    path,
                    &["write -P 7 100k 700k", "write -z 300k 64k", "write -P 8 2M 3000", "discard 512k 64k"]
                        .map(String::from),
                );
            } else if they_can(&["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", &raw, path]) {
                ok(ours(&["compare", "-f", "raw", "-F", "qcow2", &raw, path]));
            }
            ok(theirs(&["convert", "-f", "qcow2", "-O", "raw", path, &want]));
            agree(path, &want);
            ok(ours(&["convert", "-n", "-f", "raw", "-O", "qcow2", &raw, path]));
            agree(path, &raw);
            if !with_data && value("refcount_bits") != "1" {
                ok(ours(&["snapshot", "-c", "s", path]));
                io("qcow2", path, &["write -P 9 0 1M".into(), "write -z 2M 64k".into()]);
                ok(ours(&["snapshot", "-a", "s", path]));
                agree(path, &raw);
                ok(theirs(&["snapshot", "-d", "s", path]));
                agree(path, &raw);
            }
            if value("data_file_raw") == "on" {
                let data = d.path(if path == &image { "data.theirs" } else { "data.ours" });
                let bytes = std::fs::read(data).expect("the data file");
                assert!(
                    bytes[..(3 << 20) + 1024] == std::fs::read(&raw).expect("the source")[..],
                    "{options:?}"
                );
            }
        }
        options.clear();
    }
    assert!(made > 30 && refused > 1, "{made} made, {refused} refused by both");
}

#[test]
fn encrypted_images_are_refused_by_name() {
    let d = Dir::new("encrypted");
    let secret = ["--object", "secret,id=s,data=abc123"];
    for (format, options, what) in [
        ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "LUKS encryption"),
        ("qcow2", "encrypt.format=aes,encrypt.key-secret=s", "AES encryption"),
        ("luks", "key-secret=s,iter-time=10", "luks"),
    ] {
        let image = d.path("image");
        if !they_can(&[&["create", "-q"][..], &secret, &["-f", format, "-o", options, &image, "1M"]].concat())
        {
            eprintln!("skipped: this qemu-img does not make {format} {options}");
            continue;
        }
        for args in [
            vec!["info", &image],
            vec!["check", &image],
            vec!["convert", "-O", "raw", &image, "x"],
            vec!["snapshot", "-c", "s", &image],
        ] {
            let said = ours(&args);
            assert!(
                said.0 != 0 && said.2.contains(what) && said.2.lines().count() == 1,
                "{args:?}: {}",
                said.2
            );
        }
    }
    let said = ours(&["create", "-f", "qcow2", "-o", "encrypt.format=luks", &d.path("new"), "1M"]);
    assert!(said.0 == 1 && said.2.contains("encrypted images are not supported"), "{}", said.2);
}

#[test]
fn bad_input_is_named_with_what_to_do() {
    let d = Dir::new("bad");
    let (raw, q, out) = (d.path("a.raw"), d.path("a.qcow2"), d.path("out"));
    std::fs::write(&raw, mixed(2 << 20, 34)).expect("a file");
    ok(ours(&["convert", "-f", "raw", "-O", "qcow2", &raw, &q]));
    let dir = d.0.to_string_lossy().into_owned();
    let told = |args: &[&str], what: &[&str]| {
        let said = ours(args);
        assert!(said.0 != 0 && said.2.lines().count() == 1, "{args:?}: {} {:?}", said.0, said.2);
        assert!(what.iter().all(|w| said.2.contains(w)), "{args:?}: {}", said.2);
        assert!(!std::path::Path::new(&out).exists(), "{args:?} leaves nothing");
    };
    told(&["info", &dir], &["is a directory", "name a file"]);
    told(&["convert", "-O", "raw", &dir, &out], &["is a directory"]);
    told(&["create", "-f", "qcow2", &dir, "1M"], &["is a directory"]);
    told(&["info", "/dev/null"], &["neither a file nor a block device"]);
    told(&["convert", "-O", "raw", "/nowhere/x", &out], &["/nowhere/x", "no such file"]);
    told(&["convert", "-f", "raw", "-O", "qcow2", &raw, "/nowhere/x"], &["/nowhere/x", "cannot create"]);
    // A truncated image: in its tables, in its data, in its header.
    let whole = std::fs::read(&q).expect("an image");
    for len in [1, 71, 100, 512, 65536, 3 * 65536, 4 * 65536, whole.len() - 70_000] {
        let cut = d.path("cut");
        std::fs::write(&cut, &whole[..len]).expect("an image");
        let said = ours(&["convert", "-f", "qcow2", "-O", "raw", &cut, &out]);
        if len < 4 * 65536 {
            assert!(said.0 != 0 && said.2.lines().count() == 1, "cut to {len}: {} {}", said.0, said.2);
        }
        // `check` does not send anybody to itself.
        let said = ours(&["check", "-f", "qcow2", &cut]);
        assert!(said.0 != 0 && !said.2.contains("img check"), "cut to {len}: {}", said.2);
        let _ = std::fs::remove_file(&out);
    }
    // A backing file that is missing, of another format, or another size.
    let top = d.path("top");
    ok(ours(&["create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "qcow2", &top, "1M"]));
    let gone = [top.as_str(), "gone", "does not exist", "rebase -u"];
    told(&["convert", "-O", "raw", &top, &out], &gone);
    told(&["info", "--backing-chain", &top], &gone);
    told(&["commit", &top], &gone);
    told(&["create", "-f", "qcow2", "-b", "gone", "-F", "qcow2", &out], &["gone", "no such file"]);
    ok(ours(&["rebase", "-u", "-b", &raw, "-F", "qcow2", &top]));
    told(&["convert", "-O", "raw", &top, &out], &["a.raw", "no qcow2 header"]);
    ok(ours(&["rebase", "-u", "-b", "nbd://host/x", "-F", "raw", &top]));
    told(&["convert", "-O", "raw", &top, &out], &["not a plain file name"]);
    ok(ours(&["rebase", "-u", "-b", &raw, "-F", "raw", &top]));
    for size in [512, 1 << 20, 3 << 20] {
        ok(ours(&["resize", "-q", "-f", "raw", "--shrink", &raw, &size.to_string()]));
        ok(ours(&["compare", &top, &top]));
        ok(ours(&["convert", "-O", "raw", &top, &out]));
        let theirs_out = d.path("theirs");
        ok(theirs(&["convert", "-O", "raw", &top, &theirs_out]));
        assert!(std::fs::read(&out).expect("ours") == std::fs::read(&theirs_out).expect("theirs"), "{size}");
        std::fs::remove_file(&out).expect("removed");
    }
    // Refcounts that disagree: check says so, and writing goes on without harm to what is right.
    let mut bad = whole.clone();
    bad[2 * 65536 + 10..2 * 65536 + 12].fill(0);
    std::fs::write(&q, &bad).expect("an image");
    let said = ours(&["check", &q]);
    assert!(said.0 == 2 && said.1.contains("refcount=0 reference=1"), "{} {}", said.0, said.1);
    ok(ours(&["check", "-r", "all", &q]));
    ok(theirs(&["check", &q]));
    // Marked as corrupt: read, but not written.
    let mut bad = whole;
    bad[79] |= 2;
    std::fs::write(&q, &bad).expect("an image");
    ok(ours(&["info", &q]));
    told(&["resize", &q, "+1M"], &["marked as corrupt", "ringfort img check"]);
    ok(ours(&["check", "-r", "all", &q]));
    ok(ours(&["resize", &q, "+1M"]));
}
