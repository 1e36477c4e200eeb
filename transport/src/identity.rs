//! This node's Ed25519 key: made at the first start, the same for ever after.
//!
//! The key file is `node.key` in the identity directory: PKCS#8 as DER, mode 0600, in a directory
//! that nobody else may write. It is written once, under a lock on the directory:
//! temporary file > fsync > rename > fsync of the directory. A crash in between leaves at most a
//! temporary file, which the next start throws away; nobody has seen that key. A key file that is
//! there but is short, garbled or open to others is refused by name and never replaced: a new key
//! would be a new node, and only a person may decide that.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use proto::ids::NodeKey;
use ring::digest;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

/// Name of the key file in the identity directory.
pub const KEY_FILE: &str = "node.key";
/// Where the key is written before it gets its name.
const TEMP_FILE: &str = "node.key.tmp";
/// Only the owner may read the key.
const FILE_MODE: u32 = 0o600;
/// Only the owner may look into the directory.
const DIR_MODE: u32 = 0o700;
/// Permission bits of anyone but the owner.
const OTHERS_MASK: u32 = 0o077;
/// Permission bits by which anyone but the owner could replace the key.
const OTHERS_WRITE_MASK: u32 = 0o022;
/// An Ed25519 key in PKCS#8 has 83 to 85 bytes; whatever is longer than this is something else.
const MAX_KEY_FILE_BYTES: u64 = 1024;
/// What precedes the 32 key bytes in the SPKI encoding of an Ed25519 key (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// Why this node's key could not be made or loaded.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file operation failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// The key, or its directory, could be read or replaced by someone else.
    #[error("mode {mode:o} of {} is too open: run `chmod {want:o}` on it", path.display())]
    WrongMode {
        /// Which file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The bits it should have.
        want: u32,
    },
    /// The key, or its directory, belongs to another user.
    #[error("{} belongs to user {owner}, but the node runs as user {me}", path.display())]
    WrongOwner {
        /// Which file or directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        me: u32,
    },
    /// Something is there that is not a key.
    #[error(
        "{} is not an Ed25519 key ({found}): restore it from a backup, or remove the whole data \
         directory to join as a new node",
        path.display()
    )]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What was found instead.
        found: &'static str,
    },
    /// The system gave no randomness, or the new key did not read back.
    #[error("make a new key")]
    Generate,
}

/// A node's key pair and the names derived from it. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    pair: Arc<Ed25519KeyPair>,
    certified: Arc<CertifiedKey>,
    key: NodeKey,
}

impl Identity {
    /// Loads the key in `dir`, or makes one if there is none yet.
    ///
    /// Blocks on the disk: call it before the runtime is busy.
    ///
    /// # Errors
    /// All of [`IdentityError`]; none of them leaves a half-made key behind.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        let handle = open_dir(dir)?;
        // Two starts in one directory must end with one key.
        let lock = Flock::lock(handle, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", dir)(errno.into()))?;
        let path = dir.join(KEY_FILE);
        let der = match read_key(&path)? {
            Some(der) => der,
            None => {
                let der = generate()?;
                write_key(dir, &lock, &der)?;
                der
            }
        };
        Self::from_pkcs8(&der).ok_or(IdentityError::Corrupt {
            path,
            found: "other bytes",
        })
    }

    /// An identity that is never written down, for tests and for a single use.
    ///
    /// # Errors
    /// [`IdentityError::Generate`]: the system gave no randomness.
    pub fn ephemeral() -> Result<Self, IdentityError> {
        Self::from_pkcs8(&generate()?).ok_or(IdentityError::Generate)
    }

    /// The name by which peers pin this node.
    #[must_use]
    pub fn key(&self) -> NodeKey {
        self.key
    }

    /// The public key in SPKI encoding, as sent in handshakes.
    #[must_use]
    pub fn spki(&self) -> Vec<u8> {
        spki_of(self.pair.public_key().as_ref())
    }

    /// Signs `message` with the node's key. The caller puts a purpose in front of what it signs,
    /// so that a signature made for one thing never fits another.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }

