//! `bitmap`: persistent bitmaps of what changed.

use crate::args::parse;
use crate::{Done, Failure, Streams, open, size};
use open::How;
use ringfort_block::ImageOptions;
use ringfort_block::format::qcow2::bitmap::Change;

pub fn run(arguments: &[String], _s: &mut Streams<'_>) -> Done {
    let verbs = ["add", "remove", "clear", "enable", "disable"];
    let flags = [&verbs[..], &["image-opts"]].concat();
    let p = parse(
        arguments,
        &flags,
        &["merge", "b", "F", "f", "g", "granularity", "source-file", "source-format", "object"],
    )?;
    let actions: Vec<(&str, &str)> =
        p.options().filter(|(k, _)| verbs.contains(k) || *k == "merge").collect();
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let granularity = p.value("g").or(p.value("granularity"));
    let (source, source_format) =
        (p.value("b").or(p.value("source-file")), p.value("F").or(p.value("source-format")));
    if granularity.is_some() && !p.has("add") {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if source.is_some() && !p.has("merge") {
        return Err(Failure::new("Merge bitmap source file only supported with --merge"));
    }
    if source_format.is_some() && source.is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    let [path, name] = p.rest.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let granularity = granularity.map(size::parse).transpose()?;
    let (path, format) = open::name(path, p.value("f"), &p, "image-opts")?;
    let none = |path: &str| Failure::new(format!("{path}: its format has no bitmaps; there are in qcow2"));
    let alone = |o: ImageOptions| ImageOptions { backing: false, ..o };
    let q = open::qcow2(&path, &How::writing(format.as_deref()), alone, &p)?.ok_or_else(|| none(&path))?;
    let other = match source {
        Some(b) => Some(open::qcow2(b, &How::reading(source_format), alone, &p)?.ok_or_else(|| none(b))?),
        None => None,
    };
    for (action, value) in actions {
        let done = match action {
            "add" => q.change_bitmap(name, &Change::Add(granularity)),
            "remove" => q.change_bitmap(name, &Change::Remove),
            "clear" => q.change_bitmap(name, &Change::Clear),
            "enable" => q.change_bitmap(name, &Change::Enable),
            "disable" => q.change_bitmap(name, &Change::Disable),
            _ => q.merge_bitmap(name, other.as_ref().unwrap_or(&q), value),
        };
        done.map_err(|e| Failure::new(format!("Operation {action} on bitmap {name} failed: {e}")))?;
    }
    q.close()?;
    Ok(0)
}
