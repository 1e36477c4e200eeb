//! What we may say while we hand a guest to Cloud Hypervisor. Pure: [`super::link`] sends.
//!
//! A phase is a type, and each step consumes it: no other order compiles.
//!
//! ```text
//! Fresh --start--> Started --memory--> Started … --config--> Configured --state--> Stated --still--> (end)
//! ```
//!
//! Cloud Hypervisor maps the memory and makes the virtual machine while it handles `Config`, and
//! touches no page before `State`. So the pager comes in between. We always end with
//! `CompletePaused`: the guest stands still until it is told to go on.

use super::codec::{Command, Request, SLOT_BYTES};

/// A request of ours, with what goes out after its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Say<'a> {
    /// The header.
    pub request: Request,
    /// What follows it.
    pub payload: Payload<'a>,
}

/// What follows a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload<'a> {
    /// Nothing.
    None,
    /// A slot's number, in one message with the memory's descriptor.
    Slot(u32),
    /// A document.
    Document(&'a [u8]),
}

/// Nothing was said yet.
#[derive(Debug, Default)]
pub struct Fresh(());

/// Our version is known.
#[derive(Debug)]
pub struct Started(());

/// The memory is mapped.
#[derive(Debug)]
pub struct Configured(());

/// The devices are as they were.
#[derive(Debug)]
pub struct Stated(());

impl Fresh {
    /// The first word.
    #[must_use]
    pub fn start(self) -> (Say<'static>, Started) {
        (say(Command::Start, Payload::None), Started(()))
    }
}

impl Started {
    /// A slot's memory. It stays in this phase: there may be more.
    #[must_use]
    pub fn memory(self, slot: u32) -> (Say<'static>, Self) {
        (say(Command::MemoryFd, Payload::Slot(slot)), self)
    }

    /// The machine.
    #[must_use]
    pub fn config(self, document: &[u8]) -> (Say<'_>, Configured) {
        let config = say(Command::Config, Payload::Document(document));
        (config, Configured(()))
    }
}

impl Configured {
    /// The devices and processors.
    #[must_use]
    pub fn state(self, document: &[u8]) -> (Say<'_>, Stated) {
        let state = say(Command::State, Payload::Document(document));
        (state, Stated(()))
    }
}

impl Stated {
    /// The end, after which the guest stands still.
    #[must_use]
    pub fn still(self) -> Say<'static> {
        say(Command::CompletePaused, Payload::None)
    }
}

fn say(command: Command, payload: Payload<'_>) -> Say<'_> {
    let length = match payload {
        Payload::None => 0,
        Payload::Slot(_) => SLOT_BYTES,
        Payload::Document(document) => document.len() as u64,
    };
    Say {
        request: Request::new(command, length),
        payload,
    }
}

#[cfg(test)]
mod tests {
    use super::super::taking::{Ask, Taking};
    use super::*;

    /// Both halves of the protocol are ours, so what one says the other has to take.
    #[test]
    fn what_we_give_we_would_take() {
        let mut taking = Taking::default();
        let mut hear = |said: Say<'_>| {
            let bytes = said.request.encode();
            let request = Request::decode(bytes).expect("well-formed");
            taking.hear(request).expect("in turn")
        };
        let (said, started) = Fresh::default().start();
        assert_eq!(hear(said), Ask::Answer);
        let (said, started) = started.memory(4);
        assert_eq!(hear(said), Ask::Slot);
        taking.slot(4).expect("new");
        let mut hear = |said: Say<'_>| taking.hear(said.request).expect("in turn");
        let (said, configured) = started.config(b"{}");
        assert_eq!(hear(said), Ask::Config(2));
        let (said, stated) = configured.state(b"{ }");
        assert_eq!(hear(said), Ask::State(3));
        assert_eq!(hear(stated.still()), Ask::Whole);
    }
}