    /// The form in which rustls wants the key.
    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }

    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        let pair = Ed25519KeyPair::from_pkcs8(der).ok()?;
        let signer = any_eddsa_type(&PrivatePkcs8KeyDer::from(der.to_vec())).ok()?;
        let spki = spki_of(pair.public_key().as_ref());
        Some(Self {
            key: key_of_spki(&spki)?,
            certified: Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], signer)),
            pair: Arc::new(pair),
        })
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the pair.
        write!(f, "Identity({})", self.key)
    }
}

/// The name of the node whose SPKI this is; `None` if it is not an Ed25519 key in its one
/// canonical encoding.
#[must_use]
pub fn key_of_spki(spki: &[u8]) -> Option<NodeKey> {
    let point = spki.strip_prefix(&SPKI_PREFIX)?;
    if point.len() != 32 {
        return None;
    }
    let hash = digest::digest(&digest::SHA256, spki);
    hash.as_ref().try_into().ok().map(NodeKey)
}

fn spki_of(public: &[u8]) -> Vec<u8> {
    [&SPKI_PREFIX, public].concat()
}

fn generate() -> Result<Vec<u8>, IdentityError> {
    Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map(|document| document.as_ref().to_vec())
        .map_err(|_| IdentityError::Generate)
}

/// Opens the identity directory, making it first if needed.
fn open_dir(dir: &Path) -> Result<File, IdentityError> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIR_MODE)
        .create(dir)
        .map_err(failed("create directory", dir))?;
    let handle = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
        .open(dir)
        .map_err(failed("open directory", dir))?;
    check_access(&handle, dir, OTHERS_WRITE_MASK, DIR_MODE)?;
    Ok(handle)
}

/// The bytes of the key file, or `None` if there is no such file.
fn read_key(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    let opened = OpenOptions::new()
        .read(true)
        // A pipe in its place must not block the start, nor a link lead elsewhere.
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) if err.raw_os_error() == Some(Errno::ELOOP as i32) => {
            return Err(corrupt(path, "a symbolic link"));
        }
        Err(err) => return Err(failed("open", path)(err)),
    };
    let meta = check_access(&file, path, OTHERS_MASK, FILE_MODE)?;
    if !meta.is_file() {
        return Err(corrupt(path, "not a file"));
    }
    let mut der = Vec::new();
    file.take(MAX_KEY_FILE_BYTES + 1)
        .read_to_end(&mut der)
        .map_err(failed("read", path))?;
    if der.is_empty() {
        return Err(corrupt(path, "an empty file"));
    }
    if der.len() as u64 > MAX_KEY_FILE_BYTES {
        return Err(corrupt(path, "far too many bytes"));
    }
    Ok(Some(der))
}

/// Refuses what belongs to another user or grants any bit of `forbidden`.
fn check_access(
    file: &File,
    path: &Path,
    forbidden: u32,
    want: u32,
) -> Result<fs::Metadata, IdentityError> {
    let meta = file.metadata().map_err(failed("inspect", path))?;
    let me = nix::unistd::geteuid().as_raw();
    if meta.uid() != me {
        return Err(IdentityError::WrongOwner {
            path: path.to_owned(),
            owner: meta.uid(),
            me,
        });
    }
    let mode = meta.mode() & 0o7777;
    if mode & forbidden != 0 {
        return Err(IdentityError::WrongMode {
            path: path.to_owned(),
            mode,
            want,
        });
    }
    Ok(meta)
}

/// Writes a new key so that it is either there whole and durable, or not there at all.
fn write_key(dir: &Path, handle: &File, der: &[u8]) -> Result<(), IdentityError> {
    let temp = dir.join(TEMP_FILE);
    match fs::remove_file(&temp) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove", &temp)(err));
        }
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(&temp)
        .map_err(failed("create", &temp))?;
    file.write_all(der).map_err(failed("write", &temp))?;
    file.sync_all().map_err(failed("sync", &temp))?;
    let path = dir.join(KEY_FILE);
    fs::rename(&temp, &path).map_err(failed("rename to", &path))?;
    handle.sync_all().map_err(failed("sync directory", dir))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io {
        action,
        path,
        source,
    }
}

