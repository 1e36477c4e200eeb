//! Another root file system in the place of the one a guest has started from.

use std::time::Duration;

use http::Method;

use super::error::GuestError;
use super::http::Guest;

/// Longest it may take: the old one is removed, file by file, on an emulated disk.
const TIMEOUT: Duration = Duration::from_secs(300);

impl Guest {
    /// Has what lies in `root` below `directory` take the place of everything on the root disk; all
    /// processes end. The agent goes on as if the guest had started from it. `directory` is removed.
    ///
    /// # Errors
    /// [`GuestError`]: the agent refused. Where it had begun, the guest is of no more use.
    pub async fn adopt_root(&self, directory: &str) -> Result<(), GuestError> {
        let body = serde_json::json!({ "directory": directory });
        let body = body.to_string().into_bytes();
        self.call(Method::POST, "/root/adopt", Some(body), TIMEOUT)
            .await?;
        Ok(())
    }
}
