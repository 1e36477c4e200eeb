//! What a directive does to a guest, as commands of its shell. Only the shell and common tools are
//! expected of a guest; what a recipe says reaches scripts as arguments, never as part of them.

use std::collections::BTreeMap;

use super::around::Around;
use crate::guest::ProcessCommand;

/// Where the files of a build lie in the guest.
pub(super) const FILES: &str = "/tmp/build-files";
/// Where their archive is put.
pub(super) const ARCHIVE: &str = "/tmp/build-files.tar";

/// Where a root file system is brought and unpacked: on the disk it is to take, since `/tmp` is memory.
pub(super) const IMPORT: &str = "/.wrenn-import";
/// Its archive.
pub(super) const IMPORT_ARCHIVE: &str = "/.wrenn-import/root.tar";
/// It, unpacked.
pub(super) const IMPORT_ROOT: &str = "/.wrenn-import/root";

/// Unpacks a root file system ($1) into an empty directory ($2), owners by number.
const UNPACK_ROOT: &str = "rm -rf -- \"$2\" && mkdir -p -- \"$2\" && \
    tar -xpf \"$1\" -C \"$2\" --numeric-owner --xattrs --xattrs-include=security.capability && \
    rm -f -- \"$1\"";
/// Prints name and home of the user $1, a name or a number, whatever follows a colon left out. The shell
/// alone does it: nothing else is known of what was imported.
const FIND_USER: &str = r#"wanted=${1%%:*}
while IFS=: read -r name pass uid gid gecos home shell; do
    if [ "$wanted" = "$name" ] || [ "$wanted" = "$uid" ]; then
        echo "$name"
        echo "${home:-/}"
        exit 0
    fi
done </etc/passwd
echo "the image has no user $1 in /etc/passwd" >&2
exit 1"#;

/// Unpacks the archive ($1) into an empty directory ($2).
const UNPACK: &str = "rm -rf -- \"$2\" && mkdir -p -- \"$2\" && \
    tar -xf \"$1\" -C \"$2\" --no-same-owner && rm -f -- \"$1\"";
/// Removes what a build has brought in.
const TIDY: &str = "rm -rf -- \"$1\" \"$2\"";
/// Makes the user $1, who may become root, and prints its home.
const MAKE_USER: &str = r#"set -e
if ! id -u "$1" >/dev/null 2>&1; then
    shell=/bin/sh
    if [ -x /bin/bash ]; then shell=/bin/bash; fi
    if command -v useradd >/dev/null; then
        useradd --create-home --shell "$shell" "$1" >&2
    else
        adduser -D -s "$shell" "$1" >&2
    fi
fi
if [ "$1" != root ]; then
    mkdir -p /etc/sudoers.d
    printf '%s ALL=(ALL) NOPASSWD:ALL\n' "$1" > "/etc/sudoers.d/$1"
    chmod 0440 "/etc/sudoers.d/$1"
fi
awk -F: -v name="$1" '$1 == name { print $6 }' /etc/passwd"#;
/// Makes the directory $1 and prints its path.
const MAKE_DIR: &str = "mkdir -p -- \"$1\" && cd -- \"$1\" && pwd";
/// Copies sources ($4 and on), below the directory $3, to $1, and gives what was copied to $2.
const COPY: &str = r#"set -e
to=$1; owner=$2; files=$3; shift 3
into=
case $to in */) into=yes ;; esac
if [ $# -gt 1 ] || [ -d "$to" ]; then into=yes; fi
if [ -n "$into" ]; then mkdir -p -- "$to"; else mkdir -p -- "$(dirname -- "$to")"; fi
group=$(id -gn -- "$owner")
for source in "$@"; do
    from=$files/$source
    if [ ! -e "$from" ] && [ ! -L "$from" ]; then
        echo "COPY: there is no $source" >&2
        exit 1
    fi
    at=$to
    if [ -n "$into" ] && [ -n "$source" ]; then at=${to%/}/$(basename -- "$source"); fi
    if [ -d "$from" ] && [ ! -L "$from" ]; then
        mkdir -p -- "$at"
        cp -RPp -- "$from/." "$at/"
    else
        cp -Pp -- "$from" "$at"
    fi
    chown -R -h -- "$owner:$group" "$at"
done"#;

/// A script of ours, done by root.
fn root(script: &str, args: &[&str]) -> ProcessCommand {
    let script = ["-c".to_owned(), script.to_owned(), "sh".to_owned()];
    let args = args.iter().map(|it| (*it).to_owned());
    ProcessCommand {
        cmd: "/bin/sh".into(),
        args: script.into_iter().chain(args).collect(),
        cwd: Some("/".into()),
        user: Some("root".into()),
        ..ProcessCommand::default()
    }
}

/// A command of the recipe, done by whoever it has become.
fn own(around: &Around, script: &str, as_root: bool) -> ProcessCommand {
    let user = if as_root { "root" } else { &around.user };
    let cwd = if as_root { "/" } else { around.cwd() };
    ProcessCommand {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), script.to_owned()],
        envs: around.env.clone(),
        cwd: Some(cwd.to_owned()),
        user: Some(user.to_owned()),
        ..ProcessCommand::default()
    }
}

