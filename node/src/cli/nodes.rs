//! `wrenn node`, as far as it asks a running cluster: showing nodes, and what operators do with
//! them.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use http::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::capsule::{age, period};
use super::client::Client;
use super::error::CliError;
use super::{Global, print};
use crate::config::Tag;

/// How long one request of a drain waits; the next one goes on.
const DRAIN_STEP: Duration = Duration::from_secs(20);

/// Which node.
#[derive(Debug, Args)]
pub(super) struct One {
    /// Its id or name.
    node: String,
}

/// How to empty a node.
#[derive(Debug, Args)]
pub(super) struct Drain {
    /// Its id or name.
    node: String,
    /// Stop its capsules instead of waiting until they end.
    #[arg(long)]
    stop_capsules: bool,
    /// Give up after this long; the node goes on draining.
    #[arg(long, value_name = "TIME", value_parser = period, default_value = "10m")]
    timeout: Duration,
}

/// How to take a node out.
#[derive(Debug, Args)]
pub(super) struct Remove {
    /// Its id or name.
    node: String,
    /// Declare the host dead for good: its capsules are given up, or started elsewhere where they
    /// may be. Only when it is certain that it runs nothing any more: else a capsule runs twice.
    #[arg(long)]
    force: bool,
}

/// How to tag a node.
#[derive(Debug, Args)]
pub(super) struct Retag {
    /// Its id or name.
    node: String,
    /// KEY=VALUE sets a tag, KEY- removes one; the others stay.
    #[arg(required = true, value_name = "KEY=VALUE|KEY-")]
    tags: Vec<String>,
}

/// Lists the nodes.
pub(super) async fn ls(global: &Global) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    let asked = client.call(Method::GET, "/v1/nodes", None);
    let all = print::progress("asking for the nodes", asked).await?;
    if global.json {
        print::json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let headings = [
        "NAME",
        "ID",
        "ADDRESS",
        "ROLE",
        "LEADER",
        "VERSION",
        "STATE",
        "CAPSULES",
        "LOAD",
        "LAST SEEN",
    ];
    let rows: Vec<_> = all.as_array().into_iter().flatten().map(row).collect();
    print::table(&headings, &rows)?;
    warn_without_quorum(&client).await;
    Ok(ExitCode::SUCCESS)
}

/// Says so where the list may be old: a node that is cut off shows what it knew last.
async fn warn_without_quorum(client: &Client) {
    let cluster = client.call(Method::GET, "/v1/cluster", None).await;
    if cluster.is_ok_and(|cluster| cluster["quorum"] == false) {
        print::note("the node that was asked hears no quorum: this is what it knew last");
    }
}

fn row(node: &Value) -> Vec<String> {
    let used = |key: &str| format!("{}/{}", node["reserved"][key], node["capacity"][key]);
    let leads = node["leader"].as_bool().unwrap_or(false);
    vec![
        print::text(node, "name"),
        print::text(node, "id"),
        print::text(node, "address"),
        print::text(node, "role"),
        if leads { "yes" } else { "no" }.into(),
        print::text(node, "version"),
        state(node),
        used("capsules"),
        format!("{} vCPU, {} MiB", used("vcpus"), used("memory_mb")),
        age(&print::text(node, "last_seen")),
    ]
}

/// How a node is, with what an operator decided about it.
fn state(node: &Value) -> String {
    let mut text = print::text(node, "state");
    let since = age(&print::text(node, "since"));
    if !since.is_empty() {
        text = format!("{text} for {since}");
    }
    let is = |key: &str| node[key].as_bool().unwrap_or(false);
    if is("draining") {
        text.push_str(", draining");
    } else if is("cordoned") {
        text.push_str(", cordoned");
    }
    text
}

/// Lets a node take no new capsules, or again.
pub(super) async fn cordon(global: &Global, one: &One, on: bool) -> Result<ExitCode, CliError> {
    let act = if on { "cordon" } else { "uncordon" };
    let path = format!("{}/{act}", path(&one.node)?);
    let client = global.client()?;
    let asked = client.call(Method::POST, &path, None);
    let node = print::progress(act, asked).await?;
    told(global, &node)
}

/// Empties a node, and waits until it is empty.
pub(super) async fn drain(global: &Global, options: &Drain) -> Result<ExitCode, CliError> {
    let (client, deadline) = (global.client()?, Instant::now() + options.timeout);
    let label = format!("draining {}", options.node);
    let drained = print::progress(&label, drain_until(&client, options, deadline)).await?;
    if global.json {
        print::json(&drained)?;
    }
    if drained["drained"] == true {
        return Ok(ExitCode::SUCCESS);
    }
    let left = drained["capsules"].as_array().map_or(0, Vec::len);
    let (node, waited) = (&options.node, options.timeout);
    let capsules = if left == 1 { "capsule" } else { "capsules" };
    let err = CliError::new(format!(
        "{node} still has {left} {capsules} after {waited:?}"
    ));
    Err(err.hint("it goes on draining; --stop-capsules stops them, `node uncordon` ends it"))
}

