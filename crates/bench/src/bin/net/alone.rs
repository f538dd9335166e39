//! The NAT without a guest: a harness that is the guest's card and its TCP, as far as a stream needs it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use ringfort_net::user::{UserConfig, UserNet};
use ringfort_net::{GsoKind, MacAddr, NetBackend, NetEvents, Offloads, VnetHeader};
use serde::Serialize;

/// What is wanted, in Gbit/s per core.
pub const WANTED: f64 = 5.0;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const ROUTER_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
/// Bytes in front of the payload: Ethernet, IPv4, TCP.
const HEADERS: usize = 54;
/// Payload of a segment at an MTU of 1500, and of a frame that is cut into such segments.
const MSS: usize = 1460;
const PAYLOAD: usize = 44 * MSS;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// Our window, scaled by 2^9.
const WINDOW: u16 = 0x1fff;
const SCALE: u8 = 9;
/// Connections that are open besides in the last row, and the part of the first row's figure that is wanted then.
const CROWD: u16 = 5000;
const WITH_CROWD: f64 = 0.8;
/// How many of them are being made at a time, and the guest's ports of them from this one on.
const OPENING: u16 = 64;
const CROWD_PORTS: u16 = 2000;
const PATIENCE: Duration = Duration::from_secs(30);

/// One direction.
#[derive(Debug, Serialize)]
pub struct Row {
    pub what: &'static str,
    /// Gbit/s of payload by the clock.
    pub rate: f64,
    /// Gbit/s of payload for each second of CPU time, the harness's included.
    pub per_core: f64,
    /// Gbit/s per core that are wanted.
    pub wanted: f64,
}

struct Bell(Mutex<Sender<()>>);

impl NetEvents for Bell {
    fn readable(&self, _: u16) {
        // Nobody waits after the end.
        let _ = ringfort_bus::lock(&self.0).send(());
    }
    fn writable(&self, _: u16) {}
    fn link(&self, _: bool) {}
}

/// The far end, in a process of its own.
struct FarEnd(Child, u16);

impl FarEnd {
    fn start(kind: &str) -> Result<FarEnd, String> {
        let own = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut child = Command::new(own)
            .args(["--far-end", kind])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("cannot start the far end: {e}"))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line).map_err(|e| e.to_string())?;
        }
        let port = line.trim().parse().map_err(|_| "the far end told no port".to_owned())?;
        Ok(FarEnd(child, port))
    }
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU time of this process so far, in seconds (proc(5): fields 14 and 15 of stat, in hundredths).
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

struct Guest {
    net: UserNet,
    bell: Receiver<()>,
    /// The far end's port, and our own.
    port: u16,
    own: u16,
    /// Our next number, and the far end's.
    seq: u32,
    next: u32,
    /// What the far end has acknowledged, and how far it lets us go.
    acked: u32,
    allowed: u32,
    out: Vec<u8>,
    frame: Vec<u8>,
}

impl Guest {
    /// Connect to a port of the host's loopback.
    fn connect(port: u16) -> Result<Guest, String> {
        let config = UserConfig { host_loopback: true, ..UserConfig::default() };
        let net = UserNet::new(config, MacAddr::new(GUEST_MAC).ok()).map_err(|e| e.to_string())?;
        let (ring, bell) = channel();
        net.attach(Arc::new(Bell(Mutex::new(ring))));
        net.set_offloads(Offloads::ALL);
        let mut g = Guest {
            net,
            bell,
            port,
            own: 40_000,
            seq: 1,
            next: 0,
            acked: 1,
            allowed: 1,
            out: Vec::new(),
            frame: Vec::new(),
        };
        g.send(SYN, 0, &[3, 3, SCALE, 1, 2, 4, 5, 0xb4]);
        g.seq += 1;
        let end = Instant::now() + PATIENCE;
        while g.next == 0 {
            if Instant::now() > end {
                return Err("the NAT did not connect".into());
            }
            if !g.receive() {
                let _ = g.bell.recv_timeout(Duration::from_millis(100));
            }
        }
        g.send(ACK, 0, &[]);
        Ok(g)
    }

    /// Make other connections, which rest from then on.
    fn crowd(&mut self, port: u16) -> Result<(), String> {
        let ours = (self.port, self.own, self.seq, self.next);
        let (mut asked, mut open) = (0, 0);
        let end = Instant::now() + PATIENCE;
        while open < CROWD {
            if Instant::now() > end {
                return Err(format!("{open} of {CROWD} connections were made"));
            }
            while asked < CROWD && asked - open < OPENING {
                (self.port, self.own, self.seq, self.next) = (port, CROWD_PORTS + asked, 1, 0);
                self.send(SYN, 0, &[3, 3, SCALE, 1, 2, 4, 5, 0xb4]);
                asked += 1;
            }
            if self.net.receive(0, &mut self.frame).is_none() {
                let _ = self.bell.recv_timeout(Duration::from_millis(100));
                continue;
            }
            let f = &self.frame;
            if f.len() >= HEADERS && f[23] == 6 && f[47] & SYN != 0 {
                let theirs = u32::from_be_bytes([f[38], f[39], f[40], f[41]]);
                let own = u16::from_be_bytes([f[36], f[37]]);
                (self.port, self.own, self.seq, self.next) = (port, own, 2, theirs.wrapping_add(1));
                self.send(ACK, 0, &[]);
                open += 1;
            }
        }
        (self.port, self.own, self.seq, self.next) = ours;
        Ok(())
    }

