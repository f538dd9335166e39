//! Checking and mending: what refers to a cluster is counted anew and compared with the refcounts.

use super::Qcow2;
use super::header::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_L1, MAX_REFTABLE};
use super::meta::{COMPRESSED, COPIED, Meta, OFFSET, compressed, read_words};
use super::table::{Table, damaged, write_pieces};
use crate::SharedSliceMut;
use std::cell::Cell;
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
    index: BTreeMap<u64, usize>,
    chunks: Vec<Box<[u32]>>,
    /// The chunk used last: neighbours come one after the other.
    last: Cell<Option<(u64, usize)>>,
}

const CHUNK: u64 = 4096;

impl Counts {
    fn chunk(&self, key: u64) -> Option<usize> {
        match self.last.get() {
            Some((k, i)) if k == key => Some(i),
            _ => {
                let i = *self.index.get(&key)?;
                self.last.set(Some((key, i)));
                Some(i)
            }
        }
    }

    fn add(&mut self, c: u64, n: u32) {
        let key = c / CHUNK;
        let i = self.chunk(key).unwrap_or_else(|| {
            self.chunks.push(vec![0; CHUNK as usize].into());
            self.index.insert(key, self.chunks.len() - 1);
            self.chunks.len() - 1
        });
        let n_now = &mut self.chunks[i][(c % CHUNK) as usize];
        *n_now = n_now.saturating_add(n);
    }

    fn get(&self, c: u64) -> u64 {
        self.chunk(c / CHUNK).map_or(0, |i| u64::from(self.chunks[i][(c % CHUNK) as usize]))
    }

    /// The first cluster from `c` on whose chunk exists.
    fn next(&self, c: u64) -> Option<u64> {
        self.index.range(c / CHUNK..).next().map(|(k, _)| (k * CHUNK).max(c))
    }

    /// One more than the last cluster counted.
    fn end(&self) -> u64 {
        let last = self.index.iter().next_back().map(|(k, i)| (k, &self.chunks[*i]));
        last.map_or(0, |(k, x)| k * CHUNK + x.iter().rposition(|n| *n != 0).map_or(0, |p| p as u64 + 1))
    }
}

/// Counts references and notes those that cannot be.
struct Counter<'a> {
    counts: Counts,
    report: &'a mut Report,
    cluster: u64,
    /// Clusters in the file.
    clusters: u64,
}

