//! `wrenn template`.

mod build;
mod file;

use std::process::ExitCode;

use clap::Subcommand;
use http::Method;
use serde_json::Value;

use super::error::CliError;
use super::{Global, print};

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the templates.
    Ls,
    /// Build a template from a recipe, and print its name.
    Build(build::Build),
    /// List the builds, the newest first.
    Builds,
    /// Show the log of a build until it ends.
    Log {
        /// The build.
        id: String,
    },
    /// Call a build off.
    Cancel {
        /// The build.
        id: String,
    },
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Ls => {
            let all = global
                .client()?
                .call(Method::GET, "/v1/snapshots", None)
                .await?;
            show(global, &all)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Build(asked) => build::run(global, asked).await,
        Command::Builds => build::list(global).await,
        Command::Log { id } => build::log(global, &id).await,
        Command::Cancel { id } => build::cancel(global, &id).await,
    }
}

pub(super) fn show(global: &Global, all: &Value) -> Result<(), CliError> {
    if global.json {
        return print::json(all);
    }
    let row = |template: &Value| {
        let mib = template["size_bytes"].as_u64().unwrap_or(0) >> 20;
        vec![
            print::text(template, "name"),
            print::text(template, "type"),
            format!("{mib} MiB"),
            print::text(template, "created_at"),
        ]
    };
    let rows: Vec<_> = all.as_array().into_iter().flatten().map(row).collect();
    print::table(&["NAME", "TYPE", "DATA", "CREATED"], &rows)
}
