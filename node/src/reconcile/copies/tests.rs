//! What begins beside what, on a clock moved by hand.

use super::wanted::AT_ONCE;
use super::*;

/// A snapshot that is to be copied here, and who has it.
fn wanted(n: u8, giver: u64) -> Wanted {
    Wanted {
        id: SnapshotId([n; 16]),
        digest: SnapshotDigest([n; 32]),
        givers: vec![NodeId(giver)],
    }
}

/// Everything that begins now.
fn begin(agenda: &mut Agenda, wanted: &[Wanted], now: Instant) -> Vec<Work> {
    agenda.learn(wanted.iter().map(|it| it.id).collect(), now);
    std::iter::from_fn(|| agenda.next(wanted, now)).collect()
}

fn copies(works: &[Work]) -> Vec<SnapshotId> {
    let ids = works.iter().filter_map(|work| match work {
        Work::Copy(id, _) => Some(*id),
        Work::Look | Work::PutRight(_) | Work::Collect => None,
    });
    ids.collect()
}

#[test]
fn no_snapshot_is_copied_twice_at_once_and_a_failed_one_waits() {
    let all = [wanted(1, 1), wanted(2, 1), wanted(3, 1)];
    let (mut agenda, now) = (Agenda::new(Instant::now()), Instant::now());
    let first = copies(&begin(&mut agenda, &all, now));
    assert_eq!(first.len(), AT_ONCE / 2, "all one holder gives at once");
    assert_eq!(copies(&begin(&mut agenda, &all, now)), []);
    agenda.note(Done::Copied(first[0], false), now);
    let next = copies(&begin(&mut agenda, &all, now));
    assert_eq!(next.len(), 1);
    assert!(!first.contains(&next[0]), "another has its turn");
    assert_eq!(agenda.due(), Some(now + AGAIN));
    agenda.note(Done::Copied(next[0], true), now);
    let again = copies(&begin(&mut agenda, &all, now + AGAIN));
    assert_eq!(again, [first[0]]);
}

#[test]
fn copies_of_two_holders_share_the_room_there_is() {
    let all: Vec<_> = (1..=9)
        .map(|n| wanted(n, if n < 6 { 1 } else { 3 }))
        .collect();
    let (mut agenda, now) = (Agenda::new(Instant::now()), Instant::now());
    let begun = copies(&begin(&mut agenda, &all, now));
    let of_first = |id: &&SnapshotId| id.0[0] < 6;
    assert_eq!(begun.len(), AT_ONCE);
    assert_eq!(begun.iter().filter(of_first).count(), AT_ONCE / 2);
}

#[test]
fn a_collection_begins_beside_copies_that_do_not_end() {
    let all = [wanted(1, 1)];
    let (mut agenda, now) = (Agenda::new(Instant::now()), Instant::now());
    assert!(begin(&mut agenda, &all, now).contains(&Work::Look));
    agenda.note(Done::Looked(Some(Vec::new())), now);
    let due = agenda.due().expect("what an earlier daemon left");
    assert_eq!(begin(&mut agenda, &all, due), [Work::Collect]);
    // One at a time, and what is under way is not waited for by the clock.
    assert_eq!(
        (agenda.due(), begin(&mut agenda, &all, due)),
        (None, vec![])
    );
    agenda.note(Done::Collected(false), due);
    assert_eq!(agenda.due(), Some(due + COLLECT_AFTER));
}

#[test]
fn records_that_go_all_the_time_do_not_put_the_collection_off_for_ever() {
    let began = Instant::now();
    let mut agenda = Agenda::new(began);
    let step = COLLECT_AFTER / 2;
    let collected = (0_u32..100).find(|n| {
        let only = u8::try_from(*n).expect("few");
        begin(&mut agenda, &[wanted(only, 1)], began + step * *n).contains(&Work::Collect)
    });
    let after = step * collected.expect("it was collected");
    assert!(after <= COLLECT_WITHIN + COLLECT_AFTER, "{after:?}");
}

#[test]
fn what_is_wrong_is_put_right_one_by_one_and_not_copied_meanwhile() {
    let all = [wanted(1, 1), wanted(2, 1)];
    let wrong = |n: u8| Wrong {
        id: SnapshotId([n; 16]),
        digest: SnapshotDigest([n; 32]),
        holding: Holding::Whole,
    };
    let now = Instant::now();
    let mut agenda = Agenda::new(now);
    agenda.audit_at = None;
    agenda.looking = true;
    agenda.note(Done::Looked(Some(vec![wrong(1), wrong(2)])), now);
    assert_eq!(begin(&mut agenda, &all, now), [Work::PutRight(wrong(1))]);
    agenda.note(Done::PutRight(false), now);
    let next = begin(&mut agenda, &all, now);
    assert_eq!(next[0], Work::PutRight(wrong(2)));
    assert_eq!(copies(&next), [wrong(1).id]);
    agenda.note(Done::PutRight(true), now);
    assert_eq!(agenda.due(), Some(now + AGAIN).min(agenda.collect_at));
    assert!(begin(&mut agenda, &all, now + AGAIN).contains(&Work::Look));
}

#[test]
fn what_is_being_copied_is_left_to_its_copy_and_looked_at_again() {
    let all = [wanted(1, 1)];
    let now = Instant::now();
    let mut agenda = Agenda::new(now);
    assert_eq!(copies(&begin(&mut agenda, &all, now)).len(), 1);
    let wrong = Wrong {
        id: SnapshotId([1; 16]),
        digest: SnapshotDigest([0; 32]),
        holding: Holding::Whole,
    };
    agenda.note(Done::Looked(Some(vec![wrong])), now);
    assert_eq!(begin(&mut agenda, &all, now), []);
    assert_eq!(begin(&mut agenda, &all, now + AGAIN), [Work::Look]);
}
