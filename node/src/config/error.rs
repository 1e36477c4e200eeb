//! Why a configuration cannot be used.

use std::io;
use std::path::PathBuf;

use crate::base::remedy::Remedy;

/// Why a configuration cannot be used.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file that holds the join token cannot be read.
    #[error("read the join token in {}", path.display())]
    Token {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is no configuration: bad syntax, an unknown key, a value of another kind.
    #[error("understand the configuration {}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense by itself.
    #[error("{setting} = {value:?}: {why}")]
    Value {
        /// Its name.
        setting: &'static str,
        /// As given.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two values contradict each other.
    #[error("{} = {} and {} = {}: {why}", first.0, first.1, second.0, second.1)]
    Relation {
        /// Name and value.
        first: (&'static str, String),
        /// Name and value.
        second: (&'static str, String),
        /// What must hold.
        why: &'static str,
    },
    /// The machine does not tell what a default is derived from.
    #[error("find out {what}")]
    Machine {
        /// What is wanted.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

impl ConfigError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Parse { .. } | Self::Value { .. } | Self::Relation { .. } => Remedy::FixRequest,
            Self::Read { .. } | Self::Token { .. } | Self::Machine { .. } => Remedy::CallOperator,
        }
    }
}
