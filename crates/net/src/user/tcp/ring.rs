//! A byte queue that the host's data is read into directly.

use std::io::{self, Read};

/// Smallest buffer that is made.
const LEAST: usize = 4096;

/// Bytes in order, in a buffer whose size is a power of two.
#[derive(Default)]
pub struct Ring {
    buffer: Vec<u8>,
    head: usize,
    len: usize,
}

impl Ring {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `at` on, in two pieces. What is not there is left out.
    pub fn slices(&self, at: usize, len: usize) -> (&[u8], &[u8]) {
        let len = len.min(self.len.saturating_sub(at));
        if len == 0 {
            return (&[], &[]);
        }
        let start = (self.head + at) & (self.buffer.len() - 1);
        let first = len.min(self.buffer.len() - start);
        (&self.buffer[start..start + first], &self.buffer[..len - first])
    }

    /// Drop `n` bytes at the front.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head = if self.len == 0 { 0 } else { (self.head + n) & (self.buffer.len() - 1) };
    }

    /// Give the memory back if nothing is in it.
    pub fn release(&mut self) {
        if self.len == 0 {
            self.buffer = Vec::new();
        }
    }

    /// Make room for `more` bytes.
    fn reserve(&mut self, more: usize) {
        let need = self.len + more;
        if need <= self.buffer.len() {
            return;
        }
        let mut larger = vec![0; need.next_power_of_two().max(LEAST)];
        let (a, b) = self.slices(0, self.len);
        larger[..a.len()].copy_from_slice(a);
        larger[a.len()..a.len() + b.len()].copy_from_slice(b);
        self.buffer = larger;
        self.head = 0;
    }

    /// Add bytes at the end.
    pub fn extend(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.reserve(data.len());
        let start = (self.head + self.len) & (self.buffer.len() - 1);
        let first = data.len().min(self.buffer.len() - start);
        self.buffer[start..start + first].copy_from_slice(&data[..first]);
        self.buffer[..data.len() - first].copy_from_slice(&data[first..]);
        self.len += data.len();
    }

    /// Read at most `most` bytes (not 0) from `source` to the end. Fewer come when they would not lie together.
    ///
    /// # Errors
    /// The source's.
    pub fn read_from(&mut self, source: &mut impl Read, most: usize) -> io::Result<usize> {
        self.reserve(most);
        let start = (self.head + self.len) & (self.buffer.len() - 1);
        let room = most.min(self.buffer.len() - start);
        let n = source.read(&mut self.buffer[start..start + room])?.min(room);
        self.len += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn behaves_as_a_queue() {
        let mut random = fastrand::Rng::with_seed(3);
        let (mut ring, mut model) = (Ring::default(), VecDeque::new());
        for _ in 0..20_000 {
            let data: Vec<u8> = (0..random.usize(0..900)).map(|_| random.u8(..)).collect();
            match random.u8(..4) {
                0 => {
                    ring.extend(&data);
                    model.extend(&data);
                }
                1 if !data.is_empty() => {
                    let n = ring.read_from(&mut &data[..], data.len()).unwrap();
                    assert!(n > 0);
                    model.extend(&data[..n]);
                }
                _ => {
                    let n = data.len().min(model.len());
                    ring.consume(data.len());
                    model.drain(..n);
                }
            }
            ring.release();
            assert_eq!(ring.len(), model.len());
            let at = random.usize(0..=model.len());
            let len = random.usize(0..1000);
            let (a, b) = ring.slices(at, len);
            let expected: Vec<u8> = model.iter().skip(at).take(len).copied().collect();
            assert_eq!([a, b].concat(), expected);
        }
    }
}
