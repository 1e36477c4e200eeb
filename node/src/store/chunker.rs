//! Turns a raw image file into its manifest, reading only what is there.
//!
//! The file system says where a sparse file has data; only those stretches are read, in windows of
//! one chunk on chunk borders, and windows of zeroes are holes too. So the manifest depends on the
//! image's bytes alone, never on how sparse the file happens to be. The image must not change
//! meanwhile; templates are replaced by new files, never written to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::chunk::{CHUNK_BYTES, CHUNK_BYTES_U64, ChunkId, is_zero};
use super::error::ReadImageError;
use super::extent::{Content, Extent};
use super::manifest::{Manifest, check_size};

/// Reads the raw image at `path` and describes it.
///
/// # Errors
/// - [`ReadImageError::Size`]: no image can have its size.
/// - [`ReadImageError::Disk`]: it could not be read to its end.
pub fn manifest_of(path: &Path) -> Result<Manifest, ReadImageError> {
    scan(path, |_, _| Ok(()))
}

/// Describes the raw image at `path` and hands every extent that is not a hole, with its bytes, to
/// `keep`, in order.
///
/// # Errors
/// As [`manifest_of`]; an error of `keep` ends the scan and comes back as the disk's.
pub fn scan(
    path: &Path,
    mut keep: impl FnMut(&Extent, &[u8]) -> io::Result<()>,
) -> Result<Manifest, ReadImageError> {
    let disk = |source| ReadImageError::Disk {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(disk)?;
    let image_bytes = file.metadata().map_err(disk)?.len();
    let wrong_size = || ReadImageError::Size {
        path: path.to_owned(),
        bytes: image_bytes,
    };
    check_size(image_bytes).map_err(|_| wrong_size())?;

    let mut extents = Vec::new();
    let mut covered_bytes = 0;
    let mut buffer = vec![0; CHUNK_BYTES];
    while let Some(start_bytes) = next_data(&file, covered_bytes, image_bytes).map_err(disk)? {
        extents.extend(hole(covered_bytes, start_bytes));
        let end_bytes = image_bytes.min(start_bytes + CHUNK_BYTES_U64);
        let window = window(&mut buffer, end_bytes - start_bytes);
        file.read_exact_at(window, start_bytes).map_err(disk)?;
        if is_zero(window) {
            extents.extend(hole(start_bytes, end_bytes));
        } else {
            let extent = whole_chunk(ChunkId::of(window), start_bytes, end_bytes);
            keep(&extent, window).map_err(disk)?;
            extents.push(extent);
        }
        covered_bytes = end_bytes;
    }
    extents.extend(hole(covered_bytes, image_bytes));
    Manifest::new(image_bytes, extents).map_err(|_| wrong_size())
}

/// Start of the first chunk window at or after `from_bytes` with data in it, if there is one.
pub(super) fn next_data(file: &File, from_bytes: u64, image_bytes: u64) -> io::Result<Option<u64>> {
    if from_bytes >= image_bytes {
        return Ok(None);
    }
    let Some(found) = seek(file, from_bytes, Whence::SeekData)? else {
        // From here to the end there is only hole.
        return Ok(None);
    };
    // Back to the border of its window, which never lies before `from_bytes`: that is one too.
    Ok(Some(found - found % CHUNK_BYTES_U64).filter(|start| *start < image_bytes))
}

/// The parts of `range` where the file has nothing, as far as its file system knows.
pub(super) fn holes(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let data = seek(file, at, Whence::SeekData)?.unwrap_or(range.end);
        if data > at {
            found.push(at..data.min(range.end));
        }
        if data >= range.end {
            break;
        }
        at = seek(file, data, Whence::SeekHole)?.unwrap_or(range.end);
    }
    Ok(found)
}

