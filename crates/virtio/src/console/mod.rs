//! Console device with one port (virtio 1.3 section 5.3).

#[cfg(test)]
mod tests;

use crate::{Queue, QueueError, Quick, Served, Signals, VirtioDevice};
use ringfort_bus::lock;
use ringfort_devices::serial::SerialSink;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock};

const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;

const RX: u16 = 0;
const TX: u16 = 1;

/// Offsets in configuration space.
const COLS_AT: u64 = 0;
const EMERG_AT: u64 = 8;

/// Bytes of input kept while the driver gives no buffers.
const INPUT_ROOM: usize = 4096;
/// Bytes handed to the back end at a time.
const PIECE: usize = 4096;

#[derive(Default, Clone, Serialize, Deserialize)]
struct State {
    cols: u16,
    rows: u16,
    input: VecDeque<u8>,
    /// Bytes of the next output buffer that the sink took already.
    sent: u64,
}

/// A console.
pub struct Console {
    sink: Mutex<Box<dyn SerialSink>>,
    on_room: Box<dyn Fn() + Send + Sync>,
    state: Mutex<State>,
    signals: OnceLock<Arc<Signals>>,
}

impl Console {
    /// A console whose output goes to `sink`, on a vCPU or the console's I/O thread; when the sink takes less than it was given,
    /// call [`transmit_ready`](Self::transmit_ready) once it has room again. `on_room` is called (on the I/O thread) when input can be taken again
    /// after [`input`](Self::input) took less than it was given.
    pub fn new(sink: Box<dyn SerialSink>, on_room: Box<dyn Fn() + Send + Sync>) -> Console {
        Console {
            sink: Mutex::new(sink),
            on_room,
            state: Mutex::new(State { cols: 80, rows: 25, input: VecDeque::new(), sent: 0 }),
            signals: OnceLock::new(),
        }
    }

    /// Bytes from the host for the guest; gives how many were taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut s = lock(&self.state);
            let n = bytes.len().min(INPUT_ROOM - s.input.len().min(INPUT_ROOM));
            s.input.extend(&bytes[..n]);
            n
        };
        if taken > 0
            && let Some(s) = self.signals.get()
        {
            s.kick(RX);
        }
        taken
    }

    /// How many bytes [`input`](Self::input) would take.
    pub fn room(&self) -> usize {
        INPUT_ROOM.saturating_sub(lock(&self.state).input.len())
    }

    /// The sink has room again.
    pub fn transmit_ready(&self) {
        if let Some(s) = self.signals.get() {
            s.kick(TX);
        }
    }

    /// The terminal has another size; tells the driver.
    pub fn resize(&self, cols: u16, rows: u16) {
        {
            let mut s = lock(&self.state);
            if (s.cols, s.rows) == (cols, rows) {
                return;
            }
            (s.cols, s.rows) = (cols, rows);
        }
        if let Some(s) = self.signals.get() {
            s.config_changed();
        }
    }

    fn receive(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        loop {
            let mut s = lock(&self.state);
            if s.input.is_empty() {
                return Ok(Served::Waiting);
            }
            let Some(chain) = queue.pop()? else { return Ok(Served::Drained) };
            let was_full = s.input.len() >= INPUT_ROOM;
            let n = (chain.writable().min(s.input.len() as u64)) as usize;
            let (a, b) = s.input.as_slices();
            let first = a.len().min(n);
            chain.write(0, &a[..first]);
            chain.write(first as u64, &b[..n - first]);
            s.input.drain(..n);
            drop(s);
            queue.complete(chain, n as u32);
            if was_full && n > 0 {
                (self.on_room)();
            }
        }
    }

    /// Send what the driver gives, chains longer than `longest` excepted.
    fn transmit(&self, queue: &mut Queue, longest: u64) -> Result<Served, QueueError> {
        let mut piece = [0; PIECE];
        while let Some(chain) = queue.pop()? {
            let end = chain.readable();
            let mut at = std::mem::take(&mut lock(&self.state).sent).min(end);
            let mut stuck = end > longest;
            while at < end && !stuck {
                let n = chain.read(at, &mut piece);
                let taken = lock(&self.sink).write(&piece[..n]).min(n);
                at += taken as u64;
                // A long chain must not hold up a pause either.
                stuck = taken < n || !queue.is_open();
            }
            if at < end {
                // The chain stays the driver's next one, so that saved state needs no more than the position.
                lock(&self.state).sent = at;
                queue.undo_pop(chain);
                return Ok(Served::Waiting);
            }
            queue.complete(chain, 0);
        }
        Ok(Served::Drained)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> &'static str {
        "virtio-console"
    }

    fn device_type(&self) -> u16 {
        3
    }

    fn pci_class(&self) -> u32 {
        0x07_80_00
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (cols, rows) = {
            let s = lock(&self.state);
            (s.cols, s.rows)
        };
        // Columns, rows, number of ports (one), emergency write.
        let mut image = [0; 12];
        image[COLS_AT as usize..2].copy_from_slice(&cols.to_le_bytes());
        image[2..4].copy_from_slice(&rows.to_le_bytes());
        image[4] = 1;
        for (at, b) in (offset..image.len() as u64).zip(data) {
            *b = image[at as usize];
        }
    }

    /// Emergency write: a character without any queue (section 5.3.4).
    fn write_config(&self, offset: u64, data: &[u8]) {
        if offset == EMERG_AT
            && let Some(first) = data.first()
        {
            // A sink without room loses it: there is nothing to wait for.
            lock(&self.sink).write(&[*first]);
        }
    }

    fn has_quick(&self) -> bool {
        true
    }

    /// Linux's driver spins until output is taken (drivers/char/virtio_console.c, `__send_to_port`).
    fn by_thread(&self) -> bool {
        false
    }

    /// A sink does not wait, so short output goes at once.
    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        if queue.index() != TX {
            return Ok(Quick::Later);
        }
        Ok(match self.transmit(queue, PIECE as u64)? {
            Served::Drained => Quick::Done,
            Served::Waiting => Quick::Later,
        })
    }

    fn reset(&self) {
        lock(&self.state).sent = 0;
    }

    fn attach(&self, signals: Arc<Signals>) {
        let _ = self.signals.set(signals);
    }

    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        match queue.index() {
            RX => self.receive(queue),
            TX => self.transmit(queue, u64::MAX),
            _ => Ok(Served::Waiting),
        }
    }

    fn save(&self) -> Vec<u8> {
        crate::transport::encode(&*lock(&self.state))
    }

    fn load(&self, state: &[u8]) -> Result<(), String> {
        let saved: State = crate::transport::decode(state)?;
        if saved.input.len() > INPUT_ROOM {
            return Err("more input than the console keeps".into());
        }
        *lock(&self.state) = saved;
        Ok(())
    }
}
