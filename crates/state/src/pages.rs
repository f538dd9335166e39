//! Streams of pages: RAM, and what throw-away layers of disks hold. They follow the sections of a state.
//!
//! All numbers are little endian.
//! ```text
//! per stream: name length u8 (1..=255), name, instance u32, crc32 u32 of these
//!   per chunk: tag u8, offset u64, bytes u64, stored u32, payload, crc32 u32 of all before
//!     tag 1: the bytes as they are      tag 2: a zstd frame of them      tag 3: that many zero bytes, no payload
//!   end of the stream: tag 0, chunks u64, crc32 u32 of these
//! end of all: 0u8
//! ```

use crate::StateError;
use std::io::{Read, Write};

/// Most bytes in one chunk that has a payload.
pub const MAX_CHUNK: usize = 1 << 20;
/// zstd level: what costs least; zero pages have been taken out before.
const LEVEL: i32 = 1;

const END: u8 = 0;
const RAW: u8 = 1;
const ZSTD: u8 = 2;
const ZEROES: u8 = 3;

/// How page data is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As it is.
    None,
    /// zstd, at its fastest.
    #[default]
    Zstd,
}

/// Writes page streams after the sections.
pub struct PagesWriter<W: Write> {
    sink: W,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
    chunks: u64,
}

impl<W: Write> PagesWriter<W> {
    /// Go on with the sink that [`Writer::finish`](crate::Writer::finish) gave back.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new(sink: W, compression: Compression) -> Result<Self, StateError> {
        let zstd = match compression {
            Compression::None => None,
            Compression::Zstd => Some(zstd::bulk::Compressor::new(LEVEL)?),
        };
        Ok(PagesWriter { sink, zstd, packed: Vec::new(), chunks: 0 })
    }

    /// Begin a stream.
    ///
    /// # Errors
    /// When the sink fails, or the name is beyond the format's limits.
    pub fn begin(&mut self, name: &str, instance: u32) -> Result<(), StateError> {
        let len = u8::try_from(name.len()).ok().filter(|&n| n > 0);
        let len = len.ok_or_else(|| StateError::Stream("stream name is empty or too long".into()))?;
        let mut head = vec![len];
        head.extend_from_slice(name.as_bytes());
        head.extend_from_slice(&instance.to_le_bytes());
        self.chunks = 0;
        self.put(&head, &[])
    }

    /// Write up to [`MAX_CHUNK`] bytes that belong at `offset`.
    ///
    /// # Errors
    /// When the sink fails, or there are more bytes than that, or none.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StateError> {
        if bytes.is_empty() || bytes.len() > MAX_CHUNK {
            return Err(StateError::Stream(format!("a chunk of {} bytes cannot be written", bytes.len())));
        }
        let mut packed = std::mem::take(&mut self.packed);
        let smaller = match &mut self.zstd {
            None => false,
            Some(zstd) => {
                packed.resize(bytes.len(), 0);
                // Fails when the result does not fit, so when compression does not pay.
                zstd.compress_to_buffer(bytes, &mut packed[..]).is_ok_and(|n| {
                    packed.truncate(n);
                    n < bytes.len()
                })
            }
        };
        let (tag, payload) = if smaller { (ZSTD, &packed[..]) } else { (RAW, bytes) };
        let written = self.chunk(tag, offset, bytes.len() as u64, payload);
        self.packed = packed;
        written
    }

    /// Say that `len` bytes from `offset` on are zero.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn zeroes(&mut self, offset: u64, len: u64) -> Result<(), StateError> {
        self.chunk(ZEROES, offset, len, &[])
    }

    fn chunk(&mut self, tag: u8, offset: u64, len: u64, payload: &[u8]) -> Result<(), StateError> {
        let mut head = vec![tag];
        head.extend_from_slice(&offset.to_le_bytes());
        head.extend_from_slice(&len.to_le_bytes());
        head.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        self.chunks += 1;
        self.put(&head, payload)
    }

    fn put(&mut self, head: &[u8], payload: &[u8]) -> Result<(), StateError> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(head);
        crc.update(payload);
        self.sink.write_all(head)?;
        self.sink.write_all(payload)?;
        self.sink.write_all(&crc.finalize().to_le_bytes())?;
        Ok(())
    }

    /// End the stream.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn end(&mut self) -> Result<(), StateError> {
        let mut tail = vec![END];
        tail.extend_from_slice(&self.chunks.to_le_bytes());
        self.put(&tail, &[])
    }

    /// End it all, and give the sink back.
    ///
    /// # Errors
    /// When the sink does.
    pub fn finish(mut self) -> Result<W, StateError> {
        self.sink.write_all(&[0])?;
        self.sink.flush()?;
        Ok(self.sink)
    }
}

