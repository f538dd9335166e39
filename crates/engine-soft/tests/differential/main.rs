//! Every instruction that user code may run, executed by the engine and by the host's own CPU from the same random state: registers,
//! flags (the undefined ones included), memory and exceptions must be equal.
//!
//! `RINGFORT_DIFF_CASES` states per instruction form (default small enough for CI), `RINGFORT_DIFF_SEED` the seed, and
//! `RINGFORT_DIFF_ONLY` a part of the names (iced's `Code`) to test. A mismatch is printed with the instruction's bytes and the values
//! that matter.

mod compare;
mod generate;
mod native;
mod programs;

use compare::{Bench, Way};
use fastrand::Rng;
use iced_x86::{Code, Encoder, EncodingKind, FlowControl, Mnemonic as M};
use ringfort_engine_soft::cpuid::host_is_amd;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}: not a number: {v}")))
}

/// Instructions that cannot be compared this way, and why.
fn excluded(code: Code) -> Option<&'static str> {
    let info = code.op_code();
    if !info.mode64() || !info.cpl3() || info.is_privileged() || info.is_input_output() {
        return Some("not for 64-bit user code");
    }
    if !matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return Some("encodings that the engine does not offer");
    }
    Some(match code.mnemonic() {
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpid | M::Cpuid | M::Xgetbv | M::Rdpmc => {
            "gives another value each time or elsewhere"
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw => {
            "shows the host's tables"
        }
        M::Syscall
        | M::Sysenter
        | M::Sysexit
        | M::Sysret
        | M::Int
        | M::Int1
        | M::Int3
        | M::Into
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Hlt
        | M::Monitor
        | M::Mwait
        | M::Umonitor
        | M::Umwait
        | M::Tpause
        | M::Vmcall
        | M::Vmmcall
        | M::Vmgexit
        | M::Monitorx
        | M::Mwaitx => "enters the kernel or the hypervisor",
        M::Popf | M::Popfq | M::Pushf | M::Pushfq | M::Sti | M::Cli | M::Stac | M::Clac => "system flags",
        M::Rdfsbase
        | M::Rdgsbase
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Swapgs
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Lds
        | M::Les => "segments",
        M::Xsave
        | M::Xsave64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64
        | M::Xsetbv => "the host's area differs in size",
        M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Fnsave
        | M::Fsave
        | M::Frstor
        | M::Fldenv
        | M::Fnstenv
        | M::Fstenv => "shows instruction pointers",
        M::Xbegin | M::Xend | M::Xabort | M::Xtest => "transactions",
        M::INVALID | M::Db | M::Dw | M::Dd | M::Dq | M::Zero_bytes => "no instruction",
        M::Reservednop
            if matches!(
                code,
                Code::Reservednop_rm16_r16_0F0D
                    | Code::Reservednop_rm32_r32_0F0D
                    | Code::Reservednop_rm64_r64_0F0D
            ) =>
        {
            "with a register, AMD raises #UD and Intel does nothing"
        }
        M::Ud0 | M::Ud1 | M::Ud2 => "nothing to compare",
        _ => {
            if matches!(code.flow_control(), FlowControl::Interrupt | FlowControl::Exception)
                || code.is_jmp_far()
                || code.is_call_far()
                || code.is_jmp_far_indirect()
                || code.is_call_far_indirect()
            {
                "leaves the segment"
            } else if (0..info.op_count()).any(|n| {
                use iced_x86::OpCodeOperandKind as K;
                matches!(info.op_kind(n), K::seg_reg | K::cr_reg | K::dr_reg | K::tr_reg | K::fs | K::gs)
            }) || matches!(
                code,
                Code::Retfw
                    | Code::Retfd
                    | Code::Retfq
                    | Code::Retfw_imm16
                    | Code::Retfd_imm16
                    | Code::Retfq_imm16
            ) {
                "segments"
            } else {
                return None;
            }
        }
    })
}

#[derive(Clone, Copy, PartialEq)]
enum Group {
    Integer,
    Vector,
    X87,
}

