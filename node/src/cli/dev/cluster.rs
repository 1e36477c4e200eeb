//! What a development cluster consists of, and what is remembered of it between commands.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::error::CliError;
use super::super::find::{self, Ready};
use super::daemon::{self, Launch};
use super::partition::{CONTROL_PORT, Sides};
use crate::config::{MEMBER_FILE, defaults};

/// Ports that each node has for itself.
const PORTS_PER_NODE: u16 = 10;
/// Network slots that a machine has in all.
const SLOTS: u32 = 1 << 16;
/// What is remembered, in the cluster's directory.
const FILE: &str = "cluster.json";

/// A cluster of this machine.
#[derive(Clone, Debug)]
pub(super) struct Cluster {
    dir: PathBuf,
    told: Told,
}

/// What `up` was told, and what was learnt since.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Told {
    nodes: u16,
    port_base: u16,
    slot_base: u16,
    images_dir: PathBuf,
    node_args: Vec<String>,
    /// In the order of their numbers; shorter while some were never ready.
    known: Vec<Known>,
    /// Who is cut off from whom, if anybody is.
    partition: Option<String>,
}

/// What `up` may be told. What is left out is as it was before.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    /// How many nodes; a cluster only grows.
    pub(super) nodes: Option<u16>,
    /// The first node's API port; it stays while the cluster exists.
    pub(super) port_base: Option<u16>,
    /// The first node's first network slot; it stays while the cluster exists.
    pub(super) slot_base: Option<u16>,
    /// Further options of `wrenn node start`.
    pub(super) node_args: Vec<String>,
}

/// What a node was when it was last ready.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) url: String,
}

impl From<&Ready> for Known {
    fn from(ready: &Ready) -> Self {
        Self {
            id: ready.id.clone(),
            name: ready.name.clone(),
            url: ready.url.clone(),
        }
    }
}

/// One node of it.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// From 1.
    pub(super) number: u16,
    dir: PathBuf,
}

impl Cluster {
    /// A cluster to start. One that was started before keeps what was learnt of it.
    pub(super) fn new(dir: PathBuf, wanted: Wanted) -> Result<Self, CliError> {
        let before = match Self::load(&dir) {
            Ok(before) => before.told,
            Err(_) if !dir.join(FILE).exists() => Told {
                nodes: wanted.nodes.unwrap_or(1),
                port_base: wanted.port_base.unwrap_or(defaults::LISTEN.port()),
                slot_base: wanted.slot_base.unwrap_or(defaults::SLOT_BASE),
                ..Told::default()
            },
            Err(damaged) => return Err(damaged),
        };
        let told = before.with(wanted)?;
        fs::create_dir_all(&dir).map_err(|err| failed("make", &dir, &err))?;
        Ok(Self { dir, told })
    }

    /// The cluster that was started in `dir`.
    pub(super) fn load(dir: &Path) -> Result<Self, CliError> {
        let path = dir.join(FILE);
        let json = fs::read(&path).map_err(|err| {
            let err = if err.kind() == ErrorKind::NotFound {
                CliError::new(format!("no cluster was started in {}", dir.display()))
            } else {
                failed("read", &path, &err)
            };
            err.hint("`wrenn dev up` starts one; --dir names another directory")
        })?;
        let told = serde_json::from_slice(&json)
            .map_err(|err| CliError::from_error(&format!("understand {}", path.display()), &err))?;
        let dir = dir.to_owned();
        Ok(Self { dir, told })
    }

    /// All nodes, in order.
    pub(super) fn nodes(&self) -> Vec<Node> {
        let node = |number| Node {
            number,
            dir: self.dir.clone(),
        };
        (1..=self.told.nodes).map(node).collect()
    }

    /// One node by its number.
    pub(super) fn node(&self, number: u16) -> Result<Node, CliError> {
        let nodes = self.nodes();
        let found = nodes.into_iter().find(|node| node.number == number);
        found.ok_or_else(|| {
            CliError::usage(format!("there is no node {number}"))
                .hint(format!("nodes are numbered 1 to {}", self.told.nodes))
        })
    }

