//! `wrenn dev`: a cluster on this machine, one process per node.
//!
//! Everything lies in one directory: `node<i>/` is a node's data directory, `node<i>.log` what it
//! prints, `node<i>.pid` its process, `cluster.json` what `up` was told, `images/` what all nodes
//! share. Nodes run in sessions of their own and outlive this command; capsules outlive nodes,
//! until `down` ends everything. The first node founds the cluster, the others join it with tokens.
//! Node i has the ports from `port_base + 10 (i - 1)` on: the API, the cluster, bulk transfers.

mod cluster;
mod daemon;
mod partition;
mod ports;
mod seen;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use futures::future;
use serde_json::{Value, json};

use self::cluster::{Cluster, Node, Wanted};
use self::seen::Seen;
use super::error::{CliError, chain};
use super::{Global, Hooks, find, print};

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
    /// Pause one node's process, as a machine that hangs. Its capsules keep running.
    Pause(One),
    /// Let a paused node go on.
    Resume(One),
    /// Cut nodes off from each other: packets of the cluster between sides are lost. Needs root.
    Partition(Partition),
    /// End a partition. Needs root.
    Heal(Place),
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
    /// How many nodes; as many as before where absent, and 1 at first.
    #[arg(long)]
    nodes: Option<u16>,
    /// Port of the first node's API, 7320 where absent; each node takes ten from there.
    #[arg(long, value_name = "PORT")]
    port_base: Option<u16>,
    /// First network slot, 0 where absent; each node takes 64 from there. Clusters on one machine
    /// need ranges of their own.
    #[arg(long, value_name = "N")]
    slot_base: Option<u16>,
    /// Where kernel, initramfs and templates lie; as before where absent, and `images` in the
    /// directory at first.
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

/// Who is cut off from whom.
#[derive(Debug, Args)]
pub(super) struct Partition {
    /// Sides between `|`, nodes between commas: "1|2,3". Nodes that are not named form one more
    /// side together.
    sides: String,
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
        Command::Status(place) => {
            status(global, &place.cluster()?).await?;
        }
        Command::Env(options) => env(global, &options)?,
        Command::Stop(one) => {
            let node = one.node()?;
            print::progress(&format!("stopping node {}", node.number), node.stop()).await?;
        }
        Command::Kill(one) => one.node()?.kill().await?,
        Command::Pause(one) => one.node()?.pause()?,
        Command::Resume(one) => one.node()?.resume()?,
        Command::Start(one) => {
            let mut cluster = one.place.cluster()?;
            let node = [cluster.node(one.node)?];
            let joins = cluster.must_join(&node[0]);
            up::bring_up(&mut cluster, &node).await?;
            // A member may have been started to stay alone: its peers need not be there.
            if joins {
                up::wait_members(&cluster, &node).await?;
            }
        }
        Command::Partition(options) => cut(&options)?,
        Command::Heal(place) => heal(&mut place.cluster()?)?,
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
    let dir = options.place.dir()?;
    let wanted = Wanted {
        nodes: options.nodes,
        port_base: options.port_base,
        slot_base: options.slot_base,
        node_args: options.node_args,
    };
    let mut cluster = Cluster::new(dir, wanted)?;
    cluster.set_images(options.images_dir.as_deref())?;
    let nodes = cluster.nodes();
    up::bring_up(&mut cluster, &nodes).await?;
    if nodes.len() > 1 && cluster.partition().is_none() {
        up::wait_members(&cluster, &nodes).await?;
        up::wait_voters(&cluster, &nodes).await;
    }
    let looked = status(global, &cluster).await?;
    if !global.json {
        if looked.voters() < up::enough_voters(&nodes) {
            print::note(
                "not enough vote yet for the loss of a node; `wrenn dev status` shows when",
            );
        }
        print::note("next: eval \"$(wrenn dev env)\"; wrenn capsule create");
    }
    Ok(())
}

