//! Starts the agent: as the guest's first process, or by hand for tests.
//!
//! As process 1 everything that changes mounts and roots happens before the runtime exists, while
//! there is a single thread. Then both cases are the same: listen, serve, wait for a reason to
//! stop. Process 1 must never return; its way out is [`envd::boot::power`].

#![deny(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use envd::agent::{Agent, Surroundings};
use envd::boot::cgroup::Groups;
use envd::boot::{self, power};
use envd::log::chain;
use envd::ports::{self, Outside};
use envd::{http, log, serve};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The agent inside the guest.
#[derive(Debug, Parser)]
#[command(name = "envd", version = proto::version::ENVD)]
struct Args {
    /// TCP port to serve on.
    #[arg(long, default_value_t = boot::PORT)]
    port: u16,
    /// Print the commit this was built from, and exit.
    #[arg(long)]
    commit: bool,
    /// A shell line to run at start.
    #[arg(long)]
    cmd: Option<String>,
    /// Where the cgroup file system is.
    #[arg(long, default_value = boot::cgroup::ROOT)]
    cgroup_root: PathBuf,
    /// Not in a guest: serve on loopback only, touch neither clock nor host name nor cgroups.
    #[arg(long)]
    isnotfc: bool,
    /// Forward from this address to what listens on the loopback only; in a guest, its own.
    #[arg(long)]
    forward_on: Option<Ipv4Addr>,
}

fn main() -> ExitCode {
    let began = Instant::now();
    let first = std::process::id() == 1;
    let args = if first {
        let options = boot::enter();
        // The kernel passes words of its command line that it does not know; they are not ours.
        Args {
            forward_on: Some(options.address),
            ..Args::parse_from(["envd"])
        }
    } else {
        Args::parse()
    };
    if args.commit {
        println!("{}", option_env!("WRENN_COMMIT").unwrap_or("unknown"));
        return ExitCode::SUCCESS;
    }
    let outcome = run(&args, first, began);
    if first {
        // Whatever happened, process 1 must not return.
        if let Err(err) = &outcome {
            log!("{}", chain(err));
        }
        power::off();
    }
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            log!("{}", chain(&err));
            ExitCode::FAILURE
        }
    }
}

/// Two workers: one may be held up by a large encoding while the other answers health checks.
const WORKER_THREADS: usize = 2;
/// How long file operations under way may take to end when the agent stops.
const BLOCKED_TIMEOUT: Duration = Duration::from_secs(1);
/// File operations that may block at once.
const BLOCKING_THREADS: usize = 32;

fn run(args: &Args, first: bool, began: Instant) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(agent_main(args, first, began));
    // A file operation stuck on a dead disk must not keep the guest from going down.
    runtime.shutdown_timeout(BLOCKED_TIMEOUT);
    outcome
}

/// What is done besides answering. The agent is of use without any of it.
fn start_duties(args: &Args, agent: &Agent, port: u16) {
    if let Err(err) = agent.meter.start() {
        log!("start the sampling of metrics: {err}");
    }
    let Some(address) = args.forward_on else {
        return;
    };
    let outside = Outside {
        address,
        except: port,
    };
    let connections = Arc::clone(&agent.snapshots.connections);
    if let Err(err) = ports::start(outside, connections) {
        log!("start the forwarding of ports: {err}");
    }
}

async fn agent_main(args: &Args, first: bool, began: Instant) -> std::io::Result<()> {
    let (power_sender, mut power_asked) = mpsc::channel(1);
    let groups = if args.isnotfc {
        Groups::none()
    } else {
        Groups::create(&args.cgroup_root)
    };
    let agent = Arc::new(Agent::new(Surroundings {
        in_guest: !args.isnotfc,
        power: first.then_some(power_sender),
        groups,
    }));
    tokio::spawn(agent.processes.reaper().clone().listen()?);
    let host = if args.isnotfc {
        Ipv4Addr::LOCALHOST
    } else {
        Ipv4Addr::UNSPECIFIED
    };
    let listener = serve::listen(SocketAddr::new(IpAddr::V4(host), args.port)).await?;
    let address = listener.local_addr()?;
    log!(
        "version {} ready after {} ms, listening on {address}",
        proto::version::ENVD,
        began.elapsed().as_millis()
    );
    start_duties(args, &agent, address.port());
    if let Some(line) = &args.cmd {
        boot::command::start(&agent, line);
    }

    let stop = CancellationToken::new();
    let connections = Arc::clone(&agent.snapshots.connections);
    let router = http::router(agent.clone());
    let serving = tokio::spawn(serve::run_known(
        listener,
        router,
        connections,
        stop.clone(),
    ));
    let mut signals = power::Signals::listen()?;
    tokio::select! {
        name = signals.recv() => log!("{name} received, stopping"),
        Some(()) = power_asked.recv() => log!("poweroff asked for"),
    }
    agent.snapshots.release();
    stop.cancel();
    serving.await.map_err(std::io::Error::other)
}
