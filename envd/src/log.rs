//! One line per event, to standard error: the guest's console when this is process 1.
//!
//! The agent is quiet while all is well. A line is written where something is handled, never where
//! it is merely passed on.

/// Writes one line, prefixed so that it can be found among the kernel's.
#[macro_export]
macro_rules! log {
    ($($word:tt)*) => {{
        use std::io::Write as _;
        // A console that cannot be written to must not stop the agent.
        let _ = writeln!(std::io::stderr(), "envd: {}", format_args!($($word)*));
    }};
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
