//! Writing.

use super::disks::{DiskState, write_overlay};
use super::{
    CLOCKS, ClockState, Compression, DISK, MACHINE, MachineState, OVERLAY, Progress, RAM, VCPU, VcpuState,
};
use crate::error::VmmError;
use crate::machine::Machine;
use ringfort_base::file::NewFile;
use ringfort_bus::Clock as _;
use ringfort_memory::{Bytes as _, GuestMemoryBackend as _, GuestMemoryRegion as _, PAGE_SIZE};
use ringfort_state::{MAX_CHUNK, PagesWriter, Section, StateError, Writer};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::str::FromStr;

/// Where a state is to be saved, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveTarget {
    /// The file.
    pub path: PathBuf,
    /// How pages are stored.
    pub compression: Compression,
    /// A file that has this name already is kept, and saving refused.
    pub keep_existing: bool,
}

impl FromStr for SaveTarget {
    type Err = String;

    /// `FILE[,compress=zstd|none]`.
    fn from_str(text: &str) -> Result<SaveTarget, String> {
        let (path, option) = match text.rsplit_once(",compress=") {
            Some((path, option)) => (path, Some(option)),
            None => (text, None),
        };
        let compression = match option {
            None | Some("zstd") => Compression::Zstd,
            Some("none") => Compression::None,
            Some(o) => return Err(format!("compress={o}: give zstd or none")),
        };
        if path.is_empty() {
            return Err("name a file".into());
        }
        Ok(SaveTarget { path: path.into(), compression, keep_existing: false })
    }
}

impl SaveTarget {
    /// A file that the user has not named.
    pub fn by_default(path: PathBuf) -> SaveTarget {
        SaveTarget { path, compression: Compression::default(), keep_existing: true }
    }

    /// Check, before a machine starts, that the file can be written at all. Nothing is left behind.
    ///
    /// # Errors
    /// [`VmmError::State`].
    pub fn check(&self) -> Result<(), VmmError> {
        self.begin().map(drop)
    }

    fn begin(&self) -> Result<NewFile, VmmError> {
        let fail = |why: &dyn std::fmt::Display| {
            VmmError::State(format!(
                "cannot save to {}: {why}; name another file with --save",
                self.path.display()
            ))
        };
        if self.keep_existing && self.path.exists() {
            return Err(fail(&"it exists"));
        }
        NewFile::create(&self.path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => fail(&"its folder does not exist"),
            _ => fail(&e),
        })
    }
}

