//! The cluster's logic under faults, in virtual time, by seeds.
//!
//! `WRENN_SEEDS=n` plays n seeds instead of the few that fit a test run; `WRENN_SEED=x` replays
//! one. A failing seed is printed with what led to it.

use std::env;

use wrenn_cluster_tests::sim::{Bug, Setup, Violation, run};

/// Seeds of the plain run where the environment does not say.
const SEEDS: u64 = 30;
/// Seeds within which a planted bug must show.
const BUG_SEEDS: u64 = 200;

fn setup(seed: u64) -> Setup {
    Setup {
        seed,
        nodes: 3 + seed % 5,
        bug: None,
        faults_s: 60,
        rest_s: 90,
        max_learners: 32,
        // Two clocks differ by at most 0.8 %: within what the margin is made for.
        drift_ppm: 4000,
        grace_s: None,
        asks: true,
    }
}

/// Nodes whose guests begin without a word of the cluster. More happens to them, so that mistakes
/// show within few seeds which have nothing to do with that word.
fn unasking(seed: u64) -> Setup {
    Setup {
        asks: false,
        ..setup(seed)
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

/// Clocks far worse than any lease is made for, and no grace that would make up for them.
fn drifting(seed: u64) -> Setup {
    Setup {
        drift_ppm: 60_000,
        grace_s: Some(0),
        ..setup(seed)
    }
}

/// The first violation that a planted bug leads to.
fn finds(bug: Bug) -> Violation {
    finds_in(bug, setup)
}

fn finds_in(bug: Bug, setup: fn(u64) -> Setup) -> Violation {
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

#[test]
fn a_report_under_an_old_epoch_that_counts_is_found() {
    finds(Bug::StaleReportCounts);
}

#[test]
fn a_lease_that_counts_from_the_receipt_of_its_grant_is_found() {
    // It takes a grant that is under way for longer than the margin, and no grace to hide it.
    let unasking = |seed| Setup {
        asks: false,
        ..drifting(seed)
    };
    finds_in(Bug::LeaseCountedFromReceipt, unasking);
}

#[test]
fn a_lease_without_margins_is_found() {
    finds_in(Bug::NoMargins, drifting);
}

#[test]
fn the_margins_cover_clocks_that_are_six_percent_wrong() {
    for seed in 1..=10 {
        run(drifting(seed)).unwrap_or_else(|violation| panic!("{violation}"));
    }
}

#[test]
fn a_new_leader_that_does_not_wait_is_found() {
    finds_in(Bug::NewLeaderDoesNotWait, unasking);
}

#[test]
fn a_deposed_leader_that_grants_is_found() {
    finds(Bug::GrantsWithoutQuorum);
}

#[test]
fn a_missing_node_that_is_granted_its_lease_is_found() {
    finds(Bug::GrantsToTheMissing);
}

#[test]
fn a_grant_to_a_node_that_has_not_caught_up_is_found() {
    // It takes a host that is lost while a guest boots, and a log that is stuck as it comes back.
    let roomy = |seed| Setup {
        nodes: 7,
        grace_s: Some(0),
        ..setup(seed)
    };
    finds_in(Bug::GrantCountsBeforeCaughtUp, roomy);
}

#[test]
fn a_shim_that_ignores_the_lease_is_found() {
    finds(Bug::ShimIgnoresLease);
}

#[test]
fn a_restartable_guest_that_is_not_bound_is_found() {
    finds(Bug::RestartableRunsUnbound);
}

#[test]
fn an_only_voter_that_stays_unlimited_is_found() {
    finds(Bug::SoleVoterStaysUnlimited);
}

#[test]
fn a_placement_that_ignores_reservations_is_found() {
    finds(Bug::ReservationsIgnored);
}

#[test]
fn a_create_that_is_not_idempotent_is_found() {
    finds(Bug::CreateNotIdempotent);
}

#[test]
fn a_write_acknowledged_before_it_is_committed_is_found() {
    finds(Bug::AcknowledgedBeforeCommit);
}

#[test]
fn a_sealed_guest_that_goes_on_unasked_is_found() {
    finds(Bug::ThawsBeforeTheClusterKnows);
}

#[test]
fn a_snapshot_that_is_dropped_while_others_need_it_is_found() {
    finds_in(Bug::SnapshotGoesWithItsSandbox, unasking);
}

#[test]
fn a_fork_that_goes_on_as_what_it_comes_from_is_found() {
    finds(Bug::ForkKeepsItsOriginsName);
}

#[test]
fn a_fork_under_the_ownership_of_what_it_comes_from_is_found() {
    finds(Bug::ForkTakesItsOriginsEpoch);
}

#[test]
fn a_guest_that_begins_unasked_is_found() {
    finds(Bug::BeginsUnasked);
}

#[test]
fn what_was_let_begin_and_is_given_out_again_is_found() {
    finds(Bug::BegunIsGivenOut);
}

#[test]
fn a_leader_that_demotes_below_quorum_is_found() {
    finds(Bug::DemotesBelowQuorum);
}

#[test]
fn a_wiped_disk_that_votes_is_found() {
    finds(Bug::WipedDiskVotes);
}
