//! Reception: filters, and descriptors in their three forms (82574 data sheet section 7.1).

use super::Inner;
use super::regs::{
    BAH, BAL, BPRC, CTRL, GORCL, GPRC, HEAD, LEN, MPC, MPRC, MRQC, MTA, PRC64, PSRCTL, QUEUE, RAL, RCTL,
    RDBAL, RETA, RFCTL, RFCTL_EXTEN, RNBC, ROC, RSSRK, RXCSUM, RXCSUM_IPOFL, RXCSUM_PCSD, RXCSUM_TUOFL, TAIL,
    TORL, TPR, VFTA, cause, ctrl, rctl,
};
use ringfort_memory::{Bytes, GuestAddress};
use ringfort_net::{hash, segment};

/// Frames given to the guest in one go, before others get their turn at the device.
const BATCH: usize = 64;
/// Longest frame without and with "long packets", with its check sequence (section 7.1.1).
const SHORT: usize = 1522;
const LONG: usize = 16 << 10;
/// Shortest frame, without its check sequence; shorter ones are filled up.
pub const LEAST: usize = 60;
/// Bytes of the check sequence.
pub const CRC: usize = 4;

// Status bits of a descriptor.
const DD: u32 = 1 << 0;
const EOP: u32 = 1 << 1;
const IXSM: u32 = 1 << 2;
const VP: u32 = 1 << 3;
const UDPCS: u32 = 1 << 4;
const TCPCS: u32 = 1 << 5;
const IPCS: u32 = 1 << 6;
const PIF: u32 = 1 << 7;
// Errors, in the extended form.
const TCPE: u32 = 1 << 29;
const IPE: u32 = 1 << 30;

/// How the driver has its descriptors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Legacy,
    Extended,
    Split,
}

/// What is told about a frame.
#[derive(Default)]
struct Report {
    status: u32,
    vlan: u16,
    /// Kind of the hash, and the hash; or the checksum of the packet.
    kind: u32,
    word: u32,
    queue: usize,
    headers: usize,
}

impl Inner {
    fn form(&self) -> Form {
        match (self.get(RFCTL) & RFCTL_EXTEN != 0, self.get(RCTL) >> 10 & 3) {
            (true, 1) => Form::Split,
            (true, _) => Form::Extended,
            (false, _) => Form::Legacy,
        }
    }

    /// Bytes of the driver's buffers: up to four for each packet.
    fn buffers(&self, form: Form) -> [usize; 4] {
        let r = self.get(RCTL);
        if form == Form::Split {
            let p = self.get(PSRCTL);
            let kib = |shift: u32| (p >> shift & 63) as usize * 1024;
            return [(p & 127) as usize * 128, kib(8), kib(16), kib(24)];
        }
        let flex = (r >> 27 & 15) as usize;
        let size = match (flex, r >> 25 & 1, r >> 16 & 3) {
            (1.., ..) => flex * 1024,
            (0, 0, n) => 2048 >> n,
            // 16 times as much; without it is reserved.
            (0, _, 0) => 2048,
            (0, _, n) => 32768 >> n,
        };
        [size, 0, 0, 0]
    }

    /// Whether the driver wants a frame to this address.
    fn wants(&self, frame: &[u8]) -> bool {
        let r = self.get(RCTL);
        if r & rctl::VFE != 0 && frame[12..14] == [0x81, 0] {
            let id = u32::from(u16::from_be_bytes([frame[14], frame[15]])) & 0xfff;
            if self.get(VFTA + (id >> 5) * 4) & 1 << (id & 31) == 0 {
                return false;
            }
        }
        let to = &frame[..6];
        if to == [0xff; 6] && r & rctl::BAM != 0 {
            return true;
        }
        if to[0] & 1 == 0 && r & rctl::UPE != 0 || to[0] & 1 != 0 && r & rctl::MPE != 0 {
            return true;
        }
        let listed = (0..16).any(|n| {
            let (low, high) = (self.get(RAL + 8 * n), self.get(RAL + 8 * n + 4));
            let address = [low.to_le_bytes().as_slice(), &high.to_le_bytes()[..2]].concat();
            high & 1 << 31 != 0 && address == to
        });
        if listed || to[0] & 1 == 0 {
            return listed;
        }
        // The multicast table goes by twelve bits of the address (section 7.1.1.1.2).
        let shift = [4, 3, 2, 0][(r >> 12 & 3) as usize];
        let bits = u32::from(u16::from_le_bytes([to[4], to[5]])) >> shift & 0xfff;
        self.get(MTA + (bits >> 5) * 4) & 1 << (bits & 31) != 0
    }

