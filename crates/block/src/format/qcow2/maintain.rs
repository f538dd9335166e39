//! What the image tool does to an image as a whole: its backing file's name, emptying it, preallocation.

use super::Qcow2;
use super::header::AUTOCLEAR_RAW_DATA;
use super::meta::{COPIED, Entry, OFFSET, Pending};
use super::table::damaged;
use crate::{BlockBackend, SharedSlice};
use std::io;

/// How much of a new piece of disk gets its place at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing: places are given out at the first write.
    #[default]
    Off,
    /// The tables; the data's place stays a hole in the file.
    Metadata,
    /// As `Metadata`, and the host reserves the data's space.
    Falloc,
    /// As `Metadata`, and the data is written as zeroes.
    Full,
}

impl Preallocation {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

impl std::str::FromStr for Preallocation {
    type Err = ();
    fn from_str(s: &str) -> Result<Preallocation, ()> {
        use Preallocation::{Falloc, Full, Metadata, Off};
        [Off, Metadata, Falloc, Full].into_iter().find(|p| p.name() == s).ok_or(())
    }
}

/// Clusters given out in one step.
const RUN: u64 = 1 << 16;
/// Zeroes written in one step.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

impl Qcow2 {
    /// Name another backing file in the header. The open image goes on with the one that it has.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when the names do not fit into the header; the host's.
    pub fn set_backing_name(&self, name: Option<&str>, format: Option<&str>) -> io::Result<()> {
        self.writable()?;
        self.commit()?;
        let mut m = self.meta();
        if name.is_some() && m.header.autoclear & AUTOCLEAR_RAW_DATA != 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "an image whose data file is to be readable by itself cannot have a backing file",
            ));
        }
        let mut h = m.header.clone();
        h.backing = name.map(String::from);
        h.backing_format = name.and(format).map(String::from);
        h.write(&self.file)?;
        m.header = h;
        drop(m);
        self.file.sync()
    }

    /// Let go of everything that the active layer holds: the disk reads as its backing file again. No request may run
    /// meanwhile.
    ///
    /// # Errors
    /// The host's, or what is damaged.
    pub fn make_empty(&self) -> io::Result<()> {
        self.writable()?;
        self.commit()?;
        {
            let mut m = self.meta();
            let (cluster, words) = (self.shape.cluster, m.header.l2_words());
            for i in 0..m.l1.len() {
                let entry = m.l1[i];
                if entry & OFFSET == 0 {
                    continue;
                }
                let mut gone: Vec<Pending> = vec![((entry & OFFSET) / cluster, 1)];
                let descs: Vec<u64> = match m.table(i as u64, &self.file)? {
                    Some(t) => (0..(cluster / 8) as usize / words).map(|e| t.word(e * words)).collect(),
                    None => Vec::new(),
                };
                for desc in descs {
                    if let Some((first, n)) = m.clusters_of(Entry { desc, bitmap: 0 }) {
                        match gone.last_mut() {
                            Some((f, k)) if *f + *k == first => *k += n,
                            _ => gone.push((first, n)),
                        }
                    }
                }
                m.pending.extend(gone);
                m.l2.remove(i as u64);
                m.l1[i] = 0;
                m.l1_dirty.insert(i);
            }
            m.packed = None;
        }
        self.commit()?;
        self.commit()?;
        if let Some(d) = &self.data {
            d.discard(0, d.len())?;
        }
        self.cut_tail()
    }

    /// Make the file end behind its last cluster in use.
    ///
    /// # Errors
    /// The host's.
    pub fn cut_tail(&self) -> io::Result<()> {
        self.commit()?;
        let mut m = self.meta();
        let cluster = self.shape.cluster;
        let mut end = m.fresh.max(self.file.len()).div_ceil(cluster);
        while end > 1 && m.refcount(end - 1, &self.file)? == 0 {
            end -= 1;
        }
        if end * cluster < self.file.len() {
            match self.file.resize(end * cluster) {
                // A block device keeps its size.
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Give the disk from `from` to `to` (both on cluster boundaries, or the disk's end) its place in the file.
    ///
    /// With a backing file this needs subclusters: others would hide what is below.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] as said above; the host's.
    pub fn preallocate(&self, from: u64, to: u64, how: Preallocation) -> io::Result<()> {
        self.writable()?;
        if how == Preallocation::Off || from >= to {
            return Ok(());
        }
        let wide = self.shape.subs > 1;
        if self.header().backing.is_some() && !wide {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
            ));
        }
        let cluster = self.shape.cluster;
        let (mut g, end) = (from / cluster, to.div_ceil(cluster));
        let mut runs: Vec<(u64, u64)> = Vec::new();
        while g < end {
            let mut m = self.meta();
            let old = m.entry(g, &self.file)?;
            if old.desc != 0 || old.bitmap != 0 {
                g += 1;
                continue;
            }
            let mut n = 1;
            while g + n < end && n < RUN && m.entry(g + n, &self.file)? == Entry::default() {
                n += 1;
            }
            let first = if self.shape.external {
                g
            } else {
                let (first, got) = m.alloc(n, &self.file)?;
                m.take_fresh(first, got);
                n = got;
                first
            };
            for i in 0..n {
                let desc = ((first + i) * cluster) | COPIED;
                m.set_entry(g + i, Entry { desc, bitmap: 0 }, &self.file)?;
            }
            match runs.last_mut() {
                Some((f, k)) if *f + *k == first => *k += n,
                _ => runs.push((first, n)),
            }
            g += n;
            self.note(&m);
            drop(m);
            self.settle()?;
        }
        self.commit()?;
        let file = self.data_file();
        let (ends, limit) = (runs.iter().map(|(f, n)| (f + n) * cluster).max().unwrap_or(0), self.size());
        let whole = if self.shape.external { ends.min(limit) } else { ends };
        match how {
            Preallocation::Off => {}
            Preallocation::Metadata => {
                if file.len() < whole {
                    file.resize(whole)?;
                }
            }
            Preallocation::Falloc => file.reserve(whole)?,
            Preallocation::Full => {
                for (first, n) in runs {
                    let mut at = first * cluster;
                    let stop = ((first + n) * cluster).min(whole);
                    while at < stop {
                        let len = (stop - at).min(ZEROES.len() as u64);
                        file.write(&[SharedSlice::new(&ZEROES[..len as usize])], at)?;
                        at += len;
                    }
                }
            }
        }
        Ok(())
    }

    /// The same image as it was at the snapshot named `key`, or with that ID. Only for an image opened for reading.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`], or what is damaged.
    pub fn into_snapshot(self, key: &str) -> io::Result<Qcow2> {
        if !self.read_only {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let list = self.snapshots()?;
        let s = &list[Qcow2::find_snapshot(&list, key)?];
        let size = s.disk_size.next_multiple_of(crate::SECTOR_SIZE);
        {
            let mut m = self.meta();
            let mut l1 = self.snapshot_l1(s)?;
            let needed = m.header.l1_needed(size);
            if needed > super::header::MAX_L1 {
                return Err(damaged("the size of the snapshot is out of range".into()));
            }
            l1.resize(l1.len().max(needed as usize), 0);
            m.l1 = l1;
            m.header.size = size;
            m.l2.clear();
        }
        self.size.store(size, std::sync::atomic::Ordering::Release);
        Ok(self)
    }
}
