//! Images that can be made again from their numbers.

#![allow(dead_code)] // each test program uses some of it

pub(crate) mod peers;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use wrenn_node::store::{CHUNK_BYTES, Limits};

/// Small packs, so that there are many, and no regard for the machine's disk.
pub(crate) const LIMITS: Limits = Limits {
    keep_free_bytes: 0,
    budget_bytes: u64::MAX,
    pack_bytes: 2 << 20,
};

const MAX_CHUNKS: usize = 20;

/// The bytes of an image: holes, chunks that others have too, and chunks of its own, of which some
/// compress. Its length is odd.
pub(crate) fn content(name: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(name);
    let chunks = random.random_range(2..MAX_CHUNKS);
    let mut bytes = vec![0; chunks * CHUNK_BYTES - random.random_range(0..5000)];
    for window in bytes.chunks_mut(CHUNK_BYTES) {
        match random.random_range(0..4) {
            0 => {}
            1 => StdRng::seed_from_u64(random.random_range(0..40)).fill_bytes(window),
            2 => random.fill_bytes(window),
            _ => {
                let word: [u8; 5] = random.random();
                window
                    .chunks_mut(5)
                    .for_each(|part| part.copy_from_slice(&word[..part.len()]));
            }
        }
    }
    // The end must not be a hole, so that the length shows.
    if let Some(last) = bytes.last_mut() {
        *last = 1;
    }
    bytes
}

/// A file with these bytes.
pub(crate) fn file_with(path: &Path, bytes: &[u8]) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .expect("a file");
    file.set_len(bytes.len() as u64).expect("room");
    file.write_all_at(bytes, 0).expect("room");
    file
}
