//! The few host instructions that translation itself needs, as bytes (Intel SDM 2A chapter 2).

/// Host register numbers.
pub const RAX: u8 = 0;
/// Guest RSP.
pub const SP: u8 = 12;
/// Scratch.
pub const T0: u8 = 13;
/// Scratch.
pub const T1: u8 = 14;
/// The TLB set in force.
pub const TLB: u8 = 15;
/// The host's own stack pointer.
pub const HOST_SP: u8 = 4;

/// An address in terms of host registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Base register.
    pub base: Option<u8>,
    /// Index register (not RSP) and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Address {
    /// The one register that it depends on, as an index.
    pub fn single(self) -> Option<(u8, u8)> {
        match self {
            Address { base: Some(r), index: None, .. } => Some((r, 0)),
            Address { base: None, index, .. } => index,
            _ => None,
        }
    }
}

/// A growing piece of code, in two parts that will lie apart: what usually executes, and what seldom does.
#[derive(Default)]
pub struct Code {
    /// The bytes of both.
    pub bytes: Vec<u8>,
    /// Where the second part begins, and how much farther off it will lie than here.
    split: Option<(usize, i64)>,
    /// Where each guest instruction's code begins in the first part.
    pub marks: Vec<u16>,
}

/// The place of a 32-bit distance to be filled in.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Hole(pub usize);

/// Holes that are filled with the same; mostly one or two.
#[derive(Default)]
pub struct Holes {
    few: [Option<Hole>; 2],
    more: Vec<Hole>,
}

impl Holes {
    /// Add one.
    pub fn push(&mut self, hole: Hole) {
        match self.few.iter_mut().find(|h| h.is_none()) {
            Some(free) => *free = Some(hole),
            None => self.more.push(hole),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.few[0].is_none()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Hole> {
        self.few.iter().flatten().chain(&self.more).copied()
    }
}

impl<const N: usize> From<[Hole; N]> for Holes {
    fn from(list: [Hole; N]) -> Holes {
        let mut all = Holes::default();
        list.into_iter().for_each(|hole| all.push(hole));
        all
    }
}

impl Code {
    /// Nothing, with the memory that this had.
    pub fn emptied(mut self) -> Code {
        self.bytes.clear();
        self.marks.clear();
        self.split = None;
        self
    }

    /// Bytes so far.
    pub fn at(&self) -> usize {
        self.bytes.len()
    }

    /// What follows belongs to the second part, which will lie `farther` bytes farther off than it does here.
    pub fn split(&mut self, farther: i64) {
        self.split = Some((self.at(), farther));
    }

    /// Where the byte at `at` will be.
    fn place(&self, at: usize) -> i64 {
        match self.split {
            Some((split, farther)) if at >= split => at as i64 + farther,
            _ => at as i64,
        }
    }

    /// The two parts.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(self.split.map_or(self.at(), |s| s.0))
    }

    /// Append bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn rex(&mut self, reg: u8, rm: u8) {
        self.bytes.push(0x48 | (reg >> 3) << 2 | rm >> 3);
    }

