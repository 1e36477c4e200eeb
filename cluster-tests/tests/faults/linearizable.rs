//! What clients of all nodes are told, while nodes die, hang and lose each other, could have come
//! from one machine.
//!
//! Clients overwrite and read tags of nodes (registers) and make, withdraw and look up join tokens,
//! through every node at once. Whatever brings no answer counts as unknown, whatever is refused for
//! good as never done; then the checker looks for an order that explains it all. At the end every
//! node is asked for everything once more, so that what was lost shows.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use std::{env, thread};

use serde_json::{Value, json};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::history::{
    ApiKey, ApiKeyAction, ApiKeySeen, Client, Limits, Recorder, Register, RegisterAction,
};

use crate::chance::Chance;
use crate::door::{Change, Door, Told};
use crate::three_alone;

/// How long faults go on.
const FAULTS_FOR: Duration = Duration::from_secs(30);
/// The same where it may take long.
const LONG_FAULTS_FOR: Duration = Duration::from_secs(600);
/// Clients of one node: fewer would leave it idle while one of them waits.
const CLIENTS: usize = 3;
/// Tries to catch a write on its way.
const LATE_ROUNDS: u64 = 60;
/// As many of them show it.
const LATE_ENOUGH: u32 = 3;
/// Fewer answers than this, and the history shows nothing.
const ENOUGH: usize = 500;

type Tags = Register<String>;

/// What all clients share.
struct Work {
    doors: Vec<Door>,
    tags: Recorder<Tags>,
    tokens: Recorder<ApiKey>,
    /// Tokens that some client was told of.
    known: Mutex<Vec<String>>,
    answered: AtomicUsize,
    over: AtomicBool,
}

/// A node hangs after it has sent a write on and before it hears of the answer. When it goes on, the
/// answer counts as lost; making the write again would undo what others have written since.
#[test]
fn i8_a_write_whose_answer_came_late_is_not_made_a_second_time() {
    let cluster = three_alone();
    let leader = cluster.wait_leader();
    let slow = 1 + leader % 3;
    let (near, far) = (Door::of(&cluster, leader), Door::of(&cluster, slow));
    let mut caught = 0;
    for round in 0..LATE_ROUNDS {
        if caught == LATE_ENOUGH {
            break;
        }
        let (early, late) = (format!("early{round}"), format!("late{round}"));
        let (is_caught, sent) = thread::scope(|scope| {
            let sent = scope.spawn(|| tag(&far, &early));
            thread::sleep(Duration::from_micros(500 * (round % 12)));
            cluster.pause(slow);
            // Long enough for the write to arrive, if it was on its way.
            thread::sleep(Duration::from_millis(100));
            let is_caught = value(&near).as_ref() == Some(&early) && !sent.is_finished();
            if is_caught {
                assert!(matches!(tag(&near, &late), Change::Made(_)));
                // Longer than one attempt lasts of what may be made again.
                thread::sleep(Duration::from_millis(1200));
            }
            cluster.resume(slow);
            (is_caught, sent.join().expect("a client"))
        });
        caught += u32::from(is_caught);
        let now = value(&near);
        let undone = is_caught && now.as_ref() != Some(&late);
        assert!(
            !undone,
            "round {round}: {late} was overwritten by {now:?}, {sent:?}"
        );
    }
    assert_eq!(caught, LATE_ENOUGH, "too few writes were on their way");
}

fn tag(door: &Door, value: &str) -> Change {
    door.change(
        "PUT",
        "/v1/nodes/node1/tags",
        Some(&json!({ "value": value })),
    )
}

fn value(door: &Door) -> Option<String> {
    let node = door.list("/v1/nodes/node1")?;
    node["tags"]["value"].as_str().map(str::to_owned)
}

