//! How an ended process is described on the wire. Pure.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Exit code reported for a process that a signal killed.
const KILLED_EXIT_CODE: i32 = -1;

/// The end of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, −1 after a signal.
    pub code: i32,
    /// Whether it exited by itself.
    pub exited: bool,
    /// The end in words.
    pub status: String,
    /// The same words when the end was not a success.
    pub error: Option<String>,
    /// Whether the caller's deadline was what ended it.
    pub by_deadline: bool,
}

impl Exit {
    /// Describes `status`.
    #[must_use]
    pub fn new(status: ExitStatus, by_deadline: bool) -> Self {
        let words = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => {
                let dumped = if status.core_dumped() {
                    " (core dumped)"
                } else {
                    ""
                };
                format!("signal: {}{dumped}", signal_words(signal))
            }
            (None, None) => "unknown".to_owned(),
        };
        Self {
            code: status.code().unwrap_or(KILLED_EXIT_CODE),
            exited: status.code().is_some(),
            error: (!status.success()).then(|| words.clone()),
            status: words,
            by_deadline,
        }
    }
}

/// A signal in the words that existing clients print.
fn signal_words(signal: i32) -> String {
    let words = match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        libc::SIGXCPU => "CPU time limit exceeded",
        libc::SIGXFSZ => "file size limit exceeded",
        libc::SIGSYS => "bad system call",
        other => return format!("signal {other}"),
    };
    words.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wait statuses as the kernel encodes them: exit code in the second byte, signal in the first.
    fn exit(raw: i32) -> Exit {
        Exit::new(ExitStatus::from_raw(raw), false)
    }

    #[test]
    fn success_has_no_error() {
        let success = exit(0);
        assert_eq!((success.code, success.exited), (0, true));
        assert_eq!(
            (success.status.as_str(), success.error),
            ("exit status 0", None)
        );
    }

    #[test]
    fn failure_repeats_the_status_as_error() {
        let failure = exit(3 << 8);
        assert_eq!((failure.code, failure.exited), (3, true));
        assert_eq!(failure.error.as_deref(), Some("exit status 3"));
    }

    #[test]
    fn signal_gives_minus_one_and_its_name() {
        let killed = exit(libc::SIGKILL);
        assert_eq!((killed.code, killed.exited), (-1, false));
        assert_eq!(killed.error.as_deref(), Some("signal: killed"));
        assert_eq!(
            exit(libc::SIGABRT | 0x80).status,
            "signal: aborted (core dumped)"
        );
        assert_eq!(exit(40).status, "signal: signal 40");
    }
}
