//! Several real daemons that form one cluster on this machine: each its own process, data directory,
//! ports and network slots, joined with tokens as hosts would be.
//!
//! Nodes are numbered from 1; the first founds. They can be stopped, killed and paused one by one,
//! and cut off from each other by dropping real packets. Whatever a test leaves behind is undone and
//! looked for when the world is dropped, node by node. Two such worlds exist at a time.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{fs, process, thread};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::client::wait_for;
use crate::leaks;
use crate::places::{Place, Places};
use crate::world::{Site, World, signal};

/// Longest that roles may take to settle: two replacements of voters are half a minute apart.
const ROLES_TIMEOUT: Duration = Duration::from_secs(120);
/// Most nodes of a cluster: each has ports and slots in the range of this process.
pub const MAX_NODES: u16 = 8;
/// Ports of one node: the API, the cluster, bulk transfers.
const PORTS: u16 = 3;
/// Network slots of one node.
const SLOTS: u16 = 16;
/// Longest an election or a join may take on a busy machine, many times what it takes.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Clusters at once: their nodes and guests wait half of the time, for each other and for what is to
/// be missed.
const AT_ONCE: usize = 2;

/// Those of this process.
static PLACES: Places<AT_ONCE> = Places::new();

/// A cluster of real daemons.
#[derive(Debug)]
pub struct ClusterWorld {
    nodes: Vec<World>,
    // Last: the next cluster begins once this one is gone.
    place: Place<AT_ONCE>,
}

