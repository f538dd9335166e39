//! The driver's side of a ring, for tests and fuzzing of devices and transports.

use crate::queue::{Gate, QueueLayout, QueueProgress};
use crate::transport::RingArea;
use crate::{Core, Interrupt, Queue, VirtioDevice, feature, status};
use ringfort_block::{
    BlockBackend, Limits, SharedSlice, SharedSliceMut, check_range, gather, scatter, total, total_mut,
};
use ringfort_bus::lock;
use ringfort_memory::{Bytes, GuestAddress, GuestMemory, RamMap};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Counts interrupts and lets a test wait for them.
#[derive(Default)]
pub struct Recorder {
    counts: Mutex<HashMap<Option<u16>, u64>>,
    changed: Condvar,
}

impl Recorder {
    /// Interrupts of a queue so far; of the configuration with `None`.
    pub fn count(&self, which: Option<u16>) -> u64 {
        lock(&self.counts).get(&which).copied().unwrap_or(0)
    }

    fn note(&self, which: Option<u16>) {
        *lock(&self.counts).entry(which).or_default() += 1;
        self.changed.notify_all();
    }

    /// Return once there were `count` interrupts.
    ///
    /// # Panics
    /// When they do not come.
    pub fn wait(&self, which: Option<u16>, count: u64) {
        let deadline = Instant::now() + PATIENCE;
        let mut counts = lock(&self.counts);
        while counts.get(&which).copied().unwrap_or(0) < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no interrupt {count} for {which:?}");
            counts = match self.changed.wait_timeout(counts, left) {
                Ok((c, _)) => c,
                Err(e) => e.into_inner().0,
            };
        }
    }
}

impl Interrupt for Recorder {
    fn queue(&self, index: u16) {
        self.note(Some(index));
    }
    fn config(&self) {
        self.note(None);
    }
}

/// A buffer of a chain: guest physical address, length, whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// The driver's side of one queue.
pub struct Ring {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Where the rings lie.
    pub layout: QueueLayout,
    pub(crate) next_desc: u16,
    pub(crate) avail: u16,
    pub(crate) seen: u16,
}

impl Ring {
    /// Rings at `base` (16-byte aligned) in zeroed memory.
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Ring {
        let n = u64::from(size);
        let avail = base + 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(4);
        let layout = QueueLayout { size, desc: base, avail, used, event_idx: false, indirect: true };
        Ring { memory: memory.clone(), layout, next_desc: 0, avail: 0, seen: 0 }
    }

    fn put(&self, at: u64, value: u16) {
        self.memory.write_slice(&value.to_le_bytes(), GuestAddress(at)).expect("ring in RAM");
    }
    fn get(&self, at: u64) -> u16 {
        let mut b = [0; 2];
        self.memory.read_slice(&mut b, GuestAddress(at)).expect("ring in RAM");
        u16::from_le_bytes(b)
    }

