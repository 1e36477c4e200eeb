//! Images as container tools save them: where their layers lie in an archive, and what they say of
//! whoever runs in them.
//!
//! Two forms are known, told apart by what is at the archive's root: that of `docker save`
//! (`manifest.json`), and the OCI layout (`oci-layout`, `index.json`, `blobs/`). Many tools write both into
//! one archive; then the first is read. What is named by a hash is hashed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use crate::template::archive::{ArchiveError, Kind, walk};

/// Largest description in an image.
const JSON_BYTES: u64 = 4 << 20;
/// How deep an index may name another.
const MAX_DEPTH: u32 = 3;
/// Bytes hashed at once.
const READ_BYTES: usize = 64 << 10;
/// What our guests are.
const ARCHITECTURE: &str = "amd64";

/// Why an image cannot be used.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Something that it names is not there.
    #[error("it names {0:?}, which the archive does not have")]
    Missing(String),
    /// A description is none, or longer than any.
    #[error("{0:?} cannot be understood")]
    Json(String, #[source] Option<serde_json::Error>),
    /// Contents that are not what their name says.
    #[error("{0:?} does not have the contents that its name says")]
    Corrupt(String),
    /// A hash that we cannot check.
    #[error("{0:?} is no SHA-256 digest")]
    Digest(String),
    /// More than one image, and nothing says which.
    #[error("the archive holds {0} images: save one")]
    Several(usize),
    /// Built for another kind of machine.
    #[error("it is for {0}, and guests here are linux/{ARCHITECTURE}")]
    Platform(String),
    /// More layers than any tool makes.
    #[error("it has more than {most} layers")]
    Layers {
        /// How many it may have.
        most: usize,
    },
    /// An index that leads to indexes for ever.
    #[error("its indexes name each other")]
    Depth,
    /// The archive cannot be read.
    #[error("read the archive")]
    Read(#[from] io::Error),
}

/// What an image says of whoever runs in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// A name or a number, and after a colon a group; empty for root.
    #[serde(rename = "User", deserialize_with = "or_default")]
    pub user: String,
    /// `NAME=VALUE` each.
    #[serde(rename = "Env", deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Where it runs.
    #[serde(rename = "WorkingDir", deserialize_with = "or_default")]
    pub workdir: String,
    /// What runs.
    #[serde(rename = "Entrypoint", deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// What follows it.
    #[serde(rename = "Cmd", deserialize_with = "or_default")]
    pub command: Vec<String>,
}

/// A layer in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// Where it begins.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Whether names in it may remove others.
    pub(super) is_image: bool,
}

/// The files of an archive, by path: where each lies.
#[derive(Debug, Default)]
pub(super) struct Index {
    files: BTreeMap<String, (u64, u64)>,
    /// Length of all of it.
    pub(super) bytes: u64,
}

impl Index {
    /// Reads an archive that is not compressed.
    pub(super) fn read(plain: &mut File) -> Result<Self, ArchiveError> {
        let bytes = plain.seek(SeekFrom::End(0))?;
        plain.seek(SeekFrom::Start(0))?;
        let mut files = BTreeMap::new();
        let reader = BufReader::with_capacity(READ_BYTES, &*plain);
        let mut links = Vec::new();
        walk(reader, super::LIMITS, |member, _| {
            match &member.kind {
                Kind::File => {
                    files.insert(member.path.clone(), (member.offset, member.size));
                }
                // Older tools save a layer that two images share as a link.
                Kind::Symlink(target) => links.push((member.path.clone(), target.clone())),
                Kind::Directory | Kind::Link(_) | Kind::Special => {}
            }
            Ok(())
        })?;
        for (path, target) in links {
            let (parent, _) = path.rsplit_once('/').unwrap_or_default();
            let target = crate::template::recipe::inside(&format!("{parent}/{target}"));
            if let Some(place) = target.and_then(|it| files.get(&it)).copied() {
                files.entry(path).or_insert(place);
            }
        }
        Ok(Self { files, bytes })
    }

    fn layer(&self, path: &str) -> Result<Layer, ImageError> {
        let inside = crate::template::recipe::inside(path);
        let place = inside.and_then(|it| self.files.get(&it));
        let (offset, bytes) = *place.ok_or_else(|| ImageError::Missing(path.to_owned()))?;
        Ok(Layer {
            offset,
            bytes,
            is_image: true,
        })
    }
}

/// What `docker save` writes of each image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    layers: Vec<String>,
}

/// A list of images or of other lists.
#[derive(Debug, Deserialize)]
struct OciIndex {
    manifests: Vec<Descriptor>,
}

/// One image.
#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// What is named by its hash.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// What an image says of itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Description {
    architecture: String,
    os: String,
    #[serde(deserialize_with = "or_default")]
    config: ImageConfig,
}

/// The image in an archive, or nothing where it is a plain one.
pub(super) fn open(
    plain: &mut File,
    index: &Index,
) -> Result<Option<(ImageConfig, Vec<Layer>)>, ImageError> {
    let mut archive = Archive { plain, index };
    if index.files.contains_key("manifest.json") {
        return archive.saved().map(Some);
    }
    if index.files.contains_key("oci-layout") && index.files.contains_key("index.json") {
        return archive.oci().map(Some);
    }
    Ok(None)
}

struct Archive<'a> {
    plain: &'a mut File,
    index: &'a Index,
}