impl ClusterWorld {
    /// A cluster whose nodes are all ready and members.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn new(nodes: u16) -> Self {
        Self::with(nodes, |_, _| {})
    }

    /// The same with nodes that `prepare` has changed before their first start.
    ///
    /// # Panics
    /// When it does not come up, or would have more than [`MAX_NODES`].
    #[must_use]
    pub fn with(nodes: u16, prepare: impl FnMut(u16, &mut World)) -> Self {
        Self::at(PLACES.take(), nodes, prepare)
    }

    /// The same, with no other cluster beside it: for tests of what is in time.
    ///
    /// # Panics
    /// As [`Self::with`].
    #[must_use]
    pub fn alone(nodes: u16, prepare: impl FnMut(u16, &mut World)) -> Self {
        Self::at(PLACES.take_all(), nodes, prepare)
    }

    fn at(place: Place<AT_ONCE>, nodes: u16, mut prepare: impl FnMut(u16, &mut World)) -> Self {
        assert!((1..=MAX_NODES).contains(&nodes), "1 to {MAX_NODES} nodes");
        let worlds = (1..=nodes).map(|number| {
            let mut world = World::at(site(&place, number));
            prepare(number, &mut world);
            world
        });
        let mut cluster = Self {
            nodes: worlds.collect(),
            place,
        };
        cluster.nodes[0].start();
        cluster.join_others();
        cluster.wait_members(usize::from(nodes));
        cluster
    }

    fn join_others(&mut self) {
        let (founder, others) = self.nodes.split_at_mut(1);
        for other in &mut *others {
            other.join(&founder[0], &token(&founder[0]));
            other.begin();
        }
        for other in others {
            other.wait_ready();
        }
    }

    /// One more node, which joins by a token that node `through` gives out; returns its number.
    ///
    /// # Panics
    /// When it does not get ready, or there would be more than [`MAX_NODES`].
    pub fn admit(&mut self, through: u16) -> u16 {
        let number = self.len() + 1;
        assert!(number <= MAX_NODES, "1 to {MAX_NODES} nodes");
        let mut world = World::at(site(&self.place, number));
        let token = token(self.client(through));
        world.join(&self.nodes[0], &token);
        world.start();
        self.nodes.push(world);
        number
    }

    /// A host that is no member yet and has not been started: what node `number`, which is above
    /// [`Self::len`], would have for itself. It joins with `token` when it is started.
    ///
    /// # Panics
    /// Where that is a member's number, or above [`MAX_NODES`].
    #[must_use]
    pub fn stranger(&self, number: u16, token: &str) -> World {
        let free = self.len() + 1..=MAX_NODES;
        assert!(free.contains(&number), "{free:?} are free");
        let mut world = World::at(site(&self.place, number));
        world.join(&self.nodes[0], token);
        world
    }

    /// Ends a node's host for good: the daemon, its guests and its disk. Of the founder's disk the
    /// first API key stays, as with a person who has kept it.
    ///
    /// # Panics
    /// When something of it resists.
    pub fn lose(&mut self, number: u16) {
        let node = self.node(number);
        node.clean_up().expect("nothing of it stays");
        for entry in fs::read_dir(node.data()).expect("a data directory") {
            let path = entry.expect("an entry").path();
            let removed = match path.file_name().and_then(|name| name.to_str()) {
                Some("bootstrap.key") => Ok(()),
                _ if path.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            removed.expect("the disk lets go");
        }
    }

    /// How many nodes there are, running or not.
    ///
    /// # Panics
    /// Never: there are few.
    #[must_use]
    pub fn len(&self) -> u16 {
        u16::try_from(self.nodes.len()).expect("few nodes")
    }

    /// Never: a cluster has a node.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// One node, to do something with its process.
    ///
    /// # Panics
    /// Where there is no such node.
    pub fn node(&mut self, number: u16) -> &mut World {
        &mut self.nodes[usize::from(number) - 1]
    }

    /// One node, to send requests to.
    ///
    /// # Panics
    /// Where there is no such node.
    #[must_use]
    pub fn client(&self, number: u16) -> &World {
        &self.nodes[usize::from(number) - 1]
    }

    /// Starts a stopped node and waits until it is ready.
    pub fn start(&mut self, number: u16) {
        self.node(number).start();
    }

    /// Starts nodes at once, in this order, and waits until all are ready: after a power cut they
    /// need each other.
    pub fn start_all(&mut self, numbers: &[u16]) {
        for number in numbers {
            self.node(*number).begin();
        }
        for number in numbers {
            self.node(*number).wait_ready();
        }
    }

    /// Stops a node in order.
    pub fn stop(&mut self, number: u16) {
        self.node(number).stop();
    }

    /// Ends a node as a power cut would.
    pub fn kill(&mut self, number: u16) {
        self.node(number).kill();
    }

    /// Stops a node's process from running, as a machine that hangs. Its guests go on.
    pub fn pause(&self, number: u16) {
        signal(self.client(number).pid(), Signal::SIGSTOP);
    }

    /// Lets a paused node go on.
    pub fn resume(&self, number: u16) {
        signal(self.client(number).pid(), Signal::SIGCONT);
    }

    /// Cuts sides off from each other: packets of the cluster from one to another are lost. Nodes
    /// on no side reach everybody. Replaces an earlier partition.
    ///
    /// # Panics
    /// Where `nft` refuses.
    pub fn partition(&self, sides: &[&[u16]]) {
        let table = self.table();
        let mut rules = format!("{}table inet {table} {{\n  chain cut {{\n", removal(&table));
        // On the way in: a drop on the way out would be told to the sender.
        rules.push_str("    type filter hook input priority filter; policy accept;\n");
        for (at, side) in sides.iter().enumerate() {
            let others = sides.iter().enumerate().filter(|(other, _)| *other != at);
            let others: Vec<u16> = others.flat_map(|(_, side)| side.iter().copied()).collect();
            let (from, to) = (self.cluster_ports(side), self.cluster_ports(&others));
            writeln!(
                rules,
                "    iifname \"lo\" udp sport {{ {from} }} udp dport {{ {to} }} drop"
            )
            .expect("a string takes everything");
        }
        rules.push_str("  }\n}\n");
        nft(&rules);
    }

    /// Cuts one node off from all others.
    pub fn isolate(&self, number: u16) {
        let others: Vec<u16> = (1..=self.len()).filter(|other| *other != number).collect();
        self.partition(&[&[number], &others]);
    }

    /// Lets all packets pass again.
    ///
    /// # Panics
    /// Where `nft` refuses.
    pub fn heal(&self) {
        nft(&removal(&self.table()));
    }

    /// The number of the node that leads, as soon as a node that runs and has a quorum knows one.
    ///
    /// # Panics
    /// When there is none for too long.
    #[must_use]
    pub fn wait_leader(&self) -> u16 {
        let all: Vec<u16> = (1..=self.len()).collect();
        self.wait_leader_among(&all)
    }

    /// The same as seen by, and one of, these nodes.
    ///
    /// # Panics
    /// When there is none for too long.
    #[must_use]
    pub fn wait_leader_among(&self, numbers: &[u16]) -> u16 {
        let leader = wait_for(SETTLE_TIMEOUT, || {
            let seen = numbers
                .iter()
                .find_map(|number| self.leader_seen_by(*number));
            seen.filter(|leader| numbers.contains(leader))
        });
        leader.unwrap_or_else(|| panic!("nobody leads:\n{}", self.logs()))
    }

    fn leader_seen_by(&self, number: u16) -> Option<u16> {
        let cluster = self.ask(number, "/v1/cluster")?;
        let leader = cluster["leader"]
            .as_str()
            .filter(|_| cluster["quorum"] == true)?;
        self.number_of(&self.ask(number, "/v1/nodes")?, leader)
    }

    /// The number of the node with this id, in a list of nodes.
    fn number_of(&self, nodes: &Value, id: &str) -> Option<u16> {
        let node = nodes.as_array()?.iter().find(|node| node["id"] == id)?;
        let name = node["name"].as_str()?;
        (1..=self.len()).find(|number| name == site(&self.place, *number).name)
    }

    /// Waits until every node that runs counts so many live members.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn wait_members(&self, count: usize) {
        let running: Vec<u16> = (1..=self.len())
            .filter(|number| self.client(*number).get("/healthz").is_some())
            .collect();
        let agreed = wait_for(SETTLE_TIMEOUT, || {
            let counts = |number: &u16| self.live_members(*number) == count;
            running.iter().all(counts).then_some(())
        });
        assert!(agreed.is_some(), "not {count} members:\n{}", self.logs());
    }

    fn live_members(&self, number: u16) -> usize {
        let nodes = self.ask(number, "/v1/nodes").unwrap_or_default();
        let all = nodes.as_array().into_iter().flatten();
        all.filter(|node| node["alive"] == true).count()
    }

    /// What a node answers to a question; `None` where it does not, or refuses.
    fn ask(&self, number: u16, path: &str) -> Option<Value> {
        let answer = self.client(number).try_call("GET", path, None)?;
        (answer.status == 200).then(|| answer.json())
    }

    /// What all nodes have on the host now, node by node.
    #[must_use]
    pub fn footprint(&self) -> Vec<String> {
        let of = |world: &World| world.footprint().into_iter();
        let nodes = self.nodes.iter().flat_map(of);
        nodes.chain(leaks::tables(&self.table())).collect()
    }

    /// The logs of all nodes.
    #[must_use]
    pub fn logs(&self) -> String {
        let log = |(at, world): (usize, &World)| format!("--- node {}\n{}\n", at + 1, world.log());
        self.nodes.iter().enumerate().map(log).collect()
    }

    /// The ports by which packets of these nodes are known, for a rule.
    fn cluster_ports(&self, numbers: &[u16]) -> String {
        let ports = numbers.iter().flat_map(|number| {
            let control = self.client(*number).cluster_port();
            [control, control + 1]
        });
        ports
            .map(|it| it.to_string())
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn table(&self) -> String {
        format!("wrenn_test_{}", self.client(1).port())
    }
}

