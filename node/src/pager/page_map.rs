//! The page map: for each piece of a memory image, which chunk holds it and where that lies.
//!
//! The daemon writes it (`D/pages`) when a guest is resumed; the pager reads it once, and again
//! when it takes over. What no extent covers is zero. A chunk that this node did not hold when the
//! map was written has no place in it; the pager asks the daemon for it.
//!
//! ```text
//! "WRNPAGES" version:u32 image_bytes:u64 packs:u32 chunks:u32 extents:u32
//! pack     length:u16 path
//! chunk    id:32 bytes:u32 pack:u32 (none: 0xffffffff) offset:u64 stored:u32 encoding:u8
//! extent   start_page:u32 pages:u8 chunk:u32 within_page:u8
//! BLAKE3 of all of it
//! ```
//!
//! Integers are little-endian. The hash finds a file that a crash cut short; what the file says is
//! checked as if it came from a stranger all the same.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::pager::region::{ImageOffset, PAGE_BYTES, Region, WINDOW_BYTES, WindowIndex};
use crate::store::chunk::{CHUNK_BYTES, CHUNK_BYTES_U64, ChunkId};
use crate::store::durable;

/// Its name in a sandbox's directory.
pub const PAGES: &str = "pages";

const MAGIC: [u8; 8] = *b"WRNPAGES";
const VERSION: u32 = 1;
/// In the place of a pack's number: this node does not hold the chunk.
const NO_PACK: u32 = u32::MAX;
/// A path has at most so many bytes, as in the kernel.
const MAX_PATH_BYTES: usize = 4096;
/// A store of a terabyte has a few thousand packs.
const MAX_PACKS: u32 = 1 << 16;
/// The largest map that is read: a guest of 64 GiB whose every chunk differs has 64 MiB of it.
const MAX_FILE_BYTES: u64 = 1 << 30;
/// The largest stored form of a chunk: raw, for what does not compress.
pub const MAX_STORED_BYTES: u32 = 64 * 1024;
const _: () = assert!(MAX_STORED_BYTES as usize == CHUNK_BYTES);

/// How a chunk's bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}

impl Encoding {
    /// Its number in files and on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
        }
    }

    /// The encoding with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Where the stored bytes of a chunk lie on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pack file. Shared: an image has many chunks in few packs.
    pub pack: Arc<Path>,
    /// Where in it the stored bytes begin (not the head of their record).
    pub offset: u64,
    /// How many there are, at most [`MAX_STORED_BYTES`].
    pub stored_bytes: u32,
    /// What form they have.
    pub encoding: Encoding,
}

/// A chunk of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedChunk {
    /// Its name.
    pub id: ChunkId,
    /// Its length, before it was encoded.
    pub bytes: u32,
    /// Where it lies; `None` if this node did not hold it.
    pub place: Option<Place>,
}

/// A run of pages of the image that lies in one chunk and in one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedExtent {
    /// Where it begins.
    pub start: ImageOffset,
    /// How long it is.
    pub bytes: u64,
    /// Which chunk it is in, as an index of [`PageMap::chunks`].
    pub chunk: u32,
    /// Where in the chunk it begins.
    pub within: u32,
}

/// Why bytes are no page map, or a piece does not fit into one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageMapError {
    /// The file cannot be read or written.
    #[error("use the page map {path:?}")]
    Disk {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else, or of another release.
    #[error("no page map of version {VERSION}")]
    Unknown,
    /// It ends early, or its hash is another.
    #[error("the page map is cut short or damaged")]
    Damaged,
    /// It contradicts itself.
    #[error("the page map is wrong: {reason}")]
    Wrong {
        /// In what way.
        reason: &'static str,
    },
}

fn wrong(reason: &'static str) -> PageMapError {
    PageMapError::Wrong { reason }
}

/// The whole map of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    region: Region,
    chunks: Vec<MappedChunk>,
    extents: Vec<MappedExtent>,
}

