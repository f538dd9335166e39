//! Errors that a user reads: one line that says what failed, on what, and what to do.

use std::fmt;

/// An error for a person: what failed and on what, the cause, and a way out where there is one.
#[derive(Debug)]
pub struct Error {
    what: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
    advice: Option<String>,
}

impl Error {
    /// An error without a deeper cause. `what` names the thing: `disk root.img: not a regular file`.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: None, advice: None }
    }

    /// An error caused by another.
    pub fn caused_by(
        what: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { what: what.into(), cause: Some(cause.into()), advice: None }
    }

    /// The same error with what to do about it.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&one_line(&self.what))?;
        let mut cause: Option<&dyn std::error::Error> = match &self.cause {
            Some(c) => Some(c.as_ref()),
            None => None,
        };
        while let Some(c) = cause {
            write!(f, ": {}", one_line(&c.to_string()))?;
            cause = c.source();
        }
        match &self.advice {
            Some(advice) => write!(f, "; {}", one_line(advice)),
            None => Ok(()),
        }
    }
}

// No `source`: the causes are part of the text, and a caller that prints the chain would say them twice.
impl std::error::Error for Error {}

/// `text` without line breaks and other control characters, which a file name may hold.
fn one_line(text: &str) -> String {
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Says on a `Result` what was being done.
pub trait Context<T> {
    /// Turn an error into an [`Error`] that says what failed.
    ///
    /// # Errors
    /// The error, with its context.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|e| Error::caused_by(what(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_cause_and_advice() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such\nfile");
        let e = Err::<(), _>(io).context(|| "kernel a\nb".into()).unwrap_err().advise("give --kernel");
        assert_eq!(e.to_string(), "kernel a b: no such file; give --kernel");
        assert_eq!(Error::new("x").to_string(), "x");
    }

    #[test]
    fn deeper_causes_are_told_once() {
        let inner = Error::caused_by("inner", std::io::Error::other("root"));
        let outer = Error::caused_by("outer", inner);
        assert_eq!(outer.to_string(), "outer: inner: root");
    }
}
