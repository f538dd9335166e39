//! The rows on the host itself: the guest's files in a folder, and a change of root into it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use ringfort_guest::UserlandGuest;

/// The folder; it goes away with this value.
pub struct Native {
    root: PathBuf,
    as_root: bool,
}

impl Native {
    /// Unpack the guest's files. An error says why the host cannot run rows.
    pub fn prepare(guest: &UserlandGuest) -> Result<Self, String> {
        let root = std::env::temp_dir().join(format!("ringfort-bench-{}", std::process::id()));
        let as_root = Path::new("/root").read_dir().is_ok();
        let native = Self { root, as_root };
        ringfort_guest::unpack(&guest.packages, &native.root, &mut ()).map_err(|e| e.to_string())?;
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(guest.own.join(".")).arg(&native.root);
        quiet(copy)?;
        for dir in ["dev", "proc", "tmp"] {
            let path = native.root.join(dir);
            fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        quiet(native.inside("exec chroot \"$1\" /bin/true", &[]))?;
        Ok(native)
    }

    /// The command that runs `rows`.
    pub fn command(&self, rows: &[&str]) -> Command {
        self.inside("shift_root=$1; shift; exec chroot \"$shift_root\" /bench/run \"$@\"", rows)
    }

    /// `script` in mount (and, without root rights, user) namespaces of its own, in which the folder has what programs expect.
    fn inside(&self, script: &str, args: &[&str]) -> Command {
        let mut c = Command::new("unshare");
        c.arg("--mount");
        if !self.as_root {
            c.args(["--user", "--map-root-user"]);
        }
        let mounts = "mount --rbind /dev \"$1/dev\" && mount --rbind /proc \"$1/proc\" && \
                      mount -t tmpfs tmpfs \"$1/tmp\" || exit 1; ";
        c.args(["sh", "-c", &format!("{mounts}{script}"), "sh"]).arg(&self.root).args(args);
        c
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // The mounts were in namespaces that are gone. Some folders may not be their owner's to write in.
        let _ = Command::new("chmod").args(["-R", "u+rwX"]).arg(&self.root).output();
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn quiet(mut command: Command) -> Result<(), String> {
    let out = command.output().map_err(|e| format!("{}: {e}", command.get_program().to_string_lossy()))?;
    if out.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&out.stderr).trim().replace('\n', "; "))
}
