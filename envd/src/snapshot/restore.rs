//! The first thing a restored guest is told.
//!
//! ```text
//! disk thawed → clock → entropy → name → identity, machine id, SSH keys, neighbours → settings
//! → generation announced → connections of the past life cut → workload thawed → gate open
//! ```
//!
//! The workload stays frozen until all of it is done. Without a right clock, fresh random numbers
//! and its name it stays frozen for good: a guest that runs on as its own twin is worse than none,
//! and the host ends it. Whatever is merely written to files may fail (a disk may be full) and is
//! reported.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use proto::epoch::Epoch;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::lineage::{Generation, StaleEpoch};
use super::machine::Machine;
use super::{Busy, identity};
use crate::agent::Agent;
use crate::auth::Token;
use crate::boot::{BootError, command};
use crate::connections::ConnectionId;
use crate::environment::Identity;
use crate::log;
use crate::log::chain;

/// What a restored guest is told.
#[derive(Clone, Debug)]
pub struct Order {
    /// Under which ownership it lives from now on.
    pub epoch: Option<Epoch>,
    /// Names this life.
    pub generation: Generation,
    /// Fresh random bytes of the host.
    pub seed: Vec<u8>,
    /// The wall clock, as the host read it at `received` or a little before.
    pub now: Timestamp,
    /// When this was received.
    pub received: Instant,
    /// From now on required of every caller.
    pub token: Option<Token>,
    /// The environment of processes, where it changes.
    pub env: Option<BTreeMap<String, String>>,
    /// Which sandbox this is.
    pub identity: Identity,
    /// The name it goes by, where it changes.
    pub hostname: Option<String>,
    /// Its machine id, where it changes.
    pub machine_id: Option<String>,
    /// Whether it needs SSH host keys of its own.
    pub renew_ssh_host_keys: bool,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Whether anything was: not where the guest had been told of this life already.
    pub applied: bool,
    /// Whether the workload had stood still until then.
    pub held: bool,
    /// How many connections were cut.
    pub cut: usize,
    /// What could not be written, in words.
    pub warnings: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

/// Why a guest is not restored. Its workload stands still if it did before.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another order is being carried out.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Somebody else owns the sandbox by now.
    #[error(transparent)]
    Stale(#[from] StaleEpoch),
    /// The clock could not be set.
    #[error("set the clock")]
    Clock(#[source] io::Error),
    /// The kernel took no entropy.
    #[error("add entropy")]
    Entropy(#[source] io::Error),
    /// The guest could not be renamed.
    #[error("rename the guest")]
    Hostname(#[source] BootError),
    /// The part that blocks ended without a word.
    #[error("apply the restore")]
    Panicked(#[source] tokio::task::JoinError),
}

/// Carries out `order`, which came over connection `own`.
///
/// # Errors
/// [`RestoreError`]; the same order may be given again.
pub async fn restore(
    agent: &Arc<Agent>,
    order: Order,
    own: ConnectionId,
) -> Result<Restored, RestoreError> {
    let snapshots = &agent.snapshots;
    let mut lineage = snapshots.turn().await?;
    lineage.admit(order.epoch)?;
    if lineage.is_in(order.generation) {
        return Ok(Restored::default());
    }
    let (hold, machine) = (Arc::clone(&snapshots.hold), Arc::clone(&snapshots.machine));
    let told = order.clone();
    let change = move || {
        let held = hold.end_turn();
        change(&*machine, &told).map(|warnings| (held, warnings))
    };
    let changed = spawn_blocking(change).await;
    let (held, warnings) = changed.map_err(RestoreError::Panicked)??;
    settle(agent, &order).await;
    let cut = snapshots.connections.cut_before(own);
    let hold = Arc::clone(&snapshots.hold);
    let thawed = spawn_blocking(move || hold.release_to(own)).await;
    thawed.map_err(RestoreError::Panicked)?;
    // Not before: a restore that was cut short is to be carried out again.
    lineage.enter(order.generation);
    if order.renew_ssh_host_keys {
        command::start_as(agent, Some("root"), identity::MAKE_SSH_HOST_KEYS);
    }
    Ok(Restored {
        applied: true,
        held,
        cut,
        warnings,
        took: order.received.elapsed(),
    })
}

/// Changes the machine. Returns what could not be written.
fn change(machine: &dyn Machine, order: &Order) -> Result<Vec<String>, RestoreError> {
    // The clock first: what the host read grows old.
    let now = order.now.saturating_add(order.received.elapsed());
    let now = now.unwrap_or(order.now);
    machine.set_clock(now).map_err(RestoreError::Clock)?;
    let seeded = machine.add_entropy(&order.seed);
    seeded.map_err(RestoreError::Entropy)?;
    let mut warnings = Vec::new();
    if let Some(hostname) = &order.hostname {
        match machine.set_hostname(hostname) {
            // The kernel has the name; only a file does not.
            Err(err @ BootError::File { .. }) => warnings.push(chain(&err)),
            renamed => renamed.map_err(RestoreError::Hostname)?,
        }
    }
    let mut files = vec![machine.publish(&order.identity)];
    if let Some(machine_id) = &order.machine_id {
        files.push(machine.renew_machine_id(machine_id));
    }
    if order.renew_ssh_host_keys {
        files.push(machine.remove_ssh_host_keys().map(drop));
    }
    let neighbours = machine.forget_neighbours();
    files.push(neighbours.map_err(BootError::file("forget the neighbours in", "/proc/net/arp")));
    files.push(machine.announce(order.generation));
    warnings.extend(
        files
            .into_iter()
            .filter_map(|done| Some(chain(&done.err()?))),
    );
    for warning in &warnings {
        log!("restore: {warning}");
    }
    Ok(warnings)
}

/// Changes what the agent itself goes by.
async fn settle(agent: &Agent, order: &Order) {
    // Later words of a host whose clock is behind the last one's are not old ones.
    *agent.init.lock().await = Some(order.now);
    let mut settings = agent.settings_mut();
    if let Some(token) = &order.token {
        settings.token = Some(token.clone());
    }
    if let Some(env) = &order.env {
        settings.global.replace_user(env.clone());
    }
    settings.global.identify(&order.identity);
}
