//! What every Ringfort process needs of the host: errors, an event loop, signals, the terminal, and what the host has.
//!
//! This is the ground floor: it knows nothing of machines or guests.

pub mod error;
mod event;
pub mod event_loop;
pub mod file;
pub mod host;
pub mod kvm_probe;
pub mod pty;
pub mod signals;
pub mod terminal;
pub mod threads;

pub use error::{Context, Error};
pub use event::event;
pub use event_loop::{EventLoop, Handle, Interest, Ready, TimerId, Token};
pub use terminal::RawTerminal;
