//! `wrenn node`.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::error::{CliError, chain};
use super::{Global, Hooks, find, nodes, print, recover, wait_for};
use crate::cluster::join::JoinError;
use crate::config::{
    AcceleratorChoice, Cidr, Config, JoinToken, Period, Tag, VmmChoice, Written, WrittenCapacity,
    WrittenWarm,
};

/// What to do with nodes.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a node on this machine until it is asked to stop. Its capsules outlive it.
    Start(Box<Settings>),
    /// List the nodes of the cluster.
    Ls,
    /// Let a node take no new capsules. Those it has stay.
    Cordon(nodes::One),
    /// Let a node take capsules again; ends a drain as well.
    Uncordon(nodes::One),
    /// Empty a node: it takes nothing new, hands its vote over, and its capsules end.
    Drain(nodes::Drain),
    /// Take a node out of the cluster for good.
    Remove(nodes::Remove),
    /// Change a node's tags, which capsules may ask for.
    Tag(nodes::Retag),
    /// End everything a stopped node left running on this machine: capsules, VMMs, networks.
    CleanUp {
        /// Where the node keeps its state.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
    },
    /// Rebuild the cluster from this stopped node after most voters are gone for good.
    Recover(recover::Options),
    /// Show the configuration that `start` would use, as JSON.
    Config(Box<Settings>),
}

/// Ends everything a stopped node left running.
fn clean_up(hooks: Hooks, data_dir: &Path) -> Result<ExitCode, CliError> {
    // The store's own mark. Opening would make a directory where there is none, and a typing error
    // would pass for a host that is clean.
    if !data_dir.join("version").exists() {
        let err = CliError::new(format!(
            "{} is no data directory of a node",
            data_dir.display()
        ));
        return Err(err.hint("name the one that the node was started with"));
    }
    (hooks.clean_up)(data_dir).map_err(|err| CliError::new(chain(&*err)).hint(STOP_FIRST))?;
    Ok(ExitCode::SUCCESS)
}

/// What to do before a node's data is worked on.
pub(super) const STOP_FIRST: &str =
    "stop the node first: `systemctl stop wrenn`, or `wrenn dev stop I`";

/// The settings of a node. Each may also stand in a file or in the environment.
#[derive(Debug, Default, Args)]
pub(super) struct Settings {
    /// A TOML file with settings of the same names (with `_` for `-`).
    #[arg(long, value_name = "FILE", env = "WRENN_CONFIG")]
    config: Option<PathBuf>,
    /// Where the node keeps its state.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where kernel, initramfs and templates lie; `images` in the data directory where absent.
    #[arg(long, value_name = "DIR")]
    images_dir: Option<PathBuf>,
    /// What people call the node; the host name where absent.
    #[arg(long)]
    name: Option<String>,
    /// Where the API listens.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Where the node listens for peers (UDP); all addresses, port 7321, where absent.
    #[arg(long, value_name = "ADDR:PORT")]
    cluster_listen: Option<SocketAddr>,
    /// Where bulk transfers arrive (UDP); the port after --cluster-listen where absent.
    #[arg(long, value_name = "ADDR:PORT")]
    bulk_listen: Option<SocketAddr>,
    /// Where peers dial the node, if that differs; --cluster-listen where absent, and for
    /// 0.0.0.0 the address on the way to the outside.
    #[arg(long, value_name = "ADDR:PORT")]
    advertise: Option<SocketAddr>,
    /// Join the cluster that gave out this token; a member ignores it. Other users see arguments
    /// in `ps`: `@FILE` reads it from a file, and WRENN_JOIN_TOKEN takes either.
    #[arg(long, value_name = "TOKEN|@FILE")]
    join: Option<JoinToken>,
    /// What capsules may ask of their node; `zone` is what fails together. May be repeated.
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    tags: Vec<Tag>,
    /// Where clients reach the API.
    #[arg(long, value_name = "URL")]
    public_url: Option<String>,
    /// Which driver runs guests: auto, qemu, cloud-hypervisor.
    #[arg(long)]
    vmm: Option<VmmChoice>,
    /// What executes guest code: auto, kvm, tcg.
    #[arg(long)]
    accelerator: Option<AcceleratorChoice>,
    /// The QEMU program.
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
    /// The Cloud Hypervisor program.
    #[arg(long, value_name = "PROGRAM")]
    cloud_hypervisor: Option<PathBuf>,
    /// Index of this node's first network slot.
    #[arg(long, value_name = "N")]
    slot_base: Option<u16>,
    /// How many network slots, and so capsules, there can be.
    #[arg(long, value_name = "N")]
    slot_count: Option<u16>,
    /// How many slots are made in advance.
    #[arg(long, value_name = "N")]
    slot_pool: Option<u16>,
    /// A private network that capsules may reach; may be repeated.
    #[arg(long, value_name = "CIDR")]
    egress_allow: Vec<Cidr>,
    /// A network that webhooks may reach although it is not public; may be repeated.
    #[arg(long, value_name = "CIDR")]
    webhook_allow: Vec<Cidr>,
    /// Virtual processors to offer.
    #[arg(long, value_name = "N")]
    capacity_vcpus: Option<u32>,
    /// Memory to offer.
    #[arg(long, value_name = "MIB")]
    capacity_memory: Option<u32>,
    /// Disk to offer.
    #[arg(long, value_name = "MIB")]
    capacity_disk: Option<u32>,
    /// Longest a guest may take to boot, e.g. 120s.
    #[arg(long, value_name = "TIME")]
    boot_timeout: Option<Period>,
    /// How long records of ended capsules are kept, e.g. 24h.
    #[arg(long, value_name = "TIME")]
    ended_retention: Option<Period>,
    /// Whether new capsules start from a guest that had just booted, where there is one.
    #[arg(long, value_name = "true|false")]
    warm_create: Option<bool>,
    /// Leave the terminal's session; `wrenn dev` uses it.
    #[arg(long, hide = true)]
    detach: bool,
}

