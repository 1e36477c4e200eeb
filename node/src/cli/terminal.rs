//! `wrenn capsule shell` where somebody sits at a terminal: a terminal in the capsule.
//!
//! Keys go there as they are pressed, so this side's terminal is raw for as long, and is put back however this ends.
//! A connection that breaks, or a node that stops, is not the end: the terminal is found again by its tag.

use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{self, Instant};

use super::capsule;
use super::client::Client;
use super::error::CliError;
use super::socket::{Frame, Socket};
use super::{exec, print};

/// How long a terminal that was lost is looked for: a node that restarts is back in a few seconds.
const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between two attempts.
const FIND_INTERVAL: Duration = Duration::from_millis(500);
/// Most bytes of keys sent in one frame; a paste is cut into such.
const KEYS_BYTES: usize = 16 << 10;
/// Frames of keys that may wait for the connection.
const KEYS_WAITING: usize = 16;

/// What to open.
pub(super) enum Wanted {
    /// A new terminal that runs this, or the default shell where it is empty.
    New(Vec<String>),
    /// The one of this tag.
    Tagged(String),
}

/// The terminal of this side, raw until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing more can be done for a terminal that refuses.
        let _refused = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Opens a terminal and stays until its program ends, whose exit code becomes this command's.
pub(super) async fn run(client: &Client, id: &str, wanted: Wanted) -> Result<ExitCode, CliError> {
    let route = format!("{}/pty", capsule::path(id)?);
    let mut socket = client.socket(&route).await?;
    socket.say(&first(wanted)).await?;
    let tag = print::progress("opening a terminal", started(&mut socket)).await?;
    let failed = |err| CliError::from_error("use this terminal", &err);
    let mut seat = Seat {
        keys: read_keys(),
        resized: signal(SignalKind::window_change()).map_err(failed)?,
        // Whose keys come from elsewhere has no terminal to change.
        _raw: io::stdin()
            .is_terminal()
            .then(Raw::enter)
            .transpose()
            .map_err(failed)?,
    };
    loop {
        match seat.sit(&mut socket).await {
            Ok(Left::Ended(code)) => return Ok(code),
            Ok(Left::Refused(why)) => return Err(CliError::new(why)),
            // What broke is looked for again, and told only where it cannot be found.
            Ok(Left::Away) | Err(_) => {}
        }
        socket = find(client, &route, &tag).await.map_err(|err| {
            err.hint(format!(
                "`wrenn capsule shell {id} --attach {tag}` finds it again"
            ))
        })?;
    }
}

fn first(wanted: Wanted) -> Value {
    let command = match wanted {
        Wanted::Tagged(tag) => return json!({"type": "connect", "tag": tag}),
        Wanted::New(command) => command,
    };
    let (cols, rows) = size();
    let mut envs = serde_json::Map::new();
    if let Ok(kind) = std::env::var("TERM") {
        envs.insert("TERM".into(), kind.into());
    }
    let mut words = command.into_iter();
    json!({
        "type": "start", "cmd": words.next().unwrap_or_default(), "args": words.collect::<Vec<_>>(),
        "cols": cols, "rows": rows, "envs": envs,
    })
}

/// Columns and rows of this terminal, 0 where it does not know.
fn size() -> (u16, u16) {
    tcgetwinsize(io::stdin()).map_or((0, 0), |size| (size.ws_col, size.ws_row))
}

/// Waits until the terminal runs; its tag.
async fn started(socket: &mut Socket) -> Result<String, CliError> {
    match socket.next().await? {
        Some(Frame::Json(told)) if told["type"] == "started" => Ok(print::text(&told, "tag")),
        Some(Frame::Json(told)) => Err(CliError::new(print::text(&told, "data"))),
        Some(Frame::Bytes(_) | Frame::Away) | None => {
            Err(CliError::new("the node closed the connection"))
        }
    }
}

/// Opens the terminal of `tag` once more, through a node that may be starting again.
async fn find(client: &Client, route: &str, tag: &str) -> Result<Socket, CliError> {
    let deadline = Instant::now() + FIND_TIMEOUT;
    loop {
        let found = async {
            let mut socket = client.socket(route).await?;
            socket.say(&first(Wanted::Tagged(tag.to_owned()))).await?;
            started(&mut socket).await?;
            tell_size(&mut socket).await?;
            Ok(socket)
        };
        match found.await {
            Err(_) if Instant::now() < deadline => time::sleep(FIND_INTERVAL).await,
            done => return done,
        }
    }
}

/// How a session ended.
enum Left {
    /// The program is over.
    Ended(ExitCode),
    /// The node says that there is nothing to go on with.
    Refused(String),
    /// The node went away, and the terminal is still there.
    Away,
}

/// Who sits at this side.
struct Seat {
    keys: mpsc::Receiver<Vec<u8>>,
    resized: Signal,
    _raw: Option<Raw>,
}

impl Seat {
    /// Passes keys there and output here until the session ends.
    async fn sit(&mut self, socket: &mut Socket) -> Result<Left, CliError> {
        loop {
            tokio::select! {
                frame = socket.next() => match frame? {
                    Some(Frame::Bytes(bytes)) => print::out(&bytes)?,
                    Some(Frame::Json(told)) => {
                        if let Some(left) = told_of(&told) {
                            return Ok(left);
                        }
                        if told["type"] == "ping" {
                            socket.say(&json!({"type": "pong"})).await?;
                        }
                    }
                    Some(Frame::Away) | None => return Ok(Left::Away),
                },
                Some(keys) = self.keys.recv() => socket.send(keys).await?,
                Some(()) = self.resized.recv() => tell_size(socket).await?,
            }
        }
    }
}

/// How the session ended, if `told` says that it did.
fn told_of(told: &Value) -> Option<Left> {
    match told["type"].as_str() {
        Some("exit") => Some(Left::Ended(exec::exit_code(told))),
        Some("error") if told["fatal"] == true => Some(Left::Refused(print::text(told, "data"))),
        _ => None,
    }
}

async fn tell_size(socket: &mut Socket) -> Result<(), CliError> {
    let (cols, rows) = size();
    if cols == 0 || rows == 0 {
        return Ok(());
    }
    let resize = json!({"type": "resize", "cols": cols, "rows": rows});
    socket.say(&resize).await
}

/// Reads what is typed, on a thread of its own: a read that waits for a key cannot be called off, and must not keep
/// this process from ending.
fn read_keys() -> mpsc::Receiver<Vec<u8>> {
    let (pressed, keys) = mpsc::channel(KEYS_WAITING);
    thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut bytes = vec![0; KEYS_BYTES];
        while let Ok(count) = stdin.read(&mut bytes) {
            if count == 0 || pressed.blocking_send(bytes[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    keys
}
