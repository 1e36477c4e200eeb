//! Namespaces: making, holding, entering and letting go of them; and the one file of this room
//! with `unsafe` in it (the tap's ioctls).
//!
//! A namespace is held by a bind mount of its `/proc/…/ns/net` on a file in `/run/netns`, so it
//! outlives every process, as with `ip netns`. Entering one changes the thread, for good: so the
//! work is done on a fresh thread that ends afterwards, never on one of the runtime's.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::panic;
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::slot::NETNS_DIR;

/// The namespace of the thread that opens it.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// Prepares `/run/netns` as `ip netns` does: a shared mount of its own.
///
/// Without it the first `ip netns add` on the host would mount the directory over itself, and
/// our namespaces would be held twice, once out of reach. Done again, it does nothing.
pub(super) fn prepare_dir() -> io::Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    let share = || {
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(None::<&str>, NETNS_DIR, None::<&str>, flags, None::<&str>)
    };
    match share() {
        // Not a mount point yet.
        Err(Errno::EINVAL) => {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(
                Some(NETNS_DIR),
                NETNS_DIR,
                None::<&str>,
                flags,
                None::<&str>,
            )?;
            Ok(share()?)
        }
        done => Ok(done?),
    }
}

/// Takes the name: an empty file that a namespace will be mounted on.
pub(super) fn reserve(path: &Path) -> io::Result<()> {
    File::create_new(path).map(drop)
}

/// Makes a namespace and holds it at `path`, which [`reserve`] made.
pub(super) fn create(path: &Path) -> io::Result<()> {
    on_fresh_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let flags = MsFlags::MS_BIND;
        mount(Some(OWN_NETNS), path, None::<&str>, flags, None::<&str>)?;
        Ok(())
    })
}

/// Lets go of the namespace at `path`, however much of it there is.
///
/// It ends when no process and no open descriptor is left in it either, in the background.
pub(super) fn release(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(err) => return Err(err.into()),
        }
    }
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

/// Runs `work` inside the namespace held at `path`, on a thread that ends with it.
///
/// Blocks: call it on a blocking thread. Sockets, taps and child processes made by `work` belong
/// to the namespace for life, and work anywhere afterwards. A child that asked for a signal at
/// its parent's death (`PR_SET_PDEATHSIG`) gets it when this thread ends: do not ask.
///
/// # Errors
/// If the namespace is gone or may not be entered, or whatever `work` returns.
pub fn enter<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    on_fresh_thread(|| {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn on_fresh_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, work)?;
        worker
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

/// The ioctls of `/dev/net/tun`. Numbers are `_IOW('T', n, int)` whatever they really take.
pub(super) mod tun {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;

    use libc::{c_int, c_ulong};

    const SET_IFF: u8 = 202;
    const SET_PERSIST: u8 = 203;
    const SET_OWNER: u8 = 204;

    nix::ioctl_readwrite_bad!(
        set_iff,
        nix::request_code_write!(b'T', SET_IFF, size_of::<c_int>()),
        libc::ifreq
    );
    nix::ioctl_write_int_bad!(
        set_persist,
        nix::request_code_write!(b'T', SET_PERSIST, size_of::<c_int>())
    );
    nix::ioctl_write_int_bad!(
        set_owner,
        nix::request_code_write!(b'T', SET_OWNER, size_of::<c_int>())
    );
    // The same numbers as in <linux/if_tun.h>, checked by the compiler.
    const _: () = assert!(nix::request_code_write!(b'T', SET_IFF, 4) as c_ulong == 0x4004_54ca);

    /// Binds the open device to the interface that `request` names, making it if need be.
    pub(in crate::net) fn attach(device: &File, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the descriptor is open for the call, and `request` is a whole ifreq, ours alone,
        // that the kernel reads, writes back to within its size, and does not keep.
        unsafe { set_iff(device.as_raw_fd(), request) }?;
        Ok(())
    }

    /// Lets the interface outlive the descriptor.
    pub(in crate::net) fn keep(device: &File) -> io::Result<()> {
        // SAFETY: the descriptor is open for the call; the argument is a plain number.
        unsafe { set_persist(device.as_raw_fd(), 1) }?;
        Ok(())
    }

    /// Lets `uid`, besides the network administrator, attach to the interface.
    pub(in crate::net) fn give_to(device: &File, uid: c_int) -> io::Result<()> {
        // SAFETY: the descriptor is open for the call; the argument is a plain number.
        unsafe { set_owner(device.as_raw_fd(), uid) }?;
        Ok(())
    }
}
