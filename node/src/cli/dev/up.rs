//! Bringing nodes up, and waiting until they form one cluster.
//!
//! Members start all at once: after a power cut they need each other for a quorum. Newcomers follow,
//! each with a token of its own that a running node has given out; they start at once as well.
//! Nodes that run already are left alone.

use std::cell::Cell;
use std::time::Duration;

use futures::future;
use http::Method;
use serde_json::json;
use tokio::time::{self, Instant};

use super::super::error::CliError;
use super::super::print;
use super::cluster::{Cluster, Node};
use super::seen::{self, Seen};

/// Longest a token of ours is good for: a node that starts may have to boot a test guest first.
const TOKEN_TTL: Duration = Duration::from_secs(600);
/// Longest a node that serves may take to be seen as a member by the others.
const MEMBER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest the votes are waited for: on a busy machine a newcomer catches up in a few seconds.
const VOTERS_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between two looks at the members.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Starts those of `nodes` that do not run, and waits until all serve.
pub(super) async fn bring_up(cluster: &mut Cluster, nodes: &[Node]) -> Result<(), CliError> {
    let (new, known): (Vec<Node>, Vec<Node>) = nodes
        .iter()
        .cloned()
        .partition(|node| cluster.must_join(node));
    start(cluster, &known, "starting").await?;
    let nodes = cluster.nodes();
    for node in &new {
        node.learn_from(&nodes);
    }
    start(cluster, &new, "joining").await
}

/// Waits until the nodes that run count these as alive members.
pub(super) async fn wait_members(cluster: &Cluster, nodes: &[Node]) -> Result<(), CliError> {
    let deadline = Instant::now() + MEMBER_TIMEOUT;
    let missing = Cell::new(nodes.len());
    let look = async {
        loop {
            let seen = Seen::look(cluster).await;
            let absent = nodes
                .iter()
                .filter(|node| !seen.is_member(cluster, node))
                .count();
            missing.set(absent);
            if absent == 0 {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            time::sleep(POLL_INTERVAL).await;
        }
    };
    let label = || format!("waiting for {} of {} members", missing.get(), nodes.len());
    if print::progress_of(label, look).await {
        return Ok(());
    }
    let absent = missing.get();
    let message = format!("{absent} nodes are no live members after {MEMBER_TIMEOUT:?}");
    Err(CliError::new(message).hint("`wrenn dev status` shows which; their logs say why"))
}

/// How many voters make a cluster of these nodes outlive the loss of one.
pub(super) const fn enough_voters(nodes: &[Node]) -> usize {
    if nodes.len() < 3 { 1 } else { 3 }
}

/// Waits a moment until so many vote that one may be killed: who has just joined gets its vote
/// within a second or two.
pub(super) async fn wait_voters(cluster: &Cluster, nodes: &[Node]) {
    let enough = enough_voters(nodes);
    let look = async {
        while Seen::look(cluster).await.voters() < enough {
            time::sleep(POLL_INTERVAL).await;
        }
    };
    let label = format!("waiting for {enough} votes");
    // The caller looks again, and says so where it took too long.
    let _in_time = print::progress(&label, time::timeout(VOTERS_TIMEOUT, look)).await;
}

/// Starts nodes at once. The first failure counts, after the others have had their time.
async fn start(cluster: &mut Cluster, nodes: &[Node], what: &str) -> Result<(), CliError> {
    let ready = Cell::new(0);
    let all = nodes.iter().map(async |node| {
        let token = if cluster.must_join(node) && !node.is_healthy().await {
            Some(token(cluster).await?)
        } else {
            None
        };
        cluster.start(node, token).await?;
        ready.set(ready.get() + 1);
        Ok::<(), CliError>(())
    });
    let all = future::join_all(all);
    let label = || match nodes {
        [only] => format!("{what} node {}", only.number),
        _ => format!("{what} {} nodes, {} ready", nodes.len(), ready.get()),
    };
    let outcomes = print::progress_of(label, all).await;
    for node in nodes {
        cluster.remember(node)?;
    }
    outcomes.into_iter().collect()
}

/// A token for one more member, from any node that runs.
async fn token(cluster: &Cluster) -> Result<String, CliError> {
    let Some(client) = seen::client(cluster).await else {
        let err = CliError::new("no node runs that could give out a join token");
        return Err(err.hint("`wrenn dev start 1`, then try again"));
    };
    let wanted = json!({"role": "member", "ttl_sec": TOKEN_TTL.as_secs(), "uses": 1});
    let made = client
        .call(Method::POST, "/v1/tokens", Some(wanted))
        .await?;
    let token = made["token"].as_str().map(str::to_owned);
    token.ok_or_else(|| CliError::new("the node answered without a join token"))
}
