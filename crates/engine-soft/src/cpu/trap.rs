//! Exceptions on their way from the instruction that raised them to their delivery.

use super::Cpu;
use ringfort_x86::Vector;

/// "This instruction raised an exception": the details are in [`Cpu::trap`]. Zero-sized, so that results of memory accesses and
/// handlers travel in registers. Made only by [`Cpu::raise`] and its short forms.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Trap(());

impl Trap {
    /// The token of an exception that translated code carried out as an exit code; its details are in [`Cpu::trap`].
    pub(crate) fn carried() -> Trap {
        Trap(())
    }
}

/// The details of a raised exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrapInfo {
    /// Vector number.
    pub vector: u8,
    /// Error code, for vectors that have one.
    pub error: u32,
    /// For #PF: what goes to CR2 at delivery.
    pub address: u64,
    /// A #GP(0) for a non-canonical data address: becomes #SS(0) when the operand's segment is SS.
    pub non_canonical: bool,
}

impl Cpu {
    /// Raise an exception (its error code counts only for vectors that have one).
    #[cold]
    pub fn raise(&mut self, vector: Vector, error: u32) -> Trap {
        self.trap = TrapInfo { vector: vector as u8, error, ..TrapInfo::default() };
        Trap(())
    }
    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.raise(Vector::InvalidOpcode, 0)
    }
    /// #GP with an error code (0, or a selector with its low bits EXT/IDT/TI).
    #[cold]
    pub fn gp(&mut self, error: u32) -> Trap {
        self.raise(Vector::GeneralProtection, error)
    }
    /// #SS.
    #[cold]
    pub fn ss_fault(&mut self, error: u32) -> Trap {
        self.raise(Vector::StackFault, error)
    }
    /// #NP.
    #[cold]
    pub fn np(&mut self, error: u32) -> Trap {
        self.raise(Vector::SegmentNotPresent, error)
    }
    /// #TS.
    #[cold]
    pub fn ts(&mut self, error: u32) -> Trap {
        self.raise(Vector::InvalidTss, error)
    }
    /// #NM.
    #[cold]
    pub fn nm(&mut self) -> Trap {
        self.raise(Vector::DeviceNotAvailable, 0)
    }
    /// #DE.
    #[cold]
    pub fn de(&mut self) -> Trap {
        self.raise(Vector::DivideError, 0)
    }
    /// #PF at linear address `address`.
    #[cold]
    pub fn page_fault(&mut self, address: u64, error: u32) -> Trap {
        let t = self.raise(Vector::PageFault, error);
        self.trap.address = address;
        t
    }
    /// #GP(0), or #SS(0) if the operand's segment turns out to be SS: a non-canonical data address.
    #[cold]
    pub fn non_canonical(&mut self) -> Trap {
        let t = self.gp(0);
        self.trap.non_canonical = true;
        t
    }
}
