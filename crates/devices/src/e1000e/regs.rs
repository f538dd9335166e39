//! Register offsets and bits (Intel 82574 GbE Controller Family data sheet, revision 3.4, chapter 10).

/// Bytes of the register space, BAR 0.
pub const SPACE: u64 = 0x2_0000;
/// Its words.
pub const WORDS: usize = SPACE as usize / 4;

/// Device control.
pub const CTRL: u32 = 0x0000;
/// Device status.
pub const STATUS: u32 = 0x0008;
/// EEPROM control.
pub const EECD: u32 = 0x0010;
/// EEPROM read.
pub const EERD: u32 = 0x0014;
/// Extended device control.
pub const CTRL_EXT: u32 = 0x0018;
/// MDI control: the way to the PHY.
pub const MDIC: u32 = 0x0020;
/// VLAN's Ethernet type.
pub const VET: u32 = 0x0038;
/// Interrupt cause, read.
pub const ICR: u32 = 0x00c0;
/// Interrupt throttling.
pub const ITR: u32 = 0x00c4;
/// Interrupt cause, set.
pub const ICS: u32 = 0x00c8;
/// Interrupt mask, set and read.
pub const IMS: u32 = 0x00d0;
/// Interrupt mask, clear.
pub const IMC: u32 = 0x00d8;
/// Causes that clear themselves with their MSI-X message.
pub const EIAC: u32 = 0x00dc;
/// Mask bits that reading the cause clears.
pub const IAM: u32 = 0x00e0;
/// Which MSI-X vector each cause has.
pub const IVAR: u32 = 0x00e4;
/// Throttling of each MSI-X vector, five of them.
pub const EITR: u32 = 0x00e8;
/// Receive control.
pub const RCTL: u32 = 0x0100;
/// Transmit control.
pub const TCTL: u32 = 0x0400;
/// LEDs.
pub const LEDCTL: u32 = 0x0e00;
/// Packet buffer: how it is shared out.
pub const PBA: u32 = 0x1000;
/// EEPROM write.
pub const EEWR: u32 = 0x102c;
/// Sizes of split packets' buffers.
pub const PSRCTL: u32 = 0x2170;
/// First receive queue; the second is 0x100 further.
pub const RDBAL: u32 = 0x2800;
/// First transmit queue; the second is 0x100 further.
pub const TDBAL: u32 = 0x3800;
/// Between the queues.
pub const QUEUE: u32 = 0x100;
/// Within a queue: address of the ring, low half.
pub const BAL: u32 = 0x00;
/// High half.
pub const BAH: u32 = 0x04;
/// Bytes of the ring.
pub const LEN: u32 = 0x08;
/// The device's place.
pub const HEAD: u32 = 0x10;
/// The driver's place.
pub const TAIL: u32 = 0x18;
/// Receive checksums.
pub const RXCSUM: u32 = 0x5000;
/// Receive filters.
pub const RFCTL: u32 = 0x5008;
/// Multicast table, 128 words.
pub const MTA: u32 = 0x5200;
/// Receive addresses, 16 pairs of words.
pub const RAL: u32 = 0x5400;
/// VLAN filter table, 128 words.
pub const VFTA: u32 = 0x5600;
/// Several receive queues.
pub const MRQC: u32 = 0x5818;
/// Software semaphore.
pub const SWSM: u32 = 0x5b50;
/// Redirection table, 32 words.
pub const RETA: u32 = 0x5c00;
/// Key of the hash, ten words.
pub const RSSRK: u32 = 0x5c80;

/// First and last statistics register; they clear when they are read.
pub const STATISTICS: std::ops::RangeInclusive<u32> = 0x4000..=0x4124;
/// Missed packets.
pub const MPC: u32 = 0x4010;
/// Packets received by length: 64 bytes, to 127, 255, 511, 1023, and more.
pub const PRC64: u32 = 0x405c;
/// Good packets received.
pub const GPRC: u32 = 0x4074;
/// Broadcast packets received.
pub const BPRC: u32 = 0x4078;
/// Multicast packets received.
pub const MPRC: u32 = 0x407c;
/// Good packets transmitted.
pub const GPTC: u32 = 0x4080;
/// Good bytes received, low half.
pub const GORCL: u32 = 0x4088;
/// Good bytes transmitted, low half.
pub const GOTCL: u32 = 0x4090;
/// No receive buffers.
pub const RNBC: u32 = 0x40a0;
/// All bytes received.
pub const TORL: u32 = 0x40c0;
/// All bytes transmitted.
pub const TOTL: u32 = 0x40c8;
/// Received packets longer than are taken.
pub const ROC: u32 = 0x40ac;
/// Packets transmitted by length, as those received.
pub const PTC64: u32 = 0x40d8;
/// Multicast packets transmitted.
pub const MPTC: u32 = 0x40f0;
/// Broadcast packets transmitted.
pub const BPTC: u32 = 0x40f4;
/// Packets transmitted that were cut into segments.
pub const TSCTC: u32 = 0x40f8;
/// All packets received.
pub const TPR: u32 = 0x40d0;
/// All packets transmitted.
pub const TPT: u32 = 0x40d4;

