//! Instruction bytes.

use ringfort_engine::CpuidTable;
use ringfort_engine_soft::{
    cpu::CodeSize,
    decode::{self, FeatureSet, Fetched, Mode, lower},
};

use crate::Input;

/// First byte: the mode. Then code, taken instruction by instruction as a block is.
pub fn decoder(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.u8();
    let (code, stack) = match choice & 3 {
        0 => (CodeSize::Bits16, 2),
        1 => (CodeSize::Bits32, 4),
        _ => (CodeSize::Bits64, 8),
    };
    let mode = Mode { code, stack, flat: choice & 4 != 0, real: choice & 8 != 0 };
    let table = CpuidTable::default();
    let features = FeatureSet::from_cpuid(&table);
    let code = input.rest();
    let code = &code[..code.len().min(4096)];
    let mut decoder = decode::decoder(code, 0, mode, decode::options(&table));
    let mut at = 0;
    while at < code.len() {
        let Fetched::Instruction(i) = decode::next(&mut decoder) else { break };
        let end = decoder.position();
        assert!(end > at && end - at <= 15, "an instruction of {} bytes", end - at);
        let _ = lower(&i, &code[at..end], at as u16, mode, &features);
        at = end;
    }
}
