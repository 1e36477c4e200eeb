//! `wrenn capsule`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use http::Method;
use jiff::{Timestamp, Unit};
use serde_json::{Value, json};
use tokio::time::{self, Instant};

use super::client::Client;
use super::error::CliError;
use super::{Global, copy, exec, fork, moves, ports, print, shell, stats, terminal};
use crate::config::Period;

/// Pause between two looks at a capsule that is starting.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(500);

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
    /// Show how busy capsules are, again and again.
    Stats(stats::Stats),
    /// Show what the team's capsules have taken, by the day.
    Usage(stats::Usage),
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
        Command::Stats(request) => stats::stats(global, &client, request).await?,
        Command::Usage(request) => stats::usage(global, &client, request).await?,
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
        Command::Pause { ids } => moves::settle(global, &client, &ids, &moves::PAUSE, None).await?,
        Command::Resume { ids, node } => {
            let query = node.as_deref().map(moves::node_query).transpose()?;
            moves::settle(global, &client, &ids, &moves::RESUME, query.as_deref()).await?;
        }
        Command::Migrate { id, to } => moves::migrate(global, &client, &id, &to).await?,
        Command::Set {
            id,
            ports,
            auto_resume,
        } => {
            let asked = json!({"ports": ports, "auto_resume": auto_resume});
            ports::set(global, &client, &id, asked).await?;
        }
        Command::Link { id, port, expires } => {
            ports::link(global, &client, &id, port, expires).await?
        }
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
                "transfer" => moves::transfer(value),
                "waits_for" => moves::waits_for(value),
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