impl Settings {
    /// These settings, looking where a development cluster of this checkout lies unless they name
    /// another place.
    pub(super) fn or_dev_cluster(mut self) -> Self {
        let named = self.config.is_some() || self.data_dir.is_some() || self.images_dir.is_some();
        if let Some(dir) = find::dev_dir().filter(|_| !named) {
            self.images_dir = Some(dir.join("images")).filter(|images| images.is_dir());
        }
        self
    }

    /// The checked configuration these options lead to.
    pub(super) fn into_config(self) -> Result<Config, CliError> {
        let file = self.config;
        let egress_allow = Some(self.egress_allow).filter(|list| !list.is_empty());
        let webhook_allow = Some(self.webhook_allow).filter(|list| !list.is_empty());
        let tags = self.tags.into_iter().map(Tag::into_pair);
        let tags = Some(tags.collect::<BTreeMap<_, _>>()).filter(|tags| !tags.is_empty());
        let flags = Written {
            data_dir: self.data_dir,
            images_dir: self.images_dir,
            name: self.name,
            listen: self.listen,
            cluster_listen: self.cluster_listen,
            bulk_listen: self.bulk_listen,
            advertise: self.advertise,
            join: self.join,
            tags,
            public_url: self.public_url,
            vmm: self.vmm,
            accelerator: self.accelerator,
            qemu: self.qemu,
            cloud_hypervisor: self.cloud_hypervisor,
            slot_base: self.slot_base,
            slot_count: self.slot_count,
            slot_pool: self.slot_pool,
            egress_allow,
            webhook_allow,
            capacity: WrittenCapacity {
                vcpus: self.capacity_vcpus,
                memory_mib: self.capacity_memory,
                disk_mib: self.capacity_disk,
            },
            boot_timeout: self.boot_timeout,
            ended_retention: self.ended_retention,
            warm: WrittenWarm {
                create: self.warm_create,
            },
        };
        Ok(Config::load(flags, file.as_deref())?)
    }
}

/// Does it.
pub(super) fn run(hooks: Hooks, global: &Global, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Start(options) => start(hooks, *options),
        Command::Config(options) => show_config(*options),
        Command::CleanUp { data_dir } => clean_up(hooks, &data_dir),
        Command::Recover(options) => recover::run(hooks, global, &options),
        Command::Ls => wait_for(nodes::ls(global)),
        Command::Cordon(one) => wait_for(nodes::cordon(global, &one, true)),
        Command::Uncordon(one) => wait_for(nodes::cordon(global, &one, false)),
        Command::Drain(options) => wait_for(nodes::drain(global, &options)),
        Command::Remove(options) => wait_for(nodes::remove(global, &options)),
        Command::Tag(options) => wait_for(nodes::tag(global, &options)),
    }
}

/// Runs a node.
fn start(hooks: Hooks, options: Settings) -> Result<ExitCode, CliError> {
    if options.detach {
        // Fails only where the process leads its group already, which is detached enough.
        let _leads_already = nix::unistd::setsid();
    }
    let config = options.into_config()?;
    (hooks.run_node)(config)
        .map_err(|err| CliError::new(chain(err.as_ref())).hint(advice(err.as_ref())))?;
    Ok(ExitCode::SUCCESS)
}

/// What to do about a node that did not start.
fn advice(err: &(dyn Error + 'static)) -> &'static str {
    let cause = err.source().and_then(<dyn Error>::downcast_ref);
    match cause {
        Some(JoinError::Token(_) | JoinError::Refused(_)) => {
            "nothing was changed here: the same command with another token is safe"
        }
        Some(JoinError::NobodyDecides(_)) => {
            "are the members up, and do their UDP ports (7321 and 7322) pass? Trying again is safe"
        }
        None => "`wrenn doctor` checks this machine",
    }
}

/// Shows the configuration.
fn show_config(options: Settings) -> Result<ExitCode, CliError> {
    let config = options.into_config()?;
    let json = serde_json::to_value(config)
        .map_err(|err| CliError::from_error("print the configuration", &err))?;
    print::json(&json)?;
    Ok(ExitCode::SUCCESS)
}
