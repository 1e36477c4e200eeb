//! Root file systems of strangers: a plain archive of one, or an image as container tools save it.
//!
//! ```text
//! archive > (decompressed) > index of members > plain?  one layer, the archive itself
//!                                             > image?  description, layers in order (image.rs)
//! pass 1: every layer's members > tree (tree.rs, pure): what is there in the end, and from where
//! pass 2: every layer again     > one plain tar file: directories, then contents, then links
//! ```
//!
//! Nothing is unpacked here: what is written is another archive, made anew from the tree, in which no
//! member lies behind a link, outside, or twice. It is unpacked in a guest. Both passes read all of it,
//! within [`Limits`]; what is spooled beside the result is gone when this ends, however that is.

pub mod image;
mod tree;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::path::Path;

use super::archive::{self, ArchiveError, Limits, walk};
use image::{ImageConfig, ImageError, Index};
use tree::{Meta, Node, Source, Tree, TreeError};

/// Most members of an archive and of each layer, and most bytes that each unpacks to.
const LIMITS: Limits = Limits {
    members: 300_000,
    bytes: 4 << 30,
};
/// Most layers: more than any tool makes.
const MAX_LAYERS: usize = 256;
/// Most members of all layers together.
const MAX_MEMBERS: usize = 600_000;
/// Most bytes of the root file system: it is brought into a guest as one file and unpacked beside it,
/// and both must fit its disk.
const MAX_BYTES: u64 = 2 << 30;
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// Keeps hashes of root file systems apart from all others.
const CONTEXT: &str = "wrenn 2026-11-23 root file system of a template";
/// What a template needs of a root file system: whatever is done in a guest is done by its shell.
const SHELL: &str = "bin/sh";

/// Why no root file system could be made of an archive.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The archive, or a layer in it, cannot be used.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// It is an image that cannot be understood.
    #[error("the image in the archive cannot be used")]
    Image(#[from] ImageError),
    /// Its members do not fit together.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// It is no root file system that anything can be done in.
    #[error("there is no /{SHELL} in it, and a template needs a shell")]
    NoShell,
    /// It is larger than any that is taken.
    #[error("the root file system has more than {MAX_BYTES} bytes")]
    TooLarge,
    /// This node's disk refused.
    #[error("write the root file system")]
    Write(#[source] io::Error),
}

impl ImportError {
    /// Whether there is too much of it.
    #[must_use]
    pub const fn is_too_large(&self) -> bool {
        matches!(
            self,
            Self::TooLarge | Self::Archive(ArchiveError::TooLarge { .. })
        )
    }
}

/// A root file system that was made of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// What the image says of itself; nothing for a plain archive.
    pub config: ImageConfig,
    /// Hash of the file that was written: equal contents, equal hash.
    pub digest: [u8; 32],
}

/// Makes one plain tar file at `to` of the archive at `from`.
///
/// # Errors
/// [`ImportError`]; then `to` holds nothing of use.
pub fn import(from: &Path, to: &Path) -> Result<Imported, ImportError> {
    let dir = to.parent().unwrap_or(Path::new("."));
    let mut plain = plain(from, dir)?;
    let index = Index::read(&mut plain)?;
    let (config, layers) = image::open(&mut plain, &index)?.unwrap_or_else(|| {
        let whole = image::Layer {
            offset: 0,
            bytes: index.bytes,
            is_image: false,
        };
        (ImageConfig::default(), vec![whole])
    });
    if layers.len() > MAX_LAYERS {
        return Err(ImageError::Layers { most: MAX_LAYERS }.into());
    }
    let tree = read_layers(&plain, &layers)?;
    if !tree.has_file(SHELL) {
        return Err(ImportError::NoShell);
    }
    let file = File::create(to).map_err(ImportError::Write)?;
    let digest = write(&plain, &layers, &tree, file)?;
    Ok(Imported { config, digest })
}

/// The archive without its compression, where one can go back in it.
fn plain(from: &Path, dir: &Path) -> Result<File, ImportError> {
    let file = File::open(from).map_err(ArchiveError::from)?;
    let mut head = [0; 4];
    let mut opened = archive::open(from).map_err(ArchiveError::from)?;
    let is_plain = {
        let read = (&file)
            .take(4)
            .read(&mut head)
            .map_err(ArchiveError::from)?;
        !archive::is_compressed(&head[..read])
    };
    if is_plain {
        return Ok(file);
    }
    // Without a name: gone with the last who has it open.
    let mut spooled = tempfile::tempfile_in(dir).map_err(ImportError::Write)?;
    let mut bounded = (&mut opened).take(LIMITS.bytes + 1);
    let mut buffer = vec![0; READ_BYTES];
    let mut copied = 0;
    loop {
        let read = bounded.read(&mut buffer).map_err(ArchiveError::from)?;
        if read == 0 {
            return Ok(spooled);
        }
        copied += read as u64;
        if copied > LIMITS.bytes {
            return Err(archive::too_large(LIMITS).into());
        }
        spooled
            .write_all(&buffer[..read])
            .map_err(ImportError::Write)?;
    }
}

/// A layer's archive, from its beginning.
fn open_layer(plain: &File, layer: &image::Layer) -> io::Result<Box<dyn Read + Send>> {
    let mut file = plain.try_clone()?;
    file.seek(SeekFrom::Start(layer.offset))?;
    let reader = BufReader::with_capacity(READ_BYTES, file.take(layer.bytes));
    archive::decompressed(reader)
}

