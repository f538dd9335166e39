//! `resize`.

use crate::args::parse;
use crate::new::{self, Opened};
use crate::{Done, Failure, Streams, open, size};
use ringfort_block::format::qcow2::Preallocation;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    // A size of -1G is no option: it stands last.
    let Some((last, rest)) = arguments.split_last() else {
        return Err(Failure::new("Expecting image file name and size"));
    };
    let p = parse(rest, &["q", "shrink", "image-opts"], &["f", "preallocation", "object"])?;
    let (path, format) = open::name(p.one_file()?, p.value("f"), &p, "image-opts")?;
    let how: Preallocation =
        p.value("preallocation").unwrap_or("off").parse().map_err(|()| {
            Failure::new("Invalid preallocation mode: there are off, metadata, falloc and full")
        })?;
    let writing = open::How::writing(format.as_deref());
    let disk = match open::qcow2(&path, &writing, |o| o, &p)? {
        Some(q) => Opened::Qcow2(Box::new(q)),
        None => Opened::Raw(open::image(&path, &writing, &p)?.0),
    };
    let now = disk.disk().size();
    let bad = || Failure::new("New image size must be positive");
    let wanted = match (last.strip_prefix('+'), last.strip_prefix('-')) {
        (Some(n), _) => now.checked_add(size::parse(n)?).ok_or_else(bad)?,
        (_, Some(n)) => now.checked_sub(size::parse(n)?).ok_or_else(bad)?,
        _ => size::parse(last)?,
    };
    if wanted == 0 {
        return Err(bad());
    }
    let wanted = wanted.next_multiple_of(512);
    if wanted < now && !p.has("shrink") {
        return Err(Failure::new(
            "Use the --shrink option to perform a shrink operation: it deletes all data beyond the new end",
        ));
    }
    if wanted < now && how != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if let (Opened::Raw(_), Preallocation::Metadata) = (&disk, how) {
        return Err(Failure::new("Unsupported preallocation mode 'metadata'"));
    }
    if let (Opened::Qcow2(q), true) = (&disk, how != Preallocation::Off)
        && q.header().backing.is_some()
        && !q.header().extended_l2()
    {
        return Err(Failure::new(
            "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
        ));
    }
    let resized = disk.disk().resize(wanted);
    resized.map_err(|e| Failure::new(format!("{path}: cannot make it {wanted} bytes long: {e}")))?;
    match &disk {
        Opened::Qcow2(q) => q.preallocate(now, wanted, how)?,
        Opened::Raw(_) if how != Preallocation::Off && wanted > now => new::preallocate_raw(&path, now, how)?,
        Opened::Raw(_) => {}
    }
    disk.close()?;
    if !p.has("q") {
        writeln!(s.out, "Image resized.")?;
    }
    Ok(0)
}
