//! `bench`: the speed of the block layer alone, by equal requests at a depth.

use crate::args::{Cache, parse};
use crate::open::{self, How};
use crate::{Done, Failure, Streams};
use ringfort_block::BlockBackend;
use ringfort_block::aio::{Aio, Lane, Memory, Op, Request};
use std::sync::Arc;
use std::time::Instant;

/// Largest request.
const MAX_BUFFER: u64 = 1 << 30;
/// Most requests at once.
const MAX_DEPTH: u64 = 65536;

struct Plan {
    write: bool,
    count: u64,
    depth: u64,
    size: u64,
    offset: u64,
    step: u64,
    flush_every: u64,
    drain: bool,
    through: bool,
}

/// Run the verb.
pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let flags = ["n", "q", "w", "U", "no-drain", "image-opts", "native"];
    let valued = ["c", "d", "f", "i", "o", "s", "S", "t", "flush-interval", "pattern"];
    let p = parse(arguments, &flags, &valued)?;
    let number = |name: &str, usual: u64, max: u64, what: &str| match p.value(name) {
        None => Ok(usual),
        Some(v) => {
            let n = crate::size::parse(v).ok().filter(|n| *n <= max);
            n.ok_or_else(|| Failure::new(format!("Invalid {what} specified: {v}; give a number up to {max}")))
        }
    };
    let write = p.has("w");
    let size = number("s", 4096, MAX_BUFFER, "buffer size")?;
    let mut plan = Plan {
        write,
        count: number("c", 75_000, 1 << 40, "request count")?,
        depth: number("d", 64, MAX_DEPTH, "queue depth")?,
        size,
        offset: number("o", 0, i64::MAX as u64, "offset")?,
        step: number("S", size, 1 << 40, "step size")?,
        flush_every: number("flush-interval", 0, 1 << 40, "flush interval")?,
        drain: !p.has("no-drain"),
        through: false,
    };
    let pattern = number("pattern", 0, 255, "pattern byte")? as u8;
    if plan.depth == 0 || size == 0 {
        return Err(Failure::new("Invalid queue depth or buffer size specified: 0"));
    }
    if !write && plan.flush_every > 0 {
        return Err(Failure::new("--flush-interval is only available in write tests"));
    }
    if plan.flush_every > 0 && plan.flush_every < plan.depth {
        return Err(Failure::new("Flush interval can't be smaller than depth"));
    }
    let cache = p.cache("t", Cache::WRITEBACK)?;
    plan.through = matches!(p.value("t"), Some("writethrough" | "directsync"));
    // "native" is Linux's older asynchronous I/O; what it is asked for is the best that there is.
    let aio = match p.value("i") {
        None | Some("native") => Aio::best(),
        Some(name) => name.parse().map_err(Failure::new)?,
    };
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let how = How { format: format.as_deref(), read_only: !write, cache };
    let (disk, _) = open::image(&path, &how, &p)?;
    if disk.size() < size {
        return Err(Failure::new(format!("the image has {} bytes, fewer than a request", disk.size())));
    }
    if !p.has("q") {
        writeln!(
            s.out,
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
            plan.count,
            if write { "write" } else { "read" },
            size,
            plan.depth,
            plan.offset,
            plan.step
        )?;
        if plan.flush_every > 0 {
            writeln!(s.out, "Sending flush every {} requests", plan.flush_every)?;
        }
    }
    let seconds = measure(&disk, aio, &plan, pattern, !cache.syncs)?;
    if !p.has("q") {
        writeln!(s.out, "Run completed in {seconds:.3} seconds.")?;
    }
    Ok(0)
}

/// Do the plan; gives the seconds that it took.
fn measure(
    disk: &Arc<dyn BlockBackend>,
    aio: Aio,
    plan: &Plan,
    pattern: u8,
    no_flush: bool,
) -> Result<f64, Failure> {
    let mut lane: Lane<Memory> = Lane::of_its_own(disk.clone(), aio)?;
    let mut spare = Vec::new();
    for _ in 0..plan.depth.min(plan.count) {
        let mut memory = Memory::new(plan.size as usize)?;
        memory.bytes().fill(pattern);
        spare.push(memory);
    }
    let (mut sent, mut finished, mut flushes) = (0, 0, 0);
    let mut at = plan.offset % disk.size();
    let begin = Instant::now();
    while finished < plan.count || !lane.is_empty() {
        // With drained flushes nothing is sent between the request that makes one due and its end.
        let due = plan.flush_every > 0 && !no_flush && sent / plan.flush_every > flushes;
        if due && (!plan.drain || lane.is_empty()) {
            lane.start(Request::other(Op::Flush), Memory::new(0)?);
            flushes += 1;
            if plan.drain {
                lane.drain(|_| ());
                continue;
            }
        }
        while sent < plan.count && !(due && plan.drain) {
            let Some(memory) = spare.pop() else { break };
            if at + plan.size > disk.size() {
                at = 0;
            }
            let op = if plan.write { Op::Write { through: plan.through } } else { Op::Read };
            lane.start(Request { op, offset: at, len: plan.size }, memory);
            at = (at + plan.step) % disk.size();
            sent += 1;
            if plan.flush_every > 0 && sent % plan.flush_every == 0 {
                break;
            }
        }
        lane.submit();
        lane.wait();
        while let Some(done) = lane.poll() {
            done.result.map_err(|e| Failure::new(format!("Failed request: {e}")))?;
            if done.request.op != Op::Flush {
                finished += 1;
                spare.push(done.payload);
            }
        }
    }
    Ok(begin.elapsed().as_secs_f64())
}
