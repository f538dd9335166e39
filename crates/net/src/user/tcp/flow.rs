//! One connection.

use super::ring::Ring;
use super::{Pair, RECEIVE_ROOM, SCALE};
use crate::user::stack::Common;
use crate::wire::{self, Path, TCP};
use crate::{GsoKind, VnetHeader};
use ringfort_bus::lock;
use smoltcp::wire::{TcpOption, TcpPacket};
use socket2::SockRef;
use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

// Flags (RFC 9293 section 3.1).
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
/// How far a connection is.
pub enum Phase {
    /// The host's connection is being made; the guest waits.
    Connecting,
    /// The host's is there (by a forwarded port); the guest was asked.
    SynSent,
    /// The host's is there; the guest was told.
    SynReceived,
    Open,
}

/// A connection: towards the guest by our own TCP, towards the host as a socket.
pub struct Flow {
    pub pair: Pair,
    pub stream: TcpStream,
    pub phase: Phase,
    /// First sequence number that the guest has not acknowledged; in [`Phase::Open`] that of `buf`'s first byte.
    pub una: u32,
    /// Bytes for the guest, from `una` on.
    pub buf: Ring,
    /// How many of them are sent, and were sent at most.
    pub sent: usize,
    pub max_sent: usize,
    pub window: usize,
    pub scale: u8,
    pub mss: usize,
    pub host_eof: bool,
    pub fin_sent: bool,
    pub fin_ever_sent: bool,
    pub fin_acked: bool,
    /// Next byte expected of the guest.
    pub next: u32,
    /// Bytes of the guest that the host has not taken, and how many they may be.
    pub to_host: Ring,
    pub room: usize,
    pub our_scale: u8,
    pub guest_fin: bool,
    pub host_shut: bool,
    /// The window told last, in bytes.
    pub told: usize,
    pub ack_due: bool,
    /// Bytes of the guest that are not acknowledged, and until when the acknowledgement may wait.
    pub unacknowledged: usize,
    pub delayed: Option<Instant>,
    /// The host may have data, as far as known.
    pub readable: bool,
    /// The host has an urgent byte on its way.
    pub urgent_comes: bool,
    /// The last read ended early, as it does before an urgent byte, and perhaps before anybody has told of that one.
    pub ended_early: bool,
    /// The number behind one that is in `buf`.
    pub urgent: Option<u32>,
    pub deadline: Option<Instant>,
    /// Where its entry in the timers stands.
    pub queued: Option<Instant>,
    /// It waits for room towards the guest.
    pub blocked: bool,
    pub tries: u32,
    pub repeats: u32,
    pub last: Instant,
}

/// A checked segment.
pub struct Segment<'a> {
    /// First sequence number.
    pub seq: u32,
    pub ack: Option<u32>,
    pub flags: u8,
    pub window: u16,
    pub mss: Option<u16>,
    pub scale: Option<u8>,
    /// How many bytes from `seq` on there are up to behind the urgent one.
    pub urgent: Option<u16>,
    pub data: &'a [u8],
}

/// Read a segment's header and options; `None` if they are malformed.
pub fn parse<'a>(p: &TcpPacket<&'a [u8]>) -> Option<Segment<'a>> {
    let flag = |on: bool, bit: u8| if on { bit } else { 0 };
    let flags = flag(p.fin(), FIN) | flag(p.syn(), SYN) | flag(p.rst(), RST) | flag(p.ack(), ACK);
    let (mut mss, mut scale) = (None, None);
    if p.syn() {
        let mut rest = p.options();
        while !rest.is_empty() {
            let (next, option) = TcpOption::parse(rest).ok()?;
            match option {
                TcpOption::EndOfList => break,
                TcpOption::MaxSegmentSize(v) => mss = Some(v),
                // RFC 7323 section 2.3: 14 at most.
                TcpOption::WindowScale(v) => scale = Some(v.min(14)),
                _ => {}
            }
            rest = next;
        }
    }
    Some(Segment {
        seq: p.seq_number().0 as u32,
        ack: p.ack().then(|| p.ack_number().0 as u32),
        flags,
        window: p.window_len(),
        mss,
        scale,
        urgent: p.urg().then(|| p.urgent_at()),
        data: p.payload(),
    })
}

