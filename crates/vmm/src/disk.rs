//! From a disk's options to its device: image, throw-away layer, cache, limits of speed.

use crate::config::{Discard, Disk, DiskFormat};
use crate::saved::OpenDisk;
use ringfort_block::aio::{Aio, io_uring_available};
use ringfort_block::format::detect;
use ringfort_block::node::{CacheMode, Throttle, Throttled, Tuned};
use ringfort_block::storage::{FileStorage, StorageOptions};
use ringfort_block::{BlockBackend, Format, ImageOptions, Overlay, open_storage_image};
use ringfort_virtio::blk::{Action, Blk, BlkOptions, OnError};
use std::io::ErrorKind;
use std::sync::Arc;

/// Most queues that a disk gets by itself.
const DEFAULT_QUEUES: u32 = 4;

/// A request that failed on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskTrouble {
    /// Which disk, in the order of the configuration.
    pub number: usize,
    /// Its file.
    pub disk: String,
    /// It was to change the disk or to make changes durable.
    pub write: bool,
    /// The host's words.
    pub error: String,
    /// There is no space: it may go on by itself later.
    pub full: bool,
    /// What becomes of the request.
    pub action: Action,
}

/// Who hears of it.
pub type OnTrouble = Arc<dyn Fn(DiskTrouble) + Send + Sync>;

/// Open `disk`, the one with this `number`, for a machine with `cpus` vCPUs. `say` gets a line about what was chosen.
///
/// # Errors
/// One line: which file, what is wrong, what to do.
pub fn open(
    number: usize,
    disk: &Disk,
    cpus: u32,
    trouble: &OnTrouble,
    say: &mut dyn FnMut(&str),
) -> Result<(Arc<Blk>, OpenDisk), String> {
    let options = ImageOptions {
        format: disk.format.map(|f| match f {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
        }),
        read_only: disk.readonly || disk.snapshot,
        direct: disk.cache.is_direct(),
        ..ImageOptions::default()
    };
    let text = |e: ringfort_block::BlockError| e.to_string();
    let storage = FileStorage::open(
        &disk.path,
        StorageOptions { read_only: options.read_only, direct: options.direct, lock: options.lock },
    )
    .map_err(text)?;
    let format = options.format.map_or_else(|| detect(&storage).map_err(text), Ok)?;
    if options.format.is_none() && !options.read_only && format == Format::Raw {
        say(&format!(
            "disk {}: no format given, taken as raw; the guest may not write what would make it look like another \
             format (format=raw allows that)",
            disk.path.display()
        ));
    }
    let mut backend: Arc<dyn BlockBackend> = open_storage_image(storage, &options).map_err(text)?;
    let mut overlay = None;
    if disk.snapshot {
        let layer = Arc::new(Overlay::new(backend, &Overlay::default_dir()).map_err(text)?);
        overlay = Some(layer.clone());
        backend = layer;
    }
    let open = OpenDisk { backend: backend.clone(), overlay, format };
    let mut tuned = Tuned::new(backend.clone());
    tuned.no_flush = disk.cache == CacheMode::Unsafe;
    // A throw-away layer gives space back in any case: nobody counts on what it has.
    tuned.no_unmap = disk.discard == Discard::Ignore && !disk.snapshot;
    if tuned.no_flush || tuned.no_unmap {
        backend = Arc::new(tuned);
    }
    if disk.throttle.is_limited() {
        backend = Arc::new(Throttled::new(backend, Arc::new(Throttle::new(&disk.throttle))));
    }
    if disk.aio == Some(Aio::IoUring) && !io_uring_available() {
        say(&format!("disk {}: this host gives no io_uring; threads are used", disk.path.display()));
    }
    let options = BlkOptions {
        queues: disk.queues.unwrap_or(cpus.min(DEFAULT_QUEUES) as u16),
        serial: disk.serial.clone().unwrap_or_default(),
        aio: disk.aio.unwrap_or_else(Aio::best),
        write_through: disk.cache.is_write_through(),
        rerror: disk.rerror.unwrap_or(OnError::Report),
        werror: disk.werror.unwrap_or(OnError::Enospc),
        ..BlkOptions::default()
    };
    let blk = Arc::new(Blk::new(backend, &options)?);
    let (name, trouble) = (disk.path.display().to_string(), trouble.clone());
    blk.on_host_error(Box::new(move |e| {
        trouble(DiskTrouble {
            number,
            disk: name.clone(),
            write: e.write,
            error: e.error.to_string(),
            full: matches!(e.error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded),
            action: e.action,
        });
    }));
    Ok((blk, open))
}
