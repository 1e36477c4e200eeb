//! Sealing images: a whole file, or only what has changed in one since its parent was sealed.
//!
//! Both look at the image in windows of one chunk on chunk borders, as the chunker does, so both
//! give the same manifest for the same bytes, and every window that did not change has the parent's
//! chunk.
//!
//! **Changed ranges** are what the tracker of writes says, by page. A window with a changed page is
//! read; all others are taken from the parent unread. Guest memory that is being paged in has pages
//! that are not there yet, and these read as zero. So in a window that is read, a page that is not
//! marked as changed *and* is a hole in the file is taken from the parent. A page that is marked
//! and is a hole (the guest gave it back) is zero, and a window of zeroes becomes a hole.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::chunk::{CHUNK_BYTES_U64, ChunkId};
use super::chunker;
use super::error::{ReadChunkError, SealError};
use super::extent::{BLOCK_BYTES, Content, Extent};
use super::manifest::{Manifest, check_size};
use super::seal::Seal;
use super::share::share;
use super::snapshot::{ImageRef, image_bytes_of};

/// An image that is part of a seal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedImage {
    /// Its name and the length of the file.
    pub image: ImageRef,
    /// What it consists of.
    pub manifest: Manifest,
}

/// One chunk's worth of an image.
struct Window {
    bytes: Range<u64>,
    /// Pages that are taken from the parent where the file has a hole, between those that changed.
    unchanged: Vec<Range<u64>>,
}

impl Seal {
    /// Seals the first `len_bytes` of `file`, reading only where the file system says there is
    /// data. What is missing from the last block is zero. All that is not zero must be in the file:
    /// memory that is still being paged in goes through [`Self::image_changed`].
    ///
    /// # Errors
    /// [`SealError::ImageSize`], [`SealError::Read`] where the file cannot be an image or be read;
    /// else as [`Seal::put`].
    pub fn image(&self, file: &File, len_bytes: u64) -> Result<SealedImage, SealError> {
        let mut reached = 0;
        let windows = std::iter::from_fn(|| {
            let found = chunker::next_data(file, reached, len_bytes).transpose()?;
            Some(found.map_err(read_failed).map(|start| {
                reached = image_bytes_of(len_bytes).min(start + CHUNK_BYTES_U64);
                Window {
                    bytes: start..reached,
                    unchanged: Vec::new(),
                }
            }))
        });
        self.seal_windows(file, len_bytes, windows, None)
    }

    /// Seals the first `len_bytes` of `file`, of which everything outside `changed` is as in
    /// `parent`. Ranges are bytes of the image, in any order; they are widened to whole pages.
    ///
    /// Chunks of the parent that are not here stay so: see [`missing`](super::Store::missing).
    ///
    /// # Errors
    /// [`SealError::ImageSize`], [`SealError::Read`] where the file cannot be an image or be read;
    /// [`SealError::Parent`] where a page that is not in the file is not in the store either; else
    /// as [`Seal::put`].
    pub fn image_changed(
        &self,
        parent: &Manifest,
        file: &File,
        len_bytes: u64,
        changed: &[Range<u64>],
    ) -> Result<SealedImage, SealError> {
        let windows = changed_windows(parent, image_bytes_of(len_bytes), changed);
        let windows = windows.into_iter().map(Ok);
        self.seal_windows(file, len_bytes, windows, Some(parent))
    }

    fn seal_windows(
        &self,
        file: &File,
        len_bytes: u64,
        windows: impl Iterator<Item = Result<Window, SealError>> + Send,
        parent: Option<&Manifest>,
    ) -> Result<SealedImage, SealError> {
        let image_bytes = image_bytes_of(len_bytes);
        let wrong_size = || SealError::ImageSize { len_bytes };
        check_size(image_bytes).map_err(|_| wrong_size())?;
        let mut sealed = share(&self.core.helper, windows, |window, buffer| {
            self.read_window(file, len_bytes, &window, parent, buffer)?;
            self.count_read(buffer.len());
            Ok((window.bytes, self.put(buffer)?))
        })?;
        sealed.sort_unstable_by_key(|(window, _)| window.start);
        let mut extents = Vec::with_capacity(sealed.len());
        let mut covered = 0;
        for (window, id) in sealed {
            extents.extend(between(parent, covered..window.start));
            extents.push(extent(window.start, window.end - window.start, id));
            covered = window.end;
        }
        extents.extend(between(parent, covered..image_bytes));
        let manifest = Manifest::new(image_bytes, extents).map_err(|_| wrong_size())?;
        let digest = self.put_image(&manifest);
        let image = ImageRef { digest, len_bytes };
        Ok(SealedImage { image, manifest })
    }

