//! Looks for damage while nobody asks: all of the store is read again, slowly, once in a while.
//!
//! A disk loses bits in silence, and what nobody reads nobody misses, until the other copy is gone as
//! well. Whatever is found is told by the store and mended by [`crate::reconcile::copies`]. Waiting and
//! pausing are cut by a stop; a slice under way takes milliseconds.

use std::sync::Arc;
use std::time::Duration;

use proto::units::Stamp;
use tokio::task;
use tokio::time;
use tracing::{info, info_span, warn};

use crate::base::clock::Clock;
use crate::base::stop::Tasks;
use crate::store::{Round, Rounds, Slice, Store};

/// From the end of a round to the beginning of the next: bits rot over months, and two copies must
/// not both be rotten before one of them was looked at.
const ROUND_EVERY: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a node that starts is left alone: it has better things to read.
const START_AFTER: Duration = Duration::from_secs(10 * 60);
/// Most that is read in a second, on average: a tenth of what a slow disk gives, and a TiB in a day and
/// a half.
const BYTES_PER_SECOND: u64 = 8 << 20;
/// Read at once. A guest's page waits behind no more than that.
const SLICE_BYTES: u64 = 2 << 20;
/// Read between two notes of where the round stands: what a crash costs, at one small write a minute.
const NOTE_BYTES: u64 = 64 * BYTES_PER_SECOND;
/// Longest without a look at the wall clock, which may be set meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);
/// Pause where a check or a collection is under way, or the disk refuses.
const AGAIN: Duration = Duration::from_secs(60);

/// Reads `store` again and again, until `tasks` are stopped.
pub(super) fn spawn(store: Store, clock: Arc<dyn Clock>, tasks: &Tasks) {
    let stop = tasks.token().clone();
    tasks.spawn(info_span!("scrub"), async move {
        stop.run_until_cancelled(Scrub { store, clock }.run()).await;
    });
}

struct Scrub {
    store: Store,
    clock: Arc<dyn Clock>,
}

impl Scrub {
    async fn run(self) {
        time::sleep(START_AFTER).await;
        let store = self.store.clone();
        // What cannot be read begins anew.
        let mut rounds = blocking(move || store.rounds()).await.unwrap_or_default();
        loop {
            let now = self.clock.now();
            // What ended in the future did so by a clock that was set back since, or by a damaged file.
            if let Some(last) = &mut rounds.last {
                last.ended_at_ms = last.ended_at_ms.min(now.0);
            }
            let wait = due_in(&rounds, now);
            if wait > Duration::ZERO {
                time::sleep(wait.min(LOOK_AGAIN)).await;
                continue;
            }
            let round = rounds.under_way;
            let round = round.unwrap_or_else(|| Round::begun(self.clock.now()));
            rounds.under_way = Some(self.finish(rounds, round).await);
            rounds.end(self.clock.now());
            self.note(rounds).await;
            if let Some(round) = rounds.last {
                info!(
                    ?round,
                    sound = round.is_sound(),
                    "all of the store was read again"
                );
            }
        }
    }

    /// Reads all that is left of a round.
    async fn finish(&self, rounds: Rounds, mut round: Round) -> Round {
        let mut noted = round.read_bytes;
        loop {
            let (store, mut next) = (self.store.clone(), round);
            let came = blocking(move || (store.scrub(&mut next, SLICE_BYTES), next)).await;
            let pause = match came {
                Some((Ok(Slice::Over), _)) => return round,
                Some((Ok(Slice::Read(bytes)), next)) => {
                    round = next;
                    Duration::from_millis(bytes * 1000 / BYTES_PER_SECOND)
                }
                Some((Ok(Slice::Busy), _)) | None => AGAIN,
                Some((Err(err), _)) => {
                    warn!(%err, "could not look for damage; will try again");
                    AGAIN
                }
            };
            if round.read_bytes - noted >= NOTE_BYTES {
                noted = round.read_bytes;
                let under_way = Some(round);
                self.note(Rounds {
                    under_way,
                    ..rounds
                })
                .await;
            }
            time::sleep(pause).await;
        }
    }

    async fn note(&self, rounds: Rounds) {
        let store = self.store.clone();
        if let Some(Err(err)) = blocking(move || store.keep_rounds(&rounds)).await {
            warn!(%err, "where the search for damage stands is not written down");
        }
    }
}

/// How long until there is something to do. A clock that was set back does not put it off for longer
/// than a round.
fn due_in(rounds: &Rounds, now: Stamp) -> Duration {
    match (rounds.under_way, rounds.last) {
        (Some(_), _) | (None, None) => Duration::ZERO,
        (None, Some(last)) => {
            let since = now.0.saturating_sub(last.ended_at_ms);
            ROUND_EVERY.saturating_sub(Duration::from_millis(since))
        }
    }
}

