//! What a node remembers of its own membership, in `<data>/member.json`.
//!
//! Written before the node takes part for the first time, and read before anything else at each
//! start: with it the node knows its id and whom to ask while its state is still empty. Written again
//! when the cluster was recovered under another id. A data directory with a log and without this
//! file is that of a node that founded its own cluster.

use std::io;
use std::path::{Path, PathBuf};

use proto::ids::{ClusterId, NodeId, NodeKey};
use serde::{Deserialize, Serialize};

use crate::cluster::{Contact, Roster};
use crate::config::MEMBER_FILE;
use crate::store::durable;

/// Layout of the file.
const FORMAT: u32 = 1;

/// A node's membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Its id.
    pub(super) node: NodeId,
    /// Whom it knew of when it joined.
    pub(super) roster: Roster,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemberFileError {
    /// The disk refused.
    #[error("read or write {}", .0.display())]
    Disk(PathBuf, #[source] io::Error),
    /// It is not what this program wrote.
    #[error("{} is damaged or of another version", .0.display())]
    Damaged(PathBuf),
}

#[derive(Serialize, Deserialize)]
struct Written {
    format: u32,
    cluster: String,
    node: u64,
    index: u64,
    contacts: Vec<WrittenContact>,
    /// What the cluster was called before recoveries.
    #[serde(default)]
    former: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct WrittenContact {
    node: u64,
    key: String,
    control: String,
    bulk: String,
}

impl Member {
    /// What is remembered in the data directory `data`; `None` where nothing is.
    ///
    /// # Errors
    /// [`MemberFileError`].
    pub(super) fn load(data: &Path) -> Result<Option<Self>, MemberFileError> {
        let path = data.join(MEMBER_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(MemberFileError::Disk(path, err)),
        };
        let written: Option<Written> = serde_json::from_slice(&bytes).ok();
        written
            .filter(|written| written.format == FORMAT)
            .and_then(read)
            .map(Some)
            .ok_or(MemberFileError::Damaged(path))
    }

    /// Remembers it durably.
    ///
    /// # Errors
    /// [`MemberFileError::Disk`].
    pub(super) fn save(&self, data: &Path) -> Result<(), MemberFileError> {
        let path = data.join(MEMBER_FILE);
        let contact = |contact: &Contact| WrittenContact {
            node: contact.id.0,
            key: contact.key.to_string(),
            control: contact.control.to_string(),
            bulk: contact.bulk.to_string(),
        };
        // Hosts of one team are nobody to ask, and the file could not tell them from the others.
        let members = self.roster.nodes.values();
        let members = members.filter(|it| !self.roster.hosts.contains(&it.id));
        let written = Written {
            format: FORMAT,
            cluster: self.roster.cluster.to_string(),
            node: self.node.0,
            index: self.roster.index,
            contacts: members.map(contact).collect(),
            former: self.roster.former.iter().map(ToString::to_string).collect(),
        };
        let bytes = serde_json::to_vec_pretty(&written).unwrap_or_default();
        durable::write(&path, &bytes).map_err(|err| MemberFileError::Disk(path, err))
    }
}

fn read(written: Written) -> Option<Member> {
    let contact = |it: WrittenContact| {
        let contact = Contact {
            id: NodeId(it.node),
            key: NodeKey(hex(&it.key)?),
            control: it.control.parse().ok()?,
            bulk: it.bulk.parse().ok()?,
        };
        Some((contact.id, contact))
    };
    let nodes = written.contacts.into_iter().map(contact);
    let former = written.former.iter().map(|id| id.parse::<ClusterId>().ok());
    Some(Member {
        node: NodeId(written.node),
        roster: Roster {
            cluster: written.cluster.parse::<ClusterId>().ok()?,
            index: written.index,
            nodes: nodes.collect::<Option<_>>()?,
            former: former.collect::<Option<_>>()?,
            // The state names them, as soon as there is one.
            ..Roster::default()
        },
    })
}

fn hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 2 * bytes.len() || !text.is_ascii() {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_membership_survives_its_file_and_damage_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(Member::load(dir.path()).expect("no file").is_none());
        let contact = Contact {
            id: NodeId(4),
            key: NodeKey([0xab; 32]),
            control: "10.0.0.4:7321".parse().expect("an address"),
            bulk: "10.0.0.4:7322".parse().expect("an address"),
        };
        let member = Member {
            node: NodeId(7),
            roster: Roster {
                cluster: ClusterId([5; 16]),
                index: 6,
                nodes: [(NodeId(4), contact)].into(),
                former: vec![ClusterId([4; 16])],
                ..Roster::default()
            },
        };
        member.save(dir.path()).expect("written");
        assert_eq!(Member::load(dir.path()).expect("read"), Some(member));

        std::fs::write(dir.path().join(MEMBER_FILE), b"{\"format\":2}").expect("written");
        let read = Member::load(dir.path());
        assert!(matches!(read, Err(MemberFileError::Damaged(_))), "{read:?}");
    }

    /// Read back as full members they would be asked for the log until the state says better.
    #[test]
    fn hosts_of_one_team_are_not_remembered() {
        let dir = tempfile::tempdir().expect("a directory");
        let contact = |id: u8| Contact {
            id: NodeId(id.into()),
            key: NodeKey([id; 32]),
            control: "10.0.0.4:7321".parse().expect("an address"),
            bulk: "10.0.0.4:7322".parse().expect("an address"),
        };
        let nodes = [contact(1), contact(2)];
        let member = Member {
            node: NodeId(7),
            roster: Roster {
                nodes: nodes.map(|contact| (contact.id, contact)).into(),
                hosts: [NodeId(2)].into(),
                ..Roster::default()
            },
        };
        member.save(dir.path()).expect("written");
        let read = Member::load(dir.path()).expect("read").expect("there");
        assert!(read.roster.nodes.keys().eq([&NodeId(1)]));
    }
}
