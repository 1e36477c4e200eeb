//! One input given to one target, and what is wrong with how it was taken.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use proto::fuzzing::Target;

/// The allocator of every program that runs targets: it knows how much was in use at the most.
///
/// It counts for the whole process, so only one target runs at a time.
#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What a target may use whatever its input: buffers of fixed size, a decoder's window, the test
/// harness beside it.
const BASE_BYTES: usize = 8 << 20;
/// What it may use for each byte of input: a parsed value is larger than its text, the most in a
/// list of empty messages, where two bytes become a row.
const BYTES_PER_BYTE: usize = 1024;
/// What it may take, on a machine that has other things to do. All take less than a hundredth.
const MOST_TIME: Duration = Duration::from_secs(20);

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It panicked; the panic's own words went to standard error.
    Panicked,
    /// It used more memory than the input's length explains.
    Memory {
        /// Bytes in use at the most, beyond those before.
        used: usize,
    },
    /// It took too long.
    Time {
        /// How long.
        took: Duration,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked => write!(f, "it panicked"),
            Self::Memory { used } => write!(f, "it used {used} bytes of memory"),
            Self::Time { took } => write!(f, "it took {took:?}"),
        }
    }
}

/// Gives `input` to `target`.
///
/// # Errors
/// [`Failure`], where it was not taken as bytes from strangers must be.
pub fn run(target: &Target, input: &[u8]) -> Result<(), Failure> {
    let began = Instant::now();
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let ended = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let used = MEMORY.peak_usage().saturating_sub(before);
    let took = began.elapsed();
    if ended.is_err() {
        return Err(Failure::Panicked);
    }
    if used > BASE_BYTES + input.len() * BYTES_PER_BYTE {
        return Err(Failure::Memory { used });
    }
    if took > MOST_TIME {
        return Err(Failure::Time { took });
    }
    Ok(())
}
