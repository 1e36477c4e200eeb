//! Starting a process: everything is prepared, a listener attached, and only then is forked.
//!
//! There is no shell in between: priority, cgroup, user and directory are set by the child itself
//! ([`crate::sys::ChildPlan`]), which also answers for a missing command with the exit codes a
//! shell would give. So arguments arrive untouched, and images without a shell work.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::input::{Input, TerminalSize};
use super::live::{CommandLine, Process};
use super::output::{Channel, Fanout, Subscription};
use super::pump::{self, Source};
use super::reap::ExitWatch;
use super::registry::{MAX_PROCESSES, Registry};
use crate::boot::cgroup::Place;
use crate::sys::{ChildPlan, ChildSpec, watch};
use crate::users::User;

/// What to start and as whom.
#[derive(Debug)]
pub struct Launch {
    /// The command line as asked for.
    pub command: CommandLine,
    /// The caller's name for it.
    pub tag: Option<String>,
    /// Who it runs as.
    pub user: User,
    /// Where it starts; must exist.
    pub cwd: PathBuf,
    /// Its whole environment.
    pub env: BTreeMap<String, String>,
    /// Whether standard input is a pipe.
    pub stdin: bool,
    /// A terminal of this size instead of pipes.
    pub terminal: Option<TerminalSize>,
    /// The group it is placed in.
    pub place: Option<Place>,
    /// When it is killed.
    pub deadline: Option<Instant>,
}

