//! The `wrenn` binary: arguments in, exit code out.

fn main() {}
