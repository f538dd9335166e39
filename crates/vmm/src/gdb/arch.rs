//! What gdb is told of the CPU: its registers, their order and sizes (gdb's features/i386/64bit-{core,sse,segments,avx}.xml), and system
//! registers beside them.

use gdbstub::arch::{Arch, RegId, Registers};
use ringfort_engine::CpuState;
use ringfort_x86::msr;
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::sync::OnceLock;

/// x86-64 with SSE and, where the vCPU has it, AVX.
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Regs;
    type RegId = Reg;
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        static XML: OnceLock<String> = OnceLock::new();
        Some(XML.get_or_init(description))
    }
}

/// Where a register's value is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// By the hardware's number.
    Gpr(usize),
    Rip,
    Flags,
    /// Selector, by the hardware's number of the segment register.
    Selector(usize),
    /// Base, by the same number.
    Base(usize),
    /// Bytes of the XSAVE area, and the component's bit.
    Area(usize, u64),
    /// x87 tag word, which the area has in another form.
    Tag,
    Msr(u32),
    /// CR0, CR2, CR3, CR4, CR8 by number.
    Cr(u8),
    Efer,
}

/// A register: name, bytes, type in gdb's terms, place.
struct Definition {
    name: String,
    size: usize,
    kind: &'static str,
    place: Place,
}

/// XSAVE components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// Where the upper halves of YMM0 to YMM15 lie in the XSAVE area's standard format (Intel SDM 1 section 13.5.2; CPUID.0DH.02H:EBX, the
/// same on every CPU that has them).
const YMM_HIGH: usize = 576;

/// All registers, in gdb's order; where each feature begins.
fn definitions() -> &'static [Definition] {
    static ALL: OnceLock<Vec<Definition>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all = Vec::new();
        let mut add =
            |name: &str, size, kind, place| all.push(Definition { name: name.into(), size, kind, place });
        // gdb's order and the hardware's numbers.
        let general =
            [("rax", 0), ("rbx", 3), ("rcx", 1), ("rdx", 2), ("rsi", 6), ("rdi", 7), ("rbp", 5), ("rsp", 4)];
        for (name, n) in general {
            add(name, 8, if n == 4 || n == 5 { "data_ptr" } else { "int64" }, Place::Gpr(n));
        }
        (8..16).for_each(|n| add(&format!("r{n}"), 8, "int64", Place::Gpr(n)));
        add("rip", 8, "code_ptr", Place::Rip);
        add("eflags", 4, "i386_eflags", Place::Flags);
        for (name, n) in [("cs", 1), ("ss", 2), ("ds", 3), ("es", 0), ("fs", 4), ("gs", 5)] {
            add(name, 4, "int32", Place::Selector(n));
        }
        // Offsets in the legacy area (Intel SDM 1 table 10-2).
        (0..8).for_each(|n| add(&format!("st{n}"), 10, "i387_ext", Place::Area(32 + 16 * n, X87)));
        let x87 = [
            ("fctrl", Place::Area(0, X87)),
            ("fstat", Place::Area(2, X87)),
            ("ftag", Place::Tag),
            ("fiseg", Place::Area(12, X87)),
            ("fioff", Place::Area(8, X87)),
            ("foseg", Place::Area(20, X87)),
            ("fooff", Place::Area(16, X87)),
            ("fop", Place::Area(6, X87)),
        ];
        x87.into_iter().for_each(|(name, place)| add(name, 4, "int", place));
        (0..16).for_each(|n| add(&format!("xmm{n}"), 16, "vec128", Place::Area(160 + 16 * n, SSE)));
        add("mxcsr", 4, "i386_mxcsr", Place::Area(24, 0));
        add("fs_base", 8, "int", Place::Base(4));
        add("gs_base", 8, "int", Place::Base(5));
        add("k_gs_base", 8, "int64", Place::Msr(msr::KERNEL_GS_BASE));
        for (name, n) in [("cr0", 0), ("cr2", 2), ("cr3", 3), ("cr4", 4), ("cr8", 8)] {
            add(name, 8, "int64", Place::Cr(n));
        }
        add("efer", 8, "int64", Place::Efer);
        (0..16).for_each(|n| add(&format!("ymm{n}h"), 16, "uint128", Place::Area(YMM_HIGH + 16 * n, AVX)));
        all
    })
}

