//! Who the guest's users are, read from `/etc/passwd` and `/etc/group` by our own parser.
//!
//! The agent is linked statically, so the C library's name services are out of reach; the two
//! files are what container images have anyway. They are read anew at each question: the workload
//! may add users at any time, and the files are small.

use std::fs;
use std::path::{Path, PathBuf};

/// One account with the groups it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Home directory.
    pub home: PathBuf,
    /// All groups, the primary one first.
    pub groups: Vec<u32>,
}

/// No account has the name.
#[derive(Debug, thiserror::Error)]
#[error("invalid username: '{name}'")]
pub struct UnknownUser {
    name: String,
}

/// The two files as they are now.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads `/etc/passwd` and `/etc/group`; a missing file counts as empty.
    #[must_use]
    pub fn read() -> Self {
        Self {
            passwd: read_lossy("/etc/passwd"),
            group: read_lossy("/etc/group"),
        }
    }

    /// Accounts from the text of the two files.
    #[must_use]
    pub fn from_text(passwd: &str, group: &str) -> Self {
        Self {
            passwd: passwd.to_owned(),
            group: group.to_owned(),
        }
    }

    /// The account called `name`. Root exists even where the file does not.
    ///
    /// # Errors
    /// [`UnknownUser`] when no line has the name.
    pub fn user(&self, name: &str) -> Result<User, UnknownUser> {
        let line = self
            .passwd
            .lines()
            .filter_map(PasswdLine::parse)
            .find(|line| line.name == name);
        let line = match (line, name) {
            (Some(line), _) => line,
            (None, "root") => PasswdLine {
                name,
                uid: 0,
                gid: 0,
                home: "/root",
            },
            (None, _) => {
                return Err(UnknownUser {
                    name: name.to_owned(),
                });
            }
        };
        let mut groups = vec![line.gid];
        for group in self.groups().filter(|group| group.has_member(name)) {
            if !groups.contains(&group.gid) {
                groups.push(group.gid);
            }
        }
        let home = PathBuf::from(if line.home.is_empty() { "/" } else { line.home });
        Ok(User {
            name: name.to_owned(),
            uid: line.uid,
            gid: line.gid,
            home,
            groups,
        })
    }

    /// The name of a user id; the number itself when nobody has it.
    #[must_use]
    pub fn user_name(&self, uid: u32) -> String {
        let mut lines = self.passwd.lines().filter_map(PasswdLine::parse);
        lines
            .find(|line| line.uid == uid)
            .map_or_else(|| uid.to_string(), |line| line.name.into())
    }

    /// The name of a group id; the number itself when there is no such group.
    #[must_use]
    pub fn group_name(&self, gid: u32) -> String {
        let group = self.groups().find(|group| group.gid == gid);
        group.map_or_else(|| gid.to_string(), |group| group.name.into())
    }

    fn groups(&self) -> impl Iterator<Item = GroupLine<'_>> {
        self.group.lines().filter_map(GroupLine::parse)
    }
}

fn read_lossy(path: impl AsRef<Path>) -> String {
    fs::read(path).map_or_else(
        |_| String::new(),
        |text| String::from_utf8_lossy(&text).into(),
    )
}

/// `name:password:uid:gid:gecos:home:shell`
struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> PasswdLine<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self {
            name,
            uid,
            gid,
            home: fields.nth(1).unwrap_or_default(),
        })
    }
}

/// `name:password:gid:member,member`
struct GroupLine<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> GroupLine<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Self {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    }

    fn has_member(&self, name: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # a comment:x:7:7::/:\n\
        broken line\n\
        user:x:1000:1000::/home/elsewhere:/bin/bash\n\
        homeless:x:12:12:::\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:user\nempty:x:5\n";

    #[test]
    fn home_and_groups_come_from_the_files() {
        let user = Accounts::from_text(PASSWD, GROUP)
            .user("user")
            .expect("listed");
        assert_eq!((user.uid, user.gid), (1000, 1000));
        assert_eq!(user.home, Path::new("/home/elsewhere"));
        assert_eq!(user.groups, [1000, 27]);
    }

    #[test]
    fn unknown_user_is_named_in_the_refusal() {
        let refusal = Accounts::from_text(PASSWD, GROUP)
            .user("root123")
            .expect_err("not listed");
        assert_eq!(refusal.to_string(), "invalid username: 'root123'");
    }

    #[test]
    fn root_exists_without_any_file_and_nobody_else_does() {
        let accounts = Accounts::default();
        assert_eq!(
            accounts.user("root").expect("root").home,
            Path::new("/root")
        );
        assert!(accounts.user("").is_err());
    }

    #[test]
    fn ids_without_a_name_are_shown_as_numbers() {
        let accounts = Accounts::from_text(PASSWD, GROUP);
        assert_eq!(
            (accounts.user_name(1000), accounts.user_name(4)),
            ("user".into(), "4".into())
        );
        assert_eq!(
            (accounts.group_name(27), accounts.group_name(4)),
            ("sudo".into(), "4".into())
        );
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_panic(passwd in ".{0,200}", group in ".{0,200}", name in ".{0,9}") {
            let accounts = Accounts::from_text(&passwd, &group);
            let _ = accounts.user(&name);
            let _ = accounts.user_name(0);
        }

        #[test]
        fn a_written_account_is_read_back(name in "[a-z_][a-z0-9_-]{0,15}", uid: u32, gid: u32) {
            let passwd = format!("first:x:1:1::/:\n{name}:x:{uid}:{gid}:a b c:/home/{name}:/bin/sh");
            let user = Accounts::from_text(&passwd, "").user(&name).expect("written above");
            if name != "first" {
                prop_assert_eq!((user.uid, user.gid), (uid, gid));
            }
        }
    }
}
