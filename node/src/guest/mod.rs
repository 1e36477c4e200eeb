//! Speaking to the guest agent.
//!
//! One [`Guest`] per running sandbox: an HTTP client over streams that a [`Dial`] opens (TCP to
//! the sandbox's slot here, a relayed stream elsewhere), its connection pool, and the agent's
//! access token. The pool dies with the `Guest`, so a connection never outlives the sandbox whose
//! address it was made for.

pub mod dial;
mod error;
mod files;
mod http;
mod process;
mod ready;

pub use dial::{Dial, GuestStream, TcpDial};
pub use error::{GuestCode, GuestError};
pub use files::{FileEntry, FileKind};
pub use http::{Guest, GuestBody};
pub use process::{
    EventStream, ProcessCommand, ProcessEvent, ProcessSummary, RunOutput, Selector, Signal,
};
pub use ready::{AgentSetup, Health};
