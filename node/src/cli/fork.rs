//! `wrenn capsule fork`.

use std::time::Duration;

use clap::Args;
use http::Method;
use serde_json::{Value, json};
use tokio::time::{self, Instant};

use super::capsule::{get, path, period};
use super::client::Client;
use super::error::CliError;
use super::{Global, print};

/// Longest the call may take: its node gives up a little earlier.
const FORK_TIMEOUT: Duration = Duration::from_secs(70);
/// Pause between two looks at a fork that is starting.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Capsules to start from another.
#[derive(Debug, Args)]
pub(super) struct Fork {
    /// The capsule, running or paused. It stays as it is.
    id: String,
    /// How many, 16 at most.
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: u32,
    /// Do not wait until they run.
    #[arg(long)]
    no_wait: bool,
    /// Wait this long at most.
    #[arg(long, value_name = "TIME", value_parser = period, default_value = "2m")]
    wait: Duration,
}

/// Does it. Those that could not be started are named, the others are printed all the same.
pub(super) async fn run(global: &Global, client: &Client, request: Fork) -> Result<(), CliError> {
    let deadline = Instant::now() + request.wait;
    let route = format!("{}/fork", path(&request.id)?);
    let body = json!({ "count": request.count });
    let asked = client.call_within(Method::POST, &route, Some(body), FORK_TIMEOUT);
    let label = format!("forking {}", request.id);
    let made = print::progress(&label, asked).await?;
    let mut forks: Vec<Value> = made.as_array().cloned().unwrap_or_default();
    if !request.no_wait {
        let started = until_started(client, &mut forks, deadline);
        print::progress("waiting for the guests", started).await?;
    }
    let broken: Vec<String> = forks.iter().filter_map(complaint).collect();
    if global.json {
        print::json(&Value::from(forks))?;
    } else {
        for fork in forks.iter().filter(|fork| complaint(fork).is_none()) {
            print::line(&print::text(fork, "id"))?;
        }
    }
    if broken.is_empty() {
        return Ok(());
    }
    Err(CliError::new(broken.join("\n")))
}

async fn until_started(
    client: &Client,
    forks: &mut [Value],
    deadline: Instant,
) -> Result<(), CliError> {
    for fork in forks {
        while fork["status"] == "starting" && Instant::now() < deadline {
            time::sleep(POLL_INTERVAL).await;
            *fork = get(client, &print::text(fork, "id")).await?;
        }
    }
    Ok(())
}

/// What is wrong with a fork.
fn complaint(fork: &Value) -> Option<String> {
    let status = fork["status"].as_str().unwrap_or_default();
    let is_over = matches!(status, "error" | "stopped" | "missing");
    let (id, why) = (print::text(fork, "id"), print::text(fork, "reason"));
    is_over.then(|| format!("capsule {id} is {status}: {why}"))
}
