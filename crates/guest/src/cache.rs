//! The cache folder: entries that are whole or absent.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
};

use crate::{GuestError, io_at};

const MANIFEST: &str = "manifest.json";
const SCRATCH: &str = ".scratch-";

/// Ringfort's cache folder: `$XDG_CACHE_HOME/ringfort`, or `~/.cache/ringfort`.
///
/// A relative `XDG_CACHE_HOME` is ignored, as the XDG base directory specification wants.
///
/// # Errors
/// When neither variable says where.
pub fn cache_dir() -> Result<PathBuf, GuestError> {
    cache_dir_from(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))
}

fn cache_dir_from(
    xdg: Option<std::ffi::OsString>,
    home: Option<std::ffi::OsString>,
) -> Result<PathBuf, GuestError> {
    let absolute = |v: Option<std::ffi::OsString>| v.map(PathBuf::from).filter(|p| p.is_absolute());
    match (absolute(xdg), absolute(home)) {
        (Some(xdg), _) => Ok(xdg.join("ringfort")),
        (None, Some(home)) => Ok(home.join(".cache").join("ringfort")),
        (None, None) => Err(GuestError::NoCacheDir),
    }
}

/// What an entry is made from: a name, and text whose every change makes another entry.
pub(crate) struct Recipe {
    pub kind: &'static str,
    pub text: String,
}

impl Recipe {
    /// Folder name of the entry.
    pub fn entry_name(&self) -> String {
        format!("{}-{:016x}", self.kind, fnv1a(self.text.as_bytes()))
    }
}

/// FNV-1a, 64 bits: tells recipes apart; nothing rests on it against an attacker.
fn fnv1a(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// The cache, locked against other builders while this value lives.
pub(crate) struct Cache {
    root: PathBuf,
    /// Holds the advisory lock; closing releases it.
    _lock: File,
}

impl Cache {
    /// Open and lock; waits for another process that builds.
    pub fn open(root: &Path) -> Result<Self, GuestError> {
        fs::create_dir_all(root).map_err(io_at("create", root))?;
        let root = root.canonicalize().map_err(io_at("open", root))?;
        let path = root.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_at("open", &path))?;
        lock.lock().map_err(io_at("lock", &path))?;
        Ok(Self { root, _lock: lock })
    }

    /// Folder of the entry for `recipe`; `build` fills a scratch folder if there is none yet.
    pub fn entry(
        &self,
        recipe: &Recipe,
        build: impl FnOnce(&Self, &Path) -> Result<(), GuestError>,
    ) -> Result<PathBuf, GuestError> {
        let dir = self.root.join(recipe.entry_name());
        if is_whole(&dir) {
            return Ok(dir);
        }
        let scratch = self.scratch(recipe.kind)?;
        build(self, scratch.path())?;
        seal(scratch.path(), &recipe.text)?;
        if dir.exists() {
            remove_tree(&dir)?;
        }
        fs::rename(scratch.path(), &dir).map_err(io_at("rename", &dir))?;
        sync_dir(&self.root)?;
        scratch.keep();
        Ok(dir)
    }

    /// A new empty folder beside the entries. Those of builders that were killed are removed first: the lock says
    /// that none is at work, except this process's own, which carry its number.
    fn scratch(&self, kind: &str) -> Result<Scratch, GuestError> {
        let own = format!("{SCRATCH}{}-", std::process::id());
        for entry in fs::read_dir(&self.root).map_err(io_at("read", &self.root))?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(SCRATCH) && !name.starts_with(&own) {
                remove_tree(&entry.path())?;
            }
        }
        let path = self.root.join(format!("{own}{kind}"));
        if path.exists() {
            remove_tree(&path)?;
        }
        fs::create_dir(&path).map_err(io_at("create", &path))?;
        Ok(Scratch(Some(path)))
    }
}

/// A folder that goes away with this value, unless kept.
struct Scratch(Option<PathBuf>);

impl Scratch {
    fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new("/nonexistent"))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = remove_tree(&path);
        }
    }
}

/// Remove a tree even where folders in it are not writable for their owner, as some of a root file system are.
pub(crate) fn remove_tree(path: &Path) -> Result<(), GuestError> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(_) => {
            open_up(path);
            fs::remove_dir_all(path).map_err(io_at("remove", path))
        }
    }
}

fn open_up(dir: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            open_up(&entry.path());
        }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Manifest {
    recipe: String,
    /// Path inside the entry to length in bytes.
    files: BTreeMap<String, u64>,
}

/// Flush everything below `dir` and write the manifest last.
fn seal(dir: &Path, recipe: &str) -> Result<(), GuestError> {
    let mut files = BTreeMap::new();
    flush(dir, dir, &mut files)?;
    let path = dir.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&Manifest { recipe: recipe.to_owned(), files })
        .map_err(|e| GuestError::Content(format!("cannot write the manifest: {e}")))?;
    let mut file = File::create(&path).map_err(io_at("create", &path))?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(io_at("write", &path))?;
    sync_dir(dir)
}

