//! A member that holds a snapshot, or takes one from another member, over the bulk lane of the very
//! transport on which it talks raft.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use node::store::{Limits, SnapshotDigest, Store};
use proto::ids::NodeKey;
use tempfile::TempDir;
use tokio::task;
use transport::{Identity, Lane, Transport};

use super::member::Held;
use crate::Outcome;
use crate::snapshots::peer::{Only, hand_out, soon};
use crate::snapshots::transfer::Image;

/// What a member has of snapshots.
pub(super) struct Copies {
    identity: Identity,
    transport: Arc<Transport>,
    folder: PathBuf,
    held: Mutex<Option<Image>>,
}

impl Copies {
    /// Nothing yet.
    pub(super) fn new(identity: Identity, transport: Arc<Transport>, folder: &Path) -> Self {
        Self {
            identity,
            transport,
            folder: folder.to_owned(),
            held: Mutex::default(),
        }
    }

    /// Seals a snapshot of so many MiB and hands it out from now on.
    pub(super) fn hold(&self, mib: &[u8]) -> Outcome<Bytes> {
        let mib: u32 = serde_json::from_slice(mib)?;
        let made = || Image::make_at(&self.folder, mib, self.identity.clone());
        let image = task::block_in_place(made)?;
        hand_out(&self.transport, image.store());
        let held: Held = (
            image.digest().0,
            self.transport.key().0,
            self.transport.local_addr(Lane::Bulk)?,
        );
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
        Ok(serde_json::to_vec(&held)?.into())
    }

    /// Fetches all of a snapshot durably, and throws it away.
    pub(super) async fn fetch(&self, held: &[u8]) -> Outcome<Bytes> {
        let (digest, holder, address): Held = serde_json::from_slice(held)?;
        let holder = NodeKey(holder);
        let connected = self.transport.connect(Lane::Bulk, address, holder, soon());
        connected.await?;
        let (dir, store) = task::block_in_place(|| self.empty_store())?;
        let only = Only::new(&self.transport, holder);
        drop(store.fetch(SnapshotDigest(digest), &only).await?);
        task::block_in_place(|| drop((store, dir)));
        Ok(Bytes::new())
    }

    fn empty_store(&self) -> Outcome<(TempDir, Store)> {
        let dir = tempfile::Builder::new()
            .prefix("taken-")
            .tempdir_in(&self.folder)?;
        let store = Store::open(dir.path(), Limits::default())?;
        Ok((dir, store))
    }
}
