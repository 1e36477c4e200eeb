//! Who runs a sandbox, under which epoch, and how to reach it from here.
//!
//! The record decides: a sandbox of this node is asked directly, any other through [`Peers`].
//! What only an owner knows is asked for with a short deadline, and a list asks each owner once,
//! all at the same time; what does not come in time is left out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::future;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use proto::wire::relay as pb;
use proto::wire::relay::answer::Answer;
use proto::wire::relay::question::Ask;
use raft::state::{Liveness, Phase, Sandbox, State};
use tokio::task;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::answer::{CONSOLE_BYTES, facts_told};
use super::error::RelayError;
use super::local::{LocalFacts, LocalGuests, facts_of};
use super::noted::NotedDial;
use super::peers::{NoPeers, PeerError, Peers};
use super::remote::{RemoteGuests, Slot, Target};
use super::serve::Server;
use super::touch::Touches;
use super::wire::{self, IDS_PER_QUESTION};
use crate::cluster::View;
use crate::guest::{Dial, Guest};

/// Longest an owner may take to answer what a request cannot do without.
pub(super) const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest an owner may take to answer what an answer to a client can do without.
const EXTRA_TIMEOUT: Duration = Duration::from_millis(500);
/// Owners asked for one list. The sandboxes of the others are listed without what they know.
const OWNERS_PER_LIST: usize = 64;

/// The way to every guest of the cluster. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Relay {
    here: NodeId,
    view: View,
    local: Arc<dyn LocalGuests>,
    peers: Arc<dyn Peers>,
    remote: Arc<RemoteGuests>,
    touches: Touches,
}

impl Relay {
    /// A relay on node `here`, which knows no other node.
    #[must_use]
    pub fn new(here: NodeId, view: View, local: Arc<dyn LocalGuests>) -> Self {
        let peers: Arc<dyn Peers> = Arc::new(NoPeers);
        Self {
            here,
            view,
            local,
            touches: Touches::new(Arc::clone(&peers)),
            peers,
            remote: Arc::default(),
        }
    }

    /// Reaches other nodes through `peers`.
    #[must_use]
    pub fn with_peers(self, peers: Arc<dyn Peers>) -> Self {
        Self {
            touches: Touches::new(Arc::clone(&peers)),
            peers,
            ..self
        }
    }

    /// Cuts off guests of other nodes as soon as their ownership is over, until `stop`. Without
    /// it, one is cut off when its sandbox is next asked for.
    pub async fn follow(self, stop: CancellationToken) {
        let mut view = self.view.clone();
        let follow = async {
            while view.changed().await {
                if !self.remote.is_empty() {
                    self.remote.drop_stale(&view.state());
                }
            }
        };
        stop.run_until_cancelled(follow).await;
    }

    /// The replicated state that decides where a sandbox is.
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// This node.
    pub(super) const fn here(&self) -> NodeId {
        self.here
    }

    /// The sandboxes that run here.
    pub(super) fn local(&self) -> &dyn LocalGuests {
        self.local.as_ref()
    }

    /// The other half: what serves the guests of this node to other nodes.
    #[must_use]
    pub fn server(&self) -> Server {
        Server::new(self.here, self.view.clone(), Arc::clone(&self.local))
    }

