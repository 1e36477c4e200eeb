//! The management API of Cloud Hypervisor: HTTP over a unix socket, one connection a call.
//!
//! Cloud Hypervisor answers one call after the other, and some not before something else has
//! happened: a call that waits for a guest blocks all that come later. So each call has our deadline,
//! from the connect on, and one that misses it has to be taken for *perhaps done*. What is asked is
//! typed; what is answered is read as from a stranger, and bounded.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::vmm::cloud_hypervisor::config::VmConfig;
use crate::vmm::cloud_hypervisor::http::{self, Answer, MAX_ANSWER_BYTES};
use crate::vmm::cloud_hypervisor::sockets::connect;

/// Why a call failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The socket failed.
    #[error("speak with Cloud Hypervisor about {call}")]
    Socket {
        /// What it was about.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It ended, or closed the connection.
    #[error("Cloud Hypervisor closed the connection during {call}")]
    Closed {
        /// What it was about.
        call: &'static str,
    },
    /// It did not answer in time. What was asked may still be done.
    #[error("Cloud Hypervisor did not answer to {call} within {waited:?}")]
    TimedOut {
        /// What it was about.
        call: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// It said no.
    #[error("Cloud Hypervisor refused {call} with {status}: {reason}")]
    Refused {
        /// What it was about.
        call: &'static str,
        /// The HTTP status.
        status: u16,
        /// In its words, the outermost first.
        reason: String,
    },
    /// Its answer makes no sense.
    #[error("Cloud Hypervisor answered nonsense to {call}: {why}")]
    Garbled {
        /// What it was about.
        call: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Something to ask.
#[derive(Debug)]
pub enum Call<'a> {
    /// Who are you?
    Ping,
    /// Have this machine.
    Create(&'a VmConfig),
    /// Run it.
    Boot,
    /// What is it doing?
    Info,
    /// Stop its processors.
    Pause,
    /// Let them go on.
    Resume,
    /// Press its power button.
    PowerButton,
    /// End the whole process.
    Shutdown,
    /// Lay it open to whoever listens at this address. Answered once that is under way.
    Send(&'a str),
    /// Take it from whoever connects to this address. Answered once it is there.
    Receive(&'a str, MemoryMode),
}

/// How the memory of a guest comes that is taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum MemoryMode {
    /// It is there, or somebody else sees to it.
    Precopy,
    /// Cloud Hypervisor asks for each page.
    Postcopy,
}

impl Call<'_> {
    /// Its name, as in its path.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ping => "vmm.ping",
            Self::Create(_) => "vm.create",
            Self::Boot => "vm.boot",
            Self::Info => "vm.info",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::PowerButton => "vm.power-button",
            Self::Shutdown => "vmm.shutdown",
            Self::Send(_) => "vm.send-migration",
            Self::Receive(..) => "vm.receive-migration",
        }
    }

    /// The whole request.
    fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let body = match self {
            Self::Create(config) => Some(serde_json::to_vec(config)?),
            Self::Send(address) => Some(serde_json::to_vec(&SendBody {
                destination_url: address,
                local: true,
            })?),
            Self::Receive(address, mode) => Some(serde_json::to_vec(&ReceiveBody {
                receiver_url: address,
                memory_mode: *mode,
            })?),
            _ => None,
        };
        let method = match self {
            Self::Ping | Self::Info => "GET",
            _ => "PUT",
        };
        Ok(http::encode(method, self.name(), body.as_deref()))
    }
}

#[derive(Serialize)]
struct SendBody<'a> {
    destination_url: &'a str,
    local: bool,
}

#[derive(Serialize)]
struct ReceiveBody<'a> {
    receiver_url: &'a str,
    memory_mode: MemoryMode,
}

/// What `vmm.ping` answers.
#[derive(Clone, Debug, Deserialize)]
pub struct Pong {
    /// The release.
    pub version: String,
    /// What exactly was built.
    #[serde(default)]
    pub build_version: String,
}

/// What `vm.info` answers, as far as it matters.
#[derive(Clone, Debug, Deserialize)]
pub struct Info {
    /// `Created`, `Running`, `Paused`, …
    pub state: String,
}

/// The way to one Cloud Hypervisor.
#[derive(Clone, Debug)]
pub struct Api {
    path: PathBuf,
}

/// A call whose answer has not come yet.
#[derive(Debug)]
pub struct Pending {
    call: &'static str,
    stream: UnixStream,
    since: Instant,
    heard: Vec<u8>,
}

impl Api {
    /// The API behind the socket at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn call(&self, call: &Call<'_>, deadline: Instant) -> Result<Vec<u8>, ApiError> {
        self.begin(call, deadline)?.finish(deadline)
    }

    /// Asks, and leaves the answer for later.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn begin(&self, asked: &Call<'_>, deadline: Instant) -> Result<Pending, ApiError> {
        let call = asked.name();
        let socket = |source| ApiError::Socket { call, source };
        let request = asked
            .encode()
            .map_err(|err| socket(io::Error::other(err)))?;
        let since = Instant::now();
        let stream = connect(&self.path, deadline).map_err(|source| match source.kind() {
            // Nobody listens any more.
            io::ErrorKind::ConnectionRefused => ApiError::Closed { call },
            io::ErrorKind::TimedOut => ApiError::TimedOut {
                call,
                waited: since.elapsed(),
            },
            _ => socket(source),
        })?;
        let pending = Pending {
            call,
            stream,
            since,
            heard: Vec::new(),
        };
        let left = pending.left(deadline)?;
        let stream = &pending.stream;
        stream.set_write_timeout(Some(left)).map_err(socket)?;
        let mut writer = stream;
        writer
            .write_all(&request)
            .map_err(|err| pending.failed(err))?;
        Ok(pending)
    }

    /// Asks who it is.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn ping(&self, deadline: Instant) -> Result<Pong, ApiError> {
        self.ask(&Call::Ping, deadline)
    }

    /// Asks what the guest does.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn info(&self, deadline: Instant) -> Result<Info, ApiError> {
        self.ask(&Call::Info, deadline)
    }

    fn ask<A: for<'de> Deserialize<'de>>(
        &self,
        call: &Call<'_>,
        deadline: Instant,
    ) -> Result<A, ApiError> {
        let told = self.call(call, deadline)?;
        serde_json::from_slice(&told).map_err(|err| ApiError::Garbled {
            call: call.name(),
            why: err.to_string(),
        })
    }
}

