//! Why something in the store failed, and who must act on it.

use std::io;
use std::path::PathBuf;

use proto::units::Mib;

use crate::base::remedy::Remedy;

mod content;

pub use content::{
    AssembleError, CheckError, CollectError, DecodeSnapshotError, OpenStoreError, ReadChunkError,
    ReadManifestError, SealError,
};

/// Why a data directory could not be opened.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OpenDataDirError {
    /// Another process holds it; two daemons over one directory would ruin both.
    #[error("data directory {path} is in use by another wrenn process")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It was written by a later wrenn.
    #[error(
        "data directory {path} was written by a later version of wrenn (layout {found}; this wrenn \
         reads up to {ours}); install that version again"
    )]
    LaterVersion {
        /// The directory.
        path: PathBuf,
        /// The layout it has.
        found: u32,
        /// The newest that this program reads.
        ours: u32,
    },
    /// It was written by a wrenn whose layout differs from ours.
    #[error(
        "data directory {path} has layout version {found:?} and this wrenn reads version {ours}; \
         run the wrenn that wrote it"
    )]
    OtherVersion {
        /// The directory.
        path: PathBuf,
        /// What its version file says, shortened.
        found: String,
        /// The version this program reads and writes.
        ours: u32,
    },
    /// It holds files but no version: it belongs to something else.
    #[error(
        "{path} holds other files ({example:?}) and no wrenn data; name an empty or new directory"
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// One of the files that should not be there.
        example: String,
    },
    /// The disk refused.
    #[error("{action} {path}")]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl OpenDataDirError {
    /// Who must act next: a data directory is always its operator's business.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::InUse { .. }
            | Self::LaterVersion { .. }
            | Self::OtherVersion { .. }
            | Self::NotOurs { .. }
            | Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}

/// Why an overlay could not be made.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CreateOverlayError {
    /// A disk of this size cannot be made.
    #[error("a disk must be between 1 MiB and {max}, not {asked}")]
    Size {
        /// What was asked for.
        asked: Mib,
        /// The most there can be.
        max: Mib,
    },
    /// The image below is larger than the disk: its end would be cut off.
    #[error("a disk of {asked} is smaller than its template of {base_bytes} bytes")]
    SmallerThanBase {
        /// What was asked for.
        asked: Mib,
        /// Length of the image below.
        base_bytes: u64,
    },
    /// The path of the image below cannot stand in an overlay's header.
    #[error("image path {path} must be absolute and at most {max_bytes} bytes long")]
    BasePath {
        /// The path.
        path: PathBuf,
        /// The format's limit.
        max_bytes: usize,
    },
    /// There is a disk at this path; it may hold a user's data and is never written over.
    #[error("overlay {path} exists already")]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// So little room is left that the node's own files come first.
    #[error("only {free} free for overlay {path}, {needed} needed")]
    NoRoom {
        /// Where it was to be made.
        path: PathBuf,
        /// What is left.
        free: Mib,
        /// What must be left before another disk is begun.
        needed: Mib,
    },
    /// The disk refused.
    #[error("{action} {path}")]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Why an overlay could not be put on another path of its image.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RebaseError {
    /// It is not one of ours.
    #[error("{path:?} is not an overlay of ours")]
    NotAnOverlay {
        /// What was looked at.
        path: PathBuf,
    },
    /// The image's path cannot stand in an overlay.
    #[error("an image cannot be called {path:?}")]
    BasePath {
        /// The path.
        path: PathBuf,
    },
    /// The disk failed.
    #[error("change overlay {path:?}")]
    Disk {
        /// Which.
        path: PathBuf,
        /// What the disk says.
        source: io::Error,
    },
}

impl CreateOverlayError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Size { .. } | Self::SmallerThanBase { .. } => Remedy::FixRequest,
            Self::Exists { .. } => Remedy::WrongState,
            Self::NoRoom { .. } => Remedy::RetryLater,
            Self::BasePath { .. } | Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}

/// Why bytes are not a manifest. They may come from a peer, so every rule is checked.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeManifestError {
    /// They do not begin as a manifest does.
    #[error("not a manifest")]
    Magic,
    /// A version this program does not read.
    #[error("manifest version {found} is not the version {ours} this wrenn reads")]
    Version {
        /// What it says.
        found: u32,
        /// What we read.
        ours: u32,
    },
    /// They end too early, or go on after the end.
    #[error("manifest is {bytes} bytes long and its content says otherwise")]
    Length {
        /// How long it is.
        bytes: usize,
    },
    /// The image would be larger than any we handle, or not a whole number of blocks.
    #[error("manifest describes an impossible image of {image_bytes} bytes")]
    ImageSize {
        /// The size it claims.
        image_bytes: u64,
    },
    /// An extent is of unknown kind, empty, not in whole blocks, or reaches outside its chunk.
    #[error("extent {index} of the manifest is malformed")]
    Extent {
        /// Which one, counted from zero.
        index: usize,
    },
    /// The extents overlap, leave a gap, or add up to another size than the image's.
    #[error("the manifest's extents do not cover its image exactly")]
    Cover,
}

impl DecodeManifestError {
    /// Who must act next: whoever sent it sent rubbish, another peer may not.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Magic
            | Self::Version { .. }
            | Self::Length { .. }
            | Self::ImageSize { .. }
            | Self::Extent { .. }
            | Self::Cover => Remedy::AskAnotherPeer,
        }
    }
}

/// Why a raw image could not be read.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReadImageError {
    /// Its size is zero, not in whole blocks, or beyond what we handle.
    #[error("image {path} has an impossible size of {bytes} bytes")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The disk refused, or the file shrank while being read.
    #[error("read image {path}")]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl ReadImageError {
    /// Who must act next: images are put in place by the operator.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Size { .. } | Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}
