use super::*;
use crate::testing::{BUFFERS, Rig};
use std::sync::Arc;

#[test]
fn buffers_are_filled_up_to_the_bound() {
    let mut rig = Rig::new(Arc::new(Rng::new()), 0);
    rig.send(0, &[(BUFFERS, 10, true), (BUFFERS + 0x100, 54, true)]);
    assert_eq!(rig.used(0).1, 64);
    let (a, b) = (rig.read(BUFFERS, 10), rig.read(BUFFERS + 0x100, 54));
    assert!(a != [0; 10] && b != [0; 54]);
    assert_eq!(rig.read(BUFFERS + 10, 6), [0; 6], "nothing beyond the buffer");
    // A huge buffer gets a part, an empty or read-only chain nothing.
    rig.send(0, &[(BUFFERS, 0x10_0000, true)]);
    assert_eq!(rig.used(0).1, MOST as u32);
    assert_eq!(rig.read(BUFFERS + MOST as u64, 64), [0; 64]);
    rig.send(0, &[(BUFFERS, 16, false)]);
    assert_eq!(rig.used(0).1, 0);
}

#[test]
fn two_requests_differ() {
    let mut rig = Rig::new(Arc::new(Rng::new()), 0);
    for i in 0..2 {
        rig.send(0, &[(BUFFERS + i * 64, 64, true)]);
        rig.used(0);
    }
    assert_ne!(rig.read(BUFFERS, 64), rig.read(BUFFERS + 64, 64));
}
