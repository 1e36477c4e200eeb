//! Which pages of a guest differ from the image it was resumed from.
//!
//! Three sources are put together, for a guest that stands still:
//!
//! - *Written*: the kernel notes the first write to every page that a pager brought
//!   (asynchronous write-protection, Linux 6.7) and lists them through the VMM's page map. A page
//!   that the kernel has unmapped in the meantime is listed too, whether it was written or not.
//! - *There*: only pages that exist in the memory count as written; the others are as they were.
//! - *Given back*: a page that was brought once and is missing now is zero now.
//!
//! Nothing has to be protected before the guest runs: a page does not exist until a pager brings
//! it, and it brings it protected. What a VMM wrote by itself before that counts as written.
//!
//! A kernel that notes nothing, or says so and does not ([`probe`]), leaves the comparison of every
//! existing page with the image. It gives the same answer for some fifty times the work.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno;

use crate::pager::layout::{Hva, Layout, Mapping};
use crate::pager::memory::sealed_memfd;
use crate::pager::pages::PageSet;
use crate::pager::region::{ImageOffset, PAGE_BYTES, PageIndex, Region, WindowIndex, index};
use crate::pager::source::{Content, PageSource, Scratch, SourceError};
use crate::pager::states::StateTable;
use crate::pager::uffd::sys::{
    SCAN_CHECK_ASYNC, SCAN_PROTECT, ScannedRun, SharedBytes, own_userfaultfd, scan_written,
};
use crate::pager::uffd::{Tracking, Uffd};

/// Runs of pages that one call of the kernel lists.
const RUNS: usize = 512;
/// Pages of the probe: one that is written between two that are not.
const PROBE_PAGES: u64 = 3;

/// Why it cannot be told which pages were written. The next snapshot has to be a full one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The kernel refused.
    #[error("{doing}")]
    Kernel {
        /// Which step.
        doing: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The parent image cannot be read.
    #[error("compare with the parent image")]
    Source(#[from] SourceError),
    /// There is no image of what the guest was when it was last sealed.
    #[error("this kernel notes no writes, so there is nothing to start anew")]
    NothingToRearm,
    /// Comparing with the image took too long.
    #[error("compare the guest's memory with its image in time")]
    TooSlow,
}

fn kernel<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> DirtyError {
    move |source| DirtyError::Kernel {
        doing,
        source: source.into(),
    }
}

/// How a tracker knows of writes.
pub enum Evidence {
    /// The kernel's notes, in the page map of the VMM (`/proc/<pid>/pagemap`).
    Notes(File),
    /// The image that the guest was resumed from.
    Parent(Box<dyn PageSource>),
}

/// Tells which pages were written.
pub struct Tracker<'a> {
    /// The guest's memory.
    pub memory: BorrowedFd<'a>,
    /// Where the VMM has mapped it.
    pub layout: &'a Layout,
    /// What was brought.
    pub table: &'a Arc<StateTable>,
    /// How writes are known.
    pub evidence: Evidence,
}

impl Tracker<'_> {
    /// The bytes that may differ from the image the guest was resumed from, or from what it was at
    /// the last [`Tracker::rearm`]: whole pages, in order, none touching the next. The guest must
    /// stand still. Comparing reads all that exists, and is given up at `deadline`.
    ///
    /// # Errors
    /// See [`DirtyError`].
    pub fn written_since_parent(
        &self,
        deadline: Instant,
    ) -> Result<Vec<Range<ImageOffset>>, DirtyError> {
        let region = self.table.region();
        let existing = PageSet::present_in(self.memory, region)
            .map_err(kernel("list the pages of the guest"))?;
        let mut written = match &self.evidence {
            Evidence::Notes(pagemap) => {
                let mut written = PageSet::none(region);
                self.scan(pagemap, SCAN_CHECK_ASYNC, |run| written.insert(run))?;
                written.keep_only(&existing);
                written
            }
            Evidence::Parent(parent) => self.differing(&existing, &**parent, deadline)?,
        };
        add_given_back(&mut written, &existing, self.table);
        Ok(written.runs())
    }

    /// Starts anew: from now on only later writes count. The guest must stand still, and what was
    /// written before must have been listed.
    ///
    /// # Errors
    /// See [`DirtyError`].
    pub fn rearm(&self) -> Result<(), DirtyError> {
        match &self.evidence {
            Evidence::Notes(pagemap) => self.scan(pagemap, SCAN_CHECK_ASYNC | SCAN_PROTECT, |_| ()),
            Evidence::Parent(_) => Err(DirtyError::NothingToRearm),
        }
    }

    fn scan(
        &self,
        pagemap: &File,
        flags: u64,
        mut found: impl FnMut(Range<ImageOffset>),
    ) -> Result<(), DirtyError> {
        for mapping in self.layout.mappings() {
            scan_mapping(pagemap.as_fd(), mapping, flags, &mut found)
                .map_err(kernel("list the written pages"))?;
        }
        Ok(())
    }

    fn differing(
        &self,
        existing: &PageSet,
        parent: &dyn PageSource,
        deadline: Instant,
    ) -> Result<PageSet, DirtyError> {
        let region = self.table.region();
        let mut scratch = Scratch::new().map_err(kernel("make a decoder"))?;
        let memory = File::from(
            self.memory
                .try_clone_to_owned()
                .map_err(kernel("open the guest's memory"))?,
        );
        let mut differing = PageSet::none(region);
        let mut now = vec![0; scratch.window.len()];
        let mut read_last = None;
        for page in existing.iter() {
            let window = page.window();
            let pages = region.pages_of(window);
            let length = index((pages.end - pages.start) * PAGE_BYTES);
            if read_last != Some(window) {
                if Instant::now() >= deadline {
                    return Err(DirtyError::TooSlow);
                }
                memory
                    .read_exact_at(&mut now[..length], window.offset().0)
                    .map_err(kernel("read the guest's memory"))?;
                read_parent(parent, window, &mut scratch)?;
                read_last = Some(window);
            }
            let at = index((page.0 - pages.start) * PAGE_BYTES);
            let same = at..at + index(PAGE_BYTES);
            if now[same.clone()] != scratch.window[same] {
                differing.add(page);
            }
        }
        Ok(differing)
    }
}