    /// Fills `buffer` with the bytes of the window.
    fn read_window(
        &self,
        file: &File,
        len_bytes: u64,
        window: &Window,
        parent: Option<&Manifest>,
        buffer: &mut Vec<u8>,
    ) -> Result<(), SealError> {
        let Range { start, end } = window.bytes;
        let in_file = end.min(len_bytes).saturating_sub(start);
        // Looked for before anything is read: a page that arrives in between is the parent's, and
        // after the read it would be no hole any more, with zeroes in the buffer.
        let mut holes = Vec::new();
        for unchanged in window.unchanged.iter().filter(|_| parent.is_some()) {
            holes.extend(chunker::holes(file, unchanged.clone()).map_err(read_failed)?);
        }
        buffer.clear();
        buffer.resize(length(end - start), 0);
        file.read_exact_at(&mut buffer[..length(in_file)], start)
            .map_err(read_failed)?;
        if let Some(parent) = parent {
            for hole in holes {
                self.read_parent(parent, hole, start, buffer)?;
            }
        }
        Ok(())
    }

    /// Copies a range of the parent into the buffer of the window that begins at `start`.
    fn read_parent(
        &self,
        parent: &Manifest,
        range: Range<u64>,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), SealError> {
        for part in slices(parent, range) {
            let at = length(part.start_bytes - start);
            let target = &mut buffer[at..at + length(part.len_bytes)];
            match part.content {
                Content::Hole => target.fill(0),
                Content::Chunk { id, within_bytes } => {
                    let chunk = self.core.get(&id).map_err(SealError::Parent)?;
                    let within = within_bytes as usize;
                    let bytes = chunk.get(within..within + target.len());
                    let short = ReadChunkError::TooShort { chunk: id };
                    let bytes = bytes.ok_or(SealError::Parent(short))?;
                    target.copy_from_slice(bytes);
                }
            }
        }
        Ok(())
    }
}

/// The windows that must be read, in order, each once.
fn changed_windows(parent: &Manifest, image_bytes: u64, changed: &[Range<u64>]) -> Vec<Window> {
    let mut ranges: Vec<Range<u64>> = changed
        .iter()
        .map(|range| {
            let start = range.start - range.start % BLOCK_BYTES;
            let end = range.end.min(image_bytes);
            start..end.next_multiple_of(BLOCK_BYTES)
        })
        .filter(|range| range.start < range.end)
        .collect();
    if parent.image_bytes() != image_bytes {
        // All from the first window on that is not whole in both.
        let common = parent.image_bytes().min(image_bytes);
        ranges.push(common - common % CHUNK_BYTES_U64..image_bytes);
    }
    let mut windows: Vec<Window> = Vec::new();
    for range in merged(ranges) {
        let mut at = range.start;
        while at < range.end {
            let start = at - at % CHUNK_BYTES_U64;
            let end = image_bytes.min(start + CHUNK_BYTES_U64);
            if windows.last().is_none_or(|last| last.bytes.start != start) {
                windows.push(Window {
                    bytes: start..end,
                    unchanged: std::iter::once(start..end).collect(),
                });
            }
            if let Some(window) = windows.last_mut() {
                window.take_changed(&(at..range.end.min(end)));
            }
            at = end;
        }
    }
    windows
}

/// The same ranges in order and apart from each other.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

impl Window {
    /// Ranges come in order and apart, so only the last unchanged part can be touched.
    fn take_changed(&mut self, changed: &Range<u64>) {
        let Some(last) = self.unchanged.pop() else {
            return;
        };
        let before = last.start..changed.start.clamp(last.start, last.end);
        let after = changed.end.clamp(last.start, last.end)..last.end;
        let parts = [before, after].into_iter().filter(|part| !part.is_empty());
        self.unchanged.extend(parts);
    }
}

/// What lies between windows: the parent's, or nothing.
fn between(parent: Option<&Manifest>, range: Range<u64>) -> Vec<Extent> {
    if range.is_empty() {
        return Vec::new();
    }
    match parent {
        Some(parent) => slices(parent, range).collect(),
        None => vec![extent(range.start, range.end - range.start, None)],
    }
}

/// The parts of an image's extents that lie in `range`.
fn slices(manifest: &Manifest, range: Range<u64>) -> impl Iterator<Item = Extent> {
    let extents = manifest.extents();
    let first = extents.partition_point(|extent| extent.end_bytes() <= range.start);
    let touched = extents[first..]
        .iter()
        .take_while(move |extent| extent.start_bytes < range.end);
    touched.map(move |whole| {
        let start_bytes = whole.start_bytes.max(range.start);
        let end_bytes = whole.end_bytes().min(range.end);
        let skipped = start_bytes - whole.start_bytes;
        let content = match whole.content {
            Content::Hole => Content::Hole,
            Content::Chunk { id, within_bytes } => Content::Chunk {
                id,
                within_bytes: u32::try_from(u64::from(within_bytes) + skipped)
                    .expect("an extent of a chunk lies within a chunk"),
            },
        };
        Extent {
            start_bytes,
            len_bytes: end_bytes - start_bytes,
            content,
        }
    })
}

fn extent(start_bytes: u64, len_bytes: u64, id: Option<ChunkId>) -> Extent {
    let content = id.map_or(Content::Hole, |id| Content::Chunk {
        id,
        within_bytes: 0,
    });
    Extent {
        start_bytes,
        len_bytes,
        content,
    }
}

/// A length inside a window.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a window is no longer than a chunk")
}

fn read_failed(source: io::Error) -> SealError {
    SealError::Read { source }
}

#[cfg(test)]
mod tests;