fn flush(root: &Path, dir: &Path, files: &mut BTreeMap<String, u64>) -> Result<(), GuestError> {
    for entry in fs::read_dir(dir).map_err(io_at("read", dir))? {
        let path = entry.map_err(io_at("read", dir))?.path();
        let meta = fs::symlink_metadata(&path).map_err(io_at("look at", &path))?;
        if meta.is_dir() {
            flush(root, &path, files)?;
        } else if meta.is_file() {
            File::open(&path).and_then(|f| f.sync_all()).map_err(io_at("flush", &path))?;
            if let Ok(name) = path.strip_prefix(root) {
                files.insert(name.to_string_lossy().into_owned(), meta.len());
            }
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<(), GuestError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_at("flush", dir))
}

/// Whether `dir` has a manifest and every file that it lists, in full length.
fn is_whole(dir: &Path) -> bool {
    let Ok(text) = fs::read(dir.join(MANIFEST)) else { return false };
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else { return false };
    manifest
        .files
        .iter()
        .all(|(name, len)| fs::symlink_metadata(dir.join(name)).is_ok_and(|m| m.is_file() && m.len() == *len))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A folder for one test.
    pub(crate) struct TempDir(pub PathBuf);
    impl TempDir {
        pub fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("ringfort-guest-test-{}-{n}", std::process::id()));
            fs::create_dir_all(&path).expect("a temporary folder");
            Self(path)
        }
    }
    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = remove_tree(&self.0);
        }
    }

    fn recipe(text: &str) -> Recipe {
        Recipe { kind: "kernel", text: text.to_owned() }
    }

    fn put(text: &'static str) -> impl FnOnce(&Cache, &Path) -> Result<(), GuestError> {
        move |_, dir| fs::write(dir.join("f"), text).map_err(io_at("write", dir))
    }

    #[test]
    fn cache_dir_follows_the_xdg_rules() {
        let s = |v: &str| Some(std::ffi::OsString::from(v));
        assert_eq!(cache_dir_from(s("/x"), s("/h")).ok(), Some("/x/ringfort".into()));
        assert_eq!(cache_dir_from(s("relative"), s("/h")).ok(), Some("/h/.cache/ringfort".into()));
        assert_eq!(cache_dir_from(None, s("/h")).ok(), Some("/h/.cache/ringfort".into()));
        assert!(cache_dir_from(s(""), None).is_err());
    }

    #[test]
    fn an_entry_is_built_once_and_anew_when_the_recipe_changes() {
        let tmp = TempDir::new();
        let cache = Cache::open(&tmp.0).expect("cache");
        let a = cache.entry(&recipe("a"), put("one")).expect("built");
        let again = cache.entry(&recipe("a"), |_, _| panic!("built twice")).expect("reused");
        assert_eq!(a, again);
        let b = cache.entry(&recipe("b"), put("two")).expect("built");
        assert_ne!(a, b);
        assert_eq!(fs::read_to_string(b.join("f")).ok().as_deref(), Some("two"));
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let tmp = TempDir::new();
        let cache = Cache::open(&tmp.0).expect("cache");
        let r = cache.entry(&recipe("a"), |_, dir| {
            fs::write(dir.join("half"), "x").map_err(io_at("write", dir))?;
            Err(GuestError::Content("broken".into()))
        });
        assert!(matches!(r, Err(GuestError::Content(_))));
        let left: Vec<_> = fs::read_dir(&tmp.0).expect("dir").flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["lock"]);
    }

    #[test]
    fn a_truncated_or_missing_file_is_noticed_and_rebuilt() {
        let tmp = TempDir::new();
        let cache = Cache::open(&tmp.0).expect("cache");
        let dir = cache.entry(&recipe("a"), put("whole")).expect("built");
        fs::write(dir.join("f"), "who").expect("truncate");
        assert!(!is_whole(&dir));
        cache.entry(&recipe("a"), put("whole")).expect("rebuilt");
        assert!(is_whole(&dir));
        fs::remove_file(dir.join("f")).expect("remove");
        assert!(!is_whole(&dir));
        fs::write(dir.join(MANIFEST), "{ not json").expect("damage");
        assert!(!is_whole(&dir));
    }

    #[test]
    fn what_a_killed_builder_left_is_swept() {
        let tmp = TempDir::new();
        let stale = tmp.0.join(".scratch-999999999-kernel");
        fs::create_dir_all(stale.join("deep")).expect("stale");
        let cache = Cache::open(&tmp.0).expect("cache");
        cache.entry(&recipe("a"), put("x")).expect("built");
        assert!(!stale.exists());
    }

    #[test]
    fn a_second_builder_waits_and_then_reuses() {
        let tmp = TempDir::new();
        let first = Cache::open(&tmp.0).expect("cache");
        let root = tmp.0.clone();
        let (tx, rx) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            let cache = Cache::open(&root).expect("cache");
            tx.send(()).expect("send");
            cache.entry(&recipe("a"), |_, _| panic!("built twice")).expect("reused")
        });
        let dir = first.entry(&recipe("a"), put("x")).expect("built");
        assert!(rx.try_recv().is_err(), "the second builder must not get in while the first holds the lock");
        drop(first);
        assert_eq!(other.join().expect("thread"), dir);
    }
}
