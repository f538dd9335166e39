//! The seam between a network device and what carries its frames.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Longest frame that passes a seam, in bytes: an IP packet of 65,535 bytes with Ethernet header and two VLAN tags.
pub const MAX_FRAME: usize = 65_535 + 14 + 8;

/// Work on frames that one side leaves to the other. The device asks the back end what it can take and give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Frames may come with a partial checksum ([`VnetHeader::checksum`]).
    pub checksum: bool,
    /// TCP over IPv4 may come longer than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 may come longer than the MTU.
    pub tso6: bool,
    /// As above, with the ECN bit CWR set.
    pub ecn: bool,
    /// UDP may come as several datagrams in one.
    pub uso: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };

    /// What both allow; segmentation needs checksums.
    #[must_use]
    pub fn and(self, other: Offloads) -> Offloads {
        let checksum = self.checksum && other.checksum;
        Offloads {
            checksum,
            tso4: checksum && self.tso4 && other.tso4,
            tso6: checksum && self.tso6 && other.tso6,
            ecn: checksum && self.ecn && other.ecn,
            uso: checksum && self.uso && other.uso,
        }
    }
}

/// Into what a long frame is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams over either (virtio: UDP_L4).
    Udp,
}

/// What is still to be done to a frame (virtio 1.3 section 5.1.6, in host terms).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// The checksum is to be completed: where the sum starts, and the offset of the field from there, both within
    /// the frame. The field holds the pseudo header's sum.
    pub checksum: Option<(u16, u16)>,
    /// The checksums were checked; they need no check again.
    pub valid: bool,
    /// The frame is to be cut: how, and bytes of payload in each part (not 0).
    pub gso: Option<(GsoKind, u16)>,
    /// The first part carries CWR (TCP with ECN).
    pub ecn: bool,
    /// Length of all headers, a hint; 0 if not known.
    pub header_len: u16,
}

impl VnetHeader {
    /// Bytes of the form that virtio 1.x and taps share, `num_buffers` included.
    pub const LEN: usize = 12;

    const NEEDS_CSUM: u8 = 1;
    const DATA_VALID: u8 = 2;
    const GSO_TCPV4: u8 = 1;
    const GSO_TCPV6: u8 = 4;
    const GSO_UDP_L4: u8 = 5;
    const GSO_ECN: u8 = 0x80;

    /// Read the little-endian form and check it against a frame of `frame_len` bytes and what was agreed on.
    /// `None` when it does not fit: such a frame is dropped.
    pub fn decode(raw: &[u8; Self::LEN], frame_len: usize, agreed: Offloads) -> Option<VnetHeader> {
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let mut header = VnetHeader {
            valid: raw[0] & Self::DATA_VALID != 0,
            header_len: half(2),
            ..VnetHeader::default()
        };
        if raw[0] & Self::NEEDS_CSUM != 0 {
            let (start, offset) = (half(6), half(8));
            let end = usize::from(start) + usize::from(offset) + 2;
            if !agreed.checksum || end > frame_len {
                return None;
            }
            header.checksum = Some((start, offset));
        }
        let (kind, allowed) = match raw[1] & !Self::GSO_ECN {
            0 => return Some(header),
            Self::GSO_TCPV4 => (GsoKind::Tcp4, agreed.tso4),
            Self::GSO_TCPV6 => (GsoKind::Tcp6, agreed.tso6),
            Self::GSO_UDP_L4 => (GsoKind::Udp, agreed.uso),
            _ => return None,
        };
        let size = half(4);
        header.ecn = raw[1] & Self::GSO_ECN != 0;
        // Virtio 1.3 section 5.1.6.2.1: segmentation comes with a checksum to be completed.
        if !allowed || size == 0 || header.checksum.is_none() || (header.ecn && !agreed.ecn) {
            return None;
        }
        header.gso = Some((kind, size));
        Some(header)
    }

