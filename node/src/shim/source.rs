//! Where the memory of a guest that is restored comes from.
//!
//! A source is asked once, when the VMM is there and waits for the guest's state: nobody has touched
//! the memory yet, and from the moment the state is loaded it will be touched. Either everything is
//! in place by then ([`Eager`]), or whoever brings it watches over the VMM's page faults by then
//! ([`super::paged::Paged`]). One that finds later that a part is nowhere to be had ends the guest ([`MemoryLoss`]): it would
//! wait for that page for ever.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::pager::handle::{Pager, StartPagerError};
use crate::pager::memory::GuestMemory;
use crate::shim::dirty::{AllPresent, DirtyPages, present};
use crate::vmm::Vmm;

/// Why a guest's memory could not be had.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MemorySourceError {
    /// The image is not there, or the disk refuses to read it.
    #[error("read the memory image {path:?}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The image is of another guest.
    #[error("the memory image {path:?} has {found} bytes, and the guest has {wanted}")]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The guest's memory.
        wanted: u64,
    },
    /// It did not come in time.
    #[error("the memory was not there in time")]
    TimedOut,
    /// Nobody came to serve the guest's page faults.
    #[error("start the guest's pager")]
    Pager(#[from] StartPagerError),
}

/// Memory that is in its place, or comes as it is touched.
pub struct Brought {
    /// Who knows which pages the guest writes from now on.
    pub dirty: Box<dyn DirtyPages>,
    /// Who brings the pages; `None` where all were brought.
    pub pager: Option<Arc<Pager>>,
}

/// Ends a guest of whose memory a part is nowhere to be had.
#[derive(Clone)]
pub struct MemoryLoss {
    vmm: Arc<dyn Vmm>,
    reason: Arc<OnceLock<String>>,
}

impl MemoryLoss {
    /// The end of the guest of `vmm`, which has not come.
    #[must_use]
    pub fn new(vmm: Arc<dyn Vmm>) -> Self {
        Self {
            vmm,
            reason: Arc::default(),
        }
    }

    /// Kills the VMM. The first reason given is the one that people are told.
    pub fn end_guest(&self, reason: &str) {
        self.reason.get_or_init(|| reason.to_owned());
        // One that cannot be killed waits for its page, and does no harm.
        let _tried = self.vmm.kill();
    }

    /// Why the guest was ended, if it was.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }
}

/// Brings the memory of a guest that is restored.
pub trait MemorySource: Send + Sync {
    /// Does what needs no VMM. Called once, right before that is started, and best effort: whatever
    /// is wrong comes up again.
    fn begin(&self) {}

    /// Sees to it that whatever `vmm` reads of `memory` is the guest's. What it returns
    /// must live as long as the VMM. `loss` is for a part that later turns out not to be had.
    ///
    /// # Errors
    /// See [`MemorySourceError`]. The VMM is killed, and nothing of the source may be left.
    fn prepare(
        &self,
        vmm: &dyn Vmm,
        memory: &GuestMemory,
        loss: &MemoryLoss,
        deadline: Instant,
    ) -> Result<Brought, MemorySourceError>;
}

/// Copies a flat image, as long as the memory and with holes for zeros, before the guest runs. Its
/// next save is a full one.
#[derive(Clone, Debug)]
pub struct Eager {
    image: PathBuf,
}

impl Eager {
    /// A source of what is in `image`.
    #[must_use]
    pub fn new(image: &Path) -> Self {
        Self {
            image: image.to_owned(),
        }
    }

    fn failed(&self, source: io::Error) -> MemorySourceError {
        MemorySourceError::Image {
            path: self.image.clone(),
            source,
        }
    }
}

