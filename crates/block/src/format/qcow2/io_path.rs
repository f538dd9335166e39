//! Reading and writing guest data.

use super::Qcow2;
use super::extent::{Extent, ExtentKind};
use super::meta::{COMPRESSED, COPIED, Entry, Meta, OFFSET, ZERO};
use super::table::damaged;
use crate::BlockBackend as _;
use crate::{Located, SharedSlice, SharedSliceMut, scatter, slice_of, slice_of_mut, total, total_mut};
use std::io;
use std::sync::PoisonError;
use std::sync::{MutexGuard, atomic::Ordering};

/// Most guest clusters allocated in one step.
const RUN: u64 = 256;

/// What a write does with the next piece.
enum Plan {
    /// Overwrite at this host offset, that many bytes.
    InPlace(u64, u64),
    /// Give guest clusters `g..g + n` new host clusters from `host` on.
    Allocate { g: u64, n: u64, host: u64, fresh: bool },
    /// Fill unallocated subclusters of guest cluster `g`, whose host cluster is here.
    Subclusters { g: u64, host: u64, entry: Entry },
}

impl Qcow2 {
    /// Read; the caller shares the gate.
    pub(super) fn read_range(&self, bufs: &[SharedSliceMut<'_>], offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let x = self.extent_in(&mut self.meta(), offset + done, len - done)?;
            let part = slice_of_mut(bufs, done, x.len);
            self.read_extent(&x, &part)?;
            done += x.len;
        }
        Ok(())
    }

