//! Kernel modules: which ones, and in what order they must be loaded.
//!
//! The module packages carry no `modules.dep` before they are installed, so the dependencies are read from the
//! modules themselves: the `.modinfo` section holds NUL-terminated `key=value` strings, among them
//! `depends=a,b` (Linux include/linux/module.h, MODULE_INFO).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use crate::{GuestError, io_at};

/// The modules of a kernel, by name with `_` for `-`, as the kernel itself compares them.
pub(crate) struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
}

impl ModuleTree {
    /// Find all `.ko` files below `root`.
    pub fn scan(root: &Path) -> Result<Self, GuestError> {
        let mut files = BTreeMap::new();
        let mut todo = vec![root.to_path_buf()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(&dir).map_err(io_at("read", &dir))? {
                let path = entry.map_err(io_at("read", &dir))?.path();
                let meta = fs::symlink_metadata(&path).map_err(io_at("look at", &path))?;
                if meta.is_dir() {
                    todo.push(path);
                } else if path.extension().is_some_and(|e| e == "ko")
                    && let Some(stem) = path.file_stem()
                {
                    files.insert(canonical(&stem.to_string_lossy()), path);
                }
            }
        }
        Ok(Self { files })
    }

    /// Files of `wanted` and of what they depend on, each after those it needs. A name that is not in the tree is
    /// passed over: it is built into the kernel, or this kernel has none.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>, GuestError> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.visit(&canonical(name), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<PathBuf>,
    ) -> Result<(), GuestError> {
        // Marking before descending also ends a circle, which no real kernel has.
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else { return Ok(()) };
        let image = fs::read(path).map_err(io_at("read", path))?;
        for dependency in depends(&image) {
            self.visit(&dependency, seen, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Names that the module `image` depends on.
fn depends(image: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = image.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let value = &image[at + KEY.len()..];
    let end = value.iter().position(|b| *b == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end]).split(',').filter(|n| !n.is_empty()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::tests::TempDir;

    fn module(depends: &str) -> Vec<u8> {
        format!("\u{7f}ELF...\0license=GPL\0depends={depends}\0name=x\0").into_bytes()
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(depends(&module("")), Vec::<String>::new());
        assert_eq!(depends(&module("virtio_ring,virtio-pci-legacy")), ["virtio_ring", "virtio_pci_legacy"]);
        assert_eq!(depends(b"no such thing"), Vec::<String>::new());
        assert_eq!(depends(b"\0depends=unterminated"), Vec::<String>::new());
    }

    #[test]
    fn order_puts_what_is_needed_first_and_everything_once() {
        let tmp = TempDir::new();
        let put = |name: &str, deps: &str| {
            fs::write(tmp.0.join("a").join(name), module(deps)).expect("module");
        };
        fs::create_dir(tmp.0.join("a")).expect("dir");
        put("virtio.ko", "");
        put("virtio_ring.ko", "virtio");
        put("virtio-rng.ko", "virtio_ring,virtio");
        put("loop-a.ko", "loop_b");
        put("loop-b.ko", "loop_a");
        put("unwanted.ko", "");
        let tree = ModuleTree::scan(&tmp.0).expect("tree");
        let names = |wanted: &[&str]| -> Vec<String> {
            let order = tree.load_order(wanted).expect("order");
            order.iter().map(|p| p.file_name().expect("name").to_string_lossy().into_owned()).collect()
        };
        assert_eq!(
            names(&["virtio_rng", "ext4", "virtio"]),
            ["virtio.ko", "virtio_ring.ko", "virtio-rng.ko"]
        );
        assert_eq!(names(&["loop-a"]), ["loop-b.ko", "loop-a.ko"]);
    }
}
