//! The root directory of one VMM: a file system of its own with what it needs, and nothing else.
//!
//! ```text
//! /lib, /usr/lib, /usr/share/qemu …   the host's, read-only
//! <its program, kernel, initramfs, base image>   one by one, under their own names, read-only
//! <its disk>                          under its own name, writable
//! /dev/{kvm,net/tun,userfaultfd,…}    made anew, and its user's
//! /proc                               shows it itself only
//! ```
//!
//! Everything has the name that it has on the host, so nothing that the VMM is told changes. What its
//! user may do in there is decided by owners and modes alone: it has no capability.
//!
//! A thread of its own puts it together, in a mount namespace of its own, and then is no more: what
//! is left is the namespace, which the VMM enters between `fork` and `exec` with one system call.
//! So nothing is mounted where anybody else could see it, every step can say what went wrong, and a
//! crash at any point leaves nothing.

mod mounts;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{chdir, pivot_root};

use self::mounts::{STAGE, Taken, Use, make_dir, mount_at, place_of};
use crate::vmm::jail::{Allowed, FileRules};

/// Of the file system that holds the rest: directories, names, and a few device nodes.
const STAGE_OPTIONS: &str = "mode=755,size=1m,nr_inodes=512";
/// Where programs have what they load at run time: libraries, QEMU's own modules, its firmware. Those
/// that are links on the host are links here.
const SYSTEM: [&str; 10] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/local/share/qemu",
    // Where distributions of another kind have all of it.
    "/nix/store",
    "/gnu/store",
];
/// Where the loader finds its libraries quickly.
const LOADER_CACHE: &str = "/etc/ld.so.cache";
/// The devices that a VMM opens: see [`super::cloud_hypervisor::spawn`] for the third of the first
/// line.
const DEVICES: [&str; 7] = [
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/userfaultfd",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
];
/// A process sees itself and no other, and of the kernel's own files none.
const PROC_OPTIONS: &str = "hidepid=invisible,subset=pid";
/// Where a VMM may make a socket, if it has to.
pub const MEETING: &str = "/meeting";
/// What others may do, in a file's mode.
const OTHERS_READ: u32 = 0o004;
/// See [`OTHERS_READ`].
const OTHERS_RUN: u32 = 0o001;

/// What the root of one VMM is to hold.
#[derive(Clone, Debug, Default)]
pub struct RootPlan {
    /// Its user, to whom devices, disk and meeting place belong.
    pub owner: u32,
    /// What is run.
    pub program: PathBuf,
    /// What it reads.
    pub readable: Vec<PathBuf>,
    /// Its disk, a qcow2 image. The image below it is read-only.
    pub disk: Option<PathBuf>,
    /// A directory of the host's that is [`MEETING`].
    pub meeting: Option<PathBuf>,
    /// What it may write and run, by names in the new root; `None` leaves that to owners and modes.
    pub rules: Option<Vec<(PathBuf, Allowed)>>,
}

/// A root that was put together.
#[derive(Debug)]
pub struct Root {
    /// The mount namespace in which it is the root.
    pub namespace: OwnedFd,
    /// The rules of the plan, where the kernel has such.
    pub rules: Option<FileRules>,
}

/// Why it was not.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A step was refused.
    #[error("{doing} {path:?}")]
    Step {
        /// Which.
        doing: &'static str,
        /// What it is about.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is closed to the VMM's user.
    #[error("{path:?} can be {verb} by root only; chmod o+{letter} it")]
    Closed {
        /// Which.
        path: PathBuf,
        /// What it is needed for.
        verb: &'static str,
        /// What it lacks.
        letter: char,
    },
}

fn step<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl Fn(E) -> RootError {
    move |err| RootError::Step {
        doing,
        path: path.to_owned(),
        source: err.into(),
    }
}