impl Archive<'_> {
    fn saved(&mut self) -> Result<(ImageConfig, Vec<Layer>), ImageError> {
        let saved: Vec<Saved> = self.json("manifest.json")?;
        let [image] = saved.as_slice() else {
            return Err(ImageError::Several(saved.len()));
        };
        let config = self.config(&image.config)?;
        let layers = image.layers.iter().map(|path| self.checked(path));
        Ok((config, layers.collect::<Result<_, _>>()?))
    }

    fn oci(&mut self) -> Result<(ImageConfig, Vec<Layer>), ImageError> {
        let mut index: OciIndex = self.json("index.json")?;
        for _ in 0..MAX_DEPTH {
            let chosen = choose(index.manifests)?;
            let path = blob(&chosen.digest)?;
            if is_index(&chosen.media_type) {
                self.checked(&path)?;
                index = self.json(&path)?;
                continue;
            }
            self.checked(&path)?;
            let manifest: Manifest = self.json(&path)?;
            let config = self.config(&blob(&manifest.config.digest)?)?;
            let layers = manifest.layers.iter();
            let layers = layers.map(|it| self.checked(&blob(&it.digest)?));
            return Ok((config, layers.collect::<Result<_, _>>()?));
        }
        Err(ImageError::Depth)
    }

    fn config(&mut self, path: &str) -> Result<ImageConfig, ImageError> {
        self.checked(path)?;
        let said: Description = self.json(path)?;
        fits(&said.os, &said.architecture)?;
        Ok(said.config)
    }

    /// Where the file at `path` lies, hashed where its name is a hash.
    fn checked(&mut self, path: &str) -> Result<Layer, ImageError> {
        let layer = self.index.layer(path)?;
        let Some(wanted) = path.strip_prefix("blobs/sha256/") else {
            return Ok(layer);
        };
        self.plain.seek(SeekFrom::Start(layer.offset))?;
        let mut reader = (&*self.plain).take(layer.bytes);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match reader.read(&mut buffer)? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
        let found = hasher.finalize();
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        if found == wanted {
            return Ok(layer);
        }
        Err(ImageError::Corrupt(path.to_owned()))
    }

    fn json<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ImageError> {
        let place = self.index.layer(path)?;
        if place.bytes > JSON_BYTES {
            return Err(ImageError::Json(path.to_owned(), None));
        }
        self.plain.seek(SeekFrom::Start(place.offset))?;
        let mut text = Vec::new();
        (&*self.plain).take(place.bytes).read_to_end(&mut text)?;
        serde_json::from_slice(&text).map_err(|err| ImageError::Json(path.to_owned(), Some(err)))
    }
}

/// The one image that fits our guests.
fn choose(manifests: Vec<Descriptor>) -> Result<Descriptor, ImageError> {
    let is_ours = |it: &Descriptor| {
        let platform = it.platform.as_ref();
        platform.is_none_or(|it| fits(&it.os, &it.architecture).is_ok())
    };
    let count = manifests.len();
    let other = manifests.first().and_then(|it| it.platform.as_ref());
    let other = other.map(|it| format!("{}/{}", it.os, it.architecture));
    let mut ours: Vec<Descriptor> = manifests.into_iter().filter(is_ours).collect();
    match (ours.len(), ours.pop()) {
        (1, Some(one)) => Ok(one),
        (0, _) if count > 0 => Err(ImageError::Platform(other.unwrap_or_default())),
        (several, _) => Err(ImageError::Several(several)),
    }
}

/// What says nothing of the machine it is for may be for ours.
fn fits(os: &str, architecture: &str) -> Result<(), ImageError> {
    let is_one = |said: &str, ours: &str| said.is_empty() || said == ours;
    if is_one(os, "linux") && is_one(architecture, ARCHITECTURE) {
        return Ok(());
    }
    Err(ImageError::Platform(format!("{os}/{architecture}")))
}

fn is_index(media_type: &str) -> bool {
    media_type.ends_with("image.index.v1+json") || media_type.ends_with("manifest.list.v2+json")
}

/// Where what has `digest` lies.
fn blob(digest: &str) -> Result<String, ImageError> {
    let hex = digest.strip_prefix("sha256:").filter(|hex| {
        hex.len() == 64
            && hex
                .bytes()
                .all(|it| it.is_ascii_digit() || (b'a'..=b'f').contains(&it))
    });
    let hex = hex.ok_or_else(|| ImageError::Digest(digest.chars().take(80).collect()))?;
    Ok(format!("blobs/sha256/{hex}"))
}

/// Tools write `null` for what is not there.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl ImageConfig {
    /// The directives that make it the defaults of a template. What the image would run is left out
    /// where `has_start`: a recipe that follows runs something of its own.
    #[must_use]
    pub fn directives(&self, has_start: bool) -> (Vec<String>, Option<String>) {
        let user = match self.user.as_str() {
            "" => "IMPORT".to_owned(),
            user => format!("IMPORT --user={user}"),
        };
        let env = self
            .env
            .iter()
            .map(|it| format!("ENV {}", it.replace('$', "$$")));
        let workdir = Some(&self.workdir).filter(|it| !it.is_empty() && *it != "/");
        let workdir = workdir.map(|it| format!("WORKDIR {it}"));
        let runs: Vec<String> = self
            .entrypoint
            .iter()
            .chain(&self.command)
            .map(|it| quoted(it))
            .collect();
        let start =
            (!has_start && !runs.is_empty()).then(|| format!("START exec {}", runs.join(" ")));
        (
            [user].into_iter().chain(env).chain(workdir).collect(),
            start,
        )
    }
}

/// `word` as one word to a shell.
fn quoted(word: &str) -> String {
    let is_plain = |it: u8| it.is_ascii_alphanumeric() || b"/._-=:,@+".contains(&it);
    if !word.is_empty() && word.bytes().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