    /// The guest of a running sandbox, wherever it runs. Counts as activity.
    ///
    /// The first use of a guest on another node asks that node for the guest's access; later ones
    /// ask nobody.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub async fn guest(&self, id: SandboxId) -> Result<Guest, RelayError> {
        let (state, sandbox) = self.running(id)?;
        if sandbox.owner != self.here {
            let target = reachable(&state, &sandbox)?;
            return self.remote_guest(self.remote.slot(target)).await;
        }
        if self.local.is_frozen(id) {
            let host = Target::of(&state, &sandbox).host;
            return Err(RelayError::Frozen { id, host });
        }
        let guest = self.local.guest(id, sandbox.epoch);
        let guest = guest.ok_or(RelayError::NotReady { id })?;
        self.local.touch(id);
        Ok(guest)
    }

    /// How to reach a port of `guest`, the guest of `sandbox`. Bytes that flow there count as
    /// activity, whichever node it runs on.
    #[must_use]
    pub fn port(&self, sandbox: &Sandbox, guest: &Guest, port: u16) -> Arc<dyn Dial> {
        let dial = guest.dial().at_port(port);
        if sandbox.owner != self.here {
            // Its owner carries the bytes, and counts them.
            return dial;
        }
        Arc::new(NotedDial {
            dial,
            local: Arc::clone(&self.local),
            id: sandbox.id,
            epoch: sandbox.epoch,
        })
    }

    /// Moves a running sandbox's inactivity timer back to its start, on its owner within a few
    /// seconds. Waits for nobody; must be called within a runtime.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way, as far as this node knows.
    pub fn touch(&self, id: SandboxId) -> Result<(), RelayError> {
        let (_, sandbox) = self.running(id)?;
        if sandbox.owner == self.here {
            self.local.touch(id);
        } else {
            self.touches.note(sandbox.owner, id);
        }
        Ok(())
    }

    /// The same, and the owner has heard of it when this returns.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub async fn ping(&self, id: SandboxId) -> Result<(), RelayError> {
        let (state, sandbox) = self.running(id)?;
        if sandbox.owner == self.here {
            self.local.touch(id);
            return Ok(());
        }
        let target = reachable(&state, &sandbox)?;
        let sandboxes = vec![id.0.to_vec()];
        let touch = Ask::Touch(pb::Touch { sandboxes });
        match self.ask(&target, touch, ASK_TIMEOUT).await? {
            Answer::Touched(pb::Touched { count: 0 }) => Err(RelayError::Moved { id }),
            _ => Ok(()),
        }
    }

    /// What only its owner knows of a sandbox; `None` where the owner holds nothing of it or does
    /// not say in time.
    pub async fn facts(&self, id: SandboxId) -> Option<LocalFacts> {
        let state = self.view.state();
        let sandbox = state.sandbox(id)?;
        if sandbox.owner == self.here {
            return facts_of(self.local.as_ref(), id).await;
        }
        let target = reachable(&state, sandbox).ok()?;
        let sandbox = id.0.to_vec();
        let question = Ask::Facts(pb::Facts { sandbox });
        match self.ask(&target, question, EXTRA_TIMEOUT).await {
            Ok(Answer::Facts(known)) => facts_told(known),
            _ => None,
        }
    }

    /// When each of these was last used, as far as their owners say so in time. Each owner is
    /// asked once, all at the same time.
    pub async fn last_active(
        &self,
        state: &State,
        sandboxes: &[&Sandbox],
    ) -> HashMap<SandboxId, Stamp> {
        let mut known = HashMap::new();
        let mut elsewhere: BTreeMap<NodeId, (Target, Vec<Vec<u8>>)> = BTreeMap::new();
        for sandbox in sandboxes {
            if sandbox.owner == self.here {
                let at = self.local.last_active(sandbox.id);
                known.extend(at.map(|at| (sandbox.id, at)));
            } else if let Ok(target) = reachable(state, sandbox) {
                let (_, ids) = elsewhere
                    .entry(sandbox.owner)
                    .or_insert((target, Vec::new()));
                if ids.len() < IDS_PER_QUESTION {
                    ids.push(sandbox.id.0.to_vec());
                }
            }
        }
        let asked = elsewhere.into_values().take(OWNERS_PER_LIST);
        let asked = asked.map(|(target, ids)| self.activity(target, ids));
        known.extend(future::join_all(asked).await.into_iter().flatten());
        known
    }

    /// The last `bytes` of a guest's console (a MiB at most), also of one that does not run (any
    /// more), as long as its host keeps the log.
    ///
    /// # Errors
    /// [`RelayError`] names what stands in the way.
    pub async fn console_tail(
        &self,
        id: SandboxId,
        bytes: usize,
    ) -> Result<Option<Vec<u8>>, RelayError> {
        let state = self.view.state();
        let sandbox = state.sandbox(id).ok_or(RelayError::NoSuchSandbox(id))?;
        let bytes = bytes.min(CONSOLE_BYTES);
        if sandbox.owner == self.here {
            let local = Arc::clone(&self.local);
            let read = task::spawn_blocking(move || local.console_tail(id, bytes));
            return read.await.map_err(|_| RelayError::NotReady { id });
        }
        let target = reachable(&state, sandbox)?;
        let question = Ask::Console(pb::Console {
            sandbox: id.0.to_vec(),
            tail_bytes: bytes as u64,
        });
        match self.ask(&target, question, ASK_TIMEOUT).await? {
            Answer::Console(console) => Ok(console.kept.then_some(console.tail)),
            _ => Err(off_topic(&target)),
        }
    }

    async fn remote_guest(&self, slot: Slot) -> Result<Guest, RelayError> {
        let target = &slot.target;
        let guest = slot.guest.get_or_try_init(|| async {
            let access = Ask::Access(pb::Access {
                sandbox: target.id.0.to_vec(),
                epoch: target.epoch.0,
            });
            let Answer::Access(granted) = self.ask(target, access, ASK_TIMEOUT).await? else {
                return Err(off_topic(target));
            };
            let dial = Arc::new(slot.dial(Arc::clone(&self.peers)));
            Guest::new(dial, &granted.token).map_err(|_| off_topic(target))
        });
        guest.await.cloned()
    }

    async fn activity(&self, target: Target, ids: Vec<Vec<u8>>) -> Vec<(SandboxId, Stamp)> {
        let question = Ask::Activity(pb::Activity { sandboxes: ids });
        let uses = match self.ask(&target, question, EXTRA_TIMEOUT).await {
            Ok(Answer::Activity(known)) => known.uses,
            Ok(_) => Vec::new(),
            Err(err) => {
                debug!(%err, "a list goes without what a host knows");
                Vec::new()
            }
        };
        let one = |it: pb::LastUse| Some((wire::sandbox_id(&it.sandbox).ok()?, Stamp(it.at_ms)));
        uses.into_iter().filter_map(one).collect()
    }

    pub(super) async fn ask(
        &self,
        target: &Target,
        question: Ask,
        timeout: Duration,
    ) -> Result<Answer, RelayError> {
        let asked = self.peers.ask(target.owner, wire::ask(question));
        let answer = time::timeout(timeout, asked).await;
        let answer = answer.unwrap_or(Err(PeerError::TimedOut));
        let answer = answer.map_err(|err| RelayError::unreachable(target, &err))?;
        wire::answered(&answer).map_err(|refusal| RelayError::refused(target, refusal))
    }

    fn running(&self, id: SandboxId) -> Result<(State, Sandbox), RelayError> {
        let state = self.view.state();
        let sandbox = state.sandbox(id).ok_or(RelayError::NoSuchSandbox(id))?;
        match sandbox.phase {
            Phase::Running => Ok((state.clone(), sandbox.clone())),
            phase => Err(RelayError::NotRunning { id, phase }),
        }
    }
}

/// The sandbox as something to ask another node for, unless the cluster knows that its owner is
/// not there.
pub(super) fn reachable(state: &State, sandbox: &Sandbox) -> Result<Target, RelayError> {
    let target = Target::of(state, sandbox);
    let away = match state.node(sandbox.owner).map(|node| node.liveness) {
        None => (None, "it was removed from the cluster"),
        Some(Liveness::Alive) => return Ok(target),
        Some(Liveness::Missing { since }) => (Some(since), "the cluster does not hear of it"),
        Some(Liveness::Lost { since }) => (Some(since), "the cluster has given it up"),
    };
    Err(RelayError::HostUnreachable {
        id: target.id,
        host: target.host,
        since: away.0,
        why: away.1.into(),
    })
}

pub(super) fn off_topic(target: &Target) -> RelayError {
    RelayError::Misunderstood {
        id: target.id,
        host: target.host.clone(),
        why: "it answered something else".into(),
    }
}
