//! Transmission: legacy, context and data descriptors, checksums, segmentation (82574 data sheet section 7.2).

use super::Inner;
use super::regs::{
    BAH, BAL, BPTC, CTRL, GOTCL, GPTC, HEAD, LEN, MPTC, PTC64, QUEUE, TAIL, TCTL, TCTL_EN, TCTL_PSP, TDBAL,
    TOTL, TPT, TSCTC, VET, cause, ctrl,
};
use super::rx::{CRC, LEAST};
use ringfort_memory::{Bytes, GuestAddress};
use ringfort_net::{GsoKind, MAX_FRAME, Offloads, Sent, VnetHeader, segment};
use serde::{Deserialize, Serialize};

const DESCRIPTOR: u64 = 16;
/// Descriptors looked at in one go: a driver that moves its tail without end does not keep the device to itself.
const BATCH: u32 = 1024;

/// Frames of its own that wait to come back.
const MOST_LOOPED: usize = 256;

// Command bits.
const EOP: u8 = 1 << 0;
const IFCS_IC: u8 = 1 << 2;
const TSE: u8 = 1 << 2;
const RS: u8 = 1 << 3;
const DEXT: u8 = 1 << 5;
const VLE: u8 = 1 << 6;
/// Descriptor done.
const DD: u8 = 1;
// Of the context's command.
const TUCMD_TCP: u8 = 1 << 0;
const TUCMD_IP: u8 = 1 << 1;
// Packet options.
const IXSM: u8 = 1 << 0;
const TXSM: u8 = 1 << 1;

/// What the last context descriptor of a queue said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Context {
    ipcss: u8,
    ipcso: u8,
    ipcse: u16,
    tucss: u8,
    tucso: u8,
    tucse: u16,
    tucmd: u8,
    hdrlen: u8,
    mss: u16,
}

/// A packet whose descriptors have not all come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Assembly {
    context: Context,
    frame: Vec<u8>,
    /// It is longer than any frame may be, and is lost.
    too_long: bool,
    /// Options of its first data descriptor.
    options: u8,
    segment: bool,
    vlan: Option<u16>,
    /// Where to put a checksum, and from where on it counts, of a legacy descriptor.
    legacy: Option<(u8, u8)>,
    begun: bool,
}

impl Assembly {
    fn begin_anew(&mut self) {
        let context = self.context;
        let mut frame = std::mem::take(&mut self.frame);
        frame.clear();
        *self = Assembly { context, frame, ..Assembly::default() };
    }
}