/// Where data or a hole begins at or after `from_bytes`; a file system that does not know takes
/// everything for data. `None`: nothing of the kind comes any more.
fn seek(file: &File, from_bytes: u64, what: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from_bytes).map_err(io::Error::other)?;
    match lseek(file, from, what) {
        Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
        Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
            Ok(matches!(what, Whence::SeekData).then_some(from_bytes))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn window(buffer: &mut [u8], len_bytes: u64) -> &mut [u8] {
    let len = usize::try_from(len_bytes).map_or(CHUNK_BYTES, |len| len.min(CHUNK_BYTES));
    &mut buffer[..len]
}

fn hole(start_bytes: u64, end_bytes: u64) -> Option<Extent> {
    (start_bytes < end_bytes).then(|| Extent {
        start_bytes,
        len_bytes: end_bytes - start_bytes,
        content: Content::Hole,
    })
}

fn whole_chunk(id: ChunkId, start_bytes: u64, end_bytes: u64) -> Extent {
    Extent {
        start_bytes,
        len_bytes: end_bytes - start_bytes,
        content: Content::Chunk {
            id,
            within_bytes: 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: usize = 4096;

    fn image(dir: &Path, name: &str, bytes: u64, writes: &[(u64, &[u8])]) -> PathBuf {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        for (at, data) in writes {
            file.write_all_at(data, *at).unwrap();
        }
        path
    }

    /// Puts an image together again from its manifest and chunks.
    fn restore(manifest: &Manifest, chunks: &HashMap<ChunkId, Vec<u8>>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extent in manifest.extents() {
            let len = usize::try_from(extent.len_bytes).unwrap();
            match extent.content {
                Content::Hole => bytes.resize(bytes.len() + len, 0),
                Content::Chunk { id, .. } => bytes.extend_from_slice(&chunks[&id][..len]),
            }
        }
        bytes
    }

    #[test]
    fn a_sparse_and_a_full_file_of_the_same_bytes_have_the_same_digest() {
        let dir = tempfile::tempdir().unwrap();
        let data = [5_u8; 3 * BLOCK];
        let bytes = 1 << 20;
        let sparse = image(dir.path(), "sparse", bytes, &[(300_000, &data)]);
        let zeroes = vec![0; 1 << 20];
        let full = image(dir.path(), "full", bytes, &[(0, &zeroes), (300_000, &data)]);
        let sparse = manifest_of(&sparse).unwrap();
        assert_eq!(sparse, manifest_of(&full).unwrap());
        assert_eq!(sparse.extents().len(), 3);
    }

    #[test]
    fn an_image_of_nothing_is_one_hole_however_large() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "empty", 1 << 40, &[]);
        let manifest = manifest_of(&path).unwrap();
        assert_eq!(manifest.extents().len(), 1);
        assert_eq!(manifest.image_bytes(), 1 << 40);
    }

    #[test]
    fn the_last_chunk_may_be_short() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = CHUNK_BYTES_U64 + 4096;
        let path = image(dir.path(), "short", bytes, &[(CHUNK_BYTES_U64, b"tail")]);
        let manifest = manifest_of(&path).unwrap();
        assert_eq!(manifest.extents()[1].len_bytes, 4096);
    }

    #[test]
    fn odd_and_empty_files_are_refused_by_size() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [0, 1, 4095, 65537] {
            let path = image(dir.path(), "odd", bytes, &[]);
            let refused = manifest_of(&path).unwrap_err();
            assert!(matches!(refused, ReadImageError::Size { .. }));
        }
    }

    proptest! {
        // Each case writes a file.
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn an_image_can_be_put_together_from_its_manifest_and_chunks(
            blocks in 1_usize..80,
            writes in prop::collection::vec((0_usize..80, any::<u8>(), 1_usize..20_000), 0..8),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut expected = vec![0; blocks * BLOCK];
            let path = image(dir.path(), "image", expected.len() as u64, &[]);
            let file = File::options().write(true).open(&path).unwrap();
            for (block, byte, len) in writes {
                let from = (block * BLOCK).min(expected.len());
                let to = (from + len).min(expected.len());
                expected[from..to].fill(byte);
                file.write_all_at(&expected[from..to], from as u64).unwrap();
            }
            let mut chunks = HashMap::new();
            let manifest = scan(&path, |_, bytes| {
                chunks.insert(ChunkId::of(bytes), bytes.to_vec());
                Ok(())
            }).unwrap();
            prop_assert!(restore(&manifest, &chunks) == expected);
        }
    }
}
