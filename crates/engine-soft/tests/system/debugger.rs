//! What a debugger outside the guest is told: steps, INT3, breakpoints and watchpoints by address; in translated code as well.

use crate::support::{End, Guest};
use iced_x86::code_asm::*;
use ringfort_engine::{DebugRequest, DebugStop, VcpuExit, Watch, WatchKind};
use ringfort_engine_soft::testing::{TestMode, layout};
use ringfort_x86::cr::DR6_FIXED;

/// A loop that stores RCX to DATA+8 in its 1000 rounds, then INT3, then a loop for good; and the addresses of its parts.
fn looping() -> (Guest, Vec<u64>) {
    let mut g = Guest::new(TestMode::Long64);
    let code = crate::support::assemble_at(64, layout::CODE, |a| {
        let (mut again, mut for_good) = (a.create_label(), a.create_label());
        a.mov(edi, layout::DATA as i32).unwrap(); // 5 bytes
        a.mov(ecx, 1000).unwrap(); // 5
        a.set_label(&mut again).unwrap();
        a.mov(qword_ptr(rdi + 8), rcx).unwrap(); // 4
        a.dec(ecx).unwrap(); // 2
        a.jnz(again).unwrap(); // 2
        a.int3().unwrap(); // 1
        a.set_label(&mut for_good).unwrap();
        a.inc(eax).unwrap(); // 2
        a.jmp(for_good).unwrap();
    });
    g.m.load_code(&code);
    let parts = [0, 5, 10, 14, 16, 18, 19].map(|n| layout::CODE + n).to_vec();
    (g, parts)
}

fn want(g: &mut Guest, request: DebugRequest) {
    g.cpu().set_debug_request(&request).expect("possible");
}

fn at(address: u64, len: u8, kind: WatchKind) -> Watch {
    Watch { address, len, kind }
}

fn run(g: &mut Guest) -> DebugStop {
    let VcpuExit::Debug(event) = g.cpu().run_loop() else { panic!("another exit") };
    event
}

#[test]
fn steps_go_from_instruction_to_instruction() {
    let (mut g, parts) = looping();
    want(&mut g, DebugRequest { step: true, ..DebugRequest::default() });
    for expected in [1, 2, 3, 4, 2, 3] {
        assert_eq!(run(&mut g), DebugStop::Step);
        assert_eq!(g.m.rip(), parts[expected]);
    }
    assert_eq!(g.cpu().dr6, DR6_FIXED, "the guest sees nothing");
}

#[test]
fn int3_is_the_debuggers_if_it_asks() {
    let (mut g, parts) = looping();
    want(&mut g, DebugRequest { software: true, ..DebugRequest::default() });
    for _ in 0..2 {
        assert_eq!(run(&mut g), DebugStop::Software);
        assert_eq!((g.m.rip(), g.reg(1)), (parts[5], 0));
    }
    want(&mut g, DebugRequest::default());
    assert_eq!(g.run(), End::Vector(3), "and the guest's otherwise");
}

#[test]
fn breakpoints_by_address_stop_before_and_go_on_after() {
    let (mut g, parts) = looping();
    let stop = at(parts[3], 1, WatchKind::Execute);
    want(&mut g, DebugRequest { watches: vec![stop], ..DebugRequest::default() });
    for left in (990..=1000).rev() {
        assert_eq!(run(&mut g), DebugStop::Watch(0));
        assert_eq!((g.m.rip(), g.reg(1)), (parts[3], left));
    }
    let (later, first) = (at(parts[6], 1, WatchKind::Execute), at(parts[2], 1, WatchKind::Execute));
    want(&mut g, DebugRequest { watches: vec![first], ..DebugRequest::default() });
    assert_eq!(run(&mut g), DebugStop::Watch(0));
    want(&mut g, DebugRequest { software: true, watches: vec![later], ..DebugRequest::default() });
    assert_eq!(run(&mut g), DebugStop::Software);
    assert_eq!(g.reg(1), 0);
}

#[test]
fn watchpoints_stop_behind_the_access() {
    let (mut g, parts) = looping();
    let wp = at(layout::DATA + 8, 4, WatchKind::Write);
    // Warm: the page is written by the fast path before it is watched.
    let stop = at(parts[3], 1, WatchKind::Execute);
    want(&mut g, DebugRequest { watches: vec![stop], ..DebugRequest::default() });
    assert_eq!(run(&mut g), DebugStop::Watch(0));
    want(&mut g, DebugRequest { watches: vec![wp], ..DebugRequest::default() });
    for left in (900..1000).rev() {
        assert_eq!(run(&mut g), DebugStop::Watch(0));
        assert_eq!((g.m.rip(), g.m.read_u64(layout::DATA + 8)), (parts[3], left));
    }
    // Elsewhere on the page, and reads where writes are watched for, go on.
    let beside = at(layout::DATA + 16, 8, WatchKind::Access);
    want(&mut g, DebugRequest { software: true, watches: vec![beside], ..DebugRequest::default() });
    assert_eq!(run(&mut g), DebugStop::Software);
    assert_eq!(g.cpu().dr6, DR6_FIXED, "the guest sees nothing");
}

#[test]
fn what_is_not_possible_is_refused_and_changes_nothing() {
    let (mut g, _) = looping();
    let ok = at(0x1000, 1, WatchKind::Execute);
    let bad = [
        vec![ok; 5],
        vec![at(0x1001, 2, WatchKind::Write)],
        vec![at(0x1000, 3, WatchKind::Write)],
        vec![at(0x1000, 2, WatchKind::Execute)],
    ];
    want(&mut g, DebugRequest { software: true, ..DebugRequest::default() });
    for watches in bad {
        let request = DebugRequest { watches, ..DebugRequest::default() };
        assert!(g.cpu().set_debug_request(&request).is_err());
    }
    assert_eq!(run(&mut g), DebugStop::Software);
}
