//! Why a back end cannot be had, in one line each.

use std::io;

/// What went wrong while a back end was set up; nothing is left behind then.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// An option is wrong.
    #[error("{option}: {what}")]
    Option {
        /// Which one.
        option: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
    /// The host refuses something.
    #[error("{what}: {source}{advice}")]
    Host {
        /// What was tried.
        what: String,
        /// The host's answer.
        source: io::Error,
        /// What to do, with its own separator in front.
        advice: &'static str,
    },
    /// A helper or a file is not as it should be.
    #[error("{0}")]
    Refused(String),
}

impl NetError {
    /// For `map_err`: the host's answer to `what`.
    pub fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetError {
        let what = what.into();
        move |source| NetError::Host { what, source, advice: "" }
    }

    /// For `map_err`, with what to do.
    pub fn advise(what: impl Into<String>, advice: &'static str) -> impl FnOnce(io::Error) -> NetError {
        let what = what.into();
        move |source| NetError::Host { what, source, advice }
    }
}