impl MemorySource for Eager {
    fn prepare(
        &self,
        _vmm: &dyn Vmm,
        memory: &GuestMemory,
        _loss: &MemoryLoss,
        deadline: Instant,
    ) -> Result<Brought, MemorySourceError> {
        let failed = |source| self.failed(source);
        let image = File::open(&self.image).map_err(failed)?;
        let (found, wanted) = (
            image.metadata().map_err(failed)?.len(),
            memory.region().bytes(),
        );
        if found != wanted {
            return Err(MemorySourceError::OtherSize {
                path: self.image.clone(),
                found,
                wanted,
            });
        }
        let into = memory.as_fd().try_clone_to_owned().map_err(failed)?;
        let into = File::from(into);
        for range in present(image.as_fd(), memory.region()).map_err(failed)? {
            // Piece by piece, so that a large image does not make us late.
            for start in range.clone().step_by(COPY_BYTES) {
                if Instant::now() >= deadline {
                    return Err(MemorySourceError::TimedOut);
                }
                let length = (range.end - start).min(COPY_BYTES as u64);
                copy(&image, &into, start, length).map_err(failed)?;
            }
        }
        Ok(Brought {
            dirty: Box::new(AllPresent),
            pager: None,
        })
    }
}

/// Copied between two looks at the clock: some 10 ms of work.
const COPY_BYTES: usize = 16 << 20;

/// Copies within the kernel. Both files are ours alone, so moving their positions harms nobody.
fn copy(mut from: &File, mut into: &File, start: u64, length: u64) -> io::Result<()> {
    from.seek(SeekFrom::Start(start))?;
    into.seek(SeekFrom::Start(start))?;
    let copied = io::copy(&mut io::Read::take(from, length), &mut into)?;
    if copied == length {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use proto::units::Mib;

    use super::*;
    use crate::vmm::fake::FakeVmm;

    fn no_loss() -> MemoryLoss {
        MemoryLoss::new(Arc::new(FakeVmm::stubborn()))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn image(size: Mib, written: &[(u64, &[u8])]) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().expect("tempfile");
        image.as_file().set_len(size.bytes()).expect("sparse");
        for (at, bytes) in written {
            image.as_file().write_all_at(bytes, *at).expect("written");
        }
        image
    }

    #[test]
    fn an_image_is_copied_and_its_holes_stay_holes() {
        let size = Mib(64);
        let last = size.bytes() - 1;
        let image = image(size, &[(5, b"first"), (33 << 20, b"middle"), (last, b"!")]);
        let memory = GuestMemory::create(size).expect("memfd");
        let dirty =
            Eager::new(image.path()).prepare(&FakeVmm::stubborn(), &memory, &no_loss(), soon());
        let dirty = dirty
            .expect("copied")
            .dirty
            .list(&memory, soon())
            .expect("listed");
        assert!(dirty.bytes() <= 3 * 64 * 1024, "{}", dirty.bytes());
        let copied = File::from(memory.as_fd().try_clone_to_owned().expect("a clone"));
        for (at, wanted) in [(5, &b"first"[..]), (33 << 20, b"middle"), (last, b"!")] {
            let mut found = vec![0; wanted.len()];
            copied.read_exact_at(&mut found, at).expect("read");
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn an_image_of_another_guest_or_none_is_refused_by_name() {
        let memory = GuestMemory::create(Mib(2)).expect("memfd");
        let other = image(Mib(1), &[]);
        let refused =
            Eager::new(other.path()).prepare(&FakeVmm::stubborn(), &memory, &no_loss(), soon());
        assert!(matches!(
            refused.err(),
            Some(MemorySourceError::OtherSize { .. })
        ));
        let refused = Eager::new(Path::new("/nonexistent")).prepare(
            &FakeVmm::stubborn(),
            &memory,
            &no_loss(),
            soon(),
        );
        assert!(matches!(
            refused.err(),
            Some(MemorySourceError::Image { .. })
        ));
    }

    #[test]
    fn a_guest_whose_memory_is_lost_is_killed_for_the_first_reason_given() {
        let vmm = Arc::new(FakeVmm::stubborn());
        let loss = MemoryLoss::new(vmm.clone());
        assert_eq!(loss.reason(), None);
        loss.clone().end_guest("no holder");
        loss.end_guest("and another");
        assert_eq!(loss.reason(), Some("no holder"));
        assert_eq!(vmm.told(), ["kill", "kill"]);
    }

    #[test]
    fn a_copy_ends_at_its_deadline() {
        let image = image(Mib(1), &[(0, b"x")]);
        let memory = GuestMemory::create(Mib(1)).expect("memfd");
        let late = Eager::new(image.path()).prepare(
            &FakeVmm::stubborn(),
            &memory,
            &no_loss(),
            Instant::now(),
        );
        assert!(matches!(late.err(), Some(MemorySourceError::TimedOut)));
    }
}
