//! `wrenn token`: letting further hosts in.

use std::io::{self, IsTerminal as _};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use http::Method;
use serde_json::{Value, json};

use super::capsule::period;
use super::client::Client;
use super::error::CliError;
use super::{Global, print};

/// What to do with join tokens.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a token, and print the command that a new host is to run.
    Create(Create),
    /// List the tokens, without their secrets.
    Ls,
    /// Withdraw tokens: nobody joins by them any more.
    Revoke {
        /// Their ids.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// What the token is good for.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// What the new node becomes: a full member, or a host of one team.
    #[arg(long, value_enum, default_value_t = Role::Member)]
    role: Role,
    /// The team whose host joins.
    #[arg(long, value_name = "TEAM", required_if_eq("role", "host"))]
    team: Option<String>,
    /// How long it is good for, e.g. 90s, 1h or 7d.
    #[arg(long, value_name = "TIME", value_parser = period, default_value = "1h")]
    ttl: Duration,
    /// How many nodes may join by it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    uses: u32,
}

/// What a new node becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    Member,
    Host,
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    match command {
        Command::Create(wanted) => create(global, &client, wanted).await?,
        Command::Ls => list(global, &client).await?,
        Command::Revoke { ids } => revoke(&client, &ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(global: &Global, client: &Client, wanted: Create) -> Result<(), CliError> {
    let role = match wanted.role {
        Role::Member => "member",
        Role::Host => "host",
    };
    let body = json!({
        "role": role,
        "team": wanted.team,
        "ttl_sec": wanted.ttl.as_secs(),
        "uses": wanted.uses,
    });
    let asked = client.call(Method::POST, "/v1/tokens", Some(body));
    let made = print::progress("making the token", asked).await?;
    if global.json {
        return print::json(&made);
    }
    if io::stdout().is_terminal() {
        let ends = print::text(&made, "expires_at");
        let (id, uses) = (print::text(&made, "id"), wanted.uses);
        print::note(&format!(
            "good until {ends} for {uses} node(s); whoever has it may join. \
             `wrenn token revoke {id}` withdraws it. Run on the new host:"
        ));
    }
    if io::stderr().is_terminal() {
        warn_of_loopback(client).await;
    }
    print::line(&print::text(&made, "join_command"))
}

/// Says so where no other host can follow the token: every node is dialled on this machine only.
async fn warn_of_loopback(client: &Client) {
    let Ok(nodes) = client.call(Method::GET, "/v1/nodes", None).await else {
        return;
    };
    let nodes: Vec<&Value> = nodes.as_array().into_iter().flatten().collect();
    let is_local = |node: &&Value| {
        let address = print::text(node, "address").parse::<SocketAddr>();
        address.is_ok_and(|address| address.ip().is_loopback())
    };
    if !nodes.is_empty() && nodes.iter().all(is_local) {
        print::note(
            "only this machine can join: its nodes listen on loopback; \
             `wrenn node start --cluster-listen 0.0.0.0:7321` opens one to other hosts",
        );
    }
}

async fn list(global: &Global, client: &Client) -> Result<(), CliError> {
    let all = client.call(Method::GET, "/v1/tokens", None).await?;
    if global.json {
        return print::json(&all);
    }
    let row = |token: &Value| {
        let nodes = token["nodes"].as_array().into_iter().flatten();
        let nodes: Vec<&str> = nodes.filter_map(Value::as_str).collect();
        vec![
            print::text(token, "id"),
            print::text(token, "role"),
            print::text(token, "state"),
            print::text(token, "uses_left"),
            print::text(token, "expires_at"),
            nodes.join(","),
        ]
    };
    let rows: Vec<_> = all.as_array().into_iter().flatten().map(row).collect();
    let headings = ["ID", "ROLE", "STATE", "USES LEFT", "EXPIRES", "NODES"];
    print::table(&headings, &rows)
}

async fn revoke(client: &Client, ids: &[String]) -> Result<(), CliError> {
    for id in ids {
        // Parsed here, so that nothing else gets into a path.
        let id: proto::ids::TokenId = id
            .parse()
            .map_err(|err: proto::ids::ParseIdError| CliError::usage(err.to_string()))?;
        let path = format!("/v1/tokens/{id}");
        client.call(Method::DELETE, &path, None).await?;
    }
    Ok(())
}
