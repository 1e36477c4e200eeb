//! The overlay as QEMU's own tools see it: they are the judges of the format.

use std::path::PathBuf;
use std::process::{Command, Output};

use super::*;

/// An image with a mark at its start and one near its end.
fn base(dir: &Path, bytes: u64) -> PathBuf {
    let path = dir.join("base.raw");
    let file = File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"end", bytes - 3).unwrap();
    path
}

fn qemu(tool: &str, args: &[&str], files: &[&Path]) -> Output {
    Command::new(tool)
        .args(args)
        .args(files)
        .output()
        .unwrap_or_else(|err| panic!("{tool} did not start, deploy/deps installs it: {err}"))
}

fn assert_sound(path: &Path) {
    let check = qemu("qemu-img", &["check", "-f", "qcow2"], &[path]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success(), "{check:?}");
    assert!(said.contains("No errors were found"), "{said}");
}

/// The whole disk as a guest would read it.
fn read_all(dir: &Path, path: &Path) -> Vec<u8> {
    let flat = dir.join("flat.raw");
    let converted = qemu(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw"],
        &[path, &flat],
    );
    assert!(converted.status.success(), "{converted:?}");
    fs::read(flat).unwrap()
}

#[test]
fn qemu_reads_the_image_through_the_overlay_and_zeroes_past_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), 3 * MIB_BYTES);
    let path = dir.path().join("root.qcow2");
    let size = Mib(8);
    Overlay { base: &base, size }.create(&path).unwrap();

    assert_sound(&path);
    let mut expected = fs::read(&base).unwrap();
    expected.resize(8 << 20, 0);
    assert!(read_all(dir.path(), &path) == expected);
}

#[test]
fn qemu_is_told_the_backing_file_and_its_format() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), MIB_BYTES);
    let path = dir.path().join("root.qcow2");
    let size = Mib(1);
    Overlay { base: &base, size }.create(&path).unwrap();

    let info = qemu("qemu-img", &["info", "--output=json"], &[&path]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["format"], "qcow2");
    assert_eq!(info["virtual-size"], 1 << 20);
    assert_eq!(info["backing-filename"], base.to_str().unwrap());
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
}

#[test]
fn what_a_guest_writes_stays_in_the_overlay_and_the_image_is_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), MIB_BYTES);
    let before = fs::read(&base).unwrap();
    let path = dir.path().join("root.qcow2");
    let size = Mib(1024);
    Overlay { base: &base, size }.create(&path).unwrap();

    let writes = [
        "-f",
        "qcow2",
        "-c",
        "write -P 7 4k 64k",
        "-c",
        "write -P 9 1000M 1M",
        "-c",
        "read -v -P 0 2M 64k",
    ];
    let wrote = qemu("qemu-io", &writes, &[&path]);
    assert!(wrote.status.success(), "{wrote:?}");
    assert_sound(&path);
    let reads = [
        "-f",
        "qcow2",
        "-c",
        "read -P 7 4k 64k",
        "-c",
        "read -P 9 1000M 1M",
    ];
    let read = qemu("qemu-io", &reads, &[&path]);
    assert!(read.status.success(), "{read:?}");
    assert!(fs::read(&base).unwrap() == before);
}

#[test]
fn the_smallest_and_the_largest_disk_are_sound() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), MIB_BYTES);
    // At 512 MiB a second entry of the first-level table begins.
    for size in [Mib(1), Mib(512), Mib(513), Mib(5120), MAX_DISK] {
        let path = dir.path().join(format!("{}.qcow2", size.0));
        Overlay { base: &base, size }.create(&path).unwrap();
        assert_sound(&path);
        let file = fs::metadata(&path).unwrap();
        assert!(file.len() <= 16 * CLUSTER_BYTES, "{size}: {}", file.len());
    }
}

