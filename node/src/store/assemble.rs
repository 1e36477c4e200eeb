//! Puts an image together again in a file, sparse where it has holes.
//!
//! The file appears under its name whole and synced, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::chunk::ChunkId;
use super::durable;
use super::engine::Store;
use super::error::{AssembleError, ReadChunkError};
use super::extent::{Content, Extent};
use super::manifest::Manifest;
use super::share::share;
use super::snapshot::image_bytes_of;

impl Store {
    /// Writes the image to a file of `len_bytes` at `path`, replacing one that is there. All its
    /// chunks must be here.
    ///
    /// # Errors
    /// - [`AssembleError::Chunk`]: a chunk is missing or damaged.
    /// - [`AssembleError::Length`]: the image is no such file's.
    /// - [`AssembleError::Disk`]: the disk failed, or is full.
    pub fn assemble(
        &self,
        manifest: &Manifest,
        len_bytes: u64,
        path: &Path,
    ) -> Result<(), AssembleError> {
        if image_bytes_of(len_bytes) != manifest.image_bytes() {
            return Err(AssembleError::Length {
                image_bytes: manifest.image_bytes(),
                len_bytes,
            });
        }
        let temp = durable::temp_beside(path);
        let written = self.write_new(manifest, len_bytes, &temp).and_then(|()| {
            fs::rename(&temp, path).map_err(disk("rename to", path))?;
            let dir = path.parent().unwrap_or(path);
            durable::sync_dir(dir).map_err(disk("sync directory", dir))
        });
        if written.is_err() {
            // Best effort: the name says that it is rubbish.
            let _ = fs::remove_file(&temp);
        }
        written
    }

    fn write_new(
        &self,
        manifest: &Manifest,
        len_bytes: u64,
        temp: &Path,
    ) -> Result<(), AssembleError> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(durable::PRIVATE_FILE)
            .open(temp)
            .map_err(disk("create", temp))?;
        file.set_len(len_bytes)
            .map_err(disk("set the length of", temp))?;
        let chunks = manifest
            .extents()
            .iter()
            .filter_map(|extent| match extent.content {
                Content::Hole => None,
                Content::Chunk { id, within_bytes } => Some(Ok((extent, id, within_bytes))),
            });
        share(
            &self.core.helper,
            chunks,
            |(extent, id, within_bytes), _| {
                let part = self.part(extent, id, within_bytes)?;
                write_part(&file, &part, extent.start_bytes, len_bytes).map_err(disk("write", temp))
            },
        )?;
        file.sync_all().map_err(disk("sync", temp))
    }

    /// The bytes of an extent.
    fn part(&self, extent: &Extent, id: ChunkId, within: u32) -> Result<Vec<u8>, ReadChunkError> {
        let mut chunk = self.get(&id)?;
        let within = within as usize;
        let end = usize::try_from(extent.len_bytes).map(|len| within.saturating_add(len));
        match end {
            Ok(end) if end <= chunk.len() => {
                chunk.truncate(end);
                chunk.drain(..within);
                Ok(chunk)
            }
            _ => Err(ReadChunkError::TooShort { chunk: id }),
        }
    }
}

/// Writes what of `part` lies before the end of the file.
fn write_part(file: &File, part: &[u8], start_bytes: u64, len_bytes: u64) -> io::Result<()> {
    let room = usize::try_from(len_bytes.saturating_sub(start_bytes)).unwrap_or(usize::MAX);
    file.write_all_at(&part[..part.len().min(room)], start_bytes)
}

fn disk<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> AssembleError + 'a {
    move |source| AssembleError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}
