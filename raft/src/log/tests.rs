//! The log on a real file system: what comes back after cuts, damage and switches of segments.

use std::fs;
use std::path::PathBuf;

use openraft::EntryPayload;
use tempfile::TempDir;

use super::*;
use crate::disk::RealDisk;
use crate::types::{CommittedLeader, Leader, ProposalBytes};

const OPTIONS: LogOptions = LogOptions {
    segment_bytes: MIN_SEGMENT_BYTES,
    cache_bytes: 1024,
};

fn id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeader { term, node_id: 1 }, index)
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let byte = u8::try_from(index % 251).unwrap();
    Entry {
        log_id: id(term, index),
        payload: EntryPayload::Normal(ProposalBytes(vec![byte; bytes].into())),
    }
}

const fn vote(term: u64) -> Vote {
    Vote {
        leader_id: Leader { term, node_id: 1 },
        committed: true,
    }
}

fn open(dir: &TempDir) -> Result<Log, OpenLogError> {
    Log::open(dir.path(), OPTIONS, Arc::new(RealDisk), FaultCell::new())
}

async fn append(log: &Log, entries: Vec<Entry>) {
    let (done, flushed) = oneshot::channel();
    log.append(entries, move |result| drop(done.send(result)))
        .await
        .unwrap();
    flushed.await.unwrap().unwrap();
}

async fn ids(log: &Log) -> Vec<LogId> {
    let entries = log.read(0..u64::MAX).await.unwrap();
    entries.iter().map(|entry| entry.log_id).collect()
}

/// Stops the log as a crash would: nothing more is written than what was acknowledged.
async fn close(log: Log) {
    tokio::task::spawn_blocking(move || log.stop())
        .await
        .unwrap();
}

fn segments(dir: &TempDir) -> Vec<PathBuf> {
    let numbers = segment::list(dir.path(), &RealDisk).unwrap();
    numbers
        .into_iter()
        .map(|number| segment::path(dir.path(), number))
        .collect()
}

/// Where the records of a segment start, and where the last one ends.
fn record_starts(number: u64, bytes: &[u8]) -> Vec<u32> {
    let mut starts = vec![segment::HEAD_BYTES];
    loop {
        let at = *starts.last().unwrap();
        match record::parse(number, at, &bytes[at as usize..]) {
            Some(record) => starts.push(at + record.len),
            None => return starts,
        }
    }
}

#[tokio::test]
async fn everything_acknowledged_comes_back_over_many_segments() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    assert!(log.was_pristine());
    log.save_vote(vote(1)).await.unwrap();
    for index in 0..200 {
        append(&log, vec![entry(1, index, 500)]).await;
        log.save_committed(Some(id(1, index)));
    }
    close(log).await;
    assert!(segments(&dir).len() > 5);

    let log = open(&dir).unwrap();
    assert!(!log.was_pristine());
    assert_eq!(
        (log.vote(), log.committed()),
        (Some(vote(1)), Some(id(1, 199)))
    );
    let entries = log.read(0..1000).await.unwrap();
    assert_eq!(entries.len(), 200);
    for (index, found) in (0..).zip(entries) {
        assert_eq!(found.payload, entry(1, index, 500).payload);
    }
}

#[tokio::test]
async fn a_cut_at_any_byte_of_the_last_record_costs_that_record_only() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    append(&log, vec![entry(1, 0, 30)]).await;
    append(&log, vec![entry(1, 1, 30)]).await;
    append(&log, vec![entry(1, 2, 30)]).await;
    close(log).await;
    let path = segments(&dir)[0].clone();
    let whole = fs::read(&path).unwrap();
    let starts = record_starts(1, &whole);
    let [.., start, end] = starts[..] else {
        panic!("records are there")
    };
    // A byte behind the last non-zero one is not missed.
    let used = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    assert!(used <= end as usize);
    for cut in start as usize..used {
        let mut torn = whole.clone();
        torn[cut..].fill(0);
        fs::write(&path, &torn).unwrap();
        let log = open(&dir).unwrap_or_else(|err| panic!("cut at {cut}: {err:?}"));
        assert_eq!(ids(&log).await, [id(1, 0), id(1, 1)], "cut at {cut}");
        // What is written in its place must not be followed by the torn record's remains.
        append(&log, vec![entry(2, 2, 1)]).await;
        close(log).await;
        let log = open(&dir).unwrap();
        assert_eq!(
            ids(&log).await,
            [id(1, 0), id(1, 1), id(2, 2)],
            "cut at {cut}"
        );
        close(log).await;
    }
}

#[tokio::test]
async fn a_flipped_bit_before_synced_records_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    for index in 0..4 {
        append(&log, vec![entry(1, index, 20)]).await;
    }
    close(log).await;
    let path = segments(&dir)[0].clone();
    let whole = fs::read(&path).unwrap();
    let starts = record_starts(1, &whole);
    let last = starts[starts.len() - 2] as usize;
    for bit in (segment::HEAD_BYTES as usize * 8..last * 8).step_by(5) {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &damaged).unwrap();
        let err = open(&dir)
            .err()
            .unwrap_or_else(|| panic!("bit {bit} went unnoticed"));
        assert!(
            matches!(err, OpenLogError::Corrupt { .. }),
            "bit {bit}: {err:?}"
        );
        assert_eq!(
            fs::read(&path).unwrap(),
            damaged,
            "a refused log is left alone"
        );
    }
}