/// The bits that a register has, of those of which a driver could tell (what it writes to others is not read back).
pub fn bits(at: u32) -> u32 {
    match at {
        // Flow control: high half of its address, its type, its time; VLAN's type; delays of interrupts in both directions.
        0x002c | 0x0030 | VET | 0x0170 | 0x2820 | 0x282c | 0x3820 | 0x382c => 0xffff,
        // Thresholds of flow control.
        0x2160 => 0x8000_fff8,
        0x2168 => 0x0000_fff8,
        // Gaps between packets.
        0x0410 => 0x3fff_ffff,
        // High halves of receive addresses.
        _ if (RAL..RAL + 128).contains(&at) && at & 4 != 0 => 0x8003_ffff,
        // Rings begin at multiples of 16 bytes.
        _ if [RDBAL, RDBAL + QUEUE, TDBAL, TDBAL + QUEUE].contains(&at) => !15,
        _ => u32::MAX,
    }
}

/// Bits of CTRL.
pub mod ctrl {
    pub const MASTER_DISABLE: u32 = 1 << 2;
    pub const SLU: u32 = 1 << 6;
    pub const RST: u32 = 1 << 26;
    pub const VME: u32 = 1 << 30;
    pub const PHY_RST: u32 = 1 << 31;
}
/// Bits of STATUS.
pub mod status {
    pub const FD: u32 = 1 << 0;
    pub const LU: u32 = 1 << 1;
    pub const SPEED_1000: u32 = 2 << 6;
    pub const PHYRA: u32 = 1 << 10;
    pub const MASTER: u32 = 1 << 19;
}
/// Bits of EECD.
pub mod eecd {
    pub const REQ: u32 = 1 << 6;
    pub const GNT: u32 = 1 << 7;
    pub const PRES: u32 = 1 << 8;
    pub const AUTO_RD: u32 = 1 << 9;
}
/// Bits of CTRL_EXT.
pub mod ctrl_ext {
    pub const EIAME: u32 = 1 << 24;
    pub const IAME: u32 = 1 << 27;
}
/// Interrupt causes.
pub mod cause {
    pub const TXDW: u32 = 1 << 0;
    pub const TXQE: u32 = 1 << 1;
    pub const LSC: u32 = 1 << 2;
    pub const RXDMT0: u32 = 1 << 4;
    pub const RXO: u32 = 1 << 6;
    pub const RXT0: u32 = 1 << 7;
    pub const MDAC: u32 = 1 << 9;
    pub const RXQ0: u32 = 1 << 20;
    pub const RXQ1: u32 = 1 << 21;
    pub const TXQ0: u32 = 1 << 22;
    pub const TXQ1: u32 = 1 << 23;
    pub const OTHER: u32 = 1 << 24;
    pub const ASSERTED: u32 = 1 << 31;
    /// What counts as "other" with MSI-X.
    pub const OTHERS: u32 = LSC | RXO | MDAC;
}
/// Bits of RCTL.
pub mod rctl {
    pub const EN: u32 = 1 << 1;
    pub const UPE: u32 = 1 << 3;
    pub const MPE: u32 = 1 << 4;
    pub const LPE: u32 = 1 << 5;
    pub const BAM: u32 = 1 << 15;
    pub const VFE: u32 = 1 << 18;
    pub const SECRC: u32 = 1 << 26;
}
/// Transmit enable.
pub const TCTL_EN: u32 = 1 << 1;
/// Fill short packets up.
pub const TCTL_PSP: u32 = 1 << 3;
/// Which way received frames come: 1 is from the device's own transmission (bits 6 and 7 of RCTL).
pub const RCTL_LOOPBACK_SHIFT: u32 = 6;
/// Extended receive descriptors.
pub const RFCTL_EXTEN: u32 = 1 << 15;
/// The descriptor holds a hash, not a checksum.
pub const RXCSUM_PCSD: u32 = 1 << 13;
/// Check IP checksums.
pub const RXCSUM_IPOFL: u32 = 1 << 8;
/// Check TCP and UDP checksums.
pub const RXCSUM_TUOFL: u32 = 1 << 9;
