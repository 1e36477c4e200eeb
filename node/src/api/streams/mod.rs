//! Streams and terminals over WebSocket.
//!
//! | file | what it does |
//! |---|---|
//! | `session` | one WebSocket: who may open it, its frames, its end |
//! | `exec` | a command whose output streams, and which ends with its client |
//! | `process` | watches a process that lives on |
//! | `pty` | a terminal, which can be left and found again by its tag |
//! | `watch` | the events of a process as frames |
//! | `text` | bytes as text, with no character torn apart |
//!
//! A node that stops closes its sessions with code 1001 and leaves the processes alone: the client attaches again,
//! here or at any other node, by process id or tag.

mod exec;
mod process;
mod pty;
mod session;
mod text;
mod watch;

pub(super) use exec::{__path_exec_stream, exec_stream};
pub(super) use process::{__path_process_stream, process_stream};
pub(super) use pty::{__path_pty, pty};
pub(super) use session::Sessions;