/// The bytes that can differ from the image at all: of pages that exist, and of those that were
/// given back. In order, none touching the next.
///
/// # Errors
/// [`DirtyError::Kernel`].
pub fn may_differ(
    memory: BorrowedFd<'_>,
    table: &StateTable,
) -> Result<Vec<Range<ImageOffset>>, DirtyError> {
    let existing = PageSet::present_in(memory, table.region())
        .map_err(kernel("list the pages of the guest"))?;
    let mut all = existing.clone();
    add_given_back(&mut all, &existing, table);
    Ok(all.runs())
}

/// Adds the pages that were brought once and do not exist now.
fn add_given_back(pages: &mut PageSet, existing: &PageSet, table: &StateTable) {
    for page in table.filled().iter() {
        if !existing.contains(page) {
            pages.add(page);
        }
    }
}

fn read_parent(
    parent: &dyn PageSource,
    window: WindowIndex,
    scratch: &mut Scratch,
) -> Result<(), SourceError> {
    if parent.read(window, None, scratch)? == Content::Hole {
        scratch.window.fill(0);
    }
    Ok(())
}

fn scan_mapping(
    pagemap: BorrowedFd<'_>,
    mapping: &Mapping,
    flags: u64,
    found: &mut impl FnMut(Range<ImageOffset>),
) -> Result<(), Errno> {
    let end = mapping.hva.0 + mapping.bytes;
    let mut at = mapping.hva.0;
    let mut runs = [ScannedRun::default(); RUNS];
    while at < end {
        let (count, walked) = scan_written(pagemap, at, end, flags, &mut runs)?;
        for run in &runs[..count] {
            let image = |hva: u64| {
                let within = hva.clamp(mapping.hva.0, end) - mapping.hva.0;
                ImageOffset(mapping.image.0 + within)
            };
            found(image(run.start)..image(run.end));
        }
        if walked <= at {
            // Neither an end nor a step: no kernel does that, and none should make us spin.
            return Err(Errno::EIO);
        }
        at = walked;
    }
    Ok(())
}

/// Finds out how writes can be known on this host, by making one that is known. Needs the right to
/// make a userfaultfd; without it nothing is noted. Takes some 50 µs.
#[must_use]
pub fn probe() -> Tracking {
    match notices_a_write() {
        Ok(true) => Tracking::WriteProtect,
        Ok(false) | Err(_) => Tracking::Compare,
    }
}

fn notices_a_write() -> io::Result<bool> {
    let region = Region::of_bytes(PROBE_PAGES * PAGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    let file = sealed_memfd("wrenn-probe", region.bytes())?;
    let memory = SharedBytes::map(&file, region.bytes())?;
    let mapping = Mapping {
        hva: Hva(memory.address()),
        image: ImageOffset(0),
        bytes: region.bytes(),
    };
    let Ok(uffd) = Uffd::handshake(own_userfaultfd()?, Tracking::WriteProtect) else {
        return Ok(false);
    };
    uffd.register(&mapping)?;
    let filled = uffd.fill(mapping.hva, &vec![7; index(region.bytes())]);
    if filled.bytes != region.bytes() {
        // A page that is not there must not be touched: nobody would bring it.
        return Ok(false);
    }
    let written = PageIndex(1);
    memory.bytes()[index(written.offset().0)].store(8, Ordering::Relaxed);
    let mut seen = PageSet::none(region);
    let pagemap = File::open("/proc/self/pagemap")?;
    scan_mapping(pagemap.as_fd(), &mapping, SCAN_CHECK_ASYNC, &mut |run| {
        seen.insert(run);
    })?;
    Ok(seen.len() == 1 && seen.contains(written))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_decides_by_what_the_kernel_does() {
        let release = nix::sys::utsname::uname().expect("told");
        let release = release.release().to_string_lossy().into_owned();
        let mut numbers = release.split(['.', '-']).map(|word| word.parse::<u32>());
        let (major, minor) = (numbers.next(), numbers.next());
        let (Some(Ok(major)), Some(Ok(minor))) = (major, minor) else {
            panic!("a release: {release}");
        };
        let modern = (major, minor) >= (6, 7);
        assert_eq!(probe() == Tracking::WriteProtect, modern, "{release}");
    }
}
