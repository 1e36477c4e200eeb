//! Serving page faults, and putting windows into a guest ahead of them.
//!
//! ```text
//! fault ─> page present?  yes: the guest had given it back: zero, or wake if it is there after all
//!             │ no        being filled: whoever fills it wakes everybody when he is done
//!             v
//!          win the window's absent pages ─> bytes are here: fill, settle, wake
//!                                        └> elsewhere: to the fetchers, and on to the next fault
//! ```
//!
//! One thread reads faults and serves what is on this node; it never waits for another node or for
//! a thread that pushes windows ahead. [`FETCHERS`] threads wait for chunks that have to come from
//! elsewhere. Threads that push ([`super::prefetch`]) make way as long as a fault is being served.
//!
//! Pages are only ever made by `UFFDIO_COPY`: it makes a page whole and at once, refuses one that
//! exists, and marks it as not written. Holes are copied too, from zeroes, since `UFFDIO_ZEROPAGE`
//! has no such mark. It is just right, though, for a page that the guest gave back: there the image
//! had something and now is nothing, which is a change.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::pager::layout::{Hva, Layout, Mapping};
use crate::pager::region::{
    ImageOffset, PAGE_BYTES, PageIndex, WINDOW_BYTES, WINDOW_PAGES, WindowIndex, index,
};
use crate::pager::source::{Asked, Content, PageSource, Scratch, SourceError};
use crate::pager::states::{PageState, StateTable};
use crate::pager::stats::{Counters, add};
use crate::pager::uffd::{Obstacle, Uffd};
use crate::pager::working_set::Recorder;
use crate::store::chunk::CHUNK_BYTES;

/// Threads that wait for chunks from elsewhere: as many virtual CPUs as most guests have, since
/// each of those waits for one page at a time.
const FETCHERS: usize = 4;
/// Faults that are read at once.
const BATCH: usize = 16;
/// Stack of a thread: buffers are on the heap.
const STACK_BYTES: usize = 256 * 1024;
/// How long to wait for the host to find memory before a page is tried again.
const MEMORY_PAUSE: Duration = Duration::from_millis(10);
const WINDOW_PAGES_BITS: u32 = 16;
const _: () = assert!(WINDOW_PAGES == WINDOW_PAGES_BITS as u64);
/// What a hole is made of.
static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];
const _: () = assert!(CHUNK_BYTES as u64 == WINDOW_BYTES);

