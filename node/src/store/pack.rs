//! One pack: a file of records, written from front to back and never changed after, except that a
//! bad record's head may be made void.
//!
//! ```text
//! "wrenn-pk"  u32 version  u32 number of the pack     then records, see `record`
//! ```
//!
//! A walk goes from head to head. Where no head verifies, it searches on, eight bytes at a time,
//! for the next record that verifies as a whole, and reports the gap: one bad byte loses one chunk,
//! never those behind it. Whoever holds a [`Pack`] reads it to the end of its life, even after its
//! file was unlinked.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::durable;
use super::record::{ALIGN, HEAD_BYTES, Head, MAX_RECORD_BYTES};

/// Version of packs and of the records in them.
pub(super) const PACK_VERSION: u32 = 1;
/// Bytes before the first record.
pub(super) const FIRST_RECORD: u32 = 16;

const MAGIC: [u8; 8] = *b"wrenn-pk";
/// Bytes read at once when searching for a head.
const SEARCH_BYTES: u32 = 256 * 1024;

/// How far a walk went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Walked {
    /// Where the last sound record ends.
    pub(super) sound_to: u32,
    /// Where it would go on, if it was broken off.
    pub(super) broken_off_at: Option<u32>,
}

/// A pack that is open.
#[derive(Debug)]
pub(super) struct Pack {
    number: u32,
    path: PathBuf,
    file: File,
    /// Where the next record would begin: everything before it has been written.
    end: AtomicU32,
}

/// How much of each record a walk reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// The heads alone: enough where everything is known to be on the medium.
    Heads,
    /// What is stored as well, against its checksum.
    Bodies,
}

/// What a walk came by.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// A record. `body` is what it stores, if it was read and is sound.
    Record {
        offset: u32,
        head: Head,
        body: Option<&'a [u8]>,
    },
    /// Bytes that are no record.
    Gap { from: u32, to: u32 },
}

/// What a pack's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Title {
    Ours,
    /// Written by another version of this program.
    Version(u32),
    /// Nothing that can be read: cut short, or damaged.
    Garbled,
}

impl Pack {
    /// The file name of a pack.
    pub(super) fn file_name(number: u32) -> String {
        format!("{number:08}.pack")
    }

    /// The number in a pack's file name, if it is one.
    pub(super) fn number_in(name: &str) -> Option<u32> {
        let number = name.strip_suffix(".pack")?.parse().ok()?;
        (Self::file_name(number) == name).then_some(number)
    }

    /// Makes an empty pack. Its name and title survive a power cut.
    pub(super) fn create(dir: &Path, number: u32) -> io::Result<Self> {
        let path = dir.join(Self::file_name(number));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(durable::PRIVATE_FILE)
            .open(&path)?;
        let made = file
            .write_all_at(&title(number), 0)
            .and_then(|()| file.sync_all())
            .and_then(|()| durable::sync_dir(dir));
        if let Err(err) = made {
            // It holds nothing; the number is used again.
            let _ = std::fs::remove_file(&path);
            return Err(err);
        }
        Ok(Self {
            number,
            path,
            file,
            end: AtomicU32::new(FIRST_RECORD),
        })
    }

