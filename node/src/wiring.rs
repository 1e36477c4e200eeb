//! Builds the rooms, joins them, starts them, and stops them in reverse.

use std::path::Path;

use crate::config::Config;

/// Why a node could not start, or stopped by itself.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RunError {}

/// Runs a node until it is asked to stop (SIGTERM, SIGINT). Capsules keep running without it.
pub async fn run(_config: Config) -> Result<(), RunError> {
    Ok(())
}

/// Ends everything that a node with this data directory left running on the host: capsules, their
/// shims and VMMs, namespaces, links, rules. The node itself must not run.
pub fn clean_up(_data_dir: &Path) -> Result<(), RunError> {
    Ok(())
}
