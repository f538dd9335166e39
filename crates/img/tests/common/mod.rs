//! What the tests of the image tool share.
#![allow(dead_code, reason = "each test uses a part")]

use ringfort_img::{Streams, run};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

/// A folder that goes away with the test.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("ringfort-img-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("a folder");
        Dir(dir)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Exit status, standard output, standard error.
pub type Said = (u8, String, String);

pub fn ours(args: &[&str]) -> Said {
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = run(&args, &mut Streams { out: &mut out, err: &mut err });
    (status, String::from_utf8(out).expect("UTF-8"), String::from_utf8(err).expect("UTF-8"))
}

pub fn theirs(args: &[&str]) -> Said {
    let o = Command::new(qemu("qemu-img"))
        .args(args)
        .env("TZ", "UTC")
        .output()
        .expect("qemu-img (Debian package qemu-utils) is installed");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (o.status.code().unwrap_or(255) as u8, text(&o.stdout), text(&o.stderr))
}

pub fn ok(said: Said) -> String {
    assert_eq!(said.0, 0, "{} {}", said.1, said.2);
    said.1
}

pub fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// A program of QEMU's tools: from the folder that RINGFORT_TEST_QEMU names, or from the PATH.
pub fn qemu(name: &str) -> PathBuf {
    std::env::var_os("RINGFORT_TEST_QEMU").map_or_else(|| name.into(), |dir| PathBuf::from(dir).join(name))
}

/// Run qemu-io's commands on an image.
pub fn io(format: &str, path: &str, commands: &[String]) {
    let mut c = Command::new(qemu("qemu-io"));
    c.args(["-f", format]);
    for command in commands {
        c.args(["-c", command]);
    }
    let o = c.arg(path).output().expect("qemu-io (Debian package qemu-utils) is installed");
    let text = String::from_utf8_lossy(&o.stdout);
    assert!(
        o.status.success() && !text.contains("failed"),
        "{commands:?}: {text}{}",
        String::from_utf8_lossy(&o.stderr)
    );
}

/// Whether this version of QEMU's tools takes a command: older ones lack some options.
pub fn they_can(args: &[&str]) -> bool {
    theirs(args).0 == 0
}

/// Data, zeroes, text and holes.
pub fn mixed(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut data = vec![0u8; len];
    for chunk in data.chunks_mut(24 << 10) {
        match rng.u8(..5) {
            0 | 1 => {}
            2 => chunk.fill(rng.u8(..)),
            3 => chunk.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 7) as u8),
            _ => chunk.iter_mut().for_each(|b| *b = rng.u8(..)),
        }
    }
    data
}
