//! What can go wrong with chunks, manifests and the store that keeps them.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use proto::ids::NodeKey;

use super::DecodeManifestError;
use crate::base::remedy::Remedy;
use crate::store::chunk::ChunkId;
use crate::store::pin::Pin;

/// Why a store could not be opened.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// Another process has it open.
    #[error("store {} is in use by another wrenn process", path.display())]
    InUse {
        /// The store's directory.
        path: PathBuf,
    },
    /// A pack in it was written by another version of this program.
    #[error("pack {} has version {found} and this wrenn reads version {ours}", path.display())]
    OtherVersion {
        /// The pack.
        path: PathBuf,
        /// The version it has.
        found: u32,
        /// The one that is read.
        ours: u32,
    },
    /// The disk refused.
    #[error("{action} {}", path.display())]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl OpenStoreError {
    /// Who must act next: a store is its operator's business.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::InUse { .. } | Self::OtherVersion { .. } | Self::Disk { .. } => {
                Remedy::CallOperator
            }
        }
    }

    pub(in crate::store) fn disk<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Disk {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Why something could not be sealed. Nothing of it counts then, and the store goes on.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The file system is as full as we let it become.
    #[error("only {free_bytes} bytes are free and {needed_bytes} must stay free")]
    NoRoom {
        /// What is left.
        free_bytes: u64,
        /// What seals leave.
        needed_bytes: u64,
    },
    /// The disk said that it is full while being written.
    #[error("the disk is full: {action} {}", path.display())]
    DiskFull {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Its own words.
        source: io::Error,
    },
    /// The store has all it may have.
    #[error("the store takes {taken_bytes} bytes of the {budget_bytes} it may take")]
    OverBudget {
        /// What it takes.
        taken_bytes: u64,
        /// What it may take.
        budget_bytes: u64,
    },
    /// The disk refused.
    #[error("{action} {}", path.display())]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No image can be that long.
    #[error("a file of {len_bytes} bytes cannot be an image")]
    ImageSize {
        /// Length of the file.
        len_bytes: u64,
    },
    /// What was to be sealed could not be read.
    #[error("read what is sealed")]
    Read {
        /// Why it failed.
        source: io::Error,
    },
    /// A chunk of the parent image is needed and cannot be had.
    #[error("read the parent image")]
    Parent(#[source] ReadChunkError),
    /// Bytes that are no chunk: none, too many, or not those of the name.
    #[error("the bytes are not those of chunk {chunk}")]
    NotTheChunk {
        /// The name they should have.
        chunk: ChunkId,
    },
    /// The disk lost what this seal counted on; sealing again writes it again.
    #[error("the disk lost chunks while they were being sealed")]
    Lost,
}

impl SealError {
    /// Who must act next. Whatever has to do with room may pass, or another node has it.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::NoRoom { .. } | Self::DiskFull { .. } | Self::OverBudget { .. } | Self::Lost => {
                Remedy::RetryLater
            }
            Self::Disk { .. } | Self::Read { .. } | Self::ImageSize { .. } => Remedy::CallOperator,
            Self::Parent(err) => err.remedy(),
            Self::NotTheChunk { .. } => Remedy::AskAnotherPeer,
        }
    }

    pub(in crate::store) fn of_disk(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        let full = [Errno::ENOSPC, Errno::EDQUOT].map(|errno| Some(errno as i32));
        if full.contains(&source.raw_os_error()) {
            return Self::DiskFull {
                action,
                path,
                source,
            };
        }
        Self::Disk {
            action,
            path,
            source,
        }
    }
}

/// Why a chunk could not be read.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReadChunkError {
    /// This store does not have it.
    #[error("chunk {chunk} is not in this store")]
    Missing {
        /// The chunk.
        chunk: ChunkId,
    },
    /// What is stored under the name is something else. It has been forgotten, so that the chunk
    /// can be fetched again.
    #[error("chunk {chunk} is damaged on disk")]
    Corrupt {
        /// The chunk.
        chunk: ChunkId,
    },
    /// The chunk is shorter than a manifest says.
    #[error("chunk {chunk} is shorter than its image needs")]
    TooShort {
        /// The chunk.
        chunk: ChunkId,
    },
    /// This node's own disk refused the read.
    #[error("read chunk {chunk} from disk")]
    Disk {
        /// The chunk.
        chunk: ChunkId,
        /// Why it failed.
        source: io::Error,
    },
}

impl ReadChunkError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Missing { .. } | Self::Corrupt { .. } | Self::TooShort { .. } => {
                Remedy::AskAnotherPeer
            }
            Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}

