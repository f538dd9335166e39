//! `bench` beside qemu-img: the same lines, the same outcome on the disk, the same refusals.

use ringfort_img::{Streams, run};
use std::process::Command;

fn ours(args: &[&str]) -> (u8, String, String) {
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = run(&args, &mut Streams { out: &mut out, err: &mut err });
    (status, String::from_utf8(out).expect("UTF-8"), String::from_utf8(err).expect("UTF-8"))
}

fn theirs(args: &[&str]) -> (u8, String, String) {
    let o = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img (Debian package qemu-utils) is installed");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (o.status.code().unwrap_or(255) as u8, text(&o.stdout), text(&o.stderr))
}

/// Without the seconds.
fn timeless(text: &str) -> String {
    text.lines()
        .map(|l| if l.starts_with("Run completed in") { "Run completed" } else { l })
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn both_say_and_do_the_same() {
    let dir = std::env::temp_dir().join(format!("ringfort-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    for (format, cache) in
        [("raw", "writeback"), ("qcow2", "writeback"), ("raw", "none"), ("qcow2", "unsafe")]
    {
        let (a, b) = (path("a"), path("b"));
        for image in [&a, &b] {
            let made = theirs(&["create", "-q", "-f", format, image, "4M"]);
            assert_eq!(made.0, 0, "{}", made.2);
        }
        for more in [
            &["-w", "-c", "300", "-d", "8", "--pattern=90", "-s", "8k", "-S", "16k"][..],
            &["-w", "-c", "100", "-d", "4", "-s", "4k", "-o", "1M", "--flush-interval=16", "--pattern=17"],
            &["-w", "-c", "64", "-d", "4", "-s", "64k", "--flush-interval=8", "--no-drain", "--pattern", "5"],
            &["-c", "200", "-d", "64"],
            &["-c", "20", "-s", "1M"],
        ] {
            let args = |image| [&["bench", "-f", format, "-t", cache][..], more, &[image]].concat();
            let (x, y) = (ours(&args(&a)), theirs(&args(&b)));
            assert_eq!((x.0, timeless(&x.1)), (y.0, timeless(&y.1)), "{more:?}: {} {}", x.2, y.2);
        }
        // qemu-img 7.2 speaks here all the same, later ones do not.
        assert_eq!(ours(&["bench", "-f", format, "-c", "20", "-q", &a]), (0, String::new(), String::new()));
        let same = theirs(&["compare", "-f", format, "-F", format, &a, &b]);
        assert_eq!(same.0, 0, "{}", same.1);
        if format == "qcow2" {
            assert_eq!(theirs(&["check", "-q", &a]).0, 0);
        }
        for bad in [
            &["--flush-interval=9"][..],
            &["-w", "-d", "8", "--flush-interval=4"],
            &["-t", "fast"],
            &["-c", "many"],
            &["--pattern=256"],
        ] {
            let args = |image| [&["bench", "-f", format][..], bad, &[image]].concat();
            assert_eq!((ours(&args(&a)).0, theirs(&args(&b)).0), (1, 1), "{bad:?}");
        }
        // qemu-img 7.2 takes these, and never ends with the second; later ones refuse them.
        for bad in [["-s", "0"], ["-d", "0"]] {
            assert_eq!(ours(&[&["bench", "-f", format][..], &bad, &[&a]].concat()).0, 1, "{bad:?}");
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
}