/// Runs what reads the disk where blocking is allowed; `None` where it was cut short.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    task::spawn_blocking(work).await.ok()
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use proto::units::Stamp;
    use tokio::time::Instant;

    use super::*;
    use crate::base::clock::HandClock;
    use crate::store::{ChunkId, Limits};

    /// Chunks that do not compress, and how many.
    const CHUNKS: u8 = 100;

    fn chunk(n: u8) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        blake3::Hasher::new()
            .update(&[n])
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    fn filled(dir: &Path) -> Store {
        let store = Store::open(dir, Limits::default()).expect("a store");
        let seal = store.begin();
        for n in 0..CHUNKS {
            seal.put(&chunk(n)).expect("room");
        }
        drop(seal.finish(None).expect("room"));
        store
    }

    /// Turns a byte in the middle of the only pack over.
    fn rot(dir: &Path) {
        let path = dir.join("packs/00000000.pack");
        let path = match path.exists() {
            true => path,
            false => dir.join("packs/00000001.pack"),
        };
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.expect("a pack");
        let at = file.metadata().expect("a file").len() / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        file.write_all_at(&[!byte[0]], at).expect("written");
    }

    async fn ended(store: &Store, rounds: u64) -> Rounds {
        loop {
            let known = store.rounds();
            if known.last.is_some_and(|it| it.ended_at_ms >= rounds) {
                return known;
            }
            time::sleep(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_chunk_that_rots_is_found_within_a_round_at_a_bounded_rate_and_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = filled(dir.path());
        let (clock, tasks) = (HandClock::at(Stamp(1000)), Tasks::new());
        let began = Instant::now();
        spawn(store.clone(), Arc::new(clock.clone()), &tasks);
        let first = ended(&store, 1).await.last.expect("a round");
        assert!(first.is_sound(), "{first:?}");
        assert_eq!(first.chunks, u64::from(CHUNKS));
        let least = Duration::from_millis(first.read_bytes * 1000 / BYTES_PER_SECOND);
        assert!(
            began.elapsed() >= START_AFTER + least,
            "{:?}",
            began.elapsed()
        );

        let mut damage = store.damage();
        damage.mark_unchanged();
        rot(dir.path());
        // It is not looked for before its time.
        time::sleep(2 * LOOK_AGAIN).await;
        assert!(!damage.has_changed().expect("it is open"));
        clock.advance(ROUND_EVERY);
        damage.changed().await.expect("told");
        let second = ended(&store, 1001).await.last.expect("a round");
        assert_eq!(
            (second.damaged_chunks, second.chunks),
            (1, u64::from(CHUNKS) - 1)
        );
        assert!(!second.is_sound());
        let missing = (0..CHUNKS).filter(|n| !store.has(&ChunkId::of(&chunk(*n))));
        assert_eq!(missing.count(), 1);
        tasks.stop_and_join().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_a_restart_cut_off_goes_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = filled(dir.path());
        let mut round = Round::begun(Stamp(5));
        while round.read_bytes < SLICE_BYTES {
            let came = store.scrub(&mut round, 1).expect("readable");
            assert!(matches!(came, Slice::Read(_)), "{came:?}");
        }
        let before = round.chunks;
        let under_way = Some(round);
        let known = Rounds {
            under_way,
            last: None,
        };
        store.keep_rounds(&known).expect("kept");
        drop(store);
        let store = Store::open(dir.path(), Limits::default()).expect("a store");
        assert_eq!(store.rounds(), known);
        let tasks = Tasks::new();
        spawn(store.clone(), Arc::new(HandClock::at(Stamp(9))), &tasks);
        let round = ended(&store, 9).await.last.expect("a round");
        assert_eq!((round.began_at_ms, round.chunks), (5, u64::from(CHUNKS)));
        assert!(before > 0 && before < u64::from(CHUNKS));
        tasks.stop_and_join().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_ended_in_the_future_puts_the_next_off_by_a_week_and_no_more() {
        const FUTURE: u64 = u64::MAX / 2;
        let dir = tempfile::tempdir().expect("a directory");
        let store = filled(dir.path());
        let mut known = Rounds {
            under_way: Some(Round::begun(Stamp(5))),
            last: None,
        };
        known.end(Stamp(FUTURE));
        store.keep_rounds(&known).expect("kept");
        let (clock, tasks) = (HandClock::at(Stamp(1000)), Tasks::new());
        spawn(store.clone(), Arc::new(clock.clone()), &tasks);
        time::sleep(START_AFTER + LOOK_AGAIN / 2).await;
        assert_eq!(store.rounds(), known, "it is not due yet");
        clock.advance(ROUND_EVERY);
        let deadline = Instant::now() + 2 * LOOK_AGAIN;
        while store.rounds() == known || store.rounds().under_way.is_some() {
            assert!(Instant::now() < deadline, "no round began");
            time::sleep(Duration::from_secs(1)).await;
        }
        let last = store.rounds().last.expect("a round");
        assert_eq!(last.chunks, u64::from(CHUNKS));
        tasks.stop_and_join().await;
    }

    #[test]
    fn a_round_begins_a_week_after_the_last_and_a_clock_set_back_costs_no_more() {
        let mut rounds = Rounds::default();
        assert_eq!(due_in(&rounds, Stamp(0)), Duration::ZERO);
        rounds.under_way = Some(Round::begun(Stamp(1)));
        rounds.end(Stamp(1000));
        let later = |by: Duration| Stamp(1000 + u64::try_from(by.as_millis()).unwrap_or(0));
        assert_eq!(due_in(&rounds, Stamp(0)), ROUND_EVERY);
        assert_eq!(due_in(&rounds, later(ROUND_EVERY / 7)), ROUND_EVERY * 6 / 7);
        assert_eq!(due_in(&rounds, later(ROUND_EVERY * 2)), Duration::ZERO);
    }
}