    /// Write a descriptor at `table`.
    pub fn write_desc(&self, table: u64, index: u16, (addr, len, write): Buffer, flags: u16, next: u16) {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&(flags | if write { 2 } else { 0 }).to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&raw, GuestAddress(table + 16 * u64::from(index))).expect("table in RAM");
    }

    fn write_chain(&self, table: u64, first: u16, wrap: u16, buffers: &[Buffer]) {
        for (i, &b) in buffers.iter().enumerate() {
            let at = (first + i as u16) % wrap;
            let last = i + 1 == buffers.len();
            self.write_desc(table, at, b, u16::from(!last), if last { 0 } else { (at + 1) % wrap });
        }
    }

    /// Make a chain of these buffers available; gives its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        self.write_chain(self.layout.desc, head, self.layout.size, buffers);
        self.next_desc = (head + buffers.len() as u16) % self.layout.size;
        self.offer(head);
        head
    }

    /// Make a chain available that lies in an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        self.write_chain(table, 0, u16::MAX, buffers);
        let head = self.next_desc;
        self.write_desc(self.layout.desc, head, (table, 16 * buffers.len() as u32, false), 4, 0);
        self.next_desc = (head + 1) % self.layout.size;
        self.offer(head);
        head
    }

    /// Put a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.layout.size);
        self.put(self.layout.avail + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    /// Write the available index, whatever it is.
    pub fn set_avail_index(&self, index: u16) {
        self.put(self.layout.avail + 2, index);
    }

    /// Write the available ring's flags (1: no interrupts).
    pub fn set_avail_flags(&self, flags: u16) {
        self.put(self.layout.avail, flags);
    }

    /// Ask for an interrupt when the entry `index` is used.
    pub fn set_used_event(&self, index: u16) {
        self.put(self.layout.avail + 4 + 2 * u64::from(self.layout.size), index);
    }

    /// The entry for which the device wants a notification.
    pub fn avail_event(&self) -> u16 {
        self.get(self.layout.used + 4 + 8 * u64::from(self.layout.size))
    }

    /// The used ring's flags (1: no notifications).
    pub fn used_flags(&self) -> u16 {
        self.get(self.layout.used)
    }

    /// The used ring's index.
    pub fn used_index(&self) -> u16 {
        self.get(self.layout.used + 2)
    }

    /// The next used entry: head and bytes written.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let at = self.layout.used + 4 + 8 * u64::from(self.seen % self.layout.size);
        self.seen = self.seen.wrapping_add(1);
        let word = |a: u64| u32::from(self.get(a)) | u32::from(self.get(a + 2)) << 16;
        Some((word(at), word(at + 4)))
    }

    /// Start both sides at another index.
    pub fn start_at(&mut self, index: u16) -> QueueProgress {
        (self.avail, self.seen) = (index, index);
        self.set_avail_index(index);
        self.put(self.layout.used + 2, index);
        QueueProgress { next_avail: index, next_used: index, signalled: None }
    }

    /// The device's side of this ring, outside any transport.
    ///
    /// # Errors
    /// As [`Queue::new`].
    pub fn device(&self, progress: QueueProgress) -> Result<(Queue, Arc<Recorder>), crate::QueueError> {
        let recorder = Arc::new(Recorder::default());
        let ram = Arc::new(RamMap::new(&self.memory));
        let queue = Queue::new(&ram, &self.layout, progress, 0, Arc::new(Gate::default()), recorder.clone())?;
        Ok((queue, recorder))
    }
}

/// A device with its driver: rings at the start of memory, the rest free for buffers.
pub struct Rig {
    /// The device behind its transport-neutral registers.
    pub core: Core,
    /// The driver's side of each queue.
    pub rings: Vec<Ring>,
    /// Interrupts.
    pub interrupts: Arc<Recorder>,
    /// The guest's memory.
    pub memory: GuestMemory,
}

/// Where a rig's buffers may begin.
pub const BUFFERS: u64 = 0x10_0000;
/// Bytes of a rig's memory.
pub const MEMORY: u64 = 0x80_0000;

impl Rig {
    /// A device behind its registers, not yet set up.
    ///
    /// # Panics
    /// When the host has no memory or descriptors left.
    pub fn idle(device: Arc<dyn VirtioDevice>) -> Rig {
        let memory = ringfort_memory::allocate(&[(0, MEMORY)]).expect("memory");
        Rig::over(device, memory)
    }

    /// As [`idle`](Self::idle), on memory that is there already.
    ///
    /// # Panics
    /// When the host has no descriptors left.
    pub fn over(device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Rig {
        let interrupts = Arc::new(Recorder::default());
        let sizes = device.queue_sizes();
        let ram = Arc::new(RamMap::new(&memory));
        let core = Core::new(device, ram, interrupts.clone()).expect("event descriptors");
        let rings = (0..).zip(&sizes).map(|(i, &n)| Ring::new(&memory, 0x4000 * (i + 1), n)).collect();
        Rig { core, rings, interrupts, memory }
    }

    /// A device that a driver has set up with these features and [`feature::COMMON`] (without event indexes unless
    /// asked for).
    ///
    /// # Panics
    /// When the device refuses them.
    pub fn new(device: Arc<dyn VirtioDevice>, features: u64) -> Rig {
        let mut rig = Rig::idle(device);
        rig.set_up(features | feature::VERSION_1 | feature::INDIRECT_DESC);
        rig
    }

    /// What a driver does (virtio 1.3 section 3.1.1).
    ///
    /// # Panics
    /// When the device refuses the features.
    pub fn set_up(&mut self, features: u64) {
        let c = &self.core;
        c.write_status(status::ACKNOWLEDGE);
        c.write_status(status::ACKNOWLEDGE | status::DRIVER);
        for half in 0..2 {
            c.set_driver_select(half);
            c.set_driver_features((features >> (32 * half)) as u32);
        }
        c.write_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert!(c.status() & status::FEATURES_OK != 0, "features refused");
        for (i, ring) in (0u16..).zip(&mut self.rings) {
            ring.layout.event_idx = features & feature::EVENT_IDX != 0;
            c.set_queue_select(i);
            c.set_queue_size(ring.layout.size);
            c.set_queue_area(RingArea::Desc, ring.layout.desc, u64::MAX);
            c.set_queue_area(RingArea::Avail, ring.layout.avail, u64::MAX);
            c.set_queue_area(RingArea::Used, ring.layout.used, u64::MAX);
            c.set_queue_enabled();
        }
        c.write_status(c.status() | status::DRIVER_OK);
    }

    /// Write guest memory.
    ///
    /// # Panics
    /// Outside RAM.
    pub fn write(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).expect("in RAM");
    }