fn group(code: Code) -> Group {
    let info = code.op_code();
    let vector = (0..info.op_count()).any(|n| {
        let k = format!("{:?}", info.op_kind(n));
        k.starts_with("mm_") || k.starts_with("xmm") || k.starts_with("ymm") || k.contains("vsib")
    });
    let name = format!("{:?}", code.mnemonic());
    let legacy_vector = matches!(
        code.mnemonic(),
        M::Emms | M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr | M::Vzeroall | M::Vzeroupper
    );
    if vector || legacy_vector {
        Group::Vector
    } else if name.starts_with('F') || code.mnemonic() == M::Wait {
        Group::X87
    } else {
        Group::Integer
    }
}

fn codes(wanted: Group) -> Vec<Code> {
    let only = std::env::var("RINGFORT_DIFF_ONLY").unwrap_or_default();
    Code::values()
        .filter(|&c| excluded(c).is_none() && group(c) == wanted)
        .filter(|c| format!("{c:?}").contains(&only))
        .collect()
}

/// Compare every form of a group; `states` per form by default.
fn compare_group(wanted: Group, states: u64, way: Way) {
    let states = setting("RINGFORT_DIFF_CASES", states);
    let seed = setting("RINGFORT_DIFF_SEED", 1);
    let mut bench = Bench::new(way);
    let (mut cases, mut forms, mut missing) = (0u64, 0u64, Vec::new());
    for code in codes(wanted) {
        let mut rng = Rng::with_seed(seed ^ (code as u64) << 32);
        let mut done = 0;
        let mut attempts = 0;
        while done < states && attempts < 50 + states {
            attempts += 1;
            let Some(g) = generate::instruction(code, &mut rng, native::CODE) else { continue };
            if generate::conflicts(&g) {
                continue;
            }
            if !bench.offers(&g.instruction) {
                missing.push(code);
                break;
            }
            for _ in 0..8.min(states - done) {
                done += 1;
                bench.single(&g, &mut rng);
            }
        }
        forms += u64::from(done > 0);
        cases += done;
    }
    println!(
        "{cases} cases of {forms} instruction forms; {} forms are not offered to the guest",
        missing.len()
    );
    bench.finish(cases);
    assert!(forms > 0, "nothing was compared");
}

#[test]
fn integer_instructions() {
    compare_group(Group::Integer, 600, Way::Steps);
}

#[test]
fn vector_instructions() {
    compare_group(Group::Vector, 200, Way::Steps);
}

#[test]
fn x87_instructions() {
    compare_group(Group::X87, 800, Way::Steps);
}

#[test]
fn integer_sequences() {
    sequences(&[Group::Integer], setting("RINGFORT_DIFF_CASES", 400) * 50, Way::Blocks);
}

/// Vector, MMX and x87 instructions between integer ones.
#[test]
fn mixed_sequences() {
    sequences(
        &[Group::Vector, Group::X87, Group::Integer],
        setting("RINGFORT_DIFF_CASES", 400) * 50,
        Way::Blocks,
    );
}

/// The same by translated code.
#[test]
fn translated_instructions() {
    compare_group(Group::Integer, 200, Way::Translated);
    compare_group(Group::Vector, 40, Way::Translated);
    compare_group(Group::X87, 40, Way::Translated);
}

#[test]
fn translated_sequences() {
    let cases = setting("RINGFORT_DIFF_CASES", 400) * 50;
    sequences(&[Group::Integer], cases, Way::Translated);
    sequences(&[Group::Vector, Group::X87, Group::Integer], cases, Way::Translated);
}

#[test]
fn translated_programs() {
    programs_of(setting("RINGFORT_DIFF_CASES", 400), Way::Translated, false);
}

#[test]
fn interpreted_programs() {
    programs_of(setting("RINGFORT_DIFF_CASES", 400) / 2, Way::Blocks, false);
}

/// Against the interpreter: with memory operands by FS and GS.
#[test]
fn translated_programs_with_segments() {
    programs_of(setting("RINGFORT_DIFF_CASES", 400) / 2, Way::Translated, true);
}

/// Jumps, loops, calls, stack traffic, faults half-way.
fn programs_of(cases: u64, way: Way, segments: bool) {
    let mut rng = Rng::with_seed(setting("RINGFORT_DIFF_SEED", 1));
    let mut bench = Bench::new(way);
    let codes: Vec<Code> = codes(Group::Integer)
        .into_iter()
        .filter(|&c| c.flow_control() == FlowControl::Next && c != Code::Movsxd_r16_rm16)
        .filter(|c| !Bench::loose_flags(c.mnemonic()))
        .collect();
    for _ in 0..cases {
        let p = programs::program(&codes, &mut rng, segments, &|i| bench.offers(i));
        bench.program_runs(&p, &mut rng, segments);
    }
    bench.finish(cases);
}

