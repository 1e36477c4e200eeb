//! One life of a guest, from a start or a restore to the next, as it shows itself from inside and to
//! its host.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use std::io::{Read as _, Write as _};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::world::World;

use crate::PATIENCE;

/// What lives in the guest and writes down what it notices.
const RESIDENT: &str = include_str!("resident.py");
/// What is asked of the guest after each start.
const FACTS: &str = include_str!("facts.py");
/// The port of the guest's agent.
const AGENT_PORT: u16 = 49983;
/// What a server of SSH would have, which the image does not: keys, and the program that makes them.
/// A file in memory and one on the disk, of which the latter is not written out.
const FURNISH: &str = "mkdir -p /etc/ssh; echo secret > /etc/ssh/ssh_host_test_key; \
     printf '#!/bin/sh\\nhead -c 9 /dev/urandom | base64 > /etc/ssh/ssh_host_test_key\\n' \
     > /usr/local/bin/ssh-keygen; chmod +x /usr/local/bin/ssh-keygen; \
     head -c 2097152 /dev/urandom > /dev/shm/random; \
     head -c 2097152 /dev/urandom > /root/unsynced";

/// One life of a guest.
#[derive(Clone, Debug)]
pub(super) struct Life {
    /// What the guest says of itself.
    pub(super) facts: Value,
    /// Its clock, and the host's before and after it was asked for it.
    pub(super) clock: Duration,
    pub(super) asked: Duration,
    pub(super) answered: Duration,
    /// The sandbox's id.
    pub(super) id: String,
    /// What its agent demands of callers.
    pub(super) token: String,
    /// Under which ownership it runs.
    pub(super) epoch: u64,
    /// Where its agent is.
    agent: SocketAddr,
}

/// Gives a guest what it is going to keep, lose or renew.
pub(super) fn furnish(world: &World, id: &str, outside: SocketAddr) {
    for (path, text) in [("/root/resident.py", RESIDENT), ("/root/facts.py", FACTS)] {
        let written = world.upload(id, "files/write", path, text.as_bytes());
        assert_eq!(written.status, 204, "{}", written.json());
    }
    let (address, port) = (outside.ip(), outside.port());
    let line =
        format!("echo $$ > /dev/shm/resident.pid; exec python3 /root/resident.py {address} {port}");
    let request =
        json!({ "cmd": "/bin/sh", "args": ["-c", line], "background": true, "tag": "resident" });
    assert_eq!(world.run(id, &request).status, 202);
    world.output(id, FURNISH);
    let talks = wait_for(PATIENCE, || {
        let seen = world.exec(id, "grep -c talks /dev/shm/resident");
        (seen["stdout"] == "1\n").then_some(())
    });
    let log = "cat /dev/shm/resident";
    assert!(talks.is_some(), "{}", world.exec(id, log));
}

impl Life {
    /// Looks at a guest that runs on the node of `world`.
    pub(super) fn of(world: &World, id: &str) -> Self {
        let record = fs::read(world.sandbox_dir(id).join("sandbox.json")).expect("a record");
        let record: Value = serde_json::from_slice(&record).expect("JSON");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let address: Ipv4Addr = text(&record["slot"]["guest_addr"])
            .parse()
            .expect("its address");
        let asked = host_clock();
        let clock = world.output(id, "date +%s%N").parse();
        let answered = host_clock();
        let facts = world.output(id, "python3 /root/facts.py");
        Self {
            facts: serde_json::from_str(&facts).expect("JSON"),
            clock: Duration::from_nanos(clock.expect("nanoseconds")),
            asked,
            answered,
            id: id.to_owned(),
            token: text(&record["token"]),
            epoch: record["epoch"].as_u64().expect("an epoch"),
            agent: SocketAddr::from((address, AGENT_PORT)),
        }
    }

    /// Looks at it once it has tried its connections to the outside, both of them.
    pub(super) fn settled(world: &World, id: &str) -> Self {
        let life = wait_for(PATIENCE, || {
            let life = Self::of(world, id);
            let tried = life.lines("old").count() > 0;
            tried.then_some(life)
        });
        life.unwrap_or_else(|| panic!("{:#?}", Self::of(world, id).facts["log"]))
    }

    /// A fact, as text.
    pub(super) fn text(&self, fact: &str) -> &str {
        self.facts[fact].as_str().unwrap_or_default()
    }

    /// What the resident wrote of one kind, in this life or any before.
    pub(super) fn all_lines<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        let log = self.facts["log"].as_array().into_iter().flatten();
        log.filter(move |line| line["kind"] == kind)
    }

    /// What the resident wrote of one kind in this life.
    pub(super) fn lines<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        let own = &self.facts["generation"];
        self.all_lines(kind)
            .filter(move |line| line["generation"] == *own)
    }

    /// The status with which the agent answers a question that needs a token.
    pub(super) fn answers_to(&self, token: &str) -> u16 {
        self.ask(
            &format!("GET /envs HTTP/1.1\r\nX-Access-Token: {token}\r\n"),
            "",
        )
    }

    /// The status with which the agent answers an order of a host that thinks it owns `epoch`.
    pub(super) fn obeys(&self, epoch: u64) -> u16 {
        let body = json!({ "epoch": epoch }).to_string();
        let token = &self.token;
        let head = format!("POST /snapshot/undo HTTP/1.1\r\nX-Access-Token: {token}\r\n");
        self.ask(&head, &body)
    }

    fn ask(&self, head: &str, body: &str) -> u16 {
        let mut stream = TcpStream::connect(self.agent).expect("the agent listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("above zero");
        let length = body.len();
        let request = format!(
            "{head}Host: guest\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        let status = answer.split(' ').nth(1).and_then(|word| word.parse().ok());
        status.unwrap_or_else(|| panic!("no status in {answer}"))
    }
}

/// This host's clock.
pub(super) fn host_clock() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970")
}
