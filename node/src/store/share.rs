//! Work shared by two threads.
//!
//! Hashing and compressing an image is worth a second core and not more: the guests need the
//! others. There is one helping thread in a store at a time; whoever comes while it helps another
//! works alone.

use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::chunk::CHUNK_BYTES;

/// Who may be helped.
#[derive(Debug, Default)]
pub(super) struct Helper(AtomicBool);

/// Being helped, until it is dropped.
struct Helped<'a>(&'a Helper);

impl Helper {
    fn take(&self) -> Option<Helped<'_>> {
        let busy = self.0.swap(true, Ordering::AcqRel);
        (!busy).then_some(Helped(self))
    }
}

impl Drop for Helped<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}

/// Does `work` on every item of `items`, on this thread and one more, each with a buffer of a
/// chunk. Items come out of `items` in order and one at a time; the answers come in any order. The
/// first failure, of an item or its work, ends it all.
pub(super) fn share<T, R, E>(
    helper: &Helper,
    items: impl Iterator<Item = Result<T, E>> + Send,
    work: impl Fn(T, &mut Vec<u8>) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E>
where
    R: Send,
    E: Send,
{
    let items = Mutex::new(items);
    let stop = AtomicBool::new(false);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || {
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let Some(item) = next() else {
                break;
            };
            let worked = item.and_then(|item| work(item, &mut buffer));
            done.push(worked.inspect_err(|_| stop.store(true, Ordering::Relaxed))?);
        }
        Ok(done)
    };
    let helped = helper.take();
    thread::scope(|scope| {
        let second = helped.as_ref().and_then(|_| {
            let thread = thread::Builder::new().name("store-helper".into());
            thread.spawn_scoped(scope, worker).ok()
        });
        let mut done = worker()?;
        // Without a second thread the first one has done everything.
        if let Some(second) = second {
            match second.join() {
                Ok(theirs) => done.extend(theirs?),
                Err(panicked) => panic::resume_unwind(panicked),
            }
        }
        Ok(done)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        let items = (0..1000).map(Ok::<_, ()>);
        let helper = Helper::default();
        let mut done = share(&helper, items, |item, _| Ok(item)).unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..1000).collect::<Vec<_>>());
        assert!(helper.take().is_some(), "the helper is free again");
    }

    #[test]
    fn the_first_failure_ends_endless_work() {
        let failed = share(
            &Helper::default(),
            (0_u64..).map(Ok),
            |item, _| match item {
                500 => Err("enough"),
                item => Ok(item),
            },
        );
        assert_eq!(failed, Err("enough"));
        let failed = share(
            &Helper::default(),
            (0_u64..).map(|item| if item < 9 { Ok(item) } else { Err("none") }),
            |item, _| Ok(item),
        );
        assert_eq!(failed, Err("none"));
    }

    #[test]
    fn who_comes_while_the_helper_is_busy_works_alone() {
        let helper = Helper::default();
        let busy = helper.take();
        let caller = thread::current().id();
        let threads = share(&helper, (0..100).map(Ok::<_, ()>), |_, _| {
            Ok(thread::current().id())
        });
        assert!(threads.unwrap().iter().all(|thread| *thread == caller));
        drop(busy);
    }
}
