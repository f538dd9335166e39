//! Address spaces: which target answers at which address.

use crate::{Mmio, PortIo};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Why a range cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Something answers there already.
    #[error("{name}: range {base:#x}+{len:#x} overlaps {other}")]
    Overlap {
        /// Who wanted the range.
        name: String,
        /// First address.
        base: u64,
        /// Length.
        len: u64,
        /// Who has it.
        other: String,
    },
    /// The range is empty or wraps around.
    #[error("{name}: range {base:#x}+{len:#x} is empty or wraps around")]
    Invalid {
        /// Who wanted the range.
        name: String,
        /// First address.
        base: u64,
        /// Length.
        len: u64,
    },
}

struct Range<T: ?Sized> {
    last: u64,
    name: String,
    target: Arc<T>,
}

/// An ordered map of address ranges to targets. Look-ups take a read lock; ranges move when a guest moves a BAR.
pub struct Bus<T: ?Sized> {
    ranges: RwLock<BTreeMap<u64, Range<T>>>,
}

/// I/O ports.
pub type PioBus = Bus<dyn PortIo>;
/// Memory-mapped I/O.
pub type MmioBus = Bus<dyn Mmio>;

impl<T: ?Sized> Default for Bus<T> {
    fn default() -> Self {
        Bus { ranges: RwLock::new(BTreeMap::new()) }
    }
}

impl<T: ?Sized> Bus<T> {
    /// Put `target` at `base..base + len`.
    ///
    /// # Errors
    /// When the range is impossible or taken; the bus is then as before.
    pub fn insert(&self, name: &str, base: u64, len: u64, target: Arc<T>) -> Result<(), BusError> {
        let last = (len > 0).then(|| base.checked_add(len - 1)).flatten();
        let Some(last) = last else { return Err(BusError::Invalid { name: name.into(), base, len }) };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        // The only range that can overlap and begin before `last` is the last such one.
        if let Some((_, r)) = ranges.range(..=last).next_back()
            && r.last >= base
        {
            return Err(BusError::Overlap { name: name.into(), base, len, other: r.name.clone() });
        }
        ranges.insert(base, Range { last, name: name.into(), target });
        Ok(())
    }

    /// Take away the range that begins at `base`; false when there is none.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&base).is_some()
    }

    /// Who answers at `address`: the target, the address's offset in its range, and the bytes left in the range
    /// from there.
    pub fn find(&self, address: u64) -> Option<(Arc<T>, u64, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, r) = ranges.range(..=address).next_back()?;
        (address <= r.last).then(|| (r.target.clone(), address - base, (r.last - address).saturating_add(1)))
    }

    /// All ranges: first address, last address, name.
    pub fn ranges(&self) -> Vec<(u64, u64, String)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().map(|(&b, r)| (b, r.last, r.name.clone())).collect()
    }
}

impl PioBus {
    /// The guest reads `data.len()` bytes (1, 2 or 4) at `port`. A range that ends inside the access is split
    /// bytewise, as on a chipset; ports where nobody answers read as all ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.find(u64::from(port)) {
            Some((t, _, left)) if left >= data.len() as u64 => t.read(port, data),
            None if data.len() == 1 => data[0] = 0xff,
            _ => {
                for (i, b) in data.chunks_mut(1).enumerate() {
                    match port.checked_add(i as u16).and_then(|p| Some((p, self.find(u64::from(p))?))) {
                        Some((p, (t, _, _))) => t.read(p, b),
                        None => b[0] = 0xff,
                    }
                }
            }
        }
    }

    /// The guest writes `data` at `port`; where nobody listens it is lost.
    pub fn write(&self, port: u16, data: &[u8]) {
        match self.find(u64::from(port)) {
            Some((t, _, left)) if left >= data.len() as u64 => t.write(port, data),
            None if data.len() == 1 => {}
            _ => {
                for (i, b) in data.chunks(1).enumerate() {
                    if let Some((p, (t, _, _))) =
                        port.checked_add(i as u16).and_then(|p| Some((p, self.find(u64::from(p))?)))
                    {
                        t.write(p, b);
                    }
                }
            }
        }
    }
}

impl MmioBus {
    /// The guest reads at a physical address that is no RAM; all ones where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((t, offset, left)) if left >= data.len() as u64 => t.read(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// The guest writes at a physical address that is no RAM; lost where nobody listens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((t, offset, left)) = self.find(address)
            && left >= data.len() as u64
        {
            t.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PioDevice, shared};

    struct Echo(u8);
    impl PioDevice for Echo {
        fn pio_read(&mut self, port: u16, data: &mut [u8]) {
            data.fill(self.0 + port as u8);
        }
        fn pio_write(&mut self, _port: u16, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn overlaps_are_refused_and_named() {
        let bus = PioBus::default();
        bus.insert("a", 0x10, 8, shared(Echo(0))).unwrap();
        for (base, len) in [(0x10, 1), (0x17, 1), (0x0c, 5), (0x00, 0x100), (0x14, 0x10)] {
            let e = bus.insert("b", base, len, shared(Echo(0))).unwrap_err();
            assert!(e.to_string().contains("overlaps a"), "{e}");
        }
        assert!(bus.insert("b", 0x18, 0, shared(Echo(0))).is_err());
        assert!(bus.insert("b", u64::MAX, 2, shared(Echo(0))).is_err());
        bus.insert("b", 0x18, 1, shared(Echo(0))).unwrap();
        bus.insert("c", 0x0f, 1, shared(Echo(0))).unwrap();
    }

    #[test]
    fn wide_access_is_split_at_range_ends() {
        let bus = PioBus::default();
        bus.insert("a", 0x20, 2, shared(Echo(0))).unwrap();
        bus.insert("b", 0x22, 1, shared(Echo(0x40))).unwrap();
        let mut d = [0; 4];
        bus.read(0x20, &mut d);
        assert_eq!(d, [0x20, 0x21, 0x62, 0xff]);
        bus.read(0x20, &mut d[..2]);
        assert_eq!(d[..2], [0x20, 0x20]);
        bus.read(0xffff, &mut d);
        assert_eq!(d, [0xff; 4]);
        bus.write(0xfffe, &[0; 4]);
    }
}