/// A piece of a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// These bytes belong at the offset.
    Data(u64, &'a [u8]),
    /// So many zero bytes belong at the offset.
    Zeroes(u64, u64),
}

/// Reads page streams after the sections; every length is checked before anything is allocated for it.
pub struct PagesReader<R: Read> {
    source: R,
    zstd: zstd::bulk::Decompressor<'static>,
    payload: Vec<u8>,
    content: Vec<u8>,
    chunks: u64,
    name: String,
}

impl<R: Read> PagesReader<R> {
    /// Go on with the source that [`Reader::into_inner`](crate::Reader::into_inner) gave back.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new(source: R) -> Result<Self, StateError> {
        let zstd = zstd::bulk::Decompressor::new()?;
        Ok(PagesReader {
            source,
            zstd,
            payload: Vec::new(),
            content: Vec::new(),
            chunks: 0,
            name: String::new(),
        })
    }

    /// The next stream's name and instance; `None` at the end of all, which must be the end of the source as well.
    ///
    /// # Errors
    /// [`StateError::Stream`] when it is cut short or damaged.
    pub fn next_stream(&mut self) -> Result<Option<(String, u32)>, StateError> {
        let mut crc = crc32fast::Hasher::new();
        let [len] = self.array::<1>(&mut crc)?;
        if len == 0 {
            let mut more = [0];
            return match self.source.read(&mut more)? {
                0 => Ok(None),
                _ => Err(StateError::Stream("goes on behind its end".into())),
            };
        }
        self.take(usize::from(len), &mut crc)?;
        let name = crate::stream::plain_name(&self.payload, "stream")?;
        let instance = u32::from_le_bytes(self.array(&mut crc)?);
        self.name = format!("stream {name} #{instance}");
        self.check(crc)?;
        self.chunks = 0;
        Ok(Some((name, instance)))
    }

    /// The stream's next chunk, `None` at its end.
    ///
    /// # Errors
    /// [`StateError::Stream`] when it is cut short, damaged or beyond the format's limits.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>, StateError> {
        let mut crc = crc32fast::Hasher::new();
        let [tag] = self.array::<1>(&mut crc)?;
        if tag == END {
            let chunks = u64::from_le_bytes(self.array(&mut crc)?);
            self.check(crc)?;
            if chunks != self.chunks {
                return Err(self.damaged("a chunk is missing"));
            }
            return Ok(None);
        }
        let offset = u64::from_le_bytes(self.array(&mut crc)?);
        let len = u64::from_le_bytes(self.array(&mut crc)?);
        let stored = u32::from_le_bytes(self.array(&mut crc)?) as usize;
        let possible = match tag {
            RAW => stored as u64 == len && stored <= MAX_CHUNK,
            ZSTD => len <= MAX_CHUNK as u64 && (stored as u64) < len,
            ZEROES => stored == 0,
            _ => false,
        };
        if !possible || len == 0 || offset.checked_add(len).is_none() {
            return Err(self.damaged("a chunk has impossible lengths"));
        }
        self.take(stored, &mut crc)?;
        self.check(crc)?;
        self.chunks += 1;
        match tag {
            RAW => Ok(Some(Chunk::Data(offset, &self.payload))),
            ZEROES => Ok(Some(Chunk::Zeroes(offset, len))),
            _ => {
                self.content.resize(len as usize, 0);
                match self.zstd.decompress_to_buffer(&self.payload, &mut self.content[..]) {
                    Ok(n) if n as u64 == len => Ok(Some(Chunk::Data(offset, &self.content))),
                    _ => Err(self.damaged("a chunk does not unpack")),
                }
            }
        }
    }

    fn damaged(&self, how: &str) -> StateError {
        StateError::Stream(format!("{} is damaged ({how})", self.name))
    }

    fn check(&mut self, crc: crc32fast::Hasher) -> Result<(), StateError> {
        let found = u32::from_le_bytes(self.array(&mut crc32fast::Hasher::new())?);
        if crc.finalize() == found { Ok(()) } else { Err(self.damaged("checksum")) }
    }

    fn array<const N: usize>(&mut self, crc: &mut crc32fast::Hasher) -> Result<[u8; N], StateError> {
        let mut out = [0; N];
        self.source.read_exact(&mut out).map_err(crate::stream::cut_short)?;
        crc.update(&out);
        Ok(out)
    }

    /// Fill `payload`, which grows with what really arrives.
    fn take(&mut self, len: usize, crc: &mut crc32fast::Hasher) -> Result<(), StateError> {
        self.payload.clear();
        self.source.by_ref().take(len as u64).read_to_end(&mut self.payload)?;
        if self.payload.len() != len {
            return Err(crate::stream::cut_short(std::io::ErrorKind::UnexpectedEof.into()));
        }
        crc.update(&self.payload);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(compression: Compression) -> Vec<u8> {
        let mut w = PagesWriter::new(Vec::new(), compression).unwrap();
        w.begin("ram", 0).unwrap();
        w.data(0, &[7; 8192]).unwrap();
        w.zeroes(8192, 1 << 40).unwrap();
        w.end().unwrap();
        w.begin("overlay", 3).unwrap();
        let noise: Vec<u8> = (0..600u32).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_be_bytes()).collect();
        w.data(4096, &noise).unwrap();
        w.end().unwrap();
        w.finish().unwrap()
    }

    /// Streams, and all bytes that are not zero.
    fn read_all(bytes: &[u8]) -> Result<(usize, usize), StateError> {
        let mut r = PagesReader::new(bytes)?;
        let (mut streams, mut data) = (0, 0);
        while r.next_stream()?.is_some() {
            streams += 1;
            while let Some(c) = r.next_chunk()? {
                data += match c {
                    Chunk::Data(_, b) => b.len(),
                    Chunk::Zeroes(..) => 0,
                };
            }
        }
        Ok((streams, data))
    }

    #[test]
    fn round_trip() {
        for compression in [Compression::None, Compression::Zstd] {
            let bytes = sample(compression);
            assert_eq!(bytes.len() < 4000, compression == Compression::Zstd);
            let mut r = PagesReader::new(&bytes[..]).unwrap();
            assert_eq!(r.next_stream().unwrap(), Some(("ram".into(), 0)));
            assert_eq!(r.next_chunk().unwrap(), Some(Chunk::Data(0, &[7; 8192])));
            assert_eq!(r.next_chunk().unwrap(), Some(Chunk::Zeroes(8192, 1 << 40)));
            assert_eq!(r.next_chunk().unwrap(), None);
            assert_eq!(r.next_stream().unwrap(), Some(("overlay".into(), 3)));
            assert!(matches!(r.next_chunk().unwrap(), Some(Chunk::Data(4096, b)) if b.len() == 2400));
            assert_eq!(r.next_chunk().unwrap(), None);
            assert_eq!(r.next_stream().unwrap(), None);
        }
    }

    #[test]
    fn every_flipped_bit_every_cut_and_what_follows_is_found() {
        let bytes = sample(Compression::Zstd);
        assert_eq!(read_all(&bytes).unwrap(), (2, 8192 + 2400));
        for cut in 0..bytes.len() {
            assert!(read_all(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut b = bytes.clone();
            b[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&b).is_err(), "bit {bit}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(read_all(&longer).unwrap_err().to_string().contains("behind its end"));
    }

    #[test]
    fn a_frame_that_unpacks_to_more_than_it_says_is_refused() {
        let mut w = PagesWriter::new(Vec::new(), Compression::Zstd).unwrap();
        w.begin("ram", 0).unwrap();
        let bomb = zstd::bulk::compress(&[0; MAX_CHUNK], 1).unwrap();
        w.chunk(ZSTD, 0, 4096, &bomb).unwrap();
        w.end().unwrap();
        let e = read_all(&w.finish().unwrap()).unwrap_err().to_string();
        assert!(e.contains("does not unpack"), "{e}");
    }
}