/// Why a guest cannot be served any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The VMM has ended. Not an error of anybody's.
    #[error("the VMM has ended")]
    Ended,
    /// A page it waits for cannot be had.
    #[error("serve a page fault")]
    Source(#[from] SourceError),
    /// The kernel refused what it should not.
    #[error("{doing}")]
    Kernel {
        /// Which step.
        doing: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn kernel(doing: &'static str) -> impl Fn(Errno) -> ServeError {
    move |errno| match errno {
        Errno::ESRCH => ServeError::Ended,
        errno => ServeError::Kernel {
            doing,
            source: errno.into(),
        },
    }
}

/// Pages of one mapping, all in one window, that this thread has won.
#[derive(Clone, Copy, Debug)]
struct Claim {
    place: Mapping,
    /// Bit n: the page n of the window.
    pages: u16,
}

/// A window on its way to a fetcher.
struct Fetch {
    window: WindowIndex,
    claims: Vec<Claim>,
    since: Instant,
    /// Asked by the thread that read the fault: the answer is on its way while a fetcher wakes up.
    asked: Option<Asked>,
}

/// Whom to tell when a guest cannot be served any more. Called from any thread, perhaps twice.
pub type OnFailure = Box<dyn Fn(ServeError) + Send + Sync>;

/// Everything that serving one guest takes. Shared by all threads that do.
pub struct Server {
    uffd: Uffd,
    layout: Layout,
    table: Arc<StateTable>,
    source: Box<dyn PageSource>,
    counters: Counters,
    recorder: Mutex<Recorder>,
    /// Each window at most once, since its pages are won before it is put here.
    fetches: Mutex<VecDeque<Fetch>>,
    fetch_there: Condvar,
    /// Since when the fault that is being served right now is, in ms from `started`, plus one; zero
    /// if none is.
    urgent: AtomicU64,
    started: Instant,
    pushing_done: AtomicBool,
    on_failure: OnFailure,
}

impl Server {
    /// Serves what `uffd` reports of `layout` from `source`. Nothing runs yet.
    #[must_use]
    pub fn new(
        uffd: Uffd,
        layout: Layout,
        table: Arc<StateTable>,
        source: Box<dyn PageSource>,
        recorder: Recorder,
        on_failure: OnFailure,
    ) -> Self {
        Self {
            uffd,
            layout,
            table,
            source,
            counters: Counters::default(),
            recorder: Mutex::new(recorder),
            fetches: Mutex::default(),
            fetch_there: Condvar::new(),
            urgent: AtomicU64::new(0),
            started: Instant::now(),
            pushing_done: AtomicBool::new(false),
            on_failure,
        }
    }

    /// Starts the threads that serve faults, and wakes everybody who waits already: faults that a
    /// predecessor had read and not served come again.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(self: &Arc<Self>) -> Result<(), ServeError> {
        self.spawn("faults", |server| server.serve_faults())?;
        for _ in 0..FETCHERS {
            self.spawn("fetch", |server| server.fetch_all())?;
        }
        for mapping in self.layout.mappings() {
            self.uffd
                .wake(mapping.hva, mapping.bytes)
                .map_err(kernel("wake the guest"))?;
        }
        Ok(())
    }

    /// Runs `work` on a thread of its own; what it fails with goes to whoever wants to know.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(&Self) -> Result<(), ServeError> + Send + 'static,
    ) -> Result<(), ServeError> {
        let server = Arc::clone(self);
        let run = move || {
            let _all_or_nothing = AbortOnPanic;
            if let Err(err) = work(&server) {
                (server.on_failure)(err);
            }
        };
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(run)
            .map(drop)
            .map_err(|source| ServeError::Kernel {
                doing: "start a thread",
                source,
            })
    }

    /// The counters.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The image.
    #[must_use]
    pub fn source(&self) -> &dyn PageSource {
        &*self.source
    }

    /// How many windows the guest's memory has.
    #[must_use]
    pub fn windows(&self) -> u64 {
        self.table.region().windows()
    }

    /// What has been recorded of the working set so far; the recording is the caller's to end.
    pub fn recorder(&self) -> MutexGuard<'_, Recorder> {
        lock(&self.recorder)
    }

    /// True if a fault is being served on this node: whoever pushes makes way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.urgent.load(Ordering::Relaxed) > 0
    }

    /// How long the fault that is being served on this node has been; `None` if none is.
    #[must_use]
    pub fn serving_for(&self) -> Option<Duration> {
        let since = self.urgent.load(Ordering::Relaxed).checked_sub(1)?;
        let since = Duration::from_millis(since);
        Some(self.started.elapsed().saturating_sub(since))
    }

    /// True once all that was to be pushed has been.
    #[must_use]
    pub fn pushing_done(&self) -> bool {
        self.pushing_done.load(Ordering::Relaxed)
    }

    pub(super) fn finish_pushing(&self) {
        self.pushing_done.store(true, Ordering::Relaxed);
    }

    /// Puts `window` into the guest, if it is not there and nobody else is at it. A chunk that
    /// cannot be had is left for the day the guest asks for it.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn push(&self, window: WindowIndex, scratch: &mut Scratch) -> Result<(), ServeError> {
        let claims = self.claim(window);
        if claims.is_empty() {
            return Ok(());
        }
        let here = self.source.read_here(window, scratch);
        let content = match here {
            Some(content) => Ok(content),
            None => self.source.read(window, None, scratch),
        };
        let Ok(content) = content else {
            for_each_page(&claims, |page| self.table.give_up(page));
            return self.wake(window);
        };
        let put = self.put(window, &claims, bytes_of(content, scratch))?;
        add(&self.counters.pushed_windows, 1);
        self.count(content, put, here.is_none());
        Ok(())
    }

    fn serve_faults(&self) -> Result<(), ServeError> {
        let mut scratch = new_scratch()?;
        let mut found = [0; BATCH];
        loop {
            let count = self
                .uffd
                .read(&mut found)
                .map_err(kernel("read page faults"))?;
            let since = Instant::now();
            if count == 0 {
                self.uffd.wait().map_err(kernel("wait for page faults"))?;
                continue;
            }
            for &address in &found[..count] {
                let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.urgent.store(now.saturating_add(1), Ordering::Relaxed);
                self.serve(Hva(address), since, &mut scratch)?;
            }
            self.urgent.store(0, Ordering::Relaxed);
        }
    }

    fn serve(&self, at: Hva, since: Instant, scratch: &mut Scratch) -> Result<(), ServeError> {
        add(&self.counters.faults, 1);
        let Some(image) = self.layout.image_of(at) else {
            // The kernel reports registered ranges only, and those are all of the layout.
            return Ok(());
        };
        let page = image.page();
        match self.table.get(page) {
            PageState::Filling => Ok(()),
            PageState::Present => {
                self.zero_again(at, page)?;
                self.counters.latency.record(since.elapsed());
                Ok(())
            }
            PageState::Absent => {
                self.recorder().note(page.window());
                self.serve_absent(page.window(), since, scratch)
            }
        }
    }

    fn serve_absent(
        &self,
        window: WindowIndex,
        since: Instant,
        scratch: &mut Scratch,
    ) -> Result<(), ServeError> {
        let claims = self.claim(window);
        if claims.is_empty() {
            // Lost to a thread that pushes: it wakes.
            return Ok(());
        }
        let Some(content) = self.source.read_here(window, scratch) else {
            let fetch = Fetch {
                window,
                claims,
                since,
                asked: self.source.ask_ahead(window),
            };
            lock(&self.fetches).push_back(fetch);
            self.fetch_there.notify_one();
            return Ok(());
        };
        let put = self.put(window, &claims, bytes_of(content, scratch))?;
        self.counters.latency.record(since.elapsed());
        if content == Content::Hole {
            add(&self.counters.hole_faults, 1);
        }
        self.count(content, put, false);
        Ok(())
    }

    fn fetch_all(&self) -> Result<(), ServeError> {
        // Most guests never need one.
        let mut scratch = None;
        loop {
            let fetch = self.next_fetch();
            let scratch = match &mut scratch {
                Some(scratch) => scratch,
                none => none.insert(new_scratch()?),
            };
            let content = self.source.read(fetch.window, fetch.asked, scratch)?;
            let bytes = bytes_of(content, scratch);
            let put = self.put(fetch.window, &fetch.claims, bytes)?;
            self.counters.latency.record(fetch.since.elapsed());
            add(&self.counters.peer_faults, 1);
            self.count(content, put, true);
        }
    }

    fn next_fetch(&self) -> Fetch {
        let mut fetches = lock(&self.fetches);
        loop {
            if let Some(fetch) = fetches.pop_front() {
                return fetch;
            }
            fetches = self
                .fetch_there
                .wait(fetches)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Wins what can be won of `window`.
    fn claim(&self, window: WindowIndex) -> Vec<Claim> {
        let first = window.0 * WINDOW_PAGES;
        let mut claims = Vec::new();
        for place in self.layout.places(self.bytes_of_window(window)) {
            let mut pages = 0_u16;
            let start = place.image.page().0;
            for page in start..start + place.bytes / PAGE_BYTES {
                if self.table.claim(PageIndex(page)) {
                    pages |= 1 << (page - first);
                }
            }
            if pages != 0 {
                claims.push(Claim { place, pages });
            }
        }
        claims
    }

    /// Makes the claimed pages from `bytes`, the whole window's, says so, and wakes. Returns how
    /// many bytes were put.
    fn put(&self, window: WindowIndex, claims: &[Claim], bytes: &[u8]) -> Result<u64, ServeError> {
        let mut put = 0;
        for claim in claims {
            let skew = index(claim.place.image.0 - window.offset().0);
            for run in runs_of(claim) {
                let within = Range {
                    start: index(run.start * PAGE_BYTES),
                    end: index(run.end * PAGE_BYTES),
                };
                let at = claim.place.hva.0 + (within.start - skew) as u64;
                put += self.copy(Hva(at), &bytes[within])?;
            }
        }
        for_each_page(claims, |page| self.table.settle(page));
        self.wake(window)?;
        Ok(put)
    }

    fn copy(&self, mut at: Hva, mut bytes: &[u8]) -> Result<u64, ServeError> {
        let mut put = 0;
        while !bytes.is_empty() {
            let filled = self.uffd.fill(at, bytes);
            let mut step = filled.bytes;
            put += step;
            match filled.obstacle {
                None => {}
                // Only after a death: this page was brought by a predecessor.
                Some(Obstacle::Exists) => step += PAGE_BYTES,
                Some(Obstacle::Unmapped) => return Ok(put),
                Some(Obstacle::Ended) => return Err(ServeError::Ended),
                Some(Obstacle::NoMemory) => thread::sleep(MEMORY_PAUSE),
                Some(Obstacle::Other(errno)) => return Err(kernel("fill a page")(errno)),
            }
            at = Hva(at.0 + step);
            bytes = &bytes[index(step).min(bytes.len())..];
        }
        Ok(put)
    }

    /// A page that was present and is missing: zeroes, as far as its window had been filled.
    fn zero_again(&self, at: Hva, page: PageIndex) -> Result<(), ServeError> {
        let start = Hva(at.0 - at.0 % PAGE_BYTES);
        let until = self.end_of_present(page);
        let room = self
            .layout
            .places(page.offset()..PageIndex(until).offset())
            .find(|place| place.hva == start)
            .map_or(PAGE_BYTES, |place| place.bytes);
        loop {
            let filled = self.uffd.zero(start, room);
            match filled.obstacle {
                None if filled.bytes == 0 => {}
                Some(Obstacle::NoMemory) => thread::sleep(MEMORY_PAUSE),
                Some(Obstacle::Ended) => return Err(ServeError::Ended),
                Some(Obstacle::Other(errno)) => return Err(kernel("zero a page")(errno)),
                // Filled between the fault and now; whoever did has woken the others.
                Some(Obstacle::Exists | Obstacle::Unmapped) => {
                    return self
                        .uffd
                        .wake(start, PAGE_BYTES)
                        .map_err(kernel("wake the guest"));
                }
                None => {
                    add(&self.counters.discard_faults, 1);
                    add(&self.counters.zero_bytes, filled.bytes);
                    return Ok(());
                }
            }
        }
    }

    /// The first page after `page` in its window that was never filled, or the window's end.
    fn end_of_present(&self, page: PageIndex) -> u64 {
        let pages = self.table.region().pages_of(page.window());
        (page.0 + 1..pages.end)
            .find(|next| self.table.get(PageIndex(*next)) != PageState::Present)
            .unwrap_or(pages.end)
    }

    fn wake(&self, window: WindowIndex) -> Result<(), ServeError> {
        for place in self.layout.places(self.bytes_of_window(window)) {
            self.uffd
                .wake(place.hva, place.bytes)
                .map_err(kernel("wake the guest"))?;
        }
        Ok(())
    }

    fn bytes_of_window(&self, window: WindowIndex) -> Range<ImageOffset> {
        let pages = self.table.region().pages_of(window);
        PageIndex(pages.start).offset()..PageIndex(pages.end).offset()
    }

    fn count(&self, content: Content, put: u64, from_peer: bool) {
        let counter = match (content, from_peer) {
            (Content::Hole, _) => &self.counters.zero_bytes,
            (Content::Bytes, false) => &self.counters.local_bytes,
            (Content::Bytes, true) => &self.counters.peer_bytes,
        };
        add(counter, put);
    }
}

/// Ends the process when a thread panics: half a pager would leave its guest waiting for ever,
/// while a dead one is replaced.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

/// Buffers for one thread.
pub(super) fn new_scratch() -> Result<Scratch, ServeError> {
    Scratch::new().map_err(|source| ServeError::Kernel {
        doing: "make a decoder",
        source,
    })
}

fn bytes_of(content: Content, scratch: &Scratch) -> &[u8] {
    match content {
        Content::Hole => &ZEROES,
        Content::Bytes => &scratch.window,
    }
}

/// The pages of the window that a claim holds, as runs.
fn runs_of(claim: &Claim) -> impl Iterator<Item = Range<u64>> + use<> {
    let mut left = claim.pages;
    std::iter::from_fn(move || {
        let start = left.trailing_zeros();
        if start >= WINDOW_PAGES_BITS {
            return None;
        }
        let length = (left >> start).trailing_ones();
        let run = start..start + length;
        // Clears the run; shifting by all sixteen bits would not.
        left &= u16::MAX.checked_shl(run.end).unwrap_or(0);
        Some(u64::from(run.start)..u64::from(run.end))
    })
}

fn for_each_page(claims: &[Claim], mut act: impl FnMut(PageIndex)) {
    for claim in claims {
        let window = claim.place.image.page().window();
        for run in runs_of(claim) {
            run.for_each(|page| act(PageIndex(window.0 * WINDOW_PAGES + page)));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(pages: u16) -> Claim {
        Claim {
            place: Mapping {
                hva: Hva(0x10000),
                image: ImageOffset(3 * WINDOW_BYTES),
                bytes: WINDOW_BYTES,
            },
            pages,
        }
    }

    proptest! {
        #[test]
        fn the_runs_of_a_claim_are_its_pages(pages: u16) {
            let mut seen = 0_u16;
            let mut last_end = None;
            for run in runs_of(&claim(pages)) {
                prop_assert!(last_end.is_none_or(|end| end < run.start));
                last_end = Some(run.end);
                run.for_each(|page| seen |= 1 << page);
            }
            prop_assert_eq!(seen, pages);
            let mut count = 0;
            for_each_page(&[claim(pages)], |page| {
                count += 1;
                assert_eq!(page.window(), WindowIndex(3));
            });
            prop_assert_eq!(count, pages.count_ones());
        }
    }
}
