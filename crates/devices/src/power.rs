//! What the machine is told when the guest asks for power-off, reset and the like.

/// What the guest wants, or what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// ACPI S5 (or S4 after the guest wrote its image): switch off.
    PowerOff,
    /// Reset the whole machine.
    Reset,
    /// ACPI S3: suspend to RAM. A machine that does not offer it may ignore it: the guest is woken at once.
    Suspend,
    /// The guest's kernel panicked (pvpanic).
    Panicked,
    /// The guest's kernel panicked and its crash kernel runs (pvpanic).
    CrashLoaded,
    /// The guest says that it is shutting down in order (pvpanic).
    ShuttingDown,
    /// A test guest ends the machine with this exit status.
    DebugExit(u32),
}

/// Where [`PowerEvent`]s go. Called with a device locked: note the event and return.
pub trait PowerSink: Send + Sync {
    /// Something happened.
    fn event(&self, event: PowerEvent);
}
