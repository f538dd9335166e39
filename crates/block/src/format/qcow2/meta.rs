//! The mutable metadata of an open image, under one lock: L1 and L2 tables, refcounts, allocation.
//!
//! Nothing here is written in place at once. Changes gather in memory and go out by `Qcow2::commit`, in an order in
//! which a crash at any moment can only leak clusters: refcounts and data before the L2 entries that need them, L2
//! tables before the L1 entries that name them, and refcounts go down only after no table on disk names the cluster.

use super::header::Header;
use super::table::{Table, Tables, damaged, write_pieces};
use crate::SharedSliceMut;
use crate::storage::FileStorage;
use std::collections::{BTreeSet, HashSet};
use std::io;

/// L1 and L2 entries: the cluster's refcount is exactly one, so that it can be written in place.
pub const COPIED: u64 = 1 << 63;
/// L2 entries: compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Standard L2 entries: reads as zeroes.
pub const ZERO: u64 = 1;
/// The host offset in L1 and L2 entries.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Memory for L2 tables, in bytes.
const L2_CACHE: u64 = 32 << 20;
/// Memory for refcount blocks, in bytes.
const REFBLOCK_CACHE: u64 = 16 << 20;

/// A range of host clusters whose refcounts go down by one when no table on disk names them any more.
pub type Pending = (u64, u64);

/// The metadata.
pub struct Meta {
    /// The header as it is on disk, or will be after the next header write.
    pub header: Header,
    /// Active L1 table.
    pub l1: Vec<u64>,
    pub l1_dirty: BTreeSet<usize>,
    pub l2: Tables,
    /// Offsets of refcount blocks.
    pub reftable: Vec<u64>,
    pub reftable_dirty: bool,
    pub refblocks: Tables,
    /// No cluster below this one is free.
    pub free_hint: u64,
    /// Host offset from which on clusters have never been used: they read as zeroes.
    pub fresh: u64,
    /// To be freed.
    pub pending: Vec<Pending>,
    /// Guest clusters for which data is being written before their L2 entry changes.
    pub inflight: HashSet<u64>,
    /// Clusters of metadata that may never be given out.
    pub fixed: HashSet<u64>,
    /// Compressed data is packed on from here: offset and end of the host cluster.
    pub packed: Option<(u64, u64)>,
}

/// An L2 entry: descriptor and, with subclusters, bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    pub desc: u64,
    pub bitmap: u64,
}

/// Read a table of 64-bit numbers.
pub fn read_words(file: &FileStorage, offset: u64, count: usize) -> io::Result<Vec<u64>> {
    if offset.saturating_add(count as u64 * 8) > file.len() {
        return Err(damaged(format!("a table of {count} entries at {offset:#x} lies outside the image")));
    }
    let mut bytes = vec![0; count * 8];
    file.read(&[SharedSliceMut::new(&mut bytes)], offset)?;
    Ok(bytes.chunks_exact(8).map(|c| c.try_into().map_or(0, u64::from_be_bytes)).collect())
}

/// Bytes of a table of 64-bit numbers.
pub fn words_to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_be_bytes()).collect()
}

