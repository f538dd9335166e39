//! Guest memory as instructions see it: linear addresses, page walks, a software TLB, RAM and MMIO.
//!
//! [`Cpu::load`] and [`Cpu::store`] are the fast path: one TLB probe, one host access. Everything else (a miss, a page crossing,
//! MMIO, a store to a page that holds decoded code, a watched page) is in `slow`.

mod access;
mod code;
mod places;
mod slow;
mod tlb;
mod walk;

pub use code::{CodeSlot, CodeSlots, frame, index as code_index};
pub use places::{PATIENCE, PLACES, Place, Places};
pub use tlb::{Fetch, INDEX_MASK, Mapping, Mmu, TLB_ENTRIES, TlbSet, mode};
pub use walk::{Access, Translation};