    fn read_extent(&self, x: &Extent, bufs: &[SharedSliceMut<'_>]) -> io::Result<()> {
        match x.kind {
            ExtentKind::Zero { .. } => bufs.iter().for_each(SharedSliceMut::zero),
            ExtentKind::Below => self.read_below(bufs, x.offset, x.len)?,
            ExtentKind::Data(host) => self.read_data(bufs, host, x.len)?,
            ExtentKind::Compressed(desc) => {
                let data = self.unpack(desc)?;
                let at = (x.offset % self.shape.cluster) as usize;
                scatter(bufs, &data[at..at + x.len as usize]);
            }
        }
        Ok(())
    }

    /// Read from the data file; what lies behind its end are zeroes (a cluster that was never filled).
    fn read_data(&self, bufs: &[SharedSliceMut<'_>], host: u64, len: u64) -> io::Result<()> {
        let file = self.data_file();
        let there = file.len().saturating_sub(host).min(len);
        if there == len {
            return file.read(bufs, host);
        }
        if there > 0 {
            file.read(&slice_of_mut(bufs, 0, there), host)?;
        }
        slice_of_mut(bufs, there, len - there).iter().for_each(SharedSliceMut::zero);
        Ok(())
    }

    fn read_below(&self, bufs: &[SharedSliceMut<'_>], offset: u64, len: u64) -> io::Result<()> {
        let there = self.backing.as_ref().map_or(0, |b| b.size().saturating_sub(offset).min(len));
        if there > 0
            && let Some(b) = &self.backing
        {
            b.read_at(&slice_of_mut(bufs, 0, there), offset)?;
        }
        slice_of_mut(bufs, there, len - there).iter().for_each(SharedSliceMut::zero);
        Ok(())
    }

    /// Read what is at hand; `false` if the caller would wait.
    pub(super) fn try_read_range(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        let (mut done, len) = (0, total_mut(bufs));
        while done < len {
            let found = {
                let Ok(m) = self.meta.try_lock() else { return Ok(false) };
                self.extent(offset + done, len - done, |g, last| Ok(m.run_here(g, last)))?
            };
            let Some(x) = found else { return Ok(false) };
            let part = slice_of_mut(bufs, done, x.len);
            let ready = match x.kind {
                ExtentKind::Zero { .. } => {
                    part.iter().for_each(SharedSliceMut::zero);
                    true
                }
                ExtentKind::Data(host) => {
                    host + x.len <= self.data_file().len() && self.data_file().try_read(&part, host)?
                }
                ExtentKind::Below => match &self.backing {
                    None => {
                        part.iter().for_each(SharedSliceMut::zero);
                        true
                    }
                    Some(b) => x.offset + x.len <= b.size() && b.try_read_at(&part, x.offset)?,
                },
                ExtentKind::Compressed(_) => false,
            };
            if !ready {
                return Ok(false);
            }
            done += x.len;
        }
        Ok(true)
    }

    /// Say where the bytes of a range lie, if all of it is at hand and nothing in the tables has to change; the caller
    /// shares the gate for as long as it uses the answer.
    pub(super) fn locate_range(
        &self,
        write: bool,
        offset: u64,
        len: u64,
        found: &mut Located,
    ) -> io::Result<bool> {
        let mut done = 0;
        while done < len {
            let (at, left) = (offset + done, len - done);
            let x = {
                let Ok(m) = self.meta.try_lock() else { return Ok(false) };
                let Some(x) = self.extent(at, left, |g, last| Ok(m.run_here(g, last)))? else {
                    return Ok(false);
                };
                if write {
                    let clusters = at / self.shape.cluster..=(at + x.len - 1) / self.shape.cluster;
                    let ours = |g| m.entry_here(g).is_some_and(|e| self.own(e)) && !m.inflight.contains(&g);
                    if !matches!(x.kind, ExtentKind::Data(_)) || !clusters.into_iter().all(ours) {
                        return Ok(false);
                    }
                }
                x
            };
            let there = match x.kind {
                ExtentKind::Data(host) => self.data_file().locate(write, host, x.len, found),
                ExtentKind::Zero { .. } => found.zeroes(x.len),
                ExtentKind::Below => match &self.backing {
                    None => found.zeroes(x.len),
                    Some(b) => at + x.len <= b.size() && b.locate(false, at, x.len, found)?,
                },
                ExtentKind::Compressed(_) => false,
            };
            if !there {
                return Ok(false);
            }
            done += x.len;
        }
        Ok(true)
    }

    /// Wait until nobody fills guest cluster `g`.
    fn wait_for<'a>(&self, mut m: MutexGuard<'a, Meta>, g: u64) -> MutexGuard<'a, Meta> {
        while m.inflight.contains(&g) {
            m = self.settled.wait(m).unwrap_or_else(PoisonError::into_inner);
        }
        m
    }

    /// Whether the bytes of an entry's host cluster may be overwritten.
    fn own(&self, e: Entry) -> bool {
        e.desc & COMPRESSED == 0 && e.desc & COPIED != 0 && (e.desc & OFFSET != 0 || self.shape.external)
    }

    /// Write; the caller shares the gate.
    pub(super) fn write_range(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        let (mut done, len) = (0, total(bufs));
        while done < len {
            let (at, left) = (offset + done, len - done);
            let plan = self.plan(at, left)?;
            let n = match plan {
                Plan::InPlace(_, n) => n,
                Plan::Allocate { g, n, .. } => ((g + n) * self.shape.cluster - at).min(left),
                Plan::Subclusters { g, .. } => ((g + 1) * self.shape.cluster - at).min(left),
            };
            let part = slice_of(bufs, done, n);
            match plan {
                Plan::InPlace(host, _) => self.data_file().write(&part, host)?,
                Plan::Allocate { g, n: clusters, host, fresh } => {
                    let written = self.fill_new(&part, at, n, g, clusters, host, fresh);
                    self.end_allocate(g, clusters, host, at, n, written)?;
                }
                Plan::Subclusters { g, host, entry } => {
                    let written = self.fill_subclusters(&part, at, n, g, host);
                    let mut m = self.meta();
                    let set = written.and_then(|()| {
                        let mask = self.sub_mask(at, n);
                        let bitmap = (entry.bitmap | mask) & !(mask << 32);
                        m.set_entry(g, Entry { bitmap, ..entry }, &self.file)
                    });
                    m.inflight.remove(&g);
                    self.settled.notify_all();
                    set?;
                }
            }
            done += n;
        }
        Ok(())
    }

    /// The subclusters that a range inside one cluster touches, as bits.
    fn sub_mask(&self, at: u64, n: u64) -> u64 {
        let step = self.shape.cluster / self.shape.subs;
        let first = at % self.shape.cluster / step;
        let last = (at % self.shape.cluster + n - 1) / step;
        (u64::MAX >> (63 - (last - first))) << first
    }

    /// The metadata, once nobody fills guest cluster `g`.
    pub(super) fn wait_for_cluster(&self, g: u64) -> MutexGuard<'_, Meta> {
        self.wait_for(self.meta(), g)
    }