impl PageMap {
    /// A map of an image with nothing in it yet.
    #[must_use]
    pub fn builder(region: Region) -> PageMapBuilder {
        PageMapBuilder {
            map: Self {
                region,
                chunks: Vec::new(),
                extents: Vec::new(),
            },
            known: HashMap::new(),
        }
    }

    /// The memory it describes.
    #[must_use]
    pub fn region(&self) -> Region {
        self.region
    }

    /// The chunks, in no order that means anything.
    #[must_use]
    pub fn chunks(&self) -> &[MappedChunk] {
        &self.chunks
    }

    /// The extents inside `window`, in order. What they leave out of it is zero.
    #[must_use]
    pub fn extents_of(&self, window: WindowIndex) -> &[MappedExtent] {
        let from = |window: u64| {
            let start = window.saturating_mul(WINDOW_BYTES);
            self.extents
                .partition_point(|extent| extent.start.0 < start)
        };
        &self.extents[from(window.0)..from(window.0.saturating_add(1))]
    }

    /// Writes it so that after a crash the file is the old one, the new one, or refused.
    ///
    /// # Errors
    /// The disk refused.
    pub fn write(&self, path: &Path) -> Result<(), PageMapError> {
        durable::write(path, &self.encode()).map_err(|source| PageMapError::Disk {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads it back.
    ///
    /// # Errors
    /// See [`PageMapError`].
    pub fn read(path: &Path) -> Result<Self, PageMapError> {
        let disk = |source| PageMapError::Disk {
            path: path.to_owned(),
            source,
        };
        if fs::metadata(path).map_err(disk)?.len() > MAX_FILE_BYTES {
            return Err(wrong("it is larger than any"));
        }
        Self::decode(&fs::read(path).map_err(disk)?)
    }

    /// Its file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut packs: HashMap<&Path, u32> = HashMap::new();
        let mut paths = Vec::new();
        for place in self.chunks.iter().filter_map(|chunk| chunk.place.as_ref()) {
            packs.entry(&*place.pack).or_insert_with(|| {
                paths.push(place.pack.as_os_str().as_bytes());
                count(paths.len()) - 1
            });
        }
        let mut file = Vec::from(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend(self.region.bytes().to_le_bytes());
        for length in [paths.len(), self.chunks.len(), self.extents.len()] {
            file.extend(count(length).to_le_bytes());
        }
        for path in paths {
            let length = u16::try_from(path.len()).unwrap_or(u16::MAX);
            file.extend(length.to_le_bytes());
            file.extend(&path[..usize::from(length)]);
        }
        for chunk in &self.chunks {
            encode_chunk(chunk, &packs, &mut file);
        }
        for extent in &self.extents {
            encode_extent(extent, &mut file);
        }
        let hash = blake3::hash(&file);
        file.extend(hash.as_bytes());
        file
    }

    /// The map that `file` holds.
    ///
    /// # Errors
    /// See [`PageMapError`].
    pub fn decode(file: &[u8]) -> Result<Self, PageMapError> {
        let mut reader = Reader { left: file };
        if reader.take::<8>()? != MAGIC || u32::from_le_bytes(reader.take()?) != VERSION {
            return Err(PageMapError::Unknown);
        }
        let (body, hash) = file.split_last_chunk::<32>().ok_or(PageMapError::Damaged)?;
        if blake3::hash(body) != *hash {
            return Err(PageMapError::Damaged);
        }
        // Magic and version are behind us; all that is left is body.
        reader.left = body.get(12..).ok_or(PageMapError::Damaged)?;
        let bytes = u64::from_le_bytes(reader.take()?);
        let region = Region::of_bytes(bytes).ok_or_else(|| wrong("its size is no whole pages"))?;
        let [packs, chunks, extents] = [reader.take()?, reader.take()?, reader.take()?];
        let packs = reader.packs(u32::from_le_bytes(packs))?;
        let mut builder = Self::builder(region);
        for _ in 0..u32::from_le_bytes(chunks) {
            let chunk = reader.chunk(&packs)?;
            check_chunk(&chunk)?;
            builder.map.chunks.push(chunk);
        }
        for _ in 0..u32::from_le_bytes(extents) {
            let extent = reader.extent()?;
            builder.push_extent(extent)?;
        }
        if !reader.left.is_empty() {
            return Err(wrong("it goes on after its end"));
        }
        Ok(builder.map)
    }
}

/// `length` as a number in the file. A map has fewer chunks and extents than pages, of which a
/// number of 32 bits counts 16 TiB.
fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn encode_chunk(chunk: &MappedChunk, packs: &HashMap<&Path, u32>, file: &mut Vec<u8>) {
    file.extend(chunk.id.0);
    file.extend(chunk.bytes.to_le_bytes());
    let place = chunk.place.as_ref();
    let pack = place.and_then(|place| packs.get(&*place.pack).copied());
    file.extend(pack.unwrap_or(NO_PACK).to_le_bytes());
    file.extend(place.map_or(0, |place| place.offset).to_le_bytes());
    file.extend(place.map_or(0, |place| place.stored_bytes).to_le_bytes());
    file.push(place.map_or(0, |place| place.encoding.code()));
}

fn encode_extent(extent: &MappedExtent, file: &mut Vec<u8>) {
    let pages = |bytes: u64| u8::try_from(bytes / PAGE_BYTES).unwrap_or(u8::MAX);
    let start = u32::try_from(extent.start.page().0).unwrap_or(u32::MAX);
    file.extend(start.to_le_bytes());
    file.push(pages(extent.bytes));
    file.extend(extent.chunk.to_le_bytes());
    file.push(pages(u64::from(extent.within)));
}

fn check_chunk(chunk: &MappedChunk) -> Result<(), PageMapError> {
    let whole = |bytes: u32| u64::from(bytes).is_multiple_of(PAGE_BYTES);
    if chunk.bytes == 0 || u64::from(chunk.bytes) > CHUNK_BYTES_U64 || !whole(chunk.bytes) {
        return Err(wrong("a chunk's length is none"));
    }
    let Some(place) = &chunk.place else {
        return Ok(());
    };
    let raw_and_shorter = place.encoding == Encoding::Raw && place.stored_bytes != chunk.bytes;
    if place.stored_bytes == 0 || place.stored_bytes > MAX_STORED_BYTES || raw_and_shorter {
        return Err(wrong("a chunk's stored length is none"));
    }
    if place.pack.as_os_str().len() > MAX_PATH_BYTES || !place.pack.is_absolute() {
        return Err(wrong("a pack's path is none"));
    }
    Ok(())
}

/// Makes a map piece by piece.
#[derive(Debug)]
pub struct PageMapBuilder {
    map: PageMap,
    known: HashMap<ChunkId, u32>,
}

impl PageMapBuilder {
    /// Says that `bytes` of the image from `start` on are those of `chunk` from `within` on.
    /// Pieces come in order. A chunk that was named before keeps the place it had then.
    ///
    /// # Errors
    /// [`PageMapError::Wrong`]: not whole pages, out of order, past an end, or a bad place.
    pub fn push(
        &mut self,
        start: ImageOffset,
        bytes: u64,
        within: u32,
        chunk: MappedChunk,
    ) -> Result<(), PageMapError> {
        let index = match self.known.get(&chunk.id) {
            Some(&index) => index,
            None => {
                check_chunk(&chunk)?;
                let index = count(self.map.chunks.len());
                self.known.insert(chunk.id, index);
                self.map.chunks.push(chunk);
                index
            }
        };
        let (mut at, mut left, mut within) = (start.0, bytes, u64::from(within));
        // A piece that lies across windows is several extents.
        while left > 0 {
            let here = left.min(WINDOW_BYTES - at % WINDOW_BYTES);
            self.push_extent(MappedExtent {
                start: ImageOffset(at),
                bytes: here,
                chunk: index,
                within: u32::try_from(within).map_err(|_| wrong("it ends past its chunk"))?,
            })?;
            at = at.saturating_add(here);
            within = within.saturating_add(here);
            left -= here;
        }
        Ok(())
    }

    /// The map.
    #[must_use]
    pub fn finish(self) -> PageMap {
        self.map
    }

    fn push_extent(&mut self, extent: MappedExtent) -> Result<(), PageMapError> {
        let map = &mut self.map;
        let whole = |bytes: u64| bytes.is_multiple_of(PAGE_BYTES);
        let within = u64::from(extent.within);
        if extent.bytes == 0
            || ![extent.start.0, extent.bytes, within]
                .into_iter()
                .all(whole)
        {
            return Err(wrong("an extent is no run of whole pages"));
        }
        let chunk_bytes = usize::try_from(extent.chunk)
            .ok()
            .and_then(|index| map.chunks.get(index))
            .map(|chunk| u64::from(chunk.bytes))
            .ok_or_else(|| wrong("an extent names a chunk that is not there"))?;
        if within.saturating_add(extent.bytes) > chunk_bytes {
            return Err(wrong("an extent ends past its chunk"));
        }
        let end = extent.start.0.saturating_add(extent.bytes);
        if end > map.region.bytes() {
            return Err(wrong("an extent ends past the image"));
        }
        if extent.start.0 % WINDOW_BYTES + extent.bytes > WINDOW_BYTES {
            return Err(wrong("an extent lies across windows"));
        }
        let free_from = map
            .extents
            .last()
            .map_or(0, |last| last.start.0 + last.bytes);
        if extent.start.0 < free_from {
            return Err(wrong("extents overlap or are out of order"));
        }
        map.extents.push(extent);
        Ok(())
    }
}

/// What is left of a file.
struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], PageMapError> {
        let (taken, left) = self.left.split_first_chunk().ok_or(PageMapError::Damaged)?;
        self.left = left;
        Ok(*taken)
    }

    fn slice(&mut self, length: usize) -> Result<&'a [u8], PageMapError> {
        let (taken, left) = self
            .left
            .split_at_checked(length)
            .ok_or(PageMapError::Damaged)?;
        self.left = left;
        Ok(taken)
    }

