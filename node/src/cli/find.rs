//! Finding the API on this machine: a development cluster here or above, else the system's node.

use std::path::{Path, PathBuf};
use std::{env, fs};

use serde::Deserialize;

use super::error::CliError;
use crate::config::defaults;

/// The directory of a development cluster.
pub(super) const DEV_DIR: &str = ".wrenn-dev";
/// Names that directory where it lies elsewhere.
const DEV_DIR_VARIABLE: &str = "WRENN_DEV_DIR";

/// What a node writes into its data directory once it serves.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Ready {
    /// Its id.
    pub(super) id: String,
    /// Its name.
    pub(super) name: String,
    /// Where its API answers.
    pub(super) url: String,
    /// Its process.
    pub(super) pid: i32,
}

/// Where to call, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// The base of all routes.
    pub(super) url: String,
    /// The API key.
    pub(super) key: String,
}

/// The endpoint as given, completed by what this machine knows.
///
/// A key found here is only ever sent to the node it belongs to.
pub(super) fn endpoint(url: Option<String>, key: Option<String>) -> Result<Endpoint, CliError> {
    let url = url.filter(|url| !url.is_empty());
    let key = key.filter(|key| !key.is_empty());
    if let (Some(url), Some(key)) = (&url, &key) {
        let (url, key) = (url.clone(), key.clone());
        return Ok(Endpoint { url, key });
    }
    let found = data_dirs().find_map(|dir| local(&dir));
    let Some(local) = found else {
        let missing = if url.is_none() {
            "API address"
        } else {
            "API key"
        };
        let err = CliError::usage(format!("no {missing} was given and no node runs here"));
        return Err(err.hint("start one with `wrenn dev up`, or give --url and --api-key"));
    };
    let same_node = url.as_deref().is_none_or(|url| same_base(url, &local.url));
    if key.is_none() && !same_node {
        let err = CliError::usage("no API key was given for that address");
        return Err(err.hint(format!("give --api-key; the node here is {}", local.url)));
    }
    Ok(Endpoint {
        url: url.unwrap_or(local.url),
        key: key.unwrap_or(local.key),
    })
}

/// The development cluster's directory: named by the environment, or here or above.
pub(super) fn dev_dir() -> Option<PathBuf> {
    if let Some(dir) = env::var_os(DEV_DIR_VARIABLE).filter(|dir| !dir.is_empty()) {
        return Some(dir.into());
    }
    let here = env::current_dir().ok()?;
    let candidates = here.ancestors().map(|dir| dir.join(DEV_DIR));
    candidates.into_iter().find(|dir| dir.is_dir())
}

/// What the node with this data directory wrote when it became ready.
pub(super) fn ready(data_dir: &Path) -> Option<Ready> {
    let json = fs::read(data_dir.join("ready.json")).ok()?;
    serde_json::from_slice(&json).ok()
}

/// The key of the node's first start.
pub(super) fn bootstrap_key(data_dir: &Path) -> Option<String> {
    let key = fs::read_to_string(data_dir.join("bootstrap.key")).ok()?;
    Some(key.trim().to_owned()).filter(|key| !key.is_empty())
}

fn data_dirs() -> impl Iterator<Item = PathBuf> {
    let dev = dev_dir().map(|dir| dir.join("node1"));
    dev.into_iter().chain([PathBuf::from(defaults::DATA_DIR)])
}

fn local(data_dir: &Path) -> Option<Endpoint> {
    let url = ready(data_dir)?.url;
    let key = bootstrap_key(data_dir)?;
    Some(Endpoint { url, key })
}

fn same_base(one: &str, other: &str) -> bool {
    one.trim_end_matches('/') == other.trim_end_matches('/')
}
