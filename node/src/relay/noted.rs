//! Ports of guests on this node, dialled so that bytes that flow count as use.
//!
//! A guest elsewhere is counted by its owner, which carries every byte (`pump.rs`). Here nobody carries
//! them: the dial itself wraps each stream, and asks the same question just as often.

use std::fmt;
use std::sync::Arc;

use proto::epoch::Epoch;
use proto::ids::SandboxId;

use super::local::LocalGuests;
use super::pump::Noted;
use crate::guest::dial::DialFuture;
use crate::guest::{Dial, GuestStream};

/// A [`Dial`] of a guest that runs here under `epoch`.
#[derive(Clone)]
pub(super) struct NotedDial {
    pub(super) dial: Arc<dyn Dial>,
    pub(super) local: Arc<dyn LocalGuests>,
    pub(super) id: SandboxId,
    pub(super) epoch: Epoch,
}

impl fmt::Debug for NotedDial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotedDial")
            .field("dial", &self.dial)
            .field("id", &self.id)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

impl Dial for NotedDial {
    fn dial(&self) -> DialFuture {
        let dialling = self.dial.dial();
        let (local, id, epoch) = (Arc::clone(&self.local), self.id, self.epoch);
        Box::pin(async move {
            let use_again = move || use_again(local.as_ref(), id, epoch);
            Ok(GuestStream::new(Noted::new(dialling.await?, use_again)))
        })
    }

    fn at_port(&self, port: u16) -> Arc<dyn Dial> {
        Arc::new(Self {
            dial: self.dial.at_port(port),
            ..self.clone()
        })
    }
}

/// Counts a use of a sandbox that runs here, and says whether its guest may still be used. What stands
/// still may thaw, and then goes on where it was.
pub(super) fn use_again(local: &dyn LocalGuests, id: SandboxId, epoch: Epoch) -> bool {
    local.is_frozen(id) || local.guest(id, epoch).is_some()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time;

    use super::*;
    use crate::guest::Guest;
    use crate::relay::LocalFacts;
    use crate::relay::pump::NOTE_INTERVAL;

    /// A guest that sends back what it is sent.
    #[derive(Clone, Copy, Debug)]
    struct Echo;

    impl Dial for Echo {
        fn dial(&self) -> DialFuture {
            Box::pin(async {
                let (near, far) = duplex(64);
                let (mut read, mut write) = tokio::io::split(far);
                tokio::spawn(async move { tokio::io::copy(&mut read, &mut write).await });
                Ok(GuestStream::new(near))
            })
        }

        fn at_port(&self, _: u16) -> Arc<dyn Dial> {
            Arc::new(Self)
        }
    }

    /// Counts uses, until the guest is about to end.
    #[derive(Debug, Default)]
    struct Counted {
        uses: AtomicUsize,
        ends: AtomicBool,
    }

    impl LocalGuests for Counted {
        fn guest(&self, _: SandboxId, _: Epoch) -> Option<Guest> {
            if self.ends.load(Ordering::Relaxed) {
                return None;
            }
            self.uses.fetch_add(1, Ordering::Relaxed);
            Guest::new(Arc::new(Echo), "token").ok()
        }

        fn touch(&self, _: SandboxId) {}

        fn facts(&self, _: SandboxId) -> Option<LocalFacts> {
            None
        }

        fn console_tail(&self, _: SandboxId, _: usize) -> Option<Vec<u8>> {
            None
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_to_a_guest_of_this_node_count_as_use_and_silence_does_not() {
        let local = Arc::new(Counted::default());
        let dial = NotedDial {
            dial: Arc::new(Echo),
            local: local.clone(),
            id: SandboxId::default(),
            epoch: Epoch(1),
        };
        let mut stream = dial.at_port(80).dial().await.expect("dialled");
        for noted in 0..3 {
            for _ in 0..5 {
                stream.write_u8(7).await.expect("written");
                assert_eq!(stream.read_u8().await.expect("read"), 7);
            }
            assert_eq!(local.uses.load(Ordering::Relaxed), noted);
            time::advance(NOTE_INTERVAL).await;
        }
        time::advance(100 * NOTE_INTERVAL).await;
        assert_eq!(local.uses.load(Ordering::Relaxed), 2, "nothing flowed");
        local.ends.store(true, Ordering::Relaxed);
        assert!(stream.write_u8(7).await.is_err(), "it is about to end");
    }
}