fn corrupt(path: &Path, found: &'static str) -> IdentityError {
    IdentityError::Corrupt {
        path: path.to_owned(),
        found,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod works");
    }

    fn put_key(dir: &Path, bytes: &[u8]) -> PathBuf {
        let path = dir.join(KEY_FILE);
        fs::write(&path, bytes).expect("write works");
        chmod(&path, FILE_MODE);
        path
    }

    fn load(dir: &Path) -> Result<Identity, IdentityError> {
        Identity::load_or_create(dir)
    }

    #[test]
    fn the_key_is_made_once_and_survives_restarts() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("data/identity");
        let first = load(&dir).expect("made");
        let bytes = fs::read(dir.join(KEY_FILE)).expect("there");
        let second = load(&dir).expect("loaded");

        assert_eq!(first.key(), second.key());
        assert_eq!(bytes, fs::read(dir.join(KEY_FILE)).expect("there"));
        let mode = fs::metadata(dir.join(KEY_FILE)).expect("there").mode() & 0o7777;
        assert_eq!(mode, FILE_MODE);
        assert!(!dir.join(TEMP_FILE).exists());
        assert_eq!(key_of_spki(&second.spki()), Some(second.key()));
    }

    #[test]
    fn starts_at_the_same_instant_end_with_one_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let keys: Vec<NodeKey> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| load(dir.path()))).collect();
            let ends = starts
                .into_iter()
                .map(|start| start.join().expect("no panic"));
            ends.map(|made| made.expect("made").key()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn a_leftover_of_a_crash_before_the_rename_is_thrown_away() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join(TEMP_FILE), b"half a key").expect("write works");
        let made = load(dir.path()).expect("made");
        assert_eq!(load(dir.path()).expect("loaded").key(), made.key());
    }

    #[test]
    fn a_key_file_cut_at_any_byte_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let whole = generate().expect("randomness");
        for length in 0..whole.len() {
            let path = put_key(dir.path(), &whole[..length]);
            let err = load(dir.path()).expect_err("a part is no key");
            assert!(matches!(err, IdentityError::Corrupt { .. }), "{err}");
            assert!(err.to_string().contains(KEY_FILE));
            assert_eq!(fs::read(&path).expect("there").len(), length);
        }
    }

    #[test]
    fn garbage_and_oversized_key_files_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut flipped = generate().expect("randomness");
        let last = flipped.len() - 1;
        flipped[last] ^= 1;
        for bytes in [vec![0; 85], vec![0xff; 1 << 20], flipped] {
            put_key(dir.path(), &bytes);
            let err = load(dir.path()).expect_err("not a key");
            assert!(matches!(err, IdentityError::Corrupt { .. }), "{err}");
        }
    }

    #[test]
    fn a_key_others_may_read_is_refused_until_its_mode_is_mended() {
        let dir = tempfile::tempdir().expect("a directory");
        load(dir.path()).expect("made");
        let path = dir.path().join(KEY_FILE);
        for mode in [0o644, 0o640, 0o602, 0o610] {
            chmod(&path, mode);
            let err = load(dir.path()).expect_err("too open");
            assert!(
                matches!(err, IdentityError::WrongMode { want: 0o600, .. }),
                "{err}"
            );
        }
        chmod(&path, 0o400);
        load(dir.path()).expect("stricter is fine");
    }

    #[test]
    fn a_directory_others_may_write_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        chmod(dir.path(), 0o777);
        let err = load(dir.path()).expect_err("anyone could replace the key");
        assert!(
            matches!(err, IdentityError::WrongMode { want: 0o700, .. }),
            "{err}"
        );
    }

    #[test]
    fn a_link_or_a_pipe_in_the_key_s_place_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(KEY_FILE);
        std::os::unix::fs::symlink("/etc/hostname", &path).expect("link works");
        let err = load(dir.path()).expect_err("a link is no key");
        assert!(matches!(err, IdentityError::Corrupt { .. }), "{err}");

        fs::remove_file(&path).expect("removed");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).expect("fifo works");
        let err = load(dir.path()).expect_err("a pipe is no key");
        assert!(matches!(err, IdentityError::Corrupt { .. }), "{err}");
    }

    #[test]
    fn only_the_one_encoding_of_a_key_has_a_name() {
        let spki = Identity::ephemeral().expect("randomness").spki();
        assert!(key_of_spki(&spki).is_some());
        let longer = [&spki[..], &[0]].concat();
        for bad in [&spki[..43], &spki[1..], &longer[..], &[]] {
            assert_eq!(key_of_spki(bad), None);
        }
    }
}