/// Pass 1: what all layers make together.
fn read_layers(plain: &File, layers: &[image::Layer]) -> Result<Tree, ImportError> {
    let mut tree = Tree::default();
    let mut members = 0;
    for (number, layer) in (0..).zip(layers) {
        let reader = open_layer(plain, layer).map_err(ArchiveError::from)?;
        let mut at = 0;
        let mut refused = None;
        let walked = walk(reader, LIMITS, |member, _| {
            let source = Source {
                layer: number,
                member: at,
            };
            at += 1;
            members += 1;
            if members > MAX_MEMBERS {
                return Err(archive::too_large(LIMITS));
            }
            if let Err(err) = tree.add(source, member, layer.is_image) {
                refused = Some(err);
                return Err(ArchiveError::Name);
            }
            Ok(())
        });
        if let Some(err) = refused {
            return Err(err.into());
        }
        walked?;
    }
    tree.finish();
    if tree.bytes() > MAX_BYTES {
        return Err(ImportError::TooLarge);
    }
    Ok(tree)
}

/// Pass 2: writes what is there in the end; the hash of it.
fn write(
    plain: &File,
    layers: &[image::Layer],
    tree: &Tree,
    file: File,
) -> Result<[u8; 32], ImportError> {
    let mut out = tar::Builder::new(Hashing::new(file));
    let mut wanted: BTreeMap<Source, Vec<(&str, &Meta)>> = BTreeMap::new();
    for (path, node) in tree.nodes() {
        match node {
            Node::Directory(meta) => {
                let header = header(tar::EntryType::Directory, meta, 0);
                append(&mut out, header, meta, path, io::empty())?;
            }
            Node::File { source, meta, .. } => {
                wanted.entry(*source).or_default().push((path, meta))
            }
            Node::Symlink { .. } => {}
        }
    }
    for (number, layer) in (0..).zip(layers) {
        let reader = open_layer(plain, layer).map_err(ArchiveError::from)?;
        let mut at = 0;
        let mut failed = None;
        let walked = walk(reader, LIMITS, |member, contents| {
            let source = Source {
                layer: number,
                member: at,
            };
            at += 1;
            let Some(paths) = wanted.get(&source) else {
                return Ok(());
            };
            if let Err(err) = write_file(&mut out, paths, member.size, contents) {
                failed = Some(err);
                return Err(ArchiveError::Name);
            }
            Ok(())
        });
        if let Some(err) = failed {
            return Err(err);
        }
        walked?;
    }
    for (path, node) in tree.nodes() {
        if let Node::Symlink { target, meta } = node {
            let mut header = header(tar::EntryType::Symlink, meta, 0);
            let linked = out.append_link(&mut header, path, target);
            linked.map_err(ImportError::Write)?;
        }
    }
    let hashing = out.into_inner().map_err(ImportError::Write)?;
    hashing.finish().map_err(ImportError::Write)
}

/// A file, under its first name, and the others as links to it.
fn write_file(
    out: &mut tar::Builder<Hashing>,
    paths: &[(&str, &Meta)],
    bytes: u64,
    contents: &mut dyn Read,
) -> Result<(), ImportError> {
    let Some(((first, meta), others)) = paths.split_first() else {
        return Ok(());
    };
    let head = header(tar::EntryType::Regular, meta, bytes);
    append(out, head, meta, first, contents)?;
    for (path, meta) in others {
        let mut header = header(tar::EntryType::Link, meta, 0);
        let linked = out.append_link(&mut header, path, first);
        linked.map_err(ImportError::Write)?;
    }
    Ok(())
}

fn append(
    out: &mut tar::Builder<Hashing>,
    mut header: tar::Header,
    meta: &Meta,
    path: &str,
    contents: impl Read,
) -> Result<(), ImportError> {
    if !meta.capability.is_empty() {
        let key = String::from_utf8_lossy(archive::CAPABILITY);
        let records = [(key.as_ref(), meta.capability.as_slice())];
        out.append_pax_extensions(records)
            .map_err(ImportError::Write)?;
    }
    let added = out.append_data(&mut header, path, contents);
    added.map_err(ImportError::Write)
}

fn header(kind: tar::EntryType, meta: &Meta, bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode);
    header.set_uid(meta.owner.0);
    header.set_gid(meta.owner.1);
    header.set_mtime(meta.modified);
    header.set_size(bytes);
    header
}

/// A file whose contents are hashed as they are written.
struct Hashing {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Hashing {
    fn new(file: File) -> Self {
        Self {
            file: BufWriter::with_capacity(READ_BYTES, file),
            hasher: blake3::Hasher::new_derive_key(CONTEXT),
        }
    }

    /// Everything is on the disk when this returns.
    fn finish(self) -> io::Result<[u8; 32]> {
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(*self.hasher.finalize().as_bytes())
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// For the fuzz targets: all of it, in a directory of its own.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let (dir, from) = crate::fuzzing::file_with("archive", bytes);
    let to = from.with_extension("tar");
    if import(&from, &to).is_ok() {
        let written = File::open(&to).expect("it was made");
        let mut seen = std::collections::BTreeSet::new();
        let walked = walk(written, LIMITS, |member, _| {
            assert_ne!(member.kind, archive::Kind::Special);
            assert!(seen.insert(member.path.clone()), "{} twice", member.path);
            Ok(())
        });
        walked.expect("what was written can be read");
    }
    drop(dir);
}

#[cfg(test)]
mod tests;