/// Several instructions in a row, so that what one leaves is what the next finds.
fn sequences(groups: &[Group], cases: u64, way: Way) {
    let mut rng = Rng::with_seed(setting("RINGFORT_DIFF_SEED", 1));
    let mut bench = Bench::new(way);
    let codes: Vec<Code> = groups
        .iter()
        .flat_map(|&g| codes(g))
        // Without what has an exemption of its own (see `compare`).
        .filter(|&c| c.flow_control() == FlowControl::Next && c != Code::Movsxd_r16_rm16)
        // Without what would enter AMD's misaligned SSE mode, which the guest does not have.
        .filter(|c| !matches!(c.mnemonic(), M::Ldmxcsr | M::Vldmxcsr))
        .filter(|c| way != Way::Translated || !Bench::loose_flags(c.mnemonic()))
        // Without what hosts do in different ways (see `compare`).
        .filter(|c| host_is_amd() || !matches!(c.mnemonic(), M::Rol | M::Ror))
        .collect();
    for _ in 0..cases {
        let mut parts = Vec::new();
        let mut at = native::CODE;
        while parts.len() < 6 {
            let code = codes[rng.usize(0..codes.len())];
            let Some(g) = generate::instruction(code, &mut rng, at) else { continue };
            if generate::conflicts(&g) || !bench.offers(&g.instruction) {
                continue;
            }
            let i = &g.instruction;
            if !host_is_amd() && (compare::repeats(i) || compare::faults_in_its_own_way(i)) {
                continue;
            }
            at += g.bytes.len() as u64;
            parts.push(g);
        }
        bench.sequence(&parts, &mut rng);
    }
    bench.finish(cases);
}

/// Whatever CPUID declares is executed by something, in every width of code; privileged instructions included.
#[test]
fn every_declared_instruction_has_a_handler() {
    let bench = Bench::new(Way::Steps);
    let mut rng = Rng::with_seed(7);
    let mut without = Vec::new();
    let mut checked = 0;
    for bits in [16, 32, 64] {
        for code in Code::values() {
            let info = code.op_code();
            let fits = match bits {
                16 => info.mode16(),
                32 => info.mode32(),
                _ => info.mode64(),
            };
            if !fits
                || !info.is_instruction()
                || matches!(code.mnemonic(), M::Ud0 | M::Ud1 | M::Ud2 | M::Xtest | M::INVALID)
            {
                continue;
            }
            let made = (0..400).find_map(|_| generate::instruction_for(bits, code, &mut rng, 0));
            if let Some(g) = made
                && bench.offers(&g.instruction)
            {
                checked += 1;
                if !bench.has_handler(&g.instruction, &g.bytes, bits) {
                    without.push(format!("{code:?} ({bits})"));
                }
            }
        }
    }
    println!("{checked} instruction forms");
    assert!(without.is_empty(), "{} forms without a handler: {}", without.len(), without.join(", "));
    assert!(checked > 2000);
}

/// The harness itself: a difference must be found.
#[test]
fn a_wrong_result_is_noticed() {
    let mut rng = Rng::with_seed(3);
    let mut bench = Bench::new(Way::Steps);
    let g = loop {
        if let Some(g) = generate::instruction(Code::Add_r64_rm64, &mut rng, native::CODE)
            && g.pointer.is_none()
        {
            break g;
        }
    };
    bench.single(&g, &mut rng);
    assert_eq!(bench.mismatches(), 0);
    // The engine is made to execute SUB where the host executes ADD.
    let mut wrong = g.clone();
    wrong.bytes = {
        let mut i = g.instruction;
        i.set_code(Code::Sub_r64_rm64);
        let mut e = Encoder::new(64);
        e.encode(&i, native::CODE).expect("the same operands");
        e.take_buffer()
    };
    for _ in 0..8 {
        bench.split(&g, &wrong, &mut rng);
    }
    assert_ne!(bench.mismatches(), 0);
}
