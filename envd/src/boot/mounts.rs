//! File systems, and the step from the initramfs to the root disk.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::BootError;

/// Where the root disk is mounted before it becomes the root.
const NEW_ROOT: &str = "/newroot";
/// The only file system templates are made with.
const ROOT_TYPE: &str = "ext4";
/// How long the root disk may take to appear. Emulated guests on a loaded host are slow; a disk
/// that is absent for this long is not coming.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often it is looked for.
const DEVICE_POLL: Duration = Duration::from_millis(2);

/// One file system to mount.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const fn at(kind: &'static str, target: &'static str, data: &'static str) -> Mount {
    let safe = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
    Mount {
        kind,
        target,
        flags: safe,
        data,
    }
}

impl Mount {
    const fn with(self, flags: MsFlags) -> Self {
        Self { flags, ..self }
    }

    fn mount(&self) -> Result<(), BootError> {
        make_directory(self.target)?;
        mount(
            Some(self.kind),
            self.target,
            Some(self.kind),
            self.flags,
            Some(self.data),
        )
        .map_err(|source| BootError::Mount {
            target: self.target.to_owned(),
            source,
        })
    }
}

fn make_directory(path: &str) -> Result<(), BootError> {
    fs::create_dir_all(path).map_err(BootError::file("create", path))
}

/// Mounts what the kernel itself offers, so that devices, processes and modules can be reached.
///
/// # Errors
/// [`BootError::Mount`] names the place.
pub fn kernel_file_systems() -> Result<(), BootError> {
    let no_exec = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
    for entry in [
        at("devtmpfs", "/dev", "mode=0755").with(MsFlags::MS_NOSUID),
        at("proc", "/proc", "").with(no_exec.union(MsFlags::MS_NODEV)),
        at("sysfs", "/sys", "").with(no_exec.union(MsFlags::MS_NODEV)),
    ] {
        match entry.mount() {
            // A kernel may mount devtmpfs by itself.
            Err(BootError::Mount {
                source: nix::Error::EBUSY,
                ..
            }) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Waits for the root disk, mounts it, and makes it the root of this process and all to come.
///
/// # Errors
/// [`BootError`] names the device or the place.
pub fn switch_root(device: &str) -> Result<(), BootError> {
    wait_for_device(device)?;
    make_directory(NEW_ROOT)?;
    let flags = MsFlags::MS_NOATIME;
    mount(Some(device), NEW_ROOT, Some(ROOT_TYPE), flags, None::<&str>).map_err(|source| {
        BootError::Mount {
            target: format!("{device} as root"),
            source,
        }
    })?;
    for target in ["/dev", "/proc", "/sys"] {
        let moved = format!("{NEW_ROOT}{target}");
        make_directory(&moved)?;
        move_mount(target, &moved)?;
    }
    let entered = chdir(NEW_ROOT).map_err(|source| BootError::Mount {
        target: "/".into(),
        source,
    });
    entered?;
    // What the initramfs still holds would cost memory for ever; this file stays while it runs.
    let _ = fs::remove_file("/init");
    move_mount(".", "/")?;
    let switched = chroot(".").and_then(|()| chdir("/"));
    switched.map_err(|source| BootError::Mount {
        target: "/".into(),
        source,
    })
}

fn move_mount(from: &str, to: &str) -> Result<(), BootError> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(|source| {
        BootError::Mount {
            target: to.to_owned(),
            source,
        }
    })
}

fn wait_for_device(device: &str) -> Result<(), BootError> {
    let began = Instant::now();
    while !Path::new(device).exists() {
        if began.elapsed() > DEVICE_TIMEOUT {
            return Err(BootError::NoRootDevice {
                path: device.into(),
                waited: DEVICE_TIMEOUT,
            });
        }
        thread::sleep(DEVICE_POLL);
    }
    Ok(())
}

/// Mounts what lives in memory only.
///
/// # Errors
/// [`BootError::Mount`] names the place.
pub fn volatile_file_systems() -> Result<(), BootError> {
    let no_exec = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
    for entry in [
        at("tmpfs", "/run", "mode=0755"),
        at("tmpfs", "/tmp", "mode=1777"),
        at("devpts", "/dev/pts", "gid=5,mode=0620,ptmxmode=0666").with(no_exec),
        at("tmpfs", "/dev/shm", "mode=1777"),
    ] {
        entry.mount()?;
    }
    // Without it processes are merely not grouped.
    let cgroups = at("cgroup2", super::cgroup::ROOT, "");
    if let Err(err) = cgroups.with(no_exec.union(MsFlags::MS_NODEV)).mount() {
        crate::log!("{}", crate::log::chain(&err));
    }
    make_directory("/run/lock")?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        // A kernel that made them already did so in the same way.
        let _ = symlink(target, link);
    }
    Ok(())
}
