//! What the agent says of its guest's load.

use std::time::Duration;

use http::Method;
use serde::Deserialize;

use super::error::GuestError;
use super::http::Guest;
use crate::base::sample::{Inside, kib};

/// The agent's latest sample. It says more; this is what is kept.
#[derive(Debug, Deserialize)]
struct Load {
    #[serde(default)]
    mem_used: u64,
    #[serde(default)]
    mem_total: u64,
    #[serde(default)]
    mem_cache: u64,
    #[serde(default)]
    disk_used: u64,
    #[serde(default)]
    disk_total: u64,
}

impl Guest {
    /// What the agent measured last. It takes samples by itself, so this waits for nothing but the
    /// network.
    ///
    /// # Errors
    /// [`GuestError`] where no answer came within `timeout`.
    pub async fn load(&self, timeout: Duration) -> Result<Inside, GuestError> {
        let body = self.call(Method::GET, "/metrics", None, timeout).await?;
        let load: Load =
            serde_json::from_slice(&body).map_err(|err| GuestError::Nonsense(err.to_string()))?;
        Ok(Inside {
            mem_used_kib: kib(load.mem_used),
            mem_total_kib: kib(load.mem_total),
            mem_cache_kib: kib(load.mem_cache),
            disk_used_kib: kib(load.disk_used),
            disk_total_kib: kib(load.disk_total),
        })
    }
}
