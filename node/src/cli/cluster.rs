//! `wrenn cluster`: the cluster as a whole.

use std::process::ExitCode;

use clap::Subcommand;
use http::Method;
use serde_json::{Map, Value};

use super::capsule::{pair, period};
use super::error::CliError;
use super::{Global, print};

/// What to do with the cluster.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show who leads and votes, and the settings.
    Get,
    /// Change settings: max_voters, max_learners, replicas, key_rate, key_burst, lease_ttl_sec, lease_grace_sec.
    Set {
        /// Settings and their new values; times may have a unit.
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = pair)]
        settings: Vec<(String, String)>,
    },
}

/// Does it.
pub(super) async fn run(global: &Global, command: Command) -> Result<ExitCode, CliError> {
    let client = global.client()?;
    let cluster = match command {
        Command::Get => client.call(Method::GET, "/v1/cluster", None).await?,
        Command::Set { settings } => {
            let body = settings.into_iter().map(setting);
            let body = body.collect::<Result<Map<_, _>, _>>()?.into();
            let asked = client.call(Method::PATCH, "/v1/cluster", Some(body));
            print::progress("changing the settings", asked).await?
        }
    };
    if global.json {
        print::json(&cluster)?;
    } else {
        show(&cluster)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Settings that are numbers.
const NUMBERS: [&str; 5] = [
    "max_voters",
    "max_learners",
    "replicas",
    "key_rate",
    "key_burst",
];
/// Settings that are times in seconds.
const TIMES: [&str; 2] = ["lease_ttl_sec", "lease_grace_sec"];

/// A number, or a time in seconds.
fn setting((key, text): (String, String)) -> Result<(String, Value), CliError> {
    let bad = |why: &str| CliError::usage(format!("{key}={text}: {why}"));
    let value = if NUMBERS.contains(&key.as_str()) {
        let number = text.parse::<u32>();
        number.map_err(|_| bad("expected a number"))?.into()
    } else if TIMES.contains(&key.as_str()) {
        let time = period(&text).map_err(|why| bad(&why))?;
        if time.subsec_nanos() != 0 {
            return Err(bad("expected whole seconds"));
        }
        time.as_secs().into()
    } else {
        let known = [&NUMBERS[..], &TIMES[..]].concat().join(", ");
        let err = CliError::usage(format!("there is no setting {key:?}"));
        return Err(err.hint(format!("the settings are {known}")));
    };
    Ok((key, value))
}

fn show(cluster: &Value) -> Result<(), CliError> {
    let fields = cluster.as_object().into_iter().flatten();
    let fields = fields.filter(|(key, _)| *key != "settings");
    let settings = cluster["settings"].as_object().into_iter().flatten();
    let rows: Vec<_> = fields
        .chain(settings)
        .map(|(key, value)| vec![key.clone(), plain(value)])
        .collect();
    print::table(&["FIELD", "VALUE"], &rows)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Array(all) => all.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}
