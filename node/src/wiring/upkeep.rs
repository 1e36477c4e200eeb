//! Answers `wrenn store` of the same machine while the daemon has the store.
//!
//! A socket in the data directory, for the node's own user; one question a connection. The daemon
//! knows what the cluster names, so here a collection can be asked for.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::geteuid;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task;
use tokio::time;
use tracing::{debug, info_span, warn};

use crate::base::chain::chain;
use crate::base::socket;
use crate::base::stop::Tasks;
use crate::cluster::Proposer;
use crate::reconcile::copies;
use crate::store::Store;
use crate::store::report::{Chore, MAX_CHORE_BYTES, Told};

/// Questions under way at once: each reads the whole store, or all its manifests.
const CONNECTIONS: usize = 4;
/// Longest a connection may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after the kernel had no descriptor for a new connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What answering takes.
#[derive(Debug)]
struct Upkeep {
    store: Store,
    proposer: Proposer,
}

/// Answers on `socket` until `tasks` are stopped.
///
/// # Errors
/// The socket cannot be bound.
pub(super) fn serve(
    store: Store,
    proposer: Proposer,
    socket: &Path,
    tasks: &Tasks,
) -> io::Result<()> {
    let listener = socket::listen(socket)?;
    let upkeep = Arc::new(Upkeep { store, proposer });
    let (all, stop) = (tasks.clone(), tasks.token().clone());
    tasks.spawn(info_span!("upkeep"), async move {
        let store = upkeep.store.clone();
        stop.run_until_cancelled(accept_all(upkeep, &listener, &all))
            .await;
        // Nobody waits for their answers any more, but the process would for their end.
        store.stop_chores();
    });
    Ok(())
}

async fn accept_all(upkeep: Arc<Upkeep>, listener: &UnixListener, tasks: &Tasks) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(err) => {
                warn!(%err, "a question about the store could not be let in");
                time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let (upkeep, stop) = (Arc::clone(&upkeep), tasks.token().clone());
        tasks.spawn(info_span!("upkeep"), async move {
            let answered = stop.run_until_cancelled(upkeep.answer(&mut stream));
            if let Some(Err(err)) = answered.await {
                debug!(%err, "a question about the store was not answered");
            }
            drop(place);
        });
    }
}

impl Upkeep {
    async fn answer(&self, stream: &mut UnixStream) -> io::Result<()> {
        let peer = stream.peer_cred()?.uid();
        if peer != geteuid().as_raw() && peer != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut line = Vec::new();
        let mut limited = BufReader::new(&mut *stream).take(MAX_CHORE_BYTES);
        time::timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await??;
        let told = match serde_json::from_slice(&line) {
            Ok(chore) => self.carry_out(chore).await,
            Err(_) => Told::Failed("this daemon does not know what it is asked for".into()),
        };
        let mut answer = serde_json::to_vec(&told)?;
        answer.push(b'\n');
        stream.write_all(&answer).await
    }

    async fn carry_out(&self, chore: Chore) -> Told {
        let failed = |err: &dyn std::error::Error| Told::Failed(chain(err));
        let store = self.store.clone();
        match chore {
            Chore::Gc => match copies::collect(&self.store, &self.proposer).await {
                Ok(collected) => Told::Gc((&collected).into()),
                Err(err) => failed(&err),
            },
            Chore::Check => match task::spawn_blocking(move || store.check()).await {
                Ok(Ok(checked)) => Told::Check((&checked).into()),
                Ok(Err(err)) => failed(&err),
                Err(err) => failed(&err),
            },
            Chore::Stats => match task::spawn_blocking(move || store.stats()).await {
                Ok(Ok(stats)) => Told::Stats((&stats).into()),
                Ok(Err(err)) => failed(&err),
                Err(err) => failed(&err),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::base::clock::SystemClock;
    use crate::cluster::MemoryLog;
    use crate::store::{CheckError, Limits};

    /// Asks as the command does.
    async fn ask(socket: &Path, line: &str) -> Told {
        let mut stream = UnixStream::connect(socket).await.expect("it listens");
        stream.write_all(line.as_bytes()).await.expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("it answers");
        serde_json::from_slice(&answer).expect("an answer")
    }

    #[tokio::test]
    async fn a_running_daemon_counts_checks_and_collects_and_refuses_what_it_does_not_know() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("store"), Limits::default()).expect("a store");
        let seal = store.begin();
        seal.put(b"of no record").expect("room");
        drop(seal.finish(None).expect("room"));
        let proposer = Proposer::new(Arc::new(MemoryLog::default()), Arc::new(SystemClock));
        let (tasks, socket) = (Tasks::new(), dir.path().join("store.sock"));
        serve(store.clone(), proposer, &socket, &tasks).expect("bound");

        let Told::Stats(stats) = ask(&socket, "\"stats\"\n").await else {
            panic!("no figures");
        };
        assert_eq!(stats.chunks, 1);
        let Told::Check(checked) = ask(&socket, "\"check\"\n").await else {
            panic!("no check");
        };
        assert!(checked.sound);
        let Told::Gc(collected) = ask(&socket, "\"gc\"\n").await else {
            panic!("no collection");
        };
        assert_eq!(collected.chunks, 1);
        for nonsense in ["\"burn\"\n", "\n", "{}"] {
            let mut line = nonsense.to_owned();
            line.extend(std::iter::repeat_n(' ', 300));
            let told = ask(&socket, &line).await;
            assert!(matches!(told, Told::Failed(_)), "{told:?}");
        }
        tasks.stop_and_join().await;
    }

    /// The runtime joins what blocks, so a check that went on would hold up the end of the daemon.
    #[tokio::test]
    async fn a_check_under_way_does_not_outlive_a_stop() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("store"), Limits::default()).expect("a store");
        let seal = store.begin();
        for n in 0..200_u8 {
            let mut chunk = vec![0; 64 << 10];
            blake3::Hasher::new()
                .update(&[n])
                .finalize_xof()
                .fill(&mut chunk);
            seal.put(&chunk).expect("room");
        }
        drop(seal.finish(None).expect("room"));
        let proposer = Proposer::new(Arc::new(MemoryLog::default()), Arc::new(SystemClock));
        let (tasks, socket) = (Tasks::new(), dir.path().join("store.sock"));
        serve(store.clone(), proposer, &socket, &tasks).expect("bound");
        let mut stream = UnixStream::connect(&socket).await.expect("it listens");
        stream.write_all(b"\"check\"\n").await.expect("it reads");
        tasks.stop_and_join().await;
        let checked = task::spawn_blocking(move || store.check());
        let checked = checked.await.expect("no panic");
        assert!(matches!(checked, Err(CheckError::Stopped)), "{checked:?}");
    }
}
