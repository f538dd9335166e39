//! What is measured: the rows, their targets, and the guest that holds their programs.

use ringfort_guest::{Program, Userland};

/// What a row must reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// So many times as fast as QEMU's TCG.
    Tcg(f64),
    /// At most so many times as slow as the host itself.
    Native(f64),
    /// Two vCPUs do at least so many times the work of one in the same time.
    Scale(f64),
}

/// How a row is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A shell script in the bench guest, after another that prepares it.
    Script {
        /// Not timed.
        prepare: &'static str,
        /// Timed, unless it says itself how long it took.
        run: &'static str,
    },
    /// A boot of the test guest to its first program.
    Boot,
    /// A boot of the default guest to its login prompt.
    Login,
    /// The named row on two vCPUs at once, and alone.
    Parallel(&'static str),
}

/// A row.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Short name, for `--rows`.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// What it must reach.
    pub target: Target,
    /// How it is run.
    pub kind: Kind,
}

const fn script(
    name: &'static str,
    title: &'static str,
    target: Target,
    prepare: &'static str,
    run: &'static str,
) -> Row {
    Row { name, title, target, kind: Kind::Script { prepare, run } }
}

const fn special(name: &'static str, title: &'static str, target: Target, kind: Kind) -> Row {
    Row { name, title, target, kind }
}

use Target::{Native, Scale, Tcg};

const SPEED_SHA256: &str = "openssl speed -mr -seconds 2 -bytes 16384 -evp sha256 2>/dev/null |
    awk -F: '/^.F:/ { printf \"@rate %.6f\\n\", 1e8 / $4 }'";
const SPEED_AES: &str = "openssl speed -mr -seconds 2 -bytes 16384 -evp aes-128-gcm 2>/dev/null |
    awk -F: '/^.F:/ { printf \"@rate %.6f\\n\", 1e8 / $4 }'";

