//! The guest: the test guest with iperf3 and the byte program in a second archive behind its initramfs.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use ringfort_guest::{CpioWriter, Progress, TestGuest};

/// Connects to HOST PORT, sends a byte and waits for one back COUNT times; prints microseconds per round.
const BYTES: &str = r#"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
int main(int argc, char **argv) {
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[2])) };
    inet_pton(AF_INET, argv[1], &a.sin_addr);
    int s = socket(AF_INET, SOCK_STREAM, 0), on = 1, n = atoi(argv[3]);
    if (connect(s, (void *)&a, sizeof a)) { perror("connect"); return 1; }
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    char c = 7;
    double start = 0;
    for (int i = -n / 10; i < n; i++) {
        if (i == 0) start = now();
        if (write(s, &c, 1) != 1 || read(s, &c, 1) != 1) { perror("round"); return 1; }
    }
    printf("%.2f us\n", (now() - start) / n * 1e6);
    return 0;
}
"#;

struct Lines;

impl Progress for Lines {
    fn step(&mut self, index: usize, total: usize, what: &str) {
        eprintln!("[{index}/{total}] {what}");
    }
    fn detail(&mut self, _: &str) {}
}

/// Kernel and initramfs; the latter goes away with this value.
pub struct Guest {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub cmdline: String,
    scratch: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

impl Guest {
    /// Make it, from packages that are kept in the cache.
    pub fn ensure() -> Result<Guest, String> {
        let words = |e: ringfort_guest::GuestError| e.to_string();
        let cache = ringfort_guest::cache_dir().map_err(words)?;
        let test = ringfort_guest::ensure_test(&cache, &mut Lines).map_err(words)?;
        let debs = ringfort_guest::ensure_mirror(&cache, &["iperf3"], &mut Lines).map_err(words)?;
        let scratch = super::leftovers::folder();
        let guest = Guest {
            kernel: test.kernel.clone(),
            initrd: scratch.join("initrd"),
            cmdline: test.cmdline.clone(),
            scratch,
        };
        guest.fill(&test, &debs).map_err(|e| format!("making the guest: {e}"))?;
        Ok(guest)
    }

    fn fill(&self, test: &TestGuest, debs: &Path) -> io::Result<()> {
        let tree = self.scratch.join("tree");
        fs::create_dir_all(&tree)?;
        for entry in fs::read_dir(debs)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&tree))?;
            }
        }
        // The guest's whole file system is in its memory.
        for part in ["usr/share", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/x86_64-linux-gnu/perl-base"] {
            let _ = fs::remove_dir_all(tree.join(part));
        }
        let source = self.scratch.join("bytes.c");
        fs::write(&source, BYTES)?;
        run(Command::new("gcc").args(["-O2", "-static", "-o"]).arg(tree.join("usr/bin/bytes")).arg(&source))?;
        let mut out = File::create(&self.initrd)?;
        out.write_all(&fs::read(&test.initrd)?)?;
        // Archives begin at a multiple of four bytes; zeroes before are passed over.
        let pad = out.metadata()?.len().next_multiple_of(4) - out.metadata()?.len();
        out.write_all(&vec![0; pad as usize])?;
        let mut archive = CpioWriter::new(BufWriter::new(out));
        add(&mut archive, &tree, "")?;
        archive.finish()?.flush()?;
        fs::remove_dir_all(&tree)
    }
}

fn run(command: &mut Command) -> io::Result<()> {
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    Err(io::Error::other(format!("{:?}: {}", command.get_program(), said.trim())))
}

fn add(archive: &mut CpioWriter<BufWriter<File>>, dir: &Path, name: &str) -> io::Result<()> {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<io::Result<_>>()?;
    entries.sort();
    for path in entries {
        let Some(file) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let name = if name.is_empty() { file.to_owned() } else { format!("{name}/{file}") };
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            archive.dir(&name, 0o755)?;
            add(archive, &path, &name)?;
        } else if meta.is_symlink() {
            archive.symlink(&name, &fs::read_link(&path)?.to_string_lossy())?;
        } else if meta.is_file() {
            archive.file(&name, meta.permissions().mode() & 0o777, &fs::read(&path)?)?;
        }
    }
    Ok(())
}
