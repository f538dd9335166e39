//! MSI-X: vector table and pending bit array (PCI 3.0 section 6.8.2).

use super::PciError;
use ringfort_bus::{MsiChannel, MsiMessage, MsiSink, lock};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// Where table and pending bit array lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in its BAR, a multiple of 8.
    pub table_offset: u32,
    /// BAR of the pending bit array.
    pub pba_bar: u8,
    /// Offset of the pending bit array in its BAR, a multiple of 8.
    pub pba_offset: u32,
}

/// Saved table and pending bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixSaved {
    table: Vec<u8>,
    pending: Vec<u64>,
    enabled: bool,
    masked: bool,
    bus_master: bool,
}

/// The MSI-X side of a function: the table that the guest writes, masks, pending bits, and delivery.
///
/// Enable, function mask and bus mastering follow the configuration space; [`super::PciConfig`] keeps them so.
pub struct MsixState {
    layout: MsixLayout,
    vectors: u16,
    sink: Arc<dyn MsiSink>,
    inner: Mutex<Inner>,
}

const ENTRY: usize = 16;
/// Messages after which a vector gets a channel of its own: making one costs more than a few messages do.
const BUSY: u32 = 16;

/// How a vector's messages go.
enum Way {
    /// To the sink, which had so many of them.
    Sink(u32),
    Channel(Box<dyn MsiChannel>),
    /// To the sink, for good: it has no channels, or the vector's did not work.
    SinkOnly,
}

struct Inner {
    saved: MsixSaved,
    ways: Vec<Way>,
}

impl Inner {
    /// Send a vector's message.
    fn send(&mut self, sink: &dyn MsiSink, vector: usize) {
        let message = self.saved.message(vector);
        let Some(way) = self.ways.get_mut(vector) else { return };
        if let Way::Sink(sent) = way {
            *sent += 1;
            if *sent > BUSY {
                *way = sink.channel().map_or(Way::SinkOnly, Way::Channel);
            }
        }
        if let Way::Channel(channel) = way {
            if channel.send(message) {
                return;
            }
            *way = Way::SinkOnly;
        }
        sink.send(message);
    }
}

impl MsixSaved {
    fn word(&self, vector: usize, word: usize) -> u32 {
        let at = vector * ENTRY + word * 4;
        self.table.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn message(&self, vector: usize) -> MsiMessage {
        let address = u64::from(self.word(vector, 0)) | u64::from(self.word(vector, 1)) << 32;
        MsiMessage { address, data: self.word(vector, 2) }
    }

    fn open(&self, vector: usize) -> bool {
        self.enabled && !self.masked && self.bus_master && self.word(vector, 3) & 1 == 0
    }

    fn new(vectors: u16) -> MsixSaved {
        let n = usize::from(vectors);
        let mut table = vec![0; n * ENTRY];
        // Vector control after reset: masked.
        table.iter_mut().skip(12).step_by(ENTRY).for_each(|b| *b = 1);
        MsixSaved {
            table,
            pending: vec![0; n.div_ceil(64)],
            enabled: false,
            masked: false,
            bus_master: false,
        }
    }
}

impl MsixState {
    /// A table of `vectors` entries (1 to 2048).
    ///
    /// # Errors
    /// When the number is out of range, an offset is not a multiple of 8, or table and PBA overlap.
    pub fn new(vectors: u16, layout: MsixLayout, sink: Arc<dyn MsiSink>) -> Result<MsixState, PciError> {
        let bad = |reason| Err(PciError::Msix { vectors, reason });
        if vectors == 0 || vectors > 2048 {
            return bad("1 to 2048 vectors are possible");
        }
        if !layout.table_offset.is_multiple_of(8) || !layout.pba_offset.is_multiple_of(8) {
            return bad("offsets must be multiples of 8");
        }
        let ways = (0..vectors).map(|_| Way::Sink(0)).collect();
        let inner = Mutex::new(Inner { saved: MsixSaved::new(vectors), ways });
        let state = MsixState { layout, vectors, sink, inner };
        let (t, p) = (u64::from(layout.table_offset), u64::from(layout.pba_offset));
        if layout.table_bar == layout.pba_bar && t < p + state.pba_len() && p < t + state.table_len() {
            return bad("table and PBA overlap");
        }
        Ok(state)
    }

    /// Table entries.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Where table and PBA lie.
    pub fn layout(&self) -> MsixLayout {
        self.layout
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        u64::from(self.vectors) * ENTRY as u64
    }

    /// Bytes of the pending bit array.
    pub fn pba_len(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }

    /// The guest switched MSI-X on; INTx is then not used.
    pub fn is_enabled(&self) -> bool {
        lock(&self.inner).saved.enabled
    }

