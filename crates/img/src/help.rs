//! What the image tool says of itself.

/// All verbs.
pub const HELP: &str = "\
Disk images: create, examine, convert. Verbs, options, output and exit statuses are qemu-img's.

usage: ringfort img COMMAND [OPTIONS]

  amend [-f FMT] [-p] [-q] [-t CACHE] -o OPTIONS FILE
  bench [-c COUNT] [-d DEPTH] [-s SIZE] [-o OFFSET] [-S STEP] [-w] [--pattern=BYTE] [--flush-interval=N [--no-drain]]
        [-f FMT] [-i native|io_uring|threads] [-n] [-t CACHE] [-q] [-U] FILE
  bitmap (--add [-g SIZE] | --remove | --clear | --enable | --disable | --merge SOURCE [-b FILE [-F FMT]])...
         [-f FMT] FILE BITMAP
  check [-q] [-f FMT] [--output=FMT] [-r leaks|all] [-T CACHE] [-U] FILE
  commit [-q] [-f FMT] [-t CACHE] [-b BASE] [-r RATE] [-d] [-p] FILE
  compare [-f FMT] [-F FMT] [-T CACHE] [-p] [-q] [-s] [-U] FILE1 FILE2
  convert [-c] [-p] [-q] [-n] [--target-is-zero] [--bitmaps [--skip-broken-bitmaps]] [--salvage] [-f FMT] [-O FMT]
          [-B BACKING -F FMT] [-o OPTIONS] [-l SNAPSHOT] [-S SIZE] [-m N] [-W] [-r RATE] [-t CACHE] [-T CACHE] [-U]
          FILE [FILE2...] OUT
  create [-q] [-f FMT] [-b BACKING -F FMT] [-u] [-o OPTIONS] FILE [SIZE]
  dd [-f FMT] [-O FMT] [-U] [bs=SIZE] [count=N] [skip=N] if=FILE of=OUT
  info [-f FMT] [--output=FMT] [--backing-chain] [-U] FILE
  map [-f FMT] [--start-offset=N] [--max-length=N] [--output=FMT] [-U] FILE
  measure [-f FMT] [-O FMT] [-o OPTIONS] [-l SNAPSHOT] [--output=FMT] [-U] (--size SIZE | FILE)
  rebase [-q] [-f FMT] [-t CACHE] [-T CACHE] [-p] [-u] -b BACKING [-F FMT] FILE
  resize [-f FMT] [-q] [--preallocation=MODE] [--shrink] FILE [+|-]SIZE
  snapshot [-q] [-U] [-l | -a NAME | -c NAME | -d NAME] FILE

FMT of images is raw or qcow2, and to read from vmdk, vpc (VHD), vhdx and vdi; of --output human or json.
SIZE takes the suffixes k, M, G, T, P, E. CACHE is none, writeback, writethrough, directsync or unsafe; convert writes new
files with unsafe: -t writeback waits until they are on the disk. `-o help` lists the options of a new image.
With --image-opts FILE is driver=FMT,file.filename=NAME. New files get their names when they are complete.
Letters have qemu-img's long names as well. `ringfort img VERB --help` tells more of one verb.
";

/// What a verb does, and examples.
const VERBS: [(&str, &str, &str); 15] = [
    ("amend", "Change options of a qcow2 image that is there: compat, refcount_bits, lazy_refcounts, backing file, size.",
        "amend -o compat=1.1,lazy_refcounts=on disk.qcow2"),
    ("bench", "Read (-w: write) COUNT requests of SIZE bytes, DEPTH of them at once, and say how long it took.",
        "bench -c 100000 -d 64 -s 4k disk.qcow2"),
    ("bitmap", "Make, remove, clear, switch or merge the bitmaps of a qcow2 image that record what changes.",
        "bitmap --add -g 64k disk.qcow2 backup-1"),
    ("check", "Look for leaks and errors in a qcow2 image; -r mends them. Exit status: 0 sound, 2 errors, 3 leaks, 63 no check
for this format.", "check -r leaks disk.qcow2"),
    ("commit", "Write what an image holds into its backing file (-b: into one further down) and empty it (-d: leave it).",
        "commit -p overlay.qcow2"),
    ("compare", "Say whether two images hold the same (-s: and are of the same size and layout). Exit status: 0 same,
1 different, above that an error.", "compare -f raw -F qcow2 disk.raw disk.qcow2"),
    ("convert", "Copy images, one behind the other, into a new one (-n: one that is there), in another format if wanted; -c
compresses, -B keeps what a backing file holds out of the copy, -l copies a snapshot.",
        "convert -p -c -O qcow2 -o compression_type=zstd disk.vmdk disk.qcow2"),
    ("create", "Make an image: raw, or qcow2, which grows as it is written to; -b makes it an overlay of another image.",
        "create -f qcow2 -b base.img -F raw overlay.qcow2"),
    ("dd", "Copy COUNT blocks of bs bytes, the first skip left out.", "dd -O qcow2 bs=1M count=100 if=disk.raw of=part.qcow2"),
    ("info", "Say what an image is, with all images that it stands on if --backing-chain.",
        "info --backing-chain --output=json overlay.qcow2"),
    ("map", "Say where the pieces of the disk lie: in which file of a chain, and whether they are zeroes.",
        "map --output=json overlay.qcow2"),
    ("measure", "Say how large a copy in another format would be.", "measure -O qcow2 disk.raw"),
    ("rebase", "Put an image on another backing file (-b '': on none), with the same content (-u: only change the name).",
        "rebase -p -b new-base.img -F raw overlay.qcow2"),
    ("resize", "Make a disk larger or, with --shrink, smaller. Of a running guest's disk it is done at its control socket.",
        "resize disk.qcow2 +10G"),
    ("snapshot", "List (-l), make (-c), go back to (-a) or delete (-d) snapshots inside a qcow2 image.",
        "snapshot -c before-upgrade disk.qcow2"),
];

/// What `--help` of a verb says.
pub fn of(verb: &str) -> Option<String> {
    let (name, what, example) = VERBS.iter().find(|v| v.0 == verb)?;
    let mut usage = String::new();
    let mut mine = false;
    for line in HELP.lines().skip(4) {
        if !line.starts_with("  ") {
            break;
        }
        // Further lines of a verb are indented further.
        mine = line.strip_prefix("  ").is_some_and(|l| l.starts_with(&format!("{name} ")))
            || mine && line.starts_with("    ");
        if mine {
            usage += &format!("{line}\n");
        }
    }
    let rest = HELP.split("\n\n").last().unwrap_or_default();
    Some(format!("{what}\n\nusage: ringfort img\n{usage}\nexample: ringfort img {example}\n\n{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_is_told_of() {
        for (verb, what, _) in VERBS {
            let text = of(verb).expect("a verb");
            let usage = text.lines().filter(|l| l.starts_with(&format!("  {verb} "))).count();
            assert!(usage == 1 && text.contains(what) && text.contains("FMT of images"), "{text}");
        }
        assert!(of("frobnicate").is_none());
    }
}
