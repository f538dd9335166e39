//! Versioned, checksummed state sections.
//!
//! Every stateful part of a machine writes one [`Section`]: a kind (which model), an instance (which one of
//! them), a version of that model's layout, and a body. Sections are what snapshots and live migration carry;
//! both are the same writer on different sinks. A reader refuses a version newer than it knows and upgrades an
//! older one.
//!
//! RAM and what throw-away disk layers hold follow as streams of pages ([`PagesWriter`]).
//!
//! Bodies are encoded with postcard 1.x, whose wire format is fixed; each model owns a plain serde struct for
//! every version of its layout.
#![forbid(unsafe_code)]

mod format;
mod pages;
mod stream;

pub use format::Format;
pub use pages::{Chunk, Compression, MAX_CHUNK, PagesReader, PagesWriter};
pub use stream::{Reader, Writer};

use serde::{Serialize, de::DeserializeOwned};

/// Largest body that a section may have, in bytes. RAM is a stream of its own, so device state stays far below.
pub const MAX_SECTION_BODY: usize = 64 << 20;

/// What can go wrong with saved state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The section was written by a newer Ringfort.
    #[error(
        "{kind} #{instance}: state version {found} is newer than the newest known here ({known}); use a newer Ringfort"
    )]
    TooNew {
        /// Model name.
        kind: String,
        /// Which one of them.
        instance: u32,
        /// Version in the file.
        found: u32,
        /// Newest version that this build reads.
        known: u32,
    },
    /// The section belongs to another model or instance.
    #[error("expected state of {expected}, found {found}")]
    WrongSection {
        /// What the reader wanted.
        expected: String,
        /// What stood there.
        found: String,
    },
    /// A part of the machine has no section in the file.
    #[error("the saved state has no section for {0}")]
    Missing(String),
    /// The body does not decode, or holds values the model cannot have.
    #[error("{kind} #{instance}: {reason}")]
    Invalid {
        /// Model name.
        kind: String,
        /// Which one of them.
        instance: u32,
        /// What is wrong.
        reason: String,
    },
    /// The stream is damaged, cut short or not a state file at all.
    #[error("{0}")]
    Stream(String),
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// The saved state of one part of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Model name, for instance `"serial16550"`. At most 255 bytes.
    pub kind: String,
    /// Which one of several of the same kind.
    pub instance: u32,
    /// Version of the body's layout, from 1.
    pub version: u32,
    /// The encoded body.
    pub body: Vec<u8>,
}

impl Section {
    /// Encode `value` as the body of a section.
    pub fn new<T: Serialize>(kind: &str, instance: u32, version: u32, value: &T) -> Section {
        // Serialising a plain struct into a growing vector has no failing path.
        let body = postcard::to_stdvec(value).unwrap_or_default();
        Section { kind: kind.to_owned(), instance, version, body }
    }

    /// Decode the body, checking that it is of `kind` and of a version up to `newest`.
    ///
    /// # Errors
    /// [`StateError::WrongSection`], [`StateError::TooNew`], or [`StateError::Invalid`] when the body does not
    /// decode as `T` (a caller that knows older versions looks at [`Section::version`] first).
    pub fn decode<T: DeserializeOwned>(&self, kind: &str, newest: u32) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::WrongSection { expected: kind.into(), found: self.kind.clone() });
        }
        if self.version > newest {
            return Err(StateError::TooNew {
                kind: self.kind.clone(),
                instance: self.instance,
                found: self.version,
                known: newest,
            });
        }
        postcard::from_bytes(&self.body).map_err(|e| self.invalid(format!("does not decode: {e}")))
    }

    /// An error that says this section's content is impossible.
    pub fn invalid(&self, reason: impl Into<String>) -> StateError {
        StateError::Invalid { kind: self.kind.clone(), instance: self.instance, reason: reason.into() }
    }
}
