//! Checking and mending: what refers to a cluster is counted anew and compared with the refcounts.

use super::Qcow2;
use super::header::{EXT_BITMAPS, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_L1, MAX_REFTABLE};
use super::meta::{COMPRESSED, COPIED, Meta, OFFSET, read_words};
use super::table::{Table, damaged, write_pieces};
use crate::SharedSliceMut;
use std::collections::BTreeMap;
use std::io;

/// What to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Clusters that are counted but not used.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Errors in the metadata that can lose data.
    pub corruptions: u64,
    /// Clusters counted but not used.
    pub leaks: u64,
    /// Mended errors.
    pub corruptions_fixed: u64,
    /// Mended leaks.
    pub leaks_fixed: u64,
    /// Tables that cannot be examined.
    pub check_errors: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters with data.
    pub allocated_clusters: u64,
    /// Clusters that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
    /// End of the last cluster in use.
    pub image_end: u64,
    /// What is wrong, line by line (the first thousand).
    pub lines: Vec<String>,
}

impl Report {
    fn corrupt(&mut self, line: String) {
        self.corruptions += 1;
        self.say(format!("ERROR {line}"));
    }

    fn say(&mut self, line: String) {
        if self.lines.len() < 1000 {
            self.lines.push(line);
        }
    }
}

/// Counts by cluster, in chunks that are made when something refers to them: a sparse file costs nothing.
#[derive(Default)]
struct Counts {
    chunks: BTreeMap<u64, Box<[u32]>>,
}

const CHUNK: u64 = 4096;

impl Counts {
    fn add(&mut self, c: u64) {
        let chunk = self.chunks.entry(c / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
        let n = &mut chunk[(c % CHUNK) as usize];
        *n = n.saturating_add(1);
    }

    fn get(&self, c: u64) -> u64 {
        self.chunks.get(&(c / CHUNK)).map_or(0, |x| u64::from(x[(c % CHUNK) as usize]))
    }

    /// One more than the last cluster counted.
    fn end(&self) -> u64 {
        let last = self.chunks.iter().next_back();
        last.map_or(0, |(k, x)| k * CHUNK + x.iter().rposition(|n| *n != 0).map_or(0, |p| p as u64 + 1))
    }
}

impl Qcow2 {
    /// Check the metadata, and mend what `repair` says. No request may run meanwhile.
    ///
    /// # Errors
    /// The host's. What is damaged stands in the report.
    pub fn check(&self, repair: Repair) -> io::Result<Report> {
        if repair != Repair::None {
            self.writable()?;
        }
        if !self.read_only {
            self.commit()?;
        }
        let mut report = Report::default();
        let counts = self.count(&mut report, true)?;
        let broken = self.compare(&counts, &mut report, repair)?;
        if repair == Repair::All && (report.corruptions > report.corruptions_fixed || broken) {
            self.rebuild(&mut report)?;
        }
        if repair != Repair::None {
            let mut m = self.meta();
            let stays = report.corruptions > report.corruptions_fixed || report.check_errors > 0;
            if !stays && m.header.incompatible & (INCOMPAT_CORRUPT | INCOMPAT_DIRTY) != 0 {
                drop(m);
                self.commit()?;
                m = self.meta();
                m.header.incompatible &= !(INCOMPAT_CORRUPT | INCOMPAT_DIRTY);
                m.header.write(&self.file)?;
            }
            drop(m);
            self.commit()?;
        }
        report.image_end = report.image_end.max(counts.end().max(1) * self.shape.cluster);
        Ok(report)
    }

    /// After a crash with lazy refcounts.
    pub(super) fn repair_in_place(&self, repair: Repair) -> io::Result<()> {
        let report = self.check(repair)?;
        if report.corruptions > report.corruptions_fixed {
            return Err(damaged(format!("{} errors", report.corruptions - report.corruptions_fixed)));
        }
        Ok(())
    }

