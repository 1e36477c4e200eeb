//! The log without a runtime, for work on a stopped node. Everything here blocks.

use std::io;
use std::ops::Range;

use futures::executor::block_on;
use tokio::sync::oneshot;

use super::{Log, READ_BYTES, collect};
use crate::types::{Entry, LogId, Vote};

impl Log {
    /// The first entries of `range`, a limited number of bytes of them.
    pub(crate) fn read_now(&self, range: Range<u64>) -> io::Result<Vec<Entry>> {
        let found = self.lock().find(range, READ_BYTES);
        collect(found)
    }

    /// Makes `vote` durable, and only then `entries`.
    pub(crate) fn write_now(&self, vote: Vote, entries: Vec<Entry>) -> io::Result<()> {
        block_on(async {
            self.save_vote(vote).await?;
            let (done, written) = oneshot::channel();
            self.append(entries, move |result| drop(done.send(result)))
                .await?;
            written.await.unwrap_or_else(|_| Err(self.stopped()))
        })
    }

    /// Has the log begin behind `upto`. Durable with whatever is written next.
    pub(crate) fn purge_now(&self, upto: LogId) -> io::Result<()> {
        block_on(self.purge(upto))
    }
}