/// Why a process did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The request names no command.
    #[error("no command was given")]
    NoCommand,
    /// The working directory is missing or no directory.
    #[error("cwd '{0}' does not exist")]
    NoDirectory(PathBuf),
    /// Too many live already.
    #[error("{MAX_PROCESSES} processes are running already")]
    TooMany,
    /// Pipes or a terminal could not be made.
    #[error("open the standard streams")]
    Streams(#[source] io::Error),
    /// The kernel refused the fork or what the child does before it executes the command.
    #[error("start '{cmd}'")]
    Spawn {
        /// The command.
        cmd: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Launch {
    /// Starts the process and returns it with a listener that misses nothing.
    ///
    /// # Errors
    /// [`LaunchError`] says whether the request or the system is at fault. An unknown command is
    /// no error: the process exits with 127.
    pub fn start(
        self,
        registry: &Arc<Registry>,
    ) -> Result<(Arc<Process>, Subscription), LaunchError> {
        if self.command.cmd.is_empty() {
            return Err(LaunchError::NoCommand);
        }
        if !self.cwd.is_dir() {
            return Err(LaunchError::NoDirectory(self.cwd));
        }
        if !registry.has_room() {
            return Err(LaunchError::TooMany);
        }
        let spawn_error = |source| LaunchError::Spawn {
            cmd: self.command.cmd.clone(),
            source,
        };
        let plan = self.plan().map_err(spawn_error)?;
        let streams = Streams::open(&self).map_err(LaunchError::Streams)?;
        let (carrier, master) = streams.into_command().map_err(LaunchError::Streams)?;
        let forked = registry
            .reaper()
            .start(|| plan.spawn(carrier))
            .map_err(spawn_error)?;
        let (mut child, pid, exit) = forked;

        let output = Arc::new(Fanout::default());
        let subscription = output.subscribe();
        let (deadline, place) = (self.deadline, self.place.map(Arc::new));
        let (input, pumps) =
            connect(&mut child, master.as_ref(), &output, &exit).map_err(LaunchError::Streams)?;
        let process = Arc::new(Process {
            pid,
            command: self.command,
            tag: self.tag,
            input: tokio::sync::Mutex::new(input),
            terminal: master,
            output,
            exit,
            reaper: registry.reaper().clone(),
            place: place.as_ref().map(Arc::downgrade).unwrap_or_default(),
        });
        registry.add(process.clone());
        let (watched, registry) = (process.clone(), registry.clone());
        tokio::spawn(async move {
            watched.supervise(pumps, deadline).await;
            drop(place);
            registry.forget_in_time().await;
        });
        Ok((process, subscription))
    }

    fn plan(&self) -> io::Result<ChildPlan> {
        let cgroup_procs = self.place.as_ref().map(Place::procs_file);
        let mut argv = vec![self.command.cmd.clone()];
        argv.extend(self.command.args.iter().cloned());
        ChildPlan::new(ChildSpec {
            candidates: candidates(&self.command.cmd, self.env.get("PATH").map(String::as_str)),
            argv,
            envp: self
                .env
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect(),
            cwd: &self.cwd,
            uid: self.user.uid,
            gid: self.user.gid,
            groups: self.user.groups.clone(),
            cgroup_procs: cgroup_procs.as_deref(),
            takes_terminal: self.terminal.is_some(),
        })
    }
}

/// The files a command name may mean, in the order of the search path.
fn candidates(cmd: &str, path: Option<&str>) -> Vec<OsString> {
    if cmd.contains('/') {
        return vec![cmd.into()];
    }
    let directories = path.unwrap_or_default().split(':');
    directories
        .map(|dir| {
            Path::new(if dir.is_empty() { "." } else { dir })
                .join(cmd)
                .into()
        })
        .collect()
}

/// What becomes the child's standard streams.
enum Streams {
    Pipes { stdin: bool },
    Terminal { master: OwnedFd, slave: OwnedFd },
}

impl Streams {
    fn open(launch: &Launch) -> io::Result<Self> {
        let Some(size) = launch.terminal else {
            return Ok(Self::Pipes {
                stdin: launch.stdin,
            });
        };
        let terminal = openpty(None, None)?;
        // The descriptors must not leak into other children; ours must not block.
        fcntl(
            &terminal.master,
            FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
        )?;
        fcntl(
            &terminal.slave,
            FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
        )?;
        fcntl(
            &terminal.master,
            FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
        )?;
        if size.cols > 0 && size.rows > 0 {
            size.apply(&terminal.slave)?;
        }
        // Owned by its user, so that programs may reopen it through /dev/pts.
        let (uid, gid) = (launch.user.uid.into(), launch.user.gid.into());
        // Not owning it costs only that reopening.
        let _ = nix::unistd::fchown(&terminal.slave, Some(uid), Some(gid));
        Ok(Self::Terminal {
            master: terminal.master,
            slave: terminal.slave,
        })
    }

    /// A command that carries the streams into the fork; its program name is never used.
    fn into_command(self) -> io::Result<(Command, Option<Arc<AsyncFd<OwnedFd>>>)> {
        let mut command = Command::new("/");
        match self {
            Self::Pipes { stdin } => {
                let stdin = if stdin { Stdio::piped() } else { Stdio::null() };
                command
                    .stdin(stdin)
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                Ok((command, None))
            }
            Self::Terminal { master, slave } => {
                command
                    .stdin(slave.try_clone()?)
                    .stdout(slave.try_clone()?)
                    .stderr(slave);
                Ok((command, Some(Arc::new(watch(master)?))))
            }
        }
    }
}

type Connected = (Input, Vec<JoinHandle<()>>);

/// Takes our ends of the streams and sets the pumps going.
fn connect(
    child: &mut Child,
    master: Option<&Arc<AsyncFd<OwnedFd>>>,
    output: &Arc<Fanout>,
    exit: &ExitWatch,
) -> io::Result<Connected> {
    let pump =
        |source, channel| tokio::spawn(pump::run(source, channel, output.clone(), exit.clone()));
    if let Some(master) = master {
        let source = Source::Terminal(master.clone());
        return Ok((
            Input::Terminal(master.clone()),
            vec![pump(source, Channel::Terminal)],
        ));
    }
    let mut pumps = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        pumps.push(pump(Source::pipe(stdout)?, Channel::Stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        pumps.push(pump(Source::pipe(stderr)?, Channel::Stderr));
    }
    let input = match child.stdin.take() {
        Some(stdin) => Input::Pipe(pipe::Sender::from_owned_fd(stdin.into())?),
        None => Input::Closed,
    };
    Ok((input, pumps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_name_is_searched_and_a_path_is_not() {
        assert_eq!(
            candidates("ls", Some("/a:/b")),
            [OsString::from("/a/ls"), "/b/ls".into()]
        );
        assert_eq!(candidates("./ls", Some("/a")), [OsString::from("./ls")]);
        assert_eq!(candidates("ls", Some("")), [OsString::from("./ls")]);
    }
}
