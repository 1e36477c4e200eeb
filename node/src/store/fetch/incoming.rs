//! A snapshot whose memory is still on its way.
//!
//! Everything else of it is here and durable when this is made, so a guest can be started on it.
//! What the guest touches is brought at once; the rest comes meanwhile. Both end up in this
//! node's store, and neither asks for what the other has brought.

use std::sync::Arc;

use tokio::sync::{Mutex, watch};

use super::opening;
use super::progress::{Meter, Progress};
use super::run::Patience;
use super::urgent::{BringError, Came, Urgent};
use super::{FetchError, Holders, Part, blocking};
use crate::store::chunk::ChunkId;
use crate::store::engine::{Kept, Location, Store};
use crate::store::snapshot::SignedSnapshot;

/// A snapshot of which all but the memory is here. What is here of it is kept as long as this, or a
/// clone of it, lives.
#[derive(Clone, Debug)]
pub struct Incoming(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    holders: Arc<dyn Holders>,
    signed: SignedSnapshot,
    meter: Meter,
    urgent: Arc<Urgent>,
    /// One completes at a time.
    completing: Mutex<()>,
    _kept: Kept,
}

impl Incoming {
    pub(super) fn new(
        store: Store,
        holders: Arc<dyn Holders>,
        signed: SignedSnapshot,
        meter: Meter,
        kept: Kept,
    ) -> Self {
        let urgent = Urgent::new(store.clone(), Arc::clone(&holders), signed.digest());
        Self(Arc::new(Inner {
            store,
            holders,
            signed,
            meter,
            urgent: Arc::new(urgent),
            completing: Mutex::default(),
            _kept: kept,
        }))
    }

    /// What is on its way.
    #[must_use]
    pub fn snapshot(&self) -> &SignedSnapshot {
        &self.0.signed
    }

    /// Brings one chunk of it here, before all others, and says where it lies. One that is here is
    /// not looked at: who found its bytes spoiled reads it by [`Store::get`] first.
    ///
    /// It need not be durable yet: a crash of the machine takes the guest as well. A call that is
    /// dropped leaves the question to the next one who asks the same.
    ///
    /// # Errors
    /// See [`BringError`]; only [`BringError::Gone`] is final.
    pub async fn bring(&self, chunk: ChunkId) -> Result<Location, BringError> {
        self.0.urgent.bring(chunk).await
    }

    /// Brings one chunk of it that is not here, before all others, and hands it over as it came: the
    /// caller has to check it against its name, and asks by [`Self::bring`] where it is wrong. Here it
    /// is checked as well, and then stored; where that fails [`Self::complete`] asks for it again.
    ///
    /// # Errors
    /// See [`BringError`]; only [`BringError::Gone`] is final.
    pub async fn rush(&self, chunk: ChunkId) -> Result<Came, BringError> {
        self.0.urgent.rush(chunk).await
    }

    /// Brings everything that is missing, makes it durable and keeps it: then this node holds the
    /// snapshot. As long as no holder can be reached it waits for one. It can be dropped at any
    /// time; what has come stays.
    ///
    /// # Errors
    /// - [`FetchError::NoHolder`]: for a minute every holder there is has said that it lacks what is
    ///   missing, or there was none.
    /// - [`FetchError::Store`]: this node's store does not take it. Nothing is lost: asked again, it
    ///   goes on from there.
    pub async fn complete(&self) -> Result<Kept, FetchError> {
        let inner = &self.0;
        let _one = inner.completing.lock().await;
        let (store, digest) = (inner.store.clone(), inner.signed.digest());
        let here = blocking(move || opening::held_here(&store, digest)).await;
        let (opened, first) = match here.map_err(FetchError::Cut)? {
            Some(opened) => (opened, None),
            // Its manifests were here. They turned out damaged.
            None => opening::open(&inner.store, digest, inner.holders.as_ref()).await?,
        };
        let (part, patience) = (Part::Whole, Patience::Endless);
        let holders = inner.holders.as_ref();
        let kept = inner
            .store
            .fetch_part(&opened, first, part, holders, &inner.meter, patience)
            .await?;
        let completed = &inner.store.core.completed;
        completed.send_modify(|count| *count += 1);
        Ok(kept)
    }

    /// How far [`Self::complete`] has come; all zero before it began.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.0.meter.watch()
    }
}
