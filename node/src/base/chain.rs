//! An error and its causes in one line, for the edge where an error is told to people.

use std::error::Error;

/// Joins an error and its sources with colons. A layer that repeats its source is told once.
#[must_use]
pub fn chain(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(source) = next {
        let phrase = source.to_string();
        if !text.ends_with(&phrase) {
            text.push_str(": ");
            text.push_str(&phrase);
        }
        next = source.source();
    }
    text
}
