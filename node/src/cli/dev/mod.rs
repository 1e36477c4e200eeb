//! `wrenn dev`: a cluster on this machine, one process per node.
//!
//! Everything lies in one directory: `node<i>/` is a node's data directory, `node<i>.log` what it
//! prints, `node<i>.pid` its process, `cluster.json` what `up` was told, `images/` what all nodes
//! share. Nodes run in sessions of their own and outlive this command; capsules outlive nodes,
//! until `down` ends everything.

mod cluster;
mod daemon;
mod ports;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use self::cluster::{Cluster, Node};
use super::client::Client;
use super::error::{CliError, chain};
use super::{Global, Hooks, find, print};
use crate::config::defaults;

/// What to do with the cluster.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Start the cluster; nodes that run already are left alone.
    Up(Up),
    /// Show the nodes.
    Status(Place),
    /// Print what a client needs as shell commands: eval "$(wrenn dev env)".
    Env(Env),
    /// Stop one node in order. Its capsules keep running.
    Stop(One),
    /// Start one node again.
    Start(One),
    /// Kill one node, as a crash would. Its capsules keep running.
    Kill(One),
    /// End all nodes and capsules and remove their data; images stay.
    Down(Place),
}

/// Where the cluster lies.
#[derive(Clone, Debug, Args)]
pub(super) struct Place {
    /// The cluster's directory; `.wrenn-dev` here or above where absent.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// How to start the cluster.
#[derive(Debug, Args)]
pub(super) struct Up {
    #[command(flatten)]
    place: Place,
    /// How many nodes.
    #[arg(long, default_value_t = 1)]
    nodes: u16,
    /// Port of the first node's API; each node takes ten from there.
    #[arg(long, default_value_t = defaults::LISTEN.port())]
    port_base: u16,
    /// Where kernel, initramfs and templates lie; `images` in the directory where absent.
    #[arg(long, value_name = "DIR", env = "WRENN_IMAGES")]
    images_dir: Option<PathBuf>,
    /// Further options of `wrenn node start`, after `--`.
    #[arg(last = true)]
    node_args: Vec<String>,
}

/// For which node.
#[derive(Debug, Args)]
pub(super) struct Env {
    #[command(flatten)]
    place: Place,
    /// The node whose address is printed, by its number.
    #[arg(long, default_value_t = 1)]
    node: u16,
}

/// Which node.
#[derive(Debug, Args)]
pub(super) struct One {
    /// Its number, from 1.
    node: u16,
    #[command(flatten)]
    place: Place,
}

/// Does it.
pub(super) async fn run(
    hooks: Hooks,
    global: &Global,
    command: Command,
) -> Result<ExitCode, CliError> {
    match command {
        Command::Up(options) => up(global, options).await?,
        Command::Status(place) => status(global, &place.cluster()?).await?,
        Command::Env(options) => env(global, &options)?,
        Command::Stop(one) => one.node()?.stop().await?,
        Command::Kill(one) => one.node()?.kill().await?,
        Command::Start(one) => {
            let cluster = one.place.cluster()?;
            let node = cluster.node(one.node)?;
            cluster.start(&node).await?;
        }
        Command::Down(place) => down(hooks, &place).await?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Place {
    /// The directory, whether it exists or not.
    fn dir(&self) -> Result<PathBuf, CliError> {
        let chosen = self.dir.clone().or_else(find::dev_dir);
        let dir = chosen.unwrap_or_else(|| find::DEV_DIR.into());
        std::path::absolute(&dir)
            .map_err(|err| CliError::from_error(&format!("find {}", dir.display()), &err))
    }

    /// The cluster that was started there.
    fn cluster(&self) -> Result<Cluster, CliError> {
        Cluster::load(&self.dir()?)
    }
}

impl One {
    fn node(&self) -> Result<Node, CliError> {
        self.place.cluster()?.node(self.node)
    }
}

async fn up(global: &Global, options: Up) -> Result<(), CliError> {
    if options.nodes != 1 {
        let message = format!("cannot start {} nodes", options.nodes);
        let hint = "clusters of several nodes come in a later version; use --nodes 1";
        return Err(CliError::usage(message).hint(hint));
    }
    let dir = options.place.dir()?;
    let images_dir = options.images_dir.unwrap_or_else(|| dir.join("images"));
    let mut cluster = Cluster::new(dir, options.nodes, options.port_base, options.node_args)?;
    cluster.set_images(&images_dir)?;
    for node in cluster.nodes() {
        cluster.start(&node).await?;
        cluster.remember(&node)?;
    }
    status(global, &cluster).await?;
    if !global.json {
        print::note("next: eval \"$(wrenn dev env)\"; wrenn capsule create");
    }
    Ok(())
}

async fn status(global: &Global, cluster: &Cluster) -> Result<(), CliError> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        all.push(describe(cluster, &node).await);
    }
    if global.json {
        return print::json(&json!({"nodes": all}));
    }
    let row = |(number, node): (usize, &Value)| {
        let is = |key: &str| if node[key] == true { "yes" } else { "no" }.to_owned();
        vec![
            (number + 1).to_string(),
            print::text(node, "id"),
            print::text(node, "name"),
            print::text(node, "url"),
            print::text(node, "pid"),
            print::text(node, "role"),
            is("leader"),
            is("alive"),
        ]
    };
    let rows: Vec<_> = all.iter().enumerate().map(row).collect();
    let headings = ["NR", "ID", "NAME", "URL", "PID", "ROLE", "LEADER", "ALIVE"];
    print::table(&headings, &rows)
}

/// One node as scripts see it. What a dead node was is remembered; its process is `null`.
async fn describe(cluster: &Cluster, node: &Node) -> Value {
    let alive = node.is_healthy().await;
    let ready = find::ready(&node.data_dir());
    let known = ready.as_ref().map(cluster::Known::from);
    let known = known.or_else(|| cluster.known(node)).unwrap_or_default();
    let seen = if alive {
        seen_by(node, &known.id).await
    } else {
        None
    };
    let seen = seen.unwrap_or_default();
    let pid = ready.filter(|_| alive).map(|ready| ready.pid);
    json!({
        "id": known.id,
        "name": known.name,
        "url": known.url,
        "pid": pid,
        "role": seen["role"],
        "leader": seen["leader"].as_bool().unwrap_or(false),
        "alive": alive,
    })
}

/// What a node says of itself through its API.
async fn seen_by(node: &Node, id: &str) -> Option<Value> {
    let url = find::ready(&node.data_dir())?.url;
    let key = find::bootstrap_key(&node.data_dir())?;
    let client = Client::new(&url, &key).ok()?;
    let all = client.call(Method::GET, "/v1/nodes", None).await.ok()?;
    let mut all = all.as_array()?.iter();
    all.find(|node| node["id"] == id).cloned()
}

fn env(global: &Global, options: &Env) -> Result<(), CliError> {
    let cluster = options.place.cluster()?;
    let url = |node: &Node| {
        let known = find::ready(&node.data_dir()).map(|ready| ready.url);
        known.or_else(|| cluster.known(node).map(|known| known.url))
    };
    let asked = cluster.node(options.node)?;
    // One cluster has one set of keys; the first node's first start made the first of them.
    let key = cluster
        .nodes()
        .iter()
        .find_map(|node| find::bootstrap_key(&node.data_dir()));
    let (Some(base), Some(key)) = (url(&asked), key) else {
        let err = CliError::new(format!("node {} was never ready", options.node));
        return Err(err.hint("`wrenn dev up` starts it"));
    };
    let urls: Vec<String> = cluster.nodes().iter().filter_map(url).collect();
    let values = [
        ("WRENN_BASE_URL", base),
        ("WRENN_API_KEY", key),
        ("WRENN_NODES", urls.join(",")),
    ];
    if global.json {
        let map: serde_json::Map<_, _> = values
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        return print::json(&map.into());
    }
    let lines = values.map(|(name, value)| format!("export {name}={value}\n"));
    print::out(lines.concat().as_bytes())
}

async fn down(hooks: Hooks, place: &Place) -> Result<(), CliError> {
    let dir = place.dir()?;
    let Ok(cluster) = Cluster::load(&dir) else {
        print::note(&format!("nothing was started in {}", dir.display()));
        return Ok(());
    };
    for node in cluster.nodes() {
        let name = format!("stopping node {}", node.number);
        print::progress(&name, node.stop_or_kill()).await?;
        let data_dir = node.data_dir();
        let cleaned = tokio::task::spawn_blocking(move || {
            (hooks.clean_up)(&data_dir).map_err(|err| chain(err.as_ref()))
        });
        let cleaned = print::progress("removing what it left on the host", cleaned).await;
        cleaned
            .unwrap_or_else(|err| Err(err.to_string()))
            .map_err(|why| {
                CliError::new(format!("clean up after node {}: {why}", node.number))
                    .hint("its data is kept; run this again as root")
            })?;
        node.remove()?;
    }
    cluster.remove()
}
