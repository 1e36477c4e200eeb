//! The samples on disk, for a daemon that comes back: a file a guest, each place of fixed size.
//!
//! ```text
//! <data>/cache/samples/<id>    place 0 | place 1 | ... | place 1727    64 bytes each, 108 KiB
//! place                        at, cores, sizes (60 bytes) | crc of layout, id, place and those
//! ```
//!
//! A place is overwritten where it lies, so a file never grows beyond its places and nothing has to
//! be tidied. Nothing is flushed either: what was written outlives the daemon, however it ends, and
//! of what a host loses that goes down a torn place is one that is missing. A place counts only where
//! its sum says that it was written there, for that guest, in this layout.
//!
//! Whoever sweeps the samples of a guest removes its file. That must not run beside a
//! [`put`](Shelf::put), which makes the file where there is none.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use proto::ids::SandboxId;
use proto::units::Stamp;

use super::ring::{PLACES, Placed};
use crate::base::sample::{Inside, Sample};

/// Goes into every sum: another layout, of a place or of their order, gets another number.
const LAYOUT: u32 = 1;
const PLACE_BYTES: usize = 64;
const SUM_BYTES: usize = 4;
const FILE_BYTES: usize = PLACE_BYTES * PLACES;
const PRIVATE_DIR: u32 = 0o700;
const PRIVATE_FILE: u32 = 0o600;

type Bytes = [u8; PLACE_BYTES];

/// The files of all guests.
#[derive(Debug)]
pub(super) struct Shelf {
    dir: PathBuf,
}

impl Shelf {
    /// Over `dir`, which need not be there yet. Touches no disk.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The guests that have a file; makes the directory where there is none.
    ///
    /// # Errors
    /// The disk refused.
    pub(super) fn present(&self) -> io::Result<Vec<SandboxId>> {
        let mut make = DirBuilder::new();
        make.recursive(true).mode(PRIVATE_DIR).create(&self.dir)?;
        let mut present = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|it| it.parse::<SandboxId>().ok());
            present.extend(id);
        }
        Ok(present)
    }

    /// What is whole of a guest's samples.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub(super) fn read(&self, id: SandboxId) -> io::Result<Vec<Placed>> {
        let mut bytes = Vec::new();
        let file = File::open(self.path(id))?;
        file.take(FILE_BYTES as u64).read_to_end(&mut bytes)?;
        let (places, _torn) = bytes.as_chunks::<PLACE_BYTES>();
        let places = places.iter().enumerate();
        Ok(places
            .filter_map(|(place, bytes)| decode(id, place, bytes))
            .collect())
    }

    /// Puts samples into their places.
    ///
    /// # Errors
    /// The disk refused; some of them may be in place.
    pub(super) fn put(
        &self,
        id: SandboxId,
        samples: impl Iterator<Item = Placed>,
    ) -> io::Result<()> {
        let mut open = OpenOptions::new();
        open.write(true).create(true).truncate(false);
        let file = open.mode(PRIVATE_FILE).open(self.path(id))?;
        for placed in samples {
            let offset = (placed.place * PLACE_BYTES) as u64;
            file.write_all_at(&encode(id, &placed), offset)?;
        }
        Ok(())
    }

    /// Removes a guest's file; fine if there is none.
    ///
    /// # Errors
    /// The disk refused.
    pub(super) fn remove(&self, id: SandboxId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
            _ => Ok(()),
        }
    }

    fn path(&self, id: SandboxId) -> PathBuf {
        self.dir.join(id.to_string())
    }
}

fn encode(id: SandboxId, placed: &Placed) -> Bytes {
    let Sample {
        at,
        busy_cores,
        resident_kib,
        disk_kib,
        sent_bytes,
        received_bytes,
        inside,
    } = placed.sample;
    let Inside {
        mem_used_kib,
        mem_total_kib,
        mem_cache_kib,
        disk_used_kib,
        disk_total_kib,
    } = inside;
    let mut bytes = Vec::with_capacity(PLACE_BYTES);
    for word in [at.0, sent_bytes, received_bytes] {
        bytes.extend(word.to_le_bytes());
    }
    for word in [
        busy_cores.to_bits(),
        resident_kib,
        disk_kib,
        mem_used_kib,
        mem_total_kib,
        mem_cache_kib,
        disk_used_kib,
        disk_total_kib,
    ] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(PLACE_BYTES - SUM_BYTES, 0);
    let sum = sum(id, placed.place, &bytes);
    bytes.extend(sum.to_le_bytes());
    bytes.try_into().expect("a place was filled up to its end")
}

