//! `wrenn capsule set` and `link`: who may visit the ports of a capsule.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use super::capsule::path;
use super::client::Client;
use super::error::CliError;
use super::{Global, print};

/// Changes what `asked` names.
pub(super) async fn set(
    global: &Global,
    client: &Client,
    id: &str,
    asked: Value,
) -> Result<(), CliError> {
    let changed = client.call(Method::PATCH, &path(id)?, Some(asked)).await?;
    if global.json {
        print::json(&changed)?;
    }
    Ok(())
}

/// Prints a link to a port.
pub(super) async fn link(
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