impl RootPlan {
    /// Puts it together.
    ///
    /// # Errors
    /// See [`RootError`]. Nothing is left.
    pub fn build(&self) -> Result<Root, RootError> {
        // A mount namespace belongs to a thread, until others enter it.
        thread::scope(|scope| {
            thread::Builder::new()
                .name("jail-root".to_owned())
                .spawn_scoped(scope, || self.build_here())
                .map_err(step("start a thread for", Path::new(STAGE)))?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn build_here(&self) -> Result<Root, RootError> {
        let root = Path::new("/");
        unshare(CloneFlags::CLONE_NEWNS).map_err(step("leave the mounts of", root))?;
        let own = Path::new("/proc/thread-self/ns/mnt");
        let namespace = File::open(own).map_err(step("open", own))?;
        // What is mounted from here on is nobody else's.
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount_at(None, root, None, private, None)?;
        let taken = self.take()?;
        let noexec = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let stage = Path::new(STAGE);
        mount_at(
            Some("tmpfs"),
            stage,
            Some("tmpfs"),
            noexec,
            Some(STAGE_OPTIONS),
        )?;
        for thing in &taken {
            thing.put(&taken)?;
        }
        self.make_devices()?;
        let proc = make_dir("/proc".as_ref())?;
        let closed = noexec | MsFlags::MS_NODEV;
        mount_at(
            Some("proc"),
            &proc,
            Some("proc"),
            closed,
            Some(PROC_OPTIONS),
        )?;
        let sealed = noexec | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount_at(None, stage, None, sealed, None)?;
        chdir(stage).map_err(step("enter", stage))?;
        // The old root comes to lie over the new one, and goes with all that is mounted in it.
        pivot_root(".", ".").map_err(step("make the root", stage))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(step("let go of", root))?;
        chdir(root).map_err(step("enter", root))?;
        Ok(Root {
            namespace: namespace.into(),
            rules: self.rules()?,
        })
    }

    /// Opens all that comes from the host.
    fn take(&self) -> Result<Vec<Taken>, RootError> {
        let mut taken = Vec::new();
        for dir in SYSTEM.map(Path::new) {
            match fs::symlink_metadata(dir) {
                Ok(it) if it.is_symlink() => taken.push(Taken::link(dir)?),
                Ok(it) if it.is_dir() => taken.push(Taken::file(dir, dir, Use::Program)?),
                _ => {}
            }
        }
        if Path::new(LOADER_CACHE).exists() {
            let cache = Path::new(LOADER_CACHE);
            taken.push(Taken::file(cache, cache, Use::Read)?);
        }
        taken.extend(self.take_program()?);
        for path in &self.readable {
            // A kernel that needs no initramfs is its own; nothing is put in the place of a mount.
            if taken.iter().any(|it| it.name() == path) {
                continue;
            }
            check_open(path, OTHERS_READ)?;
            taken.push(Taken::file(path, path, Use::Read)?);
        }
        if let Some(disk) = &self.disk {
            if let Some(base) = base_of(disk).map_err(step("look into", disk))? {
                // Ours, and below a directory that nobody else may enter.
                let_others_read(&base).map_err(step("let the VMM read", &base))?;
                taken.push(Taken::file(&base, &base, Use::Read)?);
            }
            self.give(disk)?;
            taken.push(Taken::file(disk, disk, Use::Write)?);
        }
        if let Some(meeting) = &self.meeting {
            self.give(meeting)?;
            taken.push(Taken::file(meeting, MEETING.as_ref(), Use::Write)?);
        }
        Ok(taken)
    }

    /// The program under its real name, since QEMU looks for what it comes with beside that; and a link
    /// where it goes by another.
    fn take_program(&self) -> Result<Vec<Taken>, RootError> {
        let program = &self.program;
        let real = fs::canonicalize(program).map_err(step("find", program))?;
        check_open(&real, OTHERS_READ | OTHERS_RUN)?;
        let mut taken = vec![Taken::file(&real, &real, Use::Program)?];
        let is_linked = real != *program && !SYSTEM.iter().any(|dir| program.starts_with(dir));
        if is_linked {
            let name = program.clone();
            taken.push(Taken::Link { to: real, name });
        }
        Ok(taken)
    }

    fn give(&self, path: &Path) -> Result<(), RootError> {
        let owner = Some(self.owner);
        chown(path, owner, owner).map_err(step("hand over", path))
    }

    /// Devices of its own: those of the host belong to root.
    fn make_devices(&self) -> Result<(), RootError> {
        for device in DEVICES.map(Path::new) {
            let Ok(there) = fs::metadata(device) else {
                continue;
            };
            if !there.file_type().is_char_device() {
                continue;
            }
            let place = place_of(device);
            make_dir(device.parent().unwrap_or(device))?;
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            mknod(&place, SFlag::S_IFCHR, mode, there.rdev()).map_err(step("make", device))?;
            self.give(&place)?;
        }
        Ok(())
    }

    fn rules(&self) -> Result<Option<FileRules>, RootError> {
        let rules = self.rules.as_deref().map(FileRules::allowing).transpose();
        let rules = rules.map_err(step("make file rules below", Path::new("/")))?;
        Ok(rules.flatten())
    }
}

/// Whether others than its owner may do with `path` what has to be done.
fn check_open(path: &Path, needed: u32) -> Result<(), RootError> {
    let mode = fs::metadata(path).map_err(step("look at", path))?.mode();
    let closed = |verb, letter| RootError::Closed {
        path: path.to_owned(),
        verb,
        letter,
    };
    if needed & OTHERS_READ & !mode != 0 {
        return Err(closed("read", 'r'));
    }
    if needed & OTHERS_RUN & !mode != 0 {
        return Err(closed("run", 'x'));
    }
    Ok(())
}

fn let_others_read(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.mode();
    if mode & OTHERS_READ != 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode | OTHERS_READ))
}

/// What a qcow2 image names as the image below it. Only where the name stands is read; whether
/// the rest can be used its VMM finds out.
fn base_of(disk: &Path) -> io::Result<Option<PathBuf>> {
    /// `QFI\xfb`, the version, where the name begins, and how long it is.
    const HEAD_BYTES: usize = 20;
    const MAGIC: &[u8] = b"QFI\xfb";
    /// The format's own limit.
    const MAX_NAME_BYTES: u32 = 1023;
    let file = File::open(disk)?;
    let mut head = [0; HEAD_BYTES];
    file.read_exact_at(&mut head, 0)?;
    if !head.starts_with(MAGIC) {
        return Ok(None);
    }
    let (mut offset, mut length) = ([0; 8], [0; 4]);
    offset.copy_from_slice(&head[8..16]);
    length.copy_from_slice(&head[16..20]);
    let (offset, length) = (u64::from_be_bytes(offset), u32::from_be_bytes(length));
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > MAX_NAME_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut name = vec![0; length as usize];
    file.read_exact_at(&mut name, offset)?;
    let name = String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some(PathBuf::from(name)))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::vmm::confinement::own_users;
    use crate::vmm::jail::Jail;

