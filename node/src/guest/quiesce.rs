//! Getting a guest ready to be sealed, and undoing that.
//!
//! Between the two the guest's workload stands still, by a word that only the agent's watchdog, an
//! undo or a restore takes back. A call whose answer is lost may have worked all the same, so a
//! failed quiesce is undone here before its error is told; should that fail too, the watchdog does
//! it.

use std::time::Duration;

use http::{Method, StatusCode};
use proto::epoch::Epoch;
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::error::GuestError;
use super::http::Guest;
use super::restore::wall_clock_ns;
use crate::base::remedy::Remedy;

/// How much earlier than the caller gives up the agent does: it can then undo things in order, and
/// its word still arrives.
const ANSWER_MARGIN: Duration = Duration::from_millis(500);
/// How long undoing a quiesce may take that failed. The kernel does it at once; what may take time
/// is a guest that does not answer.
const UNDO_TIMEOUT: Duration = Duration::from_secs(2);

/// How a guest is to be quiesced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiesce {
    /// The epoch under which it runs.
    pub epoch: Epoch,
    /// Whether its root disk is to refuse writes: for a snapshot of the disk alone. One that has
    /// memory and disk of the same instant needs none of it.
    pub freeze_disk: bool,
    /// Whether its page cache is to be dropped at this moment: freed pages keep their bytes until they
    /// are reported free, so only [`Guest::reclaim`] some seconds before makes a snapshot smaller.
    pub reclaim: bool,
    /// After how long of running the agent undoes it by itself: longer than the rest of the pause
    /// and the start of the resume may take, since it must not happen in between.
    pub undo_after: Duration,
}

/// How still a workload stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// All of it.
    Frozen,
    /// All but processes inside long system calls, which stop when they return from them.
    Partly,
    /// It runs: this guest has no control groups.
    Free,
}

/// A guest that is ready to be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiesced {
    /// How still its workload stands.
    pub workload: Workload,
    /// Whether its disk refuses writes.
    pub disk_frozen: bool,
    /// Connections with streams on them: their clients attach again by pid or tag after a resume.
    pub streams: usize,
    /// Requests that were not answered in time and are sealed in the middle of their work.
    pub unfinished: usize,
    /// For how long the workload stood still when the agent answered.
    pub still_for: Duration,
    /// How long the agent took.
    pub took: Duration,
}

/// Why a guest is not quiesced.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// The guest has heard of a newer owner: this node's word counts no more.
    #[error("the guest refuses epoch {epoch}: {words}")]
    Stale {
        /// The epoch it was told.
        epoch: Epoch,
        /// Its own words.
        words: String,
    },
    /// The guest is in the middle of something around which it must not be done.
    #[error("the guest is busy: {0}")]
    Busy(String),
    /// The agent tried, and could not.
    #[error("the guest cannot: {0}")]
    Failed(String),
    /// The agent could not be asked, or said nothing in time.
    #[error("ask the guest")]
    Ask(#[source] GuestError),
}

impl QuiesceError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Stale { .. } => Remedy::WrongState,
            Self::Busy(_) => Remedy::RetryLater,
            Self::Failed(_) => Remedy::BlameGuest,
            Self::Ask(err) => err.remedy(),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    workload: Workload,
    disk_frozen: bool,
    streams: usize,
    unfinished: usize,
    still_for_us: u64,
    took_us: u64,
}

impl From<Answer> for Quiesced {
    fn from(answer: Answer) -> Self {
        Self {
            workload: answer.workload,
            disk_frozen: answer.disk_frozen,
            streams: answer.streams,
            unfinished: answer.unfinished,
            still_for: Duration::from_micros(answer.still_for_us),
            took: Duration::from_micros(answer.took_us),
        }
    }
}

impl Guest {
    /// Brings everything the guest has written to its disk, stops new work and freezes its workload.
    /// Doing it again is safe. When it succeeds, either the guest is sealed, or
    /// [`Self::undo_quiesce`] lets it go on.
    ///
    /// # Errors
    /// [`QuiesceError`]; the guest goes on then, at the latest after `undo_after`.
    pub async fn quiesce(
        &self,
        quiesce: &Quiesce,
        deadline: Instant,
    ) -> Result<Quiesced, QuiesceError> {
        let done = self.try_quiesce(quiesce, deadline).await;
        if matches!(done, Err(QuiesceError::Ask(_))) {
            // Unknown, so not certainly undone. If this fails as well, the watchdog is left.
            let soon = Instant::now() + UNDO_TIMEOUT;
            let _watchdog = self.undo_quiesce(quiesce.epoch, soon).await;
        }
        done
    }