    fn plan(&self, at: u64, left: u64) -> io::Result<Plan> {
        let cluster = self.shape.cluster;
        let g = at / cluster;
        let mut m = self.wait_for(self.meta(), g);
        let x = self.extent_in(&mut m, at, left)?;
        let entry = m.entry(g, &self.file)?;
        if self.own(entry) && !self.shape.external && entry.desc & OFFSET >= m.fresh {
            return Err(damaged(format!("a data cluster at {:#x} lies behind the end", entry.desc & OFFSET)));
        }
        if let ExtentKind::Data(host) = x.kind
            && self.own(entry)
        {
            // As far as the next clusters are just as free to be overwritten.
            let end = at + x.len;
            let mut to = ((g + 1) * cluster).min(end);
            while to < end {
                let next = m.entry(to / cluster, &self.file)?;
                if !self.own(next) || m.inflight.contains(&(to / cluster)) {
                    break;
                }
                to = (to + cluster).min(end);
            }
            return Ok(Plan::InPlace(host, to - at));
        }
        if self.own(entry) && self.shape.subs > 1 {
            m.inflight.insert(g);
            return Ok(Plan::Subclusters { g, host: entry.desc & OFFSET, entry });
        }
        let last = (at + left - 1) / cluster;
        let mut n = 1;
        while g + n <= last && n < RUN && m.place(g + n).0 == m.place(g).0 {
            let e = m.entry(g + n, &self.file)?;
            if self.own(e) && e.desc & ZERO == 0
                || self.own(e) && self.shape.subs > 1
                || m.inflight.contains(&(g + n))
            {
                break;
            }
            n += 1;
        }
        let (host, n, fresh) = if self.shape.external {
            (g * cluster, n, false)
        } else if self.own(entry) {
            // A zero cluster that kept its place.
            (entry.desc & OFFSET, 1, false)
        } else {
            // One of the following may have a place of its own.
            let mut run = 1;
            while run < n && !self.own(m.entry(g + run, &self.file)?) {
                run += 1;
            }
            let (first, n) = m.alloc(run, &self.file)?;
            let fresh = m.take_fresh(first, n);
            (first * cluster, n, fresh)
        };
        (g..g + n).for_each(|c| {
            m.inflight.insert(c);
        });
        self.note(&m);
        Ok(Plan::Allocate { g, n, host, fresh })
    }

