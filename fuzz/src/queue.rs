//! Descriptor rings and chains that a hostile driver wrote.

use std::sync::Arc;

use ringfort_memory::{Bytes, GuestAddress, GuestMemory, PAGE_SIZE, RamMap};
use ringfort_virtio::queue::{Gate, Queue, QueueLayout, QueueProgress};

use crate::Input;

const PAGES: u64 = 4;

struct Silent;

impl ringfort_virtio::Interrupt for Silent {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
}

fn memory() -> GuestMemory {
    // Two pieces with a hole, so that buffers may lie across its edge.
    let half = PAGES / 2 * PAGE_SIZE;
    ringfort_memory::allocate(&[(0, half), (half + PAGE_SIZE, half)]).expect("memory")
}

/// The layout from the first bytes, memory from the rest; then the device's side runs until the queue is empty or broken.
pub fn virtio_queue(data: &[u8]) {
    thread_local! {
        static MEMORY: GuestMemory = memory();
    }
    let mut input = Input(data);
    let options = input.u8();
    let layout = QueueLayout {
        size: 1 << (options & 7),
        desc: u64::from(input.u16()) & !15,
        avail: u64::from(input.u16()) & !1,
        used: u64::from(input.u16()) & !3,
        event_idx: options & 8 != 0,
        indirect: options & 16 != 0,
    };
    let progress = QueueProgress { next_avail: input.u16(), next_used: input.u16(), signalled: None };
    let rest = input.rest();
    MEMORY.with(|memory| {
        let half = (PAGES / 2 * PAGE_SIZE) as usize;
        let mut image = vec![0; 2 * half];
        let n = rest.len().min(image.len());
        image[..n].copy_from_slice(&rest[..n]);
        memory.write_slice(&image[..half], GuestAddress(0)).expect("RAM");
        memory.write_slice(&image[half..], GuestAddress(half as u64 + PAGE_SIZE)).expect("RAM");
        serve(memory, &layout, progress);
    });
}

fn serve(memory: &GuestMemory, layout: &QueueLayout, progress: QueueProgress) {
    let ram = Arc::new(RamMap::new(memory));
    let Ok(mut queue) = Queue::new(&ram, layout, progress, 0, Arc::new(Gate::default()), Arc::new(Silent))
    else {
        return;
    };
    // The device's own writes may fall on the available ring and renew it, so the number of rounds is bounded here, as a
    // device's thread is bounded by the guest doing it.
    for _ in 0..256 {
        let chain = match queue.pop() {
            Ok(Some(chain)) => chain,
            Ok(None) | Err(_) => break,
        };
        let mut buffer = [0; 300];
        let read = chain.read(0, &mut buffer);
        assert_eq!(read as u64, chain.readable().min(300));
        assert_eq!(chain.read(chain.readable(), &mut buffer), 0, "nothing beyond the end");
        let written = chain.write(0, &buffer);
        assert_eq!(written as u64, chain.writable().min(300));
        assert_eq!(chain.write(u64::MAX, &buffer), 0);
        let listed: u64 = chain.writable_ranges().map(|(_, len)| len).sum();
        assert_eq!(listed, chain.writable());
        chain.mark_written(0, written as u64);
        queue.push(chain, written as u32);
        let _ = queue.needs_interrupt();
    }
    queue.disable_notifications();
    let _ = queue.enable_notifications();
}
