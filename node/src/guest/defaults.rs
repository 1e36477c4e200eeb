//! What processes in a guest are given unless they ask for something else.
//!
//! A guest that goes on where it was sealed has it in memory. One that boots has forgotten it: for those
//! it is kept in a file on the disk, which the host reads and tells the agent of.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt as _;
use http::Method;
use serde::{Deserialize, Serialize};

use super::error::GuestError;
use super::http::Guest;

/// Longest the agent may take to hear of it.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Where they are kept on a disk that guests boot from.
const FILE: &str = "/var/lib/wrenn-guest/defaults.json";
/// Largest such file: no environment that a kernel takes is larger.
const FILE_BYTES: usize = 4 << 20;

/// User, directory and environment of processes that name none. A guest keeps them when it is sealed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

    /// Keeps them on the guest's disk, for guests that boot from it.
    ///
    /// # Errors
    /// [`GuestError`] where the guest did not write them.
    pub async fn keep_defaults(&self, defaults: &Defaults) -> Result<(), GuestError> {
        let text = serde_json::json!(defaults).to_string();
        let contents = futures::stream::iter([Ok::<_, Infallible>(Bytes::from(text))]);
        let written = tokio::time::timeout(TIMEOUT, self.write_file(FILE, contents)).await;
        written.map_err(|_| GuestError::TimedOut { waited: TIMEOUT })?
    }

    /// Those that are kept on the guest's disk.
    ///
    /// # Errors
    /// [`GuestError`] where there are none, or what there is is none.
    pub async fn kept_defaults(&self) -> Result<Defaults, GuestError> {
        let read = self.read_file(FILE).await?;
        let text = read.try_fold(Vec::new(), async |mut text, part: Bytes| {
            text.extend_from_slice(&part);
            match text.len() > FILE_BYTES {
                true => Err(GuestError::Nonsense(format!("{FILE} is too long"))),
                false => Ok(text),
            }
        });
        let text = tokio::time::timeout(TIMEOUT, text).await;
        let text = text.map_err(|_| GuestError::TimedOut { waited: TIMEOUT })??;
        serde_json::from_slice(&text).map_err(|err| GuestError::Nonsense(format!("{FILE}: {err}")))
    }
}
