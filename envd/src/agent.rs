//! The agent's state: what `/init` has told it, and what it runs.
//!
//! One value, made in `main`, shared by every handler. The settings change only in `/init`; each
//! reader takes a copy of what it needs and holds no lock while it works.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::{Mutex, mpsc};

use crate::auth::{PublishedHash, Token};
use crate::boot::cgroup::Groups;
use crate::environment::{DEFAULT_PATH, Global};
use crate::metrics::Meter;
use crate::paths::Base;
use crate::process::reap::{Reaper, Scope};
use crate::process::registry::Registry;
use crate::snapshot::Snapshots;
use crate::snapshot::machine::{Elsewhere, Guest, Machine};
use crate::users::{Accounts, UnknownUser, User};
use crate::watch::polled::Polled;

/// The user of requests that name none, until `/init` says otherwise.
const DEFAULT_USER: &str = "root";

/// What `/init` may change.
#[derive(Debug)]
pub struct Settings {
    /// The access token, if one is set.
    pub token: Option<Token>,
    /// Variables of every process.
    pub global: Global,
    /// The user of requests that name none.
    pub default_user: String,
    /// Where relative paths start, if not in the user's home.
    pub default_workdir: Option<PathBuf>,
}

/// How the agent was started.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// Whether this is a guest of ours: its clock, name and entropy may be set.
    pub in_guest: bool,
    /// Where to ask for a poweroff; only process 1 can do it.
    pub power: Option<mpsc::Sender<()>>,
    /// Where processes are placed.
    pub groups: Groups,
}

/// Everything the handlers share.
pub struct Agent {
    settings: RwLock<Settings>,
    /// Held by the one `/init` that is being applied; the newest applied time stamp is inside.
    pub init: Mutex<Option<jiff::Timestamp>>,
    /// The processes.
    pub processes: Arc<Registry>,
    /// Watched directories that are asked for by name.
    pub watchers: Polled,
    /// Measures the guest's load.
    pub meter: Arc<Meter>,
    /// Where the agent stands between a pause and its resume.
    pub snapshots: Snapshots,
    /// How the agent was started.
    pub surroundings: Surroundings,
    /// Where a token's hash may be published.
    pub published: Option<Box<dyn PublishedHash>>,
    path: String,
}

impl Agent {
    /// An agent with default settings.
    #[must_use]
    pub fn new(surroundings: Surroundings) -> Self {
        let machine: Arc<dyn Machine> = if surroundings.in_guest {
            Arc::new(Guest)
        } else {
            Arc::new(Elsewhere)
        };
        Self::on(machine, surroundings)
    }

    /// An agent that changes `machine` where a snapshot asks for it.
    #[must_use]
    pub fn on(machine: Arc<dyn Machine>, surroundings: Surroundings) -> Self {
        let scope = if std::process::id() == 1 {
            Scope::Everyone
        } else {
            Scope::Own
        };
        let settings = Settings {
            token: None,
            global: Global::new(surroundings.in_guest),
            default_user: DEFAULT_USER.to_owned(),
            default_workdir: None,
        };
        Self {
            settings: RwLock::new(settings),
            init: Mutex::default(),
            processes: Arc::new(Registry::new(Arc::new(Reaper::new(scope)))),
            watchers: Polled::default(),
            meter: Arc::default(),
            snapshots: Snapshots::new(machine, surroundings.groups.clone()),
            surroundings,
            published: None,
            path: std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned()),
        }
    }

    /// The settings as they are now.
    pub fn settings(&self) -> RwLockReadGuard<'_, Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings, to be changed.
    pub fn settings_mut(&self) -> RwLockWriteGuard<'_, Settings> {
        self.settings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The search path that processes inherit.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The account called `name`, or the default one.
    ///
    /// # Errors
    /// [`UnknownUser`] when there is no such account.
    pub fn user(&self, name: Option<&str>) -> Result<User, UnknownUser> {
        let name = match name {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => self.settings().default_user.clone(),
        };
        Accounts::read().user(&name)
    }

    /// Makes a path of a request absolute for `user`.
    ///
    /// # Errors
    /// [`crate::paths::ResolvePathError`] names what is wrong with it.
    pub fn resolve(
        &self,
        user: &User,
        path: &str,
    ) -> Result<PathBuf, crate::paths::ResolvePathError> {
        let settings = self.settings();
        Base {
            home: &user.home,
            workdir: settings.default_workdir.as_deref(),
        }
        .resolve(path)
    }
}
