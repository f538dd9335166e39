//! Exception vectors and page-fault error codes (Intel SDM 3A sections 6.3 and 4.7).

/// An architectural exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Vector {
    /// #DE: divide error.
    DivideError = 0,
    /// #DB: debug.
    Debug = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// #BP: INT3.
    Breakpoint = 3,
    /// #OF: INTO.
    Overflow = 4,
    /// #BR: BOUND.
    BoundRange = 5,
    /// #UD: invalid opcode.
    InvalidOpcode = 6,
    /// #NM: device not available.
    DeviceNotAvailable = 7,
    /// #DF: double fault.
    DoubleFault = 8,
    /// #TS: invalid TSS.
    InvalidTss = 10,
    /// #NP: segment not present.
    SegmentNotPresent = 11,
    /// #SS: stack fault.
    StackFault = 12,
    /// #GP: general protection.
    GeneralProtection = 13,
    /// #PF: page fault.
    PageFault = 14,
    /// #MF: x87 error.
    X87Error = 16,
    /// #AC: alignment check.
    AlignmentCheck = 17,
    /// #MC: machine check.
    MachineCheck = 18,
    /// #XM: SIMD floating-point error.
    SimdError = 19,
}

impl Vector {
    /// Whether the CPU pushes an error code.
    pub fn has_error_code(self) -> bool {
        vector_has_error_code(self as u8)
    }
    /// Whether it takes part in double-fault detection as a "contributory" exception.
    pub fn is_contributory(self) -> bool {
        matches!(self as u8, 0 | 10..=13)
    }
}

/// Whether an exception of this vector pushes an error code.
pub fn vector_has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// #PF error code: the page was present (protection violation).
pub const PF_PRESENT: u32 = 1 << 0;
/// #PF error code: the access was a write.
pub const PF_WRITE: u32 = 1 << 1;
/// #PF error code: the access was made at CPL 3.
pub const PF_USER: u32 = 1 << 2;
/// #PF error code: a reserved bit was set in a paging structure.
pub const PF_RESERVED: u32 = 1 << 3;
/// #PF error code: the access was an instruction fetch (with NX or SMEP enabled).
pub const PF_FETCH: u32 = 1 << 4;
/// #PF error code: a protection key forbade it.
pub const PF_KEY: u32 = 1 << 5;
