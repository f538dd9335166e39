//! Random sequences of operations against a model, checked and compared by qemu-img at each step.

mod common;

use common::{Dir, ok, ours, theirs};
use ringfort_block::{Format, ImageOptions, SharedSlice, SharedSliceMut, open_image};
use std::path::Path;

/// Steps of each sequence.
fn steps() -> usize {
    if std::env::var_os("RINGFORT_TEST_LONG").is_some() { 1500 } else { 25 }
}

struct Model {
    content: Vec<u8>,
    /// Names and contents.
    snapshots: Vec<(String, Vec<u8>)>,
    /// Index of the base it stands on.
    base: Option<usize>,
    bases: Vec<Vec<u8>>,
}

struct Run<'a> {
    d: &'a Dir,
    rng: fastrand::Rng,
    m: Model,
    image: String,
    v3: bool,
    narrow: bool,
    log: Vec<String>,
}

const BASES: [(&str, &str); 2] = [("base0.qcow2", "qcow2"), ("base1.raw", "raw")];

impl Run<'_> {
    fn new<'a>(d: &'a Dir, options: &str, seed: u64) -> Run<'a> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let bases: Vec<Vec<u8>> =
            [1 << 20, (3 << 20) / 2].iter().map(|n| common::mixed(*n, rng.u64(..))).collect();
        std::fs::write(d.path("base1.raw"), &bases[1]).expect("a file");
        std::fs::write(d.path("tmp.raw"), &bases[0]).expect("a file");
        ok(theirs(&["convert", "-f", "raw", "-O", "qcow2", &d.path("tmp.raw"), &d.path("base0.qcow2")]));
        let image = d.path("image");
        ok(ours(&["create", "-q", "-f", "qcow2", "-o", options, &image, "2M"]));
        let m = Model { content: vec![0; 2 << 20], snapshots: Vec::new(), base: None, bases };
        let (v3, narrow) = (!options.contains("0.10"), options.contains("refcount_bits=1,"));
        Run { d, rng, m, image, v3, narrow, log: vec![options.to_owned()] }
    }

    fn step(&mut self) {
        match self.rng.u8(..20) {
            0..=8 => self.writes(),
            9 | 10 if !self.narrow && self.m.snapshots.len() < 4 => self.snapshot(),
            11 => self.apply(),
            12 => self.delete(),
            13 | 14 => self.resize(),
            15 | 16 => self.commit(),
            17 | 18 => self.rebase(),
            _ => self.packed(),
        }
    }

    /// A range that lies on the disk.
    fn range(&mut self) -> (usize, usize) {
        let size = self.m.content.len();
        let at = self.rng.usize(..size);
        let most = if self.rng.bool() { 5000 } else { 400_000 };
        let (mut at, mut len) = (at, self.rng.usize(1..most).min(size - at));
        if self.rng.bool() {
            at = at / 65536 * 65536;
            len = len.next_multiple_of(65536).min(size - at);
        }
        (at, len)
    }

    /// Several writes, zeroes and discards in one opening.
    fn writes(&mut self) {
        let options = ImageOptions { format: Some(Format::Qcow2), ..ImageOptions::default() };
        let disk = open_image(Path::new(&self.image), &options).expect("opens");
        for _ in 0..self.rng.usize(1..12) {
            let (at, len) = self.range();
            match self.rng.u8(..7) {
                0..=3 => {
                    let byte = self.rng.u8(..);
                    self.log.push(format!("write {byte} at {at} {len}"));
                    disk.write_at(&[SharedSlice::new(&vec![byte; len])], at as u64).expect("writes");
                    self.m.content[at..at + len].fill(byte);
                }
                4 | 5 => {
                    let unmap = self.rng.bool();
                    self.log.push(format!("zero at {at} {len} {unmap}"));
                    disk.write_zeroes(at as u64, len as u64, unmap).expect("zeroes");
                    self.m.content[at..at + len].fill(0);
                }
                _ => {
                    self.log.push(format!("discard at {at} {len}"));
                    disk.discard(at as u64, len as u64).expect("discards");
                    let mut now = vec![0; len];
                    disk.read_at(&[SharedSliceMut::new(&mut now)], at as u64).expect("reads");
                    for (have, want) in now.iter().zip(&mut self.m.content[at..at + len]) {
                        assert!(have == want || *have == 0, "{:?}", self.log);
                        *want = *have;
                    }
                }
            }
            if self.rng.u8(..4) == 0 {
                disk.flush().expect("flushes");
            }
        }
        let mut all = vec![0; self.m.content.len()];
        disk.read_at(&[SharedSliceMut::new(&mut all)], 0).expect("reads");
        assert!(all == self.m.content, "read back: {:?}", self.log);
    }

    fn snapshot(&mut self) {
        let name = format!("s{}", self.rng.u32(..));
        self.log.push(format!("snapshot {name}"));
        let run = if self.rng.bool() { ours } else { theirs };
        ok(run(&["snapshot", "-c", &name, &self.image]));
        self.m.snapshots.push((name, self.m.content.clone()));
    }

    fn apply(&mut self) {
        if let Some((name, content)) = self.rng.choice(self.m.snapshots.clone()) {
            self.log.push(format!("apply {name}"));
            ok(ours(&["snapshot", "-a", &name, &self.image]));
            self.m.content = content;
        }
    }

    fn delete(&mut self) {
        if !self.m.snapshots.is_empty() {
            let i = self.rng.usize(..self.m.snapshots.len());
            let (name, _) = self.m.snapshots.remove(i);
            self.log.push(format!("delete {name}"));
            let run = if self.rng.bool() { ours } else { theirs };
            ok(run(&["snapshot", "-d", &name, &self.image]));
        }
    }

    fn resize(&mut self) {
        let size = self.rng.usize(1000..6000) * 512;
        let shrink = size < self.m.content.len();
        if !self.m.snapshots.is_empty() && (shrink || !self.v3) {
            return;
        }
        self.log.push(format!("resize {size}"));
        ok(ours(&["resize", "-q", "--shrink", &self.image, &size.to_string()]));
        self.m.content.resize(size, 0);
    }

    fn commit(&mut self) {
        // What snapshots hold would change with the base.
        let (Some(b), true) = (self.m.base, self.m.snapshots.is_empty()) else { return };
        self.log.push("commit".into());
        let drop = self.rng.bool();
        let args = if drop { vec!["commit", "-d", &self.image] } else { vec!["commit", &self.image] };
        ok(ours(&args));
        let base = &mut self.m.bases[b];
        let size = base.len().max(self.m.content.len());
        base.resize(size, 0);
        base[..self.m.content.len()].copy_from_slice(&self.m.content);
        std::fs::write(self.d.path("want"), &*base).expect("a file");
        let (name, format) = BASES[b];
        let path = self.d.path(name);
        ok(theirs(&["compare", "-f", "raw", "-F", format, &self.d.path("want"), &path]));
        let info = common::json(&ok(theirs(&["info", "-f", format, "--output=json", &path])));
        assert_eq!(info["virtual-size"].as_u64(), Some(size as u64));
    }

    fn rebase(&mut self) {
        if !self.m.snapshots.is_empty() {
            return;
        }
        let to = match self.rng.usize(..3) {
            2 => None,
            b => Some(b),
        };
        self.log.push(format!("rebase {to:?}"));
        match to {
            None => ok(ours(&["rebase", "-b", "", &self.image])),
            Some(b) => ok(ours(&["rebase", "-b", BASES[b].0, "-F", BASES[b].1, &self.image])),
        };
        self.m.base = to;
    }

    /// A part compressed in place.
    fn packed(&mut self) {
        self.log.push("convert -n -c".into());
        let (a, b) = (self.d.path("part.raw"), &self.image);
        let keep = self.rng.usize(1..self.m.content.len() / 512) * 512;
        let mut part = self.m.content[..keep].to_vec();
        let from = self.rng.usize(..keep);
        part[from..].iter_mut().take(30_000).for_each(|x| *x = x.wrapping_add(1));
        std::fs::write(&a, &part).expect("a file");
        ok(ours(&["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", &a, b]));
        self.m.content[..keep].copy_from_slice(&part);
    }

    fn verify(&mut self) {
        let want = self.d.path("want");
        std::fs::write(&want, &self.m.content).expect("a file");
        let check = theirs(&["check", &self.image]);
        assert_eq!(check.0, 0, "{} {}: {:#?}", check.1, check.2, self.log);
        let mine = ours(&["check", &self.image]);
        assert_eq!(mine.0, 0, "{}: {:#?}", mine.1, self.log);
        let same = theirs(&["compare", "-f", "qcow2", "-F", "raw", &self.image, &want]);
        assert_eq!(same.0, 0, "{}: {:#?}", same.1, self.log);
        // Now and then what a snapshot holds.
        if let (Some((name, content)), 0) = (self.rng.choice(self.m.snapshots.clone()), self.rng.u8(..3)) {
            let out = self.d.path("snapshot");
            ok(theirs(&["convert", "-l", &name, "-O", "raw", &self.image, &out]));
            // It has the size that the disk has now.
            let mut have = std::fs::read(&out).expect("the copy");
            let more = have.split_off(content.len());
            assert!(have == content && more.iter().all(|b| *b == 0), "{name}: {:#?}", self.log);
        }
    }
}

#[test]
fn random_operations_match_a_model() {
    for (i, options) in [
        "cluster_size=64k",
        "cluster_size=512,compat=0.10",
        "extended_l2=on,cluster_size=16k,compression_type=zstd",
        "cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
        "refcount_bits=1,cluster_size=8k",
        "cluster_size=2M,preallocation=metadata",
    ]
    .into_iter()
    .enumerate()
    {
        let d = Dir::new("random");
        let mut run = Run::new(&d, options, 100 + i as u64);
        for _ in 0..steps() {
            run.step();
            run.verify();
        }
    }
}