#[test]
fn i8_clients_of_dying_hanging_and_parted_nodes_see_one_history() {
    let mut cluster = three_alone();
    let seed = seed();
    println!("WRENN_SEED={seed}");
    let work = Work {
        doors: Door::all(&cluster),
        tags: Recorder::new(),
        tokens: Recorder::new(),
        known: Mutex::default(),
        answered: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        for (at, door) in work.doors.iter().enumerate() {
            for client in 0..CLIENTS {
                let chance = Chance::new(seed ^ (at * CLIENTS + client + 1) as u64);
                let work = &work;
                scope.spawn(move || work.run(door, chance));
            }
        }
        let ended = Ended(&work.over);
        disturb(&mut cluster, Chance::new(seed));
        drop(ended);
    });
    cluster.wait_members(3);
    work.look_at_everything();
    let answered = work.answered.load(Ordering::Relaxed);
    for report in [
        work.tags.history().check(&Limits::default()),
        work.tokens.history().check(&Limits::default()),
    ] {
        println!("{answered} answers; {report}");
        report.unwrap();
    }
    assert!(answered > ENOUGH, "{answered} answers show little");
}

/// Ends the clients, also when the faults end in a panic.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn seed() -> u64 {
    let given = env::var("WRENN_SEED").ok().and_then(|it| it.parse().ok());
    given.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        u64::from(now.expect("after 1970").subsec_nanos())
    })
}

/// One fault after the other, with time to recover from some and none from others.
fn disturb(cluster: &mut ClusterWorld, mut chance: Chance) {
    let lasting = match env::var_os("WRENN_LONG") {
        Some(_) => LONG_FAULTS_FOR,
        None => FAULTS_FOR,
    };
    let begun = Instant::now();
    while begun.elapsed() < lasting {
        let victim = match chance.percent(50) {
            true => cluster.wait_leader(),
            false => *chance.pick(&[1, 2, 3]),
        };
        let others: Vec<u16> = (1..=3).filter(|it| *it != victim).collect();
        let what = chance.below(10);
        println!(
            "{:>6.1} s: {victim} fault {what}",
            begun.elapsed().as_secs_f64()
        );
        match what {
            0..3 => {
                cluster.kill(victim);
                thread::sleep(chance.millis(0, 2500));
                cluster.start(victim);
            }
            3..6 => {
                cluster.pause(victim);
                thread::sleep(chance.millis(300, 4000));
                cluster.resume(victim);
            }
            6..8 => {
                cluster.isolate(victim);
                thread::sleep(chance.millis(1000, 5000));
                cluster.heal();
            }
            8 => {
                // The third still reaches both.
                cluster.partition(&[&[victim], &[*chance.pick(&others)]]);
                thread::sleep(chance.millis(1000, 5000));
                cluster.heal();
            }
            _ => {
                (1..=3).for_each(|number| cluster.kill(number));
                cluster.start_all(&[others[1], victim, others[0]]);
            }
        }
        thread::sleep(chance.millis(0, 2000));
    }
}

impl Work {
    /// One client: one thing after the other, through one node.
    fn run(&self, door: &Door, mut chance: Chance) {
        let (tags, tokens) = (self.tags.client(), self.tokens.client());
        let mut count = 0;
        while !self.over.load(Ordering::Relaxed) {
            count += 1;
            let key = format!("node{}", 1 + chance.below(3));
            let answered = match chance.below(100) {
                0..40 => self.write_tag(&tags, door, &key, &format!("{chance:?}{count}")),
                40..85 => self.read_tag(&tags, door, &key),
                85..90 => self.make_token(&tokens, door),
                90..94 => self.revoke_token(&tokens, door, &mut chance),
                _ => self.look_up_token(&tokens, door, &mut chance),
            };
            self.answered
                .fetch_add(usize::from(answered), Ordering::Relaxed);
            // A dead node answers at once, and must not keep a core busy with it.
            thread::sleep(chance.millis(5, 30));
        }
    }

