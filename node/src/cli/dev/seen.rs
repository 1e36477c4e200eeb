//! What the nodes of a cluster say of themselves and of each other, whoever answers.

use futures::future;
use http::Method;
use serde_json::Value;

use super::super::client::Client;
use super::super::find;
use super::cluster::{Cluster, Known, Node};

/// How a cluster looks from one of its nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Which nodes answer at all, in the order of their numbers.
    alive: Vec<bool>,
    /// The nodes as the cluster knows them.
    members: Vec<Value>,
    /// Whether the node that told all this could reach a quorum.
    pub(super) has_quorum: Option<bool>,
}

impl Seen {
    /// Asks every node that answers; the view of one that has a quorum counts more.
    pub(super) async fn look(cluster: &Cluster) -> Self {
        let nodes = cluster.nodes();
        let key = key(cluster).unwrap_or_default();
        let views = future::join_all(nodes.iter().map(|node| view(node, &key))).await;
        let alive = views.iter().map(|(alive, _)| *alive).collect();
        let told = views.into_iter().filter_map(|(_, told)| told);
        let best = told.max_by_key(|(_, quorum)| quorum.unwrap_or(false));
        let (members, has_quorum) = best.unwrap_or_default();
        Self {
            alive,
            members,
            has_quorum,
        }
    }

    /// Whether a node answers.
    pub(super) fn is_alive(&self, node: &Node) -> bool {
        let at = usize::from(node.number) - 1;
        self.alive.get(at).copied().unwrap_or(false)
    }

    /// What the cluster says of the node with this id.
    pub(super) fn member(&self, id: &str) -> Option<&Value> {
        self.members.iter().find(|member| member["id"] == id)
    }

    /// How many of them vote.
    pub(super) fn voters(&self) -> usize {
        let votes = |member: &&Value| member["role"] == "voter";
        self.members.iter().filter(votes).count()
    }

    /// Whether a node answers and the cluster counts it as a live member.
    pub(super) fn is_member(&self, cluster: &Cluster, node: &Node) -> bool {
        let known = now_known(cluster, node).unwrap_or_default();
        let member = self.member(&known.id);
        self.is_alive(node) && member.is_some_and(|member| member["alive"] == true)
    }
}

/// What a node is by now, else what it was when it was last ready.
pub(super) fn now_known(cluster: &Cluster, node: &Node) -> Option<Known> {
    let ready = find::ready(&node.data_dir());
    ready
        .as_ref()
        .map(Known::from)
        .or_else(|| cluster.known(node))
}

/// A client of the first node that answers.
pub(super) async fn client(cluster: &Cluster) -> Option<Client> {
    let key = key(cluster)?;
    for node in cluster.nodes() {
        if node.is_healthy().await {
            return Client::new(&find::ready(&node.data_dir())?.url, &key).ok();
        }
    }
    None
}

/// The first key of the cluster: one cluster has one set of keys, and its founder made the first.
pub(super) fn key(cluster: &Cluster) -> Option<String> {
    let nodes = cluster.nodes();
    nodes
        .iter()
        .find_map(|node| find::bootstrap_key(&node.data_dir()))
}

/// The nodes as one node sees them, and whether it reaches a quorum.
type View = (Vec<Value>, Option<bool>);

/// Whether a node answers, and how it sees the cluster.
async fn view(node: &Node, key: &str) -> (bool, Option<View>) {
    if !node.is_healthy().await {
        return (false, None);
    }
    (true, told(node, key).await)
}

async fn told(node: &Node, key: &str) -> Option<View> {
    let client = Client::new(&find::ready(&node.data_dir())?.url, key).ok()?;
    let ask = async |path| client.call(Method::GET, path, None).await.ok();
    let members = ask("/v1/nodes").await?.as_array()?.clone();
    let cluster = ask("/v1/cluster").await;
    Some((members, cluster.and_then(|it| it["quorum"].as_bool())))
}