    /// Signal a vector: sent at once, or noted as pending while it is masked. Nothing when MSI-X is off or the
    /// vector does not exist (0xffff is virtio's "no vector").
    pub fn notify(&self, vector: u16) {
        if vector >= self.vectors {
            return;
        }
        let mut inner = lock(&self.inner);
        if !inner.saved.enabled {
            return;
        }
        let v = usize::from(vector);
        if inner.saved.open(v) {
            inner.send(&*self.sink, v);
        } else {
            inner.saved.pending[v / 64] |= 1 << (v % 64);
        }
    }

    /// The message of a vector when it would be sent now, else `None` (masked, off, or no such vector).
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let s = &lock(&self.inner).saved;
        (vector < self.vectors && s.open(usize::from(vector))).then(|| s.message(usize::from(vector)))
    }

    /// Follow the configuration space: MSI-X enable, function mask, bus master enable.
    pub fn set_control(&self, enabled: bool, masked: bool, bus_master: bool) {
        let mut inner = lock(&self.inner);
        let s = &mut inner.saved;
        (s.enabled, s.masked, s.bus_master) = (enabled, masked, bus_master);
        self.flush(&mut inner);
    }

    /// Send what is pending and no longer masked.
    fn flush(&self, inner: &mut Inner) {
        let s = &inner.saved;
        if !s.enabled || s.masked || !s.bus_master {
            return;
        }
        for w in 0..s.pending.len() {
            let mut bits = inner.saved.pending[w];
            while bits != 0 {
                let v = w * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if inner.saved.open(v) {
                    inner.saved.pending[w] &= !(1 << (v % 64));
                    inner.send(&*self.sink, v);
                }
            }
        }
    }

    /// A BAR read; `true` when it was in the table or the PBA and `data` is filled.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        let l = self.layout;
        if bar == l.table_bar
            && let Some(at) = within(offset, l.table_offset, self.table_len())
        {
            let s = &lock(&self.inner).saved;
            fill(data, at, |i| s.table.get(i).copied());
            return true;
        }
        if bar == l.pba_bar
            && let Some(at) = within(offset, l.pba_offset, self.pba_len())
        {
            let s = &lock(&self.inner).saved;
            fill(data, at, |i| s.pending.get(i / 8).map(|w| w.to_le_bytes()[i % 8]));
            return true;
        }
        false
    }

    /// A BAR write; `true` when it was in the table or the PBA (which is read-only).
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        let l = self.layout;
        if bar == l.table_bar
            && let Some(at) = within(offset, l.table_offset, self.table_len())
        {
            let mut inner = lock(&self.inner);
            for (i, &v) in (at..).zip(data) {
                // Of vector control only the mask bit exists, of the address the low two bits are zero.
                let mask = match i % ENTRY {
                    0 => 0xfc,
                    12 => 0x01,
                    13..=15 => 0,
                    _ => 0xff,
                };
                if let Some(b) = inner.saved.table.get_mut(i) {
                    *b = v & mask;
                }
            }
            self.flush(&mut inner);
            return true;
        }
        bar == l.pba_bar && within(offset, l.pba_offset, self.pba_len()).is_some()
    }

    /// Everything masked, nothing pending, off.
    pub fn reset(&self) {
        lock(&self.inner).saved = MsixSaved::new(self.vectors);
    }

    /// State for the function's section.
    pub fn save(&self) -> MsixSaved {
        lock(&self.inner).saved.clone()
    }

    /// Whether [`MsixState::load`] would take this state.
    pub fn fits(&self, saved: &MsixSaved) -> bool {
        let mine = &lock(&self.inner).saved;
        let spare = u32::from(self.vectors) % 64;
        let tail = saved.pending.last().copied().unwrap_or(0);
        saved.table.len() == mine.table.len()
            && saved.pending.len() == mine.pending.len()
            && (spare == 0 || tail >> spare == 0)
    }

    /// Take over a saved state; `false`, with nothing changed, when it is of another table size.
    pub fn load(&self, saved: &MsixSaved) -> bool {
        if !self.fits(saved) {
            return false;
        }
        lock(&self.inner).saved = saved.clone();
        true
    }
}

fn within(offset: u64, base: u32, len: u64) -> Option<usize> {
    offset.checked_sub(u64::from(base)).filter(|&o| o < len).map(|o| o as usize)
}

fn fill(data: &mut [u8], at: usize, get: impl Fn(usize) -> Option<u8>) {
    for (i, b) in data.iter_mut().enumerate() {
        *b = get(at + i).unwrap_or(0);
    }
}
