//! Entropy device (virtio 1.3 section 5.4).

#[cfg(test)]
mod tests;

use crate::{Queue, QueueError, Quick, Served, VirtioDevice};

/// Most bytes given for one request. The driver asks again for more; the bound keeps a huge buffer from holding
/// the thread.
const MOST: usize = 4096;

/// Fills buffers with random bytes from the host's kernel.
#[derive(Debug, Default)]
pub struct Rng {
    _private: (),
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Rng {
        Rng::default()
    }
}

/// Fill `out` from the kernel's generator (getrandom(2)), which never runs dry; gives how many bytes came.
fn random(out: &mut [u8]) -> usize {
    let mut done = 0;
    while done < out.len() {
        let rest = &mut out[done..];
        // SAFETY: the slice is valid for writing its whole length.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) if n > 0 => done += n,
            _ if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    done
}

impl VirtioDevice for Rng {
    fn kind(&self) -> &'static str {
        "virtio-rng"
    }

    fn device_type(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn service(&self, queue: &mut Queue) -> Result<Served, QueueError> {
        let mut bytes = [0; MOST];
        while let Some(chain) = queue.pop()? {
            let want = chain.writable().min(MOST as u64) as usize;
            let n = random(&mut bytes[..want]);
            let written = chain.write(0, &bytes[..n]);
            queue.complete(chain, written as u32);
        }
        Ok(Served::Drained)
    }

    fn has_quick(&self) -> bool {
        true
    }

    /// The kernel's generator does not wait, and requests are bounded.
    fn quick(&self, queue: &mut Queue) -> Result<Quick, QueueError> {
        self.service(queue).map(|_| Quick::Done)
    }
}