    /// Where all nodes find their images; `None` leaves it as it was.
    pub(super) fn set_images(&mut self, dir: Option<&Path>) -> Result<(), CliError> {
        let before = Some(self.told.images_dir.clone()).filter(|dir| dir != Path::new(""));
        let dir = dir.map(Path::to_owned).or(before);
        let dir = dir.unwrap_or_else(|| self.dir.join("images"));
        self.told.images_dir =
            std::path::absolute(&dir).map_err(|err| failed("find", &dir, &err))?;
        self.save()
    }

    /// Keeps what a ready node says of itself.
    pub(super) fn remember(&mut self, node: &Node) -> Result<(), CliError> {
        let Some(ready) = find::ready(&node.data_dir()) else {
            return Ok(());
        };
        let at = usize::from(node.number) - 1;
        if self.told.known.len() <= at {
            self.told.known.resize_with(at + 1, Known::default);
        }
        self.told.known[at] = Known::from(&ready);
        self.save()
    }

    /// What a node was when it was last ready.
    pub(super) fn known(&self, node: &Node) -> Option<Known> {
        let known = self.told.known.get(usize::from(node.number) - 1)?;
        Some(known.clone()).filter(|known| !known.url.is_empty())
    }

    /// Starts a node unless it runs, and waits until it serves. With a token, it joins first.
    pub(super) async fn start(&self, node: &Node, token: Option<String>) -> Result<(), CliError> {
        let launch = Launch {
            port: self.port(node.number),
            args: self.arguments(node),
            token,
        };
        daemon::start(node, launch).await
    }

    /// Whether a node must join: it is no member yet, and it is not the one that founds.
    pub(super) fn must_join(&self, node: &Node) -> bool {
        let is_first = node.number == 1;
        let founds = is_first && (node.has_log() || !self.nodes().iter().any(Node::is_member));
        !founds && !node.is_member()
    }

    /// The first port of node `number`.
    pub(super) fn port(&self, number: u16) -> u16 {
        self.told.port_base + (number - 1) * PORTS_PER_NODE
    }

    /// The first port of all.
    pub(super) fn port_base(&self) -> u16 {
        self.told.port_base
    }

    /// Who is cut off from whom, if anybody is.
    pub(super) fn partition(&self) -> Option<&str> {
        self.told.partition.as_deref()
    }

    /// Reads the sides of a partition of these nodes.
    pub(super) fn sides(&self, text: &str) -> Result<Sides, CliError> {
        Sides::parse(text, self.told.nodes)
    }

    /// Remembers who is cut off from whom.
    pub(super) fn set_partition(&mut self, sides: Option<&Sides>) -> Result<(), CliError> {
        self.told.partition = sides.map(Sides::to_string);
        self.save()
    }

    /// Forgets the cluster. Images stay.
    pub(super) fn remove(&self) -> Result<(), CliError> {
        let path = self.dir.join(FILE);
        fs::remove_file(&path).map_err(|err| failed("remove", &path, &err))?;
        // Fails where images or files of others lie there, which then stay.
        let _not_empty = fs::remove_dir(&self.dir);
        Ok(())
    }

    fn arguments(&self, node: &Node) -> Vec<String> {
        let port = self.port(node.number);
        let slot_base = self.told.slot_base + (node.number - 1) * defaults::SLOT_COUNT;
        let mut args: Vec<String> = ["node", "start", "--detach"].map(str::to_owned).into();
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        option("--data-dir", node.data_dir().display().to_string());
        option("--images-dir", self.told.images_dir.display().to_string());
        option("--name", format!("node{}", node.number));
        option("--listen", format!("127.0.0.1:{port}"));
        option(
            "--cluster-listen",
            format!("127.0.0.1:{}", port + CONTROL_PORT),
        );
        option("--slot-base", slot_base.to_string());
        args.extend(self.told.node_args.iter().cloned());
        args
    }

    fn save(&self) -> Result<(), CliError> {
        let path = self.dir.join(FILE);
        let json = serde_json::to_vec_pretty(&self.told)
            .map_err(|err| CliError::from_error("describe the cluster", &err))?;
        fs::write(&path, json).map_err(|err| failed("write", &path, &err))
    }
}