/// Put the Internet checksum of `from..end` at `at`; nothing where that is beyond the frame.
fn put_sum(frame: &mut [u8], from: usize, end: usize, at: usize, udp: bool) {
    if from >= end || end > frame.len() || at + 2 > frame.len() {
        return;
    }
    let mut sum = segment::checksum(&frame[from..end]);
    if udp && sum == 0 {
        sum = 0xffff;
    }
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

impl Inner {
    /// Send what is left, then what the driver has put into its rings.
    pub fn transmit(&mut self) {
        if !self.drain() {
            return;
        }
        for queue in 0..2 {
            self.transmit_queue(queue);
        }
    }

    /// Hand on what the back end had no room for; false if there is still none.
    fn drain(&mut self) -> bool {
        while let Some((header, frame)) = self.outbox.front() {
            if self.wiring.backend.send(0, header, frame) == Sent::Full {
                return false;
            }
            self.outbox.pop_front();
        }
        true
    }

    fn transmit_queue(&mut self, queue: usize) {
        let base = TDBAL + queue as u32 * QUEUE;
        let size = self.get(base + LEN) / DESCRIPTOR as u32;
        if self.get(TCTL) & TCTL_EN == 0 || size == 0 || !self.may_dma() {
            return;
        }
        let ring = u64::from(self.get(base + BAL) & !15) | u64::from(self.get(base + BAH)) << 32;
        let (mut head, tail) = (self.get(base + HEAD), self.get(base + TAIL));
        if head >= size || tail >= size {
            return;
        }
        let (mut causes, mut done) = (0, 0);
        while head != tail && done < BATCH && self.outbox.is_empty() {
            let at = ring + u64::from(head) * DESCRIPTOR;
            let mut raw = [0; 16];
            if self.wiring.memory.read_slice(&mut raw, GuestAddress(at)).is_err() {
                break;
            }
            self.descriptor(queue, &raw);
            if raw[11] & RS != 0 {
                // Only the status is written: the rest is the driver's.
                let _ = self.wiring.memory.write_slice(&[raw[12] | DD], GuestAddress(at + 12));
                causes |= self.queue_cause(queue, false);
            }
            head = (head + 1) % size;
            done += 1;
            self.set(base + HEAD, head);
        }
        if done > 0 {
            self.wiring.backend.flush(0);
        }
        if head == tail && done > 0 {
            causes |= cause::TXQE;
        } else if head != tail && self.outbox.is_empty() {
            self.wiring.bell.ring();
        }
        if causes != 0 {
            self.raise(causes);
        }
    }

    fn descriptor(&mut self, queue: usize, raw: &[u8; 16]) {
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let command = raw[11];
        let extended = command & DEXT != 0;
        // Type 0 is a context, 1 is data.
        if extended && raw[10] >> 4 == 0 {
            self.tx[queue].context = Context {
                ipcss: raw[0],
                ipcso: raw[1],
                ipcse: half(2),
                tucss: raw[4],
                tucso: raw[5],
                tucse: half(6),
                tucmd: command,
                hdrlen: raw[13],
                mss: half(14),
            };
            return;
        }
        let address = u64::from_le_bytes([raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7]]);
        let len = if extended {
            usize::from(half(8)) | usize::from(raw[10] & 15) << 16
        } else {
            usize::from(half(8))
        };
        let vme = self.get(CTRL) & ctrl::VME != 0;
        let a = &mut self.tx[queue];
        if !a.begun {
            a.begun = true;
            if extended {
                a.options = raw[13];
                a.segment = command & TSE != 0;
            }
        }
        if command & VLE != 0 && vme {
            a.vlan = Some(half(14));
        }
        if !extended && command & IFCS_IC != 0 && command & EOP != 0 {
            a.legacy = Some((raw[10], raw[13]));
        }
        let before = a.frame.len();
        if len > 0 && !a.too_long {
            if before + len > MAX_FRAME {
                a.too_long = true;
            } else {
                a.frame.resize(before + len, 0);
                if self.wiring.memory.read_slice(&mut a.frame[before..], GuestAddress(address)).is_err() {
                    a.too_long = true;
                }
            }
        }
        if command & EOP != 0 {
            let mut a = std::mem::take(&mut self.tx[queue]);
            if !a.too_long {
                self.finish(&mut a);
            }
            a.begin_anew();
            self.tx[queue] = a;
        }
    }

    /// A packet is whole: do what the driver left to do, or leave it to the back end.
    fn finish(&mut self, a: &mut Assembly) {
        let c = a.context;
        let mut header = VnetHeader::default();
        let can = self.wiring.backend.accepts().and(Offloads::ALL);
        if a.frame.len() < 14 {
            return;
        }
        if self.get(TCTL) & TCTL_PSP != 0 && !a.segment {
            // Section 10.2.6.1; a tag comes on top.
            a.frame.resize(a.frame.len().max(LEAST), 0);
        }
        if a.segment && c.mss > 0 && c.tucmd & TUCMD_TCP != 0 {
            let Some(h) = self.prepare_segments(a) else { return };
            header = h;
        } else {
            if a.options & TXSM != 0 {
                let (start, at) = (u16::from(c.tucss), u16::from(c.tucso));
                let end = a.frame.len();
                if can.checksum && c.tucse == 0 && at >= start && usize::from(at) + 2 <= end {
                    header.checksum = Some((start, at - start));
                } else {
                    let end = if c.tucse == 0 { end } else { usize::from(c.tucse) + 1 };
                    put_sum(&mut a.frame, start.into(), end, at.into(), c.tucmd & TUCMD_TCP == 0);
                }
            }
            if a.options & IXSM != 0 {
                put_ip_sum(&mut a.frame, c);
            }
            if let Some((at, from)) = a.legacy {
                let end = a.frame.len();
                put_sum(&mut a.frame, from.into(), end, at.into(), false);
            }
        }
        if let Some(tag) = a.vlan {
            let kind = (self.get(VET) as u16).to_be_bytes();
            let t = tag.to_be_bytes();
            a.frame.splice(12..12, [kind[0], kind[1], t[0], t[1]]);
            header.checksum = header.checksum.map(|(s, o)| (s + 4, o));
            header.header_len += if header.header_len > 0 { 4 } else { 0 };
        }
        self.send(header, &a.frame, can);
    }

    /// Set the headers of a long packet as the back ends want them: with lengths and the pseudo header's sum.
    fn prepare_segments(&mut self, a: &mut Assembly) -> Option<VnetHeader> {
        let c = a.context;
        let (ip, tcp, headers) = (usize::from(c.ipcss), usize::from(c.tucss), usize::from(c.hdrlen));
        let f = &mut a.frame;
        if ip + 20 > tcp || tcp + 20 > headers || headers > f.len() {
            return None;
        }
        let len = (f.len() - tcp) as u32;
        let v4 = c.tucmd & TUCMD_IP != 0;
        let addresses = if v4 { ip + 12..ip + 20 } else { ip + 8..ip + 40 };
        if addresses.end > tcp {
            return None;
        }
        if v4 {
            let total = u16::try_from(f.len() - ip).ok()?;
            f[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
            f[ip + 10..ip + 12].fill(0);
            put_sum(f, ip, tcp, ip + 10, false);
        } else {
            let payload = u16::try_from(f.len() - ip - 40).ok()?;
            f[ip + 4..ip + 6].copy_from_slice(&payload.to_be_bytes());
        }
        let pseudo = [&f[addresses], &len.to_be_bytes(), &[0, 0, 0, 6]].concat();
        let sum = !segment::checksum(&pseudo);
        f[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
        Some(VnetHeader {
            checksum: Some((tcp as u16, 16)),
            gso: Some((if v4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 }, c.mss)),
            header_len: headers as u16,
            ..VnetHeader::default()
        })
    }

    /// Count `n` frames of `len` bytes to this address, check sequence included.
    fn count_sent(&mut self, to: &[u8], len: usize, n: u32) {
        self.count(GPTC, n);
        self.count(TPT, n);
        self.count_bytes(GOTCL, len * n as usize);
        self.count_bytes(TOTL, len * n as usize);
        self.count_length(PTC64, len, n);
        if to == [0xff; 6] {
            self.count(BPTC, n);
        } else if to[0] & 1 != 0 {
            self.count(MPTC, n);
        }
    }

    fn send(&mut self, header: VnetHeader, frame: &[u8], can: Offloads) {
        let loops = self.loops();
        if !self.link && !loops {
            self.passed.tx_dropped += 1;
            return;
        }
        self.passed.tx_frames += 1;
        self.passed.tx_bytes += frame.len() as u64;
        let headers = usize::from(header.header_len);
        match header.gso {
            // As they are on the cable: all of one length, and a rest.
            Some((_, size)) if headers > 0 && headers < frame.len() => {
                self.count(TSCTC, 1);
                let payload = frame.len() - headers;
                let size = usize::from(size);
                self.count_sent(&frame[..6], headers + size + CRC, (payload / size) as u32);
                let rest = payload % size;
                self.count_sent(&frame[..6], headers + rest + CRC, u32::from(rest > 0));
            }
            _ => self.count_sent(&frame[..6], frame.len().max(LEAST) + CRC, 1),
        }
        if loops {
            let looped = &mut self.looped;
            let mut back = |part: &[u8]| {
                if looped.len() < MOST_LOOPED {
                    looped.push_back(part.to_vec());
                }
            };
            match header.gso {
                Some(_) => segment::split(&header, frame, back),
                None => {
                    let mut whole = frame.to_vec();
                    if let Some((start, offset)) = header.checksum {
                        let (start, end) = (usize::from(start), whole.len());
                        put_sum(&mut whole, start, end, start + usize::from(offset), false);
                    }
                    back(&whole);
                }
            }
            return self.wiring.bell.ring();
        }
        let whole = match header.gso {
            Some((GsoKind::Tcp4, _)) => can.tso4,
            Some((GsoKind::Tcp6, _)) => can.tso6,
            Some((GsoKind::Udp, _)) => can.uso,
            None => true,
        };
        let (outbox, backend) = (&mut self.outbox, &self.wiring.backend);
        let mut give = |h: VnetHeader, f: &[u8]| {
            if !outbox.is_empty() || backend.send(0, &h, f) == Sent::Full {
                outbox.push_back((h, f.to_vec()));
            }
        };
        if whole {
            give(header, frame);
        } else {
            segment::split(&header, frame, |part| give(VnetHeader::default(), part));
        }
    }
}

fn put_ip_sum(frame: &mut [u8], c: Context) {
    let end = if c.ipcse == 0 { frame.len() } else { usize::from(c.ipcse) + 1 };
    let at = usize::from(c.ipcso);
    if at + 2 <= frame.len() {
        frame[at..at + 2].fill(0);
    }
    put_sum(frame, c.ipcss.into(), end, at, false);
}