    fn write_tag(&self, client: &Client<Tags>, door: &Door, key: &str, value: &str) -> bool {
        let value: String = value.chars().filter(char::is_ascii_alphanumeric).collect();
        let call = client.invoke(key, RegisterAction::Write(value.clone()));
        let path = format!("/v1/nodes/{key}/tags");
        match door.change("PUT", &path, Some(&json!({ "value": value }))) {
            Change::Made(_) => {
                call.answered(Some(value));
                return true;
            }
            Change::Refused(told) => {
                assert!(!is_client_error(&told), "{told:?}");
                call.refused();
            }
            Change::Unknown => call.unknown(),
        }
        false
    }

    fn read_tag(&self, client: &Client<Tags>, door: &Door, key: &str) -> bool {
        let call = client.invoke(key, RegisterAction::Read);
        let Some(node) = door.list(&format!("/v1/nodes/{key}")) else {
            call.unknown();
            return false;
        };
        call.answered(node["tags"]["value"].as_str().map(str::to_owned));
        true
    }

    fn make_token(&self, client: &Client<ApiKey>, door: &Door) -> bool {
        let call = client.invoke_unnamed(ApiKeyAction::Create);
        match door.make_token() {
            Change::Made(answer) => {
                let made = answer.json();
                let id = made["id"].as_str().expect("an id").to_owned();
                call.named(&id).answered(ApiKeySeen::Valid);
                self.known.lock().expect("no panic").push(id);
                true
            }
            Change::Refused(told) => {
                assert!(!is_client_error(&told), "{told:?}");
                call.refused();
                false
            }
            Change::Unknown => {
                call.unknown();
                false
            }
        }
    }

    fn revoke_token(&self, client: &Client<ApiKey>, door: &Door, chance: &mut Chance) -> bool {
        let Some(id) = self.some_token(chance) else {
            return false;
        };
        let call = client.invoke(&id, ApiKeyAction::Revoke);
        match door.change("DELETE", &format!("/v1/tokens/{id}"), None) {
            Change::Made(_) => {
                call.answered(ApiKeySeen::Invalid);
                return true;
            }
            Change::Refused(told) => {
                // A token whose making was acknowledged is there.
                assert!(!is_client_error(&told), "{told:?}");
                call.refused();
            }
            Change::Unknown => call.unknown(),
        }
        false
    }

    fn look_up_token(&self, client: &Client<ApiKey>, door: &Door, chance: &mut Chance) -> bool {
        let Some(id) = self.some_token(chance) else {
            return false;
        };
        let call = client.invoke(&id, ApiKeyAction::Use);
        let Some(list) = door.list("/v1/tokens") else {
            call.unknown();
            return false;
        };
        call.answered(seen(&list, &id));
        true
    }

    fn some_token(&self, chance: &mut Chance) -> Option<String> {
        let known = self.known.lock().expect("no panic");
        // The newest are the most telling.
        let recent = &known[known.len().saturating_sub(8)..];
        (!recent.is_empty()).then(|| chance.pick(recent).clone())
    }

    /// Every node is asked for everything.
    fn look_at_everything(&self) {
        let known = self.known.lock().expect("no panic");
        for door in &self.doors {
            let tags = self.tags.client();
            for number in 1..=3 {
                assert!(self.read_tag(&tags, door, &format!("node{number}")));
            }
            let client = self.tokens.client();
            let calls: Vec<_> = known
                .iter()
                .map(|id| (id, client.invoke(id, ApiKeyAction::Use)))
                .collect();
            let list = door.list("/v1/tokens").expect("all is well again");
            for (id, call) in calls {
                call.answered(seen(&list, id));
            }
        }
    }
}

fn is_client_error(told: &Told) -> bool {
    matches!(told, Told::Answer(answer) if answer.status < 500)
}

/// What a list says of a token.
fn seen(list: &Value, id: &str) -> ApiKeySeen {
    let mut tokens = list.as_array().into_iter().flatten();
    match tokens.find(|token| token["id"] == id) {
        Some(token) if token["state"] == "open" => ApiKeySeen::Valid,
        _ => ApiKeySeen::Invalid,
    }
}
