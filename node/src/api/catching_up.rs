//! Catching up with the cluster before anybody is told that something does not exist.
//!
//! Every node answers from its own copy of the state, which may be some milliseconds behind: what a client made
//! through another node a moment ago may not be in it yet. So whoever looks in vain waits until the copy holds
//! everything that was acknowledged before, and looks once more. What is found at once costs nothing.
//!
//! ```text
//! request > look > found > answer
//!             '-- not there > a round: a quorum is asked > look again > answer
//! ```
//!
//! One round is under way at a time, and all requests that came before it began share it: one that came
//! later may ask for something that was acknowledged later. Rounds begin [`ROUND_INTERVAL`] apart. So
//! whoever asks for a thousand things that do not exist, or tries a thousand keys, makes the cluster work no
//! more than this. A request that goes away in its round leaves nothing behind: the next one begins another.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use raft::state::State;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{self, Instant};
use tracing::debug;

use super::cluster_info::NoQuorum;
use super::error::{ApiError, Code};
use super::state::ApiState;

/// Longest a round waits for news of the cluster before this node's word counts: about one election.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(2);
/// How long nobody asks again after a round without an answer: whatever is looked for in vain during an outage
/// would cost its request two seconds, and all of them together every place among the requests.
const NO_QUORUM_FOR: Duration = Duration::from_secs(1);
/// Rounds begin no closer together: a hundred a second cost the leader less than the heartbeats of a busy log, and nobody
/// notices that a 404 takes so much longer.
const ROUND_INTERVAL: Duration = Duration::from_millis(10);
/// Requests with an unknown key that may wait at once; further ones are refused at once. A quarter of all requests that a
/// node serves, so that those without a key never leave no room for those with one.
const MAX_STRANGERS: usize = 256;

/// The rounds in which a node catches up with its cluster. All copies are the same ones.
#[derive(Clone)]
pub(super) struct Rounds(Arc<Shared>);

struct Shared {
    /// How many have begun.
    begun: AtomicU64,
    /// Held by whoever is in a round.
    last: Mutex<Last>,
    strangers: Semaphore,
}

/// The last round, none at first.
#[derive(Default)]
struct Last {
    /// The number of the last one that came to its end.
    ended: u64,
    /// When the last one began.
    began_at: Option<Instant>,
    /// When the last one ended without an answer, where it did.
    failed_at: Option<Instant>,
}

impl Default for Rounds {
    fn default() -> Self {
        Self(Arc::new(Shared {
            begun: AtomicU64::new(0),
            last: Mutex::default(),
            strangers: Semaphore::new(MAX_STRANGERS),
        }))
    }
}

impl fmt::Debug for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rounds").finish_non_exhaustive()
    }
}

impl Rounds {
    /// Waits for the end of a round that began after this call, which `ask` is if nobody else begins one first.
    async fn join<F>(&self, ask: impl FnOnce() -> F)
    where
        F: Future<Output = Result<(), NoQuorum>>,
    {
        let came = self.0.begun.load(Ordering::SeqCst);
        let mut last = self.0.last.lock().await;
        let failed_lately = last
            .failed_at
            .is_some_and(|at| at.elapsed() < NO_QUORUM_FOR);
        if last.ended > came || failed_lately {
            return;
        }
        if let Some(began_at) = last.began_at {
            time::sleep_until(began_at + ROUND_INTERVAL).await;
        }
        last.began_at = Some(Instant::now());
        let round = self.0.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let answer = time::timeout(CATCH_UP_TIMEOUT, ask()).await;
        match &answer {
            Ok(Ok(())) => {}
            Ok(Err(err)) => debug!(%err, "judged by what this node knows"),
            Err(_) => debug!("judged by what this node knows: no quorum answers"),
        }
        last.failed_at = (!matches!(answer, Ok(Ok(())))).then(Instant::now);
        // Also where nobody could say: it was tried for all who wait.
        last.ended = round;
    }
}

impl ApiState {
    /// What `look` makes of this node's copy of the state. Where it finds that something is not there, or not as it must
    /// be, this node catches up with the cluster, and what it finds then counts. Without a quorum the copy counts as it
    /// is.
    pub(super) async fn found<T>(
        &self,
        look: impl Fn(State) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        match look(self.view.state()) {
            Err(err) if matches!(err.code, Code::NotFound | Code::InvalidState) => {
                self.catch_up().await;
                look(self.view.state())
            }
            told => told,
        }
    }

    /// Waits until this node's copy of the state holds everything that was acknowledged before the call, or until it is
    /// clear that nobody can say: a round that is under way, and one more.
    pub(super) async fn catch_up(&self) {
        self.rounds.join(|| self.cluster.linearize()).await;
    }

