//! What must differ between two guests made from one snapshot, as far as it lies in files.
//!
//! Everything here works below a given root, never through a symbolic link: an image's link may
//! lead anywhere.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use crate::boot::BootError;

/// Who this system is, to systemd and everything that asks it.
const MACHINE_ID: &str = "etc/machine-id";
/// A random UUID, anew for whoever reads it: a machine id but for its hyphens.
const RANDOM_UUID: &str = "/proc/sys/kernel/random/uuid";
/// The same for D-Bus: mostly a link to the former, sometimes a file of its own.
const DBUS_MACHINE_ID: &str = "var/lib/dbus/machine-id";
/// Where an SSH server keeps its keys.
const SSH: &str = "etc/ssh";
/// What the names of its host keys begin with; `_key` and `_key.pub` follow the algorithm.
const HOST_KEY_PREFIX: &str = "ssh_host_";
/// Makes the host keys that are missing, and lets a server that runs take them. Nothing happens
/// where no SSH server is installed.
pub const MAKE_SSH_HOST_KEYS: &str = "command -v ssh-keygen >/dev/null && ssh-keygen -A; \
     [ -s /run/sshd.pid ] && kill -HUP \"$(cat /run/sshd.pid)\"";

/// Whether `text` is a machine id: 32 lower-case hexadecimal digits.
#[must_use]
pub fn is_machine_id(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == 32 && text.bytes().all(plain)
}

/// Writes the machine id wherever the system has one of its own.
///
/// # Errors
/// [`BootError::File`] names the file.
pub fn renew_machine_id(root: &Path, machine_id: &str) -> Result<(), BootError> {
    let text = format!("{machine_id}\n");
    write_plain(&root.join(MACHINE_ID), &text)?;
    let dbus = root.join(DBUS_MACHINE_ID);
    if dbus.is_file() && !dbus.is_symlink() {
        write_plain(&dbus, &text)?;
    }
    Ok(())
}

/// Gives the system a machine id where its image has none, as templates should not: else every guest
/// of a template would take itself for every other.
///
/// # Errors
/// [`BootError::File`] names the file.
pub fn give_machine_id(root: &Path) -> Result<(), BootError> {
    let path = root.join(MACHINE_ID);
    let has_one = fs::read_to_string(&path).is_ok_and(|text| is_machine_id(text.trim_end()));
    if has_one {
        return Ok(());
    }
    let uuid = fs::read_to_string(RANDOM_UUID);
    let uuid = uuid.map_err(BootError::file("read", RANDOM_UUID))?;
    renew_machine_id(root, &uuid.trim_end().replace('-', ""))
}

fn write_plain(path: &Path, text: &str) -> Result<(), BootError> {
    crate::boot::name::write(&path.to_string_lossy(), text)
}

/// Removes the SSH host keys; tells how many files that were. A server keeps the keys it has in
/// memory until it is told to read them anew ([`MAKE_SSH_HOST_KEYS`]).
///
/// # Errors
/// [`BootError::File`] names the file.
pub fn remove_ssh_host_keys(root: &Path) -> Result<usize, BootError> {
    let directory = root.join(SSH);
    let shown = directory.to_string_lossy();
    let entries = match fs::read_dir(&directory) {
        Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(0);
        }
        entries => entries.map_err(BootError::file("list", shown.clone()))?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.map_err(BootError::file("list", shown.clone()))?;
        if !is_host_key(&entry.file_name().to_string_lossy()) {
            continue;
        }
        let path = entry.path();
        fs::remove_file(&path).map_err(BootError::file("remove", path.to_string_lossy()))?;
        removed += 1;
    }
    Ok(removed)
}

fn is_host_key(name: &str) -> bool {
    let rest = name.strip_prefix(HOST_KEY_PREFIX);
    rest.is_some_and(|rest| rest.ends_with("_key") || rest.ends_with("_key.pub"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for dir in ["etc/ssh", "var/lib/dbus"] {
            fs::create_dir_all(root.path().join(dir)).expect("made");
        }
        root
    }

    #[test]
    fn the_machine_id_is_written_and_a_link_to_it_is_left_alone() {
        let root = root();
        let (id, dbus) = (
            root.path().join(MACHINE_ID),
            root.path().join(DBUS_MACHINE_ID),
        );
        symlink("/etc/machine-id", &dbus).expect("linked");
        renew_machine_id(root.path(), ID).expect("renewed");
        assert_eq!(fs::read_to_string(&id).expect("read"), format!("{ID}\n"));
        assert!(dbus.is_symlink());
        fs::remove_file(&dbus).expect("removed");
        fs::write(&dbus, "old\n").expect("written");
        renew_machine_id(root.path(), ID).expect("renewed");
        assert_eq!(fs::read_to_string(&dbus).expect("read"), format!("{ID}\n"));
    }

    #[test]
    fn only_a_system_without_a_machine_id_is_given_one() {
        let root = root();
        let path = root.path().join(MACHINE_ID);
        let given = || {
            give_machine_id(root.path()).expect("given");
            fs::read_to_string(&path).expect("read")
        };
        let first = given();
        assert!(is_machine_id(first.trim_end()), "{first}");
        assert_eq!(given(), first);
        for none in ["", "uninitialized\n"] {
            fs::write(&path, none).expect("written");
            let anew = given();
            assert!(is_machine_id(anew.trim_end()) && anew != first, "{anew}");
        }
    }

    #[test]
    fn a_linked_machine_id_is_replaced_and_its_target_spared() {
        let root = root();
        let target = root.path().join("target");
        fs::write(&target, "spared").expect("written");
        symlink(&target, root.path().join(MACHINE_ID)).expect("linked");
        renew_machine_id(root.path(), ID).expect("renewed");
        assert_eq!(fs::read_to_string(&target).expect("read"), "spared");
    }

    #[test]
    fn host_keys_go_and_the_rest_stays() {
        let root = root();
        let ssh = root.path().join(SSH);
        let keys = ["ssh_host_rsa_key", "ssh_host_rsa_key.pub"];
        for name in keys.iter().chain(&["sshd_config", "ssh_host_note"]) {
            fs::write(ssh.join(name), "").expect("written");
        }
        assert_eq!(remove_ssh_host_keys(root.path()).expect("removed"), 2);
        assert!(ssh.join("sshd_config").exists() && ssh.join("ssh_host_note").exists());
        assert!(keys.iter().all(|key| !ssh.join(key).exists()));
        fs::remove_dir_all(&ssh).expect("removed");
        assert_eq!(remove_ssh_host_keys(root.path()).expect("nothing"), 0);
    }

    #[test]
    fn machine_ids_have_one_form() {
        assert!(is_machine_id(ID));
        for text in ["", "0123", &ID.to_uppercase(), &format!("{ID}0")] {
            assert!(!is_machine_id(text), "{text}");
        }
    }
}
