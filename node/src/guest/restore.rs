//! The first thing a restored guest is told, before anybody else may reach it.
//!
//! A restored guest believes in the time of its snapshot, draws the same random numbers as every
//! other guest made from it, and waits for peers that are gone. Its workload stands still until it
//! has confirmed one order that puts all of that right. The order may be repeated until it is
//! confirmed: its generation stays the same, while the clock is read anew each time, when the
//! connection stands and the body is sent. What a guest hears first may take it seconds to hear, since
//! its pages have to come, and a clock that was sent along would be as late. So the order is rehearsed:
//! the agent refuses one that names no life, and has its pages by then. A guest that confirms nothing by the deadline must be
//! ended: it may be running as its own twin.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use proto::epoch::Epoch;
use serde::Deserialize;
use serde_json::json;
use tokio::time::{self, Instant};

use super::error::GuestError;
use super::http::Guest;
use super::quiesce::words;
use crate::base::remedy::Remedy;

/// Where the agent takes the order.
const ROUTE: &str = "/snapshot/restore";
/// Fresh random bytes for the guest's kernel: the size of its seed.
const ENTROPY_BYTES: usize = 32;
/// Longest one attempt may take. A guest whose memory is still fetched from afar is slow, yet a
/// lost packet of the handshake must not cost the whole deadline.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Most warnings of a guest that are kept, and most characters of each: a guest may say anything.
const WARNINGS: usize = 16;
/// See [`WARNINGS`].
const WARNING_CHARS: usize = 256;
/// A guest that took longer to hear the order was told a time that has passed by then. That should not
/// be, after a rehearsal; where it is, it is told once more, and its workload sees a second step.
const CLOCK_TRUST: Duration = Duration::from_millis(200);
/// How often the order is rehearsed, and how often the time is told again, at most.
const CLOCK_TRIES: u32 = 3;
/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(25);

/// Names one life of a guest, from a restore to the next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation(pub [u8; 16]);

impl Generation {
    /// A name nobody else has.
    #[must_use]
    pub fn fresh() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({self})")
    }
}

/// What makes a guest another one than it was when it was sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The name it goes by.
    pub hostname: String,
    /// Its `/etc/machine-id`.
    pub machine_id: [u8; 16],
}

impl Fork {
    /// A guest called `hostname`, with a machine id nobody else has.
    #[must_use]
    pub fn named(hostname: impl Into<String>) -> Self {
        Self {
            hostname: hostname.into(),
            machine_id: rand::random(),
        }
    }
}

/// What a restored guest is told.
#[derive(Clone)]
pub struct Restore {
    /// The epoch under which it runs from now on: newer than any it has heard of.
    pub epoch: Epoch,
    /// Names its new life; kept for as long as the same restore is tried.
    pub generation: Generation,
    /// From now on required of every caller.
    pub token: String,
    /// The capsule's public id.
    pub sandbox_id: String,
    /// The name of its template.
    pub template: String,
    /// The environment of its processes, where it changes.
    pub env: Option<BTreeMap<String, String>>,
    /// For a guest that is not to be the one that was sealed.
    pub fork: Option<Fork>,
}

impl fmt::Debug for Restore {
    /// Without token and environment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restore")
            .field("epoch", &self.epoch)
            .field("generation", &self.generation)
            .field("sandbox_id", &self.sandbox_id)
            .field("fork", &self.fork)
            .finish_non_exhaustive()
    }
}

/// A guest that is itself again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Whether its workload had stood still until it was told. Where it had not, it may have used
    /// old random numbers or an old clock.
    pub held: bool,
    /// Connections of its past life that were cut.
    pub cut: usize,
    /// What could not be written to its disk, in its own words.
    pub warnings: Vec<String>,
    /// How long the agent took.
    pub took: Duration,
    /// How often it was told: once, if all went well.
    pub attempts: u32,
}