async fn status(global: &Global, cluster: &Cluster) -> Result<Seen, CliError> {
    let looked = print::progress("asking the nodes", Seen::look(cluster)).await;
    let nodes = cluster.nodes();
    let described = nodes.iter().map(|node| describe(cluster, &looked, node));
    let all: Vec<Value> = described.collect();
    if global.json {
        let (quorum, partition) = (looked.has_quorum, cluster.partition());
        print::json(&json!({"nodes": all, "quorum": quorum, "partition": partition}))?;
        return Ok(looked);
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
            print::text(node, "state"),
            is("alive"),
        ]
    };
    let rows: Vec<_> = all.iter().enumerate().map(row).collect();
    let headings = [
        "NR", "ID", "NAME", "URL", "PID", "ROLE", "LEADER", "STATE", "ALIVE",
    ];
    print::table(&headings, &rows)?;
    if let Some(sides) = cluster.partition() {
        print::note(&format!("partition: {sides} (`wrenn dev heal` ends it)"));
    }
    Ok(looked)
}

/// One node as scripts see it. What a dead node was is remembered; its process is `null`.
fn describe(cluster: &Cluster, looked: &Seen, node: &Node) -> Value {
    let known = seen::now_known(cluster, node).unwrap_or_default();
    let told = looked.member(&known.id).cloned().unwrap_or_default();
    let alive = looked.is_alive(node);
    let state = match told["state"].as_str() {
        _ if node.is_paused() => "paused".into(),
        Some(state) => state.to_owned(),
        None => String::new(),
    };
    json!({
        "id": known.id,
        "name": known.name,
        "url": known.url,
        "pid": node.pid().map(nix::unistd::Pid::as_raw),
        "role": told["role"],
        "leader": told["leader"].as_bool().unwrap_or(false),
        "state": state,
        "alive": alive,
    })
}

fn cut(options: &Partition) -> Result<(), CliError> {
    let mut cluster = options.place.cluster()?;
    let sides = cluster.sides(&options.sides)?;
    partition::cut(&sides, cluster.port_base(), |node| cluster.port(node))?;
    cluster.set_partition(Some(&sides))?;
    print::note(&format!("cut: {sides}; `wrenn dev heal` ends it"));
    Ok(())
}

fn heal(cluster: &mut Cluster) -> Result<(), CliError> {
    partition::heal(cluster.port_base())?;
    cluster.set_partition(None)
}

fn env(global: &Global, options: &Env) -> Result<(), CliError> {
    let cluster = options.place.cluster()?;
    let url = |node: &Node| {
        let known = find::ready(&node.data_dir()).map(|ready| ready.url);
        known.or_else(|| cluster.known(node).map(|known| known.url))
    };
    let asked = cluster.node(options.node)?;
    let key = seen::key(&cluster);
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
    let Ok(mut cluster) = Cluster::load(&dir) else {
        print::note(&format!("nothing was started in {}", dir.display()));
        return Ok(());
    };
    if cluster.partition().is_some() {
        heal(&mut cluster)?;
    }
    let nodes = cluster.nodes();
    let label = match nodes.len() {
        1 => "stopping node 1".into(),
        count => format!("stopping {count} nodes"),
    };
    let stopped = future::join_all(nodes.iter().map(Node::stop_or_kill));
    for outcome in print::progress(&label, stopped).await {
        outcome?;
    }
    for node in &nodes {
        clean_up(hooks, node).await?;
        node.remove()?;
    }
    cluster.remove()
}

/// Ends what a stopped node left running.
async fn clean_up(hooks: Hooks, node: &Node) -> Result<(), CliError> {
    let data_dir = node.data_dir();
    let cleaned = tokio::task::spawn_blocking(move || {
        (hooks.clean_up)(&data_dir).map_err(|err| chain(err.as_ref()))
    });
    let label = format!("removing what node {} left on the host", node.number);
    let cleaned = print::progress(&label, cleaned).await;
    cleaned
        .unwrap_or_else(|err| Err(err.to_string()))
        .map_err(|why| {
            CliError::new(format!("clean up after node {}: {why}", node.number))
                .hint("its data is kept; run this again as root")
        })
}
