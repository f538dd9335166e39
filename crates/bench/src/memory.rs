//! Memory of a process, from `/proc` (proc(5)).

use serde::Serialize;

/// Memory of a VMM, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Most that was resident at any time so far.
    pub peak: u64,
    /// Resident now, outside the mappings that hold the guest's RAM.
    pub beyond_guest: u64,
}

/// Memory of process `pid`, whose guest has `ram` bytes.
pub fn of(pid: u32, ram: u64) -> Option<Memory> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    Some(Memory { peak: kib_field(&status, "VmHWM:")?, beyond_guest: beyond_guest(&smaps, ram) })
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|l| l.strip_prefix(name))?;
    value.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// A line of `smaps`: where it is, what of it is resident, and inode with whether it is executable.
struct Piece<'a> {
    start: u64,
    end: u64,
    resident: u64,
    kind: (&'a str, bool),
}

/// Sum of the resident sizes of all mappings but those of the guest's RAM. That is one mapping of its very size, or adjoining pieces of
/// one that differ in their flags (as a guest's RAM with a protected page does) and have that size together; never code. Where the kernel
/// has made one mapping of it and of what lies next to it, all of that is taken for RAM.
fn beyond_guest(smaps: &str, ram: u64) -> u64 {
    let mut pieces: Vec<Piece> = Vec::new();
    for line in smaps.lines() {
        if let Some((start, end, kind)) = header(line) {
            pieces.push(Piece { start, end, resident: 0, kind });
        } else if let (Some(kib), Some(last)) = (kib_field(line, "Rss:"), pieces.last_mut()) {
            last.resident += kib;
        }
    }
    let together = |a: &Piece, b: &Piece| a.end == b.start && a.kind == b.kind;
    let resident = |pieces: &[Piece]| pieces.iter().map(|p| p.resident).sum::<u64>();
    for first in 0..pieces.len() {
        let run = pieces[first..].chunk_by(together).next().unwrap_or_default();
        if let Some(last) = run.iter().position(|p| p.end - run[0].start == ram) {
            return resident(&pieces) - resident(&run[..=last]);
        }
    }
    let near = |run: &&[Piece]| run.last().map_or(0, |l| l.end) - run[0].start < ram / 10 * 9;
    pieces.chunk_by(together).filter(near).map(resident).sum()
}

/// Start, end, and inode with whether it is executable, from a line such as `7f00-7f01 rw-p 00000000 00:00 0 [heap]`.
fn header(line: &str) -> Option<(u64, u64, (&str, bool))> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let executable = fields.next()?.contains('x');
    let inode = fields.nth(2)?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?, (inode, executable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 77 /usr/bin/vmm\nSize: 1024 kB\nRss: 600 kB\n\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0 \nRss: 1000 kB\n\
7f0010000000-7f0010001000 r--p 00000000 00:00 0 \nRss: 4 kB\n\
7f0010001000-7f0020000000 rw-p 00000000 00:00 0 \nRss: 2000 kB\n\
7f0020000000-7f0020100000 rwxp 00000000 00:00 0 \nRss: 100 kB\n\
7f0030000000-7f0030100000 rw-p 00000000 00:00 0 \nRss: 40 kB\nPss: 9 kB\n";
        assert_eq!(beyond_guest(smaps, 512 << 20), 740 << 10);
        // What lies next to it, another mapping to the kernel, is not the guest's.
        let next = smaps.replace("7f0030000000-7f0030100000", "7effffff0000-7f0000000000");
        assert_eq!(beyond_guest(&next, 512 << 20), 740 << 10);
        // One mapping of it and of more.
        let wider = smaps.replace("7f0010001000-7f0020000000", "7f0010001000-7f0020200000");
        assert_eq!(beyond_guest(&wider, 512 << 20), 740 << 10);
        assert_eq!(beyond_guest("", 512 << 20), 0);
        assert_eq!(header("Rss:  12 kB"), None);
    }

    #[test]
    fn this_process_has_memory() {
        let m = of(std::process::id(), 1 << 40).expect("own memory");
        assert!(m.peak > 0 && m.beyond_guest > 0 && m.beyond_guest <= m.peak + (16 << 20));
        assert_eq!(of(u32::MAX, 1), None);
    }
}
