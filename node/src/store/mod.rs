//! Images on disk: chunks, manifests, overlays, paths.
//!
//! What a node keeps lies under one data directory, laid out by [`paths`]; small files are
//! replaced whole by [`durable`]. An image is described by its [`manifest`]: ordered
//! [`extent`]s, each a run of blocks in one [`chunk`] or a hole; [`chunker`] makes one from a raw
//! file. A running sandbox writes to a [`disk`] overlay and leaves the image below it alone.
//!
//! Everything here is plain blocking file work. Callers on a runtime wrap it in
//! `spawn_blocking`. Nothing here knows what an image is for or who owns it.

pub mod chunk;
pub mod chunker;
pub mod disk;
pub mod durable;
pub mod error;
pub mod extent;
pub mod manifest;
pub mod paths;

pub use chunk::{CHUNK_BYTES, ChunkId};
pub use disk::Overlay;
pub use error::{CreateOverlayError, DecodeManifestError, OpenDataDirError, ReadImageError};
pub use extent::{Content, Extent};
pub use manifest::{ImageDigest, Manifest};
pub use paths::{DataDir, DataPaths, SandboxPaths};
