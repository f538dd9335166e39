//! `resize`.

use crate::args::parse;
use crate::{Done, Failure, Streams, open, size};
use ringfort_block::Format;

pub fn run(arguments: &[String], s: &mut Streams<'_>) -> Done {
    // A size of -1G is no option: it stands last.
    let Some((last, rest)) = arguments.split_last() else {
        return Err(Failure::new("Expecting image file name and size"));
    };
    let p = parse(rest, &["q", "shrink", "U"], &["f", "preallocation"])?;
    let path = p.one_file()?;
    if p.value("preallocation").is_some_and(|v| v != "off") {
        return Err(Failure::new("--preallocation: only off is supported yet"));
    }
    let (disk, _format): (_, Format) = open::image(path, p.value("f"), false, &p)?;
    let now = disk.size();
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
    disk.resize(wanted)?;
    disk.flush()?;
    if !p.has("q") {
        writeln!(s.out, "Image resized.")?;
    }
    Ok(0)
}
