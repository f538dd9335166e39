//! The byte stream that carries sections: a magic, then sections, each with length and CRC-32, then an end mark.
//!
//! All numbers are little endian.
//! ```text
//! "RFSTATE1"                                   8 bytes
//! per section: kind length u8 (1..=255), kind, instance u32, version u32, body length u32, body, crc32 u32
//! end: 0u8
//! ```
//! The CRC covers everything of the section before it, so a flipped bit in a name is found as well.

use crate::{MAX_SECTION_BODY, Section, StateError};
use std::io::{Read, Write};

const MAGIC: &[u8; 8] = b"RFSTATE1";

/// Writes sections to any sink.
pub struct Writer<W: Write> {
    sink: W,
}

impl<W: Write> Writer<W> {
    /// Start a stream.
    ///
    /// # Errors
    /// When the sink does.
    pub fn new(mut sink: W) -> Result<Self, StateError> {
        sink.write_all(MAGIC)?;
        Ok(Writer { sink })
    }

    /// Append one section.
    ///
    /// # Errors
    /// When the sink fails, or the section's name or body is beyond the format's limits.
    pub fn section(&mut self, s: &Section) -> Result<(), StateError> {
        let name_len = u8::try_from(s.kind.len()).ok().filter(|&n| n > 0);
        let Some(name_len) = name_len else { return Err(s.invalid("section name is empty or too long")) };
        if s.body.len() > MAX_SECTION_BODY {
            return Err(s.invalid(format!("body of {} bytes is too large", s.body.len())));
        }
        let mut head = vec![name_len];
        head.extend_from_slice(s.kind.as_bytes());
        head.extend_from_slice(&s.instance.to_le_bytes());
        head.extend_from_slice(&s.version.to_le_bytes());
        head.extend_from_slice(&(s.body.len() as u32).to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head);
        crc.update(&s.body);
        self.sink.write_all(&head)?;
        self.sink.write_all(&s.body)?;
        self.sink.write_all(&crc.finalize().to_le_bytes())?;
        Ok(())
    }

    /// Write the end mark and give the sink back.
    ///
    /// # Errors
    /// When the sink does.
    pub fn finish(mut self) -> Result<W, StateError> {
        self.sink.write_all(&[0])?;
        self.sink.flush()?;
        Ok(self.sink)
    }
}

/// Reads sections from any source; every length is checked before anything is allocated for it.
pub struct Reader<R: Read> {
    source: R,
}

impl<R: Read> Reader<R> {
    /// Check the magic.
    ///
    /// # Errors
    /// [`StateError::Stream`] when this is no state stream.
    pub fn new(mut source: R) -> Result<Self, StateError> {
        let mut magic = [0; 8];
        source.read_exact(&mut magic).map_err(cut_short)?;
        if magic[..7] == MAGIC[..7] && magic[7].is_ascii_graphic() && magic != *MAGIC {
            return Err(StateError::Stream(format!(
                "is of format version {}; this Ringfort reads version 1",
                char::from(magic[7])
            )));
        }
        if &magic != MAGIC {
            return Err(StateError::Stream("is no saved state of Ringfort".into()));
        }
        Ok(Reader { source })
    }

    /// The next section, or `None` at the end mark.
    ///
    /// # Errors
    /// [`StateError::Stream`] when the stream is cut short, damaged (checksum) or beyond the format's limits.
    pub fn next_section(&mut self) -> Result<Option<Section>, StateError> {
        let mut crc = crc32fast::Hasher::new();
        let name_len = self.take(1, &mut crc)?[0];
        if name_len == 0 {
            return Ok(None);
        }
        let kind = plain_name(&self.take(usize::from(name_len), &mut crc)?, "section")?;
        let instance = self.take_u32(&mut crc)?;
        let version = self.take_u32(&mut crc)?;
        let len = self.take_u32(&mut crc)? as usize;
        if len > MAX_SECTION_BODY {
            return Err(StateError::Stream(format!("section {kind} claims {len} bytes, more than any has")));
        }
        let body = self.take(len, &mut crc)?;
        let want = crc.finalize();
        let found = self.take_u32(&mut crc32fast::Hasher::new())?;
        if want != found {
            return Err(StateError::Stream(format!("section {kind} #{instance} is damaged (checksum)")));
        }
        Ok(Some(Section { kind, instance, version, body }))
    }

