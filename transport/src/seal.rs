//! The secret half of a join token: the seed of an Ed25519 key that only the joiner holds.
//!
//! The log has its public key, which checks a proof and makes none, so that a stolen copy of the
//! state cannot join.

use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::identity::IdentityError;

/// Bytes of a seed, and of the public key made from it.
pub const SEED_BYTES: usize = 32;
/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;

/// The seed of a token's key.
#[derive(Clone)]
pub struct Seed {
    bytes: [u8; SEED_BYTES],
    pair: std::sync::Arc<Ed25519KeyPair>,
}

impl Seed {
    /// A new seed.
    ///
    /// # Errors
    /// [`IdentityError::Generate`]: the system gave no randomness.
    pub fn random() -> Result<Self, IdentityError> {
        let mut bytes = [0; SEED_BYTES];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| IdentityError::Generate)?;
        Ok(Self::from_bytes(bytes))
    }

    /// The seed with these bytes; any will do.
    #[must_use]
    pub fn from_bytes(bytes: [u8; SEED_BYTES]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(&bytes)
            .expect("32 bytes are a seed, whatever they are");
        Self {
            bytes,
            pair: std::sync::Arc::new(pair),
        }
    }

    /// The seed itself, to be printed once in a token.
    #[must_use]
    pub fn bytes(&self) -> [u8; SEED_BYTES] {
        self.bytes
    }

    /// What checks its signatures.
    #[must_use]
    pub fn public_key(&self) -> [u8; SEED_BYTES] {
        let mut public = [0; SEED_BYTES];
        public.copy_from_slice(self.pair.public_key().as_ref());
        public
    }

    /// Signs `message`, which begins with what it is for.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }
}

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(secret)")
    }
}

/// Whether `signature` is one of `message` by the seed whose public key is `public`.
#[must_use]
pub fn verify_seed_signature(public: &[u8; SEED_BYTES], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public)
        .verify(message, signature)
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_read_back_signs_as_the_one_that_was_printed() {
        let made = Seed::random().expect("randomness");
        let read = Seed::from_bytes(made.bytes());
        assert_eq!(read.public_key(), made.public_key());
        assert!(verify_seed_signature(
            &made.public_key(),
            b"m",
            &read.sign(b"m")
        ));
    }

    #[test]
    fn a_signature_fits_its_own_message_and_seed_only() {
        let (seed, other) = (Seed::from_bytes([1; 32]), Seed::from_bytes([2; 32]));
        let signature = seed.sign(b"message");
        let public = seed.public_key();
        assert!(verify_seed_signature(&public, b"message", &signature));
        assert!(!verify_seed_signature(&public, b"messagf", &signature));
        assert!(!verify_seed_signature(
            &other.public_key(),
            b"message",
            &signature
        ));
        for bad in [&signature[..63], &[0; 64], &[], &[7; 1000]] {
            assert!(!verify_seed_signature(&public, b"message", bad));
        }
    }

    #[test]
    fn a_seed_does_not_show_itself_in_a_log() {
        let shown = format!("{:?}", Seed::from_bytes([0x41; 32]));
        assert_eq!(shown, "Seed(secret)");
    }
}
