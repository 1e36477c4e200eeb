//! The Cloud Hypervisor driver, for hosts whose KVM runs Linux.
//!
//! [`config`] says what machine it builds and [`machine`] how that is called, [`spawn`] starts it,
//! [`api`] tells it what to do, [`events`] hears what it does by itself, [`version`] knows its
//! releases. A guest leaves and enters it by its migration protocol ([`offload`]), with us as the
//! other side: its memory is a memfd of ours all the time, and what goes over are two documents,
//! which [`kept`] turns into a file and back.
//!
//! A saved guest's hand-over is left open at its last question. Cloud Hypervisor waits, the guest
//! stands still, and when it is to go on the question is answered with a refusal: to Cloud
//! Hypervisor that is a migration that failed, and it has the guest as before. No other way is
//! there in its release 53 to save a guest and have it go on.

pub mod api;
pub mod config;
pub mod events;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod http;
pub mod kept;
pub mod layout;
pub mod machine;
pub mod noise;
pub mod offload;
pub mod sockets;
pub mod spawn;
pub mod version;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::pager::post_copy::Questions;
use crate::pager::region::Region;
use crate::vmm::cloud_hypervisor::api::{Api, ApiError, Call, Pending};
use crate::vmm::cloud_hypervisor::events::Events;
use crate::vmm::cloud_hypervisor::kept::{Foundation, Kept, KeptError};
use crate::vmm::cloud_hypervisor::noise::Refusals;
use crate::vmm::cloud_hypervisor::offload::OffloadError;
use crate::vmm::cloud_hypervisor::offload::link::{self, Given, Held};
use crate::vmm::cloud_hypervisor::sockets::{Nameless, path_of};
use crate::vmm::cloud_hypervisor::version::Known;
use crate::vmm::error::MoveStateError;
use crate::vmm::process::{VmmProcess, rest};
use crate::vmm::{Hardware, Vmm, VmmError, VmmExit};

/// How long a dead VMM's last reports are looked for; they are in the pipe already.
const LAST_REPORTS: Duration = Duration::from_millis(100);
/// Pause between two attempts while it is still busy with a hand-over that was called off, at
/// first.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// What it says to everything while a hand-over is under way.
const BUSY: &str = "migrating";
/// As many orders to go on may go unanswered in a row before it counts as hung and is killed. Each
/// has had the time of whoever gave it, and a guest that stands still loses nothing by one more.
const MAX_MISSED: u32 = 3;
/// The reason of that end.
const SILENT: &str = "vmm-silent";
/// What it says to a save as long as it asks for pages.
const RESTORING: &str = "on-demand memory restore";
/// No address: a guest is never laid open there. Whether it asks for pages it looks at first.
const NOWHERE: &str = "";
/// How a process ends to which its own filter of system calls objects; the second in the jail, where
/// the first process of a namespace cannot raise a signal that kills it.
const FILTERED: [Signal; 2] = [Signal::SIGSYS, Signal::SIGSEGV];

/// A machine that waits for its guest's state.
#[derive(Debug)]
pub struct Incoming {
    given: Given,
    /// Of the call that has been under way since.
    answer: Pending,
    foundation: Foundation,
    /// On which it asks for pages, where it does, until somebody has taken it.
    questions: Option<Questions>,
}

/// What stands between the guest and its going on.
#[derive(Debug, Default)]
struct Pass {
    held: Option<Held>,
    incoming: Option<Incoming>,
}

/// One running Cloud Hypervisor.
#[derive(Debug)]
pub struct CloudHypervisor {
    process: Arc<VmmProcess>,
    api: Api,
    /// The API is reached through it.
    _api_inode: OwnedFd,
    /// Where it lays its guest open. The VMM has its inode under the same number.
    saves: Nameless,
    events: Events,
    memory: OwnedFd,
    region: Region,
    known: Known,
    version: String,
    hardware: Hardware,
    /// Whether it may still ask for pages of its guest.
    asks: AtomicBool,
    pass: Mutex<Pass>,
    refusals: Refusals,
    told_to_quit: AtomicBool,
    /// Whether we have stopped its process: then it hears nothing, and is not to blame for it.
    stopped: AtomicBool,
    /// How many orders to go on it has not answered, since the last that it did.
    missed: AtomicU32,
}

impl CloudHypervisor {
    fn new(
        process: Arc<VmmProcess>,
        api: (Api, OwnedFd),
        saves: Nameless,
        heard: (Events, Refusals),
        memory: (OwnedFd, Region),
        identity: (Known, String, Hardware),
        incoming: Option<Incoming>,
    ) -> Self {
        let (known, version, hardware) = identity;
        let asks = incoming.as_ref().is_some_and(|it| it.questions.is_some());
        Self {
            process,
            api: api.0,
            _api_inode: api.1,
            saves,
            events: heard.0,
            memory: memory.0,
            region: memory.1,
            known,
            version,
            hardware,
            asks: AtomicBool::new(asks),
            pass: Mutex::new(Pass {
                held: None,
                incoming,
            }),
            refusals: heard.1,
            told_to_quit: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            missed: AtomicU32::new(0),
        }
    }

