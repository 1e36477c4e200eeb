//! Three processes that agree on writes: ours beside etcd's, with the same clients.
//!
//! Ours are three runs of this program (`member.rs`), each with the group, the log and the
//! transport a daemon has, over real QUIC; etcd's are Debian's. Clients live in this process and
//! talk to the leader over one connection, ours over QUIC, etcd's over gRPC. What is not alike:
//! our traffic is encrypted and proven on both ends, etcd's here is plain.

mod copies;
pub(crate) mod etcd;
pub(crate) mod member;
pub(crate) mod ours;

use std::future::Future;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::Outcome;
use crate::figures::Samples;

/// Bytes of the value of one write.
pub(crate) const VALUE_BYTES: usize = 256;
/// Members of each group.
pub(crate) const MEMBERS: usize = 3;

/// One connection to one member.
pub(crate) trait Store: Clone + Send + Sync + 'static {
    /// Writes the value of `client` anew; returns when a quorum has it on disk.
    ///
    /// # Errors
    /// It was not done, or nobody knows.
    fn put(&self, client: u8) -> impl Future<Output = Result<(), String>> + Send;
}

/// What one load came to.
#[derive(Default)]
pub(crate) struct Load {
    pub(crate) latency: Samples,
    pub(crate) per_second: Samples,
    pub(crate) syncs_per_write: Samples,
}

impl Load {
    /// Writes for `part` with `clients` at once, each one thing after the other, and returns how
    /// many were done.
    pub(crate) async fn run(
        &mut self,
        store: &impl Store,
        clients: u8,
        part: Duration,
    ) -> Outcome<usize> {
        let start = Instant::now();
        let mut working = JoinSet::new();
        for client in 0..clients {
            working.spawn(put_in_turn(store.clone(), client, start + part));
        }
        let mut count = 0;
        while let Some(worked) = working.join_next().await {
            let times = worked??;
            count += times.len();
            times.into_iter().for_each(|it| self.latency.add_ms(it));
        }
        self.per_second
            .add(count as f64 / start.elapsed().as_secs_f64());
        Ok(count)
    }
}

async fn put_in_turn(
    store: impl Store,
    client: u8,
    until: Instant,
) -> Result<Vec<Duration>, String> {
    let mut times = Vec::new();
    while Instant::now() < until {
        let start = Instant::now();
        store.put(client).await?;
        times.push(start.elapsed());
    }
    Ok(times)
}

/// An address on loopback that nobody uses, for either protocol. It is free until somebody else
/// takes it, which nobody should in the moment until a member does.
pub(crate) fn free_address() -> Outcome<SocketAddr> {
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let address = tcp.local_addr()?;
    UdpSocket::bind(address)?;
    Ok(address)
}
