//! The `wrenn` binary: arguments in, exit code out.

use std::error::Error;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use tokio::runtime::{Builder, Runtime};
use wrenn_node::base::telemetry;
use wrenn_node::cli::{self, Hooks};
use wrenn_node::config::Config;
use wrenn_node::{pager, shim, wiring};

/// Threads of the daemon's runtime. Its work is short and mostly waiting; two keep it answering
/// while one of them is busy, and every further one costs memory that capsules could have.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // A shim and its pager are small and start single-threaded: before arguments are parsed or a
    // runtime is built.
    if let Some((first, rest)) = arguments.split_first() {
        if first == shim::main::COMMAND {
            return shim::main::main(rest);
        }
        if first == pager::main::COMMAND {
            return pager::main::main(rest);
        }
    }
    cli::run(Hooks {
        run_node,
        clean_up,
        survey: |dir| Ok(wiring::recover::survey(dir)?),
        recover: |dir, lost, last| Ok(wiring::recover::recover(dir, lost, last)?),
        probe,
        kvm: |config| Ok(wiring::prove_kvm(config)?),
        paging: || Ok(wiring::probe_paging()?),
    })
}

fn run_node(config: Config) -> Result<(), Box<dyn Error>> {
    telemetry::init();
    runtime()?.block_on(wiring::run(config))?;
    Ok(())
}

fn clean_up(data_dir: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    // On a thread of its own, since the caller may be inside a runtime.
    std::thread::scope(|scope| {
        let cleaning = scope.spawn(|| {
            runtime()?.block_on(wiring::clean_up(data_dir))?;
            Ok(())
        });
        cleaning
            .join()
            .unwrap_or_else(|_| Err("the clean-up broke".into()))
    })
}

/// Boots a tiny guest and says what ran it.
fn probe(config: &Config) -> Result<String, Box<dyn Error>> {
    Ok(wiring::probe_accelerator(config)?)
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
}