impl Flow {
    /// A connection of which only the ends are known; `first` is its first sequence number.
    pub fn new(pair: Pair, stream: TcpStream, phase: Phase, first: u32, now: Instant) -> Flow {
        Flow {
            pair,
            stream,
            phase,
            una: first,
            buf: Ring::default(),
            sent: 0,
            max_sent: 0,
            window: 0,
            scale: 0,
            mss: 536,
            host_eof: false,
            fin_sent: false,
            fin_ever_sent: false,
            fin_acked: false,
            next: 0,
            to_host: Ring::default(),
            room: RECEIVE_ROOM,
            our_scale: 0,
            guest_fin: false,
            host_shut: false,
            told: 0,
            ack_due: false,
            unacknowledged: 0,
            delayed: None,
            readable: false,
            urgent_comes: false,
            ended_early: true,
            urgent: None,
            deadline: None,
            queued: None,
            blocked: false,
            tries: 0,
            repeats: 0,
            last: now,
        }
    }

    /// What the guest's SYN says.
    pub fn meet(&mut self, s: &Segment<'_>, mtu: usize) {
        let headers = if self.pair.guest.is_ipv6() { 60 } else { 40 };
        let most = mtu.saturating_sub(headers).max(536);
        // RFC 9293 section 3.7.1.
        let silent = if self.pair.guest.is_ipv6() { 1220 } else { 536 };
        self.mss = usize::from(s.mss.unwrap_or(silent)).clamp(64, most);
        self.window = usize::from(s.window);
        (self.scale, self.our_scale) = s.scale.map_or((0, 0), |v| (v, SCALE));
        self.next = s.seq.wrapping_add(1);
    }

    /// Bytes that the guest may send.
    pub fn free(&self) -> usize {
        let most = if self.our_scale == 0 { 0xffff } else { RECEIVE_ROOM };
        most.min(self.room).saturating_sub(self.to_host.len())
    }

    /// Whether it is still being made.
    pub fn is_opening(&self) -> bool {
        self.phase != Phase::Open
    }

    /// Whether both directions have ended.
    pub fn is_done(&self) -> bool {
        self.guest_fin && self.host_shut && self.fin_acked
    }