    /// Give the guest what has come. True if there may be more.
    pub fn receive(&mut self) -> bool {
        let mut causes = 0;
        let mut more = false;
        for n in 0..=BATCH {
            if n == BATCH {
                more = true;
                break;
            }
            let mut frame = std::mem::take(&mut self.inbox);
            if !self.inbox_full {
                let own = self.looped.pop_front();
                let is_own = own.is_some();
                if let Some(f) = own {
                    frame = f;
                } else if self.wiring.backend.receive(0, &mut frame).is_none() {
                    self.inbox = frame;
                    break;
                }
                let on = self.get(RCTL) & rctl::EN != 0 && (self.link || is_own) && self.may_dma();
                // While its own frames come back, those of others do not.
                let others = !is_own && self.loops();
                let most = if self.get(RCTL) & rctl::LPE != 0 { LONG } else { SHORT };
                frame.resize(frame.len().max(LEAST), 0);
                let too_long = frame.len() + 4 > most;
                if !on || others || too_long || !self.wants(&frame) {
                    if on && too_long {
                        self.count(ROC, 1);
                    }
                    self.passed.rx_dropped += 1;
                    self.inbox = frame;
                    continue;
                }
            }
            let placed = self.place(&frame, &mut causes);
            self.inbox = frame;
            self.inbox_full = !placed;
            if !placed {
                causes |= cause::RXO;
                self.count(RNBC, 1);
                break;
            }
        }
        if causes != 0 {
            self.raise(causes);
        }
        more
    }

    fn report(&self, frame: &mut Vec<u8>) -> Report {
        let mut r = Report { status: DD, ..Report::default() };
        if self.get(CTRL) & ctrl::VME != 0 && frame[12..14] == [0x81, 0] {
            r.vlan = u16::from_be_bytes([frame[14], frame[15]]);
            r.status |= VP;
            frame.drain(12..16);
        }
        let exact = (0..16).any(|n| {
            let low = self.get(RAL + 8 * n).to_le_bytes();
            frame[..4] == low && self.get(RAL + 8 * n + 4) & 1 << 31 != 0
        });
        if !exact && frame[0] & 1 != 0 {
            r.status |= PIF;
        }
        let offload = self.get(RXCSUM);
        match segment::verify(frame) {
            Some(v) => {
                r.headers = v.headers;
                if offload & RXCSUM_IPOFL != 0 && v.v4 {
                    r.status |= IPCS | if v.ip_good { 0 } else { IPE };
                }
                if offload & RXCSUM_TUOFL != 0
                    && let Some(good) = v.l4_good
                {
                    r.status |= TCPCS | if v.udp { UDPCS } else { 0 } | if good { 0 } else { TCPE };
                }
            }
            None => r.status |= IXSM,
        }
        if offload & RXCSUM_PCSD != 0 {
            if self.get(MRQC) & 3 == 1 {
                self.hash(frame, &mut r);
            }
        } else {
            let from = (offload & 0xff) as usize;
            // The packet checksum, ones' complement, goes to the upper half.
            r.word = u32::from(!segment::checksum(frame.get(from..).unwrap_or(&[]))) << 16;
        }
        r
    }

    fn hash(&self, frame: &[u8], r: &mut Report) {
        use hash::types;
        // Bits 16 on of MRQC choose what is hashed (section 10.2.9.1); numbers of the descriptor: section 7.1.11.
        let m = self.get(MRQC) >> 16;
        let mut allowed = 0;
        for (bit, kind) in [(0, types::TCPV4), (1, types::IPV4), (4, types::IPV6), (5, types::TCPV6)] {
            allowed |= if m & 1 << bit != 0 { kind } else { 0 };
        }
        let toeplitz = self.toeplitz.get_or_init(|| {
            let key: Vec<u8> = (0..10).flat_map(|n| self.get(RSSRK + 4 * n).to_le_bytes()).collect();
            hash::Toeplitz::new(&key)
        });
        if let Some((value, kind)) = toeplitz.of_frame(frame, allowed) {
            r.word = value;
            r.kind = match kind {
                types::TCPV4 => 1,
                types::IPV4 => 2,
                types::TCPV6 => 3,
                _ => 5,
            };
            let at = value & 127;
            let entry = self.get(RETA + (at & !3)).to_le_bytes()[(at & 3) as usize];
            r.queue = usize::from(entry >> 7);
        }
    }

