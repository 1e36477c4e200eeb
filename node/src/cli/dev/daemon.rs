//! Starting and stopping a node's process, and knowing whether it lives.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use http::Method;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{self, Instant};

use super::super::client::Client;
use super::super::error::CliError;
use super::super::{find, print};
use super::cluster::{Node, failed};
use super::partition::{API_PORT, BULK_PORT, CONTROL_PORT};
use super::ports::{self, Protocol};

/// Longest a node may take to serve: it probes the accelerator by booting a guest, emulated
/// where it must be, on a machine that may be busy.
const START_TIMEOUT: Duration = Duration::from_secs(180);
/// Longest an orderly stop may take: requests under way are given 8 s, the log less.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest a killed process may take to vanish.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest a sign of life may take.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two looks at a process.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Names the token that a starting node joins with.
const TOKEN_VARIABLE: &str = "WRENN_JOIN_TOKEN";
/// Lines of a failed node's log that are shown.
const LOG_LINES: usize = 20;

/// How a node is started.
#[derive(Debug)]
pub(super) struct Launch {
    /// The first of its ports.
    pub(super) port: u16,
    /// What it is told.
    pub(super) args: Vec<String>,
    /// The token it joins with, if it does.
    pub(super) token: Option<String>,
}

/// Starts a node unless it runs, and waits until it serves.
pub(super) async fn start(node: &Node, launch: Launch) -> Result<(), CliError> {
    if node.is_healthy().await {
        return Ok(());
    }
    if node.pid().is_some() {
        let number = node.number;
        let err = CliError::new(format!("node {number} runs but does not answer"));
        return Err(err.hint(format!(
            "`wrenn dev resume {number}` if it is paused, else `wrenn dev kill {number}`"
        )));
    }
    ports::check_free(Protocol::Tcp, launch.port + API_PORT)?;
    ports::check_free(Protocol::Udp, launch.port + CONTROL_PORT)?;
    ports::check_free(Protocol::Udp, launch.port + BULK_PORT)?;
    let mut child = spawn(node, launch)?;
    wait_ready(node, &mut child).await.map_err(|why| {
        print::note(&log_tail(node));
        CliError::new(format!("node {} did not start: {why}", node.number)).hint(format!(
            "`wrenn doctor`; the log is {}",
            node.log().display()
        ))
    })
}

fn spawn(node: &Node, launch: Launch) -> Result<Child, CliError> {
    let data_dir = node.data_dir();
    fs::create_dir_all(&data_dir).map_err(|err| failed("make", &data_dir, &err))?;
    let log_path = node.log();
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.map_err(|err| failed("open", &log_path, &err))?;
    let errors = log
        .try_clone()
        .map_err(|err| failed("open", &log_path, &err))?;
    let program =
        std::env::current_exe().map_err(|err| CliError::from_error("find this program", &err))?;
    let mut command = Command::new(&program);
    // Through the environment, since everybody can read arguments; and only the one meant.
    command.env_remove(TOKEN_VARIABLE);
    command.envs(launch.token.map(|token| (TOKEN_VARIABLE, token)));
    let child = command
        .args(launch.args)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .map_err(|err| failed("start", &program, &err))?;
    let pid_file = node.pid_file();
    fs::write(&pid_file, child.id().to_string()).map_err(|err| failed("write", &pid_file, &err))?;
    Ok(child)
}

/// Waits until the node serves. A node that does not in time is ended.
async fn wait_ready(node: &Node, child: &mut Child) -> Result<(), String> {
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("it ended with {status}"));
        }
        if node.is_healthy().await {
            return Ok(());
        }
        time::sleep(POLL_INTERVAL).await;
    }
    // It is ours and unreaped, so the number cannot mean another process.
    let _ended_meanwhile = child.kill();
    let _status = child.wait();
    Err(format!("it did not serve within {START_TIMEOUT:?}"))
}

fn log_tail(node: &Node) -> String {
    let log = fs::read(node.log()).unwrap_or_default();
    let text = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
    format!(
        "--- end of {}\n{}\n---",
        node.log().display(),
        tail.join("\n")
    )
}

