//! Keeps the root file systems in use under their digests, in the data directory.
//!
//! An overlay names the image below it by path, for as long as the sandbox lives. The file in
//! the images directory may be replaced by a newer build at any time; so overlays name
//! `<data>/templates/<digest>.raw` instead, a second link to the same file, or a sparse copy where
//! the images lie on another file system. Whatever has this name is complete and never changes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::store::chunker;
use crate::store::durable;
use crate::store::{DataPaths, ImageDigest};

use super::error::TemplateError;

/// Makes the image at `source` available under its digest and returns that path.
///
/// # Errors
/// - [`TemplateError::Changed`]: a copy of it does not have the digest.
/// - [`TemplateError::Disk`]: it could be neither linked nor copied.
pub fn keep(
    source: &Path,
    digest: ImageDigest,
    data: &DataPaths,
) -> Result<PathBuf, TemplateError> {
    let kept = data.template_image(digest);
    if kept.exists() {
        return Ok(kept);
    }
    // A link to a symbolic link would be that, not the image.
    let source = fs::canonicalize(source).map_err(disk("find", source))?;
    match fs::hard_link(&source, &kept) {
        Ok(()) => {}
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
        // Another file system, one without links, or a file of another user's.
        Err(_) => copy(&source, digest, &kept)?,
    }
    durable::sync_dir(&data.templates()).map_err(disk("flush", &data.templates()))?;
    Ok(kept)
}

/// Copies what is not a hole, beside `kept`, and renames it once it is known to be right.
fn copy(source: &Path, digest: ImageDigest, kept: &Path) -> Result<(), TemplateError> {
    let temp = durable::temp_beside(kept);
    let copied = copy_to(source, digest, &temp)
        .and_then(|()| fs::rename(&temp, kept).map_err(disk("name", kept)));
    if copied.is_err() {
        // Best effort: the name says that it is rubbish.
        let _ = fs::remove_file(&temp);
    }
    copied
}

fn copy_to(source: &Path, digest: ImageDigest, temp: &Path) -> Result<(), TemplateError> {
    let file = create(temp).map_err(disk("create", temp))?;
    let manifest = chunker::scan(source, |extent, bytes| {
        file.write_all_at(bytes, extent.start_bytes)
    })
    .map_err(|err| disk("copy", source)(io::Error::other(err)))?;
    if manifest.digest() != digest {
        return Err(TemplateError::Changed {
            path: source.to_owned(),
        });
    }
    file.set_len(manifest.image_bytes())
        .and_then(|()| file.sync_all())
        .map_err(disk("write", temp))
}

fn create(temp: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(durable::PRIVATE_FILE)
        .open(temp)
}

/// Adds what was tried, and on what, to a disk's refusal.
pub(super) fn disk<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> TemplateError + 'a {
    move |source| TemplateError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::store::DataDir;

    fn image(dir: &Path, mark: &[u8]) -> (PathBuf, ImageDigest) {
        let path = dir.join("rootfs.raw");
        let file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(mark, 4 << 20).unwrap();
        let digest = chunker::manifest_of(&path).unwrap().digest();
        (path, digest)
    }

    #[test]
    fn an_image_replaced_by_a_newer_build_stays_what_it_was_for_its_users() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(&dir.path().join("data")).unwrap();
        let (source, old) = image(dir.path(), b"old");
        let kept = keep(&source, old, data.paths()).unwrap();

        fs::remove_file(&source).unwrap();
        let (source, new) = image(dir.path(), b"new");
        let kept_new = keep(&source, new, data.paths()).unwrap();
        assert_ne!(kept, kept_new);
        assert_eq!(chunker::manifest_of(&kept).unwrap().digest(), old);
        assert_eq!(chunker::manifest_of(&kept_new).unwrap().digest(), new);
    }

    #[test]
    fn keeping_an_image_twice_is_keeping_it_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(&dir.path().join("data")).unwrap();
        let (source, digest) = image(dir.path(), b"x");
        keep(&source, digest, data.paths()).unwrap();
        keep(&source, digest, data.paths()).unwrap();
        assert_eq!(fs::metadata(&source).unwrap().nlink(), 2);
    }

    #[test]
    fn a_copy_has_the_same_digest_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (source, digest) = image(dir.path(), b"x");
        let kept = dir.path().join("kept.raw");
        copy(&source, digest, &kept).unwrap();

        assert_eq!(chunker::manifest_of(&kept).unwrap().digest(), digest);
        assert!(fs::metadata(&kept).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_copy_of_something_else_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (source, _) = image(dir.path(), b"x");
        let kept = dir.path().join("kept.raw");
        let refused = copy(&source, ImageDigest([0; 32]), &kept).unwrap_err();
        assert!(matches!(refused, TemplateError::Changed { .. }));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
