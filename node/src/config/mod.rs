//! Configuration: as written, as checked, and its defaults with their reasons.
//!
//! A setting may come from the command line, the environment, a file or [`defaults`], in that
//! order of precedence. [`Written`] holds what any one of them says; [`Config::check`] turns the
//! sum into a [`Config`], the only form the rest of the node sees. It is read once, at the start.

mod checked;
pub mod defaults;
mod error;
mod file;
mod machine;
mod peering;
mod values;

/// Lies in the data directory of a node that is a member of a cluster, and in no other.
pub const MEMBER_FILE: &str = "member.json";

pub use checked::{Capacity, Config, Warm};
pub use error::ConfigError;
pub use file::{Written, WrittenCapacity, WrittenWarm};
pub use machine::Machine;
pub use values::{AcceleratorChoice, BadText, Cidr, JoinToken, Period, Tag, VmmChoice};
