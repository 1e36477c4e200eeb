//! An error and its causes in one line, for the edge where an error is told to people.

use std::error::Error;

/// Joins an error and its sources with colons.
#[must_use]
pub fn chain(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
