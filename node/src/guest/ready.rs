//! From a booting guest to one that may work: wait for its agent, then hand over what only the
//! host knows (token, clock, entropy, identity).

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use tokio::time::{self, Instant};

use super::error::GuestError;
use super::http::Guest;

/// Pause between two health polls of a booting guest. A poll costs the guest well below a
/// millisecond, and this bounds what polling adds to a cold create.
const POLL_INTERVAL: Duration = Duration::from_millis(25);
/// Longest one health poll may take; a guest whose network is not up drops the SYN.
const POLL_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest the setup call may take.
const SETUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of fresh entropy given to each guest: the size of the kernel's seed.
const ENTROPY_BYTES: usize = 32;

/// What the agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Health {
    /// The agent's version.
    pub version: String,
}

/// What a fresh guest is told before its workload runs.
#[derive(Clone)]
pub struct AgentSetup {
    /// From now on required of every caller.
    pub token: String,
    /// The capsule's public id.
    pub sandbox_id: String,
    /// The name of its template.
    pub template: String,
    /// The host name it goes by, where that is to change.
    pub hostname: Option<String>,
    /// Who runs processes that name nobody, where that is to change.
    pub default_user: Option<String>,
}

impl fmt::Debug for AgentSetup {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentSetup")
            .field("sandbox_id", &self.sandbox_id)
            .finish_non_exhaustive()
    }
}

impl Guest {
    /// Asks the agent for a sign of life.
    ///
    /// # Errors
    /// [`GuestError`] where none came within `timeout`.
    pub async fn health(&self, timeout: Duration) -> Result<Health, GuestError> {
        let body = self.call(Method::GET, "/health", None, timeout).await?;
        serde_json::from_slice(&body).map_err(|err| GuestError::Nonsense(err.to_string()))
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// The last failure, once `deadline` has passed.
    pub async fn wait_ready(&self, deadline: Instant) -> Result<Health, GuestError> {
        loop {
            match self.health(POLL_TIMEOUT).await {
                Ok(health) => return Ok(health),
                Err(err) if Instant::now() + POLL_INTERVAL >= deadline => return Err(err),
                Err(_) => time::sleep(POLL_INTERVAL).await,
            }
        }
    }

    /// Gives the agent its token, the time, fresh entropy and its identity. Repeating it is safe.
    ///
    /// # Errors
    /// [`GuestError`] where the agent did not confirm; the guest must then not be used.
    pub async fn set_up(&self, setup: &AgentSetup) -> Result<(), GuestError> {
        let entropy: [u8; ENTROPY_BYTES] = rand::random();
        let json = serde_json::json!({
            "accessToken": setup.token,
            "timestamp": jiff::Timestamp::now().to_string(),
            "defaultUser": setup.default_user,
            "sandbox_id": setup.sandbox_id,
            "template_id": setup.template,
            "entropy": STANDARD.encode(entropy),
            "hostname": setup.hostname,
        });
        let body = json.to_string().into_bytes();
        self.call(Method::POST, "/init", Some(body), SETUP_TIMEOUT)
            .await?;
        Ok(())
    }
}