    /// The source, to go on with the page streams after the end mark.
    pub fn into_inner(self) -> R {
        self.source
    }

    fn take(&mut self, len: usize, crc: &mut crc32fast::Hasher) -> Result<Vec<u8>, StateError> {
        // Grows with what really arrives: a lying length costs nothing.
        let mut buf = Vec::new();
        self.source.by_ref().take(len as u64).read_to_end(&mut buf)?;
        if buf.len() != len {
            return Err(cut_short(std::io::ErrorKind::UnexpectedEof.into()));
        }
        crc.update(&buf);
        Ok(buf)
    }

    fn take_u32(&mut self, crc: &mut crc32fast::Hasher) -> Result<u32, StateError> {
        let b = self.take(4, crc)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// The name of a section or stream, which goes into messages of one line and into JSON: printable ASCII.
pub(crate) fn plain_name(bytes: &[u8], what: &str) -> Result<String, StateError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if name.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) => Ok(name.to_owned()),
        _ => Err(StateError::Stream(format!("is damaged (the name of a {what} is no printable text)"))),
    }
}

pub(crate) fn cut_short(e: std::io::Error) -> StateError {
    if e.kind() == std::io::ErrorKind::UnexpectedEof {
        StateError::Stream("is cut short; it was not written to its end, or not copied whole".into())
    } else {
        StateError::Io(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut w = Writer::new(Vec::new()).unwrap();
        w.section(&Section::new("pit", 0, 1, &(1u8, 77u32))).unwrap();
        w.section(&Section::new("serial", 1, 2, &"abc")).unwrap();
        w.finish().unwrap()
    }

    #[test]
    fn round_trip() {
        let bytes = sample();
        let mut r = Reader::new(&bytes[..]).unwrap();
        let a = r.next_section().unwrap().unwrap();
        assert_eq!(a.decode::<(u8, u32)>("pit", 1).unwrap(), (1, 77));
        let b = r.next_section().unwrap().unwrap();
        assert_eq!((b.kind.as_str(), b.instance, b.version), ("serial", 1, 2));
        assert!(matches!(b.decode::<String>("serial", 1), Err(StateError::TooNew { .. })));
        assert!(r.next_section().unwrap().is_none());
    }

    #[test]
    fn other_versions_and_other_files_are_told_apart() {
        let said = |b: &[u8]| Reader::new(b).err().unwrap().to_string();
        assert!(said(b"RFSTATE2....").contains("format version 2"));
        assert!(said(b"QFI\xfb........").contains("no saved state"));
        assert!(said(b"RFST").contains("cut short"));
    }

    #[test]
    fn names_are_printable() {
        for name in ["p\nt", "\u{2028}", "p\u{7f}t", "p\0t"] {
            let mut w = Writer::new(Vec::new()).unwrap();
            w.section(&Section::new(name, 0, 1, &1u8)).unwrap();
            let bytes = w.finish().unwrap();
            let said = Reader::new(&bytes[..]).unwrap().next_section().err().unwrap().to_string();
            assert!(said.contains("printable") && !said.contains(name), "{said}");
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = sample();
        let read_all = |b: &[u8]| -> Result<usize, StateError> {
            let mut r = Reader::new(b)?;
            let mut n = 0;
            while r.next_section()?.is_some() {
                n += 1;
            }
            Ok(n)
        };
        assert_eq!(read_all(&bytes).unwrap(), 2);
        for cut in 0..bytes.len() {
            assert!(read_all(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for bit in 0..(bytes.len() - 1) * 8 {
            let mut b = bytes.clone();
            b[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(read_all(&b), Ok(2)), "bit {bit}");
        }
    }
}
