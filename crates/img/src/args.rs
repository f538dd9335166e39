//! Options as getopt_long reads them: letters together, values attached or apart, long names with `=`.

use crate::Failure;

/// What stands on the command line: options in order, and the rest.
pub struct Parsed {
    options: Vec<(String, String)>,
    /// What is no option.
    pub rest: Vec<String>,
}

/// How a file is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// Past the host's page cache.
    pub direct: bool,
    /// What is written is on the disk at the end.
    pub syncs: bool,
}

impl Cache {
    /// Through the page cache, on the disk at the end.
    pub const WRITEBACK: Cache = Cache { direct: false, syncs: true };
    /// Through the page cache, and on the disk when the host likes.
    pub const UNSAFE: Cache = Cache { direct: false, syncs: false };
}

/// Long names of options (qemu-img 10) and the letters that verbs know them by; of several the first that the verb has.
const LONG: [(&str, &[&str]); 44] = [
    ("a-format", &["f"]),
    ("aio", &["i"]),
    ("apply", &["a"]),
    ("b-format", &["F"]),
    ("backing", &["B", "b"]),
    ("backing-cache", &["T"]),
    ("backing-format", &["F"]),
    ("backing-unsafe", &["u"]),
    ("base", &["b"]),
    ("buffer-size", &["s"]),
    ("cache", &["t", "T"]),
    ("compress", &["c"]),
    ("count", &["c"]),
    ("create", &["c"]),
    ("delete", &["d"]),
    ("depth", &["d"]),
    ("drop", &["d"]),
    ("force-share", &["U"]),
    ("format", &["f"]),
    ("list", &["l"]),
    ("native", &["n"]),
    ("no-create", &["n"]),
    ("offset", &["o"]),
    ("oob-writes", &["W"]),
    ("options", &["o"]),
    ("output-format", &["O"]),
    ("parallel", &["m"]),
    ("progress", &["p"]),
    ("quiet", &["q"]),
    ("rate", &["r"]),
    ("repair", &["r"]),
    ("snapshot", &["l"]),
    ("source-cache", &["T"]),
    ("source-format", &["f"]),
    ("source-image-opts", &["image-opts"]),
    ("source-snapshot", &["l"]),
    ("sparse-size", &["S"]),
    ("step-size", &["S"]),
    ("strict", &["s"]),
    ("target-cache", &["t"]),
    ("target-format", &["O"]),
    ("target-options", &["o"]),
    ("write", &["w"]),
    ("write-pattern", &["pattern"]),
];

/// What a verb with these options calls the one with this long name.
fn known<'a>(name: &'a str, flags: &[&str], valued: &[&str]) -> &'a str {
    let has = |n: &str| flags.contains(&n) || valued.contains(&n);
    if has(name) {
        return name;
    }
    let letters = LONG.iter().find(|(long, _)| *long == name).map_or(&[][..], |(_, letters)| letters);
    letters.iter().find(|l| has(l)).copied().unwrap_or(name)
}

/// Read `arguments`: `flags` take no value, `valued` take one. Names of one letter are letters.
pub fn parse(arguments: &[String], flags: &[&str], valued: &[&str]) -> Result<Parsed, Failure> {
    let mut p = Parsed { options: Vec::new(), rest: Vec::new() };
    let mut it = arguments.iter();
    let unknown = |name: &str| {
        Failure::new(format!("unrecognized option '{name}'; `ringfort img --help` lists what there is"))
    };
    let need = |name: &str| Failure::new(format!("option '{name}' needs a value"));
    while let Some(a) = it.next() {
        if a == "--" {
            p.rest.extend(it.by_ref().cloned());
        } else if let Some(long) = a.strip_prefix("--") {
            let (name, value) = long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v.to_owned())));
            let long = name.len() > 1;
            let name = known(name, flags, valued);
            if long && flags.contains(&name) && value.is_none() {
                p.options.push((name.into(), String::new()));
            } else if long && valued.contains(&name) {
                let value = value.or_else(|| it.next().cloned()).ok_or_else(|| need(a))?;
                p.options.push((name.into(), value));
            } else {
                return Err(unknown(a));
            }
        } else if a.len() > 1 && a.starts_with('-') {
            for (i, c) in a[1..].char_indices() {
                let name = c.to_string();
                if flags.contains(&name.as_str()) {
                    p.options.push((name, String::new()));
                } else if valued.contains(&name.as_str()) {
                    let attached = &a[1 + i + c.len_utf8()..];
                    let value =
                        if attached.is_empty() { it.next().cloned() } else { Some(attached.to_owned()) };
                    p.options.push((name, value.ok_or_else(|| need(a))?));
                    break;
                } else {
                    return Err(unknown(&format!("-{c}")));
                }
            }
        } else {
            p.rest.push(a.clone());
        }
    }
    Ok(p)
}

