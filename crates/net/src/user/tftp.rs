//! A TFTP server for guests that boot from the network (RFC 1350, options of RFC 2347 to 2349 and RFC 7440). It only reads.

use super::stack::Common;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// The port of requests.
pub const PORT: u16 = 69;
/// Transfers at once.
const MOST: usize = 64;
/// How long an answer may take unless the guest says so, and how often it is asked for again.
const PATIENCE: Duration = Duration::from_secs(1);
const TRIES: u32 = 8;
/// Bytes of a block when nothing is said.
const BLOCK: usize = 512;
/// Most blocks sent ahead.
const MOST_WINDOW: u64 = 64;
/// Longest request that is looked at.
const MOST_REQUEST: usize = 1024;

const RRQ: u16 = 1;
const WRQ: u16 = 2;
const DATA: u16 = 3;
const ACK: u16 = 4;
const ERROR: u16 = 5;
const OACK: u16 = 6;

// Error codes (RFC 1350 section 5, RFC 2347).
const NOT_FOUND: u16 = 1;
const REFUSED: u16 = 2;
const ILLEGAL: u16 = 4;
const UNKNOWN_TRANSFER: u16 = 5;
const BAD_OPTIONS: u16 = 8;

/// The guest's end, and our port.
type Key = (SocketAddr, SocketAddr);

/// Longest file that is sent as text: it is translated as a whole.
const MOST_TEXT: u64 = 4 << 20;

/// What is sent: the file, or it as text.
enum Content {
    File(File),
    Text(Vec<u8>),
}

