//! The log's own files, as fuzz targets.

use std::fs;

use prost::Message as _;
use proto::fuzzing::{Target, scratch};
use proto::wire::raftlog as pb;

use super::record::{self, ALIGN, Draft, HEADER_BYTES, Kind};
use super::recover;
use super::segment::{self, HEAD_BYTES, MIN_SEGMENT_BYTES};
use crate::disk::RealDisk;

/// One record.
pub(crate) const RECORD: Target = Target {
    name: "raft-log-record",
    samples: records,
    run: record,
};
/// A whole segment, read as at a start.
pub(crate) const SEGMENT: Target = Target {
    name: "raft-log-segment",
    samples: segments,
    run: segment,
};

/// Where the records of [`RECORD`] lie.
const NUMBER: u64 = 3;
const OFFSET: u32 = 64;
/// Most records whose checksum is made right: enough to reach behind each kind.
const MENDED: usize = 64;

fn log_id(index: u64) -> pb::LogId {
    pb::LogId {
        term: 2,
        leader: 1,
        index,
    }
}

/// What a segment begins with, a few entries, and marks of each kind.
fn bodies() -> Vec<(Kind, u64, Vec<u8>)> {
    let entry = |index| pb::Entry {
        log_id: Some(log_id(index)),
        payload: Some(pb::entry::Payload::Proposal(vec![7; 40])),
    };
    let vote = pb::Vote {
        term: 2,
        node: 1,
        committed: true,
    };
    let state = pb::HardState {
        vote: Some(vote),
        committed: Some(log_id(0)),
        purged: None,
    };
    let mut all = vec![(Kind::State, 0, state.encode_to_vec())];
    all.extend((1..=4).map(|index| (Kind::Entry, index, entry(index).encode_to_vec())));
    all.extend([
        (Kind::Vote, 0, vote.encode_to_vec()),
        (Kind::Truncate, 4, Vec::new()),
        (Kind::Committed, 0, log_id(3).encode_to_vec()),
        (Kind::Purge, 0, log_id(2).encode_to_vec()),
        (Kind::Entry, 4, entry(4).encode_to_vec()),
        (Kind::Seal, 0, Vec::new()),
    ]);
    all
}

fn draft((kind, index, body): &(Kind, u64, Vec<u8>)) -> Draft<'_> {
    Draft {
        kind: *kind,
        index: *index,
        term: 2,
        body,
    }
}

fn records() -> Vec<Vec<u8>> {
    let bodies = bodies();
    let encoded = bodies.iter().map(|body| {
        let mut out = Vec::new();
        draft(body).encode(NUMBER, OFFSET, HEAD_BYTES, &mut out);
        out
    });
    encoded.collect()
}

fn record(bytes: &[u8]) {
    read_record(bytes);
    let mut mended = bytes.to_vec();
    mend(&mut mended, NUMBER, OFFSET, 0);
    read_record(&mended);
}

fn read_record(bytes: &[u8]) {
    let Some(read) = record::parse(NUMBER, OFFSET, bytes) else {
        return;
    };
    assert!(read.len as usize <= bytes.len() && read.len.is_multiple_of(ALIGN));
    assert!(read.since <= OFFSET && read.body.len() < read.len as usize);
    let _proof = record::proves_synced(NUMBER, bytes, 0);
}

/// Makes the checksum of what may be a record at `at` right; returns where the next would begin.
fn mend(bytes: &mut [u8], number: u64, offset: u32, at: usize) -> Option<usize> {
    let header = bytes.get(at..at + HEADER_BYTES as usize)?;
    let body = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    let length = body.checked_next_multiple_of(ALIGN)?;
    let end = at.checked_add(length.checked_add(HEADER_BYTES)? as usize)?;
    let crc = record::checksum(number, offset, bytes.get(at + 4..end)?);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    Some(end)
}

fn segments() -> Vec<Vec<u8>> {
    let whole = |count: usize| {
        let mut bytes = segment::head(1, MIN_SEGMENT_BYTES).to_vec();
        for body in bodies().iter().take(count) {
            let offset = u32::try_from(bytes.len()).expect("a small segment");
            draft(body).encode(1, offset, HEAD_BYTES, &mut bytes);
        }
        bytes
    };
    // One that goes on, and one that is complete.
    vec![whole(9), whole(bodies().len())]
}

/// Recovers a log of one segment, as it is and with its checksums made right. What is cut of it is
/// the unsynced tail, so a second start finds what the first one did.
fn segment(bytes: &[u8]) {
    recover_twice(bytes);
    let mut mended = bytes.to_vec();
    let mut at = HEAD_BYTES as usize;
    for _ in 0..MENDED {
        let offset = u32::try_from(at).unwrap_or(u32::MAX);
        match mend(&mut mended, 1, offset, at) {
            Some(next) => at = next,
            None => break,
        }
    }
    let head = segment::head(1, MIN_SEGMENT_BYTES);
    let start = mended.len().min(head.len());
    mended[..start].copy_from_slice(&head[..start]);
    recover_twice(&mended);
}

fn recover_twice(bytes: &[u8]) {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let path = segment::path(dir.path(), 1);
    // A segment is always as long as its head says; one that is not is refused at once.
    let mut whole = bytes.to_vec();
    whole.resize(MIN_SEGMENT_BYTES as usize, 0);
    fs::write(&path, whole).expect("written");
    let once = recover::recover(dir.path(), MIN_SEGMENT_BYTES, 1 << 20, &RealDisk);
    let Ok(once) = once else { return };
    let again = recover::recover(dir.path(), MIN_SEGMENT_BYTES, 1 << 20, &RealDisk);
    let again = again.unwrap_or_else(|err| panic!("the second start refuses: {err}"));
    assert_eq!(once.index.last(), again.index.last());
    assert_eq!(once.offset, again.offset);
}
