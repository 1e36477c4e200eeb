//! Files too large to be kept: made, sent, received and compared piece by piece, while somebody
//! watches how much memory the nodes on the way take.

use std::io::{self, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, mem};

use serde_json::json;
use wrenn_cluster_tests::client::{form, form_type};
use wrenn_cluster_tests::world::World;

/// Bytes of one piece. Each begins with its number, so none can pass for another.
const PIECE: usize = 64 << 10;
/// Longest a transfer may take: an emulated guest writes some megabytes a second.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(900);
/// Pause between two looks at a node's memory.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Kibibytes of a mebibyte.
const KIB: u64 = 1024;

/// The bytes of a file of so many mebibytes, made as they are read.
struct Bytes {
    piece: Vec<u8>,
    at: usize,
    next: u64,
    pieces: u64,
}

impl Bytes {
    fn new(mib: u64) -> Self {
        let filler = (0..PIECE).map(|at| u8::try_from(at % 251).expect("below 251"));
        Self {
            piece: filler.collect(),
            at: PIECE,
            next: 0,
            pieces: (mib << 20) / PIECE as u64,
        }
    }
}

impl Read for Bytes {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == PIECE {
            if self.next == self.pieces {
                return Ok(0);
            }
            self.piece[..8].copy_from_slice(&self.next.to_le_bytes());
            self.next += 1;
            self.at = 0;
        }
        let length = into.len().min(PIECE - self.at);
        into[..length].copy_from_slice(&self.piece[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(TRANSFER_TIMEOUT))
        .build();
    ureq::Agent::new_with_config(config)
}

/// Writes a file of so many mebibytes into a capsule; returns how long that took.
pub(crate) fn upload(world: &World, id: &str, path: &str, mib: u64) -> Duration {
    // The form around no contents, cut where they belong.
    let (_, frame) = form(path, b"");
    let end = frame.len() - b"\r\n--\r\n--".len() - boundary().len();
    let (head, tail) = frame.split_at(end);
    let mut body = Cursor::new(head.to_vec())
        .chain(Bytes::new(mib))
        .chain(Cursor::new(tail.to_vec()));
    let began = Instant::now();
    let url = format!("{}/v1/capsules/{id}/files/stream/write", world.url());
    let answer = agent()
        .post(&url)
        .header("X-API-Key", &world.key())
        .header("Content-Type", &form_type())
        .send(ureq::SendBody::from_reader(&mut body));
    let status = answer.expect("an answer").status().as_u16();
    assert_eq!(status, 204, "{}", world.log());
    began.elapsed()
}

fn boundary() -> String {
    let kind = form_type();
    let (_, boundary) = kind.split_once('=').expect("a boundary");
    boundary.to_owned()
}

/// Reads a file back that [`upload`] has written, and compares; returns how long that took.
pub(crate) fn download(world: &World, id: &str, path: &str, mib: u64) -> Duration {
    let began = Instant::now();
    let url = format!("{}/v1/capsules/{id}/files/stream/read", world.url());
    let answer = agent()
        .post(&url)
        .header("X-API-Key", &world.key())
        .header("Content-Type", "application/json")
        .send(json!({ "path": path }).to_string());
    let mut answer = answer.expect("an answer");
    assert_eq!(answer.status().as_u16(), 200);
    let mut got = answer.body_mut().as_reader();
    let mut wanted = Bytes::new(mib);
    let (mut ours, mut theirs) = (vec![0; PIECE], vec![0; PIECE]);
    for piece in 0..wanted.pieces {
        wanted.read_exact(&mut ours).expect("memory");
        got.read_exact(&mut theirs)
            .unwrap_or_else(|err| panic!("piece {piece}: {err}\n{}", world.log()));
        assert!(ours == theirs, "piece {piece} came back changed");
    }
    assert_eq!(got.read(&mut theirs).expect("an end"), 0, "more came back");
    began.elapsed()
}

/// A watch over the resident memory of processes.
pub(crate) struct MemoryWatch {
    stop: Arc<AtomicBool>,
    watch: Option<JoinHandle<Vec<u64>>>,
}

impl MemoryWatch {
    /// Watches from now on.
    pub(crate) fn of(pids: &[u32]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (pids, told) = (pids.to_vec(), Arc::clone(&stop));
        let watch = thread::spawn(move || {
            let before: Vec<u64> = pids.iter().map(|pid| resident_kib(*pid)).collect();
            assert!(!before.contains(&0), "no memory to watch: {before:?}");
            let mut most = before.clone();
            while !told.load(Ordering::Relaxed) {
                for (most, pid) in most.iter_mut().zip(&pids) {
                    *most = resident_kib(*pid).max(*most);
                }
                thread::sleep(LOOK_AGAIN);
            }
            let growth = most.iter().zip(&before);
            growth.map(|(most, before)| (most - before) / KIB).collect()
        });
        Self {
            stop,
            watch: Some(watch),
        }
    }

    /// By how many mebibytes each has grown at most.
    pub(crate) fn growth_mib(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let watch = mem::take(&mut self.watch).expect("a watch ends once");
        watch.join().expect("the watch goes on")
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let amount = line.and_then(|line| line.split_whitespace().next());
    amount.and_then(|it| it.parse().ok()).unwrap_or(0)
}
