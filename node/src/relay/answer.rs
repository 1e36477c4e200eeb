//! Questions that only the owner can answer, as the owner answers them.

use std::time::Duration;

use bytes::Bytes;
use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use proto::wire::relay as pb;
use proto::wire::relay::answer::Answer;
use proto::wire::relay::question::Ask;
use tokio::task;

use super::local::{LocalFacts, MemoryFacts, Transfer, Waiting, facts_of};
use super::refusal::Refusal;
use super::samples;
use super::serve::Server;
use super::wire;

/// Most bytes of a console in one answer: the transport takes frames of 4 MiB.
pub(super) const CONSOLE_BYTES: usize = 1 << 20;

impl Server {
    /// Answers a question of `from`. A question that is refused is answered too, by its refusal.
    pub async fn answer(&self, from: NodeId, question: Bytes) -> Bytes {
        let answered = match wire::question(&question) {
            Ok(ask) => self.answer_to(from, ask).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &answered {
            self.note_refusal(from, refusal);
        }
        wire::answer(answered)
    }

    async fn answer_to(&self, from: NodeId, ask: Ask) -> Result<Answer, Refusal> {
        Ok(match ask {
            Ask::Access(ask) => {
                let id = self.seen_by(from, &ask.sandbox)?;
                let guest = self.guest(id, Epoch(ask.epoch)).await?;
                let token = guest.access_token().to_owned();
                Answer::Access(pb::AccessGranted { token })
            }
            Ask::Activity(ask) => {
                let ids = self.all_seen_by(from, &ask.sandboxes)?;
                let uses = ids.into_iter().filter_map(|id| self.last_use(id)).collect();
                Answer::Activity(pb::ActivityKnown { uses })
            }
            Ask::Facts(ask) => {
                let id = self.seen_by(from, &ask.sandbox)?;
                let facts = facts_of(self.local.as_ref(), id).await;
                Answer::Facts(facts.map(Into::into).unwrap_or_default())
            }
            Ask::Console(ask) => {
                let id = self.seen_by(from, &ask.sandbox)?;
                let bytes = usize::try_from(ask.tail_bytes).unwrap_or(usize::MAX);
                Answer::Console(self.console(id, bytes).await?)
            }
            Ask::Touch(ask) => {
                let ids = self.all_seen_by(from, &ask.sandboxes)?;
                Answer::Touched(self.touch(&ids))
            }
            Ask::Samples(ask) => {
                let id = self.seen_by(from, &ask.sandbox)?;
                Answer::Samples(samples::known(self.local.as_ref(), id, &ask))
            }
        })
    }

    fn seen_by(&self, from: NodeId, id: &[u8]) -> Result<SandboxId, Refusal> {
        let id = wire::sandbox_id(id)?;
        self.check_sight(from, id).map(|()| id)
    }

    fn all_seen_by(&self, from: NodeId, ids: &[Vec<u8>]) -> Result<Vec<SandboxId>, Refusal> {
        let mut ids = wire::sandbox_ids(ids)?;
        ids.retain(|id| self.check_sight(from, *id).is_ok());
        Ok(ids)
    }

    fn last_use(&self, id: SandboxId) -> Option<pb::LastUse> {
        let at = self.local.last_active(id)?;
        Some(pb::LastUse {
            sandbox: id.0.to_vec(),
            at_ms: at.0,
        })
    }

    async fn console(&self, id: SandboxId, bytes: usize) -> Result<pb::ConsoleTail, Refusal> {
        let local = self.local.clone();
        let bytes = bytes.min(CONSOLE_BYTES);
        let read = task::spawn_blocking(move || local.console_tail(id, bytes)).await;
        let tail = read.map_err(|_| Refusal::NotReady)?;
        Ok(pb::ConsoleTail {
            kept: tail.is_some(),
            tail: tail.unwrap_or_default(),
        })
    }

    fn touch(&self, ids: &[SandboxId]) -> pb::Touched {
        let state = self.view.state();
        let is_here = |id: &&SandboxId| {
            let sandbox = state.sandbox(**id);
            sandbox.is_some_and(|it| it.owner == self.here && it.phase.holds_resources())
        };
        let mut count = 0;
        for id in ids.iter().filter(is_here) {
            self.local.touch(*id);
            count += 1;
        }
        pb::Touched { count }
    }
}

impl From<LocalFacts> for pb::FactsKnown {
    fn from(facts: LocalFacts) -> Self {
        let stage = |(name, took): (String, Duration)| pb::Stage {
            name,
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        };
        Self {
            held: true,
            last_active_ms: facts.last_active.map(|at| at.0),
            disk_used_bytes: facts.disk_used_bytes,
            stages: facts.start_stages.into_iter().map(stage).collect(),
            start: facts.start.unwrap_or_default(),
            memory: facts.memory.map(Into::into),
            transfer: facts.transfer.map(|it| pb::Transfer {
                bytes_done: it.bytes_done,
                bytes_total: it.bytes_total,
                sources: it.sources,
            }),
            waiting: facts.waiting.map(|it| pb::Waiting {
                nodes: it.nodes,
                why: it.why,
                since_ms: it.since.0,
                until_ms: it.until.0,
            }),
        }
    }
}

impl From<MemoryFacts> for pb::Memory {
    fn from(memory: MemoryFacts) -> Self {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            resident_bytes: memory.resident_bytes,
            local_bytes: memory.local_bytes,
            peer_bytes: memory.peer_bytes,
            faults: memory.faults,
            peer_faults: memory.peer_faults,
            fault_p50_ns: nanos(memory.fault_p50),
            fault_p99_ns: nanos(memory.fault_p99),
            takeovers: memory.takeovers,
        }
    }
}

impl From<pb::Memory> for MemoryFacts {
    fn from(memory: pb::Memory) -> Self {
        Self {
            resident_bytes: memory.resident_bytes,
            local_bytes: memory.local_bytes,
            peer_bytes: memory.peer_bytes,
            faults: memory.faults,
            peer_faults: memory.peer_faults,
            fault_p50: Duration::from_nanos(memory.fault_p50_ns),
            fault_p99: Duration::from_nanos(memory.fault_p99_ns),
            takeovers: memory.takeovers,
        }
    }
}

/// `None` where the owner holds nothing of the sandbox.
pub(super) fn facts_told(known: pb::FactsKnown) -> Option<LocalFacts> {
    let stage = |stage: pb::Stage| (stage.name, Duration::from_micros(stage.took_us));
    known.held.then(|| LocalFacts {
        last_active: known.last_active_ms.map(Stamp),
        disk_used_bytes: known.disk_used_bytes,
        start_stages: known.stages.into_iter().map(stage).collect(),
        start: Some(known.start).filter(|word| !word.is_empty()),
        memory: known.memory.map(Into::into),
        transfer: known.transfer.map(|it| Transfer {
            bytes_done: it.bytes_done,
            bytes_total: it.bytes_total,
            sources: it.sources,
        }),
        waiting: known.waiting.map(|it| Waiting {
            nodes: it.nodes,
            why: it.why,
            since: Stamp(it.since_ms),
            until: Stamp(it.until_ms),
        }),
    })
}
