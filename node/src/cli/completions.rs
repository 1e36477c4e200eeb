//! Shell completions.

use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::Shell;

use super::error::CliError;
use super::print;

/// Which shell.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// The shell, e.g. `wrenn completions bash > /etc/bash_completion.d/wrenn`.
    shell: Shell,
}

/// Prints the completions.
pub(super) fn run(options: &Options, mut grammar: Command) -> Result<ExitCode, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut grammar, "wrenn", &mut script);
    print::out(&script)?;
    Ok(ExitCode::SUCCESS)
}