/// Why a manifest could not be read from this store.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReadManifestError {
    /// This store does not have it.
    #[error("the manifest of {pin} is not in this store")]
    Missing {
        /// Whose manifest.
        pin: Pin,
    },
    /// The file under its name holds something else.
    #[error("the manifest of {pin} is damaged on disk")]
    Corrupt {
        /// Whose manifest.
        pin: Pin,
    },
    /// The bytes are the right ones, and are no manifest of an image.
    #[error("read the manifest of {pin}")]
    Image {
        /// Whose manifest.
        pin: Pin,
        /// What is wrong with it.
        source: DecodeManifestError,
    },
    /// The bytes are no manifest of a snapshot.
    #[error("read the manifest of {pin}")]
    Snapshot {
        /// Whose manifest.
        pin: Pin,
        /// What is wrong with it.
        source: DecodeSnapshotError,
    },
    /// This node's own disk refused the read.
    #[error("read {}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl ReadManifestError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Missing { .. } | Self::Corrupt { .. } => Remedy::AskAnotherPeer,
            Self::Image { source, .. } => source.remedy(),
            Self::Snapshot { source, .. } => source.remedy(),
            Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}

/// Why bytes are not a signed snapshot manifest. They may come from a peer, so every rule is
/// checked.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeSnapshotError {
    /// They do not begin as one does.
    #[error("not a snapshot manifest")]
    Magic,
    /// A version this program does not read.
    #[error("snapshot manifest version {found} is not the version {ours} this wrenn reads")]
    Version {
        /// What it says.
        found: u32,
        /// What we read.
        ours: u32,
    },
    /// They end too early, or go on after the end.
    #[error("snapshot manifest is {bytes} bytes long and its content says otherwise")]
    Length {
        /// How long it is.
        bytes: usize,
    },
    /// A field holds what it may not hold.
    #[error("{field} of the snapshot manifest is malformed")]
    Field {
        /// Which one.
        field: &'static str,
    },
    /// The signature is not one of the key that stands beside it.
    #[error("the snapshot manifest's signature is wrong")]
    Signature,
    /// It was sealed by a node that may not seal for us.
    #[error("the snapshot manifest was sealed by an unknown node with key {signer}")]
    Signer {
        /// Whose signature it is.
        signer: NodeKey,
    },
}

impl DecodeSnapshotError {
    /// Who must act next: whoever sent it sent rubbish, another peer may not.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Magic
            | Self::Version { .. }
            | Self::Length { .. }
            | Self::Field { .. }
            | Self::Signature
            | Self::Signer { .. } => Remedy::AskAnotherPeer,
        }
    }
}

/// Why an image could not be put together in a file. There is no file then.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// A chunk cannot be had.
    #[error("read the image's chunks")]
    Chunk(#[from] ReadChunkError),
    /// The manifest describes an image of another length.
    #[error("an image of {image_bytes} bytes cannot be a file of {len_bytes}")]
    Length {
        /// What the manifest says.
        image_bytes: u64,
        /// What was asked for.
        len_bytes: u64,
    },
    /// The disk refused.
    #[error("{action} {}", path.display())]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl AssembleError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Chunk(err) => err.remedy(),
            Self::Length { .. } => Remedy::AskAnotherPeer,
            Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}

/// Why nothing was collected, or not all that could be. What was pinned is untouched.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// Nobody could say what must be kept.
    #[error("ask what must be kept")]
    Pins(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What a pinned manifest names is unknown, so everything must be kept until it is read again
    /// or dropped by a check.
    #[error("find out what must be kept")]
    Manifest(#[from] ReadManifestError),
    /// The disk refused.
    #[error("{action} {}", path.display())]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// What is kept could not be copied.
    #[error("copy what is kept")]
    Copy(#[from] SealError),
    /// The store is being closed. What was not looked at is for the next collection.
    #[error("the store is being closed")]
    Stopped,
}

impl CollectError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Pins(_) | Self::Stopped => Remedy::RetryLater,
            Self::Manifest(_) | Self::Disk { .. } => Remedy::CallOperator,
            Self::Copy(err) => err.remedy(),
        }
    }

    pub(in crate::store) fn disk<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Disk {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The store's files were not all looked through.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The disk refused.
    #[error("look through {}", path.display())]
    Disk {
        /// What could not be read.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The store is being closed. What was found by then has been forgotten, and is told of by nobody.
    #[error("the store is being closed")]
    Stopped,
}

impl CheckError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Disk { .. } => Remedy::CallOperator,
            Self::Stopped => Remedy::RetryLater,
        }
    }
}
