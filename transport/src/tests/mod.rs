//! Tests of the whole crate over real sockets.
