//! Clone hygiene: what a guest must notice of having been away, and must not, once it goes on.
//!
//! One guest is paused once and brought back from that one snapshot again and again: on its own
//! node, on another after its VMM was killed, and as somebody else. [`rows`] is the table of what is
//! expected each time and why; a guest's own programs (`resident.py`, `facts.py`) and its host say
//! what is so ([`life`]). All rows of a case are judged before any of them fails.

mod life;
mod rows;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wrenn_cluster_tests::client::{Answer, wait_for};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::outside::Outside;
use wrenn_cluster_tests::world::{World, signal};

use self::life::{Life, furnish, host_clock};
use self::rows::{Case, Identity};
use crate::any_node::begin_exec;
use crate::witness::{Witness, vmms};
use crate::{MEMORY_MB, PATIENCE, led_to, name};

/// The two nodes.
const HOME: u16 = 1;
const AWAY: u16 = 2;
/// The port of the echo server outside.
const PORT: u16 = 7272;
/// How long the guest stands still at least: more than any inaccuracy of clocks.
const STANDSTILL: Duration = Duration::from_secs(2);
/// Pause of a client between two commands.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// So many commands in a row must work before a resumed guest counts as served.
const SERVED: u64 = 3;

#[test]
fn a_guest_that_is_brought_back_is_right_in_every_row() {
    let outside = Outside::new();
    outside.serve(PORT, echo);
    let cluster = ClusterWorld::new(2);
    let id = led_to(&cluster, HOME, &json!({ "memory_mb": MEMORY_MB }));
    let world = cluster.client(HOME);
    furnish(world, &id, SocketAddr::from((outside.public, PORT)));
    let under_way = begin_exec(world, &id, "4321");
    let before = Life::of(world, &id);
    let stopped = paused(&cluster, &id);
    let snapshot = Snapshot {
        before,
        stopped,
        cut: last_word(under_way),
    };

    let here = snapshot.resumed(&cluster, HOME, None);
    here.judge("resumed on its own node");
    end_vmm(&cluster, &id, HOME);
    let there = snapshot.resumed(&cluster, AWAY, Some(here.after));
    there.judge("resumed from the same snapshot on another node");
    end_vmm(&cluster, &id, AWAY);
    let forks = snapshot.forked(&cluster, &there.after);
    for fork in &forks {
        fork.judge("forked from the same snapshot");
        world.destroy(&fork.after.id);
    }

    world.destroy(&id);
    for number in [HOME, AWAY] {
        cluster.client(number).wait_only(&[]);
    }
}

/// Sends back what it gets.
fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

/// Pauses the guest, once both nodes can bring it back; tells when it certainly stood still.
fn paused(cluster: &ClusterWorld, id: &str) -> Duration {
    let world = cluster.client(HOME);
    let answer = world.about("POST", id, "/pause", None);
    let stopped = host_clock();
    assert_eq!(answer.status, 200, "{}\n{}", answer.json(), world.log());
    let copied = wait_for(PATIENCE, || {
        (world.record(id)["replicas"].as_u64()? >= 2).then_some(())
    });
    assert!(copied.is_some(), "{}\n{}", world.record(id), cluster.logs());
    stopped
}

/// Kills the guest's VMM, whereupon the capsule rests in the snapshot it was resumed from.
fn end_vmm(cluster: &ClusterWorld, id: &str, on: u16) {
    let world = cluster.client(on);
    signal(vmms(&world.data(), id)[0], Signal::SIGKILL);
    let rests = world.wait_status(id, "paused");
    assert!(rests["reason"].is_string(), "{rests}");
    world.wait_only(&[]);
}

/// What the guest is brought back from.
struct Snapshot {
    /// The guest before.
    before: Life,
    /// When it certainly stood still.
    stopped: Duration,
    /// What the client of a command heard that was under way.
    cut: Option<String>,
}