/// Features, by their first register.
const FEATURES: [(&str, &str); 5] = [
    ("rax", "org.gnu.gdb.i386.core"),
    ("xmm0", "org.gnu.gdb.i386.sse"),
    ("fs_base", "org.gnu.gdb.i386.segments"),
    ("k_gs_base", "org.ringfort.system"),
    ("ymm0h", "org.gnu.gdb.i386.avx"),
];

fn flags(id: &str, bits: &[(&str, u8)]) -> String {
    let mut out = format!(r#"<flags id="{id}" size="4">"#);
    for (name, bit) in bits {
        // Writing to a string does not fail.
        let _ = write!(out, r#"<field name="{name}" start="{bit}" end="{bit}"/>"#);
    }
    out + "</flags>"
}

fn description() -> String {
    let mut out = String::from(
        r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0"><architecture>i386:x86-64</architecture>"#,
    );
    let mut open = false;
    for d in definitions() {
        if let Some((_, feature)) = FEATURES.iter().find(|(first, _)| *first == d.name) {
            out += if open { "</feature>" } else { "" };
            open = true;
            let _ = write!(out, r#"<feature name="{feature}">"#);
            match *feature {
                "org.gnu.gdb.i386.core" => {
                    out += &flags(
                        "i386_eflags",
                        &[
                            ("CF", 0),
                            ("PF", 2),
                            ("AF", 4),
                            ("ZF", 6),
                            ("SF", 7),
                            ("TF", 8),
                            ("IF", 9),
                            ("DF", 10),
                            ("OF", 11),
                            ("NT", 14),
                            ("RF", 16),
                            ("VM", 17),
                            ("AC", 18),
                            ("VIF", 19),
                            ("VIP", 20),
                            ("ID", 21),
                        ],
                    );
                }
                "org.gnu.gdb.i386.sse" => {
                    for (id, of, count) in [
                        ("v4f", "ieee_single", 4),
                        ("v2d", "ieee_double", 2),
                        ("v16i8", "int8", 16),
                        ("v8i16", "int16", 8),
                        ("v4i32", "int32", 4),
                        ("v2i64", "int64", 2),
                    ] {
                        let _ = write!(out, r#"<vector id="{id}" type="{of}" count="{count}"/>"#);
                    }
                    out += r#"<union id="vec128">"#;
                    for (name, of) in [
                        ("v4_float", "v4f"),
                        ("v2_double", "v2d"),
                        ("v16_int8", "v16i8"),
                        ("v8_int16", "v8i16"),
                        ("v4_int32", "v4i32"),
                        ("v2_int64", "v2i64"),
                        ("uint128", "uint128"),
                    ] {
                        let _ = write!(out, r#"<field name="{name}" type="{of}"/>"#);
                    }
                    out += "</union>";
                    out += &flags(
                        "i386_mxcsr",
                        &[
                            ("IE", 0),
                            ("DE", 1),
                            ("ZE", 2),
                            ("OE", 3),
                            ("UE", 4),
                            ("PE", 5),
                            ("DAZ", 6),
                            ("IM", 7),
                            ("DM", 8),
                            ("ZM", 9),
                            ("OM", 10),
                            ("UM", 11),
                            ("PM", 12),
                            ("FZ", 15),
                        ],
                    );
                }
                _ => {}
            }
        }
        let _ = write!(out, r#"<reg name="{}" bitsize="{}" type="{}"/>"#, d.name, d.size * 8, d.kind);
    }
    out + "</feature></target>"
}

/// The register of this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(usize);

impl RegId for Reg {
    fn from_raw_id(id: usize) -> Option<(Reg, Option<NonZeroUsize>)> {
        definitions().get(id).map(|d| (Reg(id), NonZeroUsize::new(d.size)))
    }
}

/// All registers' bytes, in gdb's order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Regs {
    bytes: Vec<u8>,
    rip: u64,
    /// How many of the bytes, all at the end, are of registers that the vCPU lacks.
    lacking: usize,
}

impl Registers for Regs {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.rip
    }

    fn gdb_serialize(&self, write_byte: impl FnMut(Option<u8>)) {
        let had = self.bytes.len() - self.lacking;
        self.bytes.iter().enumerate().map(|(at, b)| (at < had).then_some(*b)).for_each(write_byte);
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != definitions().iter().map(|d| d.size).sum::<usize>() {
            return Err(());
        }
        self.bytes = bytes.to_vec();
        self.lacking = 0;
        Ok(())
    }
}

impl Regs {
    /// Of a vCPU.
    pub fn of(state: &CpuState) -> Regs {
        let mut bytes = Vec::new();
        (0..definitions().len()).for_each(|n| bytes.extend(Reg(n).read(state)));
        let lacking = definitions()
            .iter()
            .enumerate()
            .filter(|(n, _)| !Reg(*n).is_there(state))
            .map(|(_, d)| d.size)
            .sum();
        Regs { bytes, rip: state.rip, lacking }
    }

    /// Into a vCPU.
    pub fn apply(&self, state: &mut CpuState) {
        let mut at = 0;
        for (n, d) in definitions().iter().enumerate() {
            if let Some(value) = self.bytes.get(at..at + d.size) {
                Reg(n).write(state, value);
            }
            at += d.size;
        }
    }
}

impl Reg {
    /// Whether the vCPU has it: a CPU without AVX has no upper halves.
    pub fn is_there(self, s: &CpuState) -> bool {
        match definitions()[self.0] {
            Definition { place: Place::Area(at, _), size, .. } => s.xsave.len() >= at + size,
            _ => true,
        }
    }

    /// Its bytes; as many as its definition says.
    pub fn read(self, s: &CpuState) -> Vec<u8> {
        let d = &definitions()[self.0];
        let word = |v: u64| v.to_le_bytes()[..d.size].to_vec();
        match d.place {
            Place::Gpr(n) => word(s.gpr[n]),
            Place::Rip => word(s.rip),
            Place::Flags => word(s.rflags),
            Place::Selector(n) => word(s.segments[n].selector.into()),
            Place::Base(n) => word(s.segments[n].base),
            Place::Area(at, component) => {
                let mut out = vec![0; d.size];
                if component == 0 || components(s) & component != 0 {
                    // x87 words are two bytes, but for the instruction and operand offsets.
                    let n = if d.kind == "int" && !matches!(at, 8 | 16) { 2 } else { d.size };
                    if let Some(from) = s.xsave.get(at..at + n) {
                        out[..n].copy_from_slice(from);
                    }
                } else if at == 0 {
                    // The control word of a component in its initial state.
                    out[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
                }
                out
            }
            Place::Tag => word(full_tag(s).into()),
            Place::Msr(n) => word(s.msrs.iter().find(|m| m.0 == n).map_or(0, |m| m.1)),
            Place::Cr(n) => word(match n {
                0 => s.cr0,
                2 => s.cr2,
                3 => s.cr3,
                4 => s.cr4,
                _ => s.cr8,
            }),
            Place::Efer => word(s.efer),
        }
    }

    /// Replace it by `value`, which has as many bytes as its definition says. What does not change, or is not there, is not touched.
    pub fn write(self, s: &mut CpuState, value: &[u8]) {
        let d = &definitions()[self.0];
        if value.len() != d.size || !self.is_there(s) || self.read(s) == value {
            return;
        }
        let mut wide = [0; 8];
        let n = d.size.min(8);
        wide[..n].copy_from_slice(&value[..n]);
        let v = u64::from_le_bytes(wide);
        match d.place {
            Place::Gpr(n) => s.gpr[n] = v,
            Place::Rip => s.rip = v,
            Place::Flags => s.rflags = s.rflags & !0xffff_ffff | v | 2,
            Place::Selector(n) => s.segments[n].selector = v as u16,
            Place::Base(n) => s.segments[n].base = v,
            Place::Area(at, component) => {
                let n = if d.kind == "int" && !matches!(at, 8 | 16) { 2 } else { d.size };
                begin(s, component);
                if let Some(to) = s.xsave.get_mut(at..at + n) {
                    to.copy_from_slice(&value[..n]);
                }
            }
            Place::Tag => {
                begin(s, X87);
                // One bit per register: not empty.
                let short = (0..8).filter(|r| v >> (2 * r) & 3 != 3).fold(0, |t, r| t | 1 << r);
                if let Some(b) = s.xsave.get_mut(4) {
                    *b = short;
                }
            }
            Place::Msr(n) => {
                if let Some(m) = s.msrs.iter_mut().find(|m| m.0 == n) {
                    m.1 = v;
                }
            }
            Place::Cr(n) => match n {
                0 => s.cr0 = v,
                2 => s.cr2 = v,
                3 => s.cr3 = v,
                4 => s.cr4 = v,
                _ => s.cr8 = v,
            },
            Place::Efer => s.efer = v,
        }
    }
}

/// XSTATE_BV: which components are not in their initial state (Intel SDM 1 section 13.4.2).
fn components(s: &CpuState) -> u64 {
    s.xsave.get(512..520).map_or(0, |b| b.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
}

/// A component is about to be written in part: if it is in its initial state, spell that out first.
fn begin(s: &mut CpuState, component: u64) {
    let had = components(s);
    if component == 0 || had & component != 0 || s.xsave.len() < 576 {
        return;
    }
    match component {
        X87 => {
            s.xsave[..24].fill(0);
            s.xsave[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
            s.xsave[32..160].fill(0);
        }
        SSE => s.xsave[160..416].fill(0),
        _ => s.xsave[YMM_HIGH..].iter_mut().take(256).for_each(|b| *b = 0),
    }
    s.xsave[512..520].copy_from_slice(&(had | component).to_le_bytes());
}

/// The x87 tag word in its full form (Intel SDM 1 section 8.1.7), from the one bit per register that FXSAVE has and the registers' values.
fn full_tag(s: &CpuState) -> u16 {
    if components(s) & X87 == 0 || s.xsave.len() < 160 {
        return 0xffff;
    }
    let top = usize::from(u16::from_le_bytes([s.xsave[2], s.xsave[3]]) >> 11 & 7);
    (0..8).fold(0, |tag, r| {
        let at = 32 + 16 * ((r + 8 - top) % 8);
        let exponent = u16::from_le_bytes([s.xsave[at + 8], s.xsave[at + 9]]) & 0x7fff;
        let mantissa = &s.xsave[at..at + 8];
        let kind: u16 = if s.xsave[4] >> r & 1 == 0 {
            3
        } else if exponent == 0 && mantissa.iter().all(|b| *b == 0) {
            1
        } else if exponent == 0 || exponent == 0x7fff || mantissa[7] & 0x80 == 0 {
            2
        } else {
            0
        };
        tag | kind << (2 * r)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> CpuState {
        let mut s = CpuState { xsave: vec![0; 576], rip: 0x1234, rflags: 2, ..CpuState::default() };
        s.gpr = std::array::from_fn(|n| n as u64 * 0x1111);
        s.msrs = vec![(msr::KERNEL_GS_BASE, 77)];
        s
    }

    #[test]
    fn registers_go_both_ways() {
        let mut a = state();
        let regs = Regs::of(&a);
        assert_eq!(regs.bytes[8..16], 0x3333u64.to_le_bytes(), "RBX comes second");
        let before = a.clone();
        regs.apply(&mut a);
        assert_eq!(a, before, "writing back changes nothing");
        let mut bytes = regs.bytes.clone();
        bytes.iter_mut().enumerate().for_each(|(n, b)| *b = n as u8);
        let mut changed = Regs::default();
        changed.gdb_deserialize(&bytes).unwrap();
        changed.apply(&mut a);
        let again = Regs::of(&a);
        assert_eq!(again.bytes[..132], bytes[..132], "general registers and RIP");
        assert_eq!(components(&a), X87 | SSE);
        let xmm0 = definitions().iter().take_while(|d| d.name != "xmm0").map(|d| d.size).sum::<usize>();
        assert_eq!(again.bytes[xmm0..xmm0 + 16 * 16 + 4 + 16], bytes[xmm0..xmm0 + 16 * 16 + 4 + 16]);
        assert!(changed.gdb_deserialize(&bytes[1..]).is_err());
    }

    #[test]
    fn upper_halves_are_there_with_avx_alone() {
        let serialized = |s: &CpuState| {
            let mut out = Vec::new();
            Regs::of(s).gdb_serialize(|b| out.push(b));
            out
        };
        let mut s = state();
        let without = serialized(&s);
        assert!(without[without.len() - 256..].iter().all(Option::is_none));
        assert!(without[..without.len() - 256].iter().all(Option::is_some));
        let ymm = definitions().iter().position(|d| d.name == "ymm0h").unwrap();
        Reg(ymm).write(&mut s, &[5; 16]);
        assert_eq!(s, state(), "there is nothing to write to");
        // In its initial state it is zero, whatever the area holds; writing one register sets the others to that.
        s.xsave.resize(832, 0xaa);
        assert_eq!(serialized(&s)[without.len() - 256..], [Some(0); 256]);
        Reg(ymm + 1).write(&mut s, &[5; 16]);
        assert_eq!(components(&s), AVX);
        assert_eq!(
            s.xsave[576..832],
            [[0; 16], [5; 16]].concat().into_iter().chain([0; 224]).collect::<Vec<_>>()
        );
        assert_eq!(serialized(&s)[without.len() - 240..without.len() - 224], [Some(5); 16]);
    }

    #[test]
    fn the_description_names_every_register_once() {
        let xml = description();
        for d in definitions() {
            assert_eq!(xml.matches(&format!(r#"<reg name="{}""#, d.name)).count(), 1, "{}", d.name);
        }
        assert_eq!(xml.matches("<feature").count(), xml.matches("</feature>").count());
        // Numbers that gdb has fixed.
        let number = |name: &str| definitions().iter().position(|d| d.name == name);
        assert_eq!(
            (number("rip"), number("st0"), number("xmm0"), number("mxcsr")),
            (Some(16), Some(24), Some(40), Some(56))
        );
    }

    #[test]
    fn a_component_in_its_initial_state_reads_as_such() {
        let mut s = state();
        s.xsave[..416].fill(0xaa);
        let value = |s: &CpuState, name: &str| {
            let n = definitions().iter().position(|d| d.name == name).unwrap();
            Reg(n).read(s)
        };
        assert_eq!(value(&s, "xmm3"), [0; 16]);
        assert_eq!(value(&s, "fctrl"), [0x7f, 3, 0, 0]);
        assert_eq!(value(&s, "ftag"), [0xff, 0xff, 0, 0]);
        let n = definitions().iter().position(|d| d.name == "xmm1").unwrap();
        Reg(n).write(&mut s, &[5; 16]);
        assert_eq!((value(&s, "xmm1"), value(&s, "xmm2")), (vec![5; 16], vec![0; 16]));
    }
}