    /// Users that no other test has, one for each plan: those of one user see each other in `/proc`.
    static NEXT_USER: AtomicU32 = AtomicU32::new(0x7000_0000 + (1 << 17));

    /// A file of `mode` in `home`.
    fn file(home: &Path, name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path = home.join(name);
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("set");
        path
    }

    fn plan() -> RootPlan {
        RootPlan {
            owner: NEXT_USER.fetch_add(1, Ordering::Relaxed),
            program: "/bin/sh".into(),
            ..RootPlan::default()
        }
    }

    /// What `script` says in a shell that has `plan`'s root and nothing else.
    fn said(plan: &RootPlan, script: &str) -> Vec<String> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stderr(Stdio::null());
        command.stdout(Stdio::piped());
        let jail = Jail::new(None, &[]).in_root(plan, 64).expect("a root");
        let (child, _) = jail.start(&mut command).expect("started");
        let output = child.wait_with_output().expect("ran");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.lines().map(str::to_owned).collect()
    }

    fn possible() -> bool {
        let possible = own_users();
        if let Err(err) = &possible {
            eprintln!("SKIPPED: {err}");
        }
        possible.is_ok()
    }

    #[test]
    fn a_child_sees_itself_and_what_it_was_given() {
        if !possible() {
            return;
        }
        let home = tempfile::tempdir().expect("tempdir");
        let image = file(home.path(), "image", b"seen\n", 0o644);
        let secret = file(home.path(), "secret", b"unseen\n", 0o644);
        let plan = RootPlan {
            readable: vec![image.clone()],
            ..plan()
        };
        let (image, secret) = (image.display(), secret.display());
        let script = format!(
            "cd /; echo *; echo $$ /proc/[0-9]*; read x < {image}; echo $x
             read x < {secret} || echo no secret; read x < /etc/passwd || echo no users
             echo x > {image} || echo no writing; echo x > /file || echo no files
             echo x > /dev/null && echo a device; cd ..; cd ..; echo *"
        );
        let said = said(&plan, &script);
        let top = &said[0];
        for name in ["bin", "dev", "lib", "proc", "tmp", "usr"] {
            assert!(top.split(' ').any(|it| it == name), "{top}");
        }
        assert!(!top.contains("home") && !top.contains("sys"), "{top}");
        let processes: Vec<&str> = said[1].split(' ').collect();
        assert_eq!((processes.len(), processes[0]), (2, "1"), "{processes:?}");
        let rest = [
            "seen",
            "no secret",
            "no users",
            "no writing",
            "no files",
            "a device",
        ];
        assert_eq!(said[2..8], rest);
        assert_eq!(&said[8], top, "no way up");
        // Nothing is mounted where others see it.
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read");
        assert!(!mounts.contains("size=1024k,nr_inodes=512"), "{mounts}");
    }

    #[test]
    fn its_user_is_nobody_and_can_become_nobody_else() {
        if !possible() {
            return;
        }
        let script = "while read name value; do case $name in Uid:|Gid:|Groups:|Cap*|NoNewPrivs:)
                      echo $name $value;; esac; done < /proc/self/status";
        let plan = plan();
        let user = plan.owner;
        let ids = format!("{user} {user} {user} {user}");
        let none = "0000000000000000";
        for line in said(&plan, script) {
            let wanted = match line.split_once(' ').unwrap_or((&line, "")).0 {
                "Uid:" | "Gid:" => ids.as_str(),
                "NoNewPrivs:" => "1",
                "Groups:" => "",
                _ => none,
            };
            assert!(line.ends_with(wanted), "{line}");
            assert!(!wanted.is_empty() || line.trim() == "Groups:", "{line}");
        }
    }

    #[test]
    fn its_disk_is_its_own_and_the_image_below_it_is_readable() {
        if !possible() {
            return;
        }
        let home = tempfile::tempdir().expect("tempdir");
        let base = file(home.path(), "base", b"below\n", 0o600);
        let name = base.to_str().expect("UTF-8").as_bytes();
        let mut disk = vec![0; 24];
        disk[..4].copy_from_slice(b"QFI\xfb");
        disk[15] = 24;
        disk[16..20].copy_from_slice(&u32::try_from(name.len()).expect("short").to_be_bytes());
        disk.extend_from_slice(name);
        let disk = file(home.path(), "disk", &disk, 0o600);
        assert_eq!(base_of(&disk).expect("read").as_deref(), Some(&*base));
        let plan = RootPlan {
            disk: Some(disk.clone()),
            ..plan()
        };
        let (name, below) = (disk.display(), base.display());
        let script = format!(
            "read x < {below}; echo $x; echo x > {below} || echo no; echo new > {name} && echo yes"
        );
        assert_eq!(said(&plan, &script), ["below", "no", "yes"]);
        assert_eq!(fs::read(&disk).expect("read"), b"new\n");
        assert_eq!(fs::metadata(&disk).expect("there").uid(), plan.owner);
        assert_eq!(
            base_of(&file(home.path(), "raw", &[0; 64], 0o600)).expect("read"),
            None
        );
    }

    #[test]
    fn a_file_that_only_root_may_read_is_named() {
        if !possible() {
            return;
        }
        let home = tempfile::tempdir().expect("tempdir");
        let closed = file(home.path(), "kernel", b"", 0o600);
        let plan = RootPlan {
            readable: vec![closed],
            ..plan()
        };
        let refused = plan.build().expect_err("closed").to_string();
        assert!(
            refused.contains("kernel") && refused.contains("chmod o+r"),
            "{refused}"
        );
    }
}