    fn packs(&mut self, packs: u32) -> Result<Vec<Arc<Path>>, PageMapError> {
        if packs > MAX_PACKS {
            return Err(wrong("it has more packs than any store"));
        }
        (0..packs)
            .map(|_| {
                let length = u16::from_le_bytes(self.take()?);
                let path = self.slice(usize::from(length))?;
                Ok(Path::new(OsStr::from_bytes(path)).into())
            })
            .collect()
    }

    fn chunk(&mut self, packs: &[Arc<Path>]) -> Result<MappedChunk, PageMapError> {
        let id = ChunkId(self.take()?);
        let bytes = u32::from_le_bytes(self.take()?);
        let pack = u32::from_le_bytes(self.take()?);
        let offset = u64::from_le_bytes(self.take()?);
        let stored_bytes = u32::from_le_bytes(self.take()?);
        let [code] = self.take()?;
        if pack == NO_PACK {
            return Ok(MappedChunk {
                id,
                bytes,
                place: None,
            });
        }
        let pack = usize::try_from(pack).ok().and_then(|pack| packs.get(pack));
        let place = Place {
            pack: pack
                .ok_or_else(|| wrong("a chunk names a pack that is not there"))?
                .clone(),
            offset,
            stored_bytes,
            encoding: Encoding::from_code(code)
                .ok_or_else(|| wrong("a chunk has an encoding that nobody knows"))?,
        };
        Ok(MappedChunk {
            id,
            bytes,
            place: Some(place),
        })
    }

    fn extent(&mut self) -> Result<MappedExtent, PageMapError> {
        let start = u64::from(u32::from_le_bytes(self.take()?));
        let [pages] = self.take()?;
        let chunk = u32::from_le_bytes(self.take()?);
        let [within] = self.take()?;
        let page_bytes = u32::try_from(PAGE_BYTES).unwrap_or(0);
        Ok(MappedExtent {
            start: ImageOffset(start * PAGE_BYTES),
            bytes: u64::from(pages) * PAGE_BYTES,
            chunk,
            within: u32::from(within) * page_bytes,
        })
    }
}

#[cfg(test)]
mod tests;
