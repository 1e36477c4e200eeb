//! Speaking to the guest agent.
//!
//! One [`Guest`] per running sandbox: an HTTP client over streams that a [`Dial`] opens (TCP to
//! the sandbox's slot here, a relayed stream elsewhere), its connection pool, and the agent's
//! access token. A [`CutDial`] ends its streams, idle or in use, with the sandbox whose address
//! they were made for.
//!
//! | file | what it does |
//! |---|---|
//! | `ready` | from a boot to a guest that may work |
//! | `quiesce` `restore` | from a running guest to one fit to be sealed, and from a sealed one back |
//! | `process` `terminal` `files` `ports` | what clients ask for |
//! | `load` | how busy it is |
//! | `adopt` | another root file system in the place of its own |
//! | `defaults` | user, directory and environment of processes that name none |

mod adopt;
mod defaults;
pub mod dial;
mod error;
mod files;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod http;
mod load;
mod ports;
mod process;
mod quiesce;
mod ready;
mod restore;
mod terminal;

pub use defaults::Defaults;
pub use dial::{CutDial, Dial, GuestStream, TcpDial};
pub use error::{GuestCode, GuestError};
pub use files::{FileEntry, FileKind};
pub use http::{Guest, GuestBody};
pub use ports::PortClient;
pub use process::{
    EventStream, ProcessCommand, ProcessEvent, ProcessSummary, RunOutput, Selector, Signal,
};
pub use quiesce::{Quiesce, QuiesceError, Quiesced, Workload};
pub use ready::{AgentSetup, Health};
pub use restore::{Fork, Generation, Restore, RestoreError, Restored};
pub use terminal::TerminalSize;
