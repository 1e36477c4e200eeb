//! Output of one process to everybody who listens.
//!
//! Each listener has a bounded queue. A full queue makes the process wait, as a full pipe would, so
//! nothing is lost and nothing piles up; with nobody listening output is dropped. A listener that
//! has gone away is forgotten at the next event.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::future::join_all;
use tokio::sync::mpsc;

use super::exit::Exit;

/// Chunks that wait for one listener. With the largest chunk this bounds a queue at 2 MiB.
const QUEUE_CHUNKS: usize = 64;

/// Which stream a chunk came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A terminal, where both are one.
    Terminal,
}

/// What a listener hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Raw bytes as they were written.
    Data(Channel, Bytes),
    /// The last event.
    End(Exit),
}

/// One listener's queue.
pub type Subscription = mpsc::Receiver<Output>;

#[derive(Debug, Default)]
struct Listeners {
    queues: Vec<mpsc::Sender<Output>>,
    end: Option<Exit>,
}

/// The listeners of one process.
#[derive(Debug, Default)]
pub struct Fanout {
    listeners: Mutex<Listeners>,
}

impl Fanout {
    /// Attaches a listener: it hears what comes from now on, and the end even if that has passed.
    pub fn subscribe(&self) -> Subscription {
        let (queue, subscription) = mpsc::channel(QUEUE_CHUNKS);
        let mut listeners = self.lock();
        match &listeners.end {
            // A fresh queue has room for one event.
            Some(exit) => drop(queue.try_send(Output::End(exit.clone()))),
            None => listeners.queues.push(queue),
        }
        subscription
    }

    /// Hands a chunk to everyone, waiting for those whose queue is full.
    pub async fn publish(&self, channel: Channel, data: Bytes) {
        let queues = {
            let mut listeners = self.lock();
            listeners.queues.retain(|queue| !queue.is_closed());
            listeners.queues.clone()
        };
        let event = Output::Data(channel, data);
        join_all(queues.iter().map(|queue| queue.send(event.clone()))).await;
    }

    /// Tells everyone, later listeners included, that nothing more will come.
    pub async fn finish(&self, exit: Exit) {
        let queues = {
            let mut listeners = self.lock();
            listeners.end = Some(exit.clone());
            std::mem::take(&mut listeners.queues)
        };
        join_all(
            queues
                .iter()
                .map(|queue| queue.send(Output::End(exit.clone()))),
        )
        .await;
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn ended() -> Exit {
        Exit::new(ExitStatus::from_raw(0), false)
    }

    #[tokio::test]
    async fn every_listener_hears_every_chunk_and_the_end() {
        let fanout = Fanout::default();
        let mut listeners = [fanout.subscribe(), fanout.subscribe()];
        fanout
            .publish(Channel::Stdout, Bytes::from_static(b"x"))
            .await;
        fanout.finish(ended()).await;
        for listener in &mut listeners {
            let chunk = Output::Data(Channel::Stdout, Bytes::from_static(b"x"));
            assert_eq!(listener.recv().await, Some(chunk));
            assert_eq!(listener.recv().await, Some(Output::End(ended())));
            assert_eq!(listener.recv().await, None);
        }
    }

    #[tokio::test]
    async fn late_listener_hears_the_end() {
        let fanout = Fanout::default();
        fanout
            .publish(Channel::Stdout, Bytes::from_static(b"lost"))
            .await;
        fanout.finish(ended()).await;
        assert_eq!(fanout.subscribe().recv().await, Some(Output::End(ended())));
    }

    #[tokio::test]
    async fn full_queue_holds_the_process_back_until_it_is_read() {
        let fanout = std::sync::Arc::new(Fanout::default());
        let mut listener = fanout.subscribe();
        let writer = tokio::spawn({
            let fanout = fanout.clone();
            async move {
                for _ in 0..2 * QUEUE_CHUNKS {
                    fanout
                        .publish(Channel::Stdout, Bytes::from_static(b"x"))
                        .await;
                }
                fanout.finish(ended()).await;
            }
        });
        let mut chunks = 0;
        while let Some(Output::Data(..)) = listener.recv().await {
            chunks += 1;
        }
        assert_eq!(chunks, 2 * QUEUE_CHUNKS);
        writer.await.expect("writer ends");
    }

    #[tokio::test]
    async fn listener_that_left_holds_nobody_back() {
        let fanout = Fanout::default();
        drop(fanout.subscribe());
        for _ in 0..2 * QUEUE_CHUNKS {
            fanout
                .publish(Channel::Stdout, Bytes::from_static(b"x"))
                .await;
        }
    }
}