/// Why a guest is not restored. It must not be used.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The guest has heard of a newer owner: another node runs it or has run it.
    #[error("the guest refuses epoch {epoch}: {words}")]
    Stale {
        /// The epoch it was told.
        epoch: Epoch,
        /// Its own words.
        words: String,
    },
    /// The agent will not or cannot do it; asking again does not help.
    #[error("the guest cannot: {words}")]
    Refused {
        /// The status it answered with.
        status: u16,
        /// Its own words.
        words: String,
    },
    /// It has not confirmed by the deadline.
    #[error("the guest did not confirm its restore in {attempts} attempts")]
    Unconfirmed {
        /// How often it was told.
        attempts: u32,
        /// What came of the last attempt.
        source: GuestError,
    },
}

impl RestoreError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Stale { .. } => Remedy::WrongState,
            Self::Refused { .. } | Self::Unconfirmed { .. } => Remedy::BlameGuest,
        }
    }
}

/// What came of one attempt.
enum Attempt {
    Done(Answer),
    Final(RestoreError),
    Again(GuestError),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    held: bool,
    cut: usize,
    warnings: Vec<String>,
    took_us: u64,
}

impl Guest {
    /// Tells a restored guest who and when it is, and lets its workload run. Called with the token
    /// that the guest had when it was sealed; afterwards it demands the one in `restore`.
    ///
    /// # Errors
    /// [`RestoreError`]; the guest must then be ended.
    pub async fn restore(
        &self,
        restore: &Restore,
        deadline: Instant,
    ) -> Result<Restored, RestoreError> {
        self.rehearse(restore, deadline).await;
        for attempts in 1.. {
            let asked = Instant::now();
            let source = match self.try_restore(restore, deadline).await {
                Attempt::Done(answer) => {
                    let took = Duration::from_micros(answer.took_us);
                    let mut warnings = printable(&answer.warnings);
                    let late = asked.elapsed().saturating_sub(took);
                    if late > CLOCK_TRUST && !self.tell_time(restore, deadline).await {
                        warnings.push(format!("its clock may be late by {late:?}"));
                    }
                    return Ok(Restored {
                        held: answer.held,
                        cut: answer.cut,
                        warnings,
                        took,
                        attempts,
                    });
                }
                Attempt::Final(err) => return Err(err),
                Attempt::Again(source) => source,
            };
            if Instant::now() + RETRY_INTERVAL >= deadline {
                return Err(RestoreError::Unconfirmed { attempts, source });
            }
            time::sleep(RETRY_INTERVAL).await;
        }
        unreachable!("the deadline comes before the counter ends")
    }

    /// Has a guest touch what it takes to hear an order, until it hears one at once. Nothing of it is
    /// carried out.
    async fn rehearse(&self, restore: &Restore, deadline: Instant) {
        for _ in 0..CLOCK_TRIES {
            let asked = Instant::now();
            let order = restore.clone();
            let attempt = deadline.min(asked + ATTEMPT_TIMEOUT);
            let body = move || order.body(None);
            let heard = self.exchange(ROUTE, body, attempt).await;
            // One that is not heard at all is tried as an order, with more patience.
            if heard.is_err() || asked.elapsed() <= CLOCK_TRUST {
                return;
            }
        }
    }

    /// Tells a restored guest the time until it hears it at once; says whether it did.
    async fn tell_time(&self, restore: &Restore, deadline: Instant) -> bool {
        let Ok(guest) = Self::new(Arc::clone(self.dial()), &restore.token) else {
            return false;
        };
        for _ in 0..CLOCK_TRIES {
            let asked = Instant::now();
            // There is nothing to undo; what counts is the clock that comes with it.
            let told = guest.undo_quiesce(restore.epoch, deadline).await;
            if told.is_ok() && asked.elapsed() <= CLOCK_TRUST {
                return true;
            }
        }
        false
    }

    async fn try_restore(&self, restore: &Restore, deadline: Instant) -> Attempt {
        let order = restore.clone();
        let body = move || order.body(Some(order.generation));
        let attempt = deadline.min(Instant::now() + ATTEMPT_TIMEOUT);
        let (status, text) = match self.exchange(ROUTE, body, attempt).await {
            Ok(answered) => answered,
            Err(source) => return Attempt::Again(source),
        };
        judge(status, &text, restore.epoch)
    }
}