impl Drop for ClusterWorld {
    fn drop(&mut self) {
        // A cut would only slow the nodes' end down; that they end is their own worlds' part.
        if !leaks::tables(&self.table()).is_empty() {
            self.heal();
        }
        let left = leaks::tables(&self.table());
        for node in &mut self.nodes {
            node.kill();
        }
        if !thread::panicking() {
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

/// What node `number` has for itself: below the ports of worlds of one node, and above their slots.
fn site(place: &Place<AT_ONCE>, number: u16) -> Site {
    // Rows next to each other, and other rows than other test programs have.
    let row = |rows: u32| {
        let first = u16::try_from(process::id() % (rows / 2)).expect("few rows") * 2;
        first + place.number()
    };
    let port = 10_000 + row(400) * MAX_NODES * PORTS + (number - 1) * PORTS;
    Site {
        name: format!("node{number}"),
        port,
        cluster_port: port + 1,
        slot_base: 40_960 + row(190) * MAX_NODES * SLOTS + (number - 1) * SLOTS,
    }
}

/// A token for one more member.
fn token(founder: &World) -> String {
    let made = founder.call("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 600 })));
    assert_eq!(made.status, 201, "{}\n{}", made.json(), founder.log());
    let token = made.json()["token"].as_str().map(str::to_owned);
    token.expect("a token")
}

/// Removes a table; one that is not there is made first, so that removal cannot fail.
fn removal(table: &str) -> String {
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// Has `nft` carry out a ruleset.
fn nft(rules: &str) {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nft is installed");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(rules.as_bytes()).expect("nft reads");
    drop(input);
    let status = child.wait().expect("nft ends");
    assert!(status.success(), "nft refuses:\n{rules}");
}

/// Makes leases short, so that a lost host is given up in seconds.
///
/// # Panics
/// When the cluster refuses.
pub fn shorten_leases(world: &World, ttl: Duration, grace: Duration) {
    let settings = json!({ "lease_ttl_sec": ttl.as_secs(), "lease_grace_sec": grace.as_secs() });
    let changed = world.call("PATCH", "/v1/cluster", Some(&settings));
    assert_eq!(changed.status, 200, "{}", changed.json());
}

/// Waits until a node sees so many voters, and no change of them under way; returns the cluster as
/// it sees it.
///
/// # Panics
/// When that takes too long.
pub fn wait_voters(world: &World, count: usize) -> Value {
    let seen = wait_for(ROLES_TIMEOUT, || {
        let cluster = world.try_call("GET", "/v1/cluster", None)?.json();
        let voters = cluster["voters"].as_array().map_or(0, Vec::len);
        let settled = cluster["changing"] == false && cluster["quorum"] == true;
        (voters == count && settled).then_some(cluster)
    });
    let now = || world.call("GET", "/v1/cluster", None).json();
    seen.unwrap_or_else(|| panic!("not {count} voters: {}\n{}", now(), world.log()))
}
