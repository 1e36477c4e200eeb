//! Finding the shims of earlier daemons.
//!
//! A directory tells what became of its shim, in this order: it answers; it left `exit.json`; it
//! holds the lock without answering yet (it is starting: asked again for a bounded time); it left
//! its socket behind, so it was killed; it never got as far.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::ids::SandboxId;
use tokio::task;
use tokio::time::{Instant, sleep};

use crate::shim::client::{ShimClient, connect, read_exit};
use crate::shim::error::CallShimError;
use crate::shim::exit::ExitRecord;
use crate::shim::files;

/// How long a shim that holds its lock may take to answer: it may be waiting for its VMM.
const STARTING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is asked.
const STARTING_INTERVAL: Duration = Duration::from_millis(50);

/// A sandbox's directory, and what became of its shim.
#[derive(Debug)]
pub struct Found {
    /// Whose directory it is, by its name.
    pub sandbox: SandboxId,
    /// The directory.
    pub dir: PathBuf,
    /// What became of the shim.
    pub state: FoundState,
}

/// What became of a shim.
#[derive(Debug)]
pub enum FoundState {
    /// It answers.
    Alive(ShimClient),
    /// Its VMM ended, and it said how.
    Exited(ExitRecord),
    /// The directory was made, and no shim got as far as running a guest in it.
    NeverStarted,
    /// It ran and is gone without a word, or holds the directory and does not answer. Its
    /// processes, if any, must be swept before the directory is used again.
    Dead {
        /// Why it cannot be used, for a person.
        why: CallShimError,
    },
}

/// Looks at every sandbox directory below `sandboxes`. Entries that are not named like a sandbox
/// are not ours and left out.
///
/// # Errors
/// The directory cannot be listed. One that does not exist holds no sandboxes.
pub async fn discover(sandboxes: &Path) -> io::Result<Vec<Found>> {
    let listed = sandboxes.to_owned();
    let dirs = task::spawn_blocking(move || list(&listed)).await??;
    let mut found = Vec::with_capacity(dirs.len());
    for (sandbox, dir) in dirs {
        let state = state_of(sandbox, &dir).await;
        found.push(Found {
            sandbox,
            dir,
            state,
        });
    }
    Ok(found)
}

fn list(sandboxes: &Path) -> io::Result<Vec<(SandboxId, PathBuf)>> {
    let entries = match std::fs::read_dir(sandboxes) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(err),
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry?;
        let id = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(id) = id
            && entry.file_type()?.is_dir()
        {
            dirs.push((id, entry.path()));
        }
    }
    dirs.sort();
    Ok(dirs)
}

async fn state_of(sandbox: SandboxId, dir: &Path) -> FoundState {
    let give_up = Instant::now() + STARTING_TIMEOUT;
    loop {
        let why = match connect(dir).await {
            Ok(client) => return alive(sandbox, client),
            Err(why) => why,
        };
        match read_exit(dir).await {
            Ok(Some(record)) => return FoundState::Exited(record),
            Ok(None) => {}
            Err(why) => return FoundState::Dead { why },
        }
        let held = is_held(dir).await;
        let may_come = matches!(
            why,
            CallShimError::Gone { .. } | CallShimError::Connect { .. }
        );
        if held && may_come && Instant::now() < give_up {
            sleep(STARTING_INTERVAL).await;
            continue;
        }
        let ran = held || dir.join(files::SOCKET).exists();
        return if ran {
            FoundState::Dead { why }
        } else {
            FoundState::NeverStarted
        };
    }
}

fn alive(sandbox: SandboxId, client: ShimClient) -> FoundState {
    let found = client.known_status().sandbox;
    if found == sandbox {
        FoundState::Alive(client)
    } else {
        FoundState::Dead {
            why: CallShimError::WrongSandbox {
                dir: client.dir().to_owned(),
                found,
            },
        }
    }
}

/// Whether a process has the right to be this directory's shim.
async fn is_held(dir: &Path) -> bool {
    let dir = dir.to_owned();
    task::spawn_blocking(move || {
        dir.join(files::LOCK).exists() && matches!(files::lock(&dir), Ok(None))
    })
    .await
    .unwrap_or(false)
}