/// All rows.
pub const ROWS: &[Row] = &[
    script("xorshift", "integer loop in registers (xorshift)", Native(1.15), "", "exec compute xorshift"),
    script("qsort", "qsort of 1 M ints", Tcg(2.0), "", "exec compute qsort"),
    script("crc", "CRC by table", Tcg(2.0), "", "exec compute crc"),
    script("xz", "xz of 700 kB of text", Tcg(1.8), "generate text 700000 >xz.in", "xz -6 -c xz.in | cksum"),
    script(
        "bzip2",
        "bzip2 of 2 MB of text",
        Tcg(1.8),
        "generate text 2000000 >bzip2.in",
        "bzip2 -c bzip2.in | cksum",
    ),
    script(
        "gzip",
        "gzip of 4 MB of text",
        Tcg(1.8),
        "generate text 4000000 >gzip.in",
        "gzip -n -c gzip.in | cksum",
    ),
    script("sqlite", "sqlite in memory", Tcg(4.0), "", "sqlite3 :memory: </bench/script.sql"),
    script(
        "python",
        "python3 script (dicts, strings, big ints)",
        Tcg(4.0),
        "",
        "python3 -I /bench/script.py",
    ),
    script("perl", "perl script (hashes, regular expressions)", Tcg(4.0), "", "perl /bench/script.pl"),
    script(
        "gcc",
        "gcc -O2 of 5,000 lines of C",
        Tcg(4.0),
        "generate c >gcc.c",
        "gcc-12 -O2 -c -o gcc.o gcc.c && cksum <gcc.o",
    ),
    script(
        "sort",
        "sort | uniq -c | sort -n pipeline",
        Tcg(4.0),
        "generate lines 60000 >sort.in",
        "LC_ALL=C sort sort.in | uniq -c | LC_ALL=C sort -k1,1nr -k2 | head -n 20",
    ),
    script("processes", "shell script that starts 300 processes", Tcg(4.0), "", "sh /bench/processes.sh"),
    script("fib", "recursive calls (fib)", Tcg(3.0), "", "exec compute fib"),
    script("indirect", "indirect calls through a table", Tcg(2.0), "", "exec compute indirect"),
    script("matmul", "double matmul", Tcg(12.0), "", "exec compute matmul"),
    script("nbody", "n-body (SSE2)", Tcg(12.0), "", "exec compute nbody"),
    script("avx2", "AVX2 kernel", Tcg(12.0), "", "exec compute avx2"),
    script("memcpy", "memcpy of 4 MiB by libc", Tcg(10.0), "", "exec system memcpy"),
    script("memset", "memset of 4 MiB by libc", Tcg(10.0), "", "exec system memset"),
    script("movsb", "REP MOVSB of 64 KiB", Tcg(40.0), "", "exec system movsb"),
    script("stosb", "REP STOSB of 64 KiB", Tcg(40.0), "", "exec system stosb"),
    script("sha256", "openssl speed sha256 (per 100 MB)", Tcg(8.0), "", SPEED_SHA256),
    script("aes-gcm", "openssl speed aes-128-gcm (per 100 MB)", Tcg(8.0), "", SPEED_AES),
    script("chase-4m", "random pointer chase over 4 MiB", Tcg(3.0), "", "exec system chase-4m"),
    script("chase-256m", "random pointer chase over 256 MiB", Tcg(1.5), "", "exec system chase-256m"),
    script("getppid", "getppid loop", Tcg(2.0), "", "exec system getppid"),
    script("faults", "4 KiB faults on fresh memory", Tcg(2.0), "", "exec system faults"),
    script("fork", "fork + exit", Tcg(2.0), "", "exec system fork"),
    script("exec", "fork + exec", Tcg(2.0), "", "exec system exec"),
    script("mmap", "mmap + munmap", Tcg(2.0), "", "exec system mmap"),
    script(
        "dd",
        "dd through the page cache",
        Tcg(2.0),
        "dd if=/dev/zero of=dd.in bs=64k count=512",
        "for i in 1 2 3 4; do dd if=dd.in of=dd.out bs=16k 2>/dev/null; done; cksum <dd.out",
    ),
    script(
        "tar",
        "tar of a source tree",
        Tcg(2.0),
        "rm -rf tree; generate tree tree 1500",
        "tar --sort=name --mtime=@0 --owner=0 --group=0 -cf tree.tar tree && cksum <tree.tar",
    ),
    script("ping-pong", "pipe ping-pong between two processes", Tcg(3.0), "", "exec system ping-pong"),
    special("boot", "Debian cloud kernel to init", Tcg(2.0), Kind::Boot),
    special("login", "full Debian disk to login", Tcg(2.0), Kind::Login),
    special("2x-xorshift", "two vCPUs against one: xorshift", Scale(1.8), Kind::Parallel("xorshift")),
    special("2x-qsort", "two vCPUs against one: qsort", Scale(1.8), Kind::Parallel("qsort")),
    special("2x-crc", "two vCPUs against one: CRC", Scale(1.8), Kind::Parallel("crc")),
];

/// What the script of the parallel row of `row` says: the time of the slower of two, each on its vCPU.
fn parallel(row: &str) -> String {
    format!(
        "taskset -c 0 compute {row} >a &\ntaskset -c 1 compute {row} >b\nwait\ncat a b | grep -v @\n\
         cat a b | awk '/^@time/ && $2 > t {{ t = $2 }} END {{ print \"@time\", t }}'\n"
    )
}

const PACKAGES: [&str; 10] =
    ["sqlite3", "python3", "perl", "gcc-12", "xz-utils", "bzip2", "gzip", "openssl", "tar", "mawk"];

/// Parts of these packages that no row needs; the guest's whole file system is in memory.
const EXCLUDED: [&str; 14] = [
    "/usr/lib/gcc/x86_64-linux-gnu/12/lto1",
    "/usr/lib/gcc/x86_64-linux-gnu/12/lto-wrapper",
    "/usr/lib/gcc/x86_64-linux-gnu/12/lib?san*",
    "/usr/lib/gcc/x86_64-linux-gnu/12/libgcov*",
    "/usr/lib/gcc/x86_64-linux-gnu/12/plugin*",
    "/usr/lib/x86_64-linux-gnu/lib?san.so*",
    "/usr/lib/x86_64-linux-gnu/libasan*",
    "/usr/lib/x86_64-linux-gnu/libubsan*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
    "/usr/bin/x86_64-linux-gnu-dwp",
    "/usr/bin/x86_64-linux-gnu-gold",
    "/usr/bin/x86_64-linux-gnu-lto-dump*",
    "/usr/bin/x86_64-linux-gnu-gcov*",
    "/usr/share/zoneinfo/*",
];

