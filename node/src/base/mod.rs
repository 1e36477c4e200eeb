//! Words every room of the node may use: clocks, remedies, sockets, stopping, telemetry names.

pub mod at_once;
pub mod chain;
pub mod clock;
pub mod fault;
pub mod remedy;
pub mod sample;
pub mod socket;
pub mod stop;
pub mod telemetry;