    /// The same for somebody whom this node does not know yet; `false` at once where too many of them wait.
    pub(super) async fn catch_up_for_stranger(&self) -> bool {
        let Ok(_slot) = self.rounds.0.strangers.try_acquire() else {
            return false;
        };
        self.catch_up().await;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as StdMutex;

    use tokio::sync::Notify;
    use tokio::task::{self, JoinSet};

    use super::*;

    /// A quorum that answers when it is told to, and notes when it was asked.
    #[derive(Clone, Default)]
    struct Quorum {
        asked_at: Arc<StdMutex<Vec<Instant>>>,
        answers: Arc<Notify>,
    }

    impl Quorum {
        fn asked(&self) -> usize {
            self.asked_at.lock().expect("a list").len()
        }

        fn ask(&self) -> impl Future<Output = Result<(), NoQuorum>> + Send + use<> {
            self.asked_at.lock().expect("a list").push(Instant::now());
            let answers = self.answers.clone();
            async move {
                answers.notified().await;
                Ok(())
            }
        }
    }

    /// Has a request join a round.
    fn join(waiting: &mut JoinSet<()>, rounds: &Rounds, quorum: &Quorum) {
        let (rounds, quorum) = (rounds.clone(), quorum.clone());
        waiting.spawn(async move { rounds.join(|| quorum.ask()).await });
    }

    /// Long enough for everybody to come to what they wait for.
    async fn settle() {
        time::sleep(2 * ROUND_INTERVAL).await;
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_come_during_a_round_share_the_next_one() {
        let (rounds, quorum, mut waiting) = (Rounds::default(), Quorum::default(), JoinSet::new());
        join(&mut waiting, &rounds, &quorum);
        settle().await;
        for _ in 0..100 {
            join(&mut waiting, &rounds, &quorum);
        }
        settle().await;
        assert_eq!(quorum.asked(), 1, "two rounds at once");

        quorum.answers.notify_one();
        settle().await;
        assert_eq!(quorum.asked(), 2);
        let done = waiting.try_join_next();
        assert!(done.is_some_and(|it| it.is_ok()), "the first one waits on");
        assert!(
            waiting.try_join_next().is_none(),
            "one got a round that began before it came"
        );

        quorum.answers.notify_one();
        while let Some(done) = waiting.join_next().await {
            done.expect("no panic");
        }
        assert_eq!(quorum.asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_ask_rounds_keep_their_distance() {
        let (rounds, quorum) = (Rounds::default(), Quorum::default());
        for _ in 0..50 {
            quorum.answers.notify_one();
            rounds.join(|| quorum.ask()).await;
        }
        let asked_at = quorum.asked_at.lock().expect("a list").clone();
        assert_eq!(asked_at.len(), 50);
        for pair in asked_at.windows(2) {
            assert!(pair[1] - pair[0] >= ROUND_INTERVAL, "{pair:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_whose_client_goes_away_is_begun_anew_for_the_others() {
        let (rounds, quorum) = (Rounds::default(), Quorum::default());
        let (mut leaving, mut waiting) = (JoinSet::new(), JoinSet::new());
        join(&mut leaving, &rounds, &quorum);
        settle().await;
        join(&mut waiting, &rounds, &quorum);
        settle().await;
        leaving.shutdown().await;
        settle().await;
        assert_eq!(quorum.asked(), 2);
        assert!(
            waiting.try_join_next().is_none(),
            "a round without an end counted"
        );
        quorum.answers.notify_one();
        let done = waiting.join_next().await;
        done.expect("one that waits").expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_without_a_quorum_ends_the_wait_of_all_who_share_it() {
        let rounds = Rounds::default();
        let mut waiting = JoinSet::new();
        for _ in 0..10 {
            let rounds = rounds.clone();
            waiting.spawn(async move {
                let lost = async {
                    task::yield_now().await;
                    Err(NoQuorum("the test says so".into()))
                };
                rounds.join(|| lost).await;
            });
        }
        while let Some(done) = waiting.join_next().await {
            done.expect("no panic");
        }
        // Nobody asks again at once.
        assert_eq!(rounds.0.begun.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn while_no_quorum_answers_one_request_in_a_while_waits_for_it() {
        let (rounds, quorum) = (Rounds::default(), Quorum::default());
        let began = Instant::now();
        rounds.join(|| quorum.ask()).await;
        assert_eq!(began.elapsed(), CATCH_UP_TIMEOUT);
        let began = Instant::now();
        for _ in 0..100 {
            rounds.join(|| quorum.ask()).await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO, "they waited, too");
        assert_eq!(quorum.asked(), 1);
        time::sleep(NO_QUORUM_FOR).await;
        quorum.answers.notify_one();
        rounds.join(|| quorum.ask()).await;
        rounds.join(|| async { Ok(()) }).await;
        assert_eq!(quorum.asked(), 2, "there is a quorum again");
        assert_eq!(rounds.0.begun.load(Ordering::SeqCst), 3);
    }
}