async fn drain_until(
    client: &Client,
    options: &Drain,
    deadline: Instant,
) -> Result<Value, CliError> {
    let path = format!("{}/drain", path(&options.node)?);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait that was asked for is not cut short.
        let step = left.min(DRAIN_STEP) + Duration::from_millis(999);
        let body = json!({
            "stop_capsules": options.stop_capsules,
            "timeout_sec": step.as_secs(),
        });
        let drained = client.call(Method::POST, &path, Some(body)).await?;
        if drained["drained"] == true || left < DRAIN_STEP {
            return Ok(drained);
        }
    }
}

/// Takes a node out.
pub(super) async fn remove(global: &Global, options: &Remove) -> Result<ExitCode, CliError> {
    let query = if options.force { "?force=true" } else { "" };
    let path = format!("{}{query}", path(&options.node)?);
    let client = global.client()?;
    let asked = client.call(Method::DELETE, &path, None);
    print::progress(&format!("removing {}", options.node), asked).await?;
    if global.json {
        print::json(&json!({"removed": options.node}))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Changes some of a node's tags.
pub(super) async fn tag(global: &Global, options: &Retag) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    let path = path(&options.node)?;
    let known = client.call(Method::GET, &path, None).await?;
    let known = known["tags"].as_object().into_iter().flatten();
    let known = known.map(|(key, text)| (key.clone(), text.as_str().unwrap_or("").to_owned()));
    let tags = changed(known.collect(), &options.tags)?;
    let path = format!("{path}/tags");
    let asked = client.call(Method::PUT, &path, Some(json!(tags)));
    let node = print::progress("tagging", asked).await?;
    told(global, &node)
}

fn changed(
    mut tags: BTreeMap<String, String>,
    changes: &[String],
) -> Result<BTreeMap<String, String>, CliError> {
    for change in changes {
        if let Some(key) = change.strip_suffix('-').filter(|key| !key.contains('=')) {
            tags.remove(key);
            continue;
        }
        let tag: Tag = change
            .parse()
            .map_err(|err| CliError::usage(format!("{change:?}: {err}")))?;
        tags.extend([tag.into_pair()]);
    }
    Ok(tags)
}

fn told(global: &Global, node: &Value) -> Result<ExitCode, CliError> {
    if global.json {
        print::json(node)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The route of one node. The name is checked here, so that nothing else gets into a path.
pub(super) fn path(name: &str) -> Result<String, CliError> {
    let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-');
    let starts = name.starts_with(|first: char| first.is_ascii_alphanumeric());
    if starts && name.chars().all(plain) {
        return Ok(format!("/v1/nodes/{name}"));
    }
    let err = CliError::usage(format!("{name:?} is no id or name of a node"));
    Err(err.hint("`wrenn node ls` shows them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_set_and_removed_one_by_one() {
        let known = || BTreeMap::from([("zone".into(), "a".into()), ("disk".into(), "ssd".into())]);
        let change = |changes: &[&str]| {
            let changes: Vec<String> = changes.iter().map(|it| (*it).to_owned()).collect();
            changed(known(), &changes)
        };
        let changed = change(&["zone=b", "disk-", "rack=r-"]).expect("tags");
        assert_eq!(
            changed,
            [("rack".into(), "r-".into()), ("zone".into(), "b".into())].into()
        );
        assert!(change(&["zone"]).is_err() && change(&["=b"]).is_err());
    }

    #[test]
    fn a_name_cannot_lead_to_another_route() {
        for bad in ["", "a/b", "..", "a?force=true", "a b", "%2e"] {
            assert!(path(bad).is_err(), "{bad}");
        }
        assert!(path("node-3").is_ok() && path("host.example").is_ok());
    }

    #[test]
    fn a_state_says_what_is_wrong_and_what_was_decided() {
        let node = json!({"state": "alive", "cordoned": true, "draining": true});
        assert_eq!(state(&node), "alive, draining");
        let node = json!({"state": "alive", "cordoned": true, "draining": false});
        assert_eq!(state(&node), "alive, cordoned");
        let node = json!({"state": "missing", "since": "2023-11-14T22:13:20Z"});
        assert!(state(&node).starts_with("missing for "));
    }
}
