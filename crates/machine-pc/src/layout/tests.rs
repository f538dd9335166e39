use super::*;

#[test]
fn ram_is_split_at_the_hole() {
    let l = Layout::new(1 << 30, 40).unwrap();
    assert_eq!(l.ram_ranges(), [(0, 1 << 30)]);
    assert_eq!(l.pci_mem64().0, 4 << 30);
    let l = Layout::new(8 << 30, 40).unwrap();
    assert_eq!(l.ram_ranges(), [(0, 3 << 30), (4 << 30, 5 << 30)]);
    assert_eq!(l.pci_mem64(), (9 << 30, 256 << 30));
    let l = Layout::new(3 << 30, 36).unwrap();
    assert_eq!(l.ram_ranges().len(), 1);
    assert_eq!(l.pci_mem64(), (4 << 30, 60 << 30));
}

#[test]
fn impossible_sizes_are_refused() {
    for ram in [0, 4095, MIN_RAM - 4096, MIN_RAM + 1, 1 << 40, !4095] {
        let e = Layout::new(ram, 40).unwrap_err().to_string();
        assert!(e.starts_with("memory layout: "), "{e}");
    }
    let most = (1u64 << 36) - (2 << 30);
    let l = Layout::new(most, 36).unwrap();
    let (base, size) = l.pci_mem64();
    assert!(base + size <= 1 << 36 && size >= 1 << 30);
    assert!(Layout::new(most + 4096, 36).is_err());
}

#[test]
fn e820_is_ordered_and_covers_all_ram_but_the_video_hole() {
    for ram in [MIN_RAM, 512 << 20, LOW_RAM_LIMIT, LOW_RAM_LIMIT + 4096, 20 << 30] {
        let l = Layout::new(ram, 40).unwrap();
        let map = l.e820();
        for w in map.windows(2) {
            assert!(w[0].base + w[0].size <= w[1].base, "{w:x?}");
        }
        let sum: u64 = map
            .iter()
            .filter(|e| l.ram_ranges().iter().any(|r| e.base >= r.0 && e.base < r.0 + r.1))
            .map(|e| e.size)
            .sum();
        assert_eq!(sum + (FIRMWARE_BASE - LOW_END), ram);
    }
}

#[test]
fn pci_pins_use_all_eight_inputs() {
    for d in 0..32 {
        for p in 1..=4 {
            assert!((16..24).contains(&pci_gsi(d, p)));
        }
    }
    assert_eq!(pci_gsi(1, 1), 17);
    assert_eq!(pci_gsi(3, 4), 22);
}
