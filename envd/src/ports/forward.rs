//! One forwarder: a listening socket, and the connections that come over it.
//!
//! Each accepted connection is carried by a task of its own, which ends with either side, or when the
//! guest learns that it has been restored. A forwarder that goes lets what it carries come to its end:
//! a program may well listen no more and still serve.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::connections::Connections;
use crate::serve::tune;

/// Connections carried at once; more wait to be accepted. With [`CARRIED_BYTES`] in each direction
/// this bounds our memory at 16 MiB.
const MAX_CARRIED: usize = 512;
/// What is held of each direction.
const CARRIED_BYTES: usize = 16 * 1024;
/// How long a program may take to accept: one that does not is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of descriptors, as a rule), so that it is not tried in a spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What all forwarders share.
#[derive(Clone, Debug)]
pub struct Room {
    places: Arc<Semaphore>,
    connections: Arc<Connections>,
}

impl Room {
    /// Room for [`MAX_CARRIED`] connections, which end when those of `connections` are cut.
    #[must_use]
    pub fn new(connections: Arc<Connections>) -> Self {
        Self {
            places: Arc::new(Semaphore::new(MAX_CARRIED)),
            connections,
        }
    }
}

/// A listening socket whose connections are carried elsewhere; dropping it listens no more.
#[derive(Debug)]
pub struct Forwarder {
    target: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Forwarder {
    /// Listens on `from` and carries to `target`.
    ///
    /// # Errors
    /// What the kernel said to listening, mostly that somebody else does.
    pub async fn start(from: SocketAddr, target: SocketAddr, room: &Room) -> io::Result<Self> {
        let listener = TcpListener::bind(from).await?;
        let task = tokio::spawn(accept(listener, target, room.clone()));
        Ok(Self { target, task })
    }

    /// Where it leads.
    #[must_use]
    pub fn target(&self) -> SocketAddr {
        self.target
    }

    /// Whether it has found that nobody is there.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

/// Accepts until the program is found to be gone. Its port is given up at once then: it may be
/// about to listen on all addresses.
async fn accept(listener: TcpListener, target: SocketAddr, room: Room) {
    let (gone, mut is_gone) = watch::channel(false);
    loop {
        // Never closed.
        let Ok(place) = Arc::clone(&room.places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = is_gone.wait_for(|gone| *gone) => return,
        };
        let Ok((client, _peer)) = accepted else {
            sleep(ACCEPT_RETRY).await;
            continue;
        };
        let life = room.connections.life();
        let gone = gone.clone();
        tokio::spawn(async move {
            if let Err(err) = carry(client, target, life, place).await
                && err.kind() == io::ErrorKind::ConnectionRefused
            {
                gone.send_replace(true);
            }
        });
    }
}

/// Carries one connection to its end. Only an error of the beginning is returned.
async fn carry(
    mut client: TcpStream,
    target: SocketAddr,
    mut life: watch::Receiver<u64>,
    _place: OwnedSemaphorePermit,
) -> io::Result<()> {
    // It works without, if less well.
    let _ = tune(&client);
    let connecting = timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await;
    let mut program = match connecting {
        Ok(Ok(program)) => program,
        Ok(Err(err)) => {
            reset(&client);
            return Err(err);
        }
        Err(late) => {
            reset(&client);
            return Err(late.into());
        }
    };
    let _ = program.set_nodelay(true);
    let is_past = tokio::select! {
        // Its ends are told to both sides; there is nobody else to tell.
        _ = copy_bidirectional_with_sizes(&mut client, &mut program, CARRIED_BYTES, CARRIED_BYTES) => false,
        _ = life.changed() => true,
    };
    if is_past {
        reset(&client);
        reset(&program);
    }
    Ok(())
}

/// Lets closing `stream` be a reset: its other end is not there, or is to know that this is no end.
fn reset(stream: &TcpStream) {
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // It is closed either way.
    let _ = setsockopt(stream, sockopt::Linger, &at_once);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn pair() -> (Arc<Connections>, Forwarder, SocketAddr, TcpListener) {
        let program = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let target = program.local_addr().expect("bound");
        let from = SocketAddr::from(([127, 0, 0, 2], target.port()));
        let connections = Arc::<Connections>::default();
        let room = Room::new(connections.clone());
        let forwarder = Forwarder::start(from, target, &room).await.expect("free");
        (connections, forwarder, from, program)
    }

    #[tokio::test]
    async fn bytes_and_half_closes_are_carried_both_ways() {
        let (_connections, forwarder, from, program) = pair().await;
        let mut client = TcpStream::connect(from).await.expect("reached");
        let (mut served, _) = program.accept().await.expect("carried");
        drop(forwarder);
        client.write_all(b"question").await.expect("sent");
        client.shutdown().await.expect("closed");
        let mut question = String::new();
        served.read_to_string(&mut question).await.expect("read");
        served.write_all(b"answer").await.expect("sent");
        drop(served);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("read");
        assert_eq!((&*question, &*answer), ("question", "answer"));
    }

    #[tokio::test]
    async fn a_restore_cuts_both_ends() {
        let (connections, _forwarder, from, program) = pair().await;
        let mut client = TcpStream::connect(from).await.expect("reached");
        let (mut served, _) = program.accept().await.expect("carried");
        let own = connections.admit([127, 0, 0, 1].into()).expect("room");
        connections.cut_before(own.id);
        for stream in [&mut client, &mut served] {
            let cut = stream.read(&mut [0; 1]).await.expect_err("cut");
            assert_eq!(cut.kind(), io::ErrorKind::ConnectionReset);
        }
    }

    #[tokio::test]
    async fn a_forwarder_to_nobody_gives_its_port_up() {
        let (_connections, forwarder, from, program) = pair().await;
        drop(program);
        let mut client = TcpStream::connect(from).await.expect("reached");
        assert!(client.read(&mut [0; 1]).await.is_err());
        while !forwarder.has_ended() {
            tokio::task::yield_now().await;
        }
        let everywhere = SocketAddr::from(([0, 0, 0, 0], from.port()));
        TcpListener::bind(everywhere).await.expect("free again");
    }
}
