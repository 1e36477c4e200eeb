//! What hosts of one team are sent instead of the log: both ends.
//!
//! ```text
//! host     mark of what it has (0: nothing) ----------------> member  newest slice - what was sent
//! host     follow <--- rows, a new mark, more to come? -----  member  remembers what the host has now
//! ```
//!
//! A member remembers, for each host, the slice it has sent so far and under which mark. Whoever comes
//! with another mark (a restart at either end, another member, an answer that was lost) is sent the
//! whole slice and drops what it had. A slice that is too large for one answer comes in parts, and
//! the host shows nothing of it before the last one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::ids::NodeId;
use proto::wire::mesh as wire;
use raft::state::{BadRow, Change, State};

/// Bytes of rows in one answer; well below the largest frame.
const PART_BYTES: usize = 1 << 20;

/// The member's end: what each host has.
#[derive(Debug, Default)]
pub(super) struct SentSlices {
    sent: Mutex<HashMap<NodeId, Sent>>,
}

#[derive(Debug)]
struct Sent {
    mark: u64,
    has: State,
}

impl SentSlices {
    /// What `host`, which has what was sent under `mark`, lacks of `newest`, its slice.
    pub(super) fn next(&self, host: NodeId, mark: u64, newest: &State) -> wire::Slice {
        self.next_part(host, mark, newest, PART_BYTES)
    }

    /// Forgets every host that `is_there` denies.
    pub(super) fn keep_only(&self, is_there: impl Fn(NodeId) -> bool) {
        self.lock().retain(|host, _| is_there(*host));
    }

    fn next_part(&self, host: NodeId, mark: u64, newest: &State, bytes: usize) -> wire::Slice {
        let mut sent = self.lock();
        let known = sent.remove(&host).filter(|sent| sent.mark == mark);
        let whole = known.is_none();
        let mut has = known.map(|sent| sent.has).unwrap_or_default();
        let mut changes = newest.changes_since(&has);
        let fits = fitting(&changes, bytes);
        let more = fits < changes.len();
        changes.truncate(fits);
        // Rows of our own making can be read; if not, the next answer begins anew.
        let followed = has.follow(changes.iter().cloned());
        let mark = rand::random_range(1..=u64::MAX);
        if followed.is_ok() {
            sent.insert(host, Sent { mark, has });
        }
        wire::Slice {
            whole,
            rows: changes.into_iter().map(row).collect(),
            mark,
            more,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Sent>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many of `changes` an answer of about `bytes` takes: at least one, where there is any.
fn fitting(changes: &[Change], bytes: usize) -> usize {
    let mut room = bytes;
    let fits = changes.iter().take_while(|(key, value)| {
        let needed = key.len() + value.as_ref().map_or(0, Vec::len);
        let fits = needed <= room;
        room = room.saturating_sub(needed);
        fits
    });
    fits.count().max(1).min(changes.len())
}

fn row((key, value): Change) -> wire::SliceRow {
    wire::SliceRow { key, value }
}

/// The host's end: what has arrived so far.
#[derive(Debug, Default)]
pub(super) struct ReceivedSlice {
    /// Under which mark; 0 for nothing.
    pub(super) mark: u64,
    /// Whether parts are still to come.
    pub(super) is_partial: bool,
    state: State,
}

impl ReceivedSlice {
    /// Takes a part over; `Some` with the whole slice after the last one.
    ///
    /// # Errors
    /// [`BadRow`] for a row that this version cannot read; what was there before is dropped.
    pub(super) fn take(&mut self, part: wire::Slice) -> Result<Option<State>, BadRow> {
        let mut state = std::mem::take(self).state;
        if part.whole {
            state = State::default();
        }
        state.follow(part.rows.into_iter().map(|row| (row.key, row.value)))?;
        *self = Self {
            mark: part.mark,
            is_partial: part.more,
            state,
        };
        Ok((!part.more).then(|| self.state.clone()))
    }
}

#[cfg(test)]
mod tests {
    use proto::units::{Mib, Stamp};
    use raft::command::{Command, Proposal};
    use raft::state::{Settings, Template};

    use super::*;

    const HOST: NodeId = NodeId(9);

    /// A state with `count` templates; that they are no slice of anything does not matter here.
    fn state(count: u8) -> State {
        let mut state = State::default();
        let found = Command::FoundCluster {
            id: proto::ids::ClusterId([1; 16]),
            settings: Settings::default(),
        };
        let template = |n: u8| {
            Command::PutTemplate(Template {
                name: format!("template-{n}"),
                digest: [n; 32],
                disk: Mib(1),
                size_bytes: 1,
                created_at: Stamp(0),
            })
        };
        let commands = std::iter::once(found).chain((0..count).map(template));
        for (index, command) in (1..).zip(commands) {
            let at = Stamp(index);
            let applied = state.apply(index, Proposal { at, command });
            applied.answer.expect("the command fits");
        }
        state
    }

    fn same(one: &State, other: &State) -> bool {
        one.changes_since(other).is_empty()
    }

    #[test]
    fn a_host_is_sent_everything_once_and_then_what_has_changed() {
        let (sent, mut host) = (SentSlices::default(), ReceivedSlice::default());
        let part = sent.next(HOST, host.mark, &state(5));
        assert!(part.whole);
        let got = host.take(part).expect("readable").expect("complete");
        assert!(same(&got, &state(5)));
        let part = sent.next(HOST, host.mark, &state(6));
        assert!(!part.whole);
        assert_eq!(part.rows.len(), 1);
        let got = host.take(part).expect("readable").expect("complete");
        assert!(same(&got, &state(6)));
        let part = sent.next(HOST, host.mark, &state(6));
        assert!(part.rows.is_empty());
    }

    #[test]
    fn a_mark_that_is_not_the_last_one_brings_the_whole_slice_and_drops_the_rest() {
        let (sent, mut host) = (SentSlices::default(), ReceivedSlice::default());
        let lost = sent.next(HOST, host.mark, &state(5));
        drop(lost);
        let part = sent.next(HOST, host.mark, &state(5));
        assert!(part.whole, "the first answer never arrived");
        host.take(part).expect("readable");
        let other_member = SentSlices::default();
        let part = other_member.next(HOST, host.mark, &state(3));
        assert!(part.whole);
        let got = host.take(part).expect("readable").expect("complete");
        assert!(same(&got, &state(3)), "what is gone is dropped");
    }

    #[test]
    fn a_large_slice_comes_in_parts_and_is_shown_when_it_is_whole() {
        let (sent, mut host) = (SentSlices::default(), ReceivedSlice::default());
        let newest = state(20);
        let mut parts = 0;
        let got = loop {
            parts += 1;
            let part = sent.next_part(HOST, host.mark, &newest, 100);
            if let Some(got) = host.take(part).expect("readable") {
                break got;
            }
            assert!(host.is_partial);
        };
        assert!(parts > 5, "{parts}");
        assert!(same(&got, &newest));
    }

    #[test]
    fn a_row_that_cannot_be_read_drops_everything() {
        let (sent, mut host) = (SentSlices::default(), ReceivedSlice::default());
        host.take(sent.next(HOST, 0, &state(2))).expect("readable");
        let mut part = sent.next(HOST, host.mark, &state(3));
        part.rows[0].value = Some(vec![0xff; 9]);
        assert!(host.take(part).is_err());
        assert_eq!(host.mark, 0);
    }

    #[test]
    fn hosts_that_are_gone_are_forgotten() {
        let sent = SentSlices::default();
        sent.next(HOST, 0, &state(1));
        sent.keep_only(|host| host != HOST);
        assert!(sent.lock().is_empty());
    }
}
