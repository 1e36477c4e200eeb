//! Zip files of strangers, made into what everything else here reads: a tar file, compressed with gzip.
//!
//! ```text
//! zip file > headers counted > directory read > each member checked, inflated > tar file, made anew
//! ```
//!
//! The `zip` crate reads the directory at the file's end and keeps all of it in memory, so the headers in
//! the file are counted before it may. What a member is called, is and unpacks to is judged here; no more
//! is believed of a member's size than it then has. Nothing is unpacked. Names are taken as UTF-8, which
//! all writers of today use; the tables of the eighties are not guessed.
//!
//! What a crash leaves is a file without its lasting name, swept as every other archive.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::civil;
use jiff::tz::TimeZone;
use tar::{Builder, EntryType, Header};
use zip::ZipArchive;
use zip::result::ZipError;

use super::{ArchiveError, Limits, PATH_BYTES, READ_BYTES, text, too_large};
use crate::template::recipe::inside;

/// How zip files begin: with a member, or with the end of a directory that has none.
const MAGICS: [&[u8]; 2] = [b"PK\x03\x04", b"PK\x05\x06"];
/// How each header of the directory begins.
const DIRECTORY_HEADER: &[u8] = b"PK\x01\x02";
/// What a member costs beside its contents: its header in the tar file.
const HEADER_BYTES: u64 = 512;
/// The bits of a mode that say what something is, and their values.
const TYPE_BITS: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
/// Permissions where the writer of the file has told none.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// Why no tar file was made of a zip file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RepackError {
    /// The zip file cannot be used.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// This node's disk refused.
    #[error("write the archive")]
    Write(#[source] io::Error),
}

impl From<ZipError> for RepackError {
    fn from(err: ZipError) -> Self {
        Self::Archive(ArchiveError::Read(err.into()))
    }
}

/// Whether the file begins as a zip file does.
///
/// # Errors
/// It cannot be read.
pub fn is_zip(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut head)?;
    Ok(MAGICS.contains(&head.as_slice()))
}

/// Makes a compressed tar file at `to` of the zip file at `from`.
///
/// # Errors
/// [`RepackError`]; then `to` holds nothing of use.
pub fn repack(from: &Path, to: &Path, limits: Limits) -> Result<(), RepackError> {
    let mut file = File::open(from).map_err(ArchiveError::from)?;
    count_headers(&mut file, limits)?;
    file.rewind().map_err(ArchiveError::from)?;
    let mut archive = ZipArchive::new(BufReader::with_capacity(READ_BYTES, file))?;
    if archive.has_duplicate_names() {
        return Err(ArchiveError::Twice.into());
    }
    // Each of many could have all of the file read, however little it unpacks to.
    if archive.has_overlapping_entries()? {
        return Err(damaged("two members have bytes in common").into());
    }
    let out = File::create(to).map_err(RepackError::Write)?;
    let out = BufWriter::with_capacity(READ_BYTES, out);
    let out = GzEncoder::new(out, Compression::fast());
    let mut repacking = Repacking {
        out: Builder::new(out),
        limits,
        left: limits.bytes,
        seen: BTreeMap::new(),
    };
    for at in 0..archive.len() {
        repacking.member(&mut archive, at)?;
    }
    repacking.finish()
}

/// Refuses a file with more headers than members are taken, before any of them is read. What happens to look
/// like one inside of a member is counted too.
fn count_headers(file: &mut File, limits: Limits) -> Result<(), ArchiveError> {
    let mut buffer = vec![0; READ_BYTES];
    let (mut kept, mut count) = (0, 0);
    loop {
        let read = file.read(&mut buffer[kept..])?;
        if read == 0 {
            return Ok(());
        }
        let filled = &buffer[..kept + read];
        let windows = filled.windows(DIRECTORY_HEADER.len());
        count += windows.filter(|it| *it == DIRECTORY_HEADER).count();
        if count > limits.members {
            return Err(too_large(limits));
        }
        // One may begin here and end in what is read next.
        let end = filled.len();
        kept = end.min(DIRECTORY_HEADER.len() - 1);
        buffer.copy_within(end - kept..end, 0);
    }
}

/// What a member of a zip file is.
struct Entry {
    path: String,
    kind: EntryType,
    mode: u32,
    bytes: u64,
    modified: u64,
}

/// A tar file that is being made.
struct Repacking {
    out: Builder<GzEncoder<BufWriter<File>>>,
    limits: Limits,
    /// Bytes that all members to come may have.
    left: u64,
    /// The members so far, and whether something may lie below each.
    seen: BTreeMap<String, bool>,
}