impl Counter<'_> {
    /// `weight` references to everything in a range of the file.
    fn range(&mut self, offset: u64, len: u64, weight: u32, what: &str) {
        let (first, end) = (offset / self.cluster, offset.saturating_add(len).div_ceil(self.cluster));
        if len > 0 && (first >= self.clusters || end > self.clusters) {
            self.report.corrupt(format!("{what} at offset {offset:#x} lies outside the image file"));
            return;
        }
        (first..end).for_each(|c| self.counts.add(c, weight));
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
    fn count(&self, report: &mut Report, refcounts: bool) -> io::Result<Counts> {
        let cluster = self.shape.cluster;
        let h = self.header();
        let clusters = self.file.len().div_ceil(cluster);
        let mut c = Counter { counts: Counts::default(), report, cluster, clusters };
        c.range(0, cluster, 1, "header");
        c.range(h.l1_offset, u64::from(h.l1_size) * 8, 1, "L1 table");
        if refcounts {
            let len = u64::from(h.reftable_clusters) * cluster;
            c.range(h.reftable_offset, len, 1, "refcount table");
            match read_words(&self.file, h.reftable_offset, (len.min(MAX_REFTABLE) / 8) as usize) {
                Ok(table) => {
                    for (i, e) in table.iter().enumerate().filter(|e| *e.1 != 0) {
                        if e % cluster != 0 {
                            c.report.corrupt(format!(
                                "refcount block {i} is not cluster aligned; refcount table entry corrupted"
                            ));
                        } else {
                            c.range(*e, cluster, 1, "refcount block");
                        }
                    }
                }
                Err(_) => c.report.check_errors += 1,
            }
        }
        let active = read_words(&self.file, h.l1_offset, h.l1_size as usize)?;
        // How often each L2 table is named: its content is counted once, with that weight.
        let mut tables: BTreeMap<u64, u32> = BTreeMap::new();
        let mut name_tables = |c: &mut Counter<'_>, l1: &[u64]| {
            for entry in l1.iter().copied().filter(|e| e & OFFSET != 0) {
                let at = entry & OFFSET;
                if at.is_multiple_of(cluster) {
                    let n = tables.entry(at).or_default();
                    *n = n.saturating_add(1);
                } else {
                    c.report.corrupt(format!(
                        "L2 table at offset {at:#x}: not cluster aligned; L1 entry corrupted"
                    ));
                }
            }
        };
        name_tables(&mut c, &active);
        if h.snapshots > 0 {
            match self.read_snapshots(&h) {
                Ok((list, len)) => {
                    c.range(h.snapshots_offset, len, 1, "snapshot table");
                    let mut all = 0;
                    for s in &list {
                        let (at, size) = s.l1();
                        all += u64::from(size) * 8;
                        if u64::from(size) > MAX_L1 || !at.is_multiple_of(cluster) || all > self.file.len() {
                            c.report.corrupt(format!(
                                "snapshot {} ({}): its L1 table is out of range",
                                s.id, s.name
                            ));
                            continue;
                        }
                        c.range(at, u64::from(size) * 8, 1, "snapshot L1 table");
                        if let Ok(l1) = read_words(&self.file, at, size as usize) {
                            name_tables(&mut c, &l1);
                        }
                    }
                }
                Err(e) => {
                    c.report.check_errors += 1;
                    c.report.say(format!("ERROR {e}"));
                }
            }
        }
        if let Err(e) = self.count_bitmaps(&mut c) {
            c.report.corrupt(e.to_string());
        }
        let mut bytes = vec![0; cluster as usize];
        for at in active.iter().map(|e| e & OFFSET).filter(|at| *at != 0) {
            if let Some(weight) = tables.remove(&at) {
                self.count_table(at, weight, true, &mut bytes, &mut c)?;
            }
        }
        for (at, weight) in tables {
            self.count_table(at, weight, false, &mut bytes, &mut c)?;
        }
        c.report.total_clusters = h.size.div_ceil(cluster);
        Ok(c.counts)
    }

    /// Count an L2 table that `weight` L1 entries name, and what it names.
    fn count_table(
        &self,
        at: u64,
        weight: u32,
        active: bool,
        bytes: &mut [u8],
        c: &mut Counter<'_>,
    ) -> io::Result<()> {
        let cluster = self.shape.cluster;
        c.range(at, cluster, weight, "L2 table");
        if at.saturating_add(cluster) > self.file.len() {
            return Ok(());
        }
        self.file.read(&[SharedSliceMut::new(bytes)], at)?;
        let step = if self.shape.subs > 1 { 16 } else { 8 };
        let mut next = None;
        for word in bytes.chunks_exact(step) {
            let desc = word[..8].try_into().map_or(0, u64::from_be_bytes);
            if desc != 0 {
                self.count_entry(desc, weight, active, &mut next, c);
            }
        }
        Ok(())
    }

    fn count_entry(&self, desc: u64, weight: u32, active: bool, next: &mut Option<u64>, c: &mut Counter<'_>) {
        let cluster = self.shape.cluster;
        if desc & COMPRESSED != 0 {
            let (at, len) = compressed(desc, cluster.trailing_zeros());
            if desc & COPIED != 0 {
                c.report.corrupt(format!(
                    "cluster {}: copied flag must never be set for compressed clusters",
                    at / cluster
                ));
            }
            // The last sector may reach over the file's end.
            let len = len.min((c.clusters * cluster).saturating_sub(at)).max(1);
            c.range(at, len, weight, "compressed cluster");
            if active {
                c.report.compressed_clusters += 1;
                c.report.allocated_clusters += 1;
                c.report.fragmented_clusters += 1;
            }
            return;
        }
        let at = desc & OFFSET;
        if self.shape.external {
            c.report.allocated_clusters += u64::from(active && desc & COPIED != 0);
            return;
        }
        if at == 0 {
            return;
        }
        if !at.is_multiple_of(cluster) {
            c.report.corrupt(format!("offset={at:x}: Cluster is not properly aligned; L2 entry corrupted."));
            return;
        }
        let n = at / cluster;
        if n < c.clusters {
            c.counts.add(n, weight);
        } else {
            c.range(at, cluster, weight, "data cluster");
        }
        if active {
            c.report.allocated_clusters += 1;
            c.report.fragmented_clusters += u64::from(next.is_some_and(|n| n != at));
            *next = Some(at + cluster);
        }
    }

    /// Persistent bitmaps: a directory of tables of clusters.
    fn count_bitmaps(&self, c: &mut Counter<'_>) -> io::Result<()> {
        let Some((at, len)) = self.bitmap_directory_place()? else { return Ok(()) };
        c.range(at, len, 1, "bitmap directory");
        let mut all = 0;
        for b in self.bitmaps()? {
            let (table, size) = b.table();
            all += u64::from(size) * 8;
            if all > self.file.len() {
                return Err(damaged("the bitmaps' tables are too large".into()));
            }
            c.range(table, u64::from(size) * 8, 1, "bitmap table");
            for word in read_words(&self.file, table, size as usize).unwrap_or_default() {
                if word & OFFSET != 0 {
                    c.range(word & OFFSET, self.shape.cluster, 1, "bitmap data");
                }
            }
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
        let before = (r.leaks, r.corruptions);
        let (per, order) = (m.header.refblock_entries(), m.header.refcount_order);
        let mut broken = false;
        let mut have = Vec::new();
        let mut block = 0;
        loop {
            // The next block that exists or should.
            let named =
                m.reftable.iter().skip(block as usize).position(|e| *e != 0).map(|p| block + p as u64);
            let counted = counts.next(block * per).map(|c| c / per);
            let Some(b) = named.into_iter().chain(counted).min() else { break };
            block = b + 1;
            let offset = m.reftable.get(b as usize).map_or(0, |e| *e & !0x1ff);
            for start in (0..per).step_by(CHUNK as usize) {
                let n = (per - start).min(CHUNK);
                let first = b * per + start;
                have.clear();
                if offset != 0 && !broken {
                    match m.refblocks.load(b, offset, self.shape.cluster, &self.file) {
                        Ok(t) => have.extend((start..start + n).map(|i| t.refcount(i as usize, order))),
                        Err(_) => {
                            r.corrupt(format!("refcount block {b} cannot be read"));
                            broken = true;
                        }
                    }
                }
                have.resize(n as usize, 0);
                if have.iter().all(|n| *n == 0) && counts.next(first).is_none_or(|c| c >= first + n) {
                    continue;
                }
                for (c, &have) in (first..).zip(&have) {
                    if have > 0 {
                        r.image_end = (c + 1) * self.shape.cluster;
                    }
                    let want = counts.get(c);
                    if have != want {
                        broken |= self.differ(&mut m, c, have, want, broken, r, repair)?;
                    }
                }
            }
        }
        // Where all counts are right, or were put right, what was counted is what they say.
        let known = (before == (r.leaks, r.corruptions)).then_some(counts);
        // Wrong counts are no measure: once they are rebuilt the flags are looked at again.
        self.compare_flags(&mut m, known, r, if broken { Repair::None } else { repair })?;
        Ok(broken)
    }

    /// A refcount that is wrong; `true` when it cannot be mended in place.
    #[allow(clippy::too_many_arguments, reason = "all of them describe one cluster")]
    fn differ(
        &self,
        m: &mut Meta,
        c: u64,
        have: u64,
        want: u64,
        broken: bool,
        r: &mut Report,
        repair: Repair,
    ) -> io::Result<bool> {
        if have > want {
            r.leaks += 1;
            r.say(format!("Leaked cluster {c} refcount={have} reference={want}"));
            if repair != Repair::None && !broken {
                m.set_refcount(c, want, &self.file)?;
                m.free_hint = m.free_hint.min(c);
                r.leaks_fixed += 1;
            }
            return Ok(false);
        }
        if broken {
            return Ok(false);
        }
        r.corrupt(format!("cluster {c} refcount={have} reference={want}"));
        let block = c / m.header.refblock_entries();
        if repair == Repair::All
            && m.reftable.get(block as usize).is_some_and(|e| *e != 0)
            && want <= m.max_refcount()
        {
            m.set_refcount(c, want, &self.file)?;
            r.corruptions_fixed += 1;
            return Ok(false);
        }
        Ok(true)
    }

    /// The flag "refcount is one" of the active tables; `known` holds the refcounts if they are right.
    fn compare_flags(
        &self,
        m: &mut Meta,
        known: Option<&Counts>,
        r: &mut Report,
        repair: Repair,
    ) -> io::Result<()> {
        // Refcounts that were too high and are mended may leave flags behind that fit the old ones: safe to mend if all else
        // is right (as in QEMU).
        let mend = match repair {
            Repair::None => false,
            Repair::Leaks => r.corruptions == 0 && r.check_errors == 0 && r.leaks == r.leaks_fixed,
            Repair::All => true,
        };
        let words = m.header.l2_words();
        let cluster = self.shape.cluster;
        // A count that cannot be read is reported already.
        let count = |m: &mut Meta, c: u64| match known {
            Some(k) => k.get(c),
            None => m.refcount(c, &self.file).unwrap_or(1),
        };
        let mut descs: Vec<u64> = Vec::new();
        for i in 0..m.l1.len() {
            let entry = m.l1[i];
            let at = entry & OFFSET;
            if at == 0 || !at.is_multiple_of(cluster) {
                continue;
            }
            let refcount = count(m, at / cluster);
            if (refcount == 1) != (entry & COPIED != 0) {
                r.corrupt(format!(
                    "OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x} refcount={refcount}"
                ));
                if mend {
                    m.l1[i] = entry ^ COPIED;
                    m.l1_dirty.insert(i);
                    r.corruptions_fixed += 1;
                }
            }
            descs.clear();
            if let Ok(Some(t)) = m.table(i as u64, &self.file) {
                descs.extend((0..(cluster / 8) as usize / words).map(|e| t.word(e * words)));
            }
            for (e, &desc) in descs.iter().enumerate() {
                let at = desc & OFFSET;
                if self.shape.external || desc & COMPRESSED != 0 || at == 0 || !at.is_multiple_of(cluster) {
                    continue;
                }
                let refcount = count(m, at / cluster);
                if (refcount == 1) == (desc & COPIED != 0) {
                    continue;
                }
                r.corrupt(format!("OFLAG_COPIED data cluster: l2_entry={desc:x} refcount={refcount}"));
                if let (true, Ok(Some(table))) = (mend, m.table(i as u64, &self.file)) {
                    table.set_word(e * words, desc ^ COPIED);
                    r.corruptions_fixed += 1;
                }
            }
        }
        Ok(())
    }

    fn rebuild(&self, r: &mut Report) -> io::Result<()> {
        let after = self.rebuild_refcounts(None)?;
        r.leaks_fixed = r.leaks;
        r.corruptions_fixed = r.corruptions.saturating_sub(after.corruptions - after.corruptions_fixed);
        Ok(())
    }

    /// Write new refcount structures behind everything else, and name them in the header; with refcounts of
    /// `1 << order` bits, or as wide as before. Gives what a check finds afterwards.
    pub(super) fn rebuild_refcounts(&self, order: Option<u32>) -> io::Result<Report> {
        self.commit().or_else(|e| if e.kind() == io::ErrorKind::InvalidData { Ok(()) } else { Err(e) })?;
        let counts = self.count(&mut Report::default(), false)?;
        let mut m = self.meta();
        let mut header = m.header.clone();
        header.refcount_order = order.unwrap_or(header.refcount_order);
        let (cluster, per, order) = (self.shape.cluster, header.refblock_entries(), header.refcount_order);
        let most = match header.refcount_bits() {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        };
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
                if n > most {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        format!(
                            "cluster {c} is used {n} times, more than a refcount of {} bits can say",
                            1 << order
                        ),
                    ));
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
        header.reftable_offset = (start + blocks) * cluster;
        header.reftable_clusters = table as u32;
        header.write(&self.file)?;
        self.file.sync()?;
        *m = Meta::load(header, &self.file, true)?;
        drop(m);
        // What counts now.
        let mut after = Report::default();
        let counts = self.count(&mut after, true)?;
        self.compare(&counts, &mut after, Repair::All)?;
        self.commit()?;
        Ok(after)
    }
}
