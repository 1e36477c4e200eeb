//! Another root file system in the place of the one the guest has started from.
//!
//! ```text
//! /.import/root/*  what is to be there     /*  what is there, but for what is mounted over
//! every process but us ends > /* to /.import/old > /.import/root/* to / > /.import goes
//!                           > name, hosts, resolv.conf, as after a boot
//! ```
//!
//! All on one disk, so each name moves in one step. We are linked statically and were started from the
//! initramfs, so nothing of the old root is needed on the way. A crash or an error in the middle leaves
//! a guest of no use: whoever asks for this has just made it, and makes another.

use std::fs;
use std::path::{Component, Path};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gethostname};

use super::{BootError, name};

/// What stays where it is: places that file systems of our own are mounted upon, and what belongs to the
/// disk itself.
const KEPT: [&str; 6] = ["dev", "proc", "sys", "run", "tmp", "lost+found"];
/// Below the directory that is named: what is to be the root.
const NEW: &str = "root";
/// And where what was the root goes.
const OLD: &str = "old";
/// The name servers, which are the host's to say.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Whether `directory` can be one to adopt from: right below the root. Pure.
#[must_use]
pub fn is_place(directory: &Path) -> bool {
    let mut parts = directory.components();
    let is_below_root = parts.next() == Some(Component::RootDir);
    let name = parts.next();
    let is_own =
        matches!(name, Some(Component::Normal(name)) if !KEPT.iter().any(|it| name == *it));
    is_below_root && is_own && parts.next().is_none()
}

/// Ends all processes and has what lies in `root` below `directory` take the place of what is in `/`.
/// For process 1 only.
///
/// # Errors
/// [`BootError`] names the file; the guest is of no use then.
pub fn adopt(directory: &Path) -> Result<(), BootError> {
    let hostname = gethostname().map_err(BootError::Hostname)?;
    let servers = fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    // Nobody to end is no error.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    exchange(Path::new("/"), directory)?;
    name::set(&hostname.to_string_lossy())?;
    name::write(RESOLV_CONF, &servers)
}

/// Moves what is in `root` away and what lies below `directory` there, which then goes.
fn exchange(root: &Path, directory: &Path) -> Result<(), BootError> {
    let (new, old) = (directory.join(NEW), directory.join(OLD));
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    fs::create_dir(&old).map_err(BootError::file("create", shown(&old)))?;
    move_all(root, &old, directory)?;
    move_all(&new, root, directory)?;
    fs::remove_dir_all(directory).map_err(BootError::file("remove", shown(directory)))
}

/// Moves everything in `from` to `to`, but for what is kept, and for `except`.
fn move_all(from: &Path, to: &Path, except: &Path) -> Result<(), BootError> {
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    let listed = fs::read_dir(from).map_err(BootError::file("list", shown(from)))?;
    // Listed whole before anything moves.
    let listed = listed.collect::<Result<Vec<_>, _>>();
    for entry in listed.map_err(BootError::file("list", shown(from)))? {
        let name = entry.file_name();
        if entry.path() == except || KEPT.iter().any(|kept| name == *kept) {
            continue;
        }
        let moved = fs::rename(entry.path(), to.join(&name));
        moved.map_err(BootError::file("move", shown(&entry.path())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_new_takes_the_place_of_the_old_and_mounted_places_stay() {
        let root = tempfile::tempdir().expect("a directory");
        let at = |path: &str| root.path().join(path);
        for dir in [
            "bin",
            "etc",
            "proc",
            "tmp",
            ".import/root/etc",
            ".import/root/tmp",
            ".import/root/usr",
        ] {
            fs::create_dir_all(at(dir)).expect("made");
        }
        for (file, text) in [
            ("etc/old", "o"),
            ("proc/kept", "k"),
            (".import/root/etc/new", "n"),
            (".import/root/tmp/lost", "l"),
        ] {
            fs::write(at(file), text).expect("written");
        }
        // A link that leads out: it is moved and never followed.
        let outside = tempfile::tempdir().expect("a directory");
        fs::write(outside.path().join("safe"), "s").expect("written");
        symlink(outside.path(), at("bin/out")).expect("linked");
        symlink(outside.path(), at(".import/root/link")).expect("linked");

        exchange(root.path(), &at(".import")).expect("exchanged");
        let mut left: Vec<_> = fs::read_dir(root.path())
            .expect("listed")
            .map(|it| it.expect("listed").file_name().into_string().expect("text"))
            .collect();
        left.sort();
        assert_eq!(left, ["etc", "link", "proc", "tmp", "usr"]);
        assert_eq!(fs::read_to_string(at("etc/new")).expect("there"), "n");
        assert!(!at("etc/old").exists() && !at("tmp/lost").exists());
        assert!(at("proc/kept").exists() && outside.path().join("safe").exists());
    }

    #[test]
    fn only_a_directory_right_below_the_root_is_adopted_from() {
        assert!(is_place(Path::new("/.import")));
        for bad in ["/", "/a/b", "a", "/..", "/proc", "/a/..", ""] {
            assert!(!is_place(Path::new(bad)), "{bad}");
        }
    }
}
