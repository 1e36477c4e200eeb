//! The `wrenn` binary: arguments in, exit code out.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use wrenn_node::base::telemetry;
use wrenn_node::cli::{self, Hooks};
use wrenn_node::config::Config;
use wrenn_node::wiring;

/// Threads of the daemon's runtime. Its work is short and mostly waiting; two keep it answering
/// while one of them is busy, and every further one costs memory that capsules could have.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    // A shim is small and single-threaded: it starts before arguments are parsed or a runtime is
    // built. (`wrenn shim …` joins here.)
    cli::run(Hooks {
        run_node,
        clean_up,
        probe,
    })
}

fn run_node(config: Config) -> Result<(), Box<dyn Error>> {
    telemetry::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()?;
    runtime.block_on(wiring::run(config))?;
    Ok(())
}

fn clean_up(data_dir: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    Ok(wiring::clean_up(data_dir)?)
}

/// Boots a tiny guest; joined to the driver's own probe with the driver.
fn probe(_: &Config) -> Result<String, Box<dyn Error>> {
    Err("the driver's probe is not joined yet".into())
}
