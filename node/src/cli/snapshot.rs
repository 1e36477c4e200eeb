//! `wrenn snapshot`.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use http::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use super::{Global, print, template};

/// Longest the taking of a snapshot may take: its node gives up a little earlier.
const TAKE_TIMEOUT: Duration = Duration::from_secs(70);
/// Longest name of a snapshot.
const NAME_CHARS: usize = 64;

/// What to do with snapshots that have a name.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Keep a capsule as it is now, for others to start from, and print the name.
    ///
    /// A running capsule goes on; a paused one stays paused.
    Create(Create),
    /// List snapshots, and templates.
    Ls {
        /// Only those of one kind.
        #[arg(long = "type", value_name = "KIND")]
        kind: Option<Kind>,
    },
    /// Remove snapshots. Capsules that were started from them go on.
    Rm {
        /// Their names.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// A snapshot to take.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// The capsule, running or paused.
    capsule: String,
    /// Its name; `template-` and eight digits where absent.
    #[arg(long)]
    name: Option<String>,
    /// Replace the snapshot of that name, if there is one.
    #[arg(long)]
    overwrite: bool,
}

/// What a new capsule starts from.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Kind {
    /// A disk alone.
    Base,
    /// A capsule with its memory.
    Snapshot,
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    match command {
        Command::Create(request) => create(global, &client, request).await?,
        Command::Ls { kind } => {
            let query = match kind {
                None => "",
                Some(Kind::Base) => "?type=base",
                Some(Kind::Snapshot) => "?type=snapshot",
            };
            let route = format!("/v1/snapshots{query}");
            let all = client.call(Method::GET, &route, None).await?;
            template::show(global, &all)?;
        }
        Command::Rm { names } => remove(global, &client, &names).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(global: &Global, client: &Client, request: Create) -> Result<(), CliError> {
    let body = json!({ "sandbox_id": request.capsule, "name": request.name });
    let route = format!("/v1/snapshots?overwrite={}", request.overwrite);
    let asked = client.call_within(Method::POST, &route, Some(body), TAKE_TIMEOUT);
    let label = format!("taking a snapshot of {}", request.capsule);
    let made = print::progress(&label, asked).await?;
    if global.json {
        return print::json(&made);
    }
    print::line(&print::text(&made, "name"))
}

async fn remove(global: &Global, client: &Client, names: &[String]) -> Result<(), CliError> {
    let routes: Vec<String> = names
        .iter()
        .map(|name| path(name))
        .collect::<Result<_, _>>()?;
    for route in routes {
        client.call(Method::DELETE, &route, None).await?;
    }
    if global.json {
        print::json(&Value::from(names))?;
    }
    Ok(())
}

/// The route of one snapshot. The name is checked here, so that nothing else gets into a path.
fn path(name: &str) -> Result<String, CliError> {
    let plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '_' | '-');
    let starts = name.starts_with(|it: char| it.is_ascii_alphanumeric());
    if starts && name.len() <= NAME_CHARS && name.chars().all(plain) {
        return Ok(format!("/v1/snapshots/{name}"));
    }
    Err(CliError::usage(format!(
        "{name:?} is no name of a snapshot"
    )))
}
