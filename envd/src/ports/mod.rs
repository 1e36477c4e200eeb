//! Makes programs reachable that listen on the guest's loopback only.
//!
//! ```text
//! host ──> guest's address:port ──(forwarder)──> 127.0.0.1:port or [::1]:port
//! ```
//!
//! Once a second the kernel's list of listening sockets is read ([`scan`]). For each that is bound to
//! the loopback a [`forward`]er listens on the same port of the guest's address; it goes as soon as
//! the program does, and where something else listens there already, there is none. All of it runs
//! on a thread with a runtime of its own: however much is carried, the agent answers.
//!
//! Connections that are being carried when the guest is sealed belong to clients that are gone when
//! it is restored. They are cut with the agent's own ([`crate::connections`]).

pub mod forward;
pub mod scan;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::connections::Connections;
use forward::{Forwarder, Room};
use scan::listening;

/// How often the kernel's list is read: what clients are told is that a port is there within
/// seconds.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);

/// Where to forward from.
#[derive(Clone, Copy, Debug)]
pub struct Outside {
    /// The address that others reach.
    pub address: Ipv4Addr,
    /// A port that is never forwarded: the agent's own.
    pub except: u16,
}

/// Forwards from `outside` for as long as the agent lives.
///
/// # Errors
/// When there is no thread or no runtime for it.
pub fn start(outside: Outside, connections: Arc<Connections>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let run = move || runtime.block_on(run(outside, connections));
    thread::Builder::new().name("ports".into()).spawn(run)?;
    Ok(())
}

async fn run(outside: Outside, connections: Arc<Connections>) {
    let room = Room::new(connections);
    let mut forwarders = BTreeMap::new();
    let mut ticks = interval(SCAN_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        follow(&mut forwarders, &listening(), outside, &room).await;
    }
}

/// Starts what is missing and ends what is no longer wanted.
async fn follow(
    forwarders: &mut BTreeMap<u16, Forwarder>,
    wanted: &BTreeMap<u16, SocketAddr>,
    outside: Outside,
    room: &Room,
) {
    forwarders.retain(|port, forwarder| {
        wanted.get(port) == Some(&forwarder.target()) && !forwarder.has_ended()
    });
    for (port, target) in wanted {
        if *port == outside.except || forwarders.contains_key(port) {
            continue;
        }
        let from = SocketAddr::from((outside.address, *port));
        // Whoever listens there already is reached without us.
        if let Ok(forwarder) = Forwarder::start(from, *target, room).await {
            forwarders.insert(*port, forwarder);
        }
    }
}
