//! Snapshot manifests: what was sealed at one instant of one sandbox, and what is needed to resume
//! it.
//!
//! A snapshot is named by the BLAKE3 hash of its manifest, so a manifest has exactly one encoding:
//! fixed fields in a fixed order, all integers little-endian, and a version that says whether the one
//! at the end that may be missing is there. The node that
//! sealed it signs the hash, with its purpose in front, by its Ed25519 key; the key travels along,
//! and the reader decides whether that node may seal.
//!
//! ```text
//! body      "wrenn-sn"  u32 version  16 bytes sandbox  u64 epoch  u64 created, ms since 1970
//!           u8 0 | u8 1 + 32 bytes digest                          the parent snapshot
//!           3 x (32 bytes digest  u64 bytes)                       memory, overlay, device state;
//!                                                                  in version 3 the overlay only
//!           32 bytes digest                                        image below the overlay
//!           texts: driver, its version, machine type, CPU model, accelerator
//!           u32 vcpus  u32 memory in MiB
//!           texts: kernel, initramfs, agent
//!           6 bytes MAC  4 bytes address  u8 prefix  4 bytes gateway
//!           text: the agent's token
//!           in version 2, and only there: 32 bytes digest  u64 bytes       the working set
//!           version 3 is of a disk alone, from which guests boot
//! text      u8 length  UTF-8 without control characters
//! signed    "wrenn-ss"  u32 version  32 bytes public key  64 bytes signature  body
//! ```
//!
//! Bytes come from peers: every rule is checked, nothing is allocated by a length that the bytes do
//! not have.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use proto::epoch::Epoch;
use proto::ids::{NodeKey, SandboxId};
use proto::units::{Mib, Stamp};
use transport::identity::key_of_spki;
use transport::seal::{SEED_BYTES, SIGNATURE_BYTES};
use transport::{Identity, verify_seed_signature};

use super::chunk::{ParseHashError, parse_hex, write_hex};
use super::error::DecodeSnapshotError;
use super::extent::BLOCK_BYTES;
use super::manifest::{ImageDigest, MAX_IMAGE_BYTES};

/// Version of the encoding: of the signature, and of a body without a working set.
pub const SNAPSHOT_VERSION: u32 = 1;
/// Version of a body with a working set.
const WORKING_SET_VERSION: u32 = 2;
/// Version of a body without memory and device state.
const DISK_VERSION: u32 = 3;
/// Longest text in a manifest: version strings of programs and kernels.
pub const MAX_TEXT_BYTES: usize = 255;
/// No signed manifest is longer: nine texts of the greatest length and 500 bytes of the rest.
pub const MAX_SIGNED_BYTES: usize = 4096;
const _: () = assert!(TEXTS * (MAX_TEXT_BYTES + 1) + 500 <= MAX_SIGNED_BYTES);

const TEXTS: usize = 9;
const BODY_MAGIC: [u8; 8] = *b"wrenn-sn";
const SIGNED_MAGIC: [u8; 8] = *b"wrenn-ss";
/// In front of the digest in what is signed, so that the signature fits nothing else.
const PURPOSE: &[u8] = b"wrenn snapshot manifest\0";
/// What precedes the key bytes in the encoding that a node's name is the hash of.
const SPKI_PREFIX_BYTES: usize = 12;

/// The name of a snapshot: BLAKE3 of its manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotDigest(pub [u8; 32]);

impl fmt::Display for SnapshotDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for SnapshotDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotDigest({self})")
    }
}

impl FromStr for SnapshotDigest {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        parse_hex(text).map(Self)
    }
}

/// An image and the exact length of the file it was: images are whole blocks, files need not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRef {
    /// Its manifest.
    pub digest: ImageDigest,
    /// Bytes of the file; what is behind them in the image is zero.
    pub len_bytes: u64,
}

/// What ran the guest: only the like of it can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFacts {
    /// Kind of VMM.
    pub driver: String,
    /// Its version.
    pub driver_version: String,
    /// The machine it showed the guest.
    pub machine_type: String,
    /// The processor it showed the guest.
    pub cpu_model: String,
    /// What executed the guest's instructions.
    pub accelerator: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory.
    pub memory: Mib,
}

/// What ran in the guest before anything of its own, and where it thinks it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFacts {
    /// Release of the kernel.
    pub kernel: String,
    /// Release of the first file system.
    pub initramfs: String,
    /// Version of the agent.
    pub agent: String,
    /// Hardware address of its network card.
    pub mac: [u8; 6],
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of its network's prefix, at most 32.
    pub prefix: u8,
    /// Its gateway.
    pub gateway: Ipv4Addr,
    /// What its agent demands of callers until it is told otherwise. As secret as the memory, in
    /// which it stands too.
    pub token: String,
}

