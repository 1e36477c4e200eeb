//! Configuration: as written, as checked, and its defaults with their reasons.

/// The configuration of a node, checked.
#[derive(Clone, Debug)]
pub struct Config {}
