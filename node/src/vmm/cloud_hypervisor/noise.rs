//! Keeps one line out of the log: the error that Cloud Hypervisor reports when we refuse a guest that
//! it has laid open. To it that is a migration that failed; to us it is how a saved guest goes on, and
//! an operator who read it after each pause would look for what is wrong.
//!
//! One line is dropped for each refusal of ours, and only of that kind: a migration that failed by
//! itself is told of as before.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::ChildStderr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// What stands in the line.
const FAILED: &[u8] = b"Migration failed: ";
/// The longest piece that is looked at as one line; a longer one is passed on in pieces.
const MAX_LINE_BYTES: u64 = 16 * 1024;
/// Stack of the thread that reads.
const STACK_BYTES: usize = 64 * 1024;

/// How many refusals of ours it has not complained about yet.
#[derive(Clone, Debug, Default)]
pub struct Refusals(Arc<AtomicUsize>);

impl Refusals {
    /// To be called before each.
    pub fn expect_one(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn take_one(&self) -> bool {
        let less = |count: usize| count.checked_sub(1);
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, less)
            .is_ok()
    }
}

/// What `stderr` says, without the complaints about refusals.
///
/// # Errors
/// The kernel has no pipe or no thread to give.
pub fn filter(stderr: ChildStderr, refusals: Refusals) -> io::Result<ChildStderr> {
    let (reader, writer) = io::pipe()?;
    thread::Builder::new()
        .name("complaints".to_owned())
        .stack_size(STACK_BYTES)
        // Whoever reads has gone, or the VMM has: either way there is nothing more to do.
        .spawn(move || drop(pass_on(stderr, writer, &refusals)))?;
    Ok(ChildStderr::from(OwnedFd::from(reader)))
}

fn pass_on(from: impl Read, mut to: impl Write, refusals: &Refusals) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = (&mut from)
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)?;
        if count == 0 {
            return Ok(());
        }
        let is_complaint = line.windows(FAILED.len()).any(|part| part == FAILED);
        if !(is_complaint && refusals.take_one()) {
            to.write_all(&line)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(said: &str, refusals: usize) -> String {
        let expected = Refusals::default();
        (0..refusals).for_each(|_| expected.expect_one());
        let mut heard = Vec::new();
        pass_on(said.as_bytes(), &mut heard, &expected).expect("passed on");
        String::from_utf8(heard).expect("text")
    }

    #[test]
    fn one_complaint_is_dropped_for_each_refusal_and_nothing_else_is() {
        let failed = "1.5s: ERROR:vmm/src/lib.rs:2035 -- Migration failed: refused\n";
        let said = format!("first\n{failed}{failed}last, without an end");
        assert_eq!(
            passed(&said, 1),
            format!("first\n{failed}last, without an end")
        );
        assert_eq!(passed(&said, 7), "first\nlast, without an end");
        assert_eq!(passed(&said, 0), said);
    }

    #[test]
    fn a_line_without_an_end_is_passed_on_all_the_same() {
        let long = "x".repeat(100_000);
        assert_eq!(passed(&long, 1), long);
    }
}
