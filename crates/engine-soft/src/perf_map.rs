//! A perf map: tells Linux perf (`perf report`) which guest code a piece of translated code is (tools/perf/Documentation/jit-interface.txt in
//! the kernel's sources). One file per process, `/tmp/perf-PID.map`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::{Mutex, OnceLock, PoisonError};

static MAP: OnceLock<Mutex<BufWriter<File>>> = OnceLock::new();

/// Write the map from now on.
///
/// # Errors
/// When the file cannot be made.
pub fn enable() -> io::Result<()> {
    let path = format!("/tmp/perf-{}.map", std::process::id());
    // Of an earlier process with this number; never through somebody's link.
    let _ = std::fs::remove_file(&path);
    let file = File::create_new(path)?;
    // A second call changes nothing.
    let _ = MAP.set(Mutex::new(BufWriter::new(file)));
    Ok(())
}

/// Note that `size` bytes of code from `address` on are what `name` gives.
pub(crate) fn note(address: usize, size: usize, name: impl FnOnce() -> String) {
    if let Some(map) = MAP.get() {
        let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
        // A map that cannot be written loses symbols, nothing else.
        let _ = writeln!(map, "{address:x} {size:x} {}", name()).and_then(|()| map.flush());
    }
}