impl Repacking {
    /// Takes a member over.
    fn member(
        &mut self,
        archive: &mut ZipArchive<BufReader<File>>,
        at: usize,
    ) -> Result<(), RepackError> {
        let entry = entry(archive, at)?;
        let cost = entry.bytes.saturating_add(HEADER_BYTES);
        let left = self.left.checked_sub(cost);
        self.left = left.ok_or_else(|| too_large(self.limits))?;
        let is_directory = entry.kind == EntryType::Directory;
        if self.seen.insert(entry.path.clone(), is_directory).is_some() {
            return Err(ArchiveError::Twice.into());
        }
        // The root is there anyway.
        if entry.path.is_empty() {
            return Ok(());
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_mtime(entry.modified);
        header.set_size(0);
        let path = &entry.path;
        let added = match entry.kind {
            EntryType::Symlink => {
                let target = target(archive, at)?;
                self.out.append_link(&mut header, path, target)
            }
            EntryType::Directory => self.out.append_data(&mut header, path, io::empty()),
            _ => {
                header.set_size(entry.bytes);
                // One byte past what it says shows that it says too little.
                let mut contents = Counting {
                    reader: archive.by_index(at)?.take(entry.bytes + 1),
                    read: 0,
                    failed: None,
                };
                let added = self.out.append_data(&mut header, path, &mut contents);
                if let Some(err) = contents.failed {
                    return Err(ArchiveError::Read(err).into());
                }
                if added.is_ok() && contents.read != entry.bytes {
                    return Err(damaged("a member is not as long as it says").into());
                }
                added
            }
        };
        added.map_err(RepackError::Write)
    }

    /// Everything is on the disk when this returns.
    fn finish(self) -> Result<(), RepackError> {
        let Self { out, seen, .. } = self;
        refuse_behind(&seen)?;
        let finish = || {
            let out = out.into_inner()?.finish()?;
            let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.flush()?;
            file.sync_all()
        };
        finish().map_err(RepackError::Write)
    }
}

/// What the directory says of a member, checked.
fn entry(archive: &ZipArchive<BufReader<File>>, at: usize) -> Result<Entry, RepackError> {
    let said = archive.by_index_data(at)?;
    let name = text(said.name_raw())?;
    let path = inside(&name).ok_or_else(|| ArchiveError::Outside(name.clone()))?;
    if said.encrypted() {
        return Err(ArchiveError::Encrypted(path).into());
    }
    let mode = said.unix_mode().unwrap_or(0);
    let is_named_directory = name.ends_with('/');
    let kind = match mode & TYPE_BITS {
        DIRECTORY => EntryType::Directory,
        REGULAR | 0 if is_named_directory => EntryType::Directory,
        REGULAR | 0 => EntryType::Regular,
        SYMLINK => EntryType::Symlink,
        _ => return Err(ArchiveError::Special(path).into()),
    };
    if path.is_empty() && kind != EntryType::Directory {
        return Err(ArchiveError::Name.into());
    }
    let told = mode & 0o7777;
    let mode = match (told, kind) {
        (0, EntryType::Directory) => DIRECTORY_MODE,
        (0, _) => FILE_MODE,
        (told, _) => told,
    };
    Ok(Entry {
        path,
        kind,
        mode,
        bytes: match kind {
            EntryType::Directory => 0,
            _ => said.size(),
        },
        modified: said.last_modified().map_or(0, seconds),
    })
}

/// Where a symbolic link leads. It may lead anywhere: it is followed in the guest, or not at all.
fn target(archive: &mut ZipArchive<BufReader<File>>, at: usize) -> Result<String, RepackError> {
    let mut target = Vec::new();
    let contents = archive.by_index(at)?;
    let read = contents
        .take(PATH_BYTES as u64 + 1)
        .read_to_end(&mut target);
    read.map_err(ArchiveError::from)?;
    if target.is_empty() {
        return Err(ArchiveError::Name.into());
    }
    Ok(text(&target)?)
}

/// Refuses members that lie below another one that is no directory, a link for one.
fn refuse_behind(seen: &BTreeMap<String, bool>) -> Result<(), ArchiveError> {
    for (path, _) in seen.iter().filter(|(_, is_directory)| !**is_directory) {
        let below = format!("{path}/");
        let next = seen.range(below.clone()..).next();
        if let Some((behind, _)) = next.filter(|(next, _)| next.starts_with(&below)) {
            return Err(ArchiveError::Outside(behind.clone()));
        }
    }
    Ok(())
}

/// Unix seconds of a date without an offset, read as UTC; hostile or odd dates are nobody's loss.
fn seconds(date: zip::DateTime) -> u64 {
    let small = |it: u8| i8::try_from(it).unwrap_or(0);
    let year = i16::try_from(date.year()).unwrap_or(0);
    let (month, day) = (small(date.month()), small(date.day()));
    let (hour, minute, second) = (
        small(date.hour()),
        small(date.minute()),
        small(date.second()),
    );
    let date = civil::DateTime::new(year, month, day, hour, minute, second, 0);
    let instant = date.and_then(|it| TimeZone::UTC.to_timestamp(it));
    instant.map_or(0, |it| u64::try_from(it.as_second()).unwrap_or(0))
}

fn damaged(what: &'static str) -> ArchiveError {
    ArchiveError::Read(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// A reader that knows how much it gave, and keeps its own error: whoever writes what it gave has others.
struct Counting<R> {
    reader: R,
    read: u64,
    failed: Option<io::Error>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.reader.read(buf) {
            Ok(read) => {
                self.read += read as u64;
                Ok(read)
            }
            Err(err) => {
                let kind = err.kind();
                self.failed = Some(err);
                Err(kind.into())
            }
        }
    }
}

/// For the fuzz targets: all of it, and what was made can be read again.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let (dir, from) = crate::fuzzing::file_with("archive", bytes);
    let to = from.with_extension("tar");
    if repack(&from, &to, Limits::BUILD).is_ok() {
        let made = super::open(&to).expect("it was made");
        super::Contents::read(made).expect("what was made can be read");
    }
    drop(dir);
}

#[cfg(test)]
mod tests;