impl Node {
    /// Its process, if it runs: ready, starting or hung.
    pub(super) fn pid(&self) -> Option<Pid> {
        let written = fs::read_to_string(self.pid_file()).ok();
        let started = written.and_then(|text| text.trim().parse().ok());
        let ready = find::ready(&self.data_dir()).map(|ready| ready.pid);
        [started, ready]
            .into_iter()
            .flatten()
            .find(|pid| self.is_ours(*pid))
            .map(Pid::from_raw)
    }

    /// Whether it runs, said that it is ready, and answers.
    pub(super) async fn is_healthy(&self) -> bool {
        let Some(ready) = find::ready(&self.data_dir()) else {
            return false;
        };
        if !self.is_ours(ready.pid) {
            return false;
        }
        let Ok(client) = Client::new(&ready.url, "") else {
            return false;
        };
        let asked = client.call_within(Method::GET, "/healthz", None, HEALTH_TIMEOUT);
        asked.await.is_ok()
    }

    /// Stops it in order; an error if it does not stop.
    pub(super) async fn stop(&self) -> Result<(), CliError> {
        let stopped = self.end(Signal::SIGTERM, STOP_TIMEOUT).await?;
        if stopped {
            return Ok(());
        }
        let message = format!("node {} did not stop within {STOP_TIMEOUT:?}", self.number);
        Err(CliError::new(message).hint(format!("`wrenn dev kill {}`", self.number)))
    }

    /// Ends it at once.
    pub(super) async fn kill(&self) -> Result<(), CliError> {
        if self.end(Signal::SIGKILL, KILL_TIMEOUT).await? {
            return Ok(());
        }
        let message = format!(
            "node {} cannot be killed: it hangs in the kernel",
            self.number
        );
        Err(CliError::new(message))
    }

    /// Stops it in order if that works in time, else ends it.
    pub(super) async fn stop_or_kill(&self) -> Result<(), CliError> {
        if self.end(Signal::SIGTERM, STOP_TIMEOUT).await? {
            return Ok(());
        }
        self.kill().await
    }

    /// Stops it from running, with everything it holds kept, as a machine that hangs.
    pub(super) fn pause(&self) -> Result<(), CliError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it run again.
    pub(super) fn resume(&self) -> Result<(), CliError> {
        self.signal(Signal::SIGCONT)
    }

    /// Whether it is paused.
    pub(super) fn is_paused(&self) -> bool {
        let stat = self
            .pid()
            .map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")));
        let stat = stat.and_then(Result::ok).unwrap_or_default();
        // The state follows the name, which ends at the last bracket.
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        state.is_some_and(|state| state.starts_with('T'))
    }

    fn signal(&self, signal: Signal) -> Result<(), CliError> {
        let Some(pid) = self.pid() else {
            let err = CliError::new(format!("node {} does not run", self.number));
            return Err(err.hint(format!("`wrenn dev start {}`", self.number)));
        };
        self.send(pid, signal)
    }

    /// Signals the process; one that has just ended needs no more signals.
    fn send(&self, pid: Pid, signal: Signal) -> Result<(), CliError> {
        match kill(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(err) => {
                let doing = format!("signal node {} (process {pid})", self.number);
                Err(CliError::from_error(&doing, &err))
            }
        }
    }

    /// Signals the process and waits until it is gone; `false` if it is not in time.
    async fn end(&self, signal: Signal, timeout: Duration) -> Result<bool, CliError> {
        let Some(pid) = self.pid() else {
            return Ok(true);
        };
        self.send(pid, signal)?;
        // A paused process would take no notice.
        self.send(pid, Signal::SIGCONT)?;
        let deadline = Instant::now() + timeout;
        while self.is_ours(pid.as_raw()) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            time::sleep(POLL_INTERVAL).await;
        }
        Ok(true)
    }

    /// Whether process `pid` is this node's daemon: a process id by itself may be anybody's.
    fn is_ours(&self, pid: i32) -> bool {
        let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let data_dir = self.data_dir();
        let wanted = data_dir.as_os_str().as_encoded_bytes();
        let mut words = cmdline.split(|byte| *byte == 0);
        words.any(|word| word == wanted)
    }
}
