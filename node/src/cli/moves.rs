//! `wrenn capsule pause`, `resume` and `migrate`: from one rest to another, with how far it has come.

use std::sync::{Mutex, PoisonError};

use http::Method;
use serde_json::{Value, json};
use tokio::time;

use super::capsule::{POLL_INTERVAL, get, path};
use super::client::Client;
use super::error::CliError;
use super::{Global, nodes, print};

/// Cells of the bar that shows how far a transfer has come.
const BAR_CELLS: u64 = 20;

/// A move from one rest to another.
pub(super) struct Move {
    route: &'static str,
    doing: &'static str,
    /// What it passes through, and what it comes to.
    on_the_way: &'static str,
    done: &'static str,
}

pub(super) const PAUSE: Move = Move {
    route: "pause",
    doing: "pausing",
    on_the_way: "pausing",
    done: "paused",
};
pub(super) const RESUME: Move = Move {
    route: "resume",
    doing: "resuming",
    on_the_way: "resuming",
    done: "running",
};

/// Pauses or resumes one after the other; each is done when it shows so.
pub(super) async fn settle(
    global: &Global,
    client: &Client,
    ids: &[String],
    how: &Move,
    query: Option<&str>,
) -> Result<(), CliError> {
    let routes: Vec<String> = ids.iter().map(|id| path(id)).collect::<Result<_, _>>()?;
    let mut capsules = Vec::new();
    for (id, route) in ids.iter().zip(routes) {
        let seen = Seen::default();
        let moved = async {
            let asked = format!("{route}/{}{}", how.route, query.unwrap_or_default());
            client.call(Method::POST, &asked, None).await?;
            arrival(client, id, &[how.on_the_way], &seen).await
        };
        let label = || format!("{} {id}{}", how.doing, seen.text());
        let capsule = print::progress_of(label, moved).await?;
        let reason = capsule["reason"].as_str().unwrap_or_default();
        // What comes to rest as it should has no reason: one that was lost on the way rests as it did
        // before, and says so.
        if capsule["status"] != how.done || !reason.is_empty() {
            let status = capsule["status"].as_str().unwrap_or_default();
            let why = match reason {
                "" if status == "missing" => "its host cannot be reached",
                reason => reason,
            };
            let message = format!("capsule {id} is {status}: {why}");
            return Err(CliError::new(message));
        }
        capsules.push(capsule);
    }
    if global.json {
        print::json(&capsules.into())?;
    }
    Ok(())
}

/// The query that names a node. What no node is called does not get into a route.
pub(super) fn node_query(node: &str) -> Result<String, CliError> {
    nodes::path(node)?;
    Ok(format!("?node={node}"))
}

/// What was last seen of what is on its way to a capsule's host.
#[derive(Debug, Default)]
struct Seen(Mutex<String>);

impl Seen {
    fn note(&self, capsule: &Value) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = waits_for(&capsule["waits_for"]).map(|it| format!("waits for {it}"));
        let shown = shown.or_else(|| transfer(&capsule["transfer"]));
        *text = shown.map_or_else(String::new, |shown| format!(" {shown}"));
    }

    fn text(&self) -> String {
        let text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.clone()
    }
}

/// How far a transfer has come, for people.
pub(super) fn transfer(value: &Value) -> Option<String> {
    let (done, total) = (
        value["bytes_done"].as_u64()?,
        value["bytes_total"].as_u64()?,
    );
    let full = done.saturating_mul(BAR_CELLS).checked_div(total)?;
    let full = usize::try_from(full.min(BAR_CELLS)).ok()?;
    let empty = usize::try_from(BAR_CELLS).ok()? - full;
    let (bar, rest) = ("#".repeat(full), ".".repeat(empty));
    let (done, total) = (done >> 20, total >> 20);
    let sources = value["sources"].as_u64().unwrap_or_default();
    Some(format!(
        "[{bar}{rest}] {done} of {total} MiB from {sources}"
    ))
}

/// What a capsule's guest stands still for, for people.
pub(super) fn waits_for(value: &Value) -> Option<String> {
    let nodes: Vec<&str> = value["nodes"]
        .as_array()?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let whom = match nodes.as_slice() {
        [] => value["reason"].as_str()?.to_owned(),
        nodes => nodes.join(", "),
    };
    let (since, until) = (value["since"].as_str()?, value["until"].as_str()?);
    Some(format!("{whom} since {since}, until {until} at most"))
}

/// The capsule once it is in none of these states any more.
async fn arrival(
    client: &Client,
    id: &str,
    on_the_way: &[&str],
    seen: &Seen,
) -> Result<Value, CliError> {
    loop {
        let capsule = get(client, id).await?;
        seen.note(&capsule);
        if !on_the_way.contains(&capsule["status"].as_str().unwrap_or_default()) {
            return Ok(capsule);
        }
        time::sleep(POLL_INTERVAL).await;
    }
}

/// Moves a capsule to another node, and waits until it runs there.
pub(super) async fn migrate(
    global: &Global,
    client: &Client,
    id: &str,
    to: &str,
) -> Result<(), CliError> {
    let route = format!("{}/migrate", path(id)?);
    let seen = Seen::default();
    let moved = async {
        let asked = client.call(Method::POST, &route, Some(json!({ "node": to })));
        asked.await?;
        arrival(client, id, &["pausing", "resuming"], &seen).await
    };
    let label = || format!("moving {id} to {to}{}", seen.text());
    let capsule = print::progress_of(label, moved).await?;
    let is_there = capsule["node"] == to || capsule["node_id"] == to;
    if capsule["status"] != "running" || !is_there {
        let (status, node) = (
            print::text(&capsule, "status"),
            print::text(&capsule, "node"),
        );
        let why = print::text(&capsule, "reason");
        let err = CliError::new(format!("capsule {id} is {status} on {node}: {why}"));
        return Err(err.hint(format!("`wrenn capsule get {id}` tells more")));
    }
    if global.json {
        print::json(&capsule)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_is_a_bar_and_what_is_none_is_nothing() {
        let of = |done: u64, total: u64| {
            transfer(&json!({"bytes_done": done, "bytes_total": total, "sources": 2}))
        };
        let half = "[##########..........] 512 of 1024 MiB from 2";
        assert_eq!(of(512 << 20, 1 << 30).as_deref(), Some(half));
        let over = of(u64::MAX, 1).expect("a bar");
        assert!(over.starts_with("[####################]"), "{over}");
        assert_eq!(of(0, 0), None);
        assert_eq!(transfer(&Value::Null), None);
    }

    #[test]
    fn a_wait_names_the_hosts_or_else_its_reason() {
        let wait = |nodes: &[&str]| {
            json!({
                "nodes": nodes, "reason": "the disk is full", "since": "S", "until": "U",
            })
        };
        let of = |nodes: &[&str]| waits_for(&wait(nodes));
        assert_eq!(
            of(&["a", "b"]).as_deref(),
            Some("a, b since S, until U at most")
        );
        assert_eq!(
            of(&[]).as_deref(),
            Some("the disk is full since S, until U at most")
        );
        assert_eq!(waits_for(&Value::Null), None);
    }
}
