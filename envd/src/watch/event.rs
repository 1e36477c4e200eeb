//! What an event of the kernel comes to. Pure.

use std::path::{Path, PathBuf};

use nix::sys::inotify::AddWatchFlags as Mask;

use crate::files::entry::Entry;

/// What happened to a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is there now.
    Create,
    /// It went by another name, or elsewhere.
    Rename,
    /// Its rights, owner or attributes changed.
    Chmod,
    /// Its content changed.
    Write,
    /// It is gone.
    Remove,
}

/// One event as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Relative to the watched directory, which is itself called `.`.
    pub name: PathBuf,
    /// What happened.
    pub kind: Kind,
    /// What is there now, where that was asked for and something is.
    pub entry: Option<Entry>,
}

/// What the kernel is asked to tell of a directory.
pub const WANTED: Mask = Mask::IN_CREATE
    .union(Mask::IN_MOVED_TO)
    .union(Mask::IN_MOVED_FROM)
    .union(Mask::IN_MOVE_SELF)
    .union(Mask::IN_ATTRIB)
    .union(Mask::IN_MODIFY)
    .union(Mask::IN_DELETE)
    .union(Mask::IN_DELETE_SELF);

/// What `mask` comes to, several operations in the order that clients know.
pub fn kinds(mask: Mask) -> impl Iterator<Item = Kind> {
    [
        (Mask::IN_CREATE | Mask::IN_MOVED_TO, Kind::Create),
        (Mask::IN_MOVED_FROM | Mask::IN_MOVE_SELF, Kind::Rename),
        (Mask::IN_ATTRIB, Kind::Chmod),
        (Mask::IN_MODIFY, Kind::Write),
        (Mask::IN_DELETE | Mask::IN_DELETE_SELF, Kind::Remove),
    ]
    .into_iter()
    .filter(move |(bits, _)| mask.intersects(*bits))
    .map(|(_, kind)| kind)
}

impl Kind {
    /// Whether something is there afterwards that can be described.
    #[must_use]
    pub fn leaves_an_entry(self) -> bool {
        matches!(self, Self::Create | Self::Write | Self::Chmod)
    }
}

/// The name of what lies at `path` below the watched directory.
#[must_use]
pub fn name_of(path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() {
        return PathBuf::from(".");
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_operations_are_split_in_the_order_clients_know() {
        let all = WANTED | Mask::IN_ISDIR;
        assert_eq!(
            kinds(all).collect::<Vec<_>>(),
            [
                Kind::Create,
                Kind::Rename,
                Kind::Chmod,
                Kind::Write,
                Kind::Remove
            ]
        );
        let never = Mask::IN_CLOSE_WRITE | Mask::IN_ACCESS | Mask::IN_OPEN | Mask::IN_IGNORED;
        assert_eq!(kinds(never).count(), 0);
    }

    #[test]
    fn a_move_is_a_rename_here_and_a_creation_there() {
        assert!(kinds(Mask::IN_MOVED_FROM).eq([Kind::Rename]));
        assert!(kinds(Mask::IN_MOVED_TO | Mask::IN_ISDIR).eq([Kind::Create]));
    }
}