impl Parsed {
    /// Whether a flag is given.
    pub fn has(&self, name: &str) -> bool {
        self.options.iter().any(|o| o.0 == name)
    }

    /// The last value of an option.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.options.iter().rev().find(|o| o.0 == name).map(|o| o.1.as_str())
    }

    /// All values of an option.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |o| o.0 == name).map(|o| o.1.as_str())
    }

    /// All options in order.
    pub fn options(&self) -> impl Iterator<Item = (&str, &str)> {
        self.options.iter().map(|o| (o.0.as_str(), o.1.as_str()))
    }

    /// A cache mode: the value of `name`, or `usual`.
    pub fn cache(&self, name: &str, usual: Cache) -> Result<Cache, Failure> {
        match self.value(name) {
            None => Ok(usual),
            Some("none" | "off") => Ok(Cache { direct: true, syncs: true }),
            Some("directsync") => Ok(Cache { direct: true, syncs: true }),
            Some("writeback" | "writethrough") => Ok(Cache { direct: false, syncs: true }),
            Some("unsafe") => Ok(Cache { direct: false, syncs: false }),
            Some(other) => Err(Failure::new(format!(
                "Invalid cache option: {other}; there are none, writeback, writethrough, directsync and unsafe"
            ))),
        }
    }

    /// `-r`: bytes per second.
    pub fn rate(&self) -> Result<Option<u64>, Failure> {
        self.value("r").map(crate::size::parse).transpose()
    }

    /// `--output`: whether it is JSON.
    pub fn json(&self) -> Result<bool, Failure> {
        match self.value("output") {
            None | Some("human") => Ok(false),
            Some("json") => Ok(true),
            Some(_) => Err(Failure::new("--output must be used with human or json as argument.")),
        }
    }

    /// The only argument that is no option.
    pub fn one_file(&self) -> Result<&str, Failure> {
        match self.rest.as_slice() {
            [one] => Ok(one),
            _ => Err(Failure::new("Expecting one image file name")),
        }
    }
}

/// `name=value` pairs of `-o`, where a doubled comma stands for one.
pub fn pairs<'a>(options: impl Iterator<Item = &'a str>) -> Result<Vec<(String, String)>, Failure> {
    let mut out = Vec::new();
    for o in options {
        for part in o.replace(",,", "\0").split(',').filter(|p| !p.is_empty()) {
            let part = part.replace('\0', ",");
            let (k, v) = part.split_once('=').unwrap_or((&part, "on"));
            out.push((k.to_owned(), v.to_owned()));
        }
    }
    Ok(out)
}

/// `on` or `off`.
pub fn switch(name: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(Failure::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_long_names_mean_the_same() {
        let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        for (short, long) in [
            (
                "-qp -f raw -O qcow2 -t none a b",
                "--quiet --progress --source-format=raw --target-format qcow2 --target-cache none a b",
            ),
            ("-q -B base -F raw a", "--quiet --backing base --backing-format raw a"),
            ("-fraw -- -x", "--format raw -- -x"),
        ] {
            let read = |text: &str| {
                let p = parse(&words(text), &["q", "p"], &["f", "F", "O", "t", "B"])
                    .unwrap_or_else(|e| panic!("{e:?}"));
                (p.options, p.rest)
            };
            assert_eq!(read(short), read(long));
        }
        for bad in ["--q", "--bogus", "--quiet=yes", "--compress", "-x", "--format"] {
            assert!(parse(&words(bad), &["q"], &["f"]).is_err(), "{bad}");
        }
    }
}
