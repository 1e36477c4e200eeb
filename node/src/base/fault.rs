//! Named places where a test may end the process at once.
//!
//! `WRENN_FAULT_ABORT=<place>` makes [`point`] abort when it is reached, as a crash or a power
//! cut would. Without the variable, which is read once, a point costs one load.

use std::sync::OnceLock;

/// The variable that names the place.
pub const ABORT_VARIABLE: &str = "WRENN_FAULT_ABORT";

/// Ends the process here if the environment asks for it.
pub fn point(place: &str) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var(ABORT_VARIABLE).ok());
    if chosen.as_deref() == Some(place) {
        // Straight to the process: a crash does not go through a log line's buffers.
        std::process::abort();
    }
}
