//! Terminals in a guest: start one, type into it, resize it.
//!
//! What it shows comes as [`ProcessEvent::Pty`](super::ProcessEvent::Pty) from the stream of its process.

use bytes::Bytes;
use proto::envd::process as pb;
use proto::envd::process::__buffa::oneof::process_input;

use super::error::GuestError;
use super::http::{Guest, bounded};
use super::process::{EventStream, ProcessCommand, Selector};

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Characters in a line.
    pub cols: u16,
    /// Lines.
    pub rows: u16,
}

impl TerminalSize {
    fn into_wire(self) -> pb::PTY {
        pb::PTY {
            size: pb::pty::Size {
                cols: self.cols.into(),
                rows: self.rows.into(),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        }
    }
}

impl Guest {
    /// Starts a process on a terminal of its own. It lives on when nobody watches it.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where the agent will not start it.
    pub async fn start_terminal(
        &self,
        command: ProcessCommand,
        size: TerminalSize,
    ) -> Result<EventStream, GuestError> {
        let user = command.user.clone();
        let mut request = command.into_wire();
        request.pty = size.into_wire().into();
        self.open(request, user, None).await
    }

    /// Types `input` into a terminal. Calls that follow one another arrive in order.
    ///
    /// # Errors
    /// [`GuestCode::NotFound`](super::GuestCode::NotFound) where no live process is meant.
    pub async fn type_into(&self, terminal: Selector, input: Bytes) -> Result<(), GuestError> {
        let input = pb::ProcessInput {
            input: Some(process_input::Input::Pty(input.into())),
            ..Default::default()
        };
        let request = pb::SendInputRequest {
            process: terminal.into_wire().into(),
            input: input.into(),
            ..Default::default()
        };
        bounded(self.process().send_input(request)).await?;
        Ok(())
    }

    /// Gives a terminal another size; its foreground process is told.
    ///
    /// # Errors
    /// [`GuestCode::NotFound`](super::GuestCode::NotFound) where no live process is meant.
    pub async fn resize(&self, terminal: Selector, size: TerminalSize) -> Result<(), GuestError> {
        let request = pb::UpdateRequest {
            process: terminal.into_wire().into(),
            pty: size.into_wire().into(),
            ..Default::default()
        };
        bounded(self.process().update(request)).await?;
        Ok(())
    }
}