/// Write `bytes`, which belong at `offset`, page by page: runs of zero pages as such.
pub(super) fn runs<W: Write>(
    pages: &mut PagesWriter<W>,
    offset: u64,
    bytes: &[u8],
) -> Result<(), StateError> {
    let page = PAGE_SIZE as usize;
    let mut at = 0;
    while at < bytes.len() {
        let zero = is_zero(&bytes[at..(at + page).min(bytes.len())]);
        let mut end = (at + page).min(bytes.len());
        while end < bytes.len() && is_zero(&bytes[end..(end + page).min(bytes.len())]) == zero {
            end = (end + page).min(bytes.len());
        }
        let place = offset + at as u64;
        if zero {
            pages.zeroes(place, (end - at) as u64)?;
        } else {
            for (n, part) in bytes[at..end].chunks(MAX_CHUNK).enumerate() {
                pages.data(place + (n * MAX_CHUNK) as u64, part)?;
            }
        }
        at = end;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    // Eight bytes at a time, in a form that compilers make vector code of.
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().fold(0, |all, w| all | u64::from_ne_bytes(*w)) == 0 && rest.iter().all(|&b| b == 0)
}

impl Machine {
    /// Write the whole state to `target`. The machine is paused, and stays so. On failure nothing is left behind, and a file that has
    /// the name is as it was.
    ///
    /// # Errors
    /// [`VmmError::State`]; the machine can go on.
    pub fn save(&self, target: &SaveTarget, progress: &mut Progress<'_>) -> Result<(), VmmError> {
        let mut file = BufWriter::with_capacity(1 << 20, target.begin()?);
        let fail = |e: &dyn std::fmt::Display| {
            VmmError::State(format!("cannot save to {}: {e}", target.path.display()))
        };
        self.write_state(&mut file, target.compression, progress)?;
        let file = file.into_inner().map_err(|e| fail(&e.error()))?;
        progress("flushing", 1, 1);
        file.commit().map_err(|e| fail(&e))
    }

    fn write_state(
        &self,
        sink: &mut dyn Write,
        compression: Compression,
        progress: &mut Progress<'_>,
    ) -> Result<(), VmmError> {
        let fail = |e: StateError| VmmError::State(format!("cannot save the state: {e}"));
        // Reading a vCPU settles what it has under way with memory and devices, so vCPUs come first.
        let vcpus = self.vcpus.with_each(|_, vcpu| vcpu.state());
        if vcpus.len() != self.vcpus.len() {
            return Err(VmmError::State("cannot save the state: a vCPU has failed".into()));
        }
        let mut w = Writer::new(sink).map_err(fail)?;
        w.section(&self.machine_section()).map_err(fail)?;
        let clocks = ClockState { machine_ns: self.clock.now_ns(), paravirt_ns: self.vm.paravirt_clock() };
        w.section(&Section::new(CLOCKS.0, 0, CLOCKS.1, &clocks)).map_err(fail)?;
        for ((n, state), apic_id) in (0..).zip(vcpus).zip(self.apic_ids()) {
            let vcpu = VcpuState { apic_id, state: state? };
            w.section(&Section::new(VCPU.0, n, VCPU.1, &vcpu)).map_err(fail)?;
        }
        for ((n, disk), open) in (0..).zip(&self.config.disks).zip(&self.disks) {
            let named = |e: String| VmmError::State(format!("cannot save the state: disk {e}"));
            open.backend.come_to_rest().map_err(|e| named(format!("{}: {e}", disk.path.display())))?;
            let state = DiskState::of(&disk.path, open).map_err(named)?;
            w.section(&Section::new(DISK.0, n, DISK.1, &state)).map_err(fail)?;
        }
        for section in self.pc.save()? {
            w.section(&section).map_err(fail)?;
        }
        let sink = w.finish().map_err(fail)?;
        self.write_pages(sink, compression, progress).map_err(fail)
    }

    fn machine_section(&self) -> Section {
        let config = serde_json::to_string(&self.config.settled()).unwrap_or_default();
        let state = MachineState {
            version: env!("CARGO_PKG_VERSION").into(),
            engine: self.engine.into(),
            saved_at_ns: self.clock.wall_ns(),
            config,
            uuid: self.uuid,
            tsc_khz: self.tsc_khz,
            cpuid: self.cpuid.clone(),
        };
        Section::new(MACHINE.0, 0, MACHINE.1, &state)
    }

    fn write_pages(
        &self,
        sink: &mut dyn Write,
        compression: Compression,
        progress: &mut Progress<'_>,
    ) -> Result<(), StateError> {
        let memory = self.pc.memory();
        let held = self.disks.iter().filter_map(|d| d.overlay.as_ref()).map(|o| o.held_bytes()).sum::<u64>();
        let total = memory.iter().map(|r| r.len()).sum::<u64>() + held;
        let mut done = 0;
        let mut pages = PagesWriter::new(sink, compression)?;
        pages.begin(RAM, 0)?;
        let mut buffer = vec![0; MAX_CHUNK];
        for region in memory.iter() {
            let mut at = region.start_addr();
            let mut left = region.len();
            while left > 0 {
                let n = left.min(MAX_CHUNK as u64) as usize;
                let part = &mut buffer[..n];
                memory.read_slice(part, at).map_err(|e| StateError::Stream(format!("guest memory: {e}")))?;
                runs(&mut pages, at.0, part)?;
                at.0 += n as u64;
                left -= n as u64;
                done += n as u64;
                progress("saving", done, total);
            }
        }
        pages.end()?;
        for (n, disk) in (0..).zip(&self.disks) {
            if let Some(overlay) = &disk.overlay {
                pages.begin(OVERLAY, n)?;
                write_overlay(overlay, &mut pages, |n| {
                    done += n;
                    progress("saving", done, total);
                })?;
                pages.end()?;
            }
        }
        pages.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfort_state::{Chunk, PagesReader};

    #[test]
    fn zero_pages_are_found_and_everything_else_arrives() {
        let mut bytes = vec![0; 16 * 4096 + 100];
        for page in [1, 2, 5, 15] {
            bytes[page * 4096 + page] = 1;
        }
        let mut w = PagesWriter::new(Vec::new(), Compression::None).unwrap();
        w.begin("x", 0).unwrap();
        runs(&mut w, 1 << 30, &bytes).unwrap();
        w.end().unwrap();
        let file = w.finish().unwrap();
        assert!(file.len() < 5 * 4096);
        let mut r = PagesReader::new(&file[..]).unwrap();
        r.next_stream().unwrap().unwrap();
        let mut out = Vec::new();
        while let Some(c) = r.next_chunk().unwrap() {
            let at = out.len() as u64 + (1 << 30);
            match c {
                Chunk::Data(o, b) => {
                    assert_eq!(o, at);
                    out.extend_from_slice(b);
                }
                Chunk::Zeroes(o, n) => {
                    assert_eq!(o, at);
                    out.resize(out.len() + n as usize, 0);
                }
            }
        }
        assert_eq!(out, bytes);
    }

    #[test]
    fn targets() {
        let t: SaveTarget = "a,b".parse().unwrap();
        assert_eq!((t.path, t.compression), ("a,b".into(), Compression::Zstd));
        let t: SaveTarget = "f,compress=none".parse().unwrap();
        assert_eq!((t.path, t.compression), ("f".into(), Compression::None));
        assert!("f,compress=lzma".parse::<SaveTarget>().is_err());
        assert!("".parse::<SaveTarget>().is_err());
    }
}
