//! Reading archives of strangers: tar, plain or compressed with gzip or zstd; [`zip`] makes a tar file of
//! a zip file.
//!
//! The headers are read by the `tar` crate one by one; what extends them (long names, PAX records) is
//! read here, since there it may take as much memory as the archive says. Everything has a bound: how
//! many members there are, how many bytes they unpack to, how long a name is. Nothing is written to
//! disk here; a member whose path leads out of the archive is refused before anybody sees it.

pub mod zip;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use tar::EntryType;

use super::recipe::inside;

/// Longest path, and longest link: the kernel's own limit.
const PATH_BYTES: usize = 4096;
/// Largest record that extends a header.
const EXTENSION_BYTES: u64 = 64 << 10;
/// How archives begin that are compressed with gzip, and with zstd.
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// The record with a program's capability, as every writer of tar files calls it.
pub(super) const CAPABILITY: &[u8] = b"SCHILY.xattr.security.capability";
/// Keeps hashes of contents apart from all others.
const CONTEXT: &str = "wrenn 2026-11-22 files of a template build";

/// How much of an archive is read before it is given up on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most members.
    pub members: usize,
    /// Most bytes, unpacked, headers included.
    pub bytes: u64,
}

impl Limits {
    /// Of the archive that a build takes files from.
    pub const BUILD: Self = Self {
        members: 50_000,
        bytes: 1 << 30,
    };
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file with contents.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, and where it leads. It may lead anywhere.
    Symlink(String),
    /// Another name of a member, whose path it has.
    Link(String),
    /// A device or a pipe.
    Special,
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Without `.`, `..` and a slash at its ends; empty for the root.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes of contents.
    pub size: u64,
    /// Who owns it, and with which group.
    pub owner: (u64, u64),
    /// Unix seconds of its last change.
    pub modified: u64,
    /// What a program may do without being root, as the kernel keeps it; empty for most.
    pub capability: Vec<u8>,
    /// Where its contents begin, in bytes of the unpacked archive.
    pub offset: u64,
}

/// Why an archive cannot be used.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A member's path, or what it links to, leads out of the archive.
    #[error("the archive has a member {0:?}, which lies outside of it")]
    Outside(String),
    /// A name is no text, or too long.
    #[error("the archive has a member whose name is no text of at most {PATH_BYTES} bytes")]
    Name,
    /// A device or a pipe.
    #[error("the archive has a device or a pipe {0:?}, which no template is made from")]
    Special(String),
    /// It unpacks to more than it may.
    #[error("the archive has more than {members} members, or more than {bytes} bytes unpacked")]
    TooLarge {
        /// How many it may have.
        members: usize,
        /// How many bytes.
        bytes: u64,
    },
    /// It cannot be read without a password.
    #[error("the archive has a member {0:?} that is encrypted")]
    Encrypted(String),
    /// Two members have one name, and nobody can know which is meant.
    #[error("the archive has two members of the same name")]
    Twice,
    /// It is damaged, or no archive.
    #[error(
        "read the archive (a tar file, plain or compressed with gzip or zstd; files to copy may come \
         as a zip file)"
    )]
    Read(#[source] io::Error),
}

impl From<io::Error> for ArchiveError {
    fn from(source: io::Error) -> Self {
        Self::Read(source)
    }
}

/// Whether these first bytes are those of a compressed archive.
pub(super) fn is_compressed(head: &[u8]) -> bool {
    head.starts_with(GZIP) || head.starts_with(ZSTD)
}

/// Opens an archive, whichever of the known compressions it has.
///
/// # Errors
/// The file cannot be read.
pub fn open(path: &Path) -> io::Result<Box<dyn Read + Send>> {
    decompressed(BufReader::with_capacity(READ_BYTES, File::open(path)?))
}

/// `reader`, decompressed if its first bytes say that it is compressed.
///
/// # Errors
/// It cannot be read.
pub fn decompressed<R: io::BufRead + Send + 'static>(
    mut reader: R,
) -> io::Result<Box<dyn Read + Send>> {
    let head = reader.fill_buf()?;
    Ok(if head.starts_with(GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(reader))
    } else if head.starts_with(ZSTD) {
        Box::new(zstd::Decoder::with_buffer(reader)?)
    } else {
        Box::new(reader)
    })
}

