//! Log set-up, and the metric names of the node.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Sandboxes by phase on this node.
pub const SANDBOXES: &str = "wrenn_sandboxes";
/// API requests by status class.
pub const REQUESTS: &str = "wrenn_api_requests_total";

/// What is shown unless `WRENN_LOG` says otherwise. openraft tells every step of its engine at
/// `info`, and at `warn` every heartbeat that a dead peer does not answer, several a second; that a
/// peer cannot be reached is said once, by the mesh.
const DEFAULT_FILTER: &str = "info,openraft=error";

/// Sends log lines to standard error; `WRENN_LOG` chooses what is shown (default `info`).
///
/// A second call does nothing, so tests may call it freely.
pub fn init() {
    let filter =
        EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let _already_set = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}
