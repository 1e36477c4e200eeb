//! What small calls and raft suffer beside bulk.
//!
//! First the delay of a small call every 5 ms while one stream saturates loopback. Two nodes'
//! transports, on runtimes of their own. Three layouts in turns: nothing else under way; the stream
//! on the bulk lane, as the product has it; the stream on the connection of the calls, which is
//! what the bulk lane is there to avoid.
//!
//! Then a group of three members ([`crate::trio`]), processes of their own that talk raft as daemons
//! do. Its leader holds a snapshot of [`Run::memory_mib`], and another member fetches all of it over
//! the bulk lane of the same transports: read, checked, hashed, encrypted, stored and made durable on
//! the disk that has their logs. Beside it one client writes one thing after the other, each of which
//! takes a round trip from the leader to a follower and a sync on both. Elections are counted by the
//! term. A lease is renewed by such a write: one that takes longer than the time between two
//! renewals is counted as late.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use node::cluster::lease::RENEW_EVERY;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;
use tokio::time::{self, MissedTickBehavior};
use transport::streams::{Inbound, StreamHandler};
use transport::{
    Call, Config, Handler, Identity, Lane, Membership, Method, RpcError, Service, Transport,
};

use crate::figures::{Samples, at_most, figure, ratio};
use crate::trio::Store as _;
use crate::trio::ours::{Door, Ours};
use crate::{Outcome, Run};

/// A service of this benchmark's.
const SERVICE: Service = Service(900);
const BEAT: Method = SERVICE.method(1);
/// Bytes of a small call.
const BEAT_BYTES: usize = 64;
/// Time between two of them.
const EVERY: Duration = Duration::from_millis(5);
/// How long one part of a round lasts, and how long a stream gets to come up to speed before.
const PART: Duration = Duration::from_millis(1200);
const WARM_UP: Duration = Duration::from_millis(200);
/// Bytes handed over at once.
const PIECE_BYTES: usize = 256 << 10;
/// Longest any call may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// A call under bulk may take this many idle ones in the middle.
const LOADED_GOAL: f64 = 2.0;
/// A heartbeat comes every 100 ms and the shortest election timeout is 300 ms.
const P99_GOAL_MS: f64 = 50.0;

/// How long the group is written to while nothing else is under way: as long as the fetch takes.
const CALM: Duration = Duration::from_secs(3);
/// The next write begins so much after the last one's answer, so that the client is no load itself.
const PAUSE: Duration = Duration::from_millis(2);

/// One layout.
struct Layout {
    name: &'static str,
    bulk: Option<Lane>,
    beats: Samples,
    mib_per_second: Samples,
}

impl Layout {
    fn new(name: &'static str, bulk: Option<Lane>) -> Self {
        Self {
            name,
            bulk,
            beats: Samples::default(),
            mib_per_second: Samples::default(),
        }
    }

    fn print(&self) {
        let name = format!("heartbeat_{}", self.name);
        self.beats.print(&name, "ms");
        if self.bulk.is_some() {
            let bulk = format!("{name}_bulk");
            self.mib_per_second.print_p50(&bulk, "MiB/s");
        }
    }
}

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let (here, there) = (Runtime::new()?, Runtime::new()?);
    let far = start(&there)?;
    let near = start(&here)?;
    far.register(SERVICE, Echo);
    for lane in [Lane::Control, Lane::Bulk] {
        far.register_streams(SERVICE, lane, Swallow);
    }
    for node in [&near, &far] {
        node.set_membership(Membership {
            index: 1,
            members: [near.key(), far.key()].into(),
            join_open: false,
        });
    }
    here.block_on(connect(&near, &far))?;
    let mut layouts = [
        Layout::new("idle", None),
        Layout::new("beside_bulk", Some(Lane::Bulk)),
        Layout::new("same_connection", Some(Lane::Control)),
    ];
    for round in 1..=run.runs {
        run.go_on()?;
        for layout in &mut layouts {
            here.block_on(measure(&near, &far, layout))?;
        }
        run.note(&format!("round {round} of {}", run.runs));
    }
    layouts.iter().for_each(Layout::print);
    let [idle, beside, same] = &layouts;
    let p50 = (beside.beats.p50(), idle.beats.p50());
    ratio("heartbeat_p50_over_idle", p50.0, p50.1, LOADED_GOAL);
    let same = same.beats.p50();
    ratio("heartbeat_p50_over_same_connection", p50.0, same, 1.0);
    at_most("heartbeat_beside_bulk_p99", beside.beats.p99(), P99_GOAL_MS);
    stop(&here, near);
    stop(&there, far);
    beside_snapshot(run)
}

/// Writes of a raft group while a snapshot goes from its leader to another member.
fn beside_snapshot(run: &Run) -> Outcome {
    let folder = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let runtime = Runtime::new()?;
    let mut group = Beside::default();
    runtime.block_on(group.measure(run, folder.path()))?;
    group.print(run);
    Ok(())
}

/// What a raft group's writes took.
#[derive(Default)]
struct Beside {
    idle: Samples,
    beside: Samples,
    mib_per_second: Samples,
    elections: u64,
    late: usize,
}