impl Meta {
    pub fn load(header: Header, file: &FileStorage, writable: bool) -> io::Result<Meta> {
        let cluster = header.cluster_size();
        let l1 = read_words(file, header.l1_offset, header.l1_size as usize)?;
        let mut reftable = Vec::new();
        let mut fixed = HashSet::new();
        if writable {
            let clusters = u64::from(header.reftable_clusters);
            reftable = read_words(file, header.reftable_offset, (clusters * cluster / 8) as usize)?;
            let mut fix = |offset: u64, len: u64| {
                for c in offset / cluster..(offset + len).div_ceil(cluster) {
                    fixed.insert(c);
                }
            };
            fix(0, cluster);
            fix(header.l1_offset, l1.len() as u64 * 8);
            fix(header.reftable_offset, clusters * cluster);
            l1.iter().chain(&reftable).map(|e| e & OFFSET).filter(|o| *o != 0).for_each(|o| fix(o, cluster));
        }
        Ok(Meta {
            l1,
            l1_dirty: BTreeSet::new(),
            l2: Tables::new((L2_CACHE / cluster) as usize),
            reftable,
            reftable_dirty: false,
            refblocks: Tables::new((REFBLOCK_CACHE / cluster) as usize),
            free_hint: 1,
            fresh: file.len().next_multiple_of(cluster),
            pending: Vec::new(),
            inflight: HashSet::new(),
            fixed,
            packed: None,
            header,
        })
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Refcount of host cluster `index`.
    pub fn refcount(&mut self, index: u64, file: &FileStorage) -> io::Result<u64> {
        let per = self.header.refblock_entries();
        let block = index / per;
        let offset = match self.reftable.get(block as usize) {
            None | Some(0) => return Ok(0),
            Some(o) => *o & !0x1ff,
        };
        let order = self.header.refcount_order;
        let t = self.refblocks.load(block, offset, self.header.cluster_size(), file)?;
        Ok(t.refcount((index % per) as usize, order))
    }

    /// Set a refcount; the refcount block is made if need be.
    pub fn set_refcount(&mut self, index: u64, value: u64, file: &FileStorage) -> io::Result<()> {
        let per = self.header.refblock_entries();
        let block = index / per;
        self.ensure_refblock(block, file)?;
        let offset = self.reftable[block as usize] & !0x1ff;
        let order = self.header.refcount_order;
        let t = self.refblocks.load(block, offset, self.header.cluster_size(), file)?;
        t.set_refcount((index % per) as usize, order, value);
        Ok(())
    }

    /// The largest refcount that can be stored.
    pub fn max_refcount(&self) -> u64 {
        match self.header.refcount_bits() {
            64 => i64::MAX as u64,
            bits => (1 << bits) - 1,
        }
    }

    /// Call `each` with the refcounts of `count` clusters from `first` on, in order.
    pub fn refcounts(
        &mut self,
        first: u64,
        count: u64,
        file: &FileStorage,
        mut each: impl FnMut(u64),
    ) -> io::Result<()> {
        let (per, order, cluster) =
            (self.header.refblock_entries(), self.header.refcount_order, self.cluster());
        let (mut c, end) = (first, first + count);
        while c < end {
            let (block, stop) = (c / per, end.min((c / per + 1) * per));
            match self.reftable.get(block as usize).map_or(0, |o| *o & !0x1ff) {
                0 => (c..stop).for_each(|_| each(0)),
                offset => {
                    let t = self.refblocks.load(block, offset, cluster, file)?;
                    (c..stop).for_each(|c| each(t.refcount((c % per) as usize, order)));
                }
            }
            c = stop;
        }
        Ok(())
    }

    /// Add `delta` to the refcounts of `count` clusters that are in use.
    pub fn adjust(&mut self, first: u64, count: u64, delta: i64, file: &FileStorage) -> io::Result<()> {
        let (per, order, cluster) =
            (self.header.refblock_entries(), self.header.refcount_order, self.cluster());
        let max = self.max_refcount();
        let (mut c, end) = (first, first + count);
        while c < end {
            let (block, stop) = (c / per, end.min((c / per + 1) * per));
            // It may lie anywhere, and whoever takes free clusters may take it as well.
            let unused = |c| damaged(format!("cluster {c} is in use but has no refcount"));
            let offset = self.reftable.get(block as usize).map_or(0, |o| *o & !0x1ff);
            if offset == 0 {
                return Err(unused(c));
            }
            let t = self.refblocks.load(block, offset, cluster, file)?;
            for c in c..stop {
                let now = t.refcount((c % per) as usize, order);
                if now == 0 {
                    return Err(unused(c));
                }
                let new = now.checked_add_signed(delta).filter(|n| *n <= max);
                let new = new
                    .ok_or_else(|| damaged(format!("the refcount of cluster {c} is {now}, out of range")))?;
                t.set_refcount((c % per) as usize, order, new);
                if new == 0 {
                    self.free_hint = self.free_hint.min(c);
                    self.fixed.remove(&c);
                }
            }
            c = stop;
        }
        Ok(())
    }

    fn ensure_refblock(&mut self, block: u64, file: &FileStorage) -> io::Result<()> {
        if block as usize >= self.reftable.len() {
            self.grow_reftable(block, file)?;
        }
        if self.reftable[block as usize] == 0 {
            // The block counts itself: the first cluster of its range is free, since nothing counted it until now.
            self.new_refblock(block, block * self.header.refblock_entries())?;
        }
        Ok(())
    }

    /// Put an empty refcount block for range `block` into host cluster `at`.
    fn new_refblock(&mut self, block: u64, at: u64) -> io::Result<()> {
        if !self.fixed.insert(at) {
            return Err(damaged(format!("cluster {at} holds metadata but has no refcount")));
        }
        let cluster = self.cluster();
        let per = self.header.refblock_entries();
        let mut t = Table::new(at * cluster, cluster as usize);
        if at / per == block {
            t.set_refcount((at % per) as usize, self.header.refcount_order, 1);
        }
        self.refblocks.insert(block, t);
        self.reftable[block as usize] = at * cluster;
        self.reftable_dirty = true;
        self.fresh = self.fresh.max((at + 1) * cluster);
        Ok(())
    }

    /// Move the refcount table to a larger place that has room for `block`, and say so in the header.
    fn grow_reftable(&mut self, block: u64, file: &FileStorage) -> io::Result<()> {
        let cluster = self.cluster();
        let per = self.header.refblock_entries();
        // Behind everything that the old table counts: first the blocks that count the new table and themselves,
        // then the table.
        let first_block = block.max(self.reftable.len() as u64);
        let start = first_block * per;
        let mut clusters = ((first_block + 2) * 3 / 2 * 8).div_ceil(cluster);
        let blocks = loop {
            let mut blocks = 1;
            while blocks * per < blocks + clusters {
                blocks += 1;
            }
            let wanted = ((first_block + blocks + 1) * 8).div_ceil(cluster);
            if wanted <= clusters {
                break blocks;
            }
            clusters = wanted;
        };
        if clusters * cluster > super::header::MAX_REFTABLE {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        self.reftable.resize((clusters * cluster / 8) as usize, 0);
        for b in 0..blocks {
            self.new_refblock(first_block + b, start + b)?;
        }
        let first = start + blocks;
        for c in start..first + clusters {
            self.set_refcount(c, 1, file)?;
            self.fixed.insert(c);
        }
        self.fresh = self.fresh.max((first + clusters) * cluster);
        let old = (self.header.reftable_offset / cluster, u64::from(self.header.reftable_clusters));
        // The changes stay marked, so that a commit under way cannot leave older copies behind.
        let mut pieces = Vec::new();
        self.refblocks.changes(&mut pieces);
        pieces.push((first * cluster, words_to_bytes(&self.reftable)));
        write_pieces(file, &pieces)?;
        file.sync()?;
        self.header.reftable_offset = first * cluster;
        self.header.reftable_clusters = clusters as u32;
        self.header.write(file)?;
        file.sync()?;
        self.pending.push(old);
        Ok(())
    }

    /// The first cluster from `at` on whose refcount is zero; there is a refcount block for it then.
    fn next_free(&mut self, mut at: u64, file: &FileStorage) -> io::Result<u64> {
        let (per, order, cluster) =
            (self.header.refblock_entries(), self.header.refcount_order, self.cluster());
        loop {
            let block = at / per;
            self.ensure_refblock(block, file)?;
            let offset = self.reftable[block as usize] & !0x1ff;
            let t = self.refblocks.load(block, offset, cluster, file)?;
            let stop = (block + 1) * per;
            if let Some(c) = (at..stop).find(|c| t.refcount((c % per) as usize, order) == 0) {
                return Ok(c);
            }
            at = stop;
        }
    }

    /// Take up to `want` free clusters in one run; gives the first and the count. Their refcounts become one.
    pub fn alloc(&mut self, want: u64, file: &FileStorage) -> io::Result<(u64, u64)> {
        let at = self.next_free(self.free_hint, file)?;
        let mut n = 0;
        while n < want && self.refcount(at + n, file)? == 0 {
            if self.fixed.contains(&(at + n)) {
                return Err(damaged(format!("cluster {} holds metadata but has no refcount", at + n)));
            }
            // The next range's block may take its first cluster: look again.
            self.ensure_refblock((at + n) / self.header.refblock_entries(), file)?;
            if self.refcount(at + n, file)? != 0 {
                break;
            }
            self.set_refcount(at + n, 1, file)?;
            n += 1;
        }
        if n == 0 {
            self.free_hint = at;
            return self.alloc(want, file);
        }
        self.free_hint = at + n;
        Ok((at, n))
    }

    /// Take exactly `count` clusters in one run.
    pub fn alloc_run(&mut self, count: u64, file: &FileStorage) -> io::Result<u64> {
        let (mut first, mut n) = (self.free_hint, 0);
        while n < count {
            let c = self.next_free(first + n, file)?;
            if self.fixed.contains(&c) {
                (first, n) = (c + 1, 0);
            } else if c == first + n {
                n += 1;
            } else {
                (first, n) = (c, 1);
            }
        }
        for c in first..first + count {
            self.set_refcount(c, 1, file)?;
        }
        self.fresh = self.fresh.max((first + count) * self.cluster());
        Ok(first)
    }

    /// Whether a cluster that was just given out has never been used; from now on it has.
    pub fn take_fresh(&mut self, first: u64, count: u64) -> bool {
        let was = first * self.cluster() >= self.fresh;
        self.fresh = self.fresh.max((first + count) * self.cluster());
        was
    }

    /// The L2 table of L1 entry `index`, if there is one.
    pub fn table(&mut self, index: u64, file: &FileStorage) -> io::Result<Option<&mut Table>> {
        let offset = self.l1.get(index as usize).map_or(0, |e| e & OFFSET);
        if offset == 0 {
            return Ok(None);
        }
        self.l2.load(index, offset, self.header.cluster_size(), file).map(Some)
    }

    /// The L2 table of L1 entry `index`, made or copied so that it can be changed.
    pub fn own_table(&mut self, index: u64, file: &FileStorage) -> io::Result<&mut Table> {
        let cluster = self.cluster();
        let entry =
            *self.l1.get(index as usize).ok_or_else(|| damaged("the L1 table is too short".into()))?;
        if entry & COPIED == 0 {
            let (new, _) = self.alloc(1, file)?;
            let offset = new * cluster;
            self.take_fresh(new, 1);
            let mut t = Table::new(offset, cluster as usize);
            if entry & OFFSET != 0 {
                // Shared with a snapshot: the copy's entries are as they were, since their clusters are shared too.
                self.table(index, file)?;
                if let Some(mut old) = self.l2.remove(index) {
                    old.offset = offset;
                    old.dirty_all();
                    t = old;
                }
                self.pending.push(((entry & OFFSET) / cluster, 1));
            }
            self.l2.insert(index, t);
            self.fixed.insert(new);
            self.l1[index as usize] = offset | COPIED;
            self.l1_dirty.insert(index as usize);
        }
        let offset = self.l1[index as usize] & OFFSET;
        self.l2.load(index, offset, cluster, file)
    }

    /// Where guest cluster `g` is described: L1 index and word in the L2 table.
    pub fn place(&self, g: u64) -> (u64, usize) {
        let per = self.header.l2_entries();
        (g / per, (g % per) as usize * self.header.l2_words())
    }

    /// The L2 entry of guest cluster `g`.
    pub fn entry(&mut self, g: u64, file: &FileStorage) -> io::Result<Entry> {
        let (index, word) = self.place(g);
        let wide = self.header.extended_l2();
        Ok(self.table(index, file)?.map_or(Entry::default(), |t| read_entry(t, word, wide)))
    }

    /// As [`entry`](Self::entry) without waiting for the file: `None` when the table is not in memory.
    pub fn entry_here(&self, g: u64) -> Option<Entry> {
        let (index, word) = self.place(g);
        if self.l1.get(index as usize).is_none_or(|e| e & OFFSET == 0) {
            return Some(Entry::default());
        }
        self.l2.peek(index).map(|t| read_entry(t, word, self.header.extended_l2()))
    }

    /// Clusters from `g` to at most `last` that no L2 table describes.
    fn gap(&self, g: u64, last: u64) -> u64 {
        let per = self.header.l2_entries();
        let (from, to) = ((g / per) as usize, (last / per) as usize);
        let upto = |end: usize| self.l1.get(from..end).and_then(|l1| l1.iter().position(|e| e & OFFSET != 0));
        match upto((to + 1).min(self.l1.len())) {
            Some(0) => 0,
            Some(n) => (from + n) as u64 * per - g,
            None => last + 1 - g,
        }
    }

    /// The L2 entry of guest cluster `g`, and how many clusters up to `last` share it because no table is there.
    pub fn run(&mut self, g: u64, last: u64, file: &FileStorage) -> io::Result<(Entry, u64)> {
        match self.gap(g, last) {
            0 => Ok((self.entry(g, file)?, 1)),
            n => Ok((Entry::default(), n)),
        }
    }

    /// As [`run`](Self::run) without waiting for the file: `None` when the table is not in memory.
    pub fn run_here(&self, g: u64, last: u64) -> Option<(Entry, u64)> {
        match self.gap(g, last) {
            0 => self.entry_here(g).map(|e| (e, 1)),
            n => Some((Entry::default(), n)),
        }
    }

    /// Clusters from `g` to at most `last` that no L2 table describes, and that nobody is about to describe.
    pub fn untouched(&self, g: u64, last: u64) -> u64 {
        let n = self.gap(g, last);
        self.inflight.iter().filter(|&&i| i >= g).map(|i| i - g).min().map_or(n, |i| n.min(i))
    }

    /// Change the L2 entry of guest cluster `g`.
    pub fn set_entry(&mut self, g: u64, e: Entry, file: &FileStorage) -> io::Result<()> {
        let (index, word) = self.place(g);
        let wide = self.header.extended_l2();
        let t = self.own_table(index, file)?;
        t.set_word(word, e.desc);
        if wide {
            t.set_word(word + 1, e.bitmap);
        }
        Ok(())
    }

    /// The host clusters that an entry holds, to be freed.
    pub fn clusters_of(&self, e: Entry) -> Option<Pending> {
        let cluster = self.cluster();
        if e.desc & COMPRESSED != 0 {
            let (offset, len) = self.compressed(e.desc);
            let first = offset / cluster;
            Some((first, (offset + len - 1) / cluster - first + 1))
        } else if e.desc & OFFSET != 0 && self.header.data_file.is_none() {
            Some(((e.desc & OFFSET) / cluster, 1))
        } else {
            None
        }
    }

    /// Where compressed data lies, and its length at most.
    pub fn compressed(&self, desc: u64) -> (u64, u64) {
        compressed(desc, self.header.cluster_bits)
    }

    /// The descriptor of compressed data.
    pub fn compressed_desc(&self, offset: u64, len: u64) -> u64 {
        let x = 62 - (self.header.cluster_bits - 8);
        let sectors = (offset + len - 1) / 512 - offset / 512;
        COMPRESSED | sectors << x | offset
    }
}

/// Where the compressed data of a descriptor lies, and its length at most.
pub fn compressed(desc: u64, cluster_bits: u32) -> (u64, u64) {
    let x = 62 - (cluster_bits - 8);
    let offset = desc & ((1 << x) - 1);
    let sectors = (desc & !(COPIED | COMPRESSED)) >> x;
    (offset, (sectors + 1) * 512 - (offset & 511))
}

fn read_entry(t: &Table, word: usize, wide: bool) -> Entry {
    Entry { desc: t.word(word), bitmap: if wide { t.word(word + 1) } else { 0 } }
}