fn judge(status: StatusCode, text: &[u8], epoch: Epoch) -> Attempt {
    let words = || words(status, text);
    match status {
        StatusCode::OK => match serde_json::from_slice(text) {
            Ok(answer) => Attempt::Done(answer),
            Err(err) => Attempt::Again(GuestError::Nonsense(err.to_string())),
        },
        StatusCode::CONFLICT => Attempt::Final(RestoreError::Stale {
            epoch,
            words: words(),
        }),
        // The order before this one is still being carried out: perhaps an attempt of ours.
        StatusCode::SERVICE_UNAVAILABLE => Attempt::Again(GuestError::from_http(status, text)),
        _ => Attempt::Final(RestoreError::Refused {
            status: status.as_u16(),
            words: words(),
        }),
    }
}

/// Reads `text` as the answer to a restore.
#[cfg(feature = "fuzzing")]
pub(super) fn try_answer(status: StatusCode, text: &[u8], epoch: Epoch) {
    if let Attempt::Done(answer) = judge(status, text, epoch) {
        let warnings = printable(&answer.warnings);
        assert!(warnings.len() <= WARNINGS);
        let shown = warnings.iter().map(|text| text.chars().count());
        assert!(shown.max() <= Some(WARNING_CHARS));
    }
}

impl Restore {
    /// The order as the agent reads it, with the clock and the random bytes of this moment. One without
    /// a generation is refused.
    fn body(&self, generation: Option<Generation>) -> Vec<u8> {
        let entropy: [u8; ENTROPY_BYTES] = rand::random();
        let fork = self.fork.as_ref();
        let json = json!({
            "epoch": self.epoch.0,
            "generation": generation.map(|it| it.to_string()),
            "entropy": STANDARD.encode(entropy),
            "accessToken": self.token,
            "envVars": self.env,
            "sandboxId": self.sandbox_id,
            "templateId": self.template,
            "hostname": fork.map(|fork| &fork.hostname),
            "machineId": fork.map(|fork| Generation(fork.machine_id).to_string()),
            "renewSshHostKeys": fork.is_some(),
            // Read last.
            "wallClockNs": wall_clock_ns(),
        });
        json.to_string().into_bytes()
    }
}

/// What a guest says, fit for a log.
fn printable(warnings: &[String]) -> Vec<String> {
    let plain = |text: &String| {
        let characters = text.chars().filter(|c| !c.is_control());
        characters.take(WARNING_CHARS).collect()
    };
    warnings.iter().take(WARNINGS).map(plain).collect()
}

