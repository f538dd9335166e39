use super::*;
use crate::testing::{Ports, hammer_ports};
use ringfort_bus::lock;
use std::sync::Mutex;

#[derive(Clone)]
struct Ram(Arc<Mutex<Vec<u8>>>);

impl Ram {
    fn new() -> Ram {
        Ram(Arc::new(Mutex::new(vec![0xee; 0x4_0000])))
    }
}

impl DmaMemory for Ram {
    fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let m = lock(&self.0);
        let Some(src) = (gpa as usize).checked_add(data.len()).and_then(|e| m.get(gpa as usize..e)) else {
            return false;
        };
        data.copy_from_slice(src);
        true
    }
    fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let mut m = lock(&self.0);
        let end = (gpa as usize).checked_add(data.len());
        let Some(dst) = end.and_then(|e| m.get_mut(gpa as usize..e)) else { return false };
        dst.copy_from_slice(data);
        true
    }
}

fn device() -> (FwCfg, Ram) {
    let ram = Ram::new();
    let mut d = FwCfg::new(Box::new(ram.clone()));
    assert_eq!(d.add_file("opt/b", *b"second"), Ok(0x20));
    assert_eq!(d.add_file("opt/a", vec![7u8; 100_000]), Ok(0x21));
    d.set_item(5, 4u16.to_le_bytes());
    (d, ram)
}

fn read(d: &mut FwCfg, key: u16, n: usize) -> Vec<u8> {
    d.outw(BASE, key);
    (0..n).map(|_| d.inb(BASE + 1)).collect()
}

impl Ram {
    fn dma(&self, d: &mut FwCfg, control: u32, len: u32, to: u64) -> u32 {
        let block = [&control.to_be_bytes()[..], &len.to_be_bytes(), &to.to_be_bytes()].concat();
        assert!(self.write(0x100, &block));
        d.outl(BASE + 4, 0);
        d.outl(BASE + 8, 0x100u32.to_be());
        let mut r = [0; 4];
        self.read(0x100, &mut r);
        u32::from_be_bytes(r)
    }
    fn at(&self, gpa: usize, n: usize) -> Vec<u8> {
        lock(&self.0)[gpa..gpa + n].to_vec()
    }
}

#[test]
fn items_and_directory() {
    let (mut d, _) = device();
    assert_eq!(read(&mut d, KEY_SIGNATURE, 6), b"QEMU\0\0");
    assert_eq!(read(&mut d, KEY_ID, 4), [3, 0, 0, 0]);
    assert_eq!(read(&mut d, 5, 2), [4, 0]);
    assert_eq!(read(&mut d, 0x777, 2), [0, 0]);
    let dir = read(&mut d, KEY_DIRECTORY, 4 + 2 * 64);
    assert_eq!(dir[..4], [0, 0, 0, 2]);
    assert_eq!(dir[4..18], *b"\x00\x01\x86\xa0\x00\x21\x00\x00opt/a\x00");
    assert_eq!(dir[68..82], *b"\x00\x00\x00\x06\x00\x20\x00\x00opt/b\x00");
    assert_eq!(read(&mut d, 0x20, 6), b"second");
    assert_eq!((d.inl(BASE + 4).swap_bytes(), d.inl(BASE + 8)), (0x5145_4d55, u32::from_le_bytes(*b" CFG")));
}

#[test]
fn bad_files_are_refused() {
    let (mut d, _) = device();
    for name in ["", "with space", "ä", &"x".repeat(56)] {
        assert!(matches!(d.add_file(name, []), Err(FwCfgError::Name(_))), "{name}");
    }
    assert_eq!(d.add_file("opt/a", []), Err(FwCfgError::Taken("opt/a".into())));
    assert!(d.add_file(&"x".repeat(55), []).is_ok());
}

#[test]
fn dma_reads_skips_and_reports_errors() {
    let (mut d, ram) = device();
    assert_eq!(ram.dma(&mut d, 0x20 << 16 | dma::SELECT | dma::READ, 3, 0x1000), 0);
    assert_eq!(ram.at(0x1000, 4), b"sec\xee");
    assert_eq!(ram.dma(&mut d, dma::SKIP, 1, 0), 0);
    assert_eq!(ram.dma(&mut d, dma::READ, 4, 0x1000), 0);
    assert_eq!(ram.at(0x1000, 5), b"nd\0\0\xee", "zeroes beyond the end");
    assert_eq!(ram.dma(&mut d, 0x21 << 16 | dma::SELECT | dma::READ, 100_001, 0x2000), 0);
    assert_eq!(ram.at(0x2000 + 99_999, 3), [7, 0, 0xee]);
    assert_eq!(ram.dma(&mut d, dma::WRITE, 1, 0x1000), dma::ERROR);
    assert_eq!(ram.dma(&mut d, dma::READ, u32::MAX, 0x3_0000), dma::ERROR, "stops where RAM ends");
    assert_eq!(ram.dma(&mut d, dma::READ, 4, u64::MAX - 1), dma::ERROR);
    d.outl(BASE + 4, u32::MAX);
    d.outl(BASE + 8, u32::MAX);
}

#[test]
fn hammer() {
    let ports: Vec<u16> = (BASE..BASE + LEN).collect();
    hammer_ports(
        0xf1,
        || device().0,
        &ports,
        |d, r| {
            d.outw(BASE, r.u16(..0x24));
            d.outl(BASE + 4, 0);
            d.outl(BASE + 8, r.u32(..0x4_0000).to_be());
        },
    );
}