/// What the headers before a member have said of it.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    user: Option<u64>,
    group: Option<u64>,
    capability: Vec<u8>,
}

/// Reads an archive from its beginning to its end; `each` is given every member with its contents.
///
/// # Errors
/// [`ArchiveError`], of the archive or of `each`.
pub fn walk<R: Read>(
    reader: R,
    limits: Limits,
    mut each: impl FnMut(&Member, &mut dyn Read) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let bounded = Bounded {
        reader,
        left: limits.bytes,
        is_over: false,
    };
    let mut archive = tar::Archive::new(bounded);
    let read = read_members(&mut archive, limits, &mut each);
    // The reader of headers wraps whatever its source says.
    let is_over = archive.into_inner().is_over;
    match read {
        Err(ArchiveError::Read(_)) if is_over => Err(too_large(limits)),
        other => other,
    }
}

/// What exceeds `limits`.
pub(super) const fn too_large(limits: Limits) -> ArchiveError {
    ArchiveError::TooLarge {
        members: limits.members,
        bytes: limits.bytes,
    }
}

fn read_members<R: Read>(
    archive: &mut tar::Archive<R>,
    limits: Limits,
    each: &mut impl FnMut(&Member, &mut dyn Read) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let mut extension = Extension::default();
    for (count, entry) in archive.entries()?.raw(true).enumerate() {
        let mut entry = entry?;
        if count >= limits.members {
            return Err(too_large(limits));
        }
        match entry.header().entry_type() {
            EntryType::GNULongName => extension.path = Some(long(&mut entry)?),
            EntryType::GNULongLink => extension.link = Some(long(&mut entry)?),
            EntryType::XHeader => read_pax(&extended(&mut entry)?, &mut extension)?,
            EntryType::XGlobalHeader => {
                extended(&mut entry)?;
            }
            kind => {
                let said = std::mem::take(&mut extension);
                let mut member = member(entry.header(), kind, said)?;
                member.offset = entry.raw_file_position();
                each(&member, &mut entry)?;
            }
        }
    }
    Ok(())
}

/// The contents of a header's extension.
fn extended(entry: &mut dyn Read) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = Vec::new();
    let read = entry.take(EXTENSION_BYTES + 1).read_to_end(&mut bytes)?;
    if read as u64 > EXTENSION_BYTES {
        return Err(ArchiveError::Name);
    }
    Ok(bytes)
}

/// The same of a name, which ends with a NUL.
fn long(entry: &mut dyn Read) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = extended(entry)?;
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    Ok(bytes)
}

