//! The guest that is measured: the one of the driver's tests, which needs no kernel and no disk.
//!
//! It is saved while it waits to be let go. Nearly all of its memory is then filled for it, with words
//! that do not compress and that no two pages share ([`fill`]): where KVM emulates each instruction,
//! it would take minutes itself. Resumed, it says so at once and goes round and round: checks and
//! rewrites some words of the next page, and says on the serial port how many were wrong.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use proto::units::Mib;

use super::PATIENCE;
use crate::Outcome;

/// Where the first page that it fills lies.
const FIRST_BYTES: u64 = 16 << 20;
/// A power of two, and as many pages as 2 GiB have.
const STRIDE: u64 = 1 << 19;
/// How many words of a page a round looks at.
const WORDS: u64 = 8;
/// Where it looks whether it may go; nobody else uses that double word.
const GO: u64 = 0x8c00;
/// What makes the words of its memory unlike each other, as in its source.
const MULTIPLIER: u32 = 0x9e37_79b1;
/// What it says when it has begun.
const UP: &str = "payload: up\n";
/// What each line of a round ends with.
const ALL_WELL: &str = " bad 00000000";
/// As much of what it says as is kept: some thousand rounds.
const KEPT_BYTES: usize = 256 << 10;
/// The program, and where it is loaded.
const SOURCE: [(&str, &str); 2] = [
    (
        "payload.s",
        include_str!("../../../../../node/tests/ch_world/payload.s"),
    ),
    (
        "payload.ld",
        include_str!("../../../../../node/tests/ch_world/payload.ld"),
    ),
];

/// How many pages it fills in a guest of `memory`.
pub(super) fn pages(memory: Mib) -> u64 {
    (memory.bytes() - FIRST_BYTES) / 4096
}

/// Assembles it in `dir`, for a guest of `memory` that rests for `ticks` of the processor's clock
/// between two rounds.
pub(super) fn assemble(dir: &Path, memory: Mib, ticks: u32) -> Outcome<PathBuf> {
    for (name, text) in SOURCE {
        fs::write(dir.join(name), text)?;
    }
    let (object, kernel) = (dir.join("payload.o"), dir.join("payload"));
    let symbols = [
        ("FIRST", FIRST_BYTES),
        ("PAGES", pages(memory)),
        ("STRIDE", STRIDE),
        ("WORDS", WORDS),
        ("GO", GO),
        ("PAUSE", ticks.into()),
        ("ROUNDS", 0),
        ("END", 0),
    ];
    let mut assembler = Command::new("as");
    for (symbol, value) in symbols {
        assembler.arg("--defsym").arg(format!("{symbol}={value}"));
    }
    assembler.arg("--64").arg("-o").arg(&object);
    succeed(assembler.arg(dir.join("payload.s")))?;
    let mut linker = Command::new("ld");
    linker.args(["-m", "elf_x86_64", "--no-warn-rwx-segments", "-T"]);
    linker.arg(dir.join("payload.ld")).arg("-o").arg(&kernel);
    succeed(linker.arg(&object))?;
    Ok(kernel)
}

/// Fills the memory in `image`, whose bytes lie where they do in the guest, and lets the guest go.
pub(super) fn fill(image: &File, memory: Mib) -> Outcome {
    /// Pages that are written at once.
    const AT_ONCE: u64 = 256;
    let pages = pages(memory);
    let mut first = 0;
    while first < pages {
        let count = AT_ONCE.min(pages - first);
        let words = u32::try_from(first * 1024)?..u32::try_from((first + count) * 1024)?;
        let bytes: Vec<u8> = words
            .flat_map(|word| word.wrapping_mul(MULTIPLIER).to_le_bytes())
            .collect();
        image.write_all_at(&bytes, FIRST_BYTES + first * 4096)?;
        first += count;
    }
    image.write_all_at(&1_u32.to_le_bytes(), GO)?;
    Ok(())
}

/// Runs a program to its good end.
fn succeed(command: &mut Command) -> Outcome {
    let ran = command
        .output()
        .map_err(|err| format!("{command:?}: {err}"))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    Err(format!("{command:?}: {}: {}", ran.status, said.trim()).into())
}

/// What a guest says, from a thread that reads it all: a guest whose console is full stands still.
pub(super) struct Console(Arc<(Mutex<Heard>, Condvar)>);

