//! What layers make together: a tree of paths, each with where its contents come from. Pure.
//!
//! Layers are applied in order, each member on top of what is there. A member's parents are followed
//! through the tree's own links, never out of it, so that every path in the tree is a real one. A file
//! that was named twice has one source, also after a later layer has replaced one of the names.

use std::collections::{BTreeMap, BTreeSet};

use crate::template::archive::{Kind, Member};

/// What begins the name of a member by which a layer removes another.
const WHITEOUT: &str = ".wh.";
/// The name by which a layer removes all that lower ones have in a directory.
const OPAQUE: &str = ".wh..wh..opq";
/// Other names of this kind are notes that one storage driver keeps for itself.
const NOTE: &str = ".wh..wh.";
/// Where a guest has file systems of its own: what an archive has there could never be seen.
const VOLATILE: [&str; 5] = ["dev", "proc", "sys", "run", "tmp"];
/// Most links on the way to a path: the kernel's own limit.
const MAX_LINKS: usize = 40;
/// Permission bits of directories that nobody has described.
const PLAIN_DIRECTORY: u32 = 0o755;

/// Why members do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A device, a pipe or a socket where a guest would see it.
    #[error("it has a device or a pipe {0:?}, which no template is made from")]
    Special(String),
    /// Something lies below what is no directory.
    #[error("it has {0:?}, which lies below something that is no directory")]
    BelowFile(String),
    /// Too many links.
    #[error("it has {0:?}, whose directory is behind more than {MAX_LINKS} links")]
    Links(String),
    /// Another name of what is not there.
    #[error("it has {path:?}, another name of {target:?}, which is no file that it has")]
    NoTarget {
        /// The name.
        path: String,
        /// What it would be a name of.
        target: String,
    },
}

/// Where contents come from: a layer, and a member of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source {
    pub(super) layer: u32,
    pub(super) member: u32,
}

/// What is known of a path besides its contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) owner: (u64, u64),
    pub(super) modified: u64,
    pub(super) capability: Vec<u8>,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory(Meta),
    File {
        source: Source,
        bytes: u64,
        meta: Meta,
    },
    Symlink {
        target: String,
        meta: Meta,
    },
}

/// What layers make together, by path.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    /// With the layer that put it there last.
    nodes: BTreeMap<String, (u32, Node)>,
}

