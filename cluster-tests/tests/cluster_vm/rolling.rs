//! All nodes are restarted one after the other while each has a guest and a client that uses it:
//! no guest notices, and a client that tries once more, through another node, hears of no error.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;

use crate::witness::vmms;
use crate::{PATIENCE, on_node, wait_voters};

/// What an answer of a node that cannot reach the owner says to wait before the one other try.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Pause between two commands of one client.
const AGAIN: Duration = Duration::from_millis(50);
/// Longest one command may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// All nodes.
const NODES: [u16; 3] = [1, 2, 3];

#[test]
fn a_rolling_restart_kills_no_capsule_and_fails_no_client_that_tries_twice() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &NODES, 3);
    let guests = one_on_each(&cluster);
    let before: Vec<_> = guests.iter().map(|guest| guest.vmms(&cluster)).collect();
    let clients: Vec<Client> = guests.iter().map(|guest| guest.client(&cluster)).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let running: Vec<_> = clients
            .iter()
            .map(|client| scope.spawn(|| client.work(&over)))
            .collect();
        let restarted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for number in NODES {
                let began = Instant::now();
                cluster.stop(number);
                cluster.start(number);
                println!("node {number} was away for {:?}", began.elapsed());
                wait_voters(&cluster, &NODES, 3);
                cluster.wait_members(3);
                clients.iter().for_each(Client::wait_served);
            }
        }));
        over.store(true, Ordering::Relaxed);
        for client in running {
            client
                .join()
                .expect("a client that tries twice hears of no error");
        }
        restarted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    for client in &clients {
        client.tell();
    }
    let after: Vec<_> = guests.iter().map(|guest| guest.vmms(&cluster)).collect();
    assert_eq!(after, before);
    for guest in &guests {
        let world = cluster.client(guest.number);
        assert_eq!(world.record(&guest.id)["status"], "running");
        world.wait_only(&[&guest.id]);
        cluster.client(1).destroy(&guest.id);
        world.wait_only(&[]);
    }
}

/// A capsule and where it lives.
struct Guest {
    id: String,
    number: u16,
}

fn one_on_each(cluster: &ClusterWorld) -> Vec<Guest> {
    thread::scope(|scope| {
        let boot = |number| {
            let id = cluster.client(number).capsule_with(&on_node(number));
            cluster.client(number).output(&id, "echo kept > /root/file");
            Guest { id, number }
        };
        let booting: Vec<_> = NODES.map(|number| scope.spawn(move || boot(number))).into();
        let booted = booting.into_iter().map(|guest| guest.join());
        booted.map(|guest| guest.expect("a guest")).collect()
    })
}

impl Guest {
    fn vmms(&self, cluster: &ClusterWorld) -> Vec<u32> {
        vmms(&cluster.client(self.number).data(), &self.id)
    }

    fn client(&self, cluster: &ClusterWorld) -> Client {
        let next = self.number % 3 + 1;
        let urls = [next, next % 3 + 1].map(|number| cluster.client(number).url());
        Client {
            id: self.id.clone(),
            key: cluster.client(1).key(),
            urls,
            calls: AtomicU64::new(0),
            retries: AtomicU64::new(0),
        }
    }
}

/// Why a command failed.
#[derive(Debug)]
#[expect(dead_code, reason = "shown when a test fails")]
enum Failed {
    /// The node that was asked has gone away: another one may do better at once.
    Silent(String),
    /// It says that it could not: the owner is away, and will be for a moment.
    Answered(String),
}

/// Somebody who runs commands in one capsule, through a node that is not its own, and once more
/// through the other one where that fails.
struct Client {
    id: String,
    key: String,
    urls: [String; 2],
    calls: AtomicU64,
    retries: AtomicU64,
}

impl Client {
    /// Runs commands until it is `over`.
    fn work(&self, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            if let Err(failed) = self.read(&self.urls[0]) {
                if let Failed::Answered(_) = failed {
                    thread::sleep(RETRY_AFTER);
                }
                self.retries.fetch_add(1, Ordering::Relaxed);
                if let Err(again) = self.read(&self.urls[1]) {
                    panic!("{failed:?}, then {again:?}");
                }
            }
            self.calls.fetch_add(1, Ordering::Relaxed);
            thread::sleep(AGAIN);
        }
    }

    /// Waits until it has had an answer to a command that it began after now.
    fn wait_served(&self) {
        let before = self.calls.load(Ordering::Relaxed);
        let served = wait_for(PATIENCE, || {
            (self.calls.load(Ordering::Relaxed) >= before + 2).then_some(())
        });
        assert!(served.is_some(), "a client is not served");
    }

    /// Reads the file that every guest has; tells what came instead.
    fn read(&self, url: &str) -> Result<(), Failed> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(CALL_TIMEOUT))
            .build();
        let answer = ureq::Agent::new_with_config(config)
            .post(format!("{url}/v1/capsules/{}/exec", self.id))
            .header("X-API-Key", &self.key)
            .header("Content-Type", "application/json")
            .send(json!({ "cmd": "cat", "args": ["/root/file"] }).to_string());
        let silent = |err: ureq::Error| Failed::Silent(err.to_string());
        let mut answer = answer.map_err(silent)?;
        let body = answer.body_mut().read_to_string().map_err(silent)?;
        let said: Value = serde_json::from_str(&body).unwrap_or_default();
        match (answer.status().as_u16(), said["stdout"].as_str()) {
            (200, Some("kept\n")) => Ok(()),
            (status, _) => Err(Failed::Answered(format!("{status} {body}"))),
        }
    }

    fn tell(&self) {
        let count = |it: &AtomicU64| it.load(Ordering::Relaxed);
        println!(
            "{} commands, {} of them twice",
            count(&self.calls),
            count(&self.retries)
        );
        assert!(count(&self.calls) > 0);
    }
}
