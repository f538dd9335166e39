//! What can be wrong with an image.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image cannot be used. Each message is one line that names the file and the way out.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// No such file.
    #[error("disk image {}: no such file; check the path, or create it (ringfort img create -f raw FILE SIZE)", .0.display())]
    NotFound(PathBuf),
    /// A file that an image names is not there.
    #[error("disk image {}: its {part} {} does not exist; put it back{}", image.display(), path.display(), if *.part == BACKING { format!(", or name another one (ringfort img rebase -u -F FORMAT -b FILE {})", image.display()) } else { String::new() })]
    Missing {
        /// The image that names it.
        image: PathBuf,
        /// What it is to the image.
        part: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A directory was named.
    #[error("disk image {}: is a directory; name a file or block device", .0.display())]
    Directory(PathBuf),
    /// Neither a regular file nor a block device.
    #[error("disk image {}: is neither a file nor a block device", .0.display())]
    NotAnImage(PathBuf),
    /// The host does not let us.
    #[error("disk image {}: permission denied; change its rights{}", path.display(), if *.writing { ", or attach it with readonly=on" } else { "" })]
    Permission {
        /// The image.
        path: PathBuf,
        /// Whether write access was asked for.
        writing: bool,
    },
    /// Another process has it.
    #[error("disk image {}: in use by another process ({conflict}); stop it, {}", path.display(), if *.writing { "attach the disk with readonly=on, or use a copy" } else { "or use a copy" })]
    InUse {
        /// The image.
        path: PathBuf,
        /// What is in each other's way.
        conflict: &'static str,
        /// Whether write access was asked for.
        writing: bool,
    },
    /// Nothing in it.
    #[error("disk image {}: is empty (0 bytes); it may have been cut short", .0.display())]
    Empty(PathBuf),
    /// A format that cannot be opened.
    #[error("disk image {}: is in {found} format, which is not supported; convert it (qemu-img convert -O raw), or give format=raw to use its bytes as they are", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// What was found.
        found: &'static str,
    },
    /// The metadata cannot be right.
    #[error("disk image {}: damaged: {what}; see what `ringfort img check` says, or restore a backup", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// An image of a format that is only read cannot be right.
    #[error("disk image {}: damaged {format} image: {what}; restore a backup, or mend it with the program that made it", path.display())]
    Broken {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A format that is only read was to be written.
    #[error("disk image {}: is in {format} format, which can only be read; attach it with readonly=on, or convert it (ringfort img convert -O qcow2)", path.display())]
    OnlyRead {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// Something that is not supported.
    #[error("disk image {}: uses {what}, which is not supported; convert it with the program that made it", path.display())]
    Feature {
        /// The image.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// An image whose format nobody vouches for names another file.
    #[error("disk image {}: names another file ({name}), but the image on top of it does not say its format, so that this may be a guest's doing; say it: ringfort img rebase -u -F FORMAT -b {} IMAGE", path.display(), path.display())]
    Reference {
        /// The image.
        path: PathBuf,
        /// What it names.
        name: String,
    },
    /// Any other refusal of the host.
    #[error("disk image {}: {action}: {source}", path.display())]
    Host {
        /// The image.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The host's words.
        source: io::Error,
    },
    /// The file that takes an overlay's writes cannot be made.
    #[error("cannot create a temporary file for disk writes in {}: {source}; set TMPDIR to a directory with room", dir.display())]
    Overlay {
        /// Where.
        dir: PathBuf,
        /// The host's words.
        source: io::Error,
    },
}

/// What a backing file is to an image.
pub(crate) const BACKING: &str = "backing file";

/// What is wrong with an image, found while its tables are in use: the content of an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("the qcow2 image is damaged: {0}; run `ringfort img check` on it")]
pub(crate) struct Damage(pub String);

impl BlockError {
    pub(crate) fn host(path: &Path, action: &'static str, source: io::Error) -> BlockError {
        match source.get_ref().and_then(|e| e.downcast_ref::<Damage>()) {
            Some(Damage(what)) => BlockError::Damaged { path: path.into(), what: what.clone() },
            None => BlockError::Host { path: path.into(), action, source },
        }
    }

    /// The same of a file that `image` names, which is `part` of it: if the file is not there, it is said who wants it.
    pub(crate) fn named_by(self, image: &Path, part: &'static str) -> BlockError {
        match self {
            BlockError::NotFound(path) => BlockError::Missing { image: image.into(), part, path },
            other => other,
        }
    }
}
