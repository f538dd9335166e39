//! Compressed clusters.

use super::Qcow2;
use super::header::Compression;
use super::meta::Entry;
use super::table::damaged;
use crate::{SharedSlice, SharedSliceMut, check_range};
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

/// Unpacked clusters kept, in bytes.
const CACHE: u64 = 2 << 20;

/// Clusters that were unpacked lately: (descriptor, content).
pub struct Cache {
    clusters: Mutex<Vec<(u64, Arc<[u8]>)>>,
    limit: usize,
}

impl Cache {
    pub fn new(cluster: u64) -> Cache {
        Cache { clusters: Mutex::new(Vec::new()), limit: (CACHE / cluster).clamp(1, 64) as usize }
    }

    fn get(&self, desc: u64) -> Option<Arc<[u8]>> {
        let c = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        c.iter().find(|x| x.0 == desc).map(|x| x.1.clone())
    }

    fn put(&self, desc: u64, data: &Arc<[u8]>) {
        let mut c = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        if c.len() >= self.limit {
            c.remove(0);
        }
        c.push((desc, data.clone()));
    }

    /// Forget all: host clusters may be used anew.
    pub fn clear(&self) {
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Compress one cluster; `None` when that does not make it smaller.
///
/// # Errors
/// The compressor's.
pub fn pack(data: &[u8], how: Compression) -> io::Result<Option<Vec<u8>>> {
    let out = match how {
        Compression::Zlib => {
            let mut c = flate2::Compress::new_with_window_bits(flate2::Compression::default(), false, 12);
            let mut out = Vec::with_capacity(data.len());
            let status = c
                .compress_vec(data, &mut out, flate2::FlushCompress::Finish)
                .map_err(|e| io::Error::other(e.to_string()))?;
            if status != flate2::Status::StreamEnd {
                return Ok(None);
            }
            out
        }
        Compression::Zstd => zstd::bulk::compress(data, 3)?,
    };
    Ok((out.len() < data.len()).then_some(out))
}

fn unpack(packed: &[u8], cluster: usize, how: Compression) -> io::Result<Vec<u8>> {
    let bad = || damaged("a compressed cluster does not unpack".into());
    let mut out = Vec::with_capacity(cluster);
    match how {
        Compression::Zlib => {
            // Other tools may have packed with any window up to 32 KiB.
            let mut d = flate2::Decompress::new(false);
            // The end of what was packed is not stored exactly: what follows it does not matter.
            d.decompress_vec(packed, &mut out, flate2::FlushDecompress::Finish).map_err(|_| bad())?;
        }
        Compression::Zstd => {
            let d = zstd::stream::read::Decoder::with_buffer(packed)?;
            d.single_frame().take(cluster as u64).read_to_end(&mut out).map_err(|_| bad())?;
        }
    }
    if out.len() == cluster { Ok(out) } else { Err(bad()) }
}

impl Qcow2 {
    /// The content of the compressed cluster `desc`.
    pub(super) fn unpack(&self, desc: u64) -> io::Result<Arc<[u8]>> {
        if let Some(hit) = self.unpacked.get(desc) {
            return Ok(hit);
        }
        let (at, len, how) = {
            let m = self.meta();
            let (at, len) = m.compressed(desc);
            (at, len, m.header.compression)
        };
        // The last sector may lie behind the end of the file, the data itself may not.
        let len = len.min(self.file.len().saturating_sub(at));
        if len == 0 || at == 0 || len > 2 * self.shape.cluster {
            return Err(damaged("a compressed cluster lies outside the image".into()));
        }
        let mut packed = vec![0; len as usize];
        self.file.read(&[SharedSliceMut::new(&mut packed)], at)?;
        let data: Arc<[u8]> = unpack(&packed, self.shape.cluster as usize, how)?.into();
        self.unpacked.put(desc, &data);
        Ok(data)
    }

    /// How this image compresses.
    pub fn compression(&self) -> Compression {
        self.meta().header.compression
    }

    /// Compress one cluster as [`write_packed`](Self::write_packed) takes it. Needs no lock, so that several threads
    /// can do it.
    ///
    /// # Errors
    /// The compressor's.
    pub fn pack(&self, data: &[u8]) -> io::Result<Option<Vec<u8>>> {
        pack(data, self.compression())
    }

    /// Store the cluster at guest `offset` (a multiple of the cluster size) compressed as `packed`.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::Unsupported`] with an external data file.
    pub fn write_packed(&self, offset: u64, packed: &[u8]) -> io::Result<()> {
        self.writable()?;
        let (cluster, len) = (self.shape.cluster, packed.len() as u64);
        check_range(crate::BlockBackend::size(self).next_multiple_of(cluster), offset, cluster)?;
        if self.shape.external {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "an external data file cannot hold compressed data",
            ));
        }
        if !offset.is_multiple_of(cluster) || len == 0 || len >= cluster {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let g = offset / cluster;
        self.record(offset, cluster.min(crate::BlockBackend::size(self) - offset))?;
        {
            let _shared = self.gate.share();
            let mut m = self.wait_for_cluster(g);
            let (at, end) = m.packed.take().unwrap_or((0, 0));
            let room = end - at;
            let max = m.max_refcount();
            let shareable = room > 0 && m.refcount(at / cluster, &self.file)? < max;
            let (start, new_end) = if shareable && room >= len {
                m.adjust(at / cluster, 1, 1, &self.file)?;
                (at, end)
            } else {
                let (c, n) = m.alloc(1, &self.file)?;
                m.take_fresh(c, n);
                if shareable && c * cluster == end {
                    m.adjust(at / cluster, 1, 1, &self.file)?;
                    (at, end + cluster)
                } else {
                    (c * cluster, (c + 1) * cluster)
                }
            };
            m.packed = (start + len < new_end).then_some((start + len, new_end));
            m.inflight.insert(g);
            drop(m);
            let written = self.file.write(&[SharedSlice::new(packed)], start);
            let mut m = self.meta();
            let desc = m.compressed_desc(start, len);
            let entered = written.and_then(|()| {
                let old = m.entry(g, &self.file)?;
                m.set_entry(g, Entry { desc, bitmap: 0 }, &self.file)?;
                if let Some(p) = m.clusters_of(old) {
                    m.pending.push(p);
                }
                Ok(())
            });
            m.inflight.remove(&g);
            self.settled.notify_all();
            self.note(&m);
            entered?;
        }
        self.settle()
    }
}
