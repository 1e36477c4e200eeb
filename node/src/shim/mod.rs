//! The small process that owns one VMM and outlives the daemon.
