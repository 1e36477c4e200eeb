//! The sandboxes this node runs: one driver task each.