    /// Count all references; with or without the refcount structures themselves.
    fn count(&self, r: &mut Report, refcounts: bool) -> io::Result<Counts> {
        let cluster = self.shape.cluster;
        let h = self.header();
        let mut counts = Counts::default();
        let clusters = self.file.len().div_ceil(cluster);
        let mut range = |r: &mut Report, offset: u64, len: u64, what: &str| {
            if len > 0
                && (offset / cluster >= clusters || offset.saturating_add(len).div_ceil(cluster) > clusters)
            {
                r.corrupt(format!("{what} at offset {offset:#x} lies outside the image file"));
                return;
            }
            for c in offset / cluster..(offset + len).div_ceil(cluster) {
                counts.add(c);
            }
        };
        range(r, 0, cluster, "header");
        range(r, h.l1_offset, u64::from(h.l1_size) * 8, "L1 table");
        if refcounts {
            let len = u64::from(h.reftable_clusters) * cluster;
            range(r, h.reftable_offset, len, "refcount table");
            match read_words(&self.file, h.reftable_offset, (len.min(MAX_REFTABLE) / 8) as usize) {
                Ok(table) => {
                    for (i, e) in table.iter().enumerate().filter(|e| *e.1 != 0) {
                        if e % cluster != 0 {
                            r.corrupt(format!(
                                "refcount block {i} is not cluster aligned; refcount table entry corrupted"
                            ));
                        } else {
                            range(r, *e, cluster, "refcount block");
                        }
                    }
                }
                Err(_) => r.check_errors += 1,
            }
        }
        let mut trees = vec![(read_words(&self.file, h.l1_offset, h.l1_size as usize)?, true)];
        if h.snapshots > 0 {
            match self.read_snapshots(&h) {
                Ok((list, len)) => {
                    range(r, h.snapshots_offset, len, "snapshot table");
                    for s in &list {
                        let (at, size) = s.l1();
                        if u64::from(size) > MAX_L1 || !at.is_multiple_of(cluster) {
                            r.corrupt(format!(
                                "snapshot {} ({}): its L1 table is out of range",
                                s.id, s.name
                            ));
                            continue;
                        }
                        range(r, at, u64::from(size) * 8, "snapshot L1 table");
                        if let Ok(l1) = read_words(&self.file, at, size as usize) {
                            trees.push((l1, false));
                        }
                    }
                }
                Err(e) => {
                    r.check_errors += 1;
                    r.say(format!("ERROR {e}"));
                }
            }
        }
        self.count_bitmaps(&h, r, &mut range)?;
        let m_shape = { self.meta().header.clone() };
        for (l1, active) in &trees {
            for entry in l1.iter().copied().filter(|e| e & OFFSET != 0) {
                let at = entry & OFFSET;
                if !at.is_multiple_of(cluster) {
                    r.corrupt(format!("L2 table at offset {at:#x}: not cluster aligned; L1 entry corrupted"));
                    continue;
                }
                range(r, at, cluster, "L2 table");
                let Ok(table) = read_words(&self.file, at, (cluster / 8) as usize) else { continue };
                let mut next = None;
                for desc in table.chunks_exact(m_shape.l2_words()).map(|w| w[0]) {
                    self.count_entry(desc, *active, &mut next, r, &mut range);
                }
            }
        }
        r.total_clusters = h.size.div_ceil(cluster);
        Ok(counts)
    }

    fn count_entry(
        &self,
        desc: u64,
        active: bool,
        next: &mut Option<u64>,
        r: &mut Report,
        range: &mut impl FnMut(&mut Report, u64, u64, &str),
    ) {
        let cluster = self.shape.cluster;
        if desc & COMPRESSED != 0 {
            let (at, len) = self.meta().compressed(desc);
            if desc & COPIED != 0 {
                r.corrupt(format!(
                    "cluster {}: copied flag must never be set for compressed clusters",
                    at / cluster
                ));
            }
            // The last sector may reach over the file's end.
            let len = len.min(self.file.len().next_multiple_of(cluster).saturating_sub(at)).max(1);
            range(r, at, len, "compressed cluster");
            if active {
                (r.compressed_clusters, r.allocated_clusters) =
                    (r.compressed_clusters + 1, r.allocated_clusters + 1);
                r.fragmented_clusters += 1;
            }
            return;
        }
        let at = desc & OFFSET;
        if self.shape.external {
            r.allocated_clusters += u64::from(active && desc & COPIED != 0);
            return;
        }
        if at == 0 {
            return;
        }
        if !at.is_multiple_of(cluster) {
            r.corrupt(format!("offset={at:x}: Cluster is not properly aligned; L2 entry corrupted."));
            return;
        }
        range(r, at, cluster, "data cluster");
        if active {
            r.allocated_clusters += 1;
            r.fragmented_clusters += u64::from(next.is_some_and(|n| n != at));
            *next = Some(at + cluster);
        }
    }

