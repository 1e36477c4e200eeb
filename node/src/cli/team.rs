//! `wrenn team`: teams and the people in them.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use http::Method;
use proto::ids::{ParseIdError, UserId};
use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use super::key::team_id;
use super::{Global, print};

/// What to do with teams.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a team, and print its id.
    Create {
        /// What people call it.
        name: String,
    },
    /// List the teams one may see.
    #[command(visible_alias = "list")]
    Ls,
    /// Give a team another name.
    Rename {
        /// Its id.
        team: String,
        /// What people call it from now on.
        name: String,
    },
    /// Remove a team that has nothing any more, with its members and keys.
    Rm {
        /// Its id.
        team: String,
    },
    /// List the members of a team.
    Members {
        /// Its id; one's own where absent.
        team: Option<String>,
    },
    /// Add somebody to a team. `wrenn key create --user` makes a key for them.
    Add(Add),
    /// Change what a member may do at most.
    Role {
        /// The member's id.
        user: String,
        /// What they become.
        #[arg(value_enum)]
        role: Role,
        /// Of which team; one's own where absent.
        #[arg(long, value_name = "TEAM")]
        team: Option<String>,
    },
    /// Take somebody out of a team, and revoke the keys they hold.
    Drop {
        /// The member's id.
        user: String,
        /// Of which team; one's own where absent.
        #[arg(long, value_name = "TEAM")]
        team: Option<String>,
    },
}

/// Whom to add.
#[derive(Debug, Args)]
pub(super) struct Add {
    /// By which they are known.
    email: String,
    /// What people call them.
    #[arg(long)]
    name: Option<String>,
    /// What they become; the first one of a team becomes its owner.
    #[arg(long, value_enum)]
    role: Option<Role>,
    /// To which team; one's own where absent.
    #[arg(long, value_name = "TEAM")]
    team: Option<String>,
}

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Role {
    /// Like an admin; a team keeps its last one.
    Owner,
    /// May look after keys and members.
    Admin,
    /// May use the team's capsules.
    Member,
}

impl Role {
    const fn word(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Member => "member",
        }
    }
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    match command {
        Command::Create { name } => create(global, &client, &name).await?,
        Command::Ls => list(global, &client).await?,
        Command::Rename { team, name } => {
            let path = format!("/v1/teams/{}", team_id(&team)?);
            let body = json!({ "name": name });
            client.call(Method::PATCH, &path, Some(body)).await?;
        }
        Command::Rm { team } => {
            let path = format!("/v1/teams/{}", team_id(&team)?);
            client.call(Method::DELETE, &path, None).await?;
        }
        Command::Members { team } => members(global, &client, team.as_deref()).await?,
        Command::Add(wanted) => add(global, &client, wanted).await?,
        Command::Role { user, role, team } => {
            let path = member(&client, team.as_deref(), &user).await?;
            let body = json!({ "role": role.word() });
            client.call(Method::PATCH, &path, Some(body)).await?;
        }
        Command::Drop { user, team } => {
            let path = member(&client, team.as_deref(), &user).await?;
            client.call(Method::DELETE, &path, None).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(global: &Global, client: &Client, name: &str) -> Result<(), CliError> {
    let body = json!({ "name": name });
    let made = client.call(Method::POST, "/v1/teams", Some(body)).await?;
    if global.json {
        return print::json(&made);
    }
    print::line(&print::text(&made, "id"))
}

async fn list(global: &Global, client: &Client) -> Result<(), CliError> {
    let all = client.call(Method::GET, "/v1/teams", None).await?;
    if global.json {
        return print::json(&all);
    }
    let columns = ["id", "name", "slug", "role", "created_at"];
    table(&["ID", "NAME", "SLUG", "ROLE", "CREATED"], &columns, &all)
}

async fn members(global: &Global, client: &Client, team: Option<&str>) -> Result<(), CliError> {
    let path = format!("{}/members", path(client, team).await?);
    let all = client.call(Method::GET, &path, None).await?;
    if global.json {
        return print::json(&all);
    }
    let columns = ["user_id", "email", "name", "role", "joined_at"];
    table(&["ID", "EMAIL", "NAME", "ROLE", "SINCE"], &columns, &all)
}

async fn add(global: &Global, client: &Client, wanted: Add) -> Result<(), CliError> {
    let path = format!("{}/members", path(client, wanted.team.as_deref()).await?);
    let body = json!({
        "email": wanted.email,
        "name": wanted.name,
        "role": wanted.role.map(Role::word),
    });
    let made = client.call(Method::POST, &path, Some(body)).await?;
    if global.json {
        return print::json(&made);
    }
    print::line(&print::text(&made, "user_id"))
}

/// The path of a team: the one that is named, or the caller's own.
async fn path(client: &Client, team: Option<&str>) -> Result<String, CliError> {
    let team = match team {
        Some(team) => team_id(team)?,
        None => {
            let me = client.call(Method::GET, "/v1/me", None).await?;
            team_id(&print::text(&me["team"], "id"))?
        }
    };
    Ok(format!("/v1/teams/{team}"))
}

async fn member(client: &Client, team: Option<&str>, user: &str) -> Result<String, CliError> {
    let user: UserId = user
        .parse()
        .map_err(|err: ParseIdError| CliError::usage(err.to_string()))?;
    Ok(format!("{}/members/{user}", path(client, team).await?))
}

fn table(headings: &[&str], columns: &[&str], all: &Value) -> Result<(), CliError> {
    let rows = all.as_array().into_iter().flatten();
    let row = |item: &Value| columns.iter().map(|key| print::text(item, key)).collect();
    print::table(headings, &rows.map(row).collect::<Vec<_>>())
}