    /// Send a segment with `len` bytes of payload. Checksums are left to the NAT.
    fn send(&mut self, flags: u8, len: usize, options: &[u8]) {
        let f = &mut self.out;
        f.clear();
        f.extend_from_slice(&ROUTER_MAC);
        f.extend_from_slice(&GUEST_MAC);
        f.extend_from_slice(&[8, 0, 0x45, 0]);
        f.extend_from_slice(&((40 + options.len() + len) as u16).to_be_bytes());
        f.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
        let mut sum: u32 =
            f[14..34].as_chunks::<2>().0.iter().map(|w| u32::from(u16::from_be_bytes(*w))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        f[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        f.extend_from_slice(&self.own.to_be_bytes());
        f.extend_from_slice(&self.port.to_be_bytes());
        f.extend_from_slice(&self.seq.to_be_bytes());
        f.extend_from_slice(&self.next.to_be_bytes());
        f.extend_from_slice(&[(((20 + options.len()) / 4) << 4) as u8, flags]);
        f.extend_from_slice(&WINDOW.to_be_bytes());
        f.extend_from_slice(&[0; 4]);
        f.extend_from_slice(options);
        f.resize(HEADERS + options.len() + len, 0x55);
        let header = VnetHeader {
            checksum: Some((34, 16)),
            gso: (len > MSS).then_some((GsoKind::Tcp4, MSS as u16)),
            ..VnetHeader::default()
        };
        self.net.send(0, &header, &self.out);
        self.seq = self.seq.wrapping_add(len as u32);
    }

    /// Take the next frame; false if there is none.
    fn receive(&mut self) -> bool {
        if self.net.receive(0, &mut self.frame).is_none() {
            return false;
        }
        let f = &self.frame;
        if f.len() < HEADERS || f[23] != 6 || f[36..38] != self.own.to_be_bytes() {
            return true;
        }
        let number = |at: usize| u32::from_be_bytes([f[at], f[at + 1], f[at + 2], f[at + 3]]);
        let window = u32::from(u16::from_be_bytes([f[48], f[49]]));
        let (seq, flags) = (number(38), f[47]);
        if flags & SYN != 0 {
            self.next = seq.wrapping_add(1);
            self.allowed = number(42).wrapping_add(window);
            return true;
        }
        self.acked = number(42);
        // The scale that the NAT offers.
        self.allowed = self.acked.wrapping_add(window << 5);
        let len = f.len() - HEADERS;
        if seq == self.next {
            self.next = self.next.wrapping_add(len as u32);
        }
        true
    }
}

/// Both directions, and one with a crowd of other connections, for `seconds` each.
pub fn measure(seconds: f64) -> Result<Vec<Row>, String> {
    let there = stream("guest to host", "sink", seconds, false, send)?;
    let back = stream("host to guest", "source", seconds, false, |g| {
        let before = g.next;
        while g.receive() {}
        let moved = g.next.wrapping_sub(before) as usize;
        if moved > 0 {
            g.send(ACK, 0, &[]);
            g.net.flush(0);
        }
        moved
    })?;
    let mut crowded = stream("guest to host, 5,000 more are open", "sink", seconds, true, send)?;
    crowded.wanted = WANTED.max(WITH_CROWD * there.per_core);
    Ok(vec![there, back, crowded])
}

/// Send what the window allows.
fn send(g: &mut Guest) -> usize {
    let mut moved = 0;
    while g.receive() {}
    while g.allowed.wrapping_sub(g.seq) >= PAYLOAD as u32 && g.allowed.wrapping_sub(g.seq) < 1 << 30 {
        g.send(ACK, PAYLOAD, &[]);
        moved += PAYLOAD;
    }
    g.net.flush(0);
    moved
}

/// Call `turn`, which gives the bytes that it moved, until the time is up.
fn stream(
    what: &'static str,
    far: &str,
    seconds: f64,
    with_crowd: bool,
    mut turn: impl FnMut(&mut Guest) -> usize,
) -> Result<Row, String> {
    let far = FarEnd::start(far)?;
    let mut guest = Guest::connect(far.1)?;
    // Its limit of descriptors is the one that the network has just raised.
    let crowd = if with_crowd { Some(FarEnd::start("crowd")?) } else { None };
    if let Some(c) = &crowd {
        guest.crowd(c.1)?;
    }
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let (mut moved, mut last) = (0, Instant::now());
    while start.elapsed().as_secs_f64() < seconds {
        match turn(&mut guest) {
            0 if last.elapsed() > PATIENCE => return Err(format!("{what}: the stream stopped")),
            0 => {
                let _ = guest.bell.recv_timeout(Duration::from_millis(100));
                while guest.bell.try_recv().is_ok() {}
            }
            n => (moved, last) = (moved + n, Instant::now()),
        }
    }
    let gbit = moved as f64 * 8.0 / 1e9;
    let used = cpu_seconds() - cpu;
    Ok(Row {
        what,
        rate: gbit / start.elapsed().as_secs_f64(),
        per_core: gbit / used.max(0.01),
        wanted: WANTED,
    })
}