    /// Persistent bitmaps: a directory of tables of clusters. They are not kept up here, but their clusters are theirs.
    fn count_bitmaps(
        &self,
        h: &super::Header,
        r: &mut Report,
        range: &mut impl FnMut(&mut Report, u64, u64, &str),
    ) -> io::Result<()> {
        let Some((_, ext)) = h.extensions.iter().find(|e| e.0 == EXT_BITMAPS) else { return Ok(()) };
        let num = |b: &[u8], at: usize, n: usize| {
            b.get(at..at + n).map(|b| b.iter().fold(0u64, |v, &x| v << 8 | u64::from(x)))
        };
        let (Some(count), Some(len), Some(at)) = (num(ext, 0, 4), num(ext, 8, 8), num(ext, 16, 8)) else {
            r.corrupt("the bitmaps extension is cut short".into());
            return Ok(());
        };
        if count > 65535 || len > 64 << 20 || at.saturating_add(len) > self.file.len() {
            r.corrupt("the bitmap directory lies outside the image".into());
            return Ok(());
        }
        range(r, at, len, "bitmap directory");
        let mut dir = vec![0; len as usize];
        self.file.read(&[SharedSliceMut::new(&mut dir)], at)?;
        let mut pos = 0;
        for _ in 0..count {
            let e = dir.get(pos..).unwrap_or(&[]);
            let (Some(table), Some(size), Some(name), Some(extra)) =
                (num(e, 0, 8), num(e, 8, 4), num(e, 18, 2), num(e, 20, 4))
            else {
                r.corrupt("the bitmap directory is cut short".into());
                break;
            };
            range(r, table, size * 8, "bitmap table");
            if let Ok(words) = read_words(&self.file, table, size.min(MAX_L1) as usize) {
                words
                    .iter()
                    .map(|w| w & OFFSET)
                    .filter(|o| *o != 0)
                    .for_each(|o| range(r, o, self.shape.cluster, "bitmap data"));
            }
            pos += (24 + name as usize + extra as usize).next_multiple_of(8);
        }
        Ok(())
    }

    /// Compare; `true` when the refcount structures cannot be mended in place.
    fn compare(&self, counts: &Counts, r: &mut Report, repair: Repair) -> io::Result<bool> {
        let mut m = self.meta();
        if self.read_only {
            let (at, n) =
                (m.header.reftable_offset, u64::from(m.header.reftable_clusters) * self.shape.cluster / 8);
            m.reftable = read_words(&self.file, at, n as usize)?;
        }
        let per = m.header.refblock_entries();
        let covered = m.reftable.iter().rposition(|e| *e != 0).map_or(0, |p| (p as u64 + 1) * per);
        let mut broken = false;
        let mut unreadable = None;
        let mut c = 0;
        let end = covered.max(counts.end());
        while c < end {
            let block = c / per;
            if m.reftable.get(block as usize).is_none_or(|e| *e == 0)
                && counts.chunks.range(c / CHUNK..=(c + per) / CHUNK).next().is_none()
            {
                c = (block + 1) * per;
                continue;
            }
            let want = counts.get(c);
            let have = match m.refcount(c, &self.file) {
                Ok(n) => n,
                Err(_) => {
                    if unreadable.replace(block) != Some(block) {
                        r.corrupt(format!("refcount block {block} cannot be read"));
                    }
                    broken = true;
                    0
                }
            };
            if have > 0 {
                r.image_end = (c + 1) * self.shape.cluster;
            }
            if have > want {
                r.leaks += 1;
                r.say(format!("Leaked cluster {c} refcount={have} reference={want}"));
                if repair != Repair::None && !broken {
                    m.set_refcount(c, want, &self.file)?;
                    m.free_hint = m.free_hint.min(c);
                    r.leaks_fixed += 1;
                }
            } else if have < want && !broken {
                r.corrupt(format!("cluster {c} refcount={have} reference={want}"));
                if repair == Repair::All
                    && m.reftable.get(block as usize).is_some_and(|e| *e != 0)
                    && want <= m.max_refcount()
                {
                    m.set_refcount(c, want, &self.file)?;
                    r.corruptions_fixed += 1;
                } else {
                    broken = true;
                }
            }
            c += 1;
        }
        // Wrong counts are no measure: once they are rebuilt the flags are looked at again.
        self.compare_flags(&mut m, r, if broken { Repair::None } else { repair })?;
        Ok(broken)
    }

