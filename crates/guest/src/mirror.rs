//! A small package mirror: packages with everything that they need, and an index, for a test to serve to its guests.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    GuestError, Progress,
    apt::{self, LazyApt, RELEASE},
    cache::{Cache, Recipe},
    io_at, tool,
};

/// Steps that [`ensure_mirror`] reports.
const STEPS: usize = apt::STEPS + 2;

/// A folder that holds `packages` of Debian's and all packages that they need, with `Packages` and `Release` files of a flat
/// repository (sources.list(5): `deb [trusted=yes] URI ./`; it is not signed). Fetched first if the cache has none for today's recipe.
///
/// # Errors
/// As [`crate::ensure`].
pub fn ensure_mirror(
    cache: &Path,
    packages: &[&str],
    progress: &mut dyn Progress,
) -> Result<PathBuf, GuestError> {
    let cache = Cache::open(cache)?;
    let recipe = Recipe { kind: "mirror", text: format!("1 {RELEASE} {packages:?}") };
    cache.entry(&recipe, |_, scratch| {
        let mut apt = LazyApt::new(scratch.join("apt"));
        let archives = apt.get(progress, STEPS)?.fetch(packages, progress)?;
        progress.step(STEPS - 1, STEPS, "writing the mirror's index");
        index(&archives, scratch)?;
        crate::cache::remove_tree(&scratch.join("apt"))
    })
}

/// Move the packages of `archives` to `to` and describe them there.
fn index(archives: &Path, to: &Path) -> Result<(), GuestError> {
    let dpkg_deb = tool::find("dpkg-deb", "dpkg")?;
    let sha256sum = tool::find("sha256sum", "coreutils")?;
    let shown = |p: &Path| p.to_string_lossy().into_owned();
    let sum = |path: &Path| -> Result<String, GuestError> {
        let text = tool::output(&sha256sum, &[shown(path)])?;
        Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(archives).map_err(io_at("read", archives))? {
        let path = entry.map_err(io_at("read", archives))?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            files.push(path);
        }
    }
    files.sort();
    let mut text = String::new();
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fields = tool::output(&dpkg_deb, &["-f".to_owned(), shown(&path)])?;
        let size = fs::metadata(&path).map_err(io_at("look at", &path))?.len();
        // Writing to a text cannot fail.
        let _ = write!(
            text,
            "{}\nFilename: ./{name}\nSize: {size}\nSHA256: {}\n\n",
            fields.trim_end(),
            sum(&path)?
        );
        let place = to.join(&name);
        fs::rename(&path, &place).map_err(io_at("move", &path))?;
    }
    let packages = to.join("Packages");
    fs::write(&packages, &text).map_err(io_at("write", &packages))?;
    let release = to.join("Release");
    let about = format!("Suite: {RELEASE}\nSHA256:\n {} {} Packages\n", sum(&packages)?, text.len());
    fs::write(&release, about).map_err(io_at("write", &release))
}