impl Pending {
    /// Waits for the answer's body.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn finish(mut self, deadline: Instant) -> Result<Vec<u8>, ApiError> {
        let call = self.call;
        let mut bytes = [0; 4096];
        loop {
            let answer = http::decode(&self.heard).map_err(|err| ApiError::Garbled {
                call,
                why: err.to_string(),
            })?;
            if let Some(answer) = answer {
                return judge(call, answer);
            }
            let left = self.left(deadline)?;
            let set = self.stream.set_read_timeout(Some(left));
            set.map_err(|source| ApiError::Socket { call, source })?;
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(ApiError::Closed { call }),
                Ok(count) => self.heard.extend_from_slice(&bytes[..count]),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(self.failed(err)),
            }
            // The head says how long the body is, and is refused where that is too long.
            debug_assert!(self.heard.len() <= 2 * MAX_ANSWER_BYTES + bytes.len());
        }
    }

    fn left(&self, deadline: Instant) -> Result<Duration, ApiError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.late());
        }
        Ok(left)
    }

    fn late(&self) -> ApiError {
        ApiError::TimedOut {
            call: self.call,
            waited: self.since.elapsed(),
        }
    }

    fn failed(&self, source: io::Error) -> ApiError {
        let call = self.call;
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.late(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ApiError::Closed { call },
            _ => ApiError::Socket { call, source },
        }
    }
}

fn judge(call: &'static str, answer: Answer) -> Result<Vec<u8>, ApiError> {
    if (200..300).contains(&answer.status) {
        return Ok(answer.body);
    }
    Err(ApiError::Refused {
        call,
        status: answer.status,
        reason: reason_in(&answer.body),
    })
}

/// A refusal's body is a list of reasons in JSON; anything else is repeated as it is.
fn reason_in(body: &[u8]) -> String {
    /// Enough for a chain of reasons, and not for a page of noise.
    const MOST: usize = 2048;
    let reasons = serde_json::from_slice::<Vec<String>>(body).map(|list| list.join(": "));
    let reasons = reasons.unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned());
    if reasons.is_empty() {
        return "it gave no reason".to_owned();
    }
    reasons.chars().take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// An API that says `answer` to its first caller.
    fn answering(answer: &'static [u8]) -> (Api, tempfile::TempDir, thread::JoinHandle<Vec<u8>>) {
        let home = tempfile::tempdir().expect("tempdir");
        let path = home.path().join("api.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a caller");
            let mut request = vec![0; 4096];
            let count = stream.read(&mut request).expect("read");
            request.truncate(count);
            stream.write_all(answer).expect("written");
            request
        });
        (Api::new(path), home, served)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_call_is_asked_as_cloud_hypervisor_reads_it() {
        let (api, _home, served) = answering(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n");
        let body = api.call(&Call::Send("unix:/s"), soon()).expect("done");
        assert!(body.is_empty());
        let asked = String::from_utf8(served.join().expect("served")).expect("text");
        assert!(
            asked.starts_with("PUT /api/v1/vm.send-migration HTTP/1.1\r\n"),
            "{asked}"
        );
        assert!(
            asked.ends_with("\r\n\r\n{\"destination_url\":\"unix:/s\",\"local\":true}"),
            "{asked}"
        );
    }

    #[test]
    fn a_refusal_carries_its_reasons() {
        let (api, _home, _served) = answering(
            b"HTTP/1.1 500 \r\nContent-Length: 31\r\n\r\n[\"cannot pause\", \"not running\"]\n",
        );
        let refused = api.call(&Call::Pause, soon()).expect_err("refused");
        assert!(
            refused
                .to_string()
                .contains("vm.pause with 500: cannot pause: not running"),
            "{refused}"
        );
    }

    #[test]
    fn an_end_in_the_middle_and_silence_are_told_apart() {
        let (api, _home, _served) = answering(b"HTTP/1.1 200 \r\nContent-Length: 10\r\n\r\n12345");
        let closed = api.call(&Call::Info, soon()).expect_err("closed");
        assert!(matches!(closed, ApiError::Closed { .. }), "{closed}");

        let home = tempfile::tempdir().expect("tempdir");
        let path = home.path().join("api.sock");
        let _silent = UnixListener::bind(&path).expect("bound");
        let api = Api::new(path);
        let brief = Instant::now() + Duration::from_millis(20);
        let late = api.call(&Call::Ping, brief).expect_err("silent");
        assert!(matches!(late, ApiError::TimedOut { .. }), "{late}");
    }
}