    /// `op reg, rm` or `op rm, reg` on 64-bit registers.
    pub fn rr(&mut self, opcode: u8, reg: u8, rm: u8) {
        self.rex(reg, rm);
        self.raw(&[opcode, 0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    /// `mov dst, src`.
    pub fn mov(&mut self, dst: u8, src: u8) {
        self.rr(0x89, src, dst);
    }

    /// `op reg, [at]` with a 64-bit register, or with an opcode extension for `reg`.
    pub fn mem(&mut self, opcode: u8, reg: u8, at: Address) {
        let (b, (i, s)) = (at.base.unwrap_or(5), at.index.unwrap_or((4, 0)));
        let base_high = if at.base.is_some() { b >> 3 } else { 0 };
        self.bytes.push(0x48 | (reg >> 3) << 2 | (i >> 3) << 1 | base_high);
        // Without a displacement RBP and R13 as base mean something else.
        let (mode, size) = match at.disp {
            _ if at.base.is_none() => (0x00, 4),
            0 if b & 7 != 5 => (0x00, 0),
            -128..=127 => (0x40, 1),
            _ => (0x80, 4),
        };
        if at.base.is_some() && at.index.is_none() && b & 7 != 4 {
            self.raw(&[opcode, mode | (reg & 7) << 3 | b & 7]);
        } else {
            self.raw(&[opcode, mode | (reg & 7) << 3 | 4, s << 6 | (i & 7) << 3 | b & 7]);
        }
        self.raw(&at.disp.to_le_bytes()[..size]);
    }

    /// `op reg, [base + disp]` with a 64-bit register.
    pub fn rm(&mut self, opcode: u8, reg: u8, base: u8, disp: i32) {
        self.mem(opcode, reg, Address { base: Some(base), index: None, disp });
    }

    /// `mov reg, [base + disp]`.
    pub fn load(&mut self, reg: u8, base: u8, disp: i32) {
        self.rm(0x8b, reg, base, disp);
    }

    /// `op reg, gs:[disp]` with a 64-bit register, or with an opcode extension for `reg`: a field of the `Cpu`.
    pub fn cpu(&mut self, opcode: u8, reg: u8, disp: i32) {
        self.raw(&[0x65, 0x48 | (reg >> 3) << 2, opcode, (reg & 7) << 3 | 4, 0x25]);
        self.raw(&disp.to_le_bytes());
    }

    /// The same with a 32-bit register, a byte register below 4, or a 32-bit or byte operand.
    pub fn cpu32(&mut self, opcode: &[u8], reg: u8, disp: i32) {
        self.raw(&[0x65]);
        if reg >= 8 {
            self.raw(&[0x44]);
        }
        self.raw(opcode);
        self.raw(&[(reg & 7) << 3 | 4, 0x25]);
        self.raw(&disp.to_le_bytes());
    }

    /// `mov reg, gs:[disp]`.
    pub fn load_cpu(&mut self, reg: u8, disp: i32) {
        self.cpu(0x8b, reg, disp);
    }

    /// `mov gs:[disp], reg`.
    pub fn store_cpu(&mut self, reg: u8, disp: i32) {
        self.cpu(0x89, reg, disp);
    }

    /// `test byte gs:[disp], mask`.
    pub fn test_cpu8(&mut self, disp: i32, mask: u8) {
        self.cpu32(&[0xf6], 0, disp);
        self.raw(&[mask]);
    }

    /// `sub dword gs:[disp], 1`.
    pub fn decrement_cpu(&mut self, disp: i32) {
        self.cpu32(&[0x83], 5, disp);
        self.raw(&[1]);
    }

    /// `mov reg, imm`, as short as it can be.
    pub fn imm(&mut self, reg: u8, v: i64) {
        if let Ok(v) = u32::try_from(v) {
            if reg >= 8 {
                self.raw(&[0x41]);
            }
            self.raw(&[0xb8 | reg & 7]);
            self.raw(&v.to_le_bytes());
        } else if let Ok(v) = i32::try_from(v) {
            self.raw(&[0x48 | reg >> 3, 0xc7, 0xc0 | reg & 7]);
            self.raw(&v.to_le_bytes());
        } else {
            self.imm64(reg, v as u64);
        }
    }

    /// `mov reg, imm64`.
    pub fn imm64(&mut self, reg: u8, v: u64) {
        self.raw(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
        self.raw(&v.to_le_bytes());
    }

    /// `lea dst, [base + index * 2^scale + disp]`.
    pub fn lea(&mut self, dst: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        self.mem(0x8d, dst, Address { base, index, disp });
    }

    /// `jmp`, distance to be filled in.
    pub fn jmp(&mut self) -> Hole {
        self.raw(&[0xe9, 0, 0, 0, 0]);
        Hole(self.at() - 4)
    }

    /// `call`, distance to be filled in.
    pub fn call(&mut self) -> Hole {
        self.raw(&[0xe8, 0, 0, 0, 0]);
        Hole(self.at() - 4)
    }

    /// `jcc`, distance to be filled in.
    pub fn jcc(&mut self, cond: u8) -> Hole {
        self.raw(&[0x0f, 0x80 | cond, 0, 0, 0, 0]);
        Hole(self.at() - 4)
    }

    /// Let the jump at `hole` come here.
    pub fn land(&mut self, hole: Hole) {
        let to = self.at();
        self.fill(hole, to);
    }

    /// Let the jump at `hole` go to `to`, an offset in this piece.
    pub fn fill(&mut self, hole: Hole, to: usize) {
        // A distance ends in its own part.
        let distance = (self.place(to) - (self.place(hole.0) + 4)) as i32;
        self.bytes[hole.0..hole.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// Jump (0xe9) or call (0xe8) to a fixed address, if this piece will lie at `base`.
    pub fn far(&mut self, opcode: u8, base: usize, to: usize) {
        self.bytes.push(opcode);
        let next = base + self.at() + 4;
        self.raw(&(to.wrapping_sub(next) as u32).to_le_bytes());
    }
}
