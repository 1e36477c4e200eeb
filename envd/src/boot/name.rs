//! The guest's name, in the kernel and in `/etc`.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use nix::unistd::sethostname;

use super::BootError;

const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";
/// The address Debian gives a host's own name where it has no permanent one.
const OWN_ADDRESS: &str = "127.0.1.1";

/// Sets the name and makes it resolvable.
///
/// # Errors
/// [`BootError`] names the file, or that the kernel refused.
pub fn set(hostname: &str) -> Result<(), BootError> {
    sethostname(hostname).map_err(BootError::Hostname)?;
    write(HOSTNAME, &format!("{hostname}\n"))?;
    write(
        HOSTS,
        &hosts(&fs::read_to_string(HOSTS).unwrap_or_default(), hostname),
    )
}

/// The name by which programs reach the host's events.
const EVENTS: &str = "events.e2b.local";

/// Makes the host's events resolvable by their name.
///
/// # Errors
/// [`BootError::File`] names the file.
pub fn set_events(address: IpAddr) -> Result<(), BootError> {
    let existing = fs::read_to_string(HOSTS).unwrap_or_default();
    write(HOSTS, &with_events(&existing, address))
}

/// The hosts file with the events' address in it, in the place of an earlier one. Pure.
fn with_events(existing: &str, address: IpAddr) -> String {
    let is_theirs = |line: &&str| line.split_ascii_whitespace().nth(1) == Some(EVENTS);
    let own = format!("{address}\t{EVENTS}");
    let mut lines: Vec<_> = existing.lines().filter(|line| !is_theirs(line)).collect();
    lines.push(&own);
    lines.join("\n") + "\n"
}

/// Writes a file under `/etc`, through no symbolic link: an image's link may lead anywhere.
///
/// # Errors
/// [`BootError::File`] names it.
pub fn write(path: &str, text: &str) -> Result<(), BootError> {
    if Path::new(path).is_symlink() {
        fs::remove_file(path).map_err(BootError::file("replace", path))?;
    }
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent).map_err(BootError::file("create", parent.to_string_lossy()))?;
    }
    fs::write(path, text).map_err(BootError::file("write", path))
}

/// The hosts file with the guest's name in it; other lines are kept.
fn hosts(existing: &str, hostname: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    let names = |line: &str, name: &str| line.split_ascii_whitespace().skip(1).any(|n| n == name);
    for (address, line) in [
        ("127.0.0.1", "127.0.0.1\tlocalhost"),
        ("::1", "::1\tlocalhost"),
    ] {
        let present = existing.lines().any(|line| {
            line.split_ascii_whitespace().next() == Some(address) && names(line, "localhost")
        });
        if !present {
            lines.push(line);
        }
    }
    let own = format!("{OWN_ADDRESS}\t{hostname}");
    let kept = existing
        .lines()
        .filter(|l| l.split_ascii_whitespace().next() != Some(OWN_ADDRESS));
    lines.extend(kept);
    lines.push(&own);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_lines_are_added_and_others_kept() {
        let made = hosts("", "capsule");
        assert_eq!(
            made,
            "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\tcapsule\n"
        );
        let again = hosts(&format!("{made}10.0.0.1 db\n"), "other");
        let expected = "127.0.0.1\tlocalhost\n::1\tlocalhost\n10.0.0.1 db\n127.0.1.1\tother\n";
        assert_eq!(again, expected);
    }
    #[test]
    fn the_events_have_one_address() {
        let one = with_events("127.0.0.1\tlocalhost\n", [10, 0, 0, 1].into());
        assert_eq!(one, "127.0.0.1\tlocalhost\n10.0.0.1\tevents.e2b.local\n");
        let other = with_events(&one, [10, 0, 0, 2].into());
        assert_eq!(other, "127.0.0.1\tlocalhost\n10.0.0.2\tevents.e2b.local\n");
    }
}