/// Reads PAX records: `LENGTH KEY=VALUE\n`, the length counting all of it.
fn read_pax(mut records: &[u8], extension: &mut Extension) -> Result<(), ArchiveError> {
    let garbled = || io::Error::new(io::ErrorKind::InvalidData, "garbled PAX records");
    while !records.is_empty() {
        let space = records.iter().position(|byte| *byte == b' ');
        let space = space.ok_or_else(garbled)?;
        let length = std::str::from_utf8(&records[..space]).ok();
        let length: usize = length.and_then(|it| it.parse().ok()).ok_or_else(garbled)?;
        let record = records.get(space + 1..length).ok_or_else(garbled)?;
        let record = record.strip_suffix(b"\n").ok_or_else(garbled)?;
        let equals = record.iter().position(|byte| *byte == b'=');
        let (key, value) = record.split_at(equals.ok_or_else(garbled)?);
        match key {
            b"path" => extension.path = Some(value[1..].to_vec()),
            b"linkpath" => extension.link = Some(value[1..].to_vec()),
            b"uid" => extension.user = Some(number(&value[1..]).ok_or_else(garbled)?),
            b"gid" => extension.group = Some(number(&value[1..]).ok_or_else(garbled)?),
            CAPABILITY => extension.capability = value[1..].to_vec(),
            // A size that differs from the header's would move everything that follows.
            b"size" => return Err(garbled().into()),
            _ => {}
        }
        records = &records[length..];
    }
    Ok(())
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn member(header: &tar::Header, kind: EntryType, said: Extension) -> Result<Member, ArchiveError> {
    let path = said
        .path
        .unwrap_or_else(|| header.path_bytes().into_owned());
    let path = text(&path)?;
    let path = inside(&path).ok_or(ArchiveError::Outside(path))?;
    // Writers that have no owner to tell leave the field empty: root's, as what is copied is anyway.
    let owner = (
        said.user.unwrap_or_else(|| header.uid().unwrap_or(0)),
        said.group.unwrap_or_else(|| header.gid().unwrap_or(0)),
    );
    let link = || {
        let link = said
            .link
            .or_else(|| Some(header.link_name_bytes()?.into_owned()));
        text(&link.unwrap_or_default())
    };
    let kind = match kind {
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink(link()?),
        EntryType::Link => {
            let link = link()?;
            Kind::Link(inside(&link).ok_or(ArchiveError::Outside(link))?)
        }
        EntryType::Char | EntryType::Block | EntryType::Fifo => Kind::Special,
        _ => {
            let words = "it has a member of an unknown kind";
            return Err(io::Error::new(io::ErrorKind::InvalidData, words).into());
        }
    };
    Ok(Member {
        path,
        kind,
        mode: header.mode()? & 0o7777,
        size: header.entry_size()?,
        owner,
        // Hostile or odd dates are nobody's loss.
        modified: header.mtime().unwrap_or(0),
        capability: said.capability,
        offset: 0,
    })
}

fn text(bytes: &[u8]) -> Result<String, ArchiveError> {
    if bytes.len() > PATH_BYTES || bytes.contains(&0) {
        return Err(ArchiveError::Name);
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| ArchiveError::Name)
}

/// A reader that fails past its bound instead of unpacking for ever.
struct Bounded<R> {
    reader: R,
    left: u64,
    is_over: bool,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buf)?;
        let Some(left) = self.left.checked_sub(read as u64) else {
            self.is_over = true;
            return Err(io::Error::other("it unpacks to more than it may"));
        };
        self.left = left;
        Ok(read)
    }
}

/// What an archive has, by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    members: BTreeMap<String, [u8; 32]>,
}

impl Contents {
    /// Reads all of an archive that a build takes files from.
    ///
    /// # Errors
    /// [`ArchiveError`]: it is damaged, too large, or has members that no build takes along.
    pub fn read<R: Read>(reader: R) -> Result<Self, ArchiveError> {
        let mut members = BTreeMap::new();
        walk(reader, Limits::BUILD, |member, contents| {
            let digest = digest(member, contents)?;
            members.insert(member.path.clone(), digest);
            Ok(())
        })?;
        Ok(Self { members })
    }

    /// One hash of all that `sources` name.
    ///
    /// # Errors
    /// The source that names nothing.
    pub fn hash_of<'a>(&self, sources: &'a [String]) -> Result<Vec<u8>, &'a str> {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        for source in sources {
            let mut found = false;
            for (path, digest) in self.below(source) {
                found = true;
                hasher.update(&(path.len() as u64).to_le_bytes());
                hasher.update(path.as_bytes()).update(digest);
            }
            if !found {
                return Err(source);
            }
        }
        Ok(hasher.finalize().as_bytes().to_vec())
    }

    /// What lies at `source` and below it.
    fn below<'a>(&'a self, source: &'a str) -> impl Iterator<Item = (&'a String, &'a [u8; 32])> {
        let is_below = move |path: &str| {
            let rest = path.strip_prefix(source);
            source.is_empty() || rest.is_some_and(|it| it.is_empty() || it.starts_with('/'))
        };
        self.members.iter().filter(move |(path, _)| is_below(path))
    }
}

fn digest(member: &Member, contents: &mut dyn Read) -> Result<[u8; 32], ArchiveError> {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&member.mode.to_le_bytes());
    let (kind, link) = match &member.kind {
        Kind::File => (b'f', ""),
        Kind::Directory => (b'd', ""),
        Kind::Symlink(link) => (b's', link.as_str()),
        Kind::Link(link) => (b'l', link.as_str()),
        Kind::Special => return Err(ArchiveError::Special(member.path.clone())),
    };
    hasher.update(&[kind]).update(link.as_bytes());
    hasher.update_reader(contents)?;
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests;
