//! What a development cluster consists of, and what is remembered of it between commands.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::error::CliError;
use super::super::find::{self, Ready};
use super::daemon;
use crate::config::defaults;

/// Ports that each node has for itself.
const PORTS_PER_NODE: u16 = 10;
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
struct Told {
    nodes: u16,
    port_base: u16,
    images_dir: PathBuf,
    node_args: Vec<String>,
    /// In the order of their numbers; shorter while some were never ready.
    known: Vec<Known>,
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
    pub(super) fn new(
        dir: PathBuf,
        nodes: u16,
        port_base: u16,
        node_args: Vec<String>,
    ) -> Result<Self, CliError> {
        let last = nodes.checked_mul(PORTS_PER_NODE);
        if last
            .and_then(|ports| port_base.checked_add(ports))
            .is_none()
        {
            let message = format!("{nodes} nodes from port {port_base} leave the range of ports");
            return Err(CliError::usage(message).hint("choose a lower --port-base"));
        }
        let known = Self::load(&dir).map(|before| before.told.known);
        fs::create_dir_all(&dir).map_err(|err| failed("make", &dir, &err))?;
        let told = Told {
            nodes,
            port_base,
            images_dir: PathBuf::new(),
            node_args,
            known: known.unwrap_or_default(),
        };
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

    /// Where all nodes find their images.
    pub(super) fn set_images(&mut self, dir: &Path) -> Result<(), CliError> {
        self.told.images_dir = std::path::absolute(dir).map_err(|err| failed("find", dir, &err))?;
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

    /// Starts a node unless it runs, and waits until it serves.
    pub(super) async fn start(&self, node: &Node) -> Result<(), CliError> {
        daemon::start(node, self.port(node), self.arguments(node)).await
    }

    /// Forgets the cluster. Images stay.
    pub(super) fn remove(&self) -> Result<(), CliError> {
        let path = self.dir.join(FILE);
        fs::remove_file(&path).map_err(|err| failed("remove", &path, &err))?;
        // Fails where images or files of others lie there, which then stay.
        let _not_empty = fs::remove_dir(&self.dir);
        Ok(())
    }

    fn port(&self, node: &Node) -> u16 {
        self.told.port_base + (node.number - 1) * PORTS_PER_NODE
    }

    fn arguments(&self, node: &Node) -> Vec<String> {
        let port = self.port(node);
        let slot_base = (node.number - 1) * defaults::SLOT_COUNT;
        let mut args: Vec<String> = ["node", "start", "--detach"].map(str::to_owned).into();
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        option("--data-dir", node.data_dir().display().to_string());
        option("--images-dir", self.told.images_dir.display().to_string());
        option("--name", format!("node{}", node.number));
        option("--listen", format!("127.0.0.1:{port}"));
        option("--cluster-listen", format!("127.0.0.1:{}", port + 1));
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

impl Node {
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

    #[test]
    fn nodes_get_ports_and_slots_of_their_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let cluster =
            Cluster::new(dir.path().into(), 3, 7320, vec!["--vmm".into()]).expect("a cluster");
        let third = cluster.node(3).expect("a node");
        let args = cluster.arguments(&third).join(" ");
        assert!(args.contains("--listen 127.0.0.1:7340"), "{args}");
        assert!(args.contains("--slot-base 128"), "{args}");
        assert!(args.ends_with("--vmm"), "{args}");
        assert!(cluster.node(0).is_err() && cluster.node(4).is_err());
    }

    #[test]
    fn what_was_told_is_still_known_to_the_next_command() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(Cluster::load(dir.path()).is_err());
        let mut cluster = Cluster::new(dir.path().into(), 1, 9000, vec![]).expect("a cluster");
        cluster.set_images(Path::new("/images")).expect("a file");
        let node = cluster.node(1).expect("a node");
        fs::create_dir(node.data_dir()).expect("a directory");
        let ready = r#"{"id":"node-1","name":"node1","url":"http://x","pid":1}"#;
        fs::write(node.data_dir().join("ready.json"), ready).expect("a file");
        cluster.remember(&node).expect("a file");

        let again = Cluster::load(dir.path()).expect("a cluster");
        assert_eq!(again.told, cluster.told);
        assert_eq!(again.known(&node).expect("known").url, "http://x");
        node.remove().expect("removed");
        again.remove().expect("removed");
        assert!(!dir.path().exists());
    }

    #[test]
    fn ports_past_the_end_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(Cluster::new(dir.path().into(), 1, 65_530, vec![]).is_err());
    }
}
