//! A process that maps guest memory and does with it what it is told, in a VMM's place: this very
//! test program, started again.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::uffd::sys::SharedBytes;

use super::{PAGE, SOON, eventually};

/// The variable that makes the program such a process; it holds the socket's path.
pub const VARIABLE: &str = "WRENN_TEST_PAGED_BY";

/// Runs the process, if this is one. Every test program has a test that calls it.
pub fn be_one_if_asked() {
    let Some(path) = std::env::var_os(VARIABLE) else {
        return;
    };
    let memory = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .expect("memory");
    let bytes = nix::sys::stat::fstat(&memory).expect("fstat").st_size;
    let half = u64::try_from(bytes).expect("positive") / 2;
    // In two pieces: a VMM may map its guest's memory as it likes. The kernel puts the second below
    // the first, so that it cannot make one of them.
    let first = SharedBytes::map_part(&memory, 0, half).expect("mapped");
    let second = SharedBytes::map_part(&memory, half, half).expect("mapped");
    let shared = Arc::new([first, second]);
    let listener = UnixListener::bind(path).expect("listening");
    for stream in listener.incoming() {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || obey(&stream.expect("a caller"), &shared));
    }
}

fn obey(stream: &UnixStream, memory: &[SharedBytes; 2]) {
    let mut says = stream;
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<usize>().expect("a number");
        let answer = match words[0] {
            "hash" => hash(memory, number(1) * PAGE, number(2) * PAGE).to_string(),
            "write" => {
                let byte = u8::try_from(number(2)).expect("a byte");
                let (piece, at) = piece_of(memory, number(1) * PAGE);
                piece.write(at, &[byte; PAGE]);
                "done".to_owned()
            }
            "discard" => {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (from, length) = (number(1) * PAGE, number(2) * PAGE);
                let from = i64::try_from(from).expect("small");
                let length = i64::try_from(length).expect("small");
                fallocate(std::io::stdin(), flags, from, length).expect("punched");
                "done".to_owned()
            }
            "forget" => {
                forget_userfaultfds();
                "done".to_owned()
            }
            other => panic!("what is {other}?"),
        };
        if writeln!(says, "{answer}").is_err() {
            return;
        }
    }
}

/// Closes every userfaultfd that somebody has made in this process.
fn forget_userfaultfds() {
    for entry in std::fs::read_dir("/proc/self/fd").expect("listed") {
        let path = entry.expect("an entry").path();
        let link = std::fs::read_link(&path).unwrap_or_default();
        if link.as_os_str() == "anon_inode:[userfaultfd]" {
            let number = path.file_name().and_then(|name| name.to_str());
            let number: i32 = number.and_then(|it| it.parse().ok()).expect("a number");
            nix::unistd::close(number).expect("closed");
        }
    }
}

/// The piece that holds the byte at `offset` of the image, and where in it that is.
fn piece_of(memory: &[SharedBytes; 2], offset: usize) -> (&SharedBytes, usize) {
    let half = memory[0].bytes().len();
    (&memory[offset / half], offset % half)
}

fn hash(memory: &[SharedBytes; 2], from: usize, length: usize) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut part = vec![0; PAGE];
    for at in (from..from + length).step_by(PAGE) {
        let (piece, at) = piece_of(memory, at);
        piece.read(at, &mut part);
        hasher.update(&part);
    }
    hasher.finalize()
}

/// The process, seen from the test.
pub struct Vmm {
    child: Child,
    socket: PathBuf,
}

impl Vmm {
    /// Starts one on `memory`. The test named `vmm` of the calling program must call
    /// [`be_one_if_asked`].
    pub fn start(dir: &Path, memory: &GuestMemory) -> Self {
        let socket = dir.join("vmm.sock");
        let own = memory.as_fd().try_clone_to_owned().expect("a clone");
        let child = Command::new(std::env::current_exe().expect("known"))
            .args(["vmm", "--exact", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, &socket)
            .stdin(Stdio::from(own))
            .stdout(Stdio::null())
            .spawn()
            .expect("started");
        let vmm = Self { child, socket };
        // Its file is there a moment before it listens.
        let listens = || UnixStream::connect(&vmm.socket).is_ok();
        assert!(eventually(SOON, listens), "it listens");
        vmm
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// A line of its own to the process: what is said on one does not wait for another.
    pub fn line(&self) -> Line {
        let stream = UnixStream::connect(&self.socket).expect("it listens");
        stream.set_read_timeout(Some(SOON)).expect("set");
        Line {
            hears: BufReader::new(stream.try_clone().expect("a clone")),
            says: stream,
        }
    }

    /// BLAKE3 of `pages` pages from `from` on, read by the process.
    pub fn hash(&self, from: u64, pages: u64) -> String {
        self.line().ask(&format!("hash {from} {pages}"))
    }

    /// Has the process fill a page with `byte`.
    pub fn write(&self, page: u64, byte: u8) {
        self.line().ask(&format!("write {page} {byte}"));
    }

    /// Has the process close whatever serves its page faults.
    pub fn forget(&self) {
        self.line().ask("forget");
    }

    /// Has the process give pages back, as a balloon does.
    pub fn discard(&self, from: u64, pages: u64) {
        self.line().ask(&format!("discard {from} {pages}"));
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _gone = self.child.kill().and_then(|()| self.child.wait());
    }
}

pub struct Line {
    hears: BufReader<UnixStream>,
    says: UnixStream,
}

impl Line {
    pub fn say(&mut self, command: &str) {
        writeln!(self.says, "{command}").expect("somebody listens");
    }

    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        self.hears.read_line(&mut line).expect("an answer in time");
        line.trim_end().to_owned()
    }

    pub fn ask(&mut self, command: &str) -> String {
        self.say(command);
        self.answer()
    }

    /// True if no answer has come within `wait`.
    pub fn is_silent_for(&mut self, wait: std::time::Duration) -> bool {
        self.says.set_read_timeout(Some(wait)).expect("set");
        let silent = self.hears.fill_buf().is_err();
        self.says.set_read_timeout(Some(SOON)).expect("set");
        silent
    }
}
