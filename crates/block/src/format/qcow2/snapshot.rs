//! Internal snapshots: a table of L1 tables, whose clusters the active one shares by refcount.

use super::Qcow2;
use super::header::MAX_SNAPSHOTS;
use super::meta::{COMPRESSED, COPIED, Entry, Meta, OFFSET, read_words, words_to_bytes};
use super::table::{damaged, write_pieces};
use crate::{SharedSlice, SharedSliceMut};
use std::io;
use std::sync::atomic::Ordering;

/// Largest snapshot table read, in bytes.
const MAX_TABLE: u64 = 64 << 20;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// The disk's size then.
    pub disk_size: u64,
    /// Executed instructions, if the VM counted them.
    pub icount: Option<u64>,
    l1_offset: u64,
    l1_size: u32,
    /// Extra data behind the fields known here.
    extra: Vec<u8>,
}

impl Snapshot {
    /// Where its L1 table is, and its entries.
    pub(super) fn l1(&self) -> (u64, u32) {
        (self.l1_offset, self.l1_size)
    }

    fn to_bytes(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&(self.id.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&(24 + self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&self.disk_size.to_be_bytes());
        out.extend_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Read a snapshot table of `count` entries; also gives its length in bytes.
pub(super) fn parse_table(table: &[u8], count: u32, disk_size: u64) -> io::Result<(Vec<Snapshot>, u64)> {
    let bad = || damaged("its snapshot table is cut short".into());
    let mut list = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let field = |skip: usize, n: usize| {
            let from = at.checked_add(skip)?;
            table.get(from..from.checked_add(n)?)
        };
        let num = |skip, n| {
            field(skip, n).map(|b| b.iter().fold(0u64, |v, &x| v << 8 | u64::from(x))).ok_or_else(bad)
        };
        let (id_len, name_len) = (num(12, 2)? as usize, num(14, 2)? as usize);
        let extra_len = num(36, 4)? as usize;
        if extra_len > 1024 {
            return Err(damaged("a snapshot has too much extra data".into()));
        }
        let extra = |skip: usize| if extra_len >= skip + 8 { num(40 + skip, 8).map(Some) } else { Ok(None) };
        let text = |skip, n| field(skip, n).map(|b| String::from_utf8_lossy(b).into_owned()).ok_or_else(bad);
        list.push(Snapshot {
            l1_offset: num(0, 8)?,
            l1_size: num(8, 4)? as u32,
            date_sec: num(16, 4)? as u32,
            date_nsec: num(20, 4)? as u32,
            vm_clock_nsec: num(24, 8)?,
            vm_state_size: extra(0)?.unwrap_or(num(32, 4)?),
            disk_size: extra(8)?.unwrap_or(disk_size),
            icount: extra(16)?.filter(|i| *i != u64::MAX),
            extra: field(40 + 24.min(extra_len), extra_len.saturating_sub(24)).ok_or_else(bad)?.to_vec(),
            id: text(40 + extra_len, id_len)?,
            name: text(40 + extra_len + id_len, name_len)?,
        });
        at = (at + 40 + extra_len + id_len + name_len).next_multiple_of(8);
    }
    Ok((list, at as u64))
}

/// The runs of clusters that an L2 table's entries name, in their order: the first and how many.
fn runs(m: &Meta, table: &[u64], words: usize) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (first, n) in table.chunks_exact(words).filter_map(|w| m.clusters_of(Entry { desc: w[0], bitmap: 0 }))
    {
        match runs.last_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += n,
            _ => runs.push((first, n)),
        }
    }
    runs
}

