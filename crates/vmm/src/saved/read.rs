//! Reading.

use super::disks::{DiskState, read_overlay};
use super::{
    CLOCKS, ClockState, DISK, MACHINE, MachineState, OVERLAY, Progress, RAM, Unfit, VCPU, VcpuState, check,
};
use crate::config::VmConfig;
use crate::error::VmmError;
use crate::machine::Machine;
use ringfort_engine::{Capabilities, CpuidTable, EngineError};
use ringfort_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use ringfort_state::{Chunk, PagesReader, Reader, Section, StateError};
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// Most sections that a state may have: far more than machines have devices.
const MAX_SECTIONS: usize = 4096;
/// Most bytes of sections.
const MAX_BYTES: usize = 256 << 20;

/// A saved state, opened: its sections are read and checked, its pages are still to come.
pub struct Saved<R: Read = BufReader<File>> {
    path: PathBuf,
    pub(super) machine: MachineState,
    pub(super) clocks: ClockState,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) disks: Vec<DiskState>,
    pub(super) sections: Vec<Section>,
    /// The configuration to go on with. It may be changed where the guest does not see it.
    pub config: VmConfig,
    pub(super) pages: PagesReader<R>,
}

impl Saved {
    /// Open the state in the file `path`.
    ///
    /// # Errors
    /// [`VmmError::State`], one line that names the file.
    pub fn open(path: &Path) -> Result<Saved, VmmError> {
        let named = |what: &dyn std::fmt::Display| VmmError::State(format!("{}: {what}", path.display()));
        // Looked at before it is opened: opening a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => named(&"no such file; name one that `ringfort run --save` wrote"),
            _ => named(&e),
        })?;
        if !kind.is_file() {
            return Err(named(&"is no regular file; name one that `ringfort run --save` wrote"));
        }
        let file = File::open(path).map_err(|e| named(&e))?;
        let saved = Saved::read(BufReader::with_capacity(1 << 20, file));
        saved.map(|s| Saved { path: path.into(), ..s }).map_err(|e| named(&e))
    }
}

fn only<T: DeserializeOwned>(
    sections: &[Section],
    (kind, newest): (&str, u32),
) -> Result<Vec<T>, StateError> {
    let mine = sections.iter().filter(|s| s.kind == kind).enumerate();
    mine.map(|(n, s)| {
        if s.instance as usize == n { s.decode(kind, newest) } else { Err(s.invalid("is out of order")) }
    })
    .collect()
}

fn one<T: DeserializeOwned>(sections: &[Section], of: (&str, u32)) -> Result<T, StateError> {
    let mut all = only(sections, of)?;
    match all.pop() {
        Some(it) if all.is_empty() => Ok(it),
        _ => Err(StateError::Missing(of.0.into())),
    }
}

impl<R: Read> Saved<R> {
    /// Read the sections.
    ///
    /// # Errors
    /// What is wrong.
    pub fn read(source: R) -> Result<Saved<R>, StateError> {
        let mut reader = Reader::new(source)?;
        let mut sections: Vec<Section> = Vec::new();
        let (mut names, mut bytes) = (BTreeSet::new(), 0);
        while let Some(s) = reader.next_section()? {
            bytes += s.body.len();
            if sections.len() >= MAX_SECTIONS || bytes > MAX_BYTES {
                return Err(StateError::Stream("has more sections than any machine".into()));
            }
            if !names.insert((s.kind.clone(), s.instance)) {
                return Err(StateError::Stream(format!("has section {} #{} twice", s.kind, s.instance)));
            }
            sections.push(s);
        }
        let machine: MachineState = one(&sections, MACHINE)?;
        let config: VmConfig = serde_json::from_str(&machine.config).map_err(|e| {
            let by = &machine.version;
            StateError::Stream(format!(
                "its configuration, written by Ringfort {by}, is not understood here: {e}"
            ))
        })?;
        let vcpus: Vec<VcpuState> = only(&sections, VCPU)?;
        let disks: Vec<DiskState> = only(&sections, DISK)?;
        let counts = [
            (vcpus.len(), config.cpus as usize),
            (machine.cpuid.len(), vcpus.len()),
            (disks.len(), config.disks.len()),
        ];
        if counts.iter().any(|(a, b)| a != b) {
            return Err(StateError::Stream(
                "its sections and its configuration contradict each other".into(),
            ));
        }
        Ok(Saved {
            path: PathBuf::new(),
            clocks: one(&sections, CLOCKS)?,
            machine,
            vcpus,
            disks,
            sections,
            config,
            pages: PagesReader::new(reader.into_inner())?,
        })
    }

