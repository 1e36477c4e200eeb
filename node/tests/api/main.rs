//! Tests of the interface: what each route does, refuses and promises, over a log in memory and with
//! the real guest agent in this process. One program, since each would build the same world again.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod bad_input;
mod builds;
mod capsules;
mod catching_up;
mod channels;
mod cli;
mod cluster;
mod dev;
mod events;
mod exec;
mod files;
mod fuzz;
mod hosts;
mod keys;
mod pausing;
mod previews;
mod relay;
mod snapshots;
mod sockets;
mod streams;
mod surface;
mod usage;
mod world;
