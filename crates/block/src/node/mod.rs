//! What stands between a device and its image.
//!
//! Every node is a [`BlockBackend`](crate::BlockBackend) on another one, so that they make a graph: limits of speed over a throw-away layer over
//! a format over a file. A [`Joint`] is a place where the graph can be changed under a device at work.

mod cache;
pub mod fault;
mod joint;
mod range;
pub mod throttle;

pub use cache::{CacheMode, Tuned};
pub use fault::{Fault, Faulty};
pub use joint::Joint;
pub use range::{Concat, Window};
pub use throttle::{Bucket, Throttle, ThrottleConfig, Throttled};