/// A guest that ran when it was sealed, beside its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// Guest memory.
    pub memory: ImageRef,
    /// What the VMM wrote about its devices.
    pub device_state: ImageRef,
}

/// A sandbox sealed at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotManifest {
    /// Whose.
    pub sandbox: SandboxId,
    /// Under which ownership it ran.
    pub epoch: Epoch,
    /// When, by the clock of the node that sealed it.
    pub created_at: Stamp,
    /// The snapshot it was resumed from.
    pub parent: Option<SnapshotDigest>,
    /// What makes its guest go on; `None` where the disk alone was sealed, for guests to boot from.
    pub running: Option<Running>,
    /// The overlay, as a file.
    pub disk: ImageRef,
    /// Which parts of the memory the guest needed first when it was resumed last, as a pager writes
    /// it down. Helps the next resume, and nothing depends on it.
    pub working_set: Option<ImageRef>,
    /// The image below the overlay.
    pub base: ImageDigest,
    /// What ran it.
    pub machine: MachineFacts,
    /// What it ran.
    pub guest: GuestFacts,
}

impl SnapshotManifest {
    /// The images it consists of: memory, disk, device state, and the working set if it has one; or the
    /// disk alone. The one below the overlay is none of them: templates are kept and pinned on their own.
    #[must_use]
    pub fn images(&self) -> Vec<ImageRef> {
        let mut images = self.parts();
        images.extend(self.working_set);
        images
    }

    /// Those in front of the base.
    fn parts(&self) -> Vec<ImageRef> {
        match self.running {
            Some(running) => vec![running.memory, self.disk, running.device_state],
            None => vec![self.disk],
        }
    }

    /// The name of this snapshot.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn digest(&self) -> Result<SnapshotDigest, DecodeSnapshotError> {
        self.encode().map(|body| digest_of(&body))
    }

    /// The bytes that stand for it.
    ///
    /// # Errors
    /// [`DecodeSnapshotError::Field`]: a field holds what no manifest may hold.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeSnapshotError> {
        self.check()?;
        let mut bytes = Vec::with_capacity(MAX_SIGNED_BYTES / 2);
        bytes.extend(BODY_MAGIC);
        let version = match (self.running, self.working_set) {
            (None, _) => DISK_VERSION,
            (Some(_), None) => SNAPSHOT_VERSION,
            (Some(_), Some(_)) => WORKING_SET_VERSION,
        };
        bytes.extend(version.to_le_bytes());
        bytes.extend(self.sandbox.0);
        bytes.extend(self.epoch.0.to_le_bytes());
        bytes.extend(self.created_at.0.to_le_bytes());
        match self.parent {
            None => bytes.push(0),
            Some(parent) => {
                bytes.push(1);
                bytes.extend(parent.0);
            }
        }
        for image in self.parts() {
            put_image(&mut bytes, image);
        }
        bytes.extend(self.base.0);
        let machine = &self.machine;
        put_text(&mut bytes, &machine.driver);
        put_text(&mut bytes, &machine.driver_version);
        put_text(&mut bytes, &machine.machine_type);
        put_text(&mut bytes, &machine.cpu_model);
        put_text(&mut bytes, &machine.accelerator);
        bytes.extend(machine.vcpus.to_le_bytes());
        bytes.extend(machine.memory.0.to_le_bytes());
        let guest = &self.guest;
        put_text(&mut bytes, &guest.kernel);
        put_text(&mut bytes, &guest.initramfs);
        put_text(&mut bytes, &guest.agent);
        bytes.extend(guest.mac);
        bytes.extend(guest.address.octets());
        bytes.push(guest.prefix);
        bytes.extend(guest.gateway.octets());
        put_text(&mut bytes, &guest.token);
        if let Some(working_set) = self.working_set {
            put_image(&mut bytes, working_set);
        }
        Ok(bytes)
    }

    /// Reads one from bytes that anyone may have written.
    ///
    /// # Errors
    /// Any of [`DecodeSnapshotError`] but those of signatures.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeSnapshotError> {
        let mut reader = Reader { all: bytes, at: 0 };
        let version = reader.begin(BODY_MAGIC, DISK_VERSION)?;
        let (sandbox, epoch) = (SandboxId(reader.array()?), Epoch(reader.u64()?));
        let (created_at, parent) = (Stamp(reader.u64()?), reader.parent()?);
        let (running, disk) = reader.parts(version)?;
        let mut manifest = Self {
            sandbox,
            epoch,
            created_at,
            parent,
            running,
            disk,
            working_set: None,
            base: ImageDigest(reader.array()?),
            machine: MachineFacts {
                driver: reader.text("driver")?,
                driver_version: reader.text("driver version")?,
                machine_type: reader.text("machine type")?,
                cpu_model: reader.text("CPU model")?,
                accelerator: reader.text("accelerator")?,
                vcpus: reader.u32()?,
                memory: Mib(reader.u32()?),
            },
            guest: GuestFacts {
                kernel: reader.text("kernel")?,
                initramfs: reader.text("initramfs")?,
                agent: reader.text("agent")?,
                mac: reader.array()?,
                address: Ipv4Addr::from(reader.array::<4>()?),
                prefix: reader.u8()?,
                gateway: Ipv4Addr::from(reader.array::<4>()?),
                token: reader.text("token")?,
            },
        };
        if version == WORKING_SET_VERSION {
            manifest.working_set = Some(reader.image()?);
        }
        if reader.at != bytes.len() {
            return Err(reader.wrong_length());
        }
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), DecodeSnapshotError> {
        let wrong = |field| Err(DecodeSnapshotError::Field { field });
        let (machine, guest) = (&self.machine, &self.guest);
        for (field, text) in [
            ("driver", &machine.driver),
            ("driver version", &machine.driver_version),
            ("machine type", &machine.machine_type),
            ("CPU model", &machine.cpu_model),
            ("accelerator", &machine.accelerator),
            ("kernel", &guest.kernel),
            ("initramfs", &guest.initramfs),
            ("agent", &guest.agent),
            ("token", &guest.token),
        ] {
            if !is_sound_text(text) {
                return wrong(field);
            }
        }
        for image in self.images() {
            if image.len_bytes == 0 || image.len_bytes > MAX_IMAGE_BYTES {
                return wrong("an image's length");
            }
        }
        let memory = self.running.map(|it| it.memory.len_bytes);
        if memory.is_some_and(|bytes| bytes != machine.memory.bytes()) {
            return wrong("memory");
        }
        if self.running.is_none() && self.working_set.is_some() {
            return wrong("working set");
        }
        if machine.vcpus == 0 {
            return wrong("vcpus");
        }
        if guest.prefix > 32 {
            return wrong("prefix");
        }
        Ok(())
    }
}

