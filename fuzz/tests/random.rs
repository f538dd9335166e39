//! Each target on random input, with fixed seeds: shows that the targets run, and finds what is easy to find.

use ringfort_fuzz::TARGETS;

#[test]
fn every_target_stands_random_input() {
    for (name, target) in TARGETS {
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..3000 {
            let mut data: Vec<u8> = (0..random.usize(0..700)).map(|_| random.u8(..)).collect();
            // Half of the input is mostly zeroes, which gets past more checks than noise does.
            if round % 2 == 0 {
                for byte in &mut data {
                    *byte *= u8::from(random.u8(..) < 40);
                }
            }
            target(&data);
        }
        println!("{name}: done");
    }
}

#[test]
fn images_with_a_right_beginning_and_a_wrong_rest() {
    let (_, boot) = TARGETS[0];
    let mut random = fastrand::Rng::with_seed(8);
    for round in 0..6000 {
        let mut image: Vec<u8> = vec![0; 8192];
        match round % 3 {
            // ELF64, x86-64, little endian, executable, with program headers right behind the header.
            0 => {
                image[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
                image[20] = 1;
                image[32] = 64;
                image[52..58].copy_from_slice(&[64, 0, 56, 0, random.u8(..5), 0]);
            }
            // Linux boot protocol: boot sector mark, "HdrS", version 2.15.
            1 => {
                image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
                image[0x202..0x206].copy_from_slice(b"HdrS");
                image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
                image[0x211] = 1;
            }
            // Multiboot 1, with addresses in the header.
            _ => {
                image[..4].copy_from_slice(&0x1bad_b002u32.to_le_bytes());
                image[4..8].copy_from_slice(&0x1_0000u32.to_le_bytes());
                image[8..12].copy_from_slice(&0u32.wrapping_sub(0x1bad_b002 + 0x1_0000).to_le_bytes());
            }
        }
        for _ in 0..random.usize(0..40) {
            let at = random.usize(12..700);
            image[at] = if random.bool() { random.u8(..) } else { 0xff };
        }
        image.truncate(random.usize(1..8192));
        image.insert(0, (round as u8 & 4) | if random.bool() { 0 } else { (round % 3) as u8 });
        boot(&image);
    }
}

/// Inputs that hung or fell once.
#[test]
fn what_was_found_once_stays_mended() {
    // A disk of a huge size, of which nothing is there.
    ringfort_fuzz::disk_qcow2(&[0x0a, 0x08, 0x32, 0x0a, 0x40]);
    // A snapshot of a disk whose table names a cluster far behind the file.
    ringfort_fuzz::disk_qcow2(&[0x0a, 0x0a, 0x22, 0x22, 0x0c]);
    // A state file with a line break in the name of a stream.
    let stream = [&b"\x41\x5d\0\0\x12\x21C\n"[..], &[0; 29], &[0xff; 6], &[0; 4]].concat();
    ringfort_fuzz::state_file(&stream);
}
