//! The cluster's logic under faults, in virtual time, by seeds.
//!
//! `WRENN_SEEDS=n` plays n seeds instead of the few that fit a test run; `WRENN_SEED=x` replays
//! one. A failing seed is printed with what led to it.

use std::env;

use wrenn_cluster_tests::sim::{Bug, Setup, Violation, run};

/// Seeds of the plain run where the environment does not say.
const SEEDS: u64 = 30;
/// Seeds within which a planted bug must show.
const BUG_SEEDS: u64 = 60;

fn setup(seed: u64) -> Setup {
    Setup {
        seed,
        nodes: 3 + seed % 5,
        bug: None,
        faults_s: 60,
        rest_s: 90,
        max_learners: 32,
    }
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

#[test]
fn every_seed_keeps_every_promise_and_comes_to_rest() {
    let seeds = match number("WRENN_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..1 + number("WRENN_SEEDS").unwrap_or(SEEDS),
    };
    println!("seeds {seeds:?}");
    for seed in seeds {
        match run(setup(seed)) {
            Ok(summary) => println!("seed {seed}: {summary:?}"),
            Err(violation) => panic!("{violation}"),
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    let first = run(setup(1)).map_err(|violation| violation.to_string());
    let second = run(setup(1)).map_err(|violation| violation.to_string());
    assert_eq!(first, second);
}

#[test]
fn a_thousand_nodes_grow_to_exactly_their_caps() {
    let thousand = Setup {
        nodes: 1000,
        faults_s: 0,
        rest_s: 60,
        ..setup(1)
    };
    let summary = run(thousand).unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!(summary.members, (5, 32, 963));
}

/// The first violation that a planted bug leads to.
fn finds(bug: Bug) -> Violation {
    let found = (1..=BUG_SEEDS).find_map(|seed| {
        let planted = Setup {
            bug: Some(bug),
            ..setup(seed)
        };
        run(planted).err()
    });
    let violation = found.unwrap_or_else(|| panic!("{bug:?} was not found in {BUG_SEEDS} seeds"));
    println!("{bug:?}: seed {}: {}", violation.seed, violation.what);
    violation
}