/// A snapshot manifest with the signature of the node that sealed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedSnapshot {
    manifest: SnapshotManifest,
    digest: SnapshotDigest,
    public: [u8; SEED_BYTES],
    signature: [u8; SIGNATURE_BYTES],
}

impl SignedSnapshot {
    /// Signs `manifest` as the node that sealed it.
    ///
    /// # Errors
    /// [`DecodeSnapshotError::Field`]: a field holds what no manifest may hold.
    pub fn sign(
        manifest: SnapshotManifest,
        identity: &Identity,
    ) -> Result<Self, DecodeSnapshotError> {
        let digest = manifest.digest()?;
        let signature = identity.sign(&signed_message(&digest));
        let spki = identity.spki();
        // Ed25519 as the transport's keys are; anything else cannot be written down.
        let public = spki.get(SPKI_PREFIX_BYTES..).map(TryInto::try_into);
        let (Some(Ok(public)), Ok(signature)) = (public, signature.as_slice().try_into()) else {
            return Err(DecodeSnapshotError::Signature);
        };
        Ok(Self {
            manifest,
            digest,
            public,
            signature,
        })
    }

    /// What was sealed.
    #[must_use]
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }

    /// Its name.
    #[must_use]
    pub fn digest(&self) -> SnapshotDigest {
        self.digest
    }

    /// The node that sealed it.
    #[must_use]
    pub fn signer(&self) -> NodeKey {
        signer_of(&self.public)
    }

    /// The bytes that stand for both.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = self.manifest.encode();
        let body = body.expect("it was encoded before, for its digest");
        let mut bytes = Vec::with_capacity(MAX_SIGNED_BYTES);
        bytes.extend(SIGNED_MAGIC);
        bytes.extend(SNAPSHOT_VERSION.to_le_bytes());
        bytes.extend(self.public);
        bytes.extend(self.signature);
        bytes.extend(body);
        bytes
    }

    /// Reads one from bytes that anyone may have written, if `may_seal` knows its signer.
    ///
    /// # Errors
    /// Any of [`DecodeSnapshotError`].
    pub fn decode(
        bytes: &[u8],
        may_seal: impl FnOnce(&NodeKey) -> bool,
    ) -> Result<Self, DecodeSnapshotError> {
        let mut reader = Reader { all: bytes, at: 0 };
        if bytes.len() > MAX_SIGNED_BYTES {
            return Err(reader.wrong_length());
        }
        reader.begin(SIGNED_MAGIC, SNAPSHOT_VERSION)?;
        let public = reader.array()?;
        let signature = reader.array()?;
        let body = bytes.get(reader.at..).unwrap_or_default();
        let digest = digest_of(body);
        let signer = signer_of(&public);
        if !may_seal(&signer) {
            return Err(DecodeSnapshotError::Signer { signer });
        }
        if !verify_seed_signature(&public, &signed_message(&digest), &signature) {
            return Err(DecodeSnapshotError::Signature);
        }
        Ok(Self {
            manifest: SnapshotManifest::decode(body)?,
            digest,
            public,
            signature,
        })
    }
}