/// `RUN`, and the health check.
pub(super) fn run(around: &Around, command: &str, as_root: bool) -> ProcessCommand {
    own(around, command, as_root)
}

/// `START`: its output goes nowhere, so that nobody has to read it.
pub(super) fn start(around: &Around, command: &str) -> ProcessCommand {
    let script = format!("exec >/dev/null 2>&1 </dev/null\n{command}");
    own(around, &script, false)
}

/// `USER`.
pub(super) fn make_user(name: &str) -> ProcessCommand {
    root(MAKE_USER, &[name])
}

/// `WORKDIR`.
pub(super) fn make_dir(path: &str) -> ProcessCommand {
    root(MAKE_DIR, &[path])
}

/// `COPY`.
pub(super) fn copy(around: &Around, sources: &[String], to: &str) -> ProcessCommand {
    let mut to_whole = around.absolute(to);
    // `.` and what ends with it are directories.
    if to == "." || to.ends_with("/.") {
        to_whole.push('/');
    }
    let mut args = vec![to_whole.as_str(), around.user.as_str(), FILES];
    args.extend(sources.iter().map(String::as_str));
    root(COPY, &args)
}

/// Unpacks the archive.
pub(super) fn unpack() -> ProcessCommand {
    root(UNPACK, &[ARCHIVE, FILES])
}

/// Unpacks the root file system.
pub(super) fn unpack_root() -> ProcessCommand {
    root(UNPACK_ROOT, &[IMPORT_ARCHIVE, IMPORT_ROOT])
}

/// Looks a user up by name or number.
pub(super) fn find_user(user: &str) -> ProcessCommand {
    root(FIND_USER, &[user])
}

/// Removes what the build has brought in.
pub(super) fn tidy() -> ProcessCommand {
    root(TIDY, &[ARCHIVE, FILES])
}

/// Writes the environment, each variable with a NUL behind it.
pub(super) fn environment(user: &str, envs: &BTreeMap<String, String>) -> ProcessCommand {
    ProcessCommand {
        cmd: "env".into(),
        args: vec!["-0".into()],
        envs: envs.clone(),
        user: Some(user.to_owned()),
        cwd: Some("/".into()),
        ..ProcessCommand::default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// Runs the script as a guest would.
    fn copied(files: &Path, to: &str, sources: &[&str]) -> bool {
        let files = files.to_str().expect("a path");
        let owner = String::from_utf8(Command::new("id").arg("-un").output().expect("id").stdout);
        let owner = owner.expect("a name");
        let ran = Command::new("/bin/sh")
            .args(["-c", COPY, "sh", to, owner.trim(), files])
            .args(sources)
            .status();
        ran.expect("a shell").success()
    }

    fn files() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("src/deep")).expect("made");
        fs::write(dir.path().join("src/deep/a b"), "1").expect("written");
        fs::write(dir.path().join("-n"), "2").expect("written");
        symlink("/nowhere", dir.path().join("link")).expect("linked");
        dir
    }

    #[test]
    fn a_file_gets_the_name_of_its_destination_and_a_directory_its_contents() {
        let (files, to) = (files(), tempfile::tempdir().expect("a directory"));
        let at = |path: &str| format!("{}/{path}", to.path().display());
        assert!(copied(files.path(), &at("new/name"), &["-n"]));
        assert_eq!(fs::read_to_string(at("new/name")).expect("a file"), "2");
        assert!(copied(files.path(), &at("tree"), &["src"]));
        assert!(Path::new(&at("tree/deep/a b")).exists());
        // Into a directory that is there, under their own names.
        assert!(copied(files.path(), &at("into/"), &["-n", "src", "link"]));
        assert!(Path::new(&at("into/src/deep/a b")).exists());
        assert!(Path::new(&at("into/-n")).exists());
        let link = fs::symlink_metadata(at("into/link")).expect("a link");
        assert!(link.is_symlink());
        // All of it.
        assert!(copied(files.path(), &at("all"), &[""]));
        assert!(Path::new(&at("all/src/deep/a b")).exists());
        assert!(
            fs::metadata(at("all/-n")).expect("a file").uid() == nix::unistd::getuid().as_raw()
        );
    }

    #[test]
    fn a_source_that_is_not_there_is_an_error() {
        let (files, to) = (files(), tempfile::tempdir().expect("a directory"));
        let to = to.path().join("x");
        assert!(!copied(
            files.path(),
            to.to_str().expect("a path"),
            &["none"]
        ));
    }

    #[test]
    fn what_a_recipe_says_is_never_part_of_a_script() {
        let around = Around::default();
        let hostile = "\"; touch /owned; \"";
        for command in [
            make_dir(hostile),
            make_user(hostile),
            copy(&around, &[hostile.into()], hostile),
        ] {
            assert!(!command.args[1].contains("owned"));
            assert!(command.args[3..].iter().any(|arg| arg.contains("owned")));
            assert_eq!(command.user.as_deref(), Some("root"));
        }
    }
}