#[tokio::test]
async fn a_write_that_reached_the_disk_out_of_order_is_cut_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    append(&log, vec![entry(1, 0, 30)]).await;
    // One write of three records; of the first of them only zeroes arrive.
    append(&log, (1..4).map(|index| entry(1, index, 30)).collect()).await;
    close(log).await;
    let path = segments(&dir)[0].clone();
    let mut bytes = fs::read(&path).unwrap();
    let starts = record_starts(1, &bytes);
    let lost = starts[starts.len() - 4] as usize..starts[starts.len() - 3] as usize;
    bytes[lost].fill(0);
    fs::write(&path, &bytes).unwrap();
    let log = open(&dir).unwrap();
    assert_eq!(ids(&log).await, [id(1, 0)]);
}

#[tokio::test]
async fn damage_in_an_older_segment_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    for index in 0..100 {
        append(&log, vec![entry(1, index, 500)]).await;
    }
    close(log).await;
    let path = segments(&dir)[1].clone();
    let whole = fs::read(&path).unwrap();
    let starts = record_starts(2, &whole);
    for at in [
        0,
        40,
        starts[2] + 4,
        starts[5] + 60,
        starts[starts.len() - 2] + 3,
    ] {
        let mut damaged = whole.clone();
        damaged[at as usize] ^= 4;
        fs::write(&path, &damaged).unwrap();
        let err = open(&dir).err().expect("is noticed");
        let named = err.to_string();
        assert!(named.contains("00000002.seg"), "byte {at}: {named}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(ids(&open(&dir).unwrap()).await.len(), 100);
}

#[tokio::test]
async fn a_missing_segment_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    for index in 0..100 {
        append(&log, vec![entry(1, index, 500)]).await;
    }
    close(log).await;
    let paths = segments(&dir);
    for path in &paths[1..] {
        let aside = path.with_extension("away");
        fs::rename(path, &aside).unwrap();
        let err = open(&dir).err().expect("is noticed");
        assert!(
            matches!(&err, OpenLogError::Missing(missing) if missing == path),
            "{err:?}"
        );
        fs::rename(&aside, path).unwrap();
    }
}

#[tokio::test]
async fn a_crash_while_switching_segments_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    append(&log, vec![entry(1, 0, 30)]).await;
    close(log).await;
    // The next segment had its name, the seal of this one was still to come.
    let spare = segment::Spare::create(dir.path(), 2, MIN_SEGMENT_BYTES, &RealDisk).unwrap();
    spare.publish(dir.path(), &RealDisk).unwrap();
    fs::write(dir.path().join("00000003.tmp"), b"half made").unwrap();
    let log = open(&dir).unwrap();
    assert_eq!(ids(&log).await, [id(1, 0)]);
    assert_eq!(segments(&dir).len(), 1);
    for index in 1..60 {
        append(&log, vec![entry(1, index, 500)]).await;
    }
    close(log).await;
    assert_eq!(ids(&open(&dir).unwrap()).await.len(), 60);
}

#[tokio::test]
async fn truncation_and_purge_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    append(&log, (0..10).map(|index| entry(1, index, 50)).collect()).await;
    log.truncate_after(Some(id(1, 6))).await.unwrap();
    append(&log, vec![entry(2, 7, 50)]).await;
    log.purge(id(1, 3)).await.unwrap();
    let expected = vec![id(1, 4), id(1, 5), id(1, 6), id(2, 7)];
    assert_eq!(ids(&log).await, expected);
    close(log).await;
    let log = open(&dir).unwrap();
    assert_eq!(ids(&log).await, expected);
    assert_eq!(log.purged(), Some(id(1, 3)));
}

#[tokio::test]
async fn segments_go_only_when_purged_and_covered_by_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    log.save_vote(vote(3)).await.unwrap();
    for index in 0..200 {
        append(&log, vec![entry(3, index, 500)]).await;
    }
    let all = segments(&dir).len();
    log.purge(id(3, 150)).await.unwrap();
    append(&log, vec![entry(3, 200, 1)]).await;
    assert_eq!(segments(&dir).len(), all, "no snapshot covers them");
    log.covered_by_snapshot(100);
    log.purge(id(3, 160)).await.unwrap();
    append(&log, vec![entry(3, 201, 1)]).await;
    let some = segments(&dir).len();
    assert!(some < all && some > all / 3, "{some} of {all}");
    log.covered_by_snapshot(180);
    log.purge(id(3, 190)).await.unwrap();
    append(&log, vec![entry(3, 202, 1)]).await;
    assert!(segments(&dir).len() <= 2);
    close(log).await;
    let log = open(&dir).unwrap();
    assert_eq!(log.vote(), Some(vote(3)), "the vote's own segment is gone");
    assert_eq!(log.purged(), Some(id(3, 190)));
    assert_eq!(ids(&log).await.first(), Some(&id(3, 191)));
}

#[tokio::test]
async fn an_entry_that_fits_no_segment_is_refused_and_stops_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir).unwrap();
    let (done, flushed) = oneshot::channel();
    let huge = vec![entry(1, 0, MIN_SEGMENT_BYTES as usize)];
    log.append(huge, move |result| drop(done.send(result)))
        .await
        .unwrap();
    assert!(flushed.await.unwrap().is_err());
}
