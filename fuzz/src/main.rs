//! `fuzz`: runs targets for as long as one likes. `deploy/fuzz` builds and starts it.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use proto::fuzzing::Target;
use wrenn_fuzz::{mutate, targets, trial};

/// Tries parsers of bytes from disks and peers with damaged ones.
#[derive(Debug, Parser)]
struct Arguments {
    /// The target, or `all`.
    #[arg(required_unless_present = "list")]
    target: Option<String>,
    /// How long each is tried.
    #[arg(default_value_t = 60)]
    seconds: u64,
    /// Shows the targets.
    #[arg(long)]
    list: bool,
    /// The seed; the clock's where none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Runs one case of that seed and nothing else.
    #[arg(long, requires = "seed")]
    case: Option<u64>,
    /// Runs the bytes of this file and nothing else.
    #[arg(long, conflicts_with = "case")]
    input: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for target in targets::all() {
            println!("{}", target.name);
        }
        return ExitCode::SUCCESS;
    }
    let name = arguments.target.as_deref().unwrap_or_default();
    let chosen = match name {
        "all" => targets::all(),
        name => targets::named(name).into_iter().collect(),
    };
    if chosen.is_empty() {
        eprintln!("error: there is no target {name}\n  hint: deploy/fuzz --list");
        return ExitCode::from(2);
    }
    let sound = chosen.iter().filter(|target| try_one(target, &arguments));
    if sound.count() == chosen.len() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs one target as it was asked for; tells whether nothing was found.
fn try_one(target: &Target, arguments: &Arguments) -> bool {
    let seed = arguments.seed.unwrap_or_else(from_clock);
    if let Some(path) = &arguments.input {
        let read = fs::read(path);
        let bytes = read.unwrap_or_else(|err| panic!("read {}: {err}", path.display()));
        return judge(target, &bytes, "this input");
    }
    let samples = (target.samples)();
    if let Some(case) = arguments.case {
        let input = mutate::input(&samples, seed, case);
        return judge(target, &input, &format!("seed {seed} case {case}"));
    }
    let until = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut number = 0;
    while Instant::now() < until {
        let input = mutate::input(&samples, seed, number);
        if !judge(target, &input, &format!("seed {seed} case {number}")) {
            return false;
        }
        number += 1;
    }
    println!(
        "{}: {number} cases under seed {seed}, nothing found",
        target.name
    );
    true
}

/// Runs one input; one that breaks the target is kept in a file.
fn judge(target: &Target, input: &[u8], what: &str) -> bool {
    let Err(failure) = trial::run(target, input) else {
        return true;
    };
    let path = PathBuf::from(format!("fuzz-{}.bin", target.name));
    let kept = match fs::write(&path, input) {
        Ok(()) => format!("kept as {}", path.display()),
        Err(err) => format!("not kept: {err}"),
    };
    println!(
        "{}: {failure}, by {what} ({} bytes, {kept})\n  \
         once it is mended, put it into {} under a name that says what it is",
        target.name,
        input.len(),
        targets::corpus_of(target).display()
    );
    false
}

fn from_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}
