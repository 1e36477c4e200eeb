//! Every target takes its samples, every input that once broke it, and some thousand damaged ones.
//!
//! The seed is printed and is another one each time; `WRENN_FUZZ_SEED` sets it. How long a target is
//! tried is bounded, so that all of them take some seconds; `deploy/fuzz` tries longer.

use std::collections::BTreeSet;
use std::env;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::fuzzing::Target;
use wrenn_fuzz::{mutate, targets, trial};

/// How long one target is tried with damaged inputs.
const TIME_EACH: Duration = Duration::from_millis(150);
/// And how often at the most: those that take no time are through sooner.
const CASES_EACH: u64 = 5000;

fn seed() -> u64 {
    let given = env::var("WRENN_FUZZ_SEED").ok();
    given.map_or_else(from_clock, |text| text.parse().expect("a number"))
}

fn from_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.expect("past 1970").as_millis()).expect("before the year 500 million")
}

/// Tries one target until it breaks; tells how often it was tried with damaged bytes, or by what it
/// broke.
fn try_out(target: &Target, seed: u64) -> Result<u64, String> {
    let samples = (target.samples)();
    assert!(!samples.is_empty(), "{} has no sample", target.name);
    let take = |input: &[u8], what: &dyn Fn() -> String| {
        trial::run(target, input).map_err(|failure| format!("{failure} by {}", what()))
    };
    for (at, sample) in samples.iter().enumerate() {
        take(sample, &|| format!("sample {at}"))?;
    }
    for (name, input) in targets::kept(target) {
        take(&input, &|| format!("corpus/{}/{name}", target.name))?;
    }
    let until = Instant::now() + TIME_EACH;
    let mut number = 0;
    while number < CASES_EACH && Instant::now() < until {
        let input = mutate::input(&samples, seed, number);
        let what = || format!("deploy/fuzz {} --seed {seed} --case {number}", target.name);
        take(&input, &what)?;
        number += 1;
    }
    Ok(number)
}

/// One test for all: memory is counted for the whole process, so no two may run at once.
#[test]
fn no_parser_breaks_on_sound_kept_or_damaged_bytes() {
    let seed = seed();
    println!("seed {seed} (repeat with WRENN_FUZZ_SEED={seed})");
    let mut broken = Vec::new();
    for target in targets::all() {
        match try_out(&target, seed) {
            Ok(cases) => println!("{:24} {cases} cases", target.name),
            Err(why) => broken.push(format!("{}: {why}", target.name)),
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn every_target_has_a_name_of_its_own() {
    let all = targets::all();
    let names: BTreeSet<_> = all.iter().map(|target| target.name).collect();
    assert_eq!(names.len(), all.len());
}

/// A file kept for a target that was renamed or removed would never be tried again.
#[test]
fn every_kept_input_belongs_to_a_target() {
    let corpus = targets::corpus_of(&targets::all()[0]);
    let corpus = corpus.parent().expect("it has one");
    let Ok(listed) = std::fs::read_dir(corpus) else {
        return;
    };
    for entry in listed {
        let name = entry.expect("the checkout can be read").file_name();
        let name = name.to_string_lossy();
        assert!(targets::named(&name).is_some(), "no target {name}");
    }
}
