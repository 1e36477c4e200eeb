//! Words every room of the node may use: clocks, remedies, stopping, telemetry names.

pub mod chain;
pub mod clock;
pub mod fault;
pub mod remedy;
pub mod stop;
pub mod telemetry;
