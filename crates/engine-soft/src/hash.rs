//! Hashing of addresses, which nobody chooses who could gain by it: a guest that makes its own keys collide slows itself.

use std::hash::{BuildHasherDefault, Hasher};

/// Fibonacci hashing: the upper bits depend on all of `n`.
pub const fn mix(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// For maps and sets with `u64` keys.
pub type BuildKeyHasher = BuildHasherDefault<KeyHasher>;

/// Hashes one `u64`.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64")
    }
    fn write_u64(&mut self, n: u64) {
        // The table uses the top bits as well as the low ones.
        self.0 = mix(n).rotate_left(29);
    }
}
