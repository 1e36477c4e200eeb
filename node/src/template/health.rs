//! When a template that is being built counts as ready: `[--interval=3s] [--timeout=10s]
//! [--start-period=0s] [--retries=0] COMMAND`.

use std::time::Duration;

use super::recipe::duration;

/// Longest of each period. Whoever needs more has a template that nobody wants to wait for.
const MAX_PERIOD: Duration = Duration::from_secs(3600);
/// Most retries.
const MAX_RETRIES: u32 = 1000;
/// Longest command.
const MAX_COMMAND_BYTES: usize = 4 << 10;

/// A command that says by its exit code whether everything runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// For the guest's shell.
    pub command: String,
    /// Pause between two tries.
    pub interval: Duration,
    /// Longest one try may take.
    pub timeout: Duration,
    /// What fails within this time does not count.
    pub start_period: Duration,
    /// Tries that may fail; 0 for as many as it takes.
    pub retries: u32,
}

/// Why a health check cannot be used.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HealthError {
    /// A flag that is not known, or is written in two words.
    #[error(
        "the health check does not know {0:?}; it knows --interval=, --timeout=, --start-period= and \
         --retries="
    )]
    Flag(String),
    /// The value of a flag is out of its range.
    #[error("{0:?} does not fit: periods go up to 1h, retries to {MAX_RETRIES}")]
    Value(String),
    /// Nothing follows the flags, or too much.
    #[error("the health check needs a command of at most {MAX_COMMAND_BYTES} bytes")]
    Command,
}

impl HealthCheck {
    /// Reads a health check.
    ///
    /// # Errors
    /// [`HealthError`] says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, HealthError> {
        let mut check = Self {
            command: String::new(),
            interval: Duration::from_secs(3),
            timeout: Duration::from_secs(10),
            start_period: Duration::ZERO,
            retries: 0,
        };
        let mut words = text.split_whitespace().peekable();
        while let Some(flag) = words.next_if(|word| word.starts_with("--")) {
            check.set(flag)?;
        }
        check.command = words.collect::<Vec<_>>().join(" ");
        let length = check.command.len();
        if length == 0 || length > MAX_COMMAND_BYTES || check.command.contains('\0') {
            return Err(HealthError::Command);
        }
        Ok(check)
    }

    fn set(&mut self, flag: &str) -> Result<(), HealthError> {
        let shown = || flag.chars().take(64).collect::<String>();
        let unknown = || HealthError::Flag(shown());
        let bad = || HealthError::Value(shown());
        let (name, value) = flag.split_once('=').ok_or_else(unknown)?;
        let period = |least: Duration| {
            let period = duration(value).filter(|it| (least..=MAX_PERIOD).contains(it));
            period.ok_or_else(bad)
        };
        let some = Duration::from_millis(1);
        match name {
            "--interval" => self.interval = period(some)?,
            "--timeout" => self.timeout = period(some)?,
            "--start-period" => self.start_period = period(Duration::ZERO)?,
            "--retries" => {
                let retries = value.parse().ok().filter(|it| *it <= MAX_RETRIES);
                self.retries = retries.ok_or_else(bad)?;
            }
            _ => return Err(unknown()),
        }
        Ok(())
    }

    /// How long it may take in all; `None` for as long as it takes.
    #[must_use]
    pub fn patience(&self) -> Option<Duration> {
        (self.retries > 0).then(|| self.start_period + self.interval * (self.retries + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_come_first_and_blanks_of_the_command_collapse() {
        let text = "--interval=5s --timeout=5s --start-period=1m --retries=5 curl   -f\tx --y";
        let check = HealthCheck::parse(text).expect("a check");
        assert_eq!(check.command, "curl -f x --y");
        assert_eq!(check.patience(), Some(Duration::from_secs(60 + 30)));
        let plain = HealthCheck::parse("true").expect("a check");
        assert_eq!((plain.patience(), plain.interval.as_secs()), (None, 3));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            "",
            "--interval=5s",
            "--interval 5s true",
            "--foo=1 true",
            "--retries=-1 true",
            "--timeout=0s true",
            "--interval=2h true",
        ] {
            assert!(HealthCheck::parse(bad).is_err(), "{bad:?}");
        }
    }
}
