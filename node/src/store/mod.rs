//! What is kept on disk: images in chunks, snapshots, overlays, paths.
//!
//! What a node keeps lies under one data directory, laid out by [`paths`]; small files are replaced
//! whole by [`durable`]. An image is described by its [`manifest`]: ordered [`extent`]s, each a run
//! of blocks in one [`chunk`] or a hole. A running sandbox writes to a [`disk`] overlay and leaves
//! the image below it alone. The [`Store`] keeps chunks and manifests, and [`SnapshotManifest`]
//! ties the images of one sandbox together:
//!
//! ```text
//! chunker, image     windows of an image      seal     chunks, then manifests, durable
//! codec > record > pack > packs               index    where a chunk lies, from the packs
//! manifests, snapshot                         pin, collect, scrub, stats; assemble: back to a file
//! exchange > fetch, serve                     between two nodes' stores
//! ```
//!
//! Everything here is plain blocking file work. Callers on a runtime wrap it in
//! `spawn_blocking`. Nothing here knows what an image is for or who owns it; what must be kept
//! is told by who collects.

mod assemble;
pub mod chunk;
pub mod chunker;
pub mod codec;
mod collect;
pub mod disk;
pub mod durable;
mod engine;
pub mod error;
mod exchange;
pub mod extent;
pub mod fetch;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod image;
mod index;
pub mod manifest;
mod manifests;
mod pack;
mod packs;
pub mod paths;
mod pin;
mod record;
pub mod report;
mod rounds;
mod scrub;
mod seal;
pub mod serve;
mod share;
pub mod snapshot;
mod stats;

pub use chunk::{CHUNK_BYTES, ChunkId};
pub use codec::{Decoder, Encoding};
pub use collect::Collected;
pub use disk::Overlay;
pub use engine::{Kept, Location, Store};
pub use error::{
    AssembleError, CheckError, CollectError, CreateOverlayError, DecodeManifestError,
    DecodeSnapshotError, OpenDataDirError, OpenStoreError, ReadChunkError, ReadImageError,
    ReadManifestError, SealError,
};
pub use exchange::Carried;
pub use extent::{Content, Extent};
pub use fetch::progress::Progress;
pub use fetch::{BringError, Came, FetchError, Holding, Incoming};
pub use image::SealedImage;
pub use manifest::{ImageDigest, Manifest};
pub use packs::Limits;
pub use paths::{DataDir, DataPaths, SandboxPaths};
pub use pin::Pin;
pub use rounds::{Round, Rounds, Slice};
pub use scrub::Checked;
pub use seal::{Seal, Tally};
pub use snapshot::{ImageRef, SignedSnapshot, SnapshotDigest, SnapshotManifest};
pub use stats::Stats;