#[derive(Default)]
struct Heard {
    first: Option<Instant>,
    said: Vec<u8>,
    ended: bool,
}

impl Console {
    /// Listens from now on.
    pub(super) fn listen(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Heard::default()), Condvar::new()));
        let theirs = Arc::clone(&shared);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let count = stream.read(&mut bytes).unwrap_or(0);
                let now = Instant::now();
                let mut heard = lock(&theirs.0);
                heard.ended = count == 0;
                if count > 0 {
                    heard.first.get_or_insert(now);
                    let room = KEPT_BYTES - heard.said.len();
                    heard.said.extend_from_slice(&bytes[..count.min(room)]);
                }
                let ended = heard.ended;
                drop(heard);
                theirs.1.notify_all();
                if ended {
                    return;
                }
            }
        });
        Self(shared)
    }

    /// When its first byte came: the guest has run.
    pub(super) fn first(&self) -> Outcome<Instant> {
        let heard = self.wait(|heard| heard.first.is_some())?;
        heard.first.ok_or_else(|| "it said nothing".into())
    }

    /// Waits until it has begun, and waits itself.
    pub(super) fn await_up(&self) -> Outcome {
        let is_up = |heard: &Heard| String::from_utf8_lossy(&heard.said).contains(UP);
        self.wait(is_up).map(drop)
    }

    /// Waits for `lines` whole lines, of which none may tell of a wrong word.
    pub(super) fn await_sound(&self, lines: usize) -> Outcome {
        let whole = |heard: &Heard| heard.said.iter().filter(|it| **it == b'\n').count();
        let heard = self.wait(|heard| whole(heard) > lines || heard.said.len() == KEPT_BYTES)?;
        let text = String::from_utf8_lossy(&heard.said);
        // The first may be the end of one, the last the beginning.
        let mut told = text.lines().skip(1);
        let wrong = told.find(|line| line.contains(" bad 0000") && !line.contains(ALL_WELL));
        match wrong.filter(|line| line.len() >= "round 00000000 bad 00000000".len()) {
            None => Ok(()),
            Some(line) => Err(format!("the guest found wrong memory: {line}").into()),
        }
    }

    fn wait(&self, holds: impl Fn(&Heard) -> bool) -> Outcome<MutexGuard<'_, Heard>> {
        let (heard, told) = &*self.0;
        let waits = |heard: &mut Heard| !holds(heard) && !heard.ended;
        let waited = told.wait_timeout_while(lock(heard), PATIENCE, waits);
        let (heard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if holds(&heard) {
            return Ok(heard);
        }
        let said = String::from_utf8_lossy(&heard.said);
        let last = said.lines().last().unwrap_or_default().to_owned();
        Err(format!("the guest did not go on; its last words are {last:?}").into())
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until all that the payload filled is mapped in the process `pid`: none of it can be missed
/// any more. True of any way to bring it, since only pages of the guest are shared memory there.
pub(super) fn await_mapped(pid: u32, memory: Mib) -> Outcome<Instant> {
    /// Short beside the shortest that is measured, and long beside a look.
    const LOOK_AGAIN: Duration = Duration::from_millis(2);
    let wanted_kib = pages(memory) * 4;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = Instant::now();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|it| it.strip_prefix("RssShmem:"));
        let kib = line.and_then(|it| it.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let kib = kib.ok_or("the VMM has ended")?;
        if kib >= wanted_kib {
            return Ok(now);
        }
        if now > deadline {
            return Err(format!("{kib} of {wanted_kib} KiB are there").into());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn a_guest_is_sound_until_a_line_says_otherwise() {
        let good = "001 bad 00000000\nround 00000002 bad 00000000\nround 00000003 ba";
        let console = Console::listen(Cursor::new(good));
        console.await_sound(1).unwrap();
        let bad = "001 bad 00000000\nround 00000002 bad 00000007\nround 00000003 bad 00000000\n";
        let told = Console::listen(Cursor::new(bad)).await_sound(2);
        assert!(told.unwrap_err().to_string().contains("00000007"));
    }

    #[test]
    fn a_guest_that_ends_is_not_waited_for() {
        let console = Console::listen(Cursor::new("payload: up\n"));
        let told = console.await_sound(9).unwrap_err().to_string();
        assert!(told.contains("payload: up"), "{told}");
        assert!(Console::listen(Cursor::new("")).first().is_err());
    }
}
