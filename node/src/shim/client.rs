//! The daemon's half: starting a shim, calling it, and calling it again after a restart.
//!
//! A [`ShimClient`] is the directory and who answered there; every call opens a connection of its
//! own. So nothing is lost with a daemon, two calls never wait for each other, and dropping a
//! call's future just hangs up. What the shim can no longer answer, its `exit.json` does.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::version;
use proto::wire::shim::request::Call;
use proto::wire::shim::response::Answer;
use proto::wire::shim::{self as wire, Request, Response};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::task;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::shim::error::{CallShimError, SpawnShimError};
use crate::shim::exit::ExitRecord;
use crate::shim::files::SocketPath;
use crate::shim::main::{COMMAND, DIR_OPTION};
use crate::shim::protocol::{self, FrameError};
use crate::shim::restore::RESTORE_TIMEOUT;
use crate::shim::saved::{GuestStand, PagingStatus, RestoreTimings, Saved};
use crate::shim::spec::ShimSpec;
use crate::vmm::Hardware;

/// Longest time from starting a shim to its verdict, unless it restores a guest. The shim itself
/// gives up after 15 s.
const SPAWN_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time a living shim takes to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// What ending a VMM may take beyond the grace: telling it, asking it to quit, killing it.
const STOP_MARGIN: Duration = Duration::from_secs(20);
/// What a save may take beyond the time its guest may stand still: calling it off, and letting the
/// guest go on.
const SAVE_MARGIN: Duration = Duration::from_secs(20);
/// Longest time for a guest to go on; the shim itself gives up after 10 s.
const THAW_TIMEOUT: Duration = Duration::from_secs(15);
/// How long after a broken call the exit record is looked for: the shim writes it before it
/// tells anybody, so only a busy disk lies between.
const RECORD_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is looked for.
const RECORD_INTERVAL: Duration = Duration::from_millis(50);

/// Who a shim says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShimStatus {
    /// Whose guest it runs.
    pub sandbox: SandboxId,
    /// Under which ownership.
    pub epoch: Epoch,
    /// The shim's process.
    pub shim_pid: u32,
    /// The VMM's process.
    pub vmm_pid: u32,
    /// The VMM's version.
    pub vmm_version: String,
    /// What runs the guest's instructions.
    pub accelerator: String,
    /// How long the VMM took from its spawn to its first answer.
    pub vmm_start: Duration,
    /// Whether the guest runs only under the node's lease.
    pub lease_bound: bool,
    /// Whether the guest is frozen, because the lease has ended.
    pub frozen: bool,
    /// What its virtual CPUs do by order of the daemon.
    pub stand: GuestStand,
    /// The hardware that a snapshot of the guest needs; both names are empty from a shim of a
    /// release that could not save.
    pub hardware: Hardware,
    /// Of a guest that was restored: how long its memory and its devices took.
    pub restored: Option<RestoreTimings>,
    /// Of a guest whose memory comes as it is touched: how.
    pub paging: Option<PagingStatus>,
}

/// A shim that has answered.
#[derive(Clone, Debug)]
pub struct ShimClient {
    dir: Arc<Path>,
    status: Arc<ShimStatus>,
}

/// Starts a shim in `dir` for `spec` and returns when its VMM runs. `wrenn` is our executable.
///
/// A dropped future may leave a shim that comes up all the same: sweep the directory
/// ([`super::sweep::kill_leftovers`]). So may [`SpawnShimError::TimedOut`].
///
/// # Errors
/// See [`SpawnShimError`].
pub async fn spawn(
    dir: &Path,
    spec: &ShimSpec,
    wrenn: &Path,
) -> Result<ShimClient, SpawnShimError> {
    let dir = write_spec(dir, spec).await?;
    let start_failed = |source| SpawnShimError::Start {
        program: wrenn.to_owned(),
        source,
    };
    let starter = Command::new(wrenn)
        .arg(COMMAND)
        .arg(DIR_OPTION)
        .arg(&dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start_failed)?;
    let started = Instant::now();
    let verdict = timeout(spawn_timeout(spec), starter.wait_with_output())
        .await
        .map_err(|_| SpawnShimError::TimedOut {
            waited: started.elapsed(),
        })?
        .map_err(start_failed)?;
    if !verdict.status.success() {
        return Err(SpawnShimError::GaveUp {
            reason: String::from_utf8_lossy(&verdict.stderr).trim().to_owned(),
        });
    }
    connect(&dir).await.map_err(SpawnShimError::Greet)
}

