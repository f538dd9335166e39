//! The log of the guest's writes.

use crate::programs;
use crate::support::*;
use ringfort_engine::VcpuExit;
use ringfort_engine_kvm::KvmOptions;
use ringfort_memory::RamMap;

/// What was written, but for the page tables, in which the CPU marks what it has used, and for the code: KVM takes the first touch of a
/// page for a write if the page may be written.
fn dirty_pages(g: &Guest) -> Vec<u64> {
    g.vm.sync_dirty_log().expect("the log");
    let words = RamMap::new(&g.memory).slots()[0].tracker.take_dirty();
    (0..)
        .zip(words)
        .flat_map(|(n, w)| (0..64).filter(move |b| w >> b & 1 != 0).map(move |b| n * 64 + b))
        .filter(|page| !(0x10..0x16).contains(page) && *page != CODE_AT >> 12)
        .collect()
}

fn logs(options: KvmOptions) {
    let Some(kvm) = kvm_with(options) else { return };
    let mut g = Guest::new(&kvm, 1);
    g.load_long(programs::dirty());
    g.vm.set_dirty_logging(true);
    dirty_pages(&g);
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(dirty_pages(&g), [0x300, 0x301, 0x305, 0x3ff]);
    assert_eq!(dirty_pages(&g), [0u64; 0]);
    g.set(|s| s.rip = CODE_AT);
    g.vm.set_dirty_logging(true);
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(dirty_pages(&g), [0x300, 0x301, 0x305, 0x3ff], "again after it was taken");
    g.vm.set_dirty_logging(false);
    g.set(|s| s.rip = CODE_AT);
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(dirty_pages(&g), [0u64; 0]);
}

#[test]
fn writes_are_logged_in_bitmaps() {
    logs(KvmOptions::default());
}

#[test]
fn writes_are_logged_in_rings() {
    logs(KvmOptions { dirty_ring: Some(1024), ..KvmOptions::default() });
}

#[test]
fn a_full_ring_loses_nothing() {
    let Some(kvm) = kvm_with(KvmOptions { dirty_ring: Some(1024), ..KvmOptions::default() }) else { return };
    let mut g = Guest::new(&kvm, 1);
    for _ in 0..4 {
        g.load_long(programs::dirty_all());
        g.vm.set_dirty_logging(true);
        dirty_pages(&g);
        assert_eq!(g.run(), VcpuExit::Kicked);
        let pages = dirty_pages(&g);
        assert!((0x200..0x400).all(|p| pages.contains(&p)), "{} pages", pages.len());
    }
}