impl Qcow2 {
    /// The snapshots.
    ///
    /// # Errors
    /// The host's, or what is damaged.
    pub fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        self.read_snapshots(&self.header()).map(|x| x.0)
    }

    pub(super) fn read_snapshots(&self, h: &super::Header) -> io::Result<(Vec<Snapshot>, u64)> {
        if h.snapshots == 0 {
            return Ok((Vec::new(), 0));
        }
        let len = self.file.len().saturating_sub(h.snapshots_offset).min(MAX_TABLE);
        let mut table = vec![0; len as usize];
        self.file.read(&[SharedSliceMut::new(&mut table)], h.snapshots_offset)?;
        parse_table(&table, h.snapshots, h.size)
    }

    /// Add `delta` to the refcounts of everything below an L1 table: L2 tables and data.
    fn adjust_tree(&self, m: &mut Meta, l1: &[u64], delta: i64) -> io::Result<()> {
        let (cluster, words) = (self.shape.cluster, m.header.l2_words());
        for entry in l1.iter().map(|e| e & OFFSET).filter(|o| *o != 0) {
            let table = read_words(&self.file, entry, (cluster / 8) as usize)?;
            for (first, n) in runs(m, &table, words) {
                m.adjust(first, n, delta, &self.file)?;
            }
            m.adjust(entry / cluster, 1, delta, &self.file)?;
        }
        Ok(())
    }

    /// Make the "may be written in place" flags of the active tables say what the refcounts say.
    pub(super) fn mend_flags(&self, m: &mut Meta) -> io::Result<()> {
        let words = m.header.l2_words();
        for i in 0..m.l1.len() {
            let entry = m.l1[i];
            if entry & OFFSET == 0 {
                continue;
            }
            let alone = m.refcount((entry & OFFSET) / self.shape.cluster, &self.file)? == 1;
            let right = entry & !COPIED | if alone { COPIED } else { 0 };
            if right != entry {
                m.l1[i] = right;
                m.l1_dirty.insert(i);
            }
            // The entries that can have the flag, then their clusters' refcounts, a run at a time.
            let Some(t) = m.table(i as u64, &self.file)? else { continue };
            let count = (self.shape.cluster / 8) as usize / words;
            let entries: Vec<(usize, u64)> = (0..count)
                .map(|e| (e * words, t.word(e * words)))
                .filter(|(_, desc)| desc & COMPRESSED == 0 && desc & OFFSET != 0 && !self.shape.external)
                .collect();
            let mut alone = Vec::with_capacity(entries.len());
            let place = |(_, desc): &(usize, u64)| (desc & OFFSET) / self.shape.cluster;
            for run in entries.chunk_by(|a, b| place(a) + 1 == place(b)) {
                m.refcounts(place(&run[0]), run.len() as u64, &self.file, |n| alone.push(n == 1))?;
            }
            let Some(t) = m.table(i as u64, &self.file)? else { continue };
            for ((word, desc), alone) in entries.into_iter().zip(alone) {
                let right = desc & !COPIED | if alone { COPIED } else { 0 };
                if right != desc {
                    t.set_word(word, right);
                }
            }
            self.note(m);
        }
        Ok(())
    }

    /// Write a new snapshot table and name it in the header; the old one's place becomes free.
    fn replace_snapshots(&self, list: &[Snapshot], old_len: u64) -> io::Result<()> {
        let cluster = self.shape.cluster;
        let mut bytes = Vec::new();
        list.iter().for_each(|s| s.to_bytes(&mut bytes));
        let clusters = (bytes.len() as u64).div_ceil(cluster);
        let first = if clusters > 0 { self.meta().alloc_run(clusters, &self.file)? } else { 0 };
        bytes.resize((clusters * cluster) as usize, 0);
        self.file.write(&[SharedSlice::new(&bytes)], first * cluster)?;
        self.commit()?;
        let mut m = self.meta();
        let old = (m.header.snapshots_offset / cluster, old_len.div_ceil(cluster));
        m.header.snapshots_offset = first * cluster;
        m.header.snapshots = list.len() as u32;
        m.header.write(&self.file)?;
        self.file.sync()?;
        if old.1 > 0 {
            m.pending.push(old);
        }
        Ok(())
    }

    fn snapshots_allowed(&self) -> io::Result<()> {
        self.writable()?;
        if self.shape.external {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "an image with an external data file cannot have internal snapshots",
            ));
        }
        Ok(())
    }

    /// Make a snapshot of the present content. No request may run meanwhile.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] when refcounts are too narrow or the data lies in another file; the host's.
    pub fn snapshot_create(&self, name: &str, date: std::time::Duration) -> io::Result<()> {
        self.snapshots_allowed()?;
        self.commit()?;
        let header = self.header();
        let (mut list, old_len) = self.read_snapshots(&header)?;
        let highest = self.highest_share()?;
        if list.len() as u32 >= MAX_SNAPSHOTS || highest >= self.meta().max_refcount() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "no further snapshot fits: the refcounts are too narrow (create the image with a larger refcount_bits)",
            ));
        }
        let id = list.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0) + 1;
        let cluster = self.shape.cluster;
        let l1_offset;
        {
            let _alone = self.gate.alone();
            let mut m = self.meta();
            let l1: Vec<u64> = m.l1.iter().map(|e| e & !COPIED).collect();
            let mut bytes = words_to_bytes(&l1);
            let clusters = (bytes.len() as u64).div_ceil(cluster).max(1);
            bytes.resize((clusters * cluster) as usize, 0);
            l1_offset = m.alloc_run(clusters, &self.file)? * cluster;
            write_pieces(&self.file, &[(l1_offset, bytes)])?;
            self.adjust_tree(&mut m, &l1, 1)?;
            self.mend_flags(&mut m)?;
        }
        list.push(Snapshot {
            id: id.to_string(),
            name: name.into(),
            date_sec: date.as_secs() as u32,
            date_nsec: date.subsec_nanos(),
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: header.size,
            icount: None,
            l1_offset,
            l1_size: header.l1_size,
            extra: Vec::new(),
        });
        self.replace_snapshots(&list, old_len)?;
        self.commit()?;
        self.commit()
    }

    /// The largest refcount of a cluster that the active tables name.
    fn highest_share(&self) -> io::Result<u64> {
        let mut m = self.meta();
        let (cluster, words) = (self.shape.cluster, m.header.l2_words());
        let mut highest = 0;
        for entry in m.l1.clone().iter().map(|e| e & OFFSET).filter(|o| *o != 0) {
            highest = highest.max(m.refcount(entry / cluster, &self.file)?);
            let table = read_words(&self.file, entry, (cluster / 8) as usize)?;
            for (first, n) in runs(&m, &table, words) {
                m.refcounts(first, n, &self.file, |count| highest = highest.max(count))?;
            }
        }
        Ok(highest)
    }

    pub(super) fn find_snapshot(list: &[Snapshot], key: &str) -> io::Result<usize> {
        let by_name = list.iter().position(|s| s.name == key);
        by_name
            .or_else(|| list.iter().position(|s| s.id == key))
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no snapshot {key:?}")))
    }

    pub(super) fn snapshot_l1(&self, s: &Snapshot) -> io::Result<Vec<u64>> {
        if u64::from(s.l1_size) > super::header::MAX_L1 || !s.l1_offset.is_multiple_of(self.shape.cluster) {
            return Err(damaged(format!("the L1 table of snapshot {:?} is out of range", s.name)));
        }
        read_words(&self.file, s.l1_offset, s.l1_size as usize)
    }

    /// Delete the snapshot named `key`, or with that ID. No request may run meanwhile.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`], or the host's.
    pub fn snapshot_delete(&self, key: &str) -> io::Result<()> {
        self.snapshots_allowed()?;
        self.commit()?;
        let (mut list, old_len) = self.read_snapshots(&self.header())?;
        let gone = list.remove(Qcow2::find_snapshot(&list, key)?);
        let l1 = self.snapshot_l1(&gone)?;
        self.replace_snapshots(&list, old_len)?;
        {
            let _alone = self.gate.alone();
            let mut m = self.meta();
            self.adjust_tree(&mut m, &l1, -1)?;
            let clusters = (l1.len() as u64 * 8).div_ceil(self.shape.cluster).max(1);
            m.adjust(gone.l1_offset / self.shape.cluster, clusters, -1, &self.file)?;
            self.mend_flags(&mut m)?;
        }
        self.unpacked.clear();
        self.commit_lowered()?;
        self.commit()
    }

    /// Make the disk what it was at the snapshot named `key`, or with that ID. No request may run meanwhile.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`], or the host's.
    pub fn snapshot_apply(&self, key: &str) -> io::Result<()> {
        self.snapshots_allowed()?;
        self.commit()?;
        let header = self.header();
        let (list, _) = self.read_snapshots(&header)?;
        let s = &list[Qcow2::find_snapshot(&list, key)?];
        if s.disk_size != header.size && !self.bitmaps()?.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the snapshot is of another size than the image's bitmaps: remove them first",
            ));
        }
        self.record(0, header.size)?;
        let mut l1: Vec<u64> = self.snapshot_l1(s)?.iter().map(|e| e & !COPIED).collect();
        let cluster = self.shape.cluster;
        let needed = header.l1_needed(s.disk_size).max(u64::from(header.l1_size));
        if needed > super::header::MAX_L1 {
            return Err(damaged("the size of the snapshot is out of range".into()));
        }
        l1.resize((needed as usize).max(l1.len()), 0);
        let place;
        {
            let mut m = self.meta();
            self.adjust_tree(&mut m, &l1, 1)?;
            let mut bytes = words_to_bytes(&l1);
            let clusters = (bytes.len() as u64).div_ceil(cluster).max(1);
            bytes.resize((clusters * cluster) as usize, 0);
            place = m.alloc_run(clusters, &self.file)? * cluster;
            write_pieces(&self.file, &[(place, bytes)])?;
        }
        // All that the new table names is counted on disk before the header names it.
        self.commit()?;
        {
            let _alone = self.gate.alone();
            let mut m = self.meta();
            let old = std::mem::replace(&mut m.l1, l1);
            let (old_at, old_len) = (m.header.l1_offset, (old.len() as u64 * 8).div_ceil(cluster).max(1));
            m.header.l1_offset = place;
            m.header.l1_size = m.l1.len() as u32;
            m.header.size = s.disk_size;
            m.header.write(&self.file)?;
            self.file.sync()?;
            m.l2.clear();
            self.adjust_tree(&mut m, &old, -1)?;
            m.adjust(old_at / cluster, old_len, -1, &self.file)?;
            self.mend_flags(&mut m)?;
            m.packed = None;
        }
        self.unpacked.clear();
        self.size.store(s.disk_size.next_multiple_of(crate::SECTOR_SIZE), Ordering::Release);
        self.commit_lowered()?;
        self.commit()
    }
}