    /// The file that it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn fail(&self, what: &dyn std::fmt::Display) -> VmmError {
        VmmError::State(format!("{}: {what}", self.path.display()))
    }

    /// Check that all disks are as they were; only that they are there if `changes` are allowed.
    ///
    /// # Errors
    /// [`VmmError::State`].
    pub fn check_disks(&self, changes: bool) -> Result<(), VmmError> {
        for (disk, state) in self.config.disks.iter().zip(&self.disks) {
            let state = if changes { DiskState { file: None, ..state.clone() } } else { state.clone() };
            state.check_file(disk).map_err(|e| self.fail(&format!("disk {e}")))?;
        }
        Ok(())
    }

    /// What the guest knows its machine by.
    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.machine.uuid
    }

    /// The vCPUs' CPUID tables, if `engine` can give them.
    ///
    /// # Errors
    /// [`VmmError::State`].
    pub(crate) fn cpuid(&self, engine: &str, offered: &Capabilities) -> Result<Vec<CpuidTable>, VmmError> {
        match check::cpuid(&self.machine, engine, offered) {
            Ok(tables) => Ok(tables.to_vec()),
            Err(Unfit(why)) => Err(self.fail(&why)),
        }
    }

    /// What is to be said about mitigations that the guest relies on.
    pub(crate) fn idle_mitigations(&self, engine: &str, offered: &Capabilities) -> Option<String> {
        check::idle_mitigations(&self.machine, engine, offered)
    }

    /// The frequency of the guest's TSC as it knows it, in kHz.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.machine.tsc_khz
    }
}

impl Machine {
    /// Take over a saved state: this machine was built for its configuration and has not run. It is paused afterwards.
    ///
    /// # Errors
    /// [`VmmError::State`]; the machine is not to be run then.
    pub fn load<R: Read>(&self, saved: &mut Saved<R>, progress: &mut Progress<'_>) -> Result<(), VmmError> {
        self.pause();
        self.check_sections(saved)?;
        let mut read = || self.read_pages(saved, progress);
        if let Err(e) = read() {
            return Err(saved.fail(&e));
        }
        self.clock.set(saved.clocks.machine_ns);
        // Devices first: what their interrupt controllers send on the way is overwritten by the local APICs' own state.
        self.pc.load(&saved.sections).map_err(|e| saved.fail(&e))?;
        let states: Vec<_> = saved.vcpus.iter().map(|v| v.state.clone()).collect();
        let answers = self.vcpus.with_each(move |n, vcpu| match states.get(n) {
            Some(state) => vcpu.set_state(state),
            None => Err(EngineError::State("there is none for this vCPU".into())),
        });
        for (n, answer) in answers.into_iter().enumerate() {
            answer.map_err(|e| saved.fail(&format!("vCPU {n}: {e}")))?;
        }
        self.vm.set_paravirt_clock(saved.clocks.paravirt_ns);
        Ok(())
    }

    /// The state must have a section for each device, and none for others.
    fn check_sections<R: Read>(&self, saved: &Saved<R>) -> Result<(), VmmError> {
        let own = [MACHINE.0, CLOCKS.0, VCPU.0, DISK.0];
        let here: BTreeSet<_> = self.pc.save()?.into_iter().map(|s| (s.kind, s.instance)).collect();
        let there: BTreeSet<_> = saved
            .sections
            .iter()
            .filter(|s| !own.contains(&s.kind.as_str()))
            .map(|s| (s.kind.clone(), s.instance))
            .collect();
        let other = |(kind, n): &(String, u32), who: &str| {
            let by = &saved.machine.version;
            saved.fail(&format!("is of another machine: {who} {kind} #{n:x} (written by Ringfort {by})"))
        };
        if let Some(extra) = there.difference(&here).next() {
            return Err(other(extra, "this one lacks"));
        }
        if let Some(missing) = here.difference(&there).next() {
            return Err(other(missing, "it lacks"));
        }
        for (open, state) in self.disks.iter().zip(&saved.disks) {
            if open.backend.size() != state.size {
                return Err(saved.fail(&format!(
                    "a disk has {} bytes, and had {} when the machine was saved",
                    open.backend.size(),
                    state.size
                )));
            }
        }
        Ok(())
    }

    fn read_pages<R: Read>(
        &self,
        saved: &mut Saved<R>,
        progress: &mut Progress<'_>,
    ) -> Result<(), StateError> {
        let memory = self.pc.memory();
        let total = memory.iter().map(|r| r.len()).sum::<u64>();
        let mut done = 0;
        let pages = &mut saved.pages;
        if pages.next_stream()? != Some((RAM.into(), 0)) {
            return Err(StateError::Missing("RAM".into()));
        }
        for region in memory.iter() {
            let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
            let mut at = start;
            while at < end {
                let outside = || StateError::Stream("its RAM is that of another machine".into());
                let (offset, len) = match pages.next_chunk()?.ok_or_else(outside)? {
                    Chunk::Data(offset, bytes) => {
                        memory.write_slice(bytes, GuestAddress(offset)).map_err(|_| outside())?;
                        (offset, bytes.len() as u64)
                    }
                    // Fresh RAM is zero.
                    Chunk::Zeroes(offset, len) => (offset, len),
                };
                if offset != at || len > end - at {
                    return Err(outside());
                }
                at += len;
                done += len;
                progress("restoring", done, total);
            }
        }
        if pages.next_chunk()?.is_some() {
            return Err(StateError::Stream("its RAM is that of another machine".into()));
        }
        for (n, disk) in (0..).zip(&self.disks) {
            if let Some(overlay) = &disk.overlay {
                if pages.next_stream()? != Some((OVERLAY.into(), n)) {
                    return Err(StateError::Missing(format!("what was written to disk {n}")));
                }
                read_overlay(overlay, pages, |n| {
                    done += n;
                    progress("restoring", done, total.max(done));
                })?;
            }
        }
        if let Some((name, n)) = pages.next_stream()? {
            return Err(StateError::Stream(format!("holds {name} #{n}, which this machine lacks")));
        }
        Ok(())
    }
}