fn decode(id: SandboxId, place: usize, bytes: &Bytes) -> Option<Placed> {
    let (body, told) = bytes.split_last_chunk::<SUM_BYTES>()?;
    if u32::from_le_bytes(*told) != sum(id, place, body) {
        return None;
    }
    let (longs, rest) = body.split_first_chunk::<24>()?;
    let mut longs = longs.as_chunks().0.iter().map(|it| u64::from_le_bytes(*it));
    let mut words = rest.as_chunks().0.iter().map(|it| u32::from_le_bytes(*it));
    let sample = Sample {
        at: Stamp(longs.next()?),
        sent_bytes: longs.next()?,
        received_bytes: longs.next()?,
        busy_cores: f32::from_bits(words.next()?),
        resident_kib: words.next()?,
        disk_kib: words.next()?,
        inside: Inside {
            mem_used_kib: words.next()?,
            mem_total_kib: words.next()?,
            mem_cache_kib: words.next()?,
            disk_used_kib: words.next()?,
            disk_total_kib: words.next()?,
        },
    };
    Some(Placed { place, sample })
}

/// Of a place's body where it belongs. One that was never written is all zero, and its sum is not.
fn sum(id: SandboxId, place: usize, body: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&LAYOUT.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &id.0);
    let sum = crc32c::crc32c_append(sum, &(place as u64).to_le_bytes());
    crc32c::crc32c_append(sum, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SandboxId = SandboxId([7; 16]);
    const OTHER: SandboxId = SandboxId([8; 16]);

    fn placed(place: usize) -> Placed {
        let word = u32::try_from(place).unwrap();
        Placed {
            place,
            sample: Sample {
                at: Stamp(1_700_000_000_000 + place as u64),
                busy_cores: 0.25,
                resident_kib: word,
                disk_kib: 2,
                sent_bytes: u64::MAX,
                received_bytes: 4,
                inside: Inside {
                    mem_used_kib: 5,
                    mem_total_kib: 6,
                    mem_cache_kib: 7,
                    disk_used_kib: 8,
                    disk_total_kib: 9,
                },
            },
        }
    }

    fn shelf() -> (tempfile::TempDir, Shelf) {
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(root.path().join("cache/samples"));
        assert_eq!(shelf.present().unwrap(), []);
        (root, shelf)
    }

    #[test]
    fn what_is_put_into_its_places_is_read_as_it_was() {
        let (_root, shelf) = shelf();
        let all = [placed(0), placed(7), placed(PLACES - 1)];
        shelf.put(ID, all.into_iter()).unwrap();
        assert_eq!(shelf.present().unwrap(), [ID]);
        assert_eq!(shelf.read(ID).unwrap(), all);
        shelf.remove(ID).unwrap();
        shelf.remove(ID).unwrap();
        assert_eq!(shelf.present().unwrap(), []);
    }

    #[test]
    fn a_file_is_never_longer_than_its_places() {
        let (_root, shelf) = shelf();
        for _ in 0..2 {
            shelf.put(ID, (0..PLACES).map(placed)).unwrap();
        }
        let bytes = fs::metadata(shelf.path(ID)).unwrap().len();
        assert_eq!(bytes, FILE_BYTES as u64);
        assert_eq!(shelf.read(ID).unwrap().len(), PLACES);
    }

    #[test]
    fn a_torn_place_costs_itself_and_no_other() {
        let (_root, shelf) = shelf();
        shelf.put(ID, (0..3).map(placed)).unwrap();
        let whole = fs::read(shelf.path(ID)).unwrap();
        for cut in 0..whole.len() {
            fs::write(shelf.path(ID), &whole[..cut]).unwrap();
            assert_eq!(shelf.read(ID).unwrap().len(), cut / PLACE_BYTES, "at {cut}");
        }
        for byte in 0..whole.len() {
            let mut spoilt = whole.clone();
            spoilt[byte] ^= 0x10;
            fs::write(shelf.path(ID), &spoilt).unwrap();
            let left: Vec<_> = shelf.read(ID).unwrap();
            let left: Vec<_> = left.iter().map(|it| it.place).collect();
            let others: Vec<_> = (0..3).filter(|it| *it != byte / PLACE_BYTES).collect();
            assert_eq!(left, others, "byte {byte}");
        }
    }

    #[test]
    fn what_is_in_a_place_counts_only_there_and_for_its_guest() {
        let (_root, shelf) = shelf();
        shelf.put(ID, [placed(1)].into_iter()).unwrap();
        let bytes = fs::read(shelf.path(ID)).unwrap();
        fs::write(shelf.path(OTHER), &bytes).unwrap();
        assert_eq!(shelf.read(OTHER).unwrap(), []);
        fs::write(shelf.path(ID), &bytes[PLACE_BYTES..]).unwrap();
        assert_eq!(shelf.read(ID).unwrap(), []);
    }

    #[test]
    fn what_is_no_ones_samples_is_left_alone() {
        let (_root, shelf) = shelf();
        fs::write(shelf.dir.join("notes"), "mine").unwrap();
        assert_eq!(shelf.present().unwrap(), []);
    }

    #[test]
    fn a_place_that_was_never_written_is_none() {
        assert_eq!(decode(ID, 0, &[0; PLACE_BYTES]), None);
    }
}
