//! What a test may do to the process by its environment: end it at a named place, or cut a long wait.
//!
//! `WRENN_FAULT_ABORT=<place>` makes [`point`] abort when it is reached, as a crash or a power
//! cut would. `WRENN_FAULT_SHORTEN=<wait>=<milliseconds>` makes one wait as short as that. Without
//! the variables, which are read once, either costs one load.

use std::sync::OnceLock;
use std::time::Duration;

/// The variable that names the place.
pub const ABORT_VARIABLE: &str = "WRENN_FAULT_ABORT";
/// The variable that names a wait, and how long it is instead.
pub const SHORTEN_VARIABLE: &str = "WRENN_FAULT_SHORTEN";

/// Ends the process here if the environment asks for it.
pub fn point(place: &str) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var(ABORT_VARIABLE).ok());
    if chosen.as_deref() == Some(place) {
        // Straight to the process: a crash does not go through a log line's buffers.
        std::process::abort();
    }
}

/// How long the wait of that name is: `real`, or less where the environment asks for it.
#[must_use]
pub fn shortened(wait: &str, real: Duration) -> Duration {
    static CHOSEN: OnceLock<Option<(String, Duration)>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| parse(&std::env::var(SHORTEN_VARIABLE).ok()?));
    match chosen {
        Some((name, short)) if name == wait => real.min(*short),
        _ => real,
    }
}

/// `<wait>=<milliseconds>`.
fn parse(text: &str) -> Option<(String, Duration)> {
    let (name, millis) = text.split_once('=')?;
    let short = Duration::from_millis(millis.parse().ok()?);
    Some((name.to_owned(), short))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_named_with_its_milliseconds_and_anything_else_is_nothing() {
        let short = Duration::from_millis(1500);
        assert_eq!(
            parse("holder-away=1500"),
            Some(("holder-away".into(), short))
        );
        assert_eq!(parse("holder-away"), None);
        assert_eq!(parse("holder-away=soon"), None);
    }
}