    /// The little-endian form; `buffers` is what the device fills in on receive, 1 otherwise.
    pub fn encode(&self, buffers: u16) -> [u8; Self::LEN] {
        let mut raw = [0; Self::LEN];
        if let Some((start, offset)) = self.checksum {
            raw[0] |= Self::NEEDS_CSUM;
            raw[6..8].copy_from_slice(&start.to_le_bytes());
            raw[8..10].copy_from_slice(&offset.to_le_bytes());
        } else if self.valid {
            raw[0] |= Self::DATA_VALID;
        }
        if let Some((kind, size)) = self.gso {
            raw[1] = match kind {
                GsoKind::Tcp4 => Self::GSO_TCPV4,
                GsoKind::Tcp6 => Self::GSO_TCPV6,
                GsoKind::Udp => Self::GSO_UDP_L4,
            };
            if self.ecn {
                raw[1] |= Self::GSO_ECN;
            }
            raw[4..6].copy_from_slice(&size.to_le_bytes());
        }
        raw[2..4].copy_from_slice(&self.header_len.to_le_bytes());
        raw[10..12].copy_from_slice(&buffers.to_le_bytes());
        raw
    }
}

/// What passed a pair of a card's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Their bytes, without headers of virtio.
    pub rx_bytes: u64,
    /// Frames that the guest's filter, too small or missing buffers kept out.
    pub rx_dropped: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest that broke a rule or met a pulled cable.
    pub tx_dropped: u64,
}

impl Statistics {
    /// All numbers with their names.
    pub fn named(&self) -> [(&'static str, u64); 6] {
        [
            ("rx_frames", self.rx_frames),
            ("rx_bytes", self.rx_bytes),
            ("rx_dropped", self.rx_dropped),
            ("tx_frames", self.tx_frames),
            ("tx_bytes", self.tx_bytes),
            ("tx_dropped", self.tx_dropped),
        ]
    }
}

/// What became of a frame given to a back end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way, or was dropped as a network may.
    Done,
    /// There is no room now. The back end reports [`NetEvents::writable`] when there is.
    Full,
}

/// What a back end tells its device. Calls come from any thread, and do not wait.
pub trait NetEvents: Send + Sync {
    /// [`NetBackend::receive`] may have a frame for this pair.
    fn readable(&self, pair: u16);
    /// As [`readable`](Self::readable), from a thread that holds no lock and has time: the device may take the frames on it.
    fn take_now(&self, pair: u16) {
        self.readable(pair);
    }
    /// [`NetBackend::send`] may have room again.
    fn writable(&self, pair: u16);
    /// The cable was plugged in or pulled.
    fn link(&self, up: bool);
}

/// What carries a device's frames. Frames are whole Ethernet frames without the check sequence. No call waits.
pub trait NetBackend: Send + Sync {
    /// What it can take off the guest.
    fn accepts(&self) -> Offloads;

    /// What it could give the guest, if the guest's driver can take it.
    fn produces(&self) -> Offloads;

    /// How many pairs of queues it can serve.
    fn max_pairs(&self) -> u16 {
        1
    }

    /// The largest IP packet, if it wants the guest to know.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// The device introduces itself, once.
    fn attach(&self, events: Arc<dyn NetEvents>);

    /// What the guest's driver can take from now on: a part of [`produces`](Self::produces).
    fn set_offloads(&self, offloads: Offloads);

    /// How many pairs of queues the guest serves from now on; [`max_pairs`](Self::max_pairs) until it says so.
    fn set_pairs(&self, pairs: u16) {
        let _ = pairs;
    }

    /// Carry a frame of at most [`MAX_FRAME`] bytes from the guest.
    fn send(&self, pair: u16, header: &VnetHeader, frame: &[u8]) -> Sent;

    /// What it counts beside the card's own [`Statistics`]: names and numbers.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Descriptors of its queues, if the host's kernel can serve the guest's queues by them (vhost-net).
    fn kernel_queues(&self) -> Option<Vec<BorrowedFd<'_>>> {
        None
    }

    /// Somebody else moves the frames by [`kernel_queues`](Self::kernel_queues), or does not any more: there is nothing to tell meanwhile.
    fn set_resting(&self, resting: bool) {
        let _ = resting;
    }

    /// The frames of one batch are all given.
    fn flush(&self, pair: u16) {
        let _ = pair;
    }

    /// The next frame for the guest, into `frame` (whose content is replaced). After `None` the back end
    /// reports [`NetEvents::readable`] when there is one.
    fn receive(&self, pair: u16, frame: &mut Vec<u8>) -> Option<VnetHeader>;
}