    /// Send a segment with `len` bytes of the buffer from `at` on.
    pub fn emit(&mut self, c: &mut Common, flags: u8, at: usize, len: usize) {
        let Some(guest_mac) = c.guest_mac else { return };
        let path = Path { from: c.mac, to: guest_mac, src: self.pair.far.ip(), dst: self.pair.guest.ip() };
        let mss = (c.config.mtu - if path.src.is_ipv6() { 60 } else { 40 }).to_be_bytes();
        let of_syn = [2, 4, mss[0], mss[1], 1, 3, 3, SCALE];
        // The scale answers the guest's, or is offered first.
        let options: &[u8] = match flags & SYN != 0 {
            false => &[],
            true if flags & ACK == 0 || self.our_scale > 0 => &of_syn,
            true => &of_syn[..4],
        };
        let (mut frame, offloads) = {
            let mut out = lock(&c.output);
            (out.buffer(), out.offloads)
        };
        frame.reserve(wire::ETH + 68 + len);
        let start = wire::ip(&mut frame, &path, TCP, 20 + options.len() + len);
        let free = self.free();
        let window = if flags & SYN != 0 { free } else { free >> self.our_scale }.min(0xffff);
        let seq = self.una.wrapping_add(at as u32);
        let mut header = [0; 20];
        header[..2].copy_from_slice(&self.pair.far.port().to_be_bytes());
        header[2..4].copy_from_slice(&self.pair.guest.port().to_be_bytes());
        header[4..8].copy_from_slice(&seq.to_be_bytes());
        if flags & ACK != 0 {
            header[8..12].copy_from_slice(&self.next.to_be_bytes());
        }
        header[12] = (((20 + options.len()) / 4) << 4) as u8;
        header[13] = flags;
        // Up to behind the urgent byte (RFC 6093 section 3.1).
        if let Some(n) = self.urgent.map(|u| u.wrapping_sub(seq)).filter(|n| (1..=0xffff).contains(n)) {
            header[13] |= URG;
            header[18..20].copy_from_slice(&(n as u16).to_be_bytes());
        }
        header[14..16].copy_from_slice(&(window as u16).to_be_bytes());
        frame.extend_from_slice(&header);
        frame.extend_from_slice(options);
        let (a, b) = self.buf.slices(at, len);
        frame.extend_from_slice(a);
        frame.extend_from_slice(b);
        let mut header = wire::finish(&mut frame, &path, TCP, start, 16, offloads.checksum);
        header.valid = true;
        if len > self.mss {
            let kind = if path.src.is_ipv4() { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
            header.gso = Some((kind, self.mss as u16));
            header.header_len = (start + 20 + options.len()) as u16;
        }
        self.told = free;
        (self.ack_due, self.unacknowledged, self.delayed) = (false, 0, None);
        // What is alone on its way need not stand behind what others move in bulk.
        let urgent = len <= self.mss && self.max_sent == 0;
        c.push_as(header, frame, urgent);
    }

    /// Where the next new sequence number is, from `una` on.
    pub fn next_seq_offset(&self) -> usize {
        self.sent + usize::from(self.fin_sent)
    }

    /// Tell the guest what came, and how much more may come.
    pub fn acknowledge(&mut self, c: &mut Common) {
        self.emit(c, ACK, self.next_seq_offset(), 0);
    }

    /// Tell the guest that it is over.
    pub fn refuse(&mut self, c: &mut Common) {
        if self.phase == Phase::Connecting {
            // The guest's SYN is answered: our sequence number does not count.
            self.una = 0;
        }
        self.emit(c, RST | ACK, self.next_seq_offset(), 0);
    }

    /// Tell the host's other end that it was not a clean end.
    pub fn abort(&self) {
        // The connection goes away in any case.
        let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// Give the host what it takes; the byte at `urgent`, if any, out of band. An error ends the connection.
    pub fn give_host(&mut self, data: &[u8], urgent: Option<usize>) -> io::Result<usize> {
        let mut taken = 0;
        if self.to_host.is_empty() {
            while taken < data.len() {
                let written = match urgent {
                    Some(at) if at == taken => SockRef::from(&self.stream).send_out_of_band(&data[at..=at]),
                    Some(at) if at > taken => self.stream.write(&data[taken..at]),
                    _ => self.stream.write(&data[taken..]),
                };
                match written {
                    Ok(0) => break,
                    Ok(n) => taken += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
        }
        let kept = (data.len() - taken).min(self.free());
        self.to_host.extend(&data[taken..taken + kept]);
        Ok(taken + kept)
    }

    /// Give the host what it has not taken yet, and the end after it. An error ends the connection.
    pub fn drain_to_host(&mut self) -> io::Result<()> {
        while !self.to_host.is_empty() {
            let (a, _) = self.to_host.slices(0, usize::MAX);
            match self.stream.write(a) {
                Ok(0) => break,
                Ok(n) => self.to_host.consume(n),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.to_host.is_empty() && self.guest_fin && !self.host_shut {
            self.host_shut = true;
            // The peer may have closed already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }
}

/// Answer a segment that belongs to no connection (RFC 9293 section 3.10.7.1).
pub fn reset(c: &mut Common, pair: Pair, s: &Segment<'_>) {
    let Some(guest_mac) = c.guest_mac.filter(|_| s.flags & RST == 0) else { return };
    let path = Path { from: c.mac, to: guest_mac, src: pair.far.ip(), dst: pair.guest.ip() };
    let len = s.data.len() as u32 + u32::from(s.flags & SYN != 0) + u32::from(s.flags & FIN != 0);
    let (seq, ack, flags) = match s.ack {
        Some(ack) => (ack, 0, RST),
        None => (0, s.seq.wrapping_add(len), RST | ACK),
    };
    let mut frame = lock(&c.output).buffer();
    let start = wire::ip(&mut frame, &path, TCP, 20);
    frame.extend_from_slice(&pair.far.port().to_be_bytes());
    frame.extend_from_slice(&pair.guest.port().to_be_bytes());
    frame.extend_from_slice(&seq.to_be_bytes());
    frame.extend_from_slice(&ack.to_be_bytes());
    frame.extend_from_slice(&[0x50, flags, 0, 0, 0, 0, 0, 0]);
    wire::finish(&mut frame, &path, TCP, start, 16, false);
    c.push_as(VnetHeader { valid: true, ..VnetHeader::default() }, frame, true);
}
