//! Where a serial port leads: terminal, file, pseudo-terminal, unix socket.
//!
//! A [`Chardev`] has a writer thread behind a bounded buffer, so that a slow terminal or client never blocks a vCPU, and a reader thread
//! that hands what it reads to the guest's side as fast as that takes it: nothing typed is lost.

mod escape;
mod input;
mod output;

pub use escape::{Command, Escape, HELP};
pub use input::Input;
pub use output::Output;

use crate::config::Serial;
use input::{Reader, Source};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

/// Told of escape-key commands on the terminal.
pub type OnCommand = Box<dyn Fn(Command) + Send>;

/// An open character device.
pub struct Chardev {
    output: Arc<Output>,
    source: Option<Source>,
    reader: Option<Reader>,
    /// Name of the pseudo-terminal, if it is one.
    pub pty: Option<PathBuf>,
    /// The pseudo-terminal's other side, held open so that the master never reads as hung up while nobody uses it.
    _pty_held: Option<File>,
    /// A socket file that was made and is to go.
    socket: Option<PathBuf>,
    /// A file not yet emptied, and its name if it was made for us and goes again when the machine comes to nothing.
    file: Option<(File, Option<PathBuf>)>,
}

impl Chardev {
    /// Open what `config` says. `on_command` gets the escape commands of a terminal.
    ///
    /// # Errors
    /// With the name of what cannot be opened.
    pub fn open(config: &Serial, on_command: OnCommand) -> io::Result<Chardev> {
        let named = |what: &std::path::Path, e: io::Error| {
            io::Error::new(e.kind(), format!("{}: {e}", what.display()))
        };
        let mut dev = Chardev {
            output: Output::discard(),
            source: None,
            reader: None,
            pty: None,
            _pty_held: None,
            socket: None,
            file: None,
        };
        match config {
            Serial::None => {}
            Serial::Stdio => {
                dev.output = Output::start(Box::new(io::stdout()))?;
                dev.source = Some(Source::Terminal(Box::new(Escape::new(dev.output.clone(), on_command))));
            }
            Serial::File(path) => {
                let made = OpenOptions::new().create_new(true).write(true).open(path);
                let fresh = made.is_ok().then(|| path.clone());
                let file = match made {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        OpenOptions::new().write(true).open(path)
                    }
                    other => other,
                };
                let file = file.map_err(|e| named(path, e))?;
                dev.file = Some((file.try_clone()?, fresh));
                dev.output = Output::start(Box::new(file))?;
            }
            Serial::Pty => {
                let (master, name) = ringfort_base::pty::open()?;
                let master = File::from(master);
                dev.output = Output::start(Box::new(master.try_clone()?))?;
                dev.source = Some(Source::File(master));
                dev._pty_held =
                    Some(OpenOptions::new().read(true).write(true).open(&name).map_err(|e| named(&name, e))?);
                dev.pty = Some(name);
            }
            Serial::Unix(path) => {
                remove_stale(path).map_err(|e| named(path, e))?;
                let listener = UnixListener::bind(path).map_err(|e| named(path, e))?;
                dev.socket = Some(path.clone());
                dev.output = Output::start_socket()?;
                dev.source = Some(Source::Listener(listener));
            }
        }
        Ok(dev)
    }

    /// Where the guest's output goes.
    pub fn output(&self) -> Arc<Output> {
        self.output.clone()
    }

    /// Begin to read, into `input`.
    ///
    /// # Errors
    /// When the host has no more threads or descriptors.
    pub fn connect(&mut self, input: Arc<dyn Input>) -> io::Result<()> {
        if let Some(source) = self.source.take() {
            self.reader = Some(Reader::start(source, input, self.output.clone())?);
        }
        Ok(())
    }

    /// The machine is about to run: a file that stands here loses its former content, or if `append` is written on at its end, and stays.
    ///
    /// # Errors
    /// When the file cannot be emptied.
    pub fn commit(&mut self, append: bool) -> io::Result<()> {
        if let Some((file, fresh)) = &mut self.file {
            if append {
                file.seek(io::SeekFrom::End(0))?;
            } else if file.metadata()?.is_file() {
                file.set_len(0)?;
            }
            *fresh = None;
        }
        self.file = None;
        Ok(())
    }

    /// The guest's side has room again.
    pub fn unblock(&self) -> Arc<dyn Fn() + Send + Sync> {
        match &self.reader {
            Some(r) => r.unblocker(),
            None => Arc::new(|| {}),
        }
    }
}

impl Drop for Chardev {
    fn drop(&mut self) {
        self.reader = None;
        self.output.finish();
        if let Some((_, Some(path))) = &self.file {
            // It stays, empty, if its folder no longer lets it go.
            let _ = std::fs::remove_file(path);
        }
        if let Some(path) = &self.socket {
            // Nobody can be helped if it is gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A socket file that nobody listens on is left over from a crash; anything else stays.
pub(crate) fn remove_stale(path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(m) if m.file_type().is_socket() => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens here; choose another path",
            )),
            Err(_) => std::fs::remove_file(path),
        },
        Ok(_) => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists and is no socket; choose another path"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_emptied_or_kept_only_for_a_machine_that_runs() {
        let dir = std::env::temp_dir().join(format!("ringfort-chardev-file-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (old, new) = (dir.join("old"), dir.join("new"));
        std::fs::write(&old, "former").unwrap();
        let open = |path: &PathBuf| Chardev::open(&Serial::File(path.clone()), Box::new(|_| {})).unwrap();
        drop((open(&old), open(&new)));
        assert_eq!(std::fs::read(&old).unwrap(), b"former");
        assert!(!new.exists());
        for path in [&old, &new] {
            let mut dev = open(path);
            dev.commit(false).unwrap();
            dev.output().write(b"now");
            drop(dev);
            assert_eq!(std::fs::read(path).unwrap(), b"now");
            let mut dev = open(path);
            dev.commit(true).unwrap();
            dev.output().write(b" and then");
            drop(dev);
            assert_eq!(std::fs::read(path).unwrap(), b"now and then");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