#[test]
fn a_disk_that_exists_is_never_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), MIB_BYTES);
    let path = dir.path().join("root.qcow2");
    fs::write(&path, b"a user's data").unwrap();
    let size = Mib(1);
    let refused = Overlay { base: &base, size }.create(&path).unwrap_err();

    assert!(matches!(refused, CreateOverlayError::Exists { .. }));
    assert_eq!(fs::read(&path).unwrap(), b"a user's data");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn impossible_disks_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), 2 * MIB_BYTES);
    let path = dir.path().join("root.qcow2");
    let create = |base: &Path, size| Overlay { base, size }.create(&path).unwrap_err();

    for size in [Mib(0), Mib(MAX_DISK.0 + 1), Mib(u32::MAX)] {
        assert!(matches!(
            create(&base, size),
            CreateOverlayError::Size { .. }
        ));
    }
    let small = create(&base, Mib(1));
    assert!(matches!(small, CreateOverlayError::SmallerThanBase { .. }));
    let relative = create(Path::new("base.raw"), Mib(2));
    assert!(matches!(relative, CreateOverlayError::BasePath { .. }));
    let long = create(Path::new(&format!("/{}", "x".repeat(1023))), Mib(2));
    assert!(matches!(long, CreateOverlayError::BasePath { .. }));
    let absent = create(&dir.path().join("absent"), Mib(2));
    assert!(matches!(absent, CreateOverlayError::Disk { .. }));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// An overlay of `size` on `base`, in a directory of its own.
fn overlay_on(base: &Path, size: Mib) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.qcow2");
    Overlay { base, size }.create(&path).unwrap();
    (dir, path)
}

#[test]
fn an_overlay_is_put_on_the_same_image_at_a_longer_or_shorter_path() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let (_dir, path) = overlay_on(&base, Mib(8));
    for name in ["a-much-longer-name-than-the-one-before.raw", "b"] {
        let other = dir.path().join(name);
        fs::copy(&base, &other).unwrap();
        rebase(&path, &other, Mib(8)).unwrap();
        let bytes = fs::read(&path).unwrap();
        let wanted = other.as_os_str().as_bytes();
        let at = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
        let at = usize::try_from(at).unwrap();
        let length = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        assert_eq!(&bytes[at..at + length], wanted);
    }
}

/// As Cloud Hypervisor leaves every overlay that it was saved with.
#[test]
fn an_overlay_that_was_in_use_is_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let (_dir, path) = overlay_on(&base, Mib(8));
    let fresh = fs::read(&path).unwrap();
    let mut used = fresh.clone();
    used[79] = 1;
    fs::write(&path, used).unwrap();
    rebase(&path, &base, Mib(8)).unwrap();
    assert!(fs::read(&path).unwrap() == fresh);
}

#[test]
fn an_overlay_that_names_other_files_or_is_of_another_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let spoilt = |at: usize, bytes: &[u8]| {
        let (dir, path) = overlay_on(&base, Mib(8));
        let mut content = fs::read(&path).unwrap();
        content[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, content).unwrap();
        let refused = rebase(&path, &base, Mib(8));
        drop(dir);
        matches!(refused, Err(RebaseError::NotAnOverlay { .. }))
    };
    // The first extension stands behind the header of 104 bytes.
    assert!(spoilt(104, &0x4441_5441_u32.to_be_bytes()), "a data file");
    assert!(spoilt(79, &[4]), "the feature that wants one");
    assert!(spoilt(79, &[3]), "known to be damaged");
    assert!(spoilt(112, b"qco"), "another format below");
    assert!(spoilt(35, &[1]), "encrypted");
    assert!(spoilt(63, &[1]), "snapshots inside");
    assert!(spoilt(8, &[0xff; 8]), "a name outside the header");
    let (_dir, path) = overlay_on(&base, Mib(8));
    assert!(rebase(&path, &base, Mib(16)).is_err(), "another size");
    assert!(rebase(&path, Path::new("base.raw"), Mib(8)).is_err());
}
