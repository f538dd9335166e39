//! Registers of the PC's interrupt controllers and interval timer in a form that models and hosts which have them in their kernel
//! exchange.

/// One 8259A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PicRegisters {
    /// Interrupt request register.
    pub irr: u8,
    /// Mask.
    pub imr: u8,
    /// In service.
    pub isr: u8,
    /// Levels of the inputs.
    pub lines: u8,
    /// Edge/level control.
    pub elcr: u8,
    /// The input with lowest priority.
    pub lowest: u8,
    /// Upper five bits of vectors.
    pub base: u8,
    /// Initialisation word that comes next: 2, 3 or 4; 0 outside of initialisation.
    pub expect: u8,
    /// ICW4 follows.
    pub need_icw4: bool,
    /// Ends interrupts by itself.
    pub auto_eoi: bool,
    /// Rotates priorities when it does.
    pub rotate_on_aeoi: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Reads of the even port give ISR.
    pub read_isr: bool,
}

/// Inputs of an I/O APIC.
pub const IOAPIC_PINS: usize = 24;

/// An I/O APIC (82093AA).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoApicRegisters {
    /// Register selector.
    pub select: u8,
    /// APIC ID.
    pub id: u8,
    /// Levels of the inputs, as far as they are known.
    pub lines: u32,
    /// Redirection table.
    pub entries: [u64; IOAPIC_PINS],
}

/// One channel of an 8254.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PitChannel {
    /// Count that was loaded, 1 to 0x10000; meaningless before the first.
    pub count: u32,
    /// Mode, 0 to 5.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// 1 low byte, 2 high byte, 3 both.
    pub access: u8,
    /// Gate.
    pub gate: bool,
    /// Nanoseconds since the count was loaded; `None` if none was.
    pub elapsed_ns: Option<u64>,
    /// Low byte written, high byte to come.
    pub low_byte: Option<u8>,
    /// The next read gives the high byte.
    pub read_high: bool,
    /// Latched count.
    pub latched: Option<u16>,
    /// Latched status.
    pub latched_status: Option<u8>,
}

/// An 8254.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PitRegisters {
    /// Its channels.
    pub channels: [PitChannel; 3],
    /// Bit 1 of port 0x61: the speaker follows channel 2.
    pub speaker: bool,
}