/// The files of the bench guest beyond its packages; made anew when one changes.
pub struct Content {
    scripts: Vec<(String, String)>,
}

impl Content {
    /// The scripts of all rows.
    pub fn new() -> Self {
        let mut scripts = Vec::new();
        for row in ROWS {
            match row.kind {
                Kind::Script { prepare, run } => {
                    scripts.push((format!("bench/rows/{}.sh", row.name), format!("{run}\n")));
                    if !prepare.is_empty() {
                        scripts.push((format!("bench/rows/{}.prep", row.name), format!("{prepare}\n")));
                    }
                }
                Kind::Parallel(of) => scripts.push((format!("bench/rows/{}.sh", row.name), parallel(of))),
                Kind::Boot | Kind::Login => {}
            }
        }
        Self { scripts }
    }

    /// Call `with` on the description of the guest.
    pub fn describe<R>(&self, with: impl FnOnce(&Userland<'_>) -> R) -> R {
        let program = |path, source| Program { path, source, flags: FLAGS };
        let mut files: Vec<(&str, u32, &[u8])> =
            self.scripts.iter().map(|(path, text)| (path.as_str(), 0o644, text.as_bytes())).collect();
        files.extend([
            ("bench/script.py", 0o644, include_bytes!("../workloads/script.py").as_slice()),
            ("bench/script.pl", 0o644, include_bytes!("../workloads/script.pl")),
            ("bench/script.sql", 0o644, include_bytes!("../workloads/script.sql")),
            ("bench/processes.sh", 0o644, include_bytes!("../workloads/processes.sh")),
        ]);
        with(&Userland {
            name: "bench",
            packages: &PACKAGES,
            excluded: &EXCLUDED,
            programs: &[
                program("init", include_str!("../workloads/run.c")),
                program("bench/run", include_str!("../workloads/run.c")),
                program("bench/compute", include_str!("../workloads/compute.c")),
                program("bench/system", include_str!("../workloads/system.c")),
                program("bench/generate", include_str!("../workloads/generate.c")),
            ],
            headers: &[("common.h", include_str!("../workloads/common.h"))],
            files: &files,
        })
    }
}

const FLAGS: &[&str] = &["-fno-math-errno", "-Wall", "-Wextra"];

/// Rows whose name matches one of the comma-separated patterns, in which `*` stands for anything; none: all.
pub fn select(patterns: Option<&str>) -> Result<Vec<Row>, String> {
    let Some(patterns) = patterns else { return Ok(ROWS.to_vec()) };
    let patterns: Vec<&str> = patterns.split(',').filter(|p| !p.is_empty()).collect();
    if let Some(unknown) = patterns.iter().find(|p| !ROWS.iter().any(|r| matches(p, r.name))) {
        return Err(format!("no row is named {unknown:?}; --list shows them"));
    }
    Ok(ROWS.iter().filter(|r| patterns.iter().any(|p| matches(p, r.name))).copied().collect())
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|tail| {
            (0..=tail.len()).any(|at| tail.is_char_boundary(at) && matches(rest, &tail[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_pattern() {
        assert!(matches("mem*", "memcpy") && matches("*", "x") && matches("2x-*c", "2x-crc"));
        assert!(!matches("mem", "memcpy") && !matches("*x", "xz"));
        let names = |p| select(Some(p)).map(|rows| rows.iter().map(|r| r.name).collect::<Vec<_>>());
        assert_eq!(names("fib,chase-*"), Ok(vec!["fib", "chase-4m", "chase-256m"]));
        assert!(names("fib,nothing").is_err_and(|e| e.contains("nothing")));
        assert_eq!(select(None).map(|r| r.len()), Ok(ROWS.len()));
    }

    #[test]
    fn rows_are_sound() {
        let names: std::collections::BTreeSet<_> = ROWS.iter().map(|r| r.name).collect();
        assert_eq!(names.len(), ROWS.len());
        for row in ROWS {
            if let Kind::Parallel(of) = row.kind {
                assert!(names.contains(of) && matches!(row.target, Target::Scale(_)), "{}", row.name);
            }
        }
        // The list of rows goes onto the kernel's command line.
        assert!(names.iter().map(|n| n.len() + 1).sum::<usize>() < 1500);
    }
}
