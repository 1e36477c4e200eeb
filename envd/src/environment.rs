//! The environment of the workload's processes. Pure.
//!
//! Later wins: search path and identity, variables of `/init`, our built-in ones, variables of the
//! request. Nothing of the agent's own environment is inherited but the search path.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use crate::users::User;

/// Search path when the agent itself has none, as process 1 usually does.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Prefixes of the built-in variables: ours, and the one that existing templates look for.
const FAMILIES: [&str; 2] = ["WRENN", "E2B"];

/// Who this sandbox is, as told by `/init`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The sandbox's id.
    pub sandbox_id: Option<String>,
    /// The id of the template it was made from.
    pub template_id: Option<String>,
}

/// Variables that every process gets.
#[derive(Clone, Debug, Default)]
pub struct Global {
    user: BTreeMap<String, String>,
    builtin: BTreeMap<String, String>,
}

impl Global {
    /// The variables that say whether this is a sandbox at all.
    #[must_use]
    pub fn new(in_guest: bool) -> Self {
        let marks = FAMILIES.map(|family| (format!("{family}_SANDBOX"), in_guest.to_string()));
        Self {
            user: BTreeMap::new(),
            builtin: marks.into(),
        }
    }

    /// Replaces the user's part and keeps the built-in one.
    pub fn replace_user(&mut self, variables: BTreeMap<String, String>) {
        self.user = variables;
    }

    /// Sets the built-in variables that carry the sandbox's identity.
    pub fn identify(&mut self, identity: &Identity) {
        for family in FAMILIES {
            for (name, value) in [
                ("SANDBOX_ID", &identity.sandbox_id),
                ("TEMPLATE_ID", &identity.template_id),
            ] {
                if let Some(value) = value {
                    self.builtin
                        .insert(format!("{family}_{name}"), value.clone());
                }
            }
        }
    }

    /// Tells processes where the host's events are.
    pub fn set_events(&mut self, address: IpAddr) {
        let address = match address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        let url = format!("http://{address}");
        self.builtin.insert("E2B_EVENTS_ADDRESS".to_owned(), url);
    }

    /// All global variables.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, String> {
        let mut all = self.user.clone();
        all.extend(self.builtin.clone());
        all
    }

    /// The whole environment of one process.
    #[must_use]
    pub fn for_process(
        &self,
        path: &str,
        user: &User,
        request: &HashMap<String, String>,
    ) -> BTreeMap<String, String> {
        let mut env = BTreeMap::from([
            ("PATH".to_owned(), path.to_owned()),
            ("HOME".to_owned(), user.home.to_string_lossy().into_owned()),
            ("USER".to_owned(), user.name.clone()),
            ("LOGNAME".to_owned(), user.name.clone()),
        ]);
        env.extend(self.all());
        env.extend(
            request
                .iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        // Such a name cannot be expressed in an environment block.
        env.retain(|name, _| !name.is_empty() && !name.contains('='));
        env
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users::Accounts;

    fn env(global: &Global, request: &[(&str, &str)]) -> BTreeMap<String, String> {
        let user = Accounts::from_text("u:x:5:5::/h:", "")
            .user("u")
            .expect("listed");
        let request = request
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        global.for_process("/bin", &user, &request)
    }

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect()
    }

    #[test]
    fn request_wins_over_global_and_global_over_identity() {
        let mut global = Global::new(true);
        global.replace_user(variables(&[
            ("HOME", "/g"),
            ("A", "global"),
            ("B", "global"),
        ]));
        let env = env(&global, &[("A", "request")]);
        assert_eq!(
            (env["A"].as_str(), env["B"].as_str(), env["HOME"].as_str()),
            ("request", "global", "/g")
        );
        assert_eq!((env["USER"].as_str(), env["PATH"].as_str()), ("u", "/bin"));
    }

    #[test]
    fn replacing_the_users_part_keeps_the_builtin_one() {
        let mut global = Global::new(true);
        let identity = Identity {
            sandbox_id: Some("s1".into()),
            template_id: None,
        };
        global.identify(&identity);
        global.replace_user(variables(&[("OLD", "1")]));
        global.replace_user(variables(&[("NEW", "1"), ("WRENN_SANDBOX", "forged")]));
        let all = global.all();
        assert!(!all.contains_key("OLD"));
        assert_eq!(
            (all["NEW"].as_str(), all["WRENN_SANDBOX"].as_str()),
            ("1", "true")
        );
        assert_eq!(
            (
                all["WRENN_SANDBOX_ID"].as_str(),
                all["E2B_SANDBOX_ID"].as_str()
            ),
            ("s1", "s1")
        );
    }

    #[test]
    fn names_that_no_environment_can_hold_are_left_out() {
        let env = env(&Global::new(false), &[("", "x"), ("a=b", "x")]);
        assert!(!env.contains_key("") && !env.contains_key("a=b"));
    }
}