    async fn try_quiesce(
        &self,
        quiesce: &Quiesce,
        deadline: Instant,
    ) -> Result<Quiesced, QuiesceError> {
        let order = *quiesce;
        let body = move || {
            let left = deadline.saturating_duration_since(Instant::now());
            let body = json!({
                "epoch": order.epoch.0,
                "freezeWorkload": true,
                "freezeDisk": order.freeze_disk,
                "reclaim": order.reclaim,
                "timeoutMs": millis(left.saturating_sub(ANSWER_MARGIN)),
                "undoAfterMs": millis(order.undo_after),
            });
            body.to_string().into_bytes()
        };
        let asked = self.exchange("/snapshot/prepare", body, deadline).await;
        let (status, text) = asked.map_err(QuiesceError::Ask)?;
        let answer: Answer = read(status, &text, quiesce.epoch)?;
        Ok(answer.into())
    }

    /// Has the agent drop the page cache where it is large, so that the guest reports what becomes
    /// free to the host in the next seconds. Tells whether it did.
    ///
    /// # Errors
    /// [`GuestError`]; nothing is the worse for it.
    pub async fn reclaim(&self, timeout: Duration) -> Result<bool, GuestError> {
        #[derive(Deserialize)]
        struct Answer {
            reclaimed: bool,
        }
        let text = self.call(Method::POST, "/snapshot/reclaim", None, timeout);
        let answer: serde_json::Result<Answer> = serde_json::from_slice(&text.await?);
        let answer = answer.map_err(|err| GuestError::Nonsense(err.to_string()))?;
        Ok(answer.reclaimed)
    }

    /// Lets a quiesced guest go on and tells it the time, which may have passed it by. Doing it
    /// again is safe. Tells whether there was anything to undo.
    ///
    /// # Errors
    /// [`QuiesceError`]; the guest goes on by itself in time, unless another node owns it.
    pub async fn undo_quiesce(
        &self,
        epoch: Epoch,
        deadline: Instant,
    ) -> Result<bool, QuiesceError> {
        #[derive(Deserialize)]
        struct Answer {
            undone: bool,
        }
        let body = move || {
            let body = json!({ "epoch": epoch.0, "wallClockNs": wall_clock_ns() });
            body.to_string().into_bytes()
        };
        let asked = self.exchange("/snapshot/undo", body, deadline).await;
        let (status, text) = asked.map_err(QuiesceError::Ask)?;
        let answer: Answer = read(status, &text, epoch)?;
        Ok(answer.undone)
    }
}

fn read<T: for<'a> Deserialize<'a>>(
    status: StatusCode,
    text: &[u8],
    epoch: Epoch,
) -> Result<T, QuiesceError> {
    if status.is_success() {
        let nonsense = |err: serde_json::Error| GuestError::Nonsense(err.to_string());
        return serde_json::from_slice(text).map_err(|err| QuiesceError::Ask(nonsense(err)));
    }
    let words = words(status, text);
    Err(match status {
        StatusCode::CONFLICT => QuiesceError::Stale { epoch, words },
        StatusCode::SERVICE_UNAVAILABLE => QuiesceError::Busy(words),
        StatusCode::INTERNAL_SERVER_ERROR => QuiesceError::Failed(words),
        _ => QuiesceError::Ask(GuestError::from_http(status, text)),
    })
}

/// Reads `text` as the answer to each order here.
#[cfg(feature = "fuzzing")]
pub(super) fn try_answers(status: StatusCode, text: &[u8], epoch: Epoch) {
    let _refused = read::<Answer>(status, text, epoch).map(Quiesced::from);
}

/// What the agent says in a refusal.
pub(super) fn words(status: StatusCode, text: &[u8]) -> String {
    GuestError::from_http(status, text).to_string()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(status: u16) -> QuiesceError {
        let status = StatusCode::from_u16(status).expect("a status");
        let text = br#"{"code":1,"message":"because"}"#;
        read::<Answer>(status, text, Epoch(7))
            .map(|_| ())
            .unwrap_err()
    }

    #[test]
    fn every_refusal_has_one_who_must_act() {
        for (status, remedy) in [
            (409, Remedy::WrongState),
            (503, Remedy::RetryLater),
            (500, Remedy::BlameGuest),
            (400, Remedy::FixRequest),
            (404, Remedy::NotThere),
            (401, Remedy::BlameGuest),
        ] {
            let err = refusal(status);
            assert_eq!(err.remedy(), remedy, "{status}: {err:?}");
        }
        assert_eq!(
            refusal(409).to_string(),
            "the guest refuses epoch 7: because"
        );
    }

    #[test]
    fn nonsense_is_the_guests_fault() {
        let err = read::<Answer>(StatusCode::OK, b"{}", Epoch(7)).map(|_| ());
        assert_eq!(err.unwrap_err().remedy(), Remedy::BlameGuest);
    }
}