    /// Brings the guest into `wanted` by `call`. One that is there already is left in peace, and as
    /// long as a hand-over is being called off we wait.
    fn bring(&self, call: &Call<'_>, wanted: &str, deadline: Instant) -> Result<(), ApiError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let refused = match self.api.call(call, deadline) {
                Err(ApiError::Refused {
                    reason,
                    status,
                    call,
                }) => ApiError::Refused {
                    call,
                    status,
                    reason,
                },
                told => return told.map(drop),
            };
            let busy =
                matches!(&refused, ApiError::Refused { reason, .. } if reason.contains(BUSY));
            if !busy {
                let there = self.api.info(deadline)?.state == wanted;
                return if there { Ok(()) } else { Err(refused) };
            }
            // It may be held by a save that was given up before it had connected to us.
            self.saves.turn_away();
            if !rest(&mut pause, deadline) {
                return Err(refused);
            }
        }
    }

    fn save(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<Held, MoveStateError> {
        self.await_pages(deadline)?;
        self.bring(&Call::Pause, "Paused", deadline)?;
        self.saves.turn_away();
        let place = path_of(self.saves.inode());
        let address = format!("unix:{}", place.display());
        self.api.call(&Call::Send(&address), deadline)?;
        const DOING: &str = "waiting for it to lay the guest open";
        let socket = |source| OffloadError::Socket {
            doing: DOING,
            source,
        };
        let stream = self.saves.accept(self.process.pidfd(), deadline);
        let taken = stream
            .map_err(socket)
            .and_then(|stream| link::take(stream, self.memory.as_fd(), deadline));
        let taken = taken.map_err(|err| self.explained(err))?;
        let foundation = Foundation::of_config(&taken.config, self.region.bytes())?;
        same_slots(&taken.slots, &foundation.slots())?;
        let kept = Kept {
            machine: self.hardware.machine.clone(),
            foundation,
            state: taken.state,
        };
        let bytes = kept.encode()?;
        let mut file = own(file)?;
        file.write_all(&bytes).map_err(MoveStateError::File)?;
        Ok(taken.held)
    }

    /// Waits until it has asked for all of its guest's pages, while that runs: before, it cannot be
    /// saved. It is asked for a save to nowhere, which it refuses in any case, and for this reason
    /// before any other.
    fn await_pages(&self, deadline: Instant) -> Result<(), MoveStateError> {
        let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
        let mut is_asking = false;
        while self.asks.load(Ordering::Relaxed) {
            match self.api.call(&Call::Send(NOWHERE), deadline) {
                Err(ApiError::Refused { reason, .. }) if reason.contains(RESTORING) => {
                    is_asking = true;
                }
                // Out of time in the middle of being told so once more.
                Err(ApiError::TimedOut { .. }) if is_asking => {}
                Ok(_) | Err(ApiError::Refused { .. }) => {
                    self.asks.store(false, Ordering::Relaxed);
                    break;
                }
                Err(err) => return Err(err.into()),
            }
            if !rest(&mut pause, deadline) {
                let waited = began.elapsed();
                return Err(MoveStateError::PagesMissing { waited });
            }
        }
        Ok(())
    }

    /// Why it went away in a save, where that is known of its release: whoever has the wrong build of
    /// it should be told so.
    fn explained(&self, err: OffloadError) -> MoveStateError {
        let is_gone = match &err {
            OffloadError::Closed { .. } => true,
            OffloadError::Socket { source, .. } => {
                source.kind() == io::ErrorKind::ConnectionAborted
            }
            _ => false,
        };
        if !is_gone || !self.known.behaviour.filter_ends_glibc_save {
            return err.into();
        }
        let exit = self.process.wait(Instant::now() + LAST_REPORTS);
        let signal = exit.ok().flatten().and_then(|exit| exit.signal);
        let filtered = FILTERED.iter().find(|it| Some(**it as i32) == signal);
        let Some(signal) = filtered else {
            return err.into();
        };
        let version = self.known.version;
        let reason = format!(
            "it ended by {signal} in the save, as {version} does by its filter of system calls where it \
             was built against glibc; the official static build does not"
        );
        MoveStateError::GaveUp { reason }
    }

    fn load(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), MoveStateError> {
        let Some(incoming) = self.pass().incoming.take() else {
            return Err(MoveStateError::GaveUp {
                reason: "it does not wait for a guest".to_owned(),
            });
        };
        let mut bytes = Vec::new();
        let read = own(file)?.take(kept::MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(MoveStateError::File)?;
        let kept = Kept::decode(&bytes, self.region.bytes())?;
        if kept.foundation != incoming.foundation {
            return Err(KeptError::Garbled.into());
        }
        let memory = self.memory.as_fd();
        incoming.given.state(memory, &kept.state, deadline)?;
        incoming.answer.finish(deadline)?;
        Ok(())
    }

    fn tell(&self, verb: &'static str, outcome: Result<(), ApiError>) -> Result<(), VmmError> {
        outcome.map_err(|source| VmmError::Told {
            verb,
            source: source.into(),
        })
    }

    fn pass(&self) -> MutexGuard<'_, Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a VMM that hangs: its guest would stand still for ever. `told` is how an order to go on
    /// has ended.
    fn count_silence(&self, told: &Result<(), ApiError>) {
        let is_silent = matches!(told, Err(ApiError::TimedOut { .. }));
        if !is_silent || self.stopped.load(Ordering::Relaxed) {
            return self.missed.store(0, Ordering::Relaxed);
        }
        if self.missed.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_MISSED {
            // One that cannot be killed is tried again with the next order.
            let _tried = self.process.kill();
        }
    }

    /// Calls off the hand-over of a saved guest: the VMM keeps it. Returns whether there was one.
    fn keep_guest(&self) -> bool {
        let Some(held) = self.pass().held.take() else {
            return false;
        };
        self.refusals.expect_one();
        held.keep_it();
        true
    }
}

impl Vmm for CloudHypervisor {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    fn pause(&self, deadline: Instant) -> Result<(), VmmError> {
        self.tell("pause", self.bring(&Call::Pause, "Paused", deadline))
    }

    fn resume(&self, deadline: Instant) -> Result<(), VmmError> {
        self.keep_guest();
        let told = self.bring(&Call::Resume, "Running", deadline);
        self.count_silence(&told);
        self.tell("resume", told)
    }

    fn save_state(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), VmmError> {
        if self.pass().held.is_some() {
            return Err(VmmError::Save(MoveStateError::GaveUp {
                reason: "the guest is saved already".to_owned(),
            }));
        }
        // Whatever fails drops the connection, and with it the hand-over.
        let held = self.save(file, deadline).map_err(VmmError::Save)?;
        self.pass().held = Some(held);
        Ok(())
    }

    fn load_state(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), VmmError> {
        self.load(file, deadline).map_err(VmmError::Load)
    }

    fn take_questions(&self) -> Option<Questions> {
        self.pass().incoming.as_mut()?.questions.take()
    }

    fn shutdown(&self, deadline: Instant) -> Result<(), VmmError> {
        let pressed = self.api.call(&Call::PowerButton, deadline).map(drop);
        self.tell("press the power button", pressed)
    }

    fn quit(&self, deadline: Instant) -> Result<(), VmmError> {
        self.told_to_quit.store(true, Ordering::Relaxed);
        if self.keep_guest() {
            // Until it has its guest back it says no to the next call, and ends all the same. Should
            // it not get that far, it is told to end as it is.
            let _back = self.bring(&Call::Pause, "Paused", deadline);
        }
        match self.api.call(&Call::Shutdown, deadline).map(drop) {
            // It ends whatever it answers, and may be gone before its answer has left.
            Err(ApiError::Closed { .. } | ApiError::Refused { .. }) => Ok(()),
            outcome => self.tell("quit", outcome),
        }
    }

    fn freeze(&self) -> Result<(), VmmError> {
        self.stopped.store(true, Ordering::Relaxed);
        self.process.freeze()
    }

    fn thaw(&self) -> Result<(), VmmError> {
        self.process.thaw()?;
        self.stopped.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn kill(&self) -> Result<(), VmmError> {
        self.process.kill()
    }

    fn wait(&self, deadline: Instant) -> Result<Option<VmmExit>, VmmError> {
        let Some(mut exit) = self.process.wait(deadline)? else {
            return Ok(None);
        };
        self.events.await_end(Instant::now() + LAST_REPORTS);
        if self.told_to_quit.load(Ordering::Relaxed) {
            "host-quit".clone_into(&mut exit.reason);
        } else if self.missed.load(Ordering::Relaxed) >= MAX_MISSED {
            SILENT.clone_into(&mut exit.reason);
        } else if exit.reason.is_empty() {
            self.events.last_words().clone_into(&mut exit.reason);
        }
        Ok(Some(exit))
    }
}

/// The descriptors that came must be those of the layout: one too few would be mapped from nothing.
fn same_slots(came: &[u32], wanted: &[u32]) -> Result<(), OffloadError> {
    let missing = wanted.iter().find(|slot| !came.contains(slot));
    let unknown = came.iter().find(|slot| !wanted.contains(slot));
    match (missing, unknown) {
        (None, None) => Ok(()),
        (Some(&slot), _) => Err(OffloadError::Slot {
            slot,
            what: "in its layout, and sent no memory for it",
        }),
        (None, Some(&slot)) => Err(OffloadError::Slot {
            slot,
            what: "that is not in its layout",
        }),
    }
}

fn own(file: BorrowedFd<'_>) -> Result<File, MoveStateError> {
    let owned = file.try_clone_to_owned().map_err(MoveStateError::File)?;
    Ok(File::from(owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_without_memory_or_memory_without_a_slot_is_no_guest() {
        same_slots(&[1, 0], &[0, 1]).expect("all of them");
        let missing = same_slots(&[0], &[0, 1]).expect_err("one is missing");
        assert!(missing.to_string().contains("slot 1"), "{missing}");
        assert!(same_slots(&[0, 7], &[0]).is_err());
    }
}
