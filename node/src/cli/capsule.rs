//! `wrenn capsule`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, Subcommand};
use http::Method;
use jiff::{Timestamp, Unit};
use serde_json::{Value, json};
use tokio::time::{self, Instant};

use super::client::Client;
use super::error::CliError;
use super::{Global, copy, exec, fork, nodes, print, shell, terminal};
use crate::config::Period;

/// Pause between two looks at a capsule that is starting.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Cells of the bar that shows how far a transfer has come.
const BAR_CELLS: u64 = 20;

/// What to do with capsules.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create a capsule and print its id.
    Create(Create),
    /// List the capsules that have not ended.
    Ls,
    /// Show one capsule.
    Get {
        /// The capsule.
        id: String,
    },
    /// Run a command in a capsule; its output and exit code become this command's.
    Exec(exec::Exec),
    /// Open a terminal in a capsule; without one here, run the lines of the input one by one.
    ///
    /// The terminal lives on when the connection breaks, and is found again by itself or with `--attach`. Lines
    /// of an input that is no terminal run each to its end in a shell that keeps directory and exported variables.
    Shell {
        /// The capsule.
        id: String,
        /// Go back to the terminal of this tag.
        #[arg(long, value_name = "TAG", conflicts_with = "command")]
        attach: Option<String>,
        /// The program and its arguments, after `--`; bash where absent.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Show what the guest's console printed.
    Logs {
        /// The capsule.
        id: String,
        /// Only the last lines.
        #[arg(long, value_name = "LINES")]
        tail: Option<u32>,
    },
    /// Copy a file into or out of a capsule; `-` is standard input or output.
    Cp {
        /// A file here, or `ID:/path`.
        from: String,
        /// A file here, or `ID:/path`.
        to: String,
    },
    /// Move a capsule's inactivity timer back to its start.
    Ping {
        /// The capsule.
        id: String,
    },
    /// Pause capsules: keep them as snapshots and give their room free.
    Pause {
        /// The capsules.
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Resume paused capsules, each on whichever node can.
    Resume {
        /// The capsules.
        #[arg(required = true)]
        ids: Vec<String>,
        /// The only node that will do, by id or name.
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
    },
    /// Move a running capsule to another node: it is paused here and goes on there.
    Migrate {
        /// The capsule.
        id: String,
        /// Where to, by id or name.
        #[arg(long, value_name = "NODE")]
        to: String,
    },
    /// Change who may visit a capsule's ports, and whether a visit resumes it.
    Set {
        /// The capsule.
        id: String,
        /// `private`: a key of the team, or a link; `public`: anybody.
        #[arg(long, value_name = "private|public")]
        ports: Option<String>,
        /// Whether a visit to a port resumes it.
        #[arg(long, value_name = "true|false")]
        auto_resume: Option<bool>,
    },
    /// Print a link to a port of a capsule, for those who have no key.
    Link {
        /// The capsule.
        id: String,
        /// The port in the guest.
        port: u16,
        /// How long it holds, a week at most.
        #[arg(long, value_name = "TIME", value_parser = period, default_value = "1h")]
        expires: Duration,
    },
    /// Start further capsules from where one is now, each as somebody else, and print their ids.
    Fork(fork::Fork),
    /// Destroy capsules.
    Destroy {
        /// The capsules.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// A capsule to create.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// The template to start from.
    #[arg(long, default_value = "minimal")]
    template: String,
    /// Virtual processors, 1 where absent.
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory, 512 MiB where absent.
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// Pause it after this long without activity, e.g. 10m; never where absent.
    #[arg(long, value_name = "TIME", value_parser = period)]
    timeout: Option<Duration>,
    /// What becomes of it after that time: pause, where absent, or destroy.
    #[arg(long, value_name = "pause|destroy")]
    timeout_action: Option<String>,
    /// A label; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// What becomes of it when its host is lost: wait for the host, where absent, or restart from
    /// the template on another one.
    #[arg(long, value_name = "wait|restart")]
    on_host_loss: Option<String>,
    /// A tag that its node must have; may be repeated.
    #[arg(long = "node-tag", value_name = "KEY=VALUE", value_parser = pair)]
    node_tags: Vec<(String, String)>,
    /// The only node that may run it, by id or name.
    #[arg(long = "node", value_name = "NODE")]
    on_node: Option<String>,
    /// Who may visit its ports: private (a key of the team, or a link), where absent, or public.
    #[arg(long, value_name = "private|public")]
    ports: Option<String>,
    /// Resume it when one of its ports is visited.
    #[arg(long)]
    auto_resume: bool,
    /// Do not wait until it runs.
    #[arg(long)]
    no_wait: bool,
    /// Wait this long at most.
    #[arg(long, value_name = "TIME", value_parser = period, default_value = "2m")]
    wait: Duration,
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    match command {
        Command::Create(request) => create(global, &client, request).await?,
        Command::Ls => list(global, &client).await?,
        Command::Get { id } => show(global, &get(&client, &id).await?)?,
        Command::Exec(request) => return exec::run(global, &client, request).await,
        Command::Shell {
            id,
            attach,
            command,
        } => {
            if attach.is_none() && command.is_empty() && !io::stdin().is_terminal() {
                return shell::run(&client, &id).await;
            }
            let wanted = attach.map_or(terminal::Wanted::New(command), terminal::Wanted::Tagged);
            return terminal::run(&client, &id, wanted).await;
        }
        Command::Logs { id, tail } => logs(global, &client, &id, tail).await?,
        Command::Cp { from, to } => {
            copy::run(&client, &from, &to).await?;
            if global.json && to != "-" {
                print::json(&json!({ "from": from, "to": to }))?;
            }
        }
        Command::Ping { id } => {
            client
                .call(Method::POST, &format!("{}/ping", path(&id)?), None)
                .await?;
            if global.json {
                print::json(&get(&client, &id).await?)?;
            }
        }
        Command::Pause { ids } => settle(global, &client, &ids, &PAUSE, None).await?,
        Command::Resume { ids, node } => {
            let query = node.as_deref().map(node_query).transpose()?;
            settle(global, &client, &ids, &RESUME, query.as_deref()).await?;
        }
        Command::Migrate { id, to } => migrate(global, &client, &id, &to).await?,
        Command::Set {
            id,
            ports,
            auto_resume,
        } => {
            let body = json!({"ports": ports, "auto_resume": auto_resume});
            let changed = client.call(Method::PATCH, &path(&id)?, Some(body)).await?;
            if global.json {
                print::json(&changed)?;
            }
        }
        Command::Link { id, port, expires } => link(global, &client, &id, port, expires).await?,
        Command::Fork(request) => fork::run(global, &client, request).await?,
        Command::Destroy { ids } => destroy(global, &client, &ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The route of one capsule. The id is checked here, so that nothing else gets into a path.
pub(super) fn path(id: &str) -> Result<String, CliError> {
    let id: proto::ids::SandboxId = id
        .parse()
        .map_err(|err: proto::ids::ParseIdError| CliError::usage(err.to_string()))?;
    Ok(format!("/v1/capsules/{id}"))
}

async fn create(global: &Global, client: &Client, request: Create) -> Result<(), CliError> {
    let deadline = Instant::now() + request.wait;
    let metadata: BTreeMap<_, _> = request.metadata.into_iter().collect();
    let node_tags: BTreeMap<_, _> = request.node_tags.into_iter().collect();
    let body = json!({
        "template": request.template,
        "vcpus": request.vcpus,
        "memory_mb": request.memory,
        "timeout_sec": request.timeout.map(|timeout| timeout.as_secs()),
        "timeout_action": request.timeout_action,
        "metadata": metadata,
        "on_host_loss": request.on_host_loss,
        "node_tags": node_tags,
        "on_node": request.on_node,
        "ports": request.ports,
        "auto_resume": request.auto_resume,
    });
    let route = if request.no_wait {
        "/v1/capsules?wait=false"
    } else {
        "/v1/capsules"
    };
    let asked = client.call(Method::POST, route, Some(body));
    let mut capsule = print::progress("creating the capsule", asked).await?;
    if !request.no_wait {
        let id = print::text(&capsule, "id");
        let running = until_running(client, &id, capsule, deadline);
        capsule = print::progress("waiting for the guest", running).await?;
    }
    if global.json {
        return print::json(&capsule);
    }
    print::line(&print::text(&capsule, "id"))
}

async fn until_running(
    client: &Client,
    id: &str,
    mut capsule: Value,
    deadline: Instant,
) -> Result<Value, CliError> {
    loop {
        match capsule["status"].as_str().unwrap_or_default() {
            "running" => return Ok(capsule),
            "starting" if Instant::now() < deadline => {}
            "starting" => {
                let err = CliError::new(format!("capsule {id} is still starting"));
                return Err(err.hint(format!("it goes on; `wrenn capsule get {id}` tells")));
            }
            other => {
                let why = print::text(&capsule, "reason");
                let err = CliError::new(format!("capsule {id} is {other}: {why}"));
                return Err(err.hint(format!("`wrenn capsule logs {id}` may tell more")));
            }
        }
        time::sleep(POLL_INTERVAL).await;
        capsule = get(client, id).await?;
    }
}

pub(super) async fn get(client: &Client, id: &str) -> Result<Value, CliError> {
    client.call(Method::GET, &path(id)?, None).await
}

async fn list(global: &Global, client: &Client) -> Result<(), CliError> {
    let all = client.call(Method::GET, "/v1/capsules", None).await?;
    if global.json {
        return print::json(&all);
    }
    let row = |capsule: &Value| {
        vec![
            print::text(capsule, "id"),
            print::text(capsule, "status"),
            print::text(capsule, "template"),
            print::text(capsule, "vcpus"),
            format!("{} MiB", capsule["memory_mb"]),
            age(&print::text(capsule, "created_at")),
            print::text(capsule, "node"),
        ]
    };
    let rows: Vec<_> = all.as_array().into_iter().flatten().map(row).collect();
    let headings = ["ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "AGE", "NODE"];
    print::table(&headings, &rows)
}

fn show(global: &Global, capsule: &Value) -> Result<(), CliError> {
    if global.json {
        return print::json(capsule);
    }
    let fields = capsule.as_object().into_iter().flatten();
    let rows: Vec<_> = fields
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| {
            let shown = match key.as_str() {
                "transfer" => transfer(value),
                "waits_for" => waits_for(value),
                _ => None,
            };
            vec![
                key.clone(),
                shown.unwrap_or_else(|| print::text(capsule, key)),
            ]
        })
        .collect();
    print::table(&["FIELD", "VALUE"], &rows)
}

async fn logs(
    global: &Global,
    client: &Client,
    id: &str,
    tail: Option<u32>,
) -> Result<(), CliError> {
    let query = tail
        .map(|lines| format!("?tail={lines}"))
        .unwrap_or_default();
    let route = format!("{}/logs{query}", path(id)?);
    let answer = client.open(Method::GET, &route, None).await?;
    let log = client.whole(answer).await?;
    if global.json {
        return print::json(&json!({ "id": id, "log": String::from_utf8_lossy(&log) }));
    }
    print::out(&log)
}

/// A move from one rest to another.
struct Move {
    route: &'static str,
    doing: &'static str,
    /// What it passes through, and what it comes to.
    on_the_way: &'static str,
    done: &'static str,
}

const PAUSE: Move = Move {
    route: "pause",
    doing: "pausing",
    on_the_way: "pausing",
    done: "paused",
};
const RESUME: Move = Move {
    route: "resume",
    doing: "resuming",
    on_the_way: "resuming",
    done: "running",
};

/// Pauses or resumes one after the other; each is done when it shows so.
async fn settle(
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
fn node_query(node: &str) -> Result<String, CliError> {
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
fn transfer(value: &Value) -> Option<String> {
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
fn waits_for(value: &Value) -> Option<String> {
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

async fn migrate(global: &Global, client: &Client, id: &str, to: &str) -> Result<(), CliError> {
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

async fn link(
    global: &Global,
    client: &Client,
    id: &str,
    port: u16,
    expires: Duration,
) -> Result<(), CliError> {
    let body = json!({"port": port, "expires_in_sec": expires.as_secs()});
    let route = format!("{}/links", path(id)?);
    let made = client.call(Method::POST, &route, Some(body)).await?;
    if global.json {
        return print::json(&made);
    }
    if let Some(url) = made["url"].as_str() {
        return print::line(url);
    }
    print::note("this node is known by an address alone: send these headers with a request to it");
    let token = print::text(&made, "token");
    print::line(&format!("Wrenn-Capsule-Id: {id}"))?;
    print::line(&format!("Wrenn-Capsule-Port: {port}"))?;
    print::line(&format!("Wrenn-Link: {token}"))
}

async fn destroy(global: &Global, client: &Client, ids: &[String]) -> Result<(), CliError> {
    let routes: Vec<String> = ids.iter().map(|id| path(id)).collect::<Result<_, _>>()?;
    for (id, route) in ids.iter().zip(routes) {
        let asked = client.call(Method::DELETE, &route, None);
        print::progress(&format!("destroying {id}"), asked).await?;
    }
    if !global.json {
        return Ok(());
    }
    let mut capsules = Vec::new();
    for id in ids {
        capsules.push(get(client, id).await?);
    }
    print::json(&capsules.into())
}

/// How long ago an instant was, in words as long as needed; empty for none.
pub(super) fn age(created_at: &str) -> String {
    let Ok(then) = created_at.parse::<Timestamp>() else {
        return String::new();
    };
    let Ok(seconds) = (Timestamp::now() - then).total(Unit::Second) else {
        return String::new();
    };
    match seconds {
        s if s < 120.0 => format!("{s:.0}s"),
        s if s < 7200.0 => format!("{:.0}m", s / 60.0),
        s if s < 172_800.0 => format!("{:.0}h", s / 3600.0),
        s => format!("{:.0}d", s / 86_400.0),
    }
}

/// A key and its value.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    if key.is_empty() {
        return Err("the key is empty".into());
    }
    Ok((key.into(), value.into()))
}

/// A time with its unit, or a number of seconds.
pub(super) fn period(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let period: Period = text.parse().map_err(|err| format!("{err}"))?;
    Ok(period.0)
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

    #[test]
    fn times_may_lack_their_unit() {
        assert_eq!(period("90"), Ok(Duration::from_secs(90)));
        assert_eq!(period("2m"), Ok(Duration::from_secs(120)));
        assert!(period("soon").is_err());
    }

    #[test]
    fn an_id_cannot_lead_to_another_route() {
        for bad in [
            "",
            "..",
            "cl-1/../../nodes",
            "cl-0000000000000000000000001?x",
        ] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }
}
