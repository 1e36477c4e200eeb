//! What a snapshot does to the machine the agent runs on, behind one trait.
//!
//! [`Guest`] is the real one and does all of it to the whole machine. [`Elsewhere`] stands in
//! wherever the agent runs outside a guest, so that no test ever steps the clock of its host.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use jiff::Timestamp;

use super::identity;
use super::lineage::Generation;
use crate::boot::{self, BootError, name, network};
use crate::environment::Identity;
use crate::metrics::Memory;
use crate::{clock, sys};

/// Tells programs in the guest which life it is in; its text is as long for every life.
pub const GENERATION_FILE: &str = "/run/wrenn/generation";
/// Tells what memory is used for.
const MEMORY: &str = "/proc/meminfo";
/// Drops what the kernel keeps of files, when written to.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// The page cache, and not the directory entries with it: those are small and cost most to regain.
const DROP_PAGE_CACHE: &str = "1";

/// The machine under the agent. All calls may block.
pub trait Machine: fmt::Debug + Send + Sync {
    /// Writes all dirty data to the disks.
    fn sync(&self);

    /// What memory there is and what of it caches the disk.
    ///
    /// # Errors
    /// What the kernel said.
    fn memory(&self) -> io::Result<Memory> {
        let text = fs::read_to_string(MEMORY)?;
        Ok(Memory::parse(&text))
    }

    /// Gives memory back that only caches the disk.
    ///
    /// # Errors
    /// What the kernel said.
    fn reclaim(&self) -> io::Result<()>;

    /// Stops all writing to the root disk: whoever writes waits.
    ///
    /// # Errors
    /// What the kernel said; a disk that is frozen already is no error.
    fn freeze_disk(&self) -> io::Result<()>;

    /// Lets the root disk be written again.
    ///
    /// # Errors
    /// What the kernel said; a disk that is not frozen is no error.
    fn thaw_disk(&self) -> io::Result<()>;

    /// Steps the wall clock to `now`.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_clock(&self, now: Timestamp) -> io::Result<()>;

    /// Mixes `seed` into the kernel's random numbers and makes it reseed.
    ///
    /// # Errors
    /// What the kernel said.
    fn add_entropy(&self, seed: &[u8]) -> io::Result<()>;

    /// Gives the machine its name.
    ///
    /// # Errors
    /// [`BootError`] names what was refused.
    fn set_hostname(&self, hostname: &str) -> Result<(), BootError>;

    /// Writes down whose sandbox this is.
    ///
    /// # Errors
    /// [`BootError::File`] names the file.
    fn publish(&self, identity: &Identity) -> Result<(), BootError>;

    /// Gives the machine another machine id.
    ///
    /// # Errors
    /// [`BootError::File`] names the file.
    fn renew_machine_id(&self, machine_id: &str) -> Result<(), BootError>;

    /// Removes the SSH host keys; tells how many files that were.
    ///
    /// # Errors
    /// [`BootError::File`] names the file.
    fn remove_ssh_host_keys(&self) -> Result<usize, BootError>;

    /// Forgets the hardware addresses of others, which may be other machines by now.
    ///
    /// # Errors
    /// What the kernel said.
    fn forget_neighbours(&self) -> io::Result<()>;

    /// Tells programs that a new life has begun.
    ///
    /// # Errors
    /// [`BootError::File`] names the file.
    fn announce(&self, generation: Generation) -> Result<(), BootError>;
}

/// The guest that this agent is the first process of.
#[derive(Clone, Copy, Debug)]
pub struct Guest;

impl Machine for Guest {
    fn sync(&self) {
        nix::unistd::sync();
    }

    fn reclaim(&self) -> io::Result<()> {
        fs::write(DROP_CACHES, DROP_PAGE_CACHE)
    }

    fn freeze_disk(&self) -> io::Result<()> {
        sys::freeze_file_system(&File::open("/")?)
    }

    fn thaw_disk(&self) -> io::Result<()> {
        sys::thaw_file_system(&File::open("/")?)
    }

    fn set_clock(&self, now: Timestamp) -> io::Result<()> {
        clock::set(now).map_err(io::Error::from)
    }

    fn add_entropy(&self, seed: &[u8]) -> io::Result<()> {
        sys::add_entropy(seed)
    }

    fn set_hostname(&self, hostname: &str) -> Result<(), BootError> {
        name::set(hostname)
    }

    fn publish(&self, identity: &Identity) -> Result<(), BootError> {
        boot::identity::publish(identity)
    }

    fn renew_machine_id(&self, machine_id: &str) -> Result<(), BootError> {
        identity::renew_machine_id(Path::new("/"), machine_id)
    }

    fn remove_ssh_host_keys(&self) -> Result<usize, BootError> {
        identity::remove_ssh_host_keys(Path::new("/"))
    }

    fn forget_neighbours(&self) -> io::Result<()> {
        network::forget_neighbours()
    }

    fn announce(&self, generation: Generation) -> Result<(), BootError> {
        announce_in(Path::new(GENERATION_FILE), generation)
    }
}

/// Writes the file in place and in one piece: who watches the file by inotify stays on it, and
/// nobody reads half of it.
pub(crate) fn announce_in(path: &Path, generation: Generation) -> Result<(), BootError> {
    let shown = path.to_string_lossy();
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(BootError::file("create", parent.to_string_lossy()))?;
    }
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(BootError::file("open", shown.clone()))?;
    let text = format!("{generation}\n");
    file.write_all_at(text.as_bytes(), 0)
        .map_err(BootError::file("write", shown))
}

/// Any machine that is not ours to change.
#[derive(Clone, Copy, Debug)]
pub struct Elsewhere;

impl Machine for Elsewhere {
    fn sync(&self) {
        nix::unistd::sync();
    }

    fn reclaim(&self) -> io::Result<()> {
        Ok(())
    }

    fn freeze_disk(&self) -> io::Result<()> {
        Ok(())
    }

    fn thaw_disk(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_clock(&self, _now: Timestamp) -> io::Result<()> {
        Ok(())
    }

    fn add_entropy(&self, _seed: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn set_hostname(&self, _hostname: &str) -> Result<(), BootError> {
        Ok(())
    }

    fn publish(&self, _identity: &Identity) -> Result<(), BootError> {
        Ok(())
    }

    fn renew_machine_id(&self, _machine_id: &str) -> Result<(), BootError> {
        Ok(())
    }

    fn remove_ssh_host_keys(&self) -> Result<usize, BootError> {
        Ok(0)
    }

    fn forget_neighbours(&self) -> io::Result<()> {
        Ok(())
    }

    fn announce(&self, _generation: Generation) -> Result<(), BootError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_file_keeps_its_inode_and_length() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("wrenn/generation");
        announce_in(&path, Generation::BOOT).expect("written");
        let before = fs::metadata(&path).expect("there");
        let text = "00112233445566778899aabbccddeeff";
        announce_in(&path, text.parse().expect("a generation")).expect("written");
        let after = fs::metadata(&path).expect("there");
        assert_eq!(
            fs::read_to_string(&path).expect("read"),
            format!("{text}\n")
        );
        assert_eq!((before.ino(), before.len()), (after.ino(), after.len()));
    }
}
