//! Saving a guest, and letting it go on: what a shim does to its virtual CPUs by order of the daemon.
//!
//! ```text
//! running --Save--> saving --> saved --Thaw--> running
//!                      `--failed--> running, or still if it cannot go on
//! restored: still --Thaw--> running
//! ```
//!
//! A save leaves three things behind, all as of one instant: the device state (`state`), the list of
//! pages to be read (`dirty`), and a guest that does not move, so that its memory and its disk can
//! be read by whoever wants to. The files get their names together at the end, when both are whole
//! and on the disk. Nothing is undone by the death of the daemon: a later one finds the guest
//! saved, and either goes on from there (`Save` answers the same again) or lets it go on.
//!
//! The lease stands above all this and knows nothing of it: it stops, lets go on and kills the
//! *process*, this room the virtual CPUs in it. A saved guest whose lease ends is frozen and killed
//! like any other; one that is frozen is neither saved nor let go on, since its VMM hears nothing.
//!
//! One order is carried out at a time, and to its end, whether or not the one who gave it still
//! listens.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::wire::shim as wire;

use crate::pager::memory::GuestMemory;
use crate::shim::dirty::{Basis, DirtyList, DirtyPages, ListDirtyError};
use crate::shim::files::{self, Draft};
use crate::shim::freeze::Frozen;
use crate::shim::state::StateFile;
use crate::vmm::{Vmm, VmmError};