fn spawn_timeout(spec: &ShimSpec) -> Duration {
    match spec.restore {
        None => SPAWN_TIMEOUT,
        Some(_) => SPAWN_TIMEOUT + RESTORE_TIMEOUT,
    }
}

/// Finds the shim that runs in `dir`, however it came there.
///
/// # Errors
/// See [`CallShimError`]; [`CallShimError::Gone`] when nobody listens.
pub async fn connect(dir: &Path) -> Result<ShimClient, CallShimError> {
    let dir: Arc<Path> = dir.into();
    let status = Arc::new(hello(&dir).await?);
    Ok(ShimClient { dir, status })
}

impl ShimClient {
    /// The sandbox's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Who answered when this client was made.
    #[must_use]
    pub fn known_status(&self) -> &ShimStatus {
        &self.status
    }

    /// Asks the shim who it is, now: also tells whether it lives.
    ///
    /// # Errors
    /// See [`CallShimError`].
    pub async fn status(&self) -> Result<ShimStatus, CallShimError> {
        hello(&self.dir).await
    }

    /// Powers the guest off and ends the VMM after `grace` (at once if it is zero). A VMM that
    /// has ended already is a success. Dropping the future does not stop the stopping.
    ///
    /// # Errors
    /// See [`CallShimError`]; [`CallShimError::Gone`] when the shim was killed.
    pub async fn stop(&self, grace: Duration) -> Result<ExitRecord, CallShimError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let deadline = Instant::now() + grace + STOP_MARGIN;
        self.exit_from(Call::Stop(wire::Stop { grace_ms }), deadline)
            .await
    }

    /// Waits for the end of the VMM; `None` when `deadline` came first.
    ///
    /// # Errors
    /// See [`CallShimError`]; [`CallShimError::Gone`] when the shim was killed, and its VMM
    /// with it.
    pub async fn wait_exit(&self, deadline: Instant) -> Result<Option<ExitRecord>, CallShimError> {
        let call = Call::WaitExit(wire::WaitExit {});
        match self.exit_from(call, deadline).await {
            Ok(record) => Ok(Some(record)),
            Err(CallShimError::TimedOut { .. }) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Waits until the guest is frozen or thawed, seen from `known`, and returns what it is by
    /// then; `None` when `deadline` came first.
    ///
    /// # Errors
    /// See [`CallShimError`]; [`CallShimError::Failed`] or [`CallShimError::Gone`] when the VMM
    /// has ended, which [`Self::wait_exit`] tells better.
    pub async fn wait_freeze(
        &self,
        known: bool,
        deadline: Instant,
    ) -> Result<Option<bool>, CallShimError> {
        let call = Call::WaitFreeze(wire::WaitFreeze { frozen: known });
        match call_shim(&self.dir, call, deadline).await {
            Ok(Answer::Status(status)) => Ok(Some(status.frozen)),
            Ok(Answer::Exit(_) | Answer::Saved(_) | Answer::Failure(_)) => {
                Err(CallShimError::WrongAnswer {
                    dir: self.dir.to_path_buf(),
                })
            }
            Err(CallShimError::TimedOut { .. }) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Stops the guest and writes down all of it but its memory and its disk. It stands still from
    /// then on, until [`Self::thaw`] or its end: the daemon reads its memory and its disk. Saving a
    /// saved guest tells the same again, so a later daemon can go on where this one died.
    ///
    /// `timeout` is how long the guest may stand still before it is saved; when it was not it goes
    /// on, unless [`ShimStatus::stand`] says otherwise, and then [`Self::thaw`] is to be asked
    /// until it does. Dropping the future does not stop the saving.
    ///
    /// # Errors
    /// See [`CallShimError`]; [`CallShimError::Failed`] when the guest could not be saved.
    pub async fn save(&self, timeout: Duration) -> Result<Saved, CallShimError> {
        self.save_as(timeout, false).await
    }

    /// The same of a guest whose last seal is lost: its pages are listed as of its resume.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub async fn save_since_resume(&self, timeout: Duration) -> Result<Saved, CallShimError> {
        self.save_as(timeout, true).await
    }

    async fn save_as(&self, timeout: Duration, since_resume: bool) -> Result<Saved, CallShimError> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let deadline = Instant::now() + timeout + SAVE_MARGIN;
        let call = Call::Save(wire::Save {
            timeout_ms,
            since_resume,
        });
        let wrong = || CallShimError::WrongAnswer {
            dir: self.dir.to_path_buf(),
        };
        match call_shim(&self.dir, call, deadline).await? {
            Answer::Saved(saved) => Saved::from_wire(&self.dir, saved).ok_or_else(wrong),
            _ => Err(wrong()),
        }
    }

    /// Lets a guest that stands still go on: one that was saved, or restored. No harm to one that
    /// runs. With `sealed` the caller has kept what was saved, and noted as what on the disk: the next
    /// save may list later writes alone ([`Basis::LastSeal`](super::dirty::Basis::LastSeal)).
    ///
    /// # Errors
    /// See [`CallShimError`]; [`CallShimError::Failed`] when it does not go on. Asking again is
    /// no harm.
    pub async fn thaw(&self, sealed: bool) -> Result<(), CallShimError> {
        let deadline = Instant::now() + THAW_TIMEOUT;
        match call_shim(&self.dir, Call::Thaw(wire::Thaw { sealed }), deadline).await? {
            Answer::Status(_) => Ok(()),
            _ => Err(CallShimError::WrongAnswer {
                dir: self.dir.to_path_buf(),
            }),
        }
    }

    /// Says that a guest that was restored is ready: what it has touched by now is its working set.
    /// No harm to any other, nor if it is said twice.
    ///
    /// # Errors
    /// See [`CallShimError`]. The guest goes on all the same, and its working set is not recorded.
    pub async fn mark_ready(&self) -> Result<(), CallShimError> {
        let deadline = Instant::now() + HELLO_TIMEOUT;
        match call_shim(&self.dir, Call::Ready(wire::Ready {}), deadline).await? {
            Answer::Status(_) => Ok(()),
            _ => Err(CallShimError::WrongAnswer {
                dir: self.dir.to_path_buf(),
            }),
        }
    }

    /// The exit that `call` is answered with, or the one on disk if nobody answers any more.
    async fn exit_from(&self, call: Call, deadline: Instant) -> Result<ExitRecord, CallShimError> {
        let broken = match call_shim(&self.dir, call, deadline).await {
            Ok(Answer::Exit(exit)) => return Ok(exit.into()),
            Ok(Answer::Status(_) | Answer::Saved(_) | Answer::Failure(_)) => {
                return Err(CallShimError::WrongAnswer {
                    dir: self.dir.to_path_buf(),
                });
            }
            Err(err @ (CallShimError::Gone { .. } | CallShimError::Frame { .. })) => err,
            Err(err) => return Err(err),
        };
        let give_up = Instant::now() + RECORD_TIMEOUT;
        loop {
            if let Some(record) = read_exit(&self.dir).await? {
                return Ok(record);
            }
            if Instant::now() >= give_up {
                // The connection broke. Whether the shim did, its socket tells by now.
                let gone = dial(&self.dir).await.err();
                let gone = gone.filter(|err| matches!(err, CallShimError::Gone { .. }));
                return Err(gone.unwrap_or(broken));
            }
            sleep(RECORD_INTERVAL).await;
        }
    }
}

/// The exit recorded in `dir`, if there is one.
///
/// # Errors
/// [`CallShimError::Files`].
pub async fn read_exit(dir: &Path) -> Result<Option<ExitRecord>, CallShimError> {
    let path = dir.to_owned();
    let read = task::spawn_blocking(move || ExitRecord::read(&path)).await;
    match read {
        Ok(read) => read.map_err(|source| CallShimError::Files {
            dir: dir.to_owned(),
            source,
        }),
        // The runtime is shutting down.
        Err(_) => Ok(None),
    }
}

async fn write_spec(dir: &Path, spec: &ShimSpec) -> Result<PathBuf, SpawnShimError> {
    let (given, spec) = (dir.to_owned(), spec.clone());
    let written = task::spawn_blocking(move || {
        let dir = given.canonicalize()?;
        spec.write(&dir)?;
        Ok(dir)
    });
    written
        .await
        .unwrap_or_else(|ended| Err(io::Error::other(ended)))
        .map_err(|source| SpawnShimError::Write {
            dir: dir.to_owned(),
            source,
        })
}

async fn hello(dir: &Path) -> Result<ShimStatus, CallShimError> {
    let deadline = Instant::now() + HELLO_TIMEOUT;
    let wrong = || CallShimError::WrongAnswer {
        dir: dir.to_owned(),
    };
    let answer = loop {
        match call_shim(dir, Call::Hello(wire::Hello {}), deadline).await {
            // Cut off rather than answered: it is going, and soon nobody listens any more.
            Err(CallShimError::Frame {
                source: FrameError::Stream(_),
                ..
            }) if Instant::now() + RECORD_INTERVAL < deadline => sleep(RECORD_INTERVAL).await,
            answered => break answered?,
        }
    };
    let Answer::Status(said) = answer else {
        return Err(wrong());
    };
    if said.protocol_version != version::SHIM {
        return Err(CallShimError::UnknownVersion {
            dir: dir.to_owned(),
            found: said.protocol_version,
            known: version::SHIM,
        });
    }
    let stand = said.stand().into();
    let restored = (said.load_us != 0).then(|| RestoreTimings {
        memory: Duration::from_micros(said.memory_us),
        load: Duration::from_micros(said.load_us),
    });
    Ok(ShimStatus {
        sandbox: SandboxId(said.sandbox.try_into().map_err(|_| wrong())?),
        epoch: Epoch(said.epoch),
        shim_pid: said.shim_pid,
        vmm_pid: said.vmm_pid,
        vmm_version: said.vmm_version,
        accelerator: said.accelerator,
        vmm_start: Duration::from_micros(said.vmm_start_us),
        lease_bound: said.lease_bound,
        frozen: said.frozen,
        stand,
        hardware: Hardware {
            machine: said.machine,
            cpu: said.cpu,
        },
        restored,
        paging: said.paging.map(PagingStatus::from),
    })
}

/// One call on a connection of its own.
async fn call_shim(dir: &Path, call: Call, deadline: Instant) -> Result<Answer, CallShimError> {
    let started = Instant::now();
    let request = Request { call: Some(call) };
    let answered = timeout_at(deadline, async {
        let mut stream = dial(dir).await?;
        let exchange = async {
            protocol::write_async(&mut stream, &request).await?;
            protocol::read_async::<Response, _>(&mut stream).await
        };
        exchange.await.map_err(|source| frame_error(dir, source))
    });
    let response = answered.await.map_err(|_| CallShimError::TimedOut {
        dir: dir.to_owned(),
        waited: started.elapsed(),
    })??;
    match response.answer {
        Some(Answer::Failure(failure)) => Err(CallShimError::Failed {
            dir: dir.to_owned(),
            message: failure.message,
        }),
        Some(answer) => Ok(answer),
        None => Err(CallShimError::WrongAnswer {
            dir: dir.to_owned(),
        }),
    }
}

async fn dial(dir: &Path) -> Result<UnixStream, CallShimError> {
    let failed = |source| not_reached(dir, source);
    let path = SocketPath::new(dir).map_err(failed)?;
    UnixStream::connect(path.as_path()).await.map_err(failed)
}

/// Only a socket that is not there, or that nobody listens on, says that the shim is gone. A node
/// out of descriptors, or a shim with a full backlog, says nothing about it: taken for its death,
/// it would cost a healthy guest.
fn not_reached(dir: &Path, source: io::Error) -> CallShimError {
    let dir = dir.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CallShimError::Gone { dir },
        _ => CallShimError::Connect { dir, source },
    }
}

fn frame_error(dir: &Path, source: FrameError) -> CallShimError {
    CallShimError::Frame {
        dir: dir.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_absent_or_deaf_socket_means_that_the_shim_is_gone() {
        let reached = |kind: io::ErrorKind| not_reached(Path::new("/d"), kind.into());
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused] {
            assert!(
                matches!(reached(kind), CallShimError::Gone { .. }),
                "{kind}"
            );
        }
        for kind in [io::ErrorKind::WouldBlock, io::ErrorKind::PermissionDenied] {
            assert!(
                matches!(reached(kind), CallShimError::Connect { .. }),
                "{kind}"
            );
        }
        let no_descriptors = io::Error::from(nix::errno::Errno::EMFILE);
        let err = not_reached(Path::new("/d"), no_descriptors);
        assert!(matches!(err, CallShimError::Connect { .. }));
    }
}
