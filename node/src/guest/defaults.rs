//! What processes in a guest are given unless they ask for something else.

use std::collections::BTreeMap;
use std::time::Duration;

use http::Method;

use super::error::GuestError;
use super::http::Guest;

/// Longest the agent may take to hear of it.
const TIMEOUT: Duration = Duration::from_secs(10);

/// User, directory and environment of processes that name none. A guest keeps them when it is sealed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// Who runs them.
    pub user: String,
    /// Where; the user's home where absent.
    pub workdir: Option<String>,
    /// Their environment.
    pub env: BTreeMap<String, String>,
}

impl Guest {
    /// Tells the agent of new defaults. Repeating it is safe.
    ///
    /// # Errors
    /// [`GuestError`] where the agent did not confirm.
    pub async fn set_defaults(&self, defaults: &Defaults) -> Result<(), GuestError> {
        let json = serde_json::json!({
            "accessToken": self.access_token(),
            "defaultUser": defaults.user,
            "defaultWorkdir": defaults.workdir.as_deref().unwrap_or_default(),
            "envVars": defaults.env,
        });
        let body = json.to_string().into_bytes();
        self.call(Method::POST, "/init", Some(body), TIMEOUT)
            .await?;
        Ok(())
    }
}