    /// Put a frame into the driver's buffers; false if there are not enough.
    fn place(&mut self, frame: &[u8], causes: &mut u32) -> bool {
        let form = self.form();
        let sizes = self.buffers(form);
        let mut data = std::mem::take(&mut self.scratch);
        data.clear();
        data.extend_from_slice(frame);
        let report = self.report(&mut data);
        if self.get(RCTL) & rctl::SECRC == 0 {
            let sum = crc32fast::hash(&data);
            data.extend_from_slice(&sum.to_le_bytes());
        }
        let base = RDBAL + report.queue as u32 * QUEUE;
        let step = if form == Form::Split { 32 } else { 16 };
        let size = self.get(base + LEN) / step;
        let each: usize = sizes.iter().sum();
        let (head, tail) = (self.get(base + HEAD), self.get(base + TAIL));
        let free = if size == 0 || head >= size || tail >= size { 0 } else { (tail + size - head) % size };
        let need = data.len().div_ceil(each.max(1)) as u32;
        let fits = each > 0 && need <= free && self.may_dma();
        if fits {
            let ring = u64::from(self.get(base + BAL) & !15) | u64::from(self.get(base + BAH)) << 32;
            let mut head = head;
            let mut rest = &data[..];
            while !rest.is_empty() {
                let at = ring + u64::from(head) * u64::from(step);
                let n = rest.len().min(each);
                let last = n == rest.len();
                self.descriptor_out(form, at, &rest[..n], sizes, last, &report);
                rest = &rest[n..];
                head = (head + 1) % size;
            }
            self.set(base + HEAD, head);
            self.count_received(frame);
            *causes |= self.queue_cause(report.queue, true);
            // Few are left: a half, a quarter or an eighth of them (section 10.2.5.1, RDMTS).
            let left = (tail + size - head) % size;
            if left <= size >> ((self.get(RCTL) >> 8 & 3) + 1) {
                *causes |= cause::RXDMT0;
            }
        } else if size == 0 {
            // There is no ring: the frame is lost, as on a device whose driver sleeps.
            self.count(MPC, 1);
            self.passed.rx_dropped += 1;
            self.scratch = data;
            return true;
        }
        self.scratch = data;
        fits
    }

    fn descriptor_out(&self, form: Form, at: u64, data: &[u8], sizes: [usize; 4], last: bool, r: &Report) {
        let memory = &self.wiring.memory;
        let word = |n: u64| {
            let mut raw = [0; 8];
            // What is not in RAM reads as nothing, and what is written there goes nowhere.
            let _ = memory.read_slice(&mut raw, GuestAddress(at + 8 * n));
            u64::from_le_bytes(raw)
        };
        let status = if last { r.status | EOP } else { DD };
        let put = |address: u64, bytes: &[u8]| _ = memory.write_slice(bytes, GuestAddress(address));
        let len = (data.len() as u16).to_le_bytes();
        match form {
            Form::Legacy => {
                put(word(0), data);
                let errors = (status >> 24) as u8;
                let sum = (r.word >> 16) as u16;
                let mut out = [0; 8];
                out[..2].copy_from_slice(&len);
                out[2..4].copy_from_slice(&sum.to_le_bytes());
                out[5] = errors;
                out[6..8].copy_from_slice(&r.vlan.to_le_bytes());
                put(at + 8, &out);
                put(at + 12, &[status as u8]);
            }
            Form::Extended => {
                put(word(0), data);
                let mut out = [0; 16];
                out[..4].copy_from_slice(&r.kind.to_le_bytes());
                out[4..8].copy_from_slice(&r.word.to_le_bytes());
                out[12..14].copy_from_slice(&len);
                out[14..16].copy_from_slice(&r.vlan.to_le_bytes());
                put(at, &out);
                put(at + 8, &status.to_le_bytes());
            }
            Form::Split => {
                let buffers: [u64; 4] = std::array::from_fn(|n| word(n as u64));
                let mut lengths = [0u16; 4];
                // Headers go to the first buffer if they fit there; the rest to the others.
                let split = if last && r.headers > 0 && r.headers <= sizes[0].min(data.len()) {
                    r.headers
                } else {
                    0
                };
                let mut rest = data;
                if split > 0 {
                    put(buffers[0], &rest[..split]);
                    lengths[0] = split as u16;
                    rest = &rest[split..];
                }
                let first = usize::from(split > 0);
                for n in first..4 {
                    let part = rest.len().min(sizes[n]);
                    if part > 0 {
                        put(buffers[n], &rest[..part]);
                        lengths[n] = part as u16;
                        rest = &rest[part..];
                    }
                }
                let mut out = [0; 32];
                out[..4].copy_from_slice(&r.kind.to_le_bytes());
                out[4..8].copy_from_slice(&r.word.to_le_bytes());
                out[12..14].copy_from_slice(&lengths[0].to_le_bytes());
                out[14..16].copy_from_slice(&r.vlan.to_le_bytes());
                // Header length, and that it was split there.
                let header = split as u16 | if split > 0 { 1 << 15 } else { 0 };
                out[16..18].copy_from_slice(&header.to_le_bytes());
                for n in 1..4 {
                    out[16 + 2 * n..18 + 2 * n].copy_from_slice(&lengths[n].to_le_bytes());
                }
                put(at, &out);
                put(at + 8, &status.to_le_bytes());
            }
        }
    }

    /// A frame as it came, without its check sequence.
    fn count_received(&mut self, data: &[u8]) {
        self.passed.rx_frames += 1;
        self.passed.rx_bytes += data.len() as u64;
        self.count(GPRC, 1);
        self.count(TPR, 1);
        // From the destination to the check sequence (section 10.2.7.27).
        let len = data.len() + CRC;
        self.count_bytes(GORCL, len);
        self.count_bytes(TORL, len);
        self.count_length(PRC64, len, 1);
        if data[..6] == [0xff; 6] {
            self.count(BPRC, 1);
        } else if data[0] & 1 != 0 {
            self.count(MPRC, 1);
        }
    }
}