/// Longest that a guest may be told to stand still for a save.
const MAX_SAVE: Duration = Duration::from_secs(600);
/// Longest wait for a VMM to let its guest go on: it opens the disk's tables again.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a guest was not saved.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its VMM is stopped, and would not hear.
    #[error("the guest is frozen, because its node has no lease")]
    Frozen,
    /// There is nothing new to save: it was restored, or could not go on after a save.
    #[error("the guest stands still: it must go on before it is saved")]
    Still,
    /// The VMM could not.
    #[error("save the guest")]
    Vmm(#[from] VmmError),
    /// Nobody knows what to read of its memory.
    #[error("list the guest's memory")]
    Dirty(#[from] ListDirtyError),
    /// The disk refused.
    #[error("write the file {name:?}")]
    Disk {
        /// Which.
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a guest does not go on.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ThawError {
    /// Its VMM is stopped, and would not hear.
    #[error("the guest is frozen, because its node has no lease")]
    Frozen,
    /// The VMM could not.
    #[error("let the guest go on")]
    Vmm(#[from] VmmError),
}

/// What a guest's virtual CPUs do by order of the daemon.
#[derive(Clone, Debug, PartialEq)]
pub enum Stand {
    /// They run.
    Running,
    /// They are being stopped, or have been, for a save that is under way.
    Saving,
    /// They stand still, and this was saved.
    Saved(Box<wire::Saved>),
    /// They stand still.
    Still,
}

impl From<&Stand> for wire::Stand {
    fn from(stand: &Stand) -> Self {
        match stand {
            Stand::Running => Self::Running,
            Stand::Saving => Self::Saving,
            Stand::Saved(_) => Self::Saved,
            Stand::Still => Self::Still,
        }
    }
}

/// What a guest is saved from.
pub struct Saveable {
    /// Its VMM.
    pub vmm: Arc<dyn Vmm>,
    /// Whether the lease has stopped that.
    pub frozen: Arc<Frozen>,
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// Who knows what it has written of that.
    pub dirty: Box<dyn DirtyPages>,
    /// Its directory.
    pub dir: PathBuf,
}

/// The daemon's hand on a guest.
pub struct Saver {
    guest: Saveable,
    /// Changed by whoever has the turn.
    stand: Mutex<Stand>,
    /// Held by whoever carries out an order.
    turn: Mutex<()>,
}

impl Saver {
    /// Puts `guest`, which stands as `stand` says, under the daemon's orders.
    #[must_use]
    pub fn new(guest: Saveable, stand: Stand) -> Self {
        Self {
            guest,
            stand: Mutex::new(stand),
            turn: Mutex::default(),
        }
    }

    /// The guest's VMM.
    #[must_use]
    pub fn vmm(&self) -> &dyn Vmm {
        &*self.guest.vmm
    }

    /// Its sandbox's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.guest.dir
    }

    /// Whether the lease has stopped the guest.
    #[must_use]
    pub fn frozen(&self) -> &Frozen {
        &self.guest.frozen
    }

    /// How much of the guest's memory this host holds.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.guest.memory.resident_bytes().unwrap_or(0)
    }

    /// What the guest does.
    #[must_use]
    pub fn stand(&self) -> Stand {
        self.lock().clone()
    }

    /// Saves the guest; it may stand still for at most `timeout` before that is done. A guest that
    /// is saved is not saved again: the answer is the same. `since_resume` says that what it was
    /// sealed as last is lost, so that its pages are listed as of before that.
    ///
    /// # Errors
    /// See [`SaveError`]. The guest goes on; [`Self::stand`] says if it does not.
    pub fn save(&self, timeout: Duration, since_resume: bool) -> Result<wire::Saved, SaveError> {
        let _turn = self.take_turn();
        match self.stand() {
            Stand::Running => {}
            Stand::Saved(saved) => return Ok(*saved),
            Stand::Still | Stand::Saving => return Err(SaveError::Still),
        }
        if self.guest.frozen.get() {
            return Err(SaveError::Frozen);
        }
        self.set(Stand::Saving);
        let saved = self.write(Instant::now() + timeout.min(MAX_SAVE), since_resume);
        match &saved {
            Ok(saved) => self.set(Stand::Saved(Box::new(saved.clone()))),
            Err(_) => {
                self.set(Stand::Still);
                // If it fails too the daemon sees it stand still, and orders it to go on.
                let _tried = self.resume();
            }
        }
        saved
    }

    /// Lets the guest go on. One that runs is left in peace. `sealed` says that what it was saved as is
    /// kept, and that later writes alone are to be listed next time.
    ///
    /// # Errors
    /// See [`ThawError`]. The guest may go on later all the same; asking again is no harm.
    pub fn thaw(&self, sealed: bool) -> Result<(), ThawError> {
        let _turn = self.take_turn();
        let stand = self.stand();
        if stand == Stand::Running {
            return Ok(());
        }
        if self.guest.frozen.get() {
            return Err(ThawError::Frozen);
        }
        // Of no other guest was anything listed that it has not changed since.
        if sealed && matches!(stand, Stand::Saved(_)) {
            self.guest.dirty.sealed();
        }
        self.set(Stand::Still);
        Ok(self.resume()?)
    }

    fn resume(&self) -> Result<(), VmmError> {
        self.guest.vmm.resume(Instant::now() + THAW_TIMEOUT)?;
        self.set(Stand::Running);
        Ok(())
    }

    fn write(&self, deadline: Instant, since_resume: bool) -> Result<wire::Saved, SaveError> {
        let Saveable {
            vmm,
            memory,
            dirty,
            dir,
            ..
        } = &self.guest;
        let disk = |name| move |source| SaveError::Disk { name, source };
        let began = Instant::now();
        let mut draft = Draft::create(dir, files::STATE).map_err(disk(files::STATE))?;
        vmm.save_state(draft.file().as_fd(), deadline)?;
        let state = StateFile::of_draft(dir, &mut draft).map_err(disk(files::STATE))?;
        let saved = Instant::now();
        let list = match since_resume {
            true => dirty.list_since_resume(memory, deadline)?,
            false => dirty.list(memory, deadline)?,
        };
        let listed = Instant::now();
        self.keep(draft, &list)?;
        Ok(wire::Saved {
            shim_pid: std::process::id(),
            memory_fd: memory.as_fd().as_raw_fd().unsigned_abs(),
            memory_bytes: memory.region().bytes(),
            state_bytes: state.bytes,
            state_digest: state.digest.as_bytes().to_vec(),
            dirty_bytes: list.bytes(),
            rest_is_zero: list.basis() == Basis::Zeros,
            state_us: micros(saved - began),
            dirty_us: micros(listed - saved),
            sync_us: micros(listed.elapsed()),
        })
    }

    /// Gives both files their names once both are on the disk.
    fn keep(&self, state: Draft, list: &DirtyList) -> Result<(), SaveError> {
        let disk = |name| move |source| SaveError::Disk { name, source };
        let dir = &self.guest.dir;
        let dirty = list.draft(dir).map_err(disk(files::DIRTY))?;
        state.sync().map_err(disk(files::STATE))?;
        state.keep().map_err(disk(files::STATE))?;
        dirty.keep().map_err(disk(files::DIRTY))?;
        files::sync_dir(dir).map_err(disk(files::STATE))
    }

    fn set(&self, stand: Stand) {
        *self.lock() = stand;
    }

    fn lock(&self) -> MutexGuard<'_, Stand> {
        self.stand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `took`, as the wire carries it.
pub(super) fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicU32, Ordering};

    use proto::units::Mib;

    use super::*;
    use crate::pager::region::Region;
    use crate::shim::dirty::AllPresent;
    use crate::vmm::fake::{self, FakeVmm};

    const LONG: Duration = Duration::from_secs(60);

    struct Guest {
        saver: Saver,
        vmm: Arc<FakeVmm>,
        frozen: Arc<Frozen>,
        home: tempfile::TempDir,
    }

    fn guest(stand: Stand, dirty: Box<dyn DirtyPages>) -> Guest {
        let home = tempfile::tempdir().expect("tempdir");
        let (vmm, frozen) = (Arc::new(FakeVmm::stubborn()), Arc::new(Frozen::default()));
        let saveable = Saveable {
            vmm: vmm.clone(),
            frozen: Arc::clone(&frozen),
            memory: Arc::new(GuestMemory::create(Mib(1)).expect("memfd")),
            dirty,
            dir: home.path().to_owned(),
        };
        Guest {
            saver: Saver::new(saveable, stand),
            vmm,
            frozen,
            home,
        }
    }

    fn running() -> Guest {
        guest(Stand::Running, Box::new(AllPresent))
    }

    fn files_in(home: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(home.path()).expect("listable");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<String> = names.map(|it| it.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_saved_guest_has_its_two_files_and_stands_still_until_it_is_let_go_on() {
        let Guest {
            saver, vmm, home, ..
        } = running();
        let saved = saver.save(LONG, false).expect("saved");
        assert_eq!(saver.stand(), Stand::Saved(Box::new(saved.clone())));
        assert_eq!(files_in(&home), [files::DIRTY, files::STATE]);
        let state = fs::read(home.path().join(files::STATE)).expect("readable");
        assert_eq!(state, fake::STATE);
        assert_eq!(saved.state_digest, blake3::hash(&state).as_bytes());
        let list = DirtyList::read(home.path(), Region::new(Mib(1))).expect("readable");
        assert_eq!(
            (list.bytes(), saved.dirty_bytes, saved.rest_is_zero),
            (0, 0, true)
        );
        saver.thaw(false).expect("goes on");
        saver.thaw(false).expect("and again");
        assert_eq!(saver.stand(), Stand::Running);
        assert_eq!(vmm.told(), ["save", "resume"]);
    }

    #[test]
    fn a_saved_guest_is_not_saved_again_and_gives_the_same_answer() {
        let Guest {
            saver,
            vmm,
            home: _home,
            ..
        } = running();
        let first = saver.save(LONG, false).expect("saved");
        assert_eq!(saver.save(LONG, false).expect("known"), first);
        assert_eq!(vmm.told(), ["save"]);
    }

    #[test]
    fn a_save_that_fails_lets_the_guest_go_on_and_leaves_no_file() {
        let Guest {
            saver, vmm, home, ..
        } = running();
        vmm.refuse(&["save"]);
        let failed = saver.save(LONG, false);
        assert!(matches!(failed, Err(SaveError::Vmm(_))), "{failed:?}");
        assert_eq!(saver.stand(), Stand::Running);
        assert_eq!(vmm.told(), ["save", "resume"]);
        assert!(files_in(&home).is_empty());
        vmm.refuse(&[]);
        saver.save(LONG, false).expect("the next one works");
    }

    #[test]
    fn a_guest_that_cannot_go_on_after_a_failed_save_is_known_to_stand_still() {
        let Guest {
            saver,
            vmm,
            home: _home,
            ..
        } = running();
        vmm.refuse(&["save", "resume"]);
        assert!(saver.save(LONG, false).is_err());
        assert_eq!(saver.stand(), Stand::Still);
        assert!(matches!(saver.save(LONG, false), Err(SaveError::Still)));
        assert!(saver.thaw(false).is_err());
        vmm.refuse(&[]);
        saver.thaw(false).expect("now it goes on");
        assert_eq!(saver.stand(), Stand::Running);
    }

    /// Counts how often it is told of a seal.
    #[derive(Clone, Default)]
    struct Told(Arc<AtomicU32>);

    impl DirtyPages for Told {
        fn list(&self, memory: &GuestMemory, at: Instant) -> Result<DirtyList, ListDirtyError> {
            AllPresent.list(memory, at)
        }

        fn sealed(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn lists_begin_anew_only_when_a_guest_goes_on_that_was_sealed_as_it_stands() {
        let told = Told::default();
        let Guest {
            saver, home: _home, ..
        } = guest(Stand::Still, Box::new(told.clone()));
        saver.thaw(true).expect("goes on");
        saver.thaw(true).expect("runs already");
        assert_eq!(told.0.load(Ordering::Relaxed), 0, "nothing was saved");
        saver.save(LONG, false).expect("saved");
        saver.thaw(false).expect("goes on without a seal");
        assert_eq!(told.0.load(Ordering::Relaxed), 0, "the list was not read");
        saver.save(LONG, false).expect("saved");
        saver.thaw(true).expect("goes on");
        saver.thaw(true).expect("and again");
        assert_eq!(told.0.load(Ordering::Relaxed), 1);
    }

    /// Of a list that nobody can make.
    struct Broken;

    impl DirtyPages for Broken {
        fn list(&self, _: &GuestMemory, _: Instant) -> Result<DirtyList, ListDirtyError> {
            Err(ListDirtyError::Kernel(io::ErrorKind::Unsupported.into()))
        }
    }

    #[test]
    fn a_guest_whose_pages_cannot_be_listed_or_whose_disk_is_gone_goes_on() {
        let broken = guest(Stand::Running, Box::new(Broken));
        let failed = broken.saver.save(LONG, false);
        assert!(matches!(failed, Err(SaveError::Dirty(_))), "{failed:?}");
        assert!(files_in(&broken.home).is_empty());
        let gone = running();
        fs::remove_dir(gone.home.path()).expect("removed");
        let failed = gone.saver.save(LONG, false);
        assert!(matches!(failed, Err(SaveError::Disk { .. })), "{failed:?}");
        for saver in [broken.saver, gone.saver] {
            assert_eq!(saver.stand(), Stand::Running);
        }
    }

    #[test]
    fn a_frozen_guest_is_neither_saved_nor_let_go_on() {
        let Guest {
            saver,
            vmm,
            frozen,
            home: _home,
        } = running();
        frozen.set(true);
        assert!(matches!(saver.save(LONG, false), Err(SaveError::Frozen)));
        assert_eq!(saver.stand(), Stand::Running);
        frozen.set(false);
        saver.save(LONG, false).expect("saved");
        frozen.set(true);
        assert!(matches!(saver.thaw(false), Err(ThawError::Frozen)));
        assert!(matches!(saver.stand(), Stand::Saved(_)));
        assert_eq!(vmm.told(), ["save"]);
    }

    #[test]
    fn a_restored_guest_stands_still_until_it_is_let_go_on() {
        let Guest {
            saver,
            vmm,
            home: _home,
            ..
        } = guest(Stand::Still, Box::new(AllPresent));
        assert!(matches!(saver.save(LONG, false), Err(SaveError::Still)));
        saver.thaw(false).expect("goes on");
        saver.save(LONG, false).expect("and can be saved");
        assert_eq!(vmm.told(), ["resume", "save"]);
    }
}