impl Told {
    /// The same as wanted now.
    fn with(mut self, wanted: Wanted) -> Result<Self, CliError> {
        let nodes = wanted.nodes.unwrap_or(self.nodes);
        let base = wanted.port_base.unwrap_or(self.port_base);
        if nodes < self.nodes {
            let message = format!("the cluster has {} nodes, not {nodes}", self.nodes);
            return Err(CliError::usage(message).hint("`wrenn dev stop I` stops one of them"));
        }
        let slot_base = wanted.slot_base.unwrap_or(self.slot_base);
        if (base, slot_base) != (self.port_base, self.slot_base) {
            let (ports, slots) = (self.port_base, self.slot_base);
            let message = format!("the cluster has its ports from {ports}, its slots from {slots}");
            return Err(CliError::usage(message).hint("`wrenn dev down` first"));
        }
        let slots = u32::from(nodes) * u32::from(defaults::SLOT_COUNT) + u32::from(slot_base);
        let last = nodes.checked_mul(PORTS_PER_NODE);
        let has_ports = last.is_some_and(|ports| base.checked_add(ports).is_some());
        if nodes == 0 || slots > SLOTS || !has_ports {
            let message =
                format!("{nodes} nodes from port {base} and slot {slot_base} leave the range");
            return Err(CliError::usage(message).hint("choose fewer nodes, or lower bases"));
        }
        self.nodes = nodes;
        if !wanted.node_args.is_empty() {
            self.node_args = wanted.node_args;
        }
        Ok(self)
    }
}

impl Node {
    /// Whether it has joined, or founded, a cluster.
    pub(super) fn is_member(&self) -> bool {
        self.data_dir().join(MEMBER_FILE).exists()
    }

    /// Whether it keeps a log, and so was started before.
    fn has_log(&self) -> bool {
        self.data_dir().join("raft").exists()
    }

    /// Takes over what another node of this machine found out by booting a guest, which takes many
    /// seconds where guests are emulated. Only into a new directory; without, it finds out itself.
    pub(super) fn learn_from(&self, others: &[Self]) {
        // The second one says in which layout the first is kept.
        const PROBED: [&str; 2] = ["cache/probe.json", "version"];
        let knows = |node: &&Self| PROBED.iter().all(|it| node.data_dir().join(it).exists());
        let Some(other) = others.iter().find(knows) else {
            return;
        };
        let here = self.data_dir();
        if here.exists() || fs::create_dir_all(here.join("cache")).is_err() {
            return;
        }
        for file in PROBED {
            if fs::copy(other.data_dir().join(file), here.join(file)).is_err() {
                // Half of it would make the directory nobody's.
                let _gone = fs::remove_dir_all(&here);
                return;
            }
        }
    }

    /// Where it keeps its state.
    pub(super) fn data_dir(&self) -> PathBuf {
        self.dir.join(format!("node{}", self.number))
    }

    /// What it prints.
    pub(super) fn log(&self) -> PathBuf {
        self.dir.join(format!("node{}.log", self.number))
    }

    /// Holds its process id.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.dir.join(format!("node{}.pid", self.number))
    }

    /// Removes its data and its log.
    pub(super) fn remove(&self) -> Result<(), CliError> {
        let data_dir = self.data_dir();
        match fs::remove_dir_all(&data_dir) {
            Err(err) if err.kind() != ErrorKind::NotFound => {
                return Err(failed("remove", &data_dir, &err));
            }
            Ok(()) | Err(_) => {}
        }
        for file in [self.log(), self.pid_file()] {
            let _missing = fs::remove_file(file);
        }
        Ok(())
    }
}

