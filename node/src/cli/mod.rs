//! The command line: one file per noun.
//!
//! Everything but `node start` and its like, `store`, `dev` and `doctor` is a client of the public
//! interface. What those need of the node itself comes in as [`Hooks`], joined in `main.rs`. Standard output
//! carries answers only; progress and errors go to standard error. Exit codes: 0 done, 1 failed,
//! 2 wrong usage; `capsule exec` passes the command's own, and 124 when its time ran out.

mod audit;
mod capsule;
mod client;
mod cluster;
mod completions;
mod copy;
mod dev;
mod doctor;
mod error;
mod exec;
mod find;
mod fork;
mod key;
mod moves;
mod node;
mod nodes;
mod ports;
mod print;
mod recover;
mod shell;
mod snapshot;
mod socket;
mod stats;
mod store;
mod team;
mod template;
mod terminal;
mod token;

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use proto::ids::{ClusterId, NodeId};
use raft::group::Position;

use crate::cluster::recovery::Survey;
use crate::config::Config;

use client::Client;
use error::CliError;

/// The data directory, the lost, the last entry that goes on; the recovered cluster's id.
pub type RecoverHook = fn(&Path, &BTreeSet<NodeId>, Position) -> Result<ClusterId, Box<dyn Error>>;

/// What the command line needs of the rooms above it.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    /// Runs a node until it is asked to stop.
    pub run_node: fn(Config) -> Result<(), Box<dyn Error>>,
    /// Ends everything that a node with this data directory left on the host.
    pub clean_up: fn(&Path) -> Result<(), Box<dyn Error + Send + Sync>>,
    /// Looks at a stopped node's log.
    pub survey: fn(&Path) -> Result<Survey, Box<dyn Error>>,
    /// Makes a stopped node the only voter, without the lost, from the last entry that was shown.
    pub recover: RecoverHook,
    /// Boots a tiny guest and says what ran it.
    pub probe: fn(&Config) -> Result<String, Box<dyn Error>>,
    /// Runs a guest of some bytes under KVM, and says what ran it.
    pub kvm: fn(&Config) -> Result<String, Box<dyn Error>>,
    /// Tries to take over a process's page faults, and says how the memory of resumed guests comes.
    pub paging: fn() -> Result<String, Box<dyn Error>>,
}

/// Wrenn: microVM sandboxes on your own machines.
#[derive(Debug, Parser)]
#[command(name = "wrenn", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
struct Global {
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Where the API answers; found on this machine where absent.
    #[arg(long, global = true, env = "WRENN_BASE_URL", value_name = "URL")]
    url: Option<String>,
    /// The API key; the first key of a local node where absent.
    #[arg(
        long,
        global = true,
        env = "WRENN_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create and use capsules.
    #[command(subcommand)]
    Capsule(capsule::Command),
    /// Show and build templates.
    #[command(subcommand)]
    Template(template::Command),
    /// Keep capsules as they are, for others to start from.
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Run a node, and care for the nodes of the cluster.
    #[command(subcommand)]
    Node(node::Command),
    /// Let further hosts join the cluster.
    #[command(subcommand)]
    Token(token::Command),
    /// Make and revoke API keys.
    #[command(subcommand)]
    Key(key::Command),
    /// Look after teams and their members.
    #[command(subcommand)]
    Team(team::Command),
    /// Show who changed what.
    Audit(audit::Options),
    /// Show the cluster, and change its settings.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Look at the snapshots and chunks that a stopped node has on its disk.
    #[command(subcommand)]
    Store(store::Command),
    /// Check whether this machine can run a node, and fix what can be fixed safely.
    Doctor(Box<doctor::Options>),
    /// Run a cluster on this machine for development.
    #[command(subcommand)]
    Dev(dev::Command),
    /// Print the completions of a shell.
    Completions(completions::Options),
}

/// Does what the arguments say.
#[must_use]
pub fn run(hooks: Hooks) -> ExitCode {
    let cli = Cli::parse();
    match dispatch(hooks, cli) {
        Ok(code) => code,
        Err(err) => {
            print::error(&err);
            ExitCode::from(err.exit)
        }
    }
}

fn dispatch(hooks: Hooks, cli: Cli) -> Result<ExitCode, CliError> {
    let Cli { global, command } = cli;
    match command {
        Command::Completions(options) => completions::run(&options, Cli::command()),
        Command::Doctor(options) => doctor::run(hooks, &global, *options),
        Command::Node(command) => node::run(hooks, &global, command),
        Command::Store(command) => store::run(&global, &command),
        Command::Token(command) => wait_for(token::run(&global, command)),
        Command::Key(command) => wait_for(key::run(&global, command)),
        Command::Team(command) => wait_for(team::run(&global, command)),
        Command::Audit(options) => wait_for(audit::run(&global, options)),
        Command::Cluster(command) => wait_for(cluster::run(&global, command)),
        Command::Capsule(command) => wait_for(capsule::run(&global, command)),
        Command::Template(command) => wait_for(template::run(&global, command)),
        Command::Snapshot(command) => wait_for(snapshot::run(&global, command)),
        Command::Dev(command) => wait_for(dev::run(hooks, &global, command)),
    }
}

/// Runs a client's work on this thread alone.
fn wait_for(work: impl Future<Output = Result<ExitCode, CliError>>) -> Result<ExitCode, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| CliError::new(format!("start the runtime: {err}")))?;
    runtime.block_on(work)
}

impl Global {
    /// A client of the node that these options, or this machine, name.
    fn client(&self) -> Result<Client, CliError> {
        let endpoint = find::endpoint(self.url.clone(), self.api_key.clone())?;
        Client::new(&endpoint.url, &endpoint.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_has_no_contradictions() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_after_two_dashes_keeps_its_own_flags() {
        let cli = Cli::try_parse_from([
            "wrenn", "capsule", "exec", "cl-1", "--cwd", "/", "--", "ls", "--json", "-l",
        ]);
        assert!(!cli.expect("arguments").global.json);
    }
}
