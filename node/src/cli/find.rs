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

/// What runs on this machine.
#[derive(Clone, Debug)]
struct Local {
    /// The node that is asked where none is named.
    url: String,
    /// The key of all of them, where one of them founded their cluster.
    key: Option<String>,
    /// All of them.
    urls: Vec<String>,
}

/// The endpoint as given, completed by what this machine knows.
///
/// A key found here is only ever sent to nodes of this machine that it belongs to.
pub(super) fn endpoint(url: Option<String>, key: Option<String>) -> Result<Endpoint, CliError> {
    let url = url.filter(|url| !url.is_empty());
    let key = key.filter(|key| !key.is_empty());
    if let (Some(url), Some(key)) = (&url, &key) {
        let (url, key) = (url.clone(), key.clone());
        return Ok(Endpoint { url, key });
    }
    let Some(local) = local() else {
        let missing = if url.is_none() {
            "API address"
        } else {
            "API key"
        };
        let err = CliError::usage(format!("no {missing} was given and no node runs here"));
        return Err(err.hint("start one with `wrenn dev up`, or give --url and --api-key"));
    };
    if key.is_none() && local.key.is_none() {
        let err = CliError::usage(format!(
            "no API key was given, and the node here, {}, keeps none",
            local.url
        ));
        return Err(
            err.hint("give --api-key; the first one lies on the host that founded the cluster")
        );
    }
    let is_ours = |url: &str| local.urls.iter().any(|ours| same_base(url, ours));
    if key.is_none() && !url.as_deref().is_none_or(is_ours) {
        let err = CliError::usage("no API key was given for that address");
        return Err(err.hint(format!("give --api-key; the node here is {}", local.url)));
    }
    Ok(Endpoint {
        url: url.unwrap_or(local.url),
        key: key.or(local.key).unwrap_or_default(),
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

/// The nodes of a development cluster, in the order of their numbers.
fn dev_nodes(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let numbered = |name: &str| name.strip_prefix("node")?.parse::<u16>().ok();
    let mut nodes: Vec<(u16, PathBuf)> = entries
        .filter_map(|entry| Some((numbered(entry.file_name().to_str()?)?, entry.path())))
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, dir)| dir).collect()
}

/// What runs on this machine: a node of the development cluster, else the system's.
fn local() -> Option<Local> {
    let dev = dev_dir().map(|dir| dev_nodes(&dir)).unwrap_or_default();
    one_of(&dev).or_else(|| one_of(&[PathBuf::from(defaults::DATA_DIR)]))
}

/// One node of a cluster whose data directories these are, a running one if there is any: a node
/// that was killed still says that it is ready. The key of one is the key of all.
fn one_of(data_dirs: &[PathBuf]) -> Option<Local> {
    let ready: Vec<Ready> = data_dirs.iter().filter_map(|dir| ready(dir)).collect();
    let first = ready.iter().find(|node| runs(node.pid)).or(ready.first())?;
    let url = first.url.clone();
    let key = data_dirs.iter().find_map(|dir| bootstrap_key(dir));
    let urls = ready.into_iter().map(|node| node.url).collect();
    Some(Local { url, key, urls })
}

/// Whether a process is there and not stopped: one that is paused would take a request and never
/// answer.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the program's name, which stands in brackets and may hold anything.
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    !matches!(state.chars().next(), None | Some('T' | 'Z' | 'X'))
}

fn same_base(one: &str, other: &str) -> bool {
    one.trim_end_matches('/') == other.trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(dir: &Path, number: u16, pid: u32) -> PathBuf {
        let dir = dir.join(format!("node{number}"));
        fs::create_dir(&dir).expect("a directory");
        let ready = format!(r#"{{"id":"n","name":"n","url":"http://{number}","pid":{pid}}}"#);
        fs::write(dir.join("ready.json"), ready).expect("a file");
        dir
    }

    #[test]
    fn a_process_that_is_paused_or_gone_is_not_asked() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("a process");
        let pid = i32::try_from(child.id()).expect("an id");
        assert!(runs(pid));
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGSTOP,
        )
        .expect("a signal");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while runs(pid) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(!runs(pid));
        child.kill().expect("an end");
        child.wait().expect("an end");
        assert!(!runs(pid));
    }

    #[test]
    fn a_running_node_is_found_with_the_key_of_its_cluster() {
        let dir = tempfile::tempdir().expect("a directory");
        // No process has this id: it is past what the kernel gives out.
        let first = node(dir.path(), 1, 1 << 30);
        fs::write(first.join("bootstrap.key"), "key\n").expect("a file");
        node(dir.path(), 10, 1 << 30);
        node(dir.path(), 2, std::process::id());
        let nodes = dev_nodes(dir.path());
        assert!(nodes[1].ends_with("node2") && nodes[2].ends_with("node10"));
        let found = one_of(&nodes).expect("an endpoint");
        assert_eq!(
            (found.url.as_str(), found.key.as_deref()),
            ("http://2", Some("key"))
        );
        assert_eq!(one_of(&nodes[..1]).expect("an endpoint").url, "http://1");
    }
}
