//! What guests can be started from on this node.
//!
//! ```text
//! <images>/kernel/vmlinuz            the guest kernel
//!          kernel/release            its version
//!          initramfs                 envd and the modules it loads
//!          templates/<name>/rootfs.raw      a raw ext4 image
//!          templates/<name>/template.json   {"name": .., "disk_mib": ..}
//! ```
//!
//! Read once, at start. A missing kernel or initramfs is an error: no guest could start. A broken
//! template is not, because the sandboxes of the other templates must be taken up again all the
//! same; it is reported as unusable. Reading a root file system takes about a second per GiB
//! in use, so digests are remembered by file, size and date in `<data>/cache/templates.json`; that
//! file may be deleted or damaged at any time and is then made anew.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use proto::units::Mib;
use proto::version;
use serde::{Deserialize, Serialize};

use crate::store::disk::MAX_DISK;
use crate::store::{DataPaths, ImageDigest, chunker, durable};

use super::error::{OpenCatalogError, TemplateError};
use super::rootfs;

/// Longest template name; the public API's rule.
const NAME_CHARS: usize = 64;
/// Longest kernel release; the kernel's own limit for the field is 65 with its end mark.
const RELEASE_CHARS: usize = 64;
/// A description or release file larger than this is something else.
const SMALL_FILE_BYTES: u64 = 64 * 1024;

/// The images directory, checked.
#[derive(Debug)]
pub struct Catalog {
    guest: GuestImages,
    templates: BTreeMap<TemplateName, Template>,
    unusable: Vec<TemplateError>,
}

/// What every guest boots from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestImages {
    /// The kernel.
    pub kernel: PathBuf,
    /// The first file system, with envd as its first process.
    pub initramfs: PathBuf,
    /// The kernel's version.
    pub kernel_release: String,
    /// The version envd reports: images and node are built from one checkout.
    pub agent_version: String,
}

/// A root file system sandboxes can start from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// What people call it.
    pub name: TemplateName,
    /// What nodes call it.
    pub digest: ImageDigest,
    /// The raw image, at a path that holds this image for ever. Absolute if the data directory is.
    pub rootfs: PathBuf,
    /// Size of the disk a sandbox gets.
    pub disk: Mib,
}

/// The name of a template: `^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`. Never a path with parts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TemplateName(String);

impl Catalog {
    /// Reads and checks the images directory; templates become usable from `data`. Copies that a
    /// crash interrupted are removed there.
    ///
    /// # Errors
    /// - [`OpenCatalogError::Missing`]: kernel, initramfs or the templates directory is not there.
    /// - [`OpenCatalogError::KernelRelease`], [`OpenCatalogError::Disk`]: cannot be read.
    pub fn open(images: &Path, data: &DataPaths) -> Result<Self, OpenCatalogError> {
        let guest = find_guest(images)?;
        let dir = images.join("templates");
        require(dir.is_dir(), "template", &dir, "deploy/images/rootfs")?;
        let kept = data.templates();
        durable::remove_leftovers(&kept).map_err(disk("clear leftovers in", &kept))?;
        let mut cache = DigestCache::load(data);
        let mut templates = BTreeMap::new();
        let mut unusable = Vec::new();
        for entry in fs::read_dir(&dir).map_err(disk("read directory", &dir))? {
            let entry = entry.map_err(disk("read directory", &dir))?;
            // Hidden: being made, or nobody's business.
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            match read_template(&entry.path(), data, &mut cache) {
                Ok(template) => {
                    templates.insert(template.name.clone(), template);
                }
                Err(err) => unusable.push(err),
            }
        }
        cache.save(data)?;
        Ok(Self {
            guest,
            templates,
            unusable,
        })
    }

    /// What every guest boots from.
    #[must_use]
    pub fn guest(&self) -> &GuestImages {
        &self.guest
    }

    /// All usable templates, by name.
    pub fn templates(&self) -> impl Iterator<Item = &Template> {
        self.templates.values()
    }

    /// The template of this name.
    #[must_use]
    pub fn get(&self, name: &TemplateName) -> Option<&Template> {
        self.templates.get(name)
    }

    /// The template with this digest.
    #[must_use]
    pub fn by_digest(&self, digest: ImageDigest) -> Option<&Template> {
        self.templates().find(|template| template.digest == digest)
    }

    /// Why what else lies in the templates directory cannot be used; for the log.
    #[must_use]
    pub fn unusable(&self) -> &[TemplateError] {
        &self.unusable
    }
}

impl TemplateName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TemplateName {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let first = text.bytes().next();
        let begins_well = first.is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !begins_well || text.len() > NAME_CHARS || !text.bytes().all(sound) {
            // Enough to recognise it; the text is a stranger's and may be huge.
            let name = text.chars().take(NAME_CHARS).collect();
            return Err(TemplateError::Name { name });
        }
        Ok(Self(text.to_owned()))
    }
}

/// `template.json`, as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    name: String,
    disk_mib: u32,
}

