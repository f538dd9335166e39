//! Captures for Wireshark and tcpdump: the classic pcap format (draft-ietf-opsawg-pcap), microseconds, Ethernet.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Most bytes kept of a frame.
const SNAP: usize = 65_535 + 64;

/// A capture file.
pub struct Pcap {
    out: BufWriter<File>,
}

impl Pcap {
    /// Make or empty the file.
    ///
    /// # Errors
    /// The host's.
    pub fn create(path: &Path) -> io::Result<Pcap> {
        let mut out = BufWriter::new(File::create(path)?);
        for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, SNAP as u32, 1] {
            out.write_all(&word.to_le_bytes())?;
        }
        out.flush()?;
        Ok(Pcap { out })
    }

    /// Add a frame, with the time of now.
    ///
    /// # Errors
    /// The host's: the capture is then incomplete.
    pub fn frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let kept = frame.len().min(SNAP);
        for word in [now.as_secs() as u32, now.subsec_micros(), kept as u32, frame.len() as u32] {
            self.out.write_all(&word.to_le_bytes())?;
        }
        self.out.write_all(&frame[..kept])
    }

    /// Hand what was added to the host.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