impl Snapshot {
    /// Resumes the guest on a node, asked for twice at once and with clients that do not wait.
    fn resumed(&self, cluster: &ClusterWorld, on: u16, twin: Option<Life>) -> Case {
        let (world, id) = (cluster.client(on), &self.before.id);
        let order = |act: &str| {
            let path = format!("/v1/nodes/{}/{act}", name(HOME + AWAY - on));
            assert_eq!(world.call("POST", &path, None).status, 200);
        };
        order("cordon");
        let stood = host_clock().saturating_sub(self.stopped);
        thread::sleep(STANDSTILL.saturating_sub(stood));
        let witness = Witness::of(id);
        let clients = Clients::default();
        let asked = host_clock();
        let answers = thread::scope(|scope| {
            let asking = scope.spawn(|| clients.ask(world, id));
            let answers = asked_twice(cluster, id);
            clients.resumed.store(true, Ordering::SeqCst);
            asking.join().expect("clients hear no error");
            answers
        });
        order("uncordon");
        assert_eq!(world.record(id)["node"], name(on));
        Case {
            identity: Identity::Same,
            before: self.before.clone(),
            after: Life::settled(world, id),
            twin,
            stopped: self.stopped,
            asked,
            cut: self.cut.clone(),
            answers,
            refused: clients.refused.into_inner(),
            broken: clients.broken.into_inner().expect("no panic"),
            vmms: witness.report().most(),
        }
    }
}

impl Snapshot {
    /// Forks the capsule twice at once while it rests: two guests that know nothing of each other.
    fn forked(&self, cluster: &ClusterWorld, twin: &Life) -> [Case; 2] {
        let world = cluster.client(HOME);
        let asked = host_clock();
        let count = json!({ "count": 2 });
        let answer = world.about("POST", &self.before.id, "/fork", Some(&count));
        assert_eq!(answer.status, 201, "{}\n{}", answer.json(), cluster.logs());
        let [first, second] = [0, 1].map(|at| self.fork(cluster, &answer.json()[at], asked));
        let [mut first, mut second] = [first, second];
        first.twin = Some(twin.clone());
        second.twin = Some(first.after.clone());
        [first, second]
    }

    /// One fork, which is said to run.
    fn fork(&self, cluster: &ClusterWorld, said: &Value, asked: Duration) -> Case {
        let id = said["id"].as_str().expect("an id");
        let host = [HOME, AWAY]
            .into_iter()
            .find(|it| said["node"] == name(*it));
        let world = cluster.client(host.expect("a node of the cluster"));
        let clients = Clients::default();
        clients.resumed.store(true, Ordering::SeqCst);
        clients.ask(world, id);
        Case {
            identity: Identity::New,
            before: self.before.clone(),
            after: Life::settled(world, id),
            twin: None,
            stopped: self.stopped,
            asked,
            cut: self.cut.clone(),
            answers: Vec::new(),
            refused: clients.refused.into_inner(),
            broken: clients.broken.into_inner().expect("no panic"),
            vmms: vmms(&world.data(), id).len(),
        }
    }
}

/// What a client hears whose command is cut off by a pause.
fn last_word(mut under_way: TcpStream) -> Option<String> {
    let limit = Some(PATIENCE);
    under_way.set_read_timeout(limit).expect("above zero");
    let mut heard = [0; 4096];
    let length = under_way.read(&mut heard).ok()?;
    let heard = String::from_utf8_lossy(&heard[..length]).into_owned();
    Some(heard.lines().next().unwrap_or_default().to_owned())
}

/// Asks both nodes for the same resume at once.
fn asked_twice(cluster: &ClusterWorld, id: &str) -> Vec<Answer> {
    let ask = |number| cluster.client(number).about("POST", id, "/resume", None);
    thread::scope(|scope| {
        let asking = [HOME, AWAY].map(|number| scope.spawn(move || ask(number)));
        let answered = asking.into_iter().map(|asking| asking.join());
        answered.map(|answer| answer.expect("an answer")).collect()
    })
}

/// Somebody who runs commands all the time while a guest is brought back.
#[derive(Default)]
struct Clients {
    resumed: AtomicBool,
    refused: AtomicU64,
    broken: std::sync::Mutex<Vec<String>>,
}

impl Clients {
    /// Runs commands through a node until some have worked after the resume was answered.
    fn ask(&self, world: &World, id: &str) {
        let request = json!({ "cmd": "echo", "args": ["here"] });
        let deadline = Instant::now() + PATIENCE;
        let mut served = 0;
        while served < SERVED && Instant::now() < deadline {
            let was_resumed = self.resumed.load(Ordering::SeqCst);
            let answer = world.run(id, &request);
            match (answer.status, answer.refusal().1.as_str()) {
                (200, _) if answer.json()["stdout"] == "here\n" => {
                    served += u64::from(was_resumed);
                }
                (409, "invalid_state") if !was_resumed => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
                (status, _) => {
                    let told = format!("{status} {}", answer.json());
                    self.broken.lock().expect("no panic").push(told);
                }
            }
            thread::sleep(ASK_AGAIN);
        }
    }
}
