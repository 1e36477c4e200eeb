//! Guest memory: owned here, handed to the VMM.
//!
//! The memory of a guest is a memfd ([`memory`]) that its shim makes and the VMM maps; it lives as
//! long as either holds it, and nothing is left of it afterwards. [`region`] is the arithmetic on
//! it. Serving page faults, and finding the pages that were written, will join them here.

pub mod memory;
pub mod region;
