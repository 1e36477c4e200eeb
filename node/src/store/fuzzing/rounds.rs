//! What is written down about the search for damage, as a fuzz target.

use proto::units::Stamp;

use super::super::rounds::{Round, Rounds, Slice};
use super::Sealed;

/// A round among the manifests, one in the middle of the only pack, and one that is over.
pub(super) fn samples() -> Vec<Vec<u8>> {
    let sealed = Sealed::new();
    let mut round = Round::begun(Stamp(1_700_000_000_000));
    let mut rounds = Rounds::default();
    let mut samples = Vec::new();
    for slices in [1, 6] {
        for _ in 0..slices {
            let slice = sealed.store.scrub(&mut round, 1);
            slice.expect("the disk is well");
        }
        rounds.under_way = Some(round);
        samples.push(encode(&rounds));
    }
    rounds.end(Stamp(1_700_000_600_000));
    samples.push(encode(&rounds));
    samples
}

fn encode(rounds: &Rounds) -> Vec<u8> {
    rounds.encode().expect("plain numbers")
}

/// A round goes on from wherever its file says to its end, and takes nothing sound for damaged.
pub(super) fn run(bytes: &[u8]) {
    let Some(mut rounds) = Rounds::decode(bytes) else {
        return;
    };
    assert_eq!(Rounds::decode(&encode(&rounds)), Some(rounds));
    let Some(mut round) = rounds.under_way else {
        return;
    };
    let sealed = Sealed::new();
    sealed.store.keep_rounds(&rounds).expect("there is room");
    assert_eq!(sealed.store.rounds(), rounds);
    // The manifests, the pack, and the end.
    let over = (0..3).any(|_| {
        let slice = sealed.store.scrub(&mut round, u64::MAX);
        slice.expect("the disk is well") == Slice::Over
    });
    assert!(over, "it does not end");
    for (id, bytes) in &sealed.chunks {
        let read = sealed.store.get(id);
        assert_eq!(read.as_ref().ok(), Some(bytes), "{id} was given up");
    }
    rounds.under_way = Some(round);
    rounds.end(Stamp(2_000_000_000_000));
    assert_eq!(Rounds::decode(&encode(&rounds)), Some(rounds));
}
