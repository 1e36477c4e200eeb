//! `wrenn template`.

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
        }
    }
    Ok(ExitCode::SUCCESS)
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