    /// Fill new clusters: the data, and around it what was there before.
    #[allow(clippy::too_many_arguments, reason = "all of them describe one piece")]
    fn fill_new(
        &self,
        part: &[SharedSlice<'_>],
        at: u64,
        n: u64,
        g: u64,
        clusters: u64,
        host: u64,
        fresh: bool,
    ) -> io::Result<()> {
        let cluster = self.shape.cluster;
        let (mut from, mut to) = (g * cluster, (g + clusters) * cluster);
        if self.shape.subs > 1 {
            // Subclusters outside keep what they say, unless their data would be lost with the old cluster.
            let step = cluster / self.shape.subs;
            let old = |g| {
                Ok::<bool, io::Error>({
                    let e = self.meta().entry(g, &self.file)?;
                    e.desc & COMPRESSED != 0 || e.desc & OFFSET != 0
                })
            };
            if !old(g)? {
                from = at / step * step;
            }
            if !old(g + clusters - 1)? {
                to = (at + n).next_multiple_of(step);
            }
        }
        let base = host.wrapping_sub(g * cluster);
        self.carry_over(from, at, base, fresh)?;
        self.carry_over(at + n, to, base, fresh)?;
        self.data_file().write(part, at.wrapping_add(base))
    }

    /// Copy the present content of a guest range to where it will be.
    fn carry_over(&self, from: u64, to: u64, base: u64, fresh: bool) -> io::Result<()> {
        let mut at = from;
        let size = self.size.load(Ordering::Acquire);
        while at < to {
            let x = self.extent_in(&mut self.meta(), at, to - at)?;
            let target = at.wrapping_add(base);
            let zero = match x.kind {
                ExtentKind::Zero { .. } => true,
                ExtentKind::Below => at >= self.backing.as_ref().map_or(0, |b| b.size()),
                _ => false,
            };
            if zero || at >= size {
                if !fresh {
                    self.data_file().write_zeroes(target, x.len, false)?;
                }
            } else {
                let mut data = vec![0; x.len as usize];
                self.read_extent(&x, &[SharedSliceMut::new(&mut data)])?;
                self.data_file().write(&[SharedSlice::new(&data)], target)?;
            }
            at += x.len;
        }
        Ok(())
    }

    /// Fill the touched subclusters of a cluster: data, and at the edges what was there before.
    fn fill_subclusters(
        &self,
        part: &[SharedSlice<'_>],
        at: u64,
        n: u64,
        g: u64,
        host: u64,
    ) -> io::Result<()> {
        let step = self.shape.cluster / self.shape.subs;
        let base = host.wrapping_sub(g * self.shape.cluster);
        let (from, to) = (at / step * step, (at + n).next_multiple_of(step));
        // An edge that is allocated already stays as it is.
        let keep = |x: u64| {
            Ok::<bool, io::Error>({
                let e = self.meta().entry(g, &self.file)?;
                matches!(self.kind_of(e, x % self.shape.cluster)?.0, ExtentKind::Data(_))
            })
        };
        if from < at && !keep(from)? {
            self.carry_over(from, at, base, false)?;
        }
        if at + n < to && !keep(at + n)? {
            self.carry_over(at + n, to, base, false)?;
        }
        self.data_file().write(part, at.wrapping_add(base))
    }

    /// Enter new clusters into the tables, or give them back if they could not be filled.
    fn end_allocate(
        &self,
        g: u64,
        n: u64,
        host: u64,
        at: u64,
        len: u64,
        written: io::Result<()>,
    ) -> io::Result<()> {
        let cluster = self.shape.cluster;
        let mut m = self.meta();
        let mut entered = 0;
        let result = written.and_then(|()| {
            for i in 0..n {
                let old = m.entry(g + i, &self.file)?;
                let bitmap = if self.shape.subs > 1 {
                    let start = at.max((g + i) * cluster);
                    let end = (at + len).min((g + i + 1) * cluster);
                    if old.desc & (COMPRESSED | OFFSET) != 0 {
                        u64::from(u32::MAX)
                    } else {
                        let mask = self.sub_mask(start, end - start);
                        (old.bitmap | mask) & !(mask << 32)
                    }
                } else {
                    0
                };
                m.set_entry(g + i, Entry { desc: (host + i * cluster) | COPIED, bitmap }, &self.file)?;
                entered += 1;
                let same = old.desc & OFFSET == host + i * cluster && old.desc & COMPRESSED == 0;
                if let Some(p) = m.clusters_of(old).filter(|_| !same) {
                    m.pending.push(p);
                }
            }
            Ok(())
        });
        if result.is_err() && !self.shape.external {
            // What was not entered is free again; a zero cluster that kept its place still has it.
            for i in entered..n {
                let kept = m.entry(g + i, &self.file).is_ok_and(|e| e.desc & OFFSET == host + i * cluster);
                if !kept {
                    // A failure here leaks the cluster, which does no harm.
                    let _ = m.adjust(host / cluster + i, 1, -1, &self.file);
                }
            }
        }
        (g..g + n).for_each(|c| {
            m.inflight.remove(&c);
        });
        self.settled.notify_all();
        self.note(&m);
        result
    }

    /// Whole clusters inside a range: the disk's end counts as a cluster's end.
    fn whole(&self, offset: u64, len: u64) -> (u64, u64) {
        let (cluster, end) = (self.shape.cluster, offset + len);
        let first = offset.div_ceil(cluster);
        let last =
            if end == self.size.load(Ordering::Acquire) { end.div_ceil(cluster) } else { end / cluster };
        (first, last.max(first))
    }

    /// Take what guest cluster `g` holds out of the tables.
    pub(super) fn forget_cluster(&self, g: u64) -> io::Result<()> {
        self.empty_cluster(g, false, false)
    }

    pub(super) fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let (first, last) = self.whole(offset, len);
        let below = self.backing.is_some();
        if below && self.shape.version < 3 {
            // There is no way to say "zeroes" without a cluster, and what is below must not be seen again.
            return Ok(());
        }
        self.empty_clusters(first, last, below, false)
    }

    /// [`empty_cluster`](Self::empty_cluster) for `first..last`; what no table describes is not gone through.
    fn empty_clusters(&self, first: u64, last: u64, marked: bool, keep: bool) -> io::Result<()> {
        let mut g = first;
        while g < last {
            let holds_nothing = if marked { 0 } else { self.meta().untouched(g, last - 1) };
            if holds_nothing == 0 {
                self.empty_cluster(g, marked, keep)?;
            }
            g += holds_nothing.max(1);
        }
        Ok(())
    }

    /// Make a cluster hold nothing: it reads as zeroes, by a mark if `marked`.
    fn empty_cluster(&self, g: u64, marked: bool, keep: bool) -> io::Result<()> {
        let mut m = self.wait_for(self.meta(), g);
        let old = m.entry(g, &self.file)?;
        let wide = self.shape.subs > 1;
        let plain = if !marked {
            Entry::default()
        } else if wide {
            Entry { desc: 0, bitmap: u64::from(u32::MAX) << 32 }
        } else {
            Entry { desc: ZERO, bitmap: 0 }
        };
        let new = if (keep || self.shape.external) && self.own(old) {
            Entry { desc: old.desc & !ZERO | if wide { 0 } else { ZERO }, bitmap: plain_zero(wide) }
        } else {
            plain
        };
        if new == old || (old == Entry::default() && !marked) {
            return Ok(());
        }
        if let Some(d) = &self.data {
            // A data file may be used as a raw image as well.
            let at = g * self.shape.cluster;
            d.write_zeroes(at, self.shape.cluster.min(d.len().saturating_sub(at)), !keep)?;
        }
        m.set_entry(g, new, &self.file)?;
        if (new.desc & OFFSET != old.desc & OFFSET || old.desc & COMPRESSED != 0)
            && let Some(p) = m.clusters_of(old)
        {
            m.pending.push(p);
        }
        self.note(&m);
        Ok(())
    }

    pub(super) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        let (first, last) = self.whole(offset, len);
        let cluster = self.shape.cluster;
        let below = self.backing.is_some();
        // Version 2 has no mark: without a backing file an unallocated cluster is as good.
        if self.shape.version < 3 && (below || !unmap) {
            return self.write_zero_bytes(offset, end);
        }
        if first >= last {
            return self.write_zero_bytes(offset, end);
        }
        self.write_zero_bytes(offset, (first * cluster).min(end))?;
        self.empty_clusters(first, last, below || self.shape.version >= 3 && !unmap, !unmap)?;
        if last * cluster < end {
            self.write_zero_bytes(last * cluster, end)?;
        }
        Ok(())
    }

