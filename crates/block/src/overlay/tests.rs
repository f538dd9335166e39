use super::*;
use crate::storage::tests::{TempDir, hammer, read};
use crate::{ImageOptions, open_image};

fn disk(dir: &TempDir, content: &[u8]) -> (PathBuf, Overlay) {
    let path = dir.file("base.img", content);
    let base = open_image(&path, &ImageOptions { read_only: true, ..Default::default() }).unwrap();
    (path, Overlay::new(base, &dir.0).unwrap())
}

#[test]
fn the_base_never_changes_and_the_overlay_behaves_like_a_disk() {
    let dir = TempDir::new();
    // A size that is no multiple of a block.
    let content: Vec<u8> = (0..60 * 1024 + 512u32).map(|i| (i / 97) as u8).collect();
    let (path, overlay) = disk(&dir, &content);
    hammer(&overlay, &mut content.clone(), 4242);
    overlay.flush().unwrap();
    assert!(std::fs::read(&path).unwrap() == content);
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "no file is left with a name");
}

#[test]
fn only_written_blocks_are_held() {
    let dir = TempDir::new();
    let (_, overlay) = disk(&dir, &[3; 64 << 10]);
    assert_eq!(overlay.held_bytes(), 0);
    overlay.write_at(&[SharedSlice::new(&[1])], 5000).unwrap();
    assert_eq!(overlay.held_bytes(), BLOCK);
    let block = read(&overlay, 4096, 4096);
    assert_eq!((block[903], block[904], block[905]), (3, 1, 3));
    overlay.discard(8192, 8192).unwrap();
    assert_eq!(read(&overlay, 8192, 8192), vec![0; 8192]);
    overlay.discard(100, 200).unwrap();
    assert_eq!(read(&overlay, 100, 200), vec![3; 200]);
    assert!(overlay.write_at(&[SharedSlice::new(&[1; 2])], (64 << 10) - 1).is_err());
    assert!(overlay.discard(u64::MAX - 1, 2).is_err());
}

#[test]
fn neighbours_in_one_block_do_not_undo_each_other() {
    let dir = TempDir::new();
    let (_, overlay) = disk(&dir, &[0; 256 << 10]);
    std::thread::scope(|s| {
        for lane in 0..4u64 {
            let overlay = &overlay;
            s.spawn(move || {
                for block in 0..64 {
                    for half in 0..2 {
                        let at = block * 4096 + lane * 1024 + half * 512;
                        overlay.write_at(&[SharedSlice::new(&[lane as u8 + 1; 512])], at).unwrap();
                    }
                }
            });
        }
    });
    let all = read(&overlay, 0, 256 << 10);
    assert!(all.iter().enumerate().all(|(i, &b)| u64::from(b) == (i as u64 % 4096) / 1024 + 1));
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let dir = TempDir::new();
    let path = dir.file("base.img", &[0; 512]);
    let base = open_image(&path, &ImageOptions::default()).unwrap();
    let e = Overlay::new(base, Path::new("/nonexistent/place")).err().unwrap();
    assert!(e.to_string().contains("/nonexistent/place") && e.to_string().contains("TMPDIR"), "{e}");
}

#[test]
fn a_huge_sparse_disk_costs_little() {
    let dir = TempDir::new();
    let path = dir.file("huge.img", &[1; 512]);
    let size = 4u64 << 40;
    // A file system with a smaller limit cannot be the place for this.
    if std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).is_err() {
        return;
    }
    let base = open_image(&path, &ImageOptions { read_only: true, ..Default::default() }).unwrap();
    let overlay = Overlay::new(base, &dir.0).unwrap();
    assert_eq!(overlay.size(), size);
    overlay.write_at(&[SharedSlice::new(&[7; 100])], size - 100).unwrap();
    overlay.write_at(&[SharedSlice::new(&[8; 2])], (128 << 20) - 1).unwrap();
    assert_eq!(read(&overlay, size - 101, 101)[..2], [0, 7]);
    assert_eq!(read(&overlay, (128 << 20) - 2, 4), [0, 8, 8, 0]);
    assert_eq!(overlay.held_bytes(), 3 * BLOCK);
    let leaves = overlay.held.leaves.iter().filter(|l| l.get().is_some()).count();
    assert_eq!(leaves, 3);
}
