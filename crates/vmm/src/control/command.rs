//! The commands, and how they are written (QEMU qapi/block-core.json, qapi/run-state.json, qapi/machine.json).

use super::{Answer, Refusal, version};
use crate::chardev::Command as Order;
use crate::config::Disk;
use crate::halt::Halt;
use crate::machine::Machine;
use crate::saved::OpenDisk;
use ringfort_block::node::{Bucket, CacheMode};
use serde_json::{Value, json};

/// What the machine is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `query-commands`.
    Commands,
    /// `query-version`.
    Version,
    /// `query-name`.
    Name,
    /// `query-status`: whether it runs.
    Status,
    /// `query-block`: its disks.
    Disks,
    /// `block_resize`: give a disk another size, and tell the guest.
    ResizeDisk {
        /// Number of the disk, in the order of the command line.
        disk: usize,
        /// Bytes.
        size: u64,
    },
    /// `stop`: pause the machine.
    Stop,
    /// `cont`: let it go on, also after a disk's trouble.
    Continue,
    /// What the terminal's escape key can order as well: `system_powerdown`, `system_reset`, `quit`.
    Order(Order),
}

/// What the main loop is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Stop,
    Continue,
    Order(Order),
}

/// The names of all commands.
const NAMES: [&str; 12] = [
    "qmp_capabilities",
    "query-commands",
    "query-version",
    "query-name",
    "query-status",
    "query-block",
    "block_resize",
    "stop",
    "cont",
    "system_powerdown",
    "system_reset",
    "quit",
];

/// What disks are called.
const DISK: &str = "virtio";

/// The name of disk `number`.
pub(super) fn device(number: usize) -> String {
    format!("{DISK}{number}")
}

impl Command {
    /// Understand what a client sent. `None` when the client only `negotiated`.
    ///
    /// # Errors
    /// What the client is told.
    pub fn read(value: &Value, negotiated: &mut bool) -> Result<Option<Command>, Refusal> {
        let name = value
            .get("execute")
            .and_then(Value::as_str)
            .ok_or_else(|| Refusal::new("a command is an object with 'execute' and a command's name"))?;
        let none = json!({});
        let arguments = value.get("arguments").unwrap_or(&none);
        let given = arguments.as_object().ok_or_else(|| Refusal::new("'arguments' is to be an object"))?;
        let unknown = |what: String| Err(Refusal::class("CommandNotFound", what));
        if !*negotiated && name != "qmp_capabilities" {
            return unknown(format!("'{name}': say qmp_capabilities first"));
        }
        let known: &[&str] = match name {
            "block_resize" => &["device", "node-name", "size"],
            "qmp_capabilities" => &["enable"],
            _ => &[],
        };
        if let Some(other) = given.keys().find(|k| !known.contains(&k.as_str())) {
            return Err(Refusal::new(format!("{name} takes no '{other}'")));
        }
        Ok(Some(match name {
            "qmp_capabilities" => {
                *negotiated = true;
                return Ok(None);
            }
            "query-commands" => Command::Commands,
            "query-version" => Command::Version,
            "query-name" => Command::Name,
            "query-status" => Command::Status,
            "query-block" => Command::Disks,
            "block_resize" => {
                let device =
                    given
                        .get("device")
                        .or_else(|| given.get("node-name"))
                        .and_then(Value::as_str)
                        .ok_or_else(|| Refusal::new("block_resize needs 'device', for instance virtio0"))?;
                let disk = device.strip_prefix(DISK).and_then(|n| n.parse().ok()).ok_or_else(|| {
                    Refusal::class("DeviceNotFound", format!("no device {device:?}; query-block lists them"))
                })?;
                let size = given
                    .get("size")
                    .and_then(Value::as_u64)
                    .ok_or_else(|| Refusal::new("block_resize needs 'size', a number of bytes"))?;
                Command::ResizeDisk { disk, size }
            }
            "stop" => Command::Stop,
            "cont" => Command::Continue,
            "system_powerdown" => Command::Order(Order::PowerButton),
            "system_reset" => Command::Order(Order::Reset),
            "quit" => Command::Order(Order::Quit),
            other => return unknown(format!("no command {other}; query-commands lists them")),
        }))
    }

    /// Do it, if it needs the machine alone.
    ///
    /// # Errors
    /// What is the main loop's to do.
    pub(crate) fn run(&self, machine: &Machine, halt: &Halt, debugged: bool) -> Result<Answer, Wanted> {
        Ok(Ok(match self {
            Command::Commands => NAMES.iter().map(|n| json!({ "name": n })).collect(),
            Command::Version => version(),
            Command::Name => json!({ "name": machine.config.name }),
            Command::Status => {
                let status = halt.status().or(debugged.then_some("debug")).unwrap_or("running");
                json!({ "running": status == "running", "status": status })
            }
            Command::Disks => {
                let disks = machine.config.disks.iter().zip(&machine.disks);
                disks.enumerate().map(|(n, (disk, open))| describe(n, disk, open, halt)).collect()
            }
            Command::ResizeDisk { disk, size } => {
                return Ok(match machine.resize_disk(*disk, *size) {
                    Ok(()) => Ok(json!({})),
                    Err(crate::VmmError::Disk(what)) => Err(Refusal::new(what)),
                    Err(e) => Err(Refusal::new(e.to_string())),
                });
            }
            Command::Stop | Command::Continue if debugged => {
                return Ok(Err(Refusal::new("gdb holds the guest: let it go on from there")));
            }
            Command::Stop => return Err(Wanted::Stop),
            Command::Continue => return Err(Wanted::Continue),
            Command::Order(order) => return Err(Wanted::Order(*order)),
        }))
    }
}

/// A disk as `query-block` tells of it.
fn describe(n: usize, disk: &Disk, open: &OpenDisk, halt: &Halt) -> Value {
    let path = disk.path.display().to_string();
    let (format, size) = (open.format.name(), open.backend.size());
    let rate = |b: &Bucket| b.avg;
    let t = &disk.throttle;
    let full = halt.trouble_of(n);
    json!({
        "device": device(n),
        "type": "unknown",
        "removable": false,
        "locked": false,
        "io-status": match full { None => "ok", Some(true) => "nospace", Some(false) => "failed" },
        "inserted": {
            "file": path,
            "ro": disk.readonly,
            "drv": format,
            "image": { "filename": path, "format": format, "virtual-size": size },
            "cache": {
                "writeback": !disk.cache.is_write_through(),
                "direct": disk.cache.is_direct(),
                "no-flush": disk.cache == CacheMode::Unsafe,
            },
            "bps": rate(&t.bps), "bps_rd": rate(&t.bps_rd), "bps_wr": rate(&t.bps_wr),
            "iops": rate(&t.iops), "iops_rd": rate(&t.iops_rd), "iops_wr": rate(&t.iops_wr),
        },
    })
}