    /// Zeroes as data, where the range does not read so already.
    fn write_zero_bytes(&self, from: u64, to: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut at = from;
        while at < to {
            let x = self.extent_in(&mut self.meta(), at, (to - at).min(ZEROES.len() as u64))?;
            let reads_zero = match x.kind {
                ExtentKind::Zero { .. } => true,
                ExtentKind::Below => at >= self.backing.as_ref().map_or(0, |b| b.size()),
                _ => false,
            };
            if !reads_zero {
                self.write_range(&[SharedSlice::new(&ZEROES[..x.len as usize])], at)?;
            }
            at += x.len;
        }
        Ok(())
    }

    /// Change the disk's size.
    pub(super) fn resize_to(&self, size: u64) -> io::Result<()> {
        if !size.is_multiple_of(512) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let old = self.size.load(Ordering::Acquire);
        if self.header().snapshots > 0 && (size < old || self.shape.version < 3) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the image has internal snapshots: delete them first",
            ));
        }
        if size < old {
            // Clusters that go away become free; the rest of the last one must read as zeroes if the disk grows again.
            let edge = size.next_multiple_of(self.shape.cluster).min(old);
            let gate = self.gate.share();
            if size < edge {
                self.zero_range(size, edge - size, false)?;
            }
            let cluster = self.shape.cluster;
            self.empty_clusters(edge / cluster, old.div_ceil(cluster), false, false)?;
            drop(gate);
            self.size.store(size, Ordering::Release);
            self.commit()?;
        }
        {
            let _one = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
            let _alone = self.gate.alone();
            let mut m = self.meta();
            let needed = m.header.l1_needed(size);
            if needed > super::header::MAX_L1 {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "too large for the image's cluster size",
                ));
            }
            if needed > m.l1.len() as u64 {
                self.grow_l1(&mut m, needed)?;
            }
            m.header.size = size;
            if let Some(d) = &self.data
                && m.header.autoclear & super::header::AUTOCLEAR_RAW_DATA != 0
            {
                d.resize(size)?;
            }
            m.header.write(&self.file)?;
            self.file.sync()?;
        }
        self.size.store(size, Ordering::Release);
        // Nothing of a longer backing file may come to light.
        let below = self.backing.as_ref().map_or(0, |b| b.size()).min(size);
        if below > old {
            let _shared = self.gate.share();
            self.zero_range(old, below - old, false)?;
        }
        self.commit()
    }

    fn grow_l1(&self, m: &mut Meta, needed: u64) -> io::Result<()> {
        let cluster = self.shape.cluster;
        let clusters = (needed * 8).div_ceil(cluster);
        let first = m.alloc_run(clusters, &self.file)?;
        let old = (m.header.l1_offset / cluster, (m.l1.len() as u64 * 8).div_ceil(cluster));
        m.l1.resize(needed as usize, 0);
        // What names the new place must find it counted and written; the tables that it names as well.
        let (mut counts, mut tables) = (Vec::new(), Vec::new());
        m.refblocks.changes(&mut counts);
        super::table::write_pieces(&self.file, &counts)?;
        self.file.sync()?;
        self.file.write(
            &[SharedSlice::new(&super::meta::words_to_bytes(&m.reftable))],
            m.header.reftable_offset,
        )?;
        self.file.sync()?;
        m.l2.changes(&mut tables);
        super::table::write_pieces(&self.file, &tables)?;
        let mut table = super::meta::words_to_bytes(&m.l1);
        table.resize((clusters * cluster) as usize, 0);
        self.file.write(&[SharedSlice::new(&table)], first * cluster)?;
        self.file.sync()?;
        m.header.l1_offset = first * cluster;
        m.header.l1_size = needed as u32;
        m.header.write(&self.file)?;
        self.file.sync()?;
        (first..first + clusters).for_each(|c| {
            m.fixed.insert(c);
        });
        m.pending.push(old);
        Ok(())
    }
}

/// The bitmap of a cluster that is zeroes throughout.
fn plain_zero(wide: bool) -> u64 {
    if wide { u64::from(u32::MAX) << 32 } else { 0 }
}
