//! The few host instructions that translation itself needs, as bytes (Intel SDM 2A chapter 2).

/// Host register numbers.
pub const RAX: u8 = 0;
/// Scratch.
pub const T2: u8 = 11;
/// Guest RSP.
pub const SP: u8 = 12;
/// Scratch; host address of a memory operand after its probe.
pub const T0: u8 = 13;
/// Scratch.
pub const T1: u8 = 14;
/// The `Cpu`.
pub const CPU: u8 = 15;

/// A growing piece of code.
#[derive(Default)]
pub struct Code {
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The place of a 32-bit distance to be filled in.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Hole(usize);

impl Code {
    /// Bytes so far.
    pub fn at(&self) -> usize {
        self.bytes.len()
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

    /// `op reg, [base + disp]` with a 64-bit register; `base` is none of RSP and R12.
    pub fn rm(&mut self, opcode: u8, reg: u8, base: u8, disp: i32) {
        self.rex(reg, base);
        self.raw(&[opcode, 0x80 | (reg & 7) << 3 | base & 7]);
        self.raw(&disp.to_le_bytes());
    }

    /// `mov reg, [base + disp]`.
    pub fn load(&mut self, reg: u8, base: u8, disp: i32) {
        self.rm(0x8b, reg, base, disp);
    }

    /// `mov [base + disp], reg`.
    pub fn store(&mut self, reg: u8, base: u8, disp: i32) {
        self.rm(0x89, reg, base, disp);
    }

    /// `mov reg, imm64`.
    pub fn imm64(&mut self, reg: u8, v: u64) {
        self.raw(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
        self.raw(&v.to_le_bytes());
    }

    /// `lea dst, [base + index * 2^scale + disp]`.
    pub fn lea(&mut self, dst: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        let b = base.unwrap_or(5);
        let (i, s) = index.unwrap_or((4, 0));
        self.bytes.push(0x48 | (dst >> 3) << 2 | (i >> 3) << 1 | if base.is_some() { b >> 3 } else { 0 });
        let modrm = if base.is_some() { 0x84 } else { 0x04 };
        self.raw(&[0x8d, modrm | (dst & 7) << 3, s << 6 | (i & 7) << 3 | b & 7]);
        self.raw(&disp.to_le_bytes());
    }

    /// `jmp`, distance to be filled in.
    pub fn jmp(&mut self) -> Hole {
        self.raw(&[0xe9, 0, 0, 0, 0]);
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
        let distance = (to as i64 - (hole.0 as i64 + 4)) as i32;
        self.bytes[hole.0..hole.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// Jump (0xe9) or call (0xe8) to a fixed address, if this piece will lie at `base`.
    pub fn far(&mut self, opcode: u8, base: usize, to: usize) {
        self.bytes.push(opcode);
        let next = base + self.at() + 4;
        self.raw(&(to.wrapping_sub(next) as u32).to_le_bytes());
    }

    /// As [`Code::far`], for `jcc`.
    pub fn far_jcc(&mut self, cond: u8, base: usize, to: usize) {
        self.bytes.push(0x0f);
        self.far(0x80 | cond, base, to);
    }
}