/// Digests by template name, with the facts of the file they were computed from.
#[derive(Debug, Default, Serialize, Deserialize)]
struct DigestCache {
    known: BTreeMap<String, KnownDigest>,
    #[serde(skip)]
    changed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownDigest {
    file: FileFacts,
    digest: String,
}

/// What tells one build of an image from another. All images have the same size, and a file
/// system may keep dates by the second; a rebuilt image is also another inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileFacts {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_seconds: i64,
    modified_nanos: i64,
}

impl FileFacts {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified_seconds: metadata.mtime(),
            modified_nanos: metadata.mtime_nsec(),
        })
    }
}

impl DigestCache {
    fn path(data: &DataPaths) -> PathBuf {
        data.cache().join("templates.json")
    }

    /// Whatever cannot be read or understood is as good as empty.
    fn load(data: &DataPaths) -> Self {
        read_small(&Self::path(data))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    fn save(&self, data: &DataPaths) -> Result<(), OpenCatalogError> {
        if !self.changed {
            return Ok(());
        }
        let path = Self::path(data);
        let bytes = serde_json::to_vec_pretty(self).map_err(io::Error::other);
        bytes
            .and_then(|bytes| durable::write(&path, &bytes))
            .map_err(disk("write", &path))
    }

    /// The digest of the image at `path`, from memory if the file is the one remembered.
    fn digest(
        &mut self,
        name: &TemplateName,
        path: &Path,
    ) -> Result<(FileFacts, ImageDigest), TemplateError> {
        let facts = FileFacts::of(path).map_err(rootfs::disk("look at", path))?;
        let known = self.known.get(name.as_str());
        let remembered = known
            .filter(|known| known.file == facts)
            .and_then(|known| known.digest.parse().ok());
        if let Some(digest) = remembered {
            return Ok((facts, digest));
        }
        let manifest = chunker::manifest_of(path).map_err(|source| TemplateError::Image {
            name: name.to_string(),
            source,
        })?;
        let digest = manifest.digest();
        let known = KnownDigest {
            file: facts,
            digest: digest.to_string(),
        };
        self.known.insert(name.to_string(), known);
        self.changed = true;
        Ok((facts, digest))
    }
}

/// What every guest boots from, in an images directory; its templates are not looked at.
///
/// # Errors
/// As [`Catalog::open`].
pub fn find_guest(images: &Path) -> Result<GuestImages, OpenCatalogError> {
    let kernel = images.join("kernel/vmlinuz");
    let release = images.join("kernel/release");
    let initramfs = images.join("initramfs");
    let make_kernel = "deploy/images/kernel";
    require(is_file(&kernel), "guest kernel", &kernel, make_kernel)?;
    require(is_file(&release), "kernel release", &release, make_kernel)?;
    let make_initramfs = "deploy/images/initramfs";
    require(
        is_file(&initramfs),
        "guest initramfs",
        &initramfs,
        make_initramfs,
    )?;
    Ok(GuestImages {
        kernel_release: read_release(&release)?,
        agent_version: version::ENVD.to_owned(),
        kernel,
        initramfs,
    })
}

pub(super) fn read_release(path: &Path) -> Result<String, OpenCatalogError> {
    let bytes = read_small(path).map_err(disk("read", path))?;
    let text = String::from_utf8_lossy(&bytes);
    let release = text.trim();
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || b".+~_-".contains(&byte);
    if release.is_empty() || release.len() > RELEASE_CHARS || !release.bytes().all(sound) {
        return Err(OpenCatalogError::KernelRelease {
            path: path.to_owned(),
        });
    }
    Ok(release.to_owned())
}

fn read_template(
    dir: &Path,
    data: &DataPaths,
    cache: &mut DigestCache,
) -> Result<Template, TemplateError> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let name: TemplateName = name.parse()?;
    let description = read_description(&dir.join("template.json"))?;
    if description.name != name.as_str() {
        return Err(TemplateError::OtherName {
            dir: dir.to_owned(),
            name: description.name.chars().take(NAME_CHARS).collect(),
        });
    }
    let image = dir.join("rootfs.raw");
    let (facts, digest) = cache.digest(&name, &image)?;
    let disk = Mib(description.disk_mib);
    if disk > MAX_DISK || disk.bytes() < facts.bytes {
        return Err(TemplateError::DiskSize {
            name: name.to_string(),
            disk,
            image_bytes: facts.bytes,
        });
    }
    let rootfs = rootfs::keep(&image, digest, data)?;
    Ok(Template {
        name,
        digest,
        rootfs,
        disk,
    })
}

pub(super) fn read_description(path: &Path) -> Result<Description, TemplateError> {
    let bytes = read_small(path).map_err(rootfs::disk("read", path))?;
    serde_json::from_slice(&bytes).map_err(|source| TemplateError::Description {
        path: path.to_owned(),
        source,
    })
}

/// At most [`SMALL_FILE_BYTES`] of a file that should be far smaller.
fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path)?;
    file.take(SMALL_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A file with something in it.
fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0)
}

fn require(
    there: bool,
    what: &'static str,
    path: &Path,
    script: &'static str,
) -> Result<(), OpenCatalogError> {
    if there {
        return Ok(());
    }
    Err(OpenCatalogError::Missing {
        what,
        path: path.to_owned(),
        script,
    })
}

fn disk<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> OpenCatalogError + 'a {
    move |source| OpenCatalogError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