    /// The flag "refcount is one" of the active tables.
    fn compare_flags(&self, m: &mut Meta, r: &mut Report, repair: Repair) -> io::Result<()> {
        let words = m.header.l2_words();
        let cluster = self.shape.cluster;
        for i in 0..m.l1.len() {
            let entry = m.l1[i];
            let at = entry & OFFSET;
            if at == 0 || !at.is_multiple_of(cluster) {
                continue;
            }
            // A count that cannot be read is reported already.
            let refcount = m.refcount(at / cluster, &self.file).unwrap_or(1);
            if (refcount == 1) != (entry & COPIED != 0) {
                r.corrupt(format!(
                    "OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x} refcount={refcount}"
                ));
                if repair == Repair::All {
                    m.l1[i] = entry ^ COPIED;
                    m.l1_dirty.insert(i);
                    r.corruptions_fixed += 1;
                }
            }
            for e in 0..(cluster / 8) as usize / words {
                let Ok(Some(table)) = m.table(i as u64, &self.file) else { break };
                let desc = table.word(e * words);
                let at = desc & OFFSET;
                if self.shape.external || desc & COMPRESSED != 0 || at == 0 || !at.is_multiple_of(cluster) {
                    continue;
                }
                let refcount = m.refcount(at / cluster, &self.file).unwrap_or(1);
                if (refcount == 1) == (desc & COPIED != 0) {
                    continue;
                }
                r.corrupt(format!("OFLAG_COPIED data cluster: l2_entry={desc:x} refcount={refcount}"));
                if let (Repair::All, Ok(Some(table))) = (repair, m.table(i as u64, &self.file)) {
                    table.set_word(e * words, desc ^ COPIED);
                    r.corruptions_fixed += 1;
                }
            }
        }
        Ok(())
    }

    /// Write new refcount structures behind everything else, and name them in the header.
    fn rebuild(&self, r: &mut Report) -> io::Result<()> {
        self.commit().or_else(|e| if e.kind() == io::ErrorKind::InvalidData { Ok(()) } else { Err(e) })?;
        let counts = self.count(&mut Report::default(), false)?;
        let mut m = self.meta();
        let (cluster, per, order) =
            (self.shape.cluster, m.header.refblock_entries(), m.header.refcount_order);
        let start = self.file.len().div_ceil(cluster).max(counts.end());
        let (mut blocks, mut table) = (1, 1);
        while blocks * per < start + blocks + table || table * cluster < blocks * 8 {
            blocks = (start + blocks + table).div_ceil(per);
            table = (blocks * 8).div_ceil(cluster);
        }
        if table * cluster > MAX_REFTABLE {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let mut reftable = vec![0u64; (table * cluster / 8) as usize];
        for b in 0..blocks {
            let mut t = Table::new((start + b) * cluster, cluster as usize);
            for i in 0..per {
                let c = b * per + i;
                let own = (start..start + blocks + table).contains(&c);
                let n = if own { 1 } else { counts.get(c) };
                if n > m.max_refcount() {
                    return Err(damaged(format!(
                        "cluster {c} is used {n} times, more than its refcount can say"
                    )));
                }
                if n != 0 {
                    t.set_refcount(i as usize, order, n);
                }
            }
            write_pieces(&self.file, &[(t.offset, t.bytes().to_vec())])?;
            reftable[b as usize] = t.offset;
        }
        write_pieces(&self.file, &[((start + blocks) * cluster, super::meta::words_to_bytes(&reftable))])?;
        self.file.sync()?;
        m.header.reftable_offset = (start + blocks) * cluster;
        m.header.reftable_clusters = table as u32;
        m.header.write(&self.file)?;
        self.file.sync()?;
        let fresh = Meta::load(m.header.clone(), &self.file, true)?;
        *m = fresh;
        drop(m);
        // What counts now.
        let mut after = Report::default();
        let counts = self.count(&mut after, true)?;
        self.compare(&counts, &mut after, Repair::All)?;
        self.commit()?;
        r.leaks_fixed = r.leaks;
        r.corruptions_fixed = r.corruptions.saturating_sub(after.corruptions - after.corruptions_fixed);
        Ok(())
    }
}