fn digest_of(body: &[u8]) -> SnapshotDigest {
    SnapshotDigest(*blake3::hash(body).as_bytes())
}

fn signed_message(digest: &SnapshotDigest) -> Vec<u8> {
    [PURPOSE, &digest.0].concat()
}

/// The name of the node with this key.
fn signer_of(public: &[u8; SEED_BYTES]) -> NodeKey {
    // The encoding that the name is the hash of, as RFC 8410 has it for Ed25519.
    const PREFIX: [u8; SPKI_PREFIX_BYTES] = [
        0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
    ];
    let spki = [PREFIX.as_slice(), public].concat();
    key_of_spki(&spki).expect("32 bytes behind this prefix are a key's encoding")
}

fn is_sound_text(text: &str) -> bool {
    text.len() <= MAX_TEXT_BYTES && !text.chars().any(char::is_control)
}

fn put_image(bytes: &mut Vec<u8>, image: ImageRef) {
    bytes.extend(image.digest.0);
    bytes.extend(image.len_bytes.to_le_bytes());
}

/// Texts were checked: their lengths fit one byte.
fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    bytes.extend(text.as_bytes());
}

/// Bytes being taken apart, with the place reached.
struct Reader<'a> {
    all: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    /// The version, which is `newest` at most.
    fn begin(&mut self, magic: [u8; 8], newest: u32) -> Result<u32, DecodeSnapshotError> {
        if self.array()? != magic {
            return Err(DecodeSnapshotError::Magic);
        }
        match self.u32()? {
            version if (SNAPSHOT_VERSION..=newest).contains(&version) => Ok(version),
            found => Err(DecodeSnapshotError::Version {
                found,
                ours: newest,
            }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeSnapshotError> {
        let rest = self.all.get(self.at..).unwrap_or_default();
        let taken = rest.first_chunk().ok_or_else(|| self.wrong_length())?;
        self.at += N;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, DecodeSnapshotError> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, DecodeSnapshotError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeSnapshotError> {
        self.array().map(u64::from_le_bytes)
    }

    fn parent(&mut self) -> Result<Option<SnapshotDigest>, DecodeSnapshotError> {
        match self.u8()? {
            0 => Ok(None),
            1 => self.array().map(|digest| Some(SnapshotDigest(digest))),
            _ => Err(DecodeSnapshotError::Field { field: "parent" }),
        }
    }

    fn image(&mut self) -> Result<ImageRef, DecodeSnapshotError> {
        Ok(ImageRef {
            digest: ImageDigest(self.array()?),
            len_bytes: self.u64()?,
        })
    }

    /// The images in front of the base: memory, disk and device state, or the disk alone.
    fn parts(&mut self, version: u32) -> Result<(Option<Running>, ImageRef), DecodeSnapshotError> {
        if version == DISK_VERSION {
            return Ok((None, self.image()?));
        }
        let (memory, disk, device_state) = (self.image()?, self.image()?, self.image()?);
        let running = Running {
            memory,
            device_state,
        };
        Ok((Some(running), disk))
    }

    fn text(&mut self, field: &'static str) -> Result<String, DecodeSnapshotError> {
        let length = usize::from(self.u8()?);
        let rest = self.all.get(self.at..).unwrap_or_default();
        let bytes = rest.get(..length).ok_or_else(|| self.wrong_length())?;
        self.at += length;
        let text = str::from_utf8(bytes).map_err(|_| DecodeSnapshotError::Field { field })?;
        Ok(text.to_owned())
    }

    fn wrong_length(&self) -> DecodeSnapshotError {
        DecodeSnapshotError::Length {
            bytes: self.all.len(),
        }
    }
}

/// The length of the image of a file that long: whole blocks.
pub(super) fn image_bytes_of(len_bytes: u64) -> u64 {
    len_bytes.next_multiple_of(BLOCK_BYTES)
}

#[cfg(test)]
pub(super) mod tests;
