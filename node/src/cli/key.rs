//! `wrenn key`: who may use the interface, and how far.

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use http::Method;
use serde_json::{Value, json};

use super::capsule::period;
use super::client::Client;
use super::error::CliError;
use super::{Global, print};

/// What to do with API keys.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a key, and print it. It is not shown again.
    Create(Create),
    /// List the keys, without their secrets.
    #[command(visible_alias = "list")]
    Ls {
        /// Those of this team instead of one's own.
        #[arg(long, value_name = "TEAM")]
        team: Option<String>,
    },
    /// Make keys useless at once, and end what goes on under them.
    Revoke {
        /// Their ids.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// What the key is good for.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// What people call it.
    name: Option<String>,
    /// What it may do; each includes those before it.
    #[arg(long, value_enum, default_value_t = Scope::Run)]
    scope: Scope,
    /// When it ends by itself, e.g. 90s, 1h or 7d; never where absent.
    #[arg(long, value_name = "TIME", value_parser = period)]
    expires: Option<Duration>,
    /// Whose it is; one's own team where absent.
    #[arg(long, value_name = "TEAM")]
    team: Option<String>,
    /// The member who holds it, and with whom it goes.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
}

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scope {
    /// Look at what there is.
    Read,
    /// Make, use and end capsules.
    Run,
    /// Look after keys and members too.
    Admin,
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    match command {
        Command::Create(wanted) => create(global, &client, wanted).await?,
        Command::Ls { team } => list(global, &client, team.as_deref()).await?,
        Command::Revoke { ids } => revoke(&client, &ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(global: &Global, client: &Client, wanted: Create) -> Result<(), CliError> {
    let scope = match wanted.scope {
        Scope::Read => "read",
        Scope::Run => "run",
        Scope::Admin => "admin",
    };
    let body = json!({
        "name": wanted.name,
        "scope": scope,
        "expires_in_sec": wanted.expires.map(|life| life.as_secs()),
        "team_id": wanted.team,
        "user_id": wanted.user,
    });
    let asked = client.call(Method::POST, "/v1/api-keys", Some(body));
    let made = print::progress("making the key", asked).await?;
    if global.json {
        return print::json(&made);
    }
    if io::stdout().is_terminal() {
        let id = print::text(&made, "id");
        print::note(&format!(
            "this is the only time the key is shown; `wrenn key revoke {id}` ends it"
        ));
    }
    print::line(&print::text(&made, "key"))
}

async fn list(global: &Global, client: &Client, team: Option<&str>) -> Result<(), CliError> {
    let path = match team {
        None => "/v1/api-keys".to_owned(),
        Some(team) => format!("/v1/api-keys?team_id={}", team_id(team)?),
    };
    let all = client.call(Method::GET, &path, None).await?;
    if global.json {
        return print::json(&all);
    }
    let row = |key: &Value| {
        let ends = match key["expired"] {
            Value::Bool(true) => "expired".to_owned(),
            _ => print::text(key, "expires_at"),
        };
        vec![
            print::text(key, "id"),
            print::text(key, "name"),
            print::text(key, "scope"),
            format!("{}…", print::text(key, "key_prefix")),
            print::text(key, "creator_email"),
            ends,
            print::text(key, "last_used"),
        ]
    };
    let rows: Vec<_> = all.as_array().into_iter().flatten().map(row).collect();
    let headings = ["ID", "NAME", "SCOPE", "KEY", "HELD BY", "ENDS", "LAST USED"];
    print::table(&headings, &rows)
}

async fn revoke(client: &Client, ids: &[String]) -> Result<(), CliError> {
    for id in ids {
        // Parsed here, so that nothing else gets into a path.
        let id: proto::ids::KeyId = id
            .parse()
            .map_err(|err: proto::ids::ParseIdError| CliError::usage(err.to_string()))?;
        let path = format!("/v1/api-keys/{id}");
        client.call(Method::DELETE, &path, None).await?;
    }
    Ok(())
}

/// The id of a team, so that nothing else gets into a path.
pub(super) fn team_id(text: &str) -> Result<proto::ids::TeamId, CliError> {
    text.parse()
        .map_err(|err: proto::ids::ParseIdError| CliError::usage(err.to_string()))
}