/// This host's wall clock.
pub(super) fn wall_clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt as _, Full};
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;

    use super::*;
    use crate::guest::dial::{Dial, DialFuture, GuestStream};

    fn restore() -> Restore {
        Restore {
            epoch: Epoch(7),
            generation: Generation([0xab; 16]),
            token: "secret".into(),
            sandbox_id: "cl-1".into(),
            template: "minimal".into(),
            env: None,
            fork: Some(Fork {
                hostname: "twin".into(),
                machine_id: [1; 16],
            }),
        }
    }

    #[test]
    fn each_telling_has_fresh_bytes_and_the_same_generation() {
        let tell = || {
            serde_json::from_slice::<serde_json::Value>(&restore().body(Some(restore().generation)))
                .expect("JSON")
        };
        let (one, two) = (tell(), tell());
        assert_ne!(one["entropy"], two["entropy"]);
        assert_eq!(one["generation"], two["generation"]);
        assert_eq!(one["generation"], "ab".repeat(16));
        assert_eq!(one["machineId"], "01".repeat(16));
        assert!(one["wallClockNs"].as_u64() <= two["wallClockNs"].as_u64());
    }

    /// A guest whose pages come from afar: whatever it hears first it hears late. It remembers what
    /// it was asked, whether that named a life, and how long that was under way.
    #[derive(Clone, Debug, Default)]
    struct Cold(Arc<Mutex<Vec<(String, bool, Duration)>>>);

    impl Cold {
        /// How long the first request takes to arrive.
        const LATE: Duration = Duration::from_secs(3);

        fn heard(&self) -> Vec<(String, bool, Duration)> {
            self.0.lock().expect("no panic").clone()
        }

        async fn answer(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, String> {
            let sent = Instant::now();
            if self.heard().is_empty() {
                time::sleep(Self::LATE).await;
            }
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await;
            let body = body.map_err(|err| err.to_string())?.to_bytes();
            let json: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
            let names_a_life = json["generation"].is_string();
            let heard = (path, names_a_life, sent.elapsed());
            self.0.lock().expect("no panic").push(heard);
            let done = r#"{"held":true,"cut":0,"warnings":[],"tookUs":5,"applied":true}"#;
            let (status, text) = match names_a_life {
                true => (StatusCode::OK, done),
                false => (StatusCode::BAD_REQUEST, "{}"),
            };
            let answer = Response::builder().status(status);
            Ok(answer.body(Full::from(text)).expect("an answer"))
        }
    }

    impl Dial for Cold {
        fn dial(&self) -> DialFuture {
            let guest = self.clone();
            Box::pin(async move {
                let (here, there) = tokio::io::duplex(64 << 10);
                let service = service_fn(move |request| guest.clone().answer(request));
                let serve = http1::Builder::new().serve_connection(TokioIo::new(there), service);
                tokio::spawn(serve);
                Ok(GuestStream::new(here))
            })
        }

        fn at_port(&self, _: u16) -> Arc<dyn Dial> {
            Arc::new(self.clone())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_whose_pages_come_late_is_told_a_time_that_is_right_and_once() {
        let cold = Cold::default();
        let guest = Guest::new(Arc::new(cold.clone()), "old").expect("a client");
        let deadline = Instant::now() + Duration::from_secs(60);
        let restored = guest.restore(&restore(), deadline).await.expect("restored");
        assert_eq!((restored.attempts, restored.warnings.len()), (1, 0));
        let heard = cold.heard();
        let lives: Vec<bool> = heard.iter().map(|(_, life, _)| *life).collect();
        // Late once, then once more to see that it is not; then the order, and no word after it.
        assert_eq!(lives, [false, false, true], "{heard:?}");
        assert!(heard.iter().all(|(path, ..)| path == ROUTE));
        assert_eq!(heard[0].2, Cold::LATE);
        assert!(heard[2].2 < CLOCK_TRUST);
    }

    #[test]
    fn what_a_guest_says_is_bounded_and_printable() {
        let long = format!("\x1b[31m{}\n", "x".repeat(2 * WARNING_CHARS));
        let kept = printable(&vec![long; 2 * WARNINGS]);
        assert_eq!(kept.len(), WARNINGS);
        assert_eq!(kept[0].chars().count(), WARNING_CHARS);
        assert!(kept[0].starts_with("[31mxx"));
    }

    #[test]
    fn secrets_are_not_shown() {
        assert!(!format!("{:?}", restore()).contains("secret"));
    }

    #[test]
    fn refusals_are_final_and_silence_is_not() {
        let judge = |status: u16, text: &str| {
            let status = StatusCode::from_u16(status).expect("a status");
            judge(status, text.as_bytes(), Epoch(7))
        };
        let done = r#"{"held":true,"cut":1,"warnings":[],"tookUs":5,"applied":true}"#;
        assert!(matches!(judge(200, done), Attempt::Done(_)));
        assert!(matches!(judge(200, "{}"), Attempt::Again(_)));
        assert!(matches!(judge(503, ""), Attempt::Again(_)));
        for (status, remedy) in [
            (409, Remedy::WrongState),
            (500, Remedy::BlameGuest),
            (401, Remedy::BlameGuest),
        ] {
            let Attempt::Final(err) = judge(status, "") else {
                panic!("{status} is final");
            };
            assert_eq!(err.remedy(), remedy, "{status}");
        }
    }
}
