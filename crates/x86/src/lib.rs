//! Facts of the x86 architecture: register bits, MSR numbers, exception vectors, descriptors, page-table bits, CPUID.
//!
//! Sources: Intel SDM volumes 1 to 4 and AMD APM volumes 1 to 3; each module names its sections.
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod cr;
pub mod exception;
pub mod flags;
pub mod msr;
pub mod paging;
pub mod segment;

pub use exception::Vector;
pub use segment::Segment;