impl Beside {
    async fn measure(&mut self, run: &Run, folder: &std::path::Path) -> Outcome {
        let ours = Ours::start(folder).await?;
        let leader = ours.leader().await?;
        let mut doors = ours.doors();
        let leads = doors.swap_remove(leader);
        let takes = doors.swap_remove(0);
        let held = leads.hold(run.memory_mib).await?;
        let term = ours.term().await?;
        for round in 1..=run.runs.div_ceil(2) {
            run.go_on()?;
            let calm = async {
                time::sleep(CALM).await;
                Ok(())
            };
            let idle = self.writes(&leads, calm).await?;
            idle.into_iter().for_each(|took| self.idle.add_ms(took));
            let began = Instant::now();
            let beside = self.writes(&leads, takes.fetch(&held)).await?;
            let mib = f64::from(run.memory_mib);
            self.mib_per_second.add(mib / began.elapsed().as_secs_f64());
            beside.into_iter().for_each(|took| self.beside.add_ms(took));
            run.note(&format!("raft beside a snapshot, round {round}"));
        }
        self.elections = ours.term().await? - term;
        Ok(())
    }

    /// Writes one thing after the other until `until` is done.
    async fn writes(
        &mut self,
        leader: &Door,
        until: impl Future<Output = Result<(), String>>,
    ) -> Outcome<Vec<Duration>> {
        let mut times = Vec::new();
        let mut until = std::pin::pin!(until);
        loop {
            let began = Instant::now();
            let mut put = std::pin::pin!(leader.put(0));
            let over = tokio::select! {
                put = &mut put => {
                    put?;
                    false
                }
                over = &mut until => {
                    over?;
                    put.await?;
                    true
                }
            };
            times.push(began.elapsed());
            if over {
                break;
            }
            time::sleep(PAUSE).await;
        }
        self.late += times.iter().filter(|took| **took >= RENEW_EVERY).count();
        Ok(times)
    }

    fn print(&self, run: &Run) {
        figure("heartbeat_snapshot", run.memory_mib.into(), "MiB");
        self.idle.print("heartbeat_raft_idle", "ms");
        self.beside.print("heartbeat_raft_beside_snapshot", "ms");
        let speed = "heartbeat_raft_beside_snapshot_bulk";
        self.mib_per_second.print_p50(speed, "MiB/s");
        let (beside, idle) = (self.beside.p99(), self.idle.p99());
        // As bad as bulk may be for anybody: what counts is that nobody misses a heartbeat.
        figure("heartbeat_raft_p99_over_idle", beside / idle, "x");
        at_most("heartbeat_raft_beside_snapshot_p99", beside, P99_GOAL_MS);
        // Neither may happen at all.
        let times = |name: &str, count: f64| ratio(name, count, 1.0, 0.0);
        times("heartbeat_raft_elections", self.elections as f64);
        times("heartbeat_raft_late_renewals", self.late as f64);
    }
}

fn start(runtime: &Runtime) -> Outcome<Arc<Transport>> {
    let _inside = runtime.enter();
    let any = "127.0.0.1:0".parse()?;
    let transport = Transport::start(&Identity::ephemeral()?, Config::at(any, any))?;
    Ok(Arc::new(transport))
}

fn stop(runtime: &Runtime, node: Arc<Transport>) {
    runtime.block_on(node.stop(deadline()));
}

fn deadline() -> time::Instant {
    time::Instant::now() + PATIENCE
}

async fn connect(near: &Transport, far: &Transport) -> Outcome {
    for lane in [Lane::Control, Lane::Bulk] {
        let address = far.local_addr(lane)?;
        near.connect(lane, address, far.key(), deadline()).await?;
    }
    Ok(())
}

async fn measure(near: &Arc<Transport>, far: &Transport, layout: &mut Layout) -> Outcome {
    let Some(lane) = layout.bulk else {
        return beat(near, far, &mut layout.beats).await;
    };
    // An unused bulk connection may have been closed meanwhile.
    connect(near, far).await?;
    let peer = far.key();
    let header = Bytes::new();
    let stream = near.open_stream(lane, peer, SERVICE, header, deadline());
    let mut stream = stream.await?;
    let start = Instant::now();
    let sending = tokio::spawn(async move {
        let piece = vec![0; PIECE_BYTES];
        let mut sent = 0_usize;
        while start.elapsed() < WARM_UP + PART {
            stream.write_all(&piece).await?;
            sent += piece.len();
        }
        stream.shutdown().await?;
        // The other end has everything when it ends the stream too.
        stream.read_to_end(&mut Vec::new()).await?;
        std::io::Result::Ok(sent)
    });
    time::sleep(WARM_UP).await;
    beat(near, far, &mut layout.beats).await?;
    let sent = sending.await??;
    let mib = sent as f64 / f64::from(1 << 20);
    layout
        .mib_per_second
        .add(mib / start.elapsed().as_secs_f64());
    Ok(())
}

/// Small calls for [`PART`], one every [`EVERY`]; a late one makes none of the others late.
async fn beat(near: &Arc<Transport>, far: &Transport, beats: &mut Samples) -> Outcome {
    let mut ticks = time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let peer = far.key();
    let start = Instant::now();
    let mut under_way = tokio::task::JoinSet::new();
    while start.elapsed() < PART {
        ticks.tick().await;
        let near = Arc::clone(near);
        under_way.spawn(async move {
            let body = Bytes::from_static(&[0; BEAT_BYTES]);
            let asked = Instant::now();
            let answer = near.call(peer, BEAT, body, deadline()).await;
            answer.map(|_| asked.elapsed())
        });
    }
    while let Some(took) = under_way.join_next().await {
        beats.add_ms(took??);
    }
    Ok(())
}

/// Sends each call's body back.
struct Echo;

impl Handler for Echo {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        Ok(call.body)
    }
}

/// Reads streams to their end.
struct Swallow;

impl StreamHandler for Swallow {
    async fn open(&self, inbound: Inbound) {
        let Ok(mut stream) = inbound.accept().await else {
            return;
        };
        // What breaks the stream shows at its sender.
        let read = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        if read.is_ok() {
            drop(stream.shutdown().await);
        }
    }
}
