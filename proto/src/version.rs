//! Versions of what is written down or sent. A reader that meets another one says so by name.

/// The version of the product, reported by every interface.
pub const PRODUCT: &str = env!("CARGO_PKG_VERSION");

/// The version the guest agent reports. Client libraries gate features on it: at 0.6.4 and above
/// they use the whole surface (spec of the guest agent).
pub const ENVD: &str = "0.6.8";

/// Layout of a node's data directory. A directory of version 1 is read as it is: version 2 adds
/// commands to the log and files beside it that version 1 does not know.
pub const DATA_DIR: u32 = 2;

/// The protocol between daemon and shim. A shim outlives daemons, so a new daemon must still speak
/// the versions of the shims it finds.
pub const SHIM: u32 = 1;