    /// Opens a pack that is there, taking its whole length for written.
    pub(super) fn open(dir: &Path, number: u32) -> io::Result<(Self, Title)> {
        let path = dir.join(Self::file_name(number));
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let length = file.metadata()?.len();
        // We write none that long; what lies behind could not be named.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let title = read_title(&file, number, length)?;
        let pack = Self {
            number,
            path,
            file,
            end: AtomicU32::new(length.max(FIRST_RECORD)),
        };
        Ok((pack, title))
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn end(&self) -> u32 {
        self.end.load(Ordering::Acquire)
    }

    /// Writes a record at the end. On failure the end stays where it was, and what was written of
    /// the record is cut off.
    pub(super) fn append(&self, record: &[u8], record_bytes: u32) -> io::Result<()> {
        let end = self.end();
        if let Err(err) = self.file.write_all_at(record, u64::from(end)) {
            // Best effort: what remains is not a record, and is written over next.
            let _ = self.file.set_len(u64::from(end));
            return Err(err);
        }
        self.end.store(end + record_bytes, Ordering::Release);
        Ok(())
    }

    /// Forgets what lies behind `end`.
    pub(super) fn cut(&self, end: u32) -> io::Result<()> {
        self.end.store(end, Ordering::Release);
        self.file.set_len(u64::from(end))
    }

    /// Returns once everything written would survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Writes the title again, where it was garbled.
    pub(super) fn mend_title(&self) -> io::Result<()> {
        self.file.write_all_at(&title(self.number), 0)?;
        self.file.sync_all()
    }

    /// Makes the record at `offset` void, durably.
    pub(super) fn make_void(&self, offset: u32, head: Head) -> io::Result<()> {
        let void = head.void().encode(self.number, offset);
        self.file.write_all_at(&void, u64::from(offset))?;
        self.file.sync_data()
    }

    /// What the record at `offset` stores.
    pub(super) fn stored(&self, offset: u32, stored_bytes: u32) -> io::Result<Vec<u8>> {
        let mut stored = vec![0; stored_bytes as usize];
        let at = u64::from(offset) + HEAD_BYTES as u64;
        self.file.read_exact_at(&mut stored, at)?;
        Ok(stored)
    }

    /// The head of the record at `offset`, if there is one.
    pub(super) fn head(&self, offset: u32) -> io::Result<Option<Head>> {
        let mut bytes = [0; HEAD_BYTES];
        match self.file.read_exact_at(&mut bytes, u64::from(offset)) {
            Ok(()) => Ok(Head::parse(self.number, offset, &bytes)),
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Shows every record and gap up to the present end to `visit`, in order. Returns where the
    /// last sound record ends: `depth` says how sound.
    pub(super) fn walk(
        &self,
        depth: Depth,
        mut visit: impl FnMut(Found<'_>) -> io::Result<()>,
    ) -> io::Result<u32> {
        let on = |found: Found<'_>| visit(found).map(ControlFlow::Continue);
        Ok(self.walk_from(FIRST_RECORD, depth, on)?.sound_to)
    }

    /// The same from the record at `from` on, until `visit` breaks it off.
    pub(super) fn walk_from(
        &self,
        from: u32,
        depth: Depth,
        mut visit: impl FnMut(Found<'_>) -> io::Result<ControlFlow<()>>,
    ) -> io::Result<Walked> {
        let limit = self.end();
        let mut at = from.max(FIRST_RECORD);
        // From anywhere else no record would be found, and all would look damaged.
        at -= at % ALIGN;
        let mut sound_to = at;
        let broken_off = |sound_to, next| Walked {
            sound_to,
            broken_off_at: Some(next),
        };
        while at < limit {
            let Some(head) = self.head_within(at, limit)? else {
                let next = self.search(at, limit)?;
                if visit(Found::Gap { from: at, to: next })?.is_break() {
                    return Ok(broken_off(sound_to, next));
                }
                at = next;
                continue;
            };
            let stored = match depth {
                Depth::Heads => None,
                Depth::Bodies => Some(self.stored(at, head.stored_bytes)?),
            };
            let body = stored.as_deref().filter(|stored| head.fits(stored));
            let next = at + head.record_bytes();
            if depth == Depth::Heads || body.is_some() {
                sound_to = next;
            }
            let offset = at;
            at = next;
            if visit(Found::Record { offset, head, body })?.is_break() {
                return Ok(broken_off(sound_to, next));
            }
        }
        Ok(Walked {
            sound_to,
            broken_off_at: None,
        })
    }

    /// The head at `at`, if its whole record lies before `limit`.
    fn head_within(&self, at: u32, limit: u32) -> io::Result<Option<Head>> {
        let head = self.head(at)?;
        Ok(head.filter(|head| head.record_bytes() <= limit.saturating_sub(at)))
    }

    /// Where the first whole and undamaged record behind `bad` begins; `limit` if there is none.
    fn search(&self, bad: u32, limit: u32) -> io::Result<u32> {
        let mut block = vec![0; SEARCH_BYTES as usize + HEAD_BYTES];
        let mut from = bad.saturating_add(ALIGN);
        while from < limit {
            let wanted = block.len().min((limit - from) as usize);
            let read = read_up_to(&self.file, &mut block[..wanted], u64::from(from))?;
            let heads = (0..SEARCH_BYTES).step_by(ALIGN as usize);
            for (step, at) in heads.map(|step| (step as usize, from.saturating_add(step))) {
                let bytes = block[..read].get(step..).unwrap_or_default();
                let Some(head) = Head::parse(self.number, at, bytes) else {
                    continue;
                };
                if head.record_bytes() <= limit - at
                    && head.fits(&self.stored(at, head.stored_bytes)?)
                {
                    return Ok(at);
                }
            }
            from = from.saturating_add(SEARCH_BYTES);
        }
        Ok(limit)
    }
}

/// A pack must be able to take one more record at any offset that a full one may have.
pub(super) const MAX_PACK_BYTES: u32 = 1 << 30;
const _: () = assert!(MAX_PACK_BYTES as usize + MAX_RECORD_BYTES < u32::MAX as usize);
const _: () = assert!(FIRST_RECORD.is_multiple_of(ALIGN) && SEARCH_BYTES.is_multiple_of(ALIGN));

fn title(number: u32) -> [u8; FIRST_RECORD as usize] {
    let mut bytes = [0; FIRST_RECORD as usize];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&PACK_VERSION.to_le_bytes());
    bytes[12..].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn read_title(file: &File, number: u32, length: u32) -> io::Result<Title> {
    let mut bytes = [0; FIRST_RECORD as usize];
    if length < FIRST_RECORD {
        return Ok(Title::Garbled);
    }
    file.read_exact_at(&mut bytes, 0)?;
    if bytes == title(number) {
        return Ok(Title::Ours);
    }
    let mut version = [0; 4];
    version.copy_from_slice(&bytes[8..12]);
    let version = u32::from_le_bytes(version);
    if bytes[..8] == MAGIC && bytes[12..] == number.to_le_bytes() {
        return Ok(Title::Version(version));
    }
    Ok(Title::Garbled)
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests;