    /// Read guest memory.
    ///
    /// # Panics
    /// Outside RAM.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).expect("in RAM");
        data
    }

    /// Make a chain available and ring.
    pub fn send(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let head = self.rings[usize::from(queue)].add(buffers);
        self.core.notify(queue);
        head
    }

    /// The next used entry of a queue; waits for it.
    ///
    /// # Panics
    /// When none comes.
    pub fn used(&mut self, queue: u16) -> (u32, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.interrupts.count(Some(queue));
            if let Some(u) = self.rings[usize::from(queue)].take_used() {
                return u;
            }
            assert!(Instant::now() < deadline, "nothing used");
            self.interrupts.wait(Some(queue), before + 1);
        }
    }
}

/// Run a queue over memory and ring addresses that `data` gives, as a device would: look at every chain, read and
/// write all of its buffers, give it back. For fuzzing: must neither crash nor touch anything but guest RAM.
pub fn fuzz_queue(data: &[u8]) {
    const RAM: u64 = 0x1_0000;
    let Some((head, content)) = data.split_at_checked(16) else { return };
    let Ok(memory) = ringfort_memory::allocate(&[(0, RAM), (RAM * 2, RAM)]) else { return };
    let half = |i: usize| u16::from_le_bytes([head[i], head[i + 1]]);
    let _ = memory.write(content, GuestAddress(0));
    let layout = QueueLayout {
        size: half(0),
        desc: u64::from(half(2)) << 2,
        avail: u64::from(half(4)) << 2,
        used: u64::from(half(6)) << 2,
        event_idx: head[8] & 1 != 0,
        indirect: head[8] & 2 != 0,
    };
    let progress = QueueProgress {
        next_avail: half(10),
        next_used: half(12),
        signalled: (head[8] & 4 != 0).then(|| half(14)),
    };
    let ring = Ring { memory, layout, next_desc: 0, avail: 0, seen: 0 };
    let Ok((mut queue, _)) = ring.device(progress) else { return };
    let mut buffer = [0; 512];
    // The device's own writes may land in the rings and make ever more work.
    for _ in 0..256 {
        queue.disable_notifications();
        match queue.pop() {
            Ok(Some(chain)) => {
                let mut at = 0;
                while at < chain.readable().min(1 << 20) {
                    at += chain.read(at, &mut buffer).max(1) as u64;
                }
                let written = chain.write(0, &buffer);
                let end = chain.writable();
                chain.write(end.saturating_sub(1), &[0xff]);
                for (address, len) in chain.writable_ranges() {
                    assert!(address.checked_add(len).is_some_and(|e| e <= RAM * 3));
                }
                queue.complete(chain, written as u32);
            }
            Ok(None) => {
                if !queue.enable_notifications() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// A disk in memory.
pub struct RamDisk {
    data: Mutex<Vec<u8>>,
}

impl RamDisk {
    /// `size` bytes of zeroes.
    pub fn new(size: usize) -> RamDisk {
        RamDisk { data: Mutex::new(vec![0; size]) }
    }
}

impl BlockBackend for RamDisk {
    fn size(&self) -> u64 {
        lock(&self.data).len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits { block_size: 512, physical_block_size: 4096, discard_granularity: 4096, discard: true }
    }
    fn read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<()> {
        check_range(self.size(), offset, total_mut(bufs))?;
        scatter(bufs, &lock(&self.data)[offset as usize..]);
        Ok(())
    }
    fn try_read_at(&self, bufs: &[SharedSliceMut<'_>], offset: u64) -> io::Result<bool> {
        self.read_at(bufs, offset).map(|()| true)
    }
    fn writes_are_cached(&self) -> bool {
        true
    }
    fn write_at(&self, bufs: &[SharedSlice<'_>], offset: u64) -> io::Result<()> {
        check_range(self.size(), offset, total(bufs))?;
        gather(bufs, &mut lock(&self.data)[offset as usize..]);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        check_range(self.size(), offset, len)?;
        lock(&self.data)[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}
