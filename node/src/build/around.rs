//! What surrounds a step: who does it, where, and in which environment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::template::recipe::expand;

/// What a guest's environment has by itself and a template does not carry on.
const OWN: [&str; 10] = [
    "HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "HOSTNAME", "TERM", "SHLVL", "_",
];
/// How the variables begin by which the agent says which capsule this is: each has its own.
const IDENTITY: [&str; 4] = [
    "E2B_SANDBOX",
    "E2B_TEMPLATE",
    "WRENN_SANDBOX",
    "WRENN_TEMPLATE",
];

/// User, directory and environment as the steps so far have made them. Kept with each outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Around {
    /// Who does the next step.
    pub(super) user: String,
    /// The user's home.
    pub(super) home: String,
    /// The directory that was asked for; the home where none was.
    pub(super) workdir: Option<String>,
    /// The variables that were set.
    pub(super) env: BTreeMap<String, String>,
    /// The environment the guest has by itself: what variables in values may name.
    pub(super) own: BTreeMap<String, String>,
}

impl Default for Around {
    fn default() -> Self {
        Self {
            user: "root".into(),
            home: "/root".into(),
            workdir: None,
            env: BTreeMap::new(),
            own: BTreeMap::new(),
        }
    }
}

impl Around {
    /// Where the next step happens.
    pub(super) fn cwd(&self) -> &str {
        self.workdir.as_deref().unwrap_or(&self.home)
    }

    /// A path of a recipe as an absolute one.
    pub(super) fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') {
            return path.to_owned();
        }
        format!("{}/{path}", self.cwd().trim_end_matches('/'))
    }

    /// Sets a variable; its value may name others.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        let value = expand(value, |name| self.variable(name));
        self.env.insert(name.to_owned(), value);
    }

    fn variable(&self, name: &str) -> Option<String> {
        let set = self.env.get(name).cloned();
        set.or_else(|| match name {
            "HOME" => Some(self.home.clone()),
            "USER" | "LOGNAME" => Some(self.user.clone()),
            _ => self.own.get(name).cloned(),
        })
    }

    /// Becomes a user whose home is `home`.
    pub(super) fn become_user(&mut self, user: &str, home: &str) {
        user.clone_into(&mut self.user);
        home.clone_into(&mut self.home);
    }

    /// What whatever starts from the template has in its environment: all that was `seen`, but for what
    /// every guest has of its own.
    pub(super) fn carried_on(seen: BTreeMap<String, String>) -> BTreeMap<String, String> {
        let is_own = |name: &str| {
            OWN.contains(&name) || IDENTITY.iter().any(|begin| name.starts_with(begin))
        };
        seen.into_iter().filter(|(name, _)| !is_own(name)).collect()
    }
}

/// What `env -0` wrote.
pub(super) fn parse_env(written: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(written);
    let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_name_what_was_set_before_the_user_and_the_guests_own() {
        let mut around = Around {
            own: parse_env(b"PATH=/bin\0A=b=c\0rubbish\0"),
            ..Around::default()
        };
        around.set("PATH", "/opt:$PATH");
        around.set("PATH", "$HOME/bin:$PATH");
        around.set("B", "$A");
        assert_eq!(around.env["PATH"], "/root/bin:/opt:/bin");
        assert_eq!(around.env["B"], "b=c");
    }

    #[test]
    fn relative_paths_are_below_the_directory_or_the_home() {
        let mut around = Around::default();
        assert_eq!(around.absolute("a"), "/root/a");
        around.workdir = Some("/".into());
        assert_eq!(around.absolute("a"), "/a");
        assert_eq!(around.absolute("/b"), "/b");
    }

    #[test]
    fn what_every_guest_has_of_its_own_is_not_carried_on() {
        let seen = parse_env(b"HOME=/root\0WRENN_SANDBOX_ID=cl-1\0E2B_SANDBOX=true\0LANG=C\0A=\0");
        let carried: Vec<String> = Around::carried_on(seen).into_keys().collect();
        assert_eq!(carried, ["A", "LANG"]);
    }
}