impl Tree {
    /// Everything there is: parents before what lies in them.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes
            .iter()
            .map(|(path, (_, node))| (path.as_str(), node))
    }

    /// Whether there is a file at `path`, links followed.
    pub(super) fn has_file(&self, path: &str) -> bool {
        let real = self.follow(path, MAX_LINKS);
        real.is_ok_and(|real| matches!(self.nodes.get(&real), Some((_, Node::File { .. }))))
    }

    /// Bytes of all contents, each counted once.
    pub(super) fn bytes(&self) -> u64 {
        let mut counted = BTreeSet::new();
        let sizes = self.nodes.values().map(|(_, node)| match node {
            Node::File { source, bytes, .. } if counted.insert(*source) => *bytes,
            Node::File { .. } | Node::Directory(_) | Node::Symlink { .. } => 0,
        });
        sizes.fold(0, u64::saturating_add)
    }

    /// Puts a member on top of what is there; `is_layer` where names may remove others.
    ///
    /// # Errors
    /// [`TreeError`]: it does not fit.
    pub(super) fn add(
        &mut self,
        source: Source,
        member: &Member,
        is_layer: bool,
    ) -> Result<(), TreeError> {
        if member.path.is_empty() {
            return Ok(());
        }
        let (parent, name) = split(&member.path);
        if is_layer && parent.split('/').any(|part| part.starts_with(WHITEOUT)) {
            // Drivers keep links of their own in such directories.
            return Ok(());
        }
        let parent = self.real_parent(&member.path, parent)?;
        if is_layer && name.starts_with(WHITEOUT) {
            self.remove(source.layer, &parent, name);
            return Ok(());
        }
        let path = join(&parent, name);
        if is_volatile(&path) {
            return Ok(());
        }
        let node = self.node(source, member, &path)?;
        let both_directories = matches!(
            (self.nodes.get(&path), &node),
            (Some((_, Node::Directory(_))), Node::Directory(_))
        );
        if !both_directories {
            self.cut(&path, u32::MAX);
        }
        self.nodes.insert(path, (source.layer, node));
        Ok(())
    }

    /// Adds the directories that nobody has described, and those that a guest mounts upon.
    pub(super) fn finish(&mut self) {
        let mut missing = Vec::new();
        for path in self.nodes.keys() {
            let mut at = path.as_str();
            while let (parent, _) = split(at)
                && !parent.is_empty()
                && !self.nodes.contains_key(parent)
            {
                missing.push(parent.to_owned());
                at = parent;
            }
        }
        for path in missing {
            self.nodes.entry(path).or_insert_with(plain_directory);
        }
    }

    fn node(&self, source: Source, member: &Member, path: &str) -> Result<Node, TreeError> {
        let meta = Meta {
            mode: member.mode,
            owner: member.owner,
            modified: member.modified,
            capability: member.capability.clone(),
        };
        Ok(match &member.kind {
            Kind::Directory => Node::Directory(meta),
            Kind::Symlink(target) => Node::Symlink {
                target: target.clone(),
                meta,
            },
            Kind::File => Node::File {
                source,
                bytes: member.size,
                meta,
            },
            Kind::Special => return Err(TreeError::Special(path.to_owned())),
            Kind::Link(target) => {
                let (parent, name) = split(target);
                let real = join(&self.real_parent(target, parent)?, name);
                match self.nodes.get(&real) {
                    Some((_, node @ (Node::File { .. } | Node::Symlink { .. }))) => node.clone(),
                    Some((_, Node::Directory(_))) | None => {
                        return Err(TreeError::NoTarget {
                            path: path.to_owned(),
                            target: target.clone(),
                        });
                    }
                }
            }
        })
    }

    /// What a name says that removes others: those of lower layers.
    fn remove(&mut self, layer: u32, parent: &str, name: &str) {
        if name == OPAQUE {
            self.cut_below(parent, layer);
        } else if !name.starts_with(NOTE)
            && let Some(gone) = name.strip_prefix(WHITEOUT)
            && !gone.is_empty()
        {
            self.cut(&join(parent, gone), layer);
        }
    }

    /// Removes what layers before `layer` have put at `path` and below it.
    fn cut(&mut self, path: &str, layer: u32) {
        self.cut_below(path, layer);
        if self.nodes.get(path).is_some_and(|(by, _)| *by < layer) {
            self.nodes.remove(path);
        }
    }

    fn cut_below(&mut self, path: &str, layer: u32) {
        let begin = if path.is_empty() {
            String::new()
        } else {
            format!("{path}/")
        };
        let below = self.nodes.range(begin.clone()..);
        let below = below.take_while(|(at, _)| at.starts_with(&begin));
        let gone = below.filter(|(_, (by, _))| *by < layer);
        let gone: Vec<String> = gone.map(|(at, _)| at.clone()).collect();
        for path in gone {
            self.nodes.remove(&path);
        }
    }

    /// The directory a member lies in, without links.
    fn real_parent(&self, of: &str, parent: &str) -> Result<String, TreeError> {
        let real = self.follow(parent, MAX_LINKS);
        let real = real.map_err(|()| TreeError::Links(of.to_owned()))?;
        match self.nodes.get(&real) {
            None | Some((_, Node::Directory(_))) => {}
            Some(_) => return Err(TreeError::BelowFile(of.to_owned())),
        }
        // Not only the last: what lies on the way may be a file as well.
        let mut at = real.as_str();
        while !at.is_empty() {
            at = split(at).0;
            if matches!(self.nodes.get(at), Some((_, Node::File { .. }))) {
                return Err(TreeError::BelowFile(of.to_owned()));
            }
        }
        Ok(real)
    }

    /// `path` with every link in it replaced by what it leads to, as seen from the tree's root.
    fn follow(&self, path: &str, mut links: usize) -> Result<String, ()> {
        let mut real: Vec<String> = Vec::new();
        let mut left: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        while let Some(part) = left.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    real.pop();
                    continue;
                }
                _ => real.push(part),
            }
            let Some((_, Node::Symlink { target, .. })) = self.nodes.get(&real.join("/")) else {
                continue;
            };
            links = links.checked_sub(1).ok_or(())?;
            if target.starts_with('/') {
                real.clear();
            } else {
                real.pop();
            }
            left.extend(target.split('/').rev().map(str::to_owned));
        }
        Ok(real.join("/"))
    }
}

fn plain_directory() -> (u32, Node) {
    let meta = Meta {
        mode: PLAIN_DIRECTORY,
        ..Meta::default()
    };
    (0, Node::Directory(meta))
}

/// Whether `path` lies where a guest has a file system of its own, or is such a place.
fn is_volatile(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    VOLATILE.contains(&first)
}

/// The directory that `path` lies in, and its name there.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() {
        name.to_owned()
    } else {
        format!("{parent}/{name}")
    }
}

#[cfg(test)]
mod tests;
