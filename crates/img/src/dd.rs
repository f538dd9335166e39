//! `dd`: copy blocks of a disk into a new image.

use crate::args::{Cache, parse};
use crate::convert::threads;
use crate::new::New;
use crate::{Done, Failure, Streams, open, size};
use open::How;
use ringfort_block::BlockBackend;
use ringfort_block::job::{self, CopyOptions, Job, Target};
use ringfort_block::node::Window;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    let p = parse(arguments, &["U", "image-opts"], &["f", "O", "object"])?;
    let format = open::new_format(p.value("O"))?;
    let (mut from, mut to, mut block, mut count, mut skip) = (None, None, 512, None, 0);
    for operand in &p.rest {
        let (key, value) =
            operand.split_once('=').ok_or_else(|| Failure::new(format!("unrecognized operand {operand}")))?;
        let number = || size::parse(value).map_err(|_| Failure::new(format!("invalid number: '{value}'")));
        match key {
            "if" => from = Some(value),
            "of" => to = Some(value),
            "bs" => {
                block = number()?;
                if block == 0 || block > i32::MAX as u64 {
                    return Err(Failure::new(format!("invalid number: '{value}'")));
                }
            }
            "count" => count = Some(number()?),
            "skip" => skip = number()?,
            _ => return Err(Failure::new(format!("unrecognized operand {operand}"))),
        }
    }
    let (Some(from), Some(to)) = (from, to) else {
        return Err(Failure::new("Must specify both input and output file paths"));
    };
    let (from, name) = open::name(from, p.value("f"), &p, "image-opts")?;
    let (disk, _) = open::image(&from, &How::reading(name.as_deref()), &p)?;
    // As qemu-img counts: `count` blocks from the beginning of the input, of which `skip` are left out.
    let end = count.map_or(u64::MAX, |c| c.saturating_mul(block)).min(disk.size());
    let start = skip.saturating_mul(block);
    if start > end {
        writeln!(s.err, "ringfort img: {from}: cannot skip to specified offset")?;
    }
    let len = end.saturating_sub(start);
    let source = Window::new(disk, start, len);
    let new = New::from_options(format, &[])?;
    let (made, target) = new.lay_out(to, len.next_multiple_of(512), Cache::WRITEBACK, false)?;
    let options =
        CopyOptions { sparse: 4096, blank: true, backed: None, salvage: None, threads: threads(None)? };
    let job = Job::new(source.size(), None, None);
    job::copy(&source, Target::Plain(target.disk()), &options, &job)
        .map_err(|e| Failure::new(format!("error while reading from {from}: {e}")))?;
    target.close()?;
    made.publish()?;
    Ok(0)
}