pub(super) fn failed(doing: &str, path: &Path, err: &std::io::Error) -> CliError {
    CliError::from_error(&format!("{doing} {}", path.display()), err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(nodes: u16, port_base: u16) -> Wanted {
        Wanted {
            nodes: Some(nodes),
            port_base: Some(port_base),
            slot_base: None,
            node_args: vec!["--vmm".into()],
        }
    }

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    #[test]
    fn nodes_get_ports_and_slots_of_their_own() {
        let dir = dir();
        let cluster = Cluster::new(dir.path().into(), wanted(3, 7320)).expect("a cluster");
        let third = cluster.node(3).expect("a node");
        let args = cluster.arguments(&third).join(" ");
        assert!(args.contains("--listen 127.0.0.1:7340"), "{args}");
        assert!(args.contains("--cluster-listen 127.0.0.1:7341"), "{args}");
        assert!(args.contains("--slot-base 128"), "{args}");
        assert!(args.ends_with("--vmm"), "{args}");
        assert!(cluster.node(0).is_err() && cluster.node(4).is_err());
    }

    #[test]
    fn what_was_told_is_still_known_to_the_next_command() {
        let dir = dir();
        assert!(Cluster::load(dir.path()).is_err());
        let mut cluster = Cluster::new(dir.path().into(), wanted(2, 9000)).expect("a cluster");
        cluster
            .set_images(Some(Path::new("/images")))
            .expect("a file");
        let sides = cluster.sides("1|2").expect("sides");
        cluster.set_partition(Some(&sides)).expect("a file");
        let node = cluster.node(1).expect("a node");
        fs::create_dir(node.data_dir()).expect("a directory");
        let ready = r#"{"id":"node-1","name":"node1","url":"http://x","pid":1}"#;
        fs::write(node.data_dir().join("ready.json"), ready).expect("a file");
        cluster.remember(&node).expect("a file");

        let again = Cluster::load(dir.path()).expect("a cluster");
        assert_eq!(again.told, cluster.told);
        assert_eq!(again.partition(), Some("1 | 2"));
        assert_eq!(again.known(&node).expect("known").url, "http://x");
        node.remove().expect("removed");
        again.remove().expect("removed");
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_cluster_grows_and_keeps_its_ports() {
        let dir = dir();
        let up = |wanted| Cluster::new(dir.path().into(), wanted);
        let mut cluster = up(wanted(2, 9000)).expect("a cluster");
        cluster
            .set_images(Some(Path::new("/images")))
            .expect("a file");
        let mut same = up(Wanted::default()).expect("as before");
        same.set_images(None).expect("a file");
        assert_eq!(same.told.images_dir, Path::new("/images"));
        assert_eq!((same.nodes().len(), same.port(2)), (2, 9010));
        assert_eq!(same.told.node_args, ["--vmm"]);
        assert_eq!(up(wanted(3, 9000)).expect("grown").nodes().len(), 3);
        assert!(up(wanted(1, 9000)).is_err());
        assert!(up(wanted(2, 9001)).is_err());
    }

    #[test]
    fn ports_past_the_end_are_refused() {
        let dir = dir();
        for (nodes, base) in [(1, 65_530), (0, 7320), (6554, 7320), (1025, 7320)] {
            assert!(Cluster::new(dir.path().into(), wanted(nodes, base)).is_err());
        }
    }

    #[test]
    fn only_a_new_node_learns_what_others_found_out() {
        let dir = dir();
        let cluster = Cluster::new(dir.path().into(), wanted(3, 9000)).expect("a cluster");
        let nodes = cluster.nodes();
        nodes[1].learn_from(&nodes);
        assert!(!nodes[1].data_dir().exists(), "nobody knows anything");
        fs::create_dir_all(nodes[0].data_dir().join("cache")).expect("a directory");
        for file in ["version", "cache/probe.json"] {
            fs::write(nodes[0].data_dir().join(file), "known").expect("a file");
        }
        nodes[1].learn_from(&nodes);
        assert!(nodes[1].data_dir().join("cache/probe.json").exists());
        fs::create_dir_all(nodes[2].data_dir()).expect("a directory");
        nodes[2].learn_from(&nodes);
        assert!(!nodes[2].data_dir().join("version").exists());
    }

    #[test]
    fn the_first_node_founds_and_whoever_is_no_member_joins() {
        let dir = dir();
        let cluster = Cluster::new(dir.path().into(), wanted(3, 9000)).expect("a cluster");
        let nodes = cluster.nodes();
        let must_join = || {
            nodes
                .iter()
                .map(|it| cluster.must_join(it))
                .collect::<Vec<_>>()
        };
        assert_eq!(must_join(), [false, true, true]);
        fs::create_dir_all(nodes[1].data_dir()).expect("a directory");
        fs::write(nodes[1].data_dir().join(MEMBER_FILE), "{}").expect("a file");
        // The first node's disk was lost: it is a new node of the cluster that is left.
        assert_eq!(must_join(), [true, false, true]);
        fs::create_dir_all(nodes[0].data_dir().join("raft")).expect("a directory");
        assert_eq!(must_join(), [false, false, true]);
    }
}