impl Content {
    fn read_exact_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Content::File(f) => f.read_exact_at(out, at),
            Content::Text(t) => {
                let piece = t.get(at as usize..).and_then(|t| t.get(..out.len()));
                out.copy_from_slice(piece.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

/// The host's text as the network has it (RFC 764): lines end with CR and LF, and a CR that ends none is followed by a zero byte.
fn netascii(file: File) -> io::Result<Vec<u8>> {
    let mut raw = Vec::new();
    file.take(MOST_TEXT).read_to_end(&mut raw)?;
    let mut out = Vec::with_capacity(raw.len() + raw.len() / 16);
    for b in raw {
        match b {
            b'\n' => out.extend(b"\r\n"),
            b'\r' => out.extend(b"\r\0"),
            _ => out.push(b),
        }
    }
    Ok(out)
}

struct Transfer {
    content: Content,
    size: u64,
    block: usize,
    window: u64,
    /// The last block that the guest has; block 0 is the beginning.
    have: u64,
    /// The answer to its options, until it is acknowledged.
    options: Option<Vec<u8>>,
    last: Instant,
    patience: Duration,
    tries: u32,
}

impl Transfer {
    /// The number of the last block, which is shorter than the others.
    fn last_block(&self) -> u64 {
        self.size / self.block as u64 + 1
    }

    /// Send what follows what the guest has.
    fn send(&mut self, c: &mut Common, key: &Key) -> io::Result<()> {
        self.last = Instant::now();
        if let Some(o) = &self.options {
            c.push_udp(key.1, key.0, o);
            return Ok(());
        }
        let mut message = vec![0; 4 + self.block];
        for n in self.have + 1..=(self.have + self.window).min(self.last_block()) {
            let at = (n - 1) * self.block as u64;
            let len = self.size.saturating_sub(at).min(self.block as u64) as usize;
            message[..2].copy_from_slice(&DATA.to_be_bytes());
            // Numbers of long files begin anew after 65,535.
            message[2..4].copy_from_slice(&(n as u16).to_be_bytes());
            self.content.read_exact_at(&mut message[4..4 + len], at)?;
            c.push_udp(key.1, key.0, &message[..4 + len]);
        }
        Ok(())
    }
}

/// All transfers.
#[derive(Default)]
pub struct Tftp {
    transfers: HashMap<Key, Transfer>,
}

/// What a request says (RFC 2347: strings that end with a zero byte, names and values by turns).
struct Request<'a> {
    name: &'a [u8],
    /// Lines end as the network has it.
    text: bool,
    options: Vec<(String, &'a str)>,
}

fn parse(raw: &[u8]) -> Option<Request<'_>> {
    if raw.len() > MOST_REQUEST {
        return None;
    }
    let mut parts = raw.strip_suffix(&[0])?.split(|&b| b == 0);
    let name = parts.next().filter(|n| !n.is_empty())?;
    let mode = parts.next()?;
    let text = mode.eq_ignore_ascii_case(b"netascii");
    if !text && !mode.eq_ignore_ascii_case(b"octet") {
        return None;
    }
    let mut options = Vec::new();
    while let Some(key) = parts.next() {
        let (Ok(key), Ok(value)) = (std::str::from_utf8(key), std::str::from_utf8(parts.next()?)) else {
            continue;
        };
        options.push((key.to_ascii_lowercase(), value));
    }
    Some(Request { name, text, options })
}

fn error(c: &mut Common, key: &Key, code: u16, text: &str) {
    let mut m = [ERROR.to_be_bytes(), code.to_be_bytes()].concat();
    m.extend_from_slice(text.as_bytes());
    m.push(0);
    c.push_udp(key.1, key.0, &m);
}

impl Tftp {
    /// A datagram of `guest` for `ours`, which is an address of the router's. False if it is not for a TFTP server.
    pub fn datagram(&mut self, c: &mut Common, guest: SocketAddr, ours: SocketAddr, data: &[u8]) -> bool {
        let Some(root) = c.config.tftp.clone() else { return false };
        let key = (guest, ours);
        if ours.port() == PORT {
            self.request(c, guest, ours, &root, data);
            return true;
        }
        let Some(t) = self.transfers.get_mut(&key) else { return false };
        let Some((&[o0, o1, n0, n1], _)) = data.split_first_chunk() else { return true };
        match u16::from_be_bytes([o0, o1]) {
            ACK => {
                let n = u16::from_be_bytes([n0, n1]);
                if t.options.is_some() {
                    if n != 0 {
                        return true;
                    }
                    t.options = None;
                } else {
                    let ahead = u64::from(n.wrapping_sub(t.have as u16));
                    // Acknowledged again what it had: the timer decides, so that no block is sent twice for ever.
                    if ahead == 0 || ahead > t.window {
                        return true;
                    }
                    t.have += ahead;
                }
                t.tries = 0;
                if t.have >= t.last_block() || t.send(c, &key).is_err() {
                    self.transfers.remove(&key);
                }
            }
            ERROR => drop(self.transfers.remove(&key)),
            _ => error(c, &key, ILLEGAL, "not expected here"),
        }
        true
    }

    fn request(&mut self, c: &mut Common, guest: SocketAddr, ours: SocketAddr, root: &Path, data: &[u8]) {
        // Each transfer has a port of its own.
        let mut key = (guest, SocketAddr::new(ours.ip(), fastrand::u16(1024..)));
        while self.transfers.contains_key(&key) {
            key.1.set_port(fastrand::u16(1024..));
        }
        let Some((&[o0, o1], rest)) = data.split_first_chunk() else { return };
        match u16::from_be_bytes([o0, o1]) {
            RRQ => {}
            WRQ => return error(c, &key, REFUSED, "this server only reads"),
            ERROR => return,
            ACK | DATA => return error(c, &key, UNKNOWN_TRANSFER, "no such transfer"),
            _ => return error(c, &key, ILLEGAL, "unknown operation"),
        }
        let Some(r) = parse(rest) else { return error(c, &key, ILLEGAL, "malformed request") };
        let file = match crate::sys::open_below(root, r.name) {
            Ok(f) => f,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return error(c, &key, NOT_FOUND, "no such file");
            }
            Err(_) => return error(c, &key, REFUSED, "may not be read"),
        };
        let Ok(mut size) = file.metadata().map(|m| m.len()) else { return };
        let content = if r.text {
            if size > MOST_TEXT {
                return error(c, &key, REFUSED, "too long for text: ask in mode octet");
            }
            let Ok(text) = netascii(file) else { return error(c, &key, REFUSED, "may not be read") };
            size = text.len() as u64;
            Content::Text(text)
        } else {
            Content::File(file)
        };
        let headers = if guest.is_ipv4() { 32 } else { 52 };
        let most = usize::from(c.config.mtu).saturating_sub(headers);
        let (mut block, mut window) = (BLOCK.min(most), 1);
        let mut patience = PATIENCE;
        let mut answer = Vec::new();
        let mut agree = |key: &str, value: u64| {
            answer.extend_from_slice(format!("{key}\0{value}\0").as_bytes());
        };
        for (name, value) in &r.options {
            let Ok(n) = value.parse::<u64>() else { continue };
            match (name.as_str(), n) {
                ("blksize", 8..=65_464) => {
                    block = (n as usize).min(most);
                    agree("blksize", block as u64);
                }
                ("blksize", _) => return error(c, &key, BAD_OPTIONS, "block size"),
                ("tsize", _) => agree("tsize", size),
                ("windowsize", 1..=65_535) => {
                    window = n.min(MOST_WINDOW);
                    agree("windowsize", window);
                }
                ("timeout", 1..=255) => {
                    patience = Duration::from_secs(n);
                    agree("timeout", n);
                }
                _ => {}
            }
        }
        let options = (!answer.is_empty()).then(|| [&OACK.to_be_bytes()[..], &answer].concat());
        if self.transfers.len() >= MOST
            && let Some(oldest) = self.transfers.iter().min_by_key(|(_, t)| t.last).map(|(&k, _)| k)
        {
            self.transfers.remove(&oldest);
        }
        let mut t = Transfer {
            content,
            size,
            block,
            window,
            have: 0,
            options,
            last: Instant::now(),
            patience,
            tries: 0,
        };
        if t.send(c, &key).is_ok() {
            self.transfers.insert(key, t);
        }
    }

    /// Send again what was not answered.
    pub fn tick(&mut self, c: &mut Common, now: Instant) {
        self.transfers.retain(|key, t| {
            if now.saturating_duration_since(t.last) < t.patience {
                return true;
            }
            t.tries += 1;
            t.tries <= TRIES && t.send(c, key).is_ok()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let r = parse(b"a/b\0octet\0BLKSIZE\x001400\0tsize\x000\0").unwrap();
        assert_eq!((r.name, r.text), (&b"a/b"[..], false));
        assert!(parse(b"a\0NetASCII\0").unwrap().text);
        assert_eq!(r.options, [("blksize".into(), "1400"), ("tsize".into(), "0")]);
        for bad in [&b""[..], b"\0", b"a\0", b"a\0octet", b"\0octet\0", b"a\0mail\0", b"a\0octet\0key\0"] {
            assert!(parse(bad).is_none(), "{bad:?}");
        }
        assert!(parse(&[b"a\0octet\0".to_vec(), vec![b'x'; 2000], vec![0]].concat()).is_none());
    }
}
