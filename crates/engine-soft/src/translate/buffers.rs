//! Memory that one translation leaves to the next.

use super::asm::Code;
use super::block::{Emit, How};
use super::control::{Later, Out};
use super::slow::Slow;
use super::uses::Registers;
use iced_x86::Instruction;

/// What a translation needs while it is made, kept for the next, so that few ask for memory.
#[derive(Default)]
pub(super) struct Buffers {
    pub source: Source,
    pub code: Code,
    pub hows: Vec<How>,
    pub wanted: Vec<u32>,
    pub uses: Vec<Registers>,
    pub touches: Vec<bool>,
    pub slow: Vec<Slow>,
    pub outs: Vec<Out>,
    pub later: Vec<Later>,
}

/// What is translated.
#[derive(Default)]
pub(super) struct Source {
    pub bytes: Vec<u8>,
    pub instructions: Vec<Instruction>,
}

/// `list` to be filled anew.
pub(super) fn emptied<T>(list: &mut Vec<T>) -> Vec<T> {
    list.clear();
    std::mem::take(list)
}

impl Emit<'_> {
    /// The code; the lists go back to where they came from.
    pub(super) fn finish(self) -> Code {
        let Emit { c, buffers, hows, wanted, uses, touches, slow, outs, later, .. } = self;
        let source = std::mem::take(&mut buffers.source);
        *buffers = Buffers { source, code: Code::default(), hows, wanted, uses, touches, slow, outs, later };
        c
    }
}
