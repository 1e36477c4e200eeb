//! What a person at a terminal is told when something fails: one line, and what to do.

use std::error::Error;

use crate::config::ConfigError;

/// Exit code of a command that failed.
const FAILED: u8 = 1;
/// Exit code of wrong usage, as of the argument parser.
const USAGE: u8 = 2;

/// A failure with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CliError {
    /// What failed.
    pub(super) message: String,
    /// What to do.
    pub(super) hint: Option<String>,
    /// The process's exit code.
    pub(super) exit: u8,
    /// The detail of an answer of the API, for callers that act on it.
    pub(super) detail: Option<String>,
    /// The status of an answer of the API, where it was one.
    pub(super) status: Option<u16>,
}

impl CliError {
    /// A failure.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            exit: FAILED,
            detail: None,
            status: None,
        }
    }

    /// Whether the API said that it will not do this, however often it is asked.
    pub(super) fn is_refusal(&self) -> bool {
        self.status
            .is_some_and(|status| (400..500).contains(&status))
    }

    /// Arguments that make no sense.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self {
            exit: USAGE,
            ..Self::new(message)
        }
    }

    /// `doing` failed because of `err`, told with its causes.
    pub(super) fn from_error(doing: &str, err: &dyn Error) -> Self {
        Self::new(format!("{doing}: {}", chain(err)))
    }

    /// The same with advice.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<ConfigError> for CliError {
    fn from(err: ConfigError) -> Self {
        let hint = "settings come from flags, WRENN_* variables and --config, in that order";
        Self::new(chain(&err)).hint(hint)
    }
}

/// An error and its causes in one line.
pub(super) fn chain(err: &dyn Error) -> String {
    let mut text = one_line(&err.to_string());
    let mut cause = err.source();
    while let Some(err) = cause {
        let phrase = one_line(&err.to_string());
        // Some layers repeat their source.
        if !text.ends_with(&phrase) {
            text.push_str(": ");
            text.push_str(&phrase);
        }
        cause = err.source();
    }
    text
}

/// The first and last line of a text: where, and why, without the drawing between them.
fn one_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    match lines.next_back() {
        Some(last) => format!("{first}: {last}"),
        None => first.to_owned(),
    }
}
