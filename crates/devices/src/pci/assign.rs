//! Addresses for BARs when no firmware gives them (direct kernel boot).

use super::config::{BarKind, command, reg};
use super::{Bdf, PciBus, PciError, ROM_BAR};

/// A range of free addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Next free address.
    pub next: u64,
    /// Last address that may be used.
    pub last: u64,
}

impl Window {
    /// Free addresses `base..base + len`.
    pub fn new(base: u64, len: u64) -> Window {
        Window { next: base, last: base.saturating_add(len.saturating_sub(1)) }
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(size)?;
        let end = at.checked_add(size)?;
        if end - 1 > self.last {
            return None;
        }
        self.next = end;
        Some(at)
    }
}

/// The machine's windows for PCI.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// I/O ports.
    pub io: Window,
    /// Memory below 4 GiB.
    pub mem32: Window,
    /// Memory above 4 GiB; 64-bit BARs go here first, and below when there is no room.
    pub mem64: Option<Window>,
}

impl PciBus {
    /// Give every BAR (not ROMs) an address, largest first, switch decoding on, and set each interrupt line
    /// register to what `irq` says for a function's pin (1 to 4).
    ///
    /// # Errors
    /// When a window is full.
    pub fn assign(&self, windows: &mut Windows, irq: impl Fn(Bdf, u8) -> u8) -> Result<(), PciError> {
        let mut bars = Vec::new();
        for (bdf, f) in self.functions() {
            for (bar, b) in (0u8..ROM_BAR).zip(f.bars()) {
                bars.extend(b.map(|(kind, size)| (size, bdf, bar, kind)));
            }
        }
        bars.sort_by(|a, b| b.0.cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        for &(size, bdf, bar, kind) in &bars {
            let base = match kind {
                BarKind::Io => windows.io.take(size),
                // Not below a page: what shares a page cannot be given to a guest's user space apart.
                BarKind::Mem32 { .. } => windows.mem32.take(size.max(4096)),
                BarKind::Mem64 { .. } => windows
                    .mem64
                    .as_mut()
                    .and_then(|w| w.take(size.max(4096)))
                    .or_else(|| windows.mem32.take(size.max(4096))),
            };
            let base = base.ok_or(PciError::NoAddress { bdf, bar, size })?;
            let at = reg::BAR0 + u16::from(bar) * 4;
            self.config_write(bdf, at, &(base as u32).to_le_bytes());
            if let BarKind::Mem64 { .. } = kind {
                self.config_write(bdf, at + 4, &((base >> 32) as u32).to_le_bytes());
            }
        }
        for (bdf, f) in self.functions() {
            let mut cmd = [0; 2];
            f.config_read(reg::COMMAND, &mut cmd);
            let on = f.bars().iter().flatten().fold(u16::from_le_bytes(cmd), |c, (kind, _)| {
                c | if *kind == BarKind::Io { command::IO } else { command::MEMORY }
            });
            self.config_write(bdf, reg::COMMAND, &on.to_le_bytes());
            let mut pin = [0];
            f.config_read(reg::INTERRUPT_PIN, &mut pin);
            if pin[0] != 0 {
                self.config_write(bdf, reg::INTERRUPT_LINE, &[irq(bdf, pin[0])]);
            }
        }
        Ok(())
    }
}
