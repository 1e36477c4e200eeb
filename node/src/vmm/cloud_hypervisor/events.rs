//! What Cloud Hypervisor reports by itself, and what is done about it.
//!
//! A stream of JSON documents comes out of a pipe. A thread of the driver reads it until the
//! process ends. Two reports matter: `rebooting`, because a guest of ours never runs twice in one
//! process (QEMU is told so; this one has no such option), so the process is ended; and who ended
//! the guest, for the exit record. The newest reports are kept for people.

use std::collections::VecDeque;
use std::io::{self, PipeReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use serde::Deserialize;

/// How many reports are kept: those of one life, from *booting* on, are a dozen.
const MAX_KEPT: usize = 64;
/// The longest report; those we know have 100 bytes.
const MAX_EVENT_BYTES: usize = 16 * 1024;
/// Stack of the thread: it parses one short document at a time.
const STACK_BYTES: usize = 128 * 1024;
/// The guest asked for a reset.
const REBOOTING: &str = "rebooting";
/// The guest's machine was switched off.
const SHUTDOWN: &str = "shutdown";

/// One report.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// What it is about: `vm`, `vmm`, `virtio-device`, …
    pub source: String,
    /// What happened.
    pub event: String,
}

/// Finds the documents in a stream that comes in pieces. Pure.
#[derive(Debug, Default)]
pub struct Splitter {
    rest: Vec<u8>,
}

impl Splitter {
    /// Takes in `bytes` and returns the reports that are whole. What is no report is left out.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut documents = serde_json::Deserializer::from_slice(&self.rest).into_iter();
        let mut spoiled = false;
        let mut done = 0;
        loop {
            match documents.next() {
                Some(Ok(event)) => events.push(event),
                // Half a document: the rest is still to come.
                Some(Err(err)) if err.is_eof() => break,
                Some(Err(_)) => {
                    spoiled = true;
                    break;
                }
                None => break,
            }
            done = documents.byte_offset();
        }
        if spoiled || self.rest.len() - done > MAX_EVENT_BYTES {
            self.rest.clear();
        } else {
            self.rest.drain(..done);
        }
        events
    }
}

/// The newest reports.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kept: Mutex<Kept>,
    told: Condvar,
}

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<Event>,
    /// No more will come.
    ended: bool,
}

impl Events {
    /// Reads `pipe` in a thread until its end. `reset` is called when the guest resets itself.
    ///
    /// # Errors
    /// The kernel has no thread to give.
    pub fn follow(mut pipe: PipeReader, reset: impl Fn() + Send + 'static) -> io::Result<Self> {
        let events = Self::default();
        let noted = events.clone();
        thread::Builder::new()
            .name("vmm-events".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut splitter = Splitter::default();
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = pipe.read(&mut bytes) {
                    for event in splitter.feed(&bytes[..count]) {
                        let resets = event.source == "vm" && event.event == REBOOTING;
                        noted.note(event);
                        if resets {
                            reset();
                        }
                    }
                }
                noted.lock().ended = true;
                noted.0.told.notify_all();
            })?;
        Ok(events)
    }

    fn note(&self, event: Event) {
        let events = &mut self.lock().events;
        if events.len() == MAX_KEPT {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// Waits until all has been read that a process wrote before it ended.
    pub fn await_end(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let goes_on = |kept: &mut Kept| !kept.ended;
        // What has come by the deadline is what there is.
        let _waited = self.0.told.wait_timeout_while(self.lock(), left, goes_on);
    }

    /// Those that are kept, the oldest first.
    #[must_use]
    pub fn newest(&self) -> Vec<Event> {
        self.lock().events.iter().cloned().collect()
    }

    /// How the guest ended, in the words that the other driver uses; empty if nothing was said.
    #[must_use]
    pub fn last_words(&self) -> &'static str {
        let kept = self.lock();
        let of_guest = kept.events.iter().filter(|event| event.source == "vm");
        let mut words = of_guest.rev().map(|event| event.event.as_str());
        match words.find(|word| [REBOOTING, SHUTDOWN].contains(word)) {
            Some(REBOOTING) => "guest-reset",
            Some(_) => "guest-shutdown",
            None => "",
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn document(event: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": 0,\n    \"nanos\": 7\n  }},\n  \
             \"source\": \"vm\",\n  \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
        )
    }

    #[test]
    fn a_guest_that_resets_itself_is_ended_and_that_is_said() {
        let (theirs, mut ours) = io::pipe().expect("a pipe");
        let (told, ended) = mpsc::channel();
        let events =
            Events::follow(theirs, move || told.send(()).expect("heard")).expect("a thread");
        ours.write_all(document("booted").as_bytes())
            .expect("written");
        assert_eq!(events.last_words(), "");
        ours.write_all(document(REBOOTING).as_bytes())
            .expect("written");
        ended.recv_timeout(Duration::from_secs(10)).expect("ended");
        assert_eq!(events.last_words(), "guest-reset");
        let names: Vec<_> = events.newest().into_iter().map(|it| it.event).collect();
        assert_eq!(names, ["booted", REBOOTING]);
    }

    #[test]
    fn few_reports_are_kept() {
        let events = Events::default();
        for number in 0..1000 {
            events.note(Event {
                source: "vm".into(),
                event: number.to_string(),
            });
        }
        let newest = events.newest();
        assert_eq!(newest.len(), MAX_KEPT);
        assert_eq!(newest.last().map(|it| it.event.as_str()), Some("999"));
    }

    #[test]
    fn noise_is_left_out_and_does_not_pile_up() {
        let mut splitter = Splitter::default();
        assert!(splitter.feed(b"no JSON at all").is_empty());
        assert_eq!(splitter.feed(document("paused").as_bytes()).len(), 1);
        for _ in 0..100 {
            assert!(splitter.feed(&[b'['; 1000]).is_empty());
            assert!(splitter.rest.len() <= MAX_EVENT_BYTES);
        }
    }

    proptest! {
        #[test]
        fn reports_are_found_however_the_stream_is_cut(cuts in prop::collection::vec(1_usize..60, 1..40)) {
            let stream = ["booting", "booted", "paused"].map(document).concat().into_bytes();
            let (mut splitter, mut found, mut rest) = (Splitter::default(), Vec::new(), &stream[..]);
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                found.extend(splitter.feed(piece));
                rest = after;
                if rest.is_empty() { break }
            }
            let names: Vec<_> = found.iter().map(|it| it.event.as_str()).collect();
            prop_assert_eq!(names, ["booting", "booted", "paused"]);
        }
    }
}
