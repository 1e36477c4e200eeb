//! Who asked for what: which changes are recorded, for whom, and for how long.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proto::ids::{KeyId, TeamId, UserId};
use proto::units::Stamp;
use wrenn_raft::command::{Attributed, Command, Proposal, Receipt, Refusal, StopCause, Verdict};
use wrenn_raft::state::{
    Action, Actor, AuditRecord, Key, Member, Role, Row, RowKey, Scope, State, TEAM_RECORDS, Team,
};

use crate::world::history::{any_history, busy_world};
use crate::world::*;

const ACME: TeamId = TeamId([7; 16]);

fn ann() -> Actor {
    Actor::Key {
        id: KeyId([3; 16]),
        name: "ann's laptop".into(),
        holder: Some(UserId([4; 16])),
        address: "10.1.2.3".into(),
    }
}

fn by_ann(change: Command) -> Command {
    Command::By(Attributed {
        actor: ann(),
        change: Box::new(change),
    })
}

fn team(name: &str) -> Team {
    Team {
        id: ACME,
        name: name.into(),
        slug: "012345-6789ab".into(),
        ..Team::default()
    }
}

fn key(n: u8, team: TeamId) -> Key {
    Key {
        id: KeyId([n; 16]),
        team,
        hash: [n; 32],
        name: format!("key {n}"),
        ..Key::default()
    }
}

fn actions(state: &State, team: TeamId) -> Vec<(Action, String)> {
    let all = state.audit_of(team);
    all.map(|it| (it.action, it.object.clone())).collect()
}

fn last(state: &State, team: TeamId) -> AuditRecord {
    state.audit_of(team).next_back().expect("a record").clone()
}

#[test]
fn a_link_is_recorded_once_however_often_it_is_proposed_and_changes_nothing_else() {
    let (mut world, ..) = World::of_three();
    world.create(1, waiting(512)).expect("room");
    let id = sandbox_id(1);
    let link = |port, until| Command::LinkSandbox {
        id,
        port,
        until: Stamp(until),
    };
    let before = world.state.clone();
    for asked in [link(80, 7), link(80, 7), link(81, 7), link(80, 8)] {
        assert_eq!(world.act(by_ann(asked)), Ok(Receipt::Done(1)));
    }
    let team = world.state.sandbox(id).expect("known").team;
    let links = |it: &&AuditRecord| it.action == Action::CapsuleLink;
    let records: Vec<&AuditRecord> = world.state.audit_of(team).filter(links).collect();
    assert_eq!(records.len(), 3);
    assert_eq!(records[0].actor, ann());
    assert_eq!(records[0].object, id.to_string());
    assert_eq!(records[0].metadata["port"], "80");
    assert_eq!(records[0].metadata["expires_at_unix_ms"], "7");
    assert_eq!(world.state.sandbox(id), before.sandbox(id));
    let nowhere = Command::LinkSandbox {
        id: sandbox_id(9),
        port: 80,
        until: Stamp(7),
    };
    let refused = world.act(by_ann(nowhere));
    assert!(matches!(refused, Err(Refusal::NoSuchSandbox(_))));
}

#[test]
fn a_change_that_names_who_asked_is_recorded_by_its_own_entry() {
    let mut world = World::founded();
    assert!(!world.state.keeps_audit());
    let made = world.act(by_ann(Command::PutTeam(team("Acme"))));
    assert_eq!(made, Ok(Receipt::Done(1)));
    let record = last(&world.state, TeamId::default());
    assert_eq!((record.entry, record.at), (world.index, world.now));
    assert_eq!((record.action, &record.actor), (Action::TeamCreate, &ann()));
    assert_eq!(record.object, ACME.to_string());
    assert_eq!(
        (record.object_name.as_str(), &record.error),
        ("Acme", &None)
    );
    assert_eq!(record.id().to_string().len(), 29);
}

#[test]
fn a_change_that_comes_again_is_recorded_once_and_a_refused_one_with_why() {
    let mut world = World::founded();
    world
        .act(by_ann(Command::PutTeam(team("Acme"))))
        .expect("made");
    world
        .act(by_ann(Command::PutTeam(team("Acme"))))
        .expect("known");
    world
        .act(by_ann(Command::PutTeam(team("Emca"))))
        .expect("renamed");
    let gone = Command::DropMember {
        team: ACME,
        user: UserId([9; 16]),
    };
    // About nobody there is: there is nothing to record.
    assert!(world.act(by_ann(gone)).is_err());
    let taken = key(5, ACME);
    world
        .act(by_ann(Command::PutKey(taken.clone())))
        .expect("made");
    let other = Key {
        hash: [6; 32],
        ..taken
    };
    assert!(matches!(
        world.act(by_ann(Command::PutKey(other))),
        Err(Refusal::IdTaken(_))
    ));
    let platform = actions(&world.state, TeamId::default());
    let platform: Vec<_> = platform.into_iter().map(|(action, _)| action).collect();
    assert_eq!(platform, [Action::TeamCreate, Action::TeamUpdate]);
    let theirs: Vec<_> = world.state.audit_of(ACME).collect();
    assert_eq!(theirs.len(), 2);
    assert_eq!(theirs[0].error, None);
    assert!(
        theirs[1]
            .error
            .as_ref()
            .is_some_and(|why| why.contains("taken"))
    );
}

#[test]
fn what_rules_do_is_recorded_under_the_system_once_there_is_a_log() {
    let mut world = World::founded();
    world.create(1, waiting(512)).expect("placed");
    let idle = |n| Command::StopSandbox {
        id: sandbox_id(n),
        cause: StopCause::Idle,
    };
    world.act(idle(1)).expect("stopped");
    assert!(!world.state.keeps_audit(), "nobody was named yet");
    world
        .act(by_ann(Command::PutTeam(team("Acme"))))
        .expect("made");
    world.create(2, waiting(512)).expect("placed");
    world.act(idle(2)).expect("stopped");
    let record = last(&world.state, TEAM);
    assert_eq!(
        (record.action, record.actor),
        (Action::CapsuleDestroy, Actor::System)
    );
    assert_eq!(record.metadata["reason"], "ttl_expired");
    let second = world.join(2);
    world.judge(second, Verdict::Missing).expect("judged");
    assert_eq!(
        last(&world.state, TeamId::default()).action,
        Action::HostDown
    );
    world.judge(second, Verdict::Back).expect("judged");
    let up = last(&world.state, TeamId::default());
    assert_eq!((up.action, up.object), (Action::HostUp, second.to_string()));
}

#[test]
fn a_sandbox_of_a_team_is_in_that_teams_log_whoever_asks() {
    let mut world = World::founded();
    world
        .act(by_ann(Command::PutTeam(team("Acme"))))
        .expect("made");
    let create = Command::CreateSandbox {
        id: sandbox_id(1),
        team: ACME,
        spec: waiting(512),
        hints: vec![],
    };
    world.act(by_ann(create)).expect("placed");
    let stop = Command::StopSandbox {
        id: sandbox_id(1),
        cause: StopCause::Asked,
    };
    world.act(by_ann(stop.clone())).expect("stopped");
    world.act(by_ann(stop)).expect("stopped already");
    let object = sandbox_id(1).to_string();
    assert_eq!(
        actions(&world.state, ACME),
        [
            (Action::CapsuleCreate, object.clone()),
            (Action::CapsuleDestroy, object)
        ]
    );
    assert_eq!(actions(&world.state, TeamId::default()).len(), 1);
}

#[test]
fn rows_bring_the_whole_log_back_and_old_records_leave_it() {
    let mut world = World::founded();
    for n in 0..TEAM_RECORDS + 10 {
        let name = format!("name {n}");
        world
            .act(by_ann(Command::PutTeam(team(&name))))
            .expect("renamed");
    }
    let oldest = world
        .state
        .audit_of(TeamId::default())
        .next()
        .expect("there");
    assert_eq!(oldest.object_name, "name 10");
    let again = State::from_rows(world.state.rows()).expect("our own rows");
    assert_eq!(again, world.state);
    let after = world.index - 3;
    assert_eq!(again.audit_after(after).count(), 3);
}

#[test]
fn a_change_within_a_change_is_not_read_and_other_changes_are_as_they_were() {
    let at = Stamp(7);
    let all = [
        by_ann(Command::PutKey(Key {
            scope: Scope::Read,
            expires_at: Some(Stamp(9)),
            holder: Some(UserId([4; 16])),
            ..key(1, ACME)
        })),
        Command::PutKey(key(1, ACME)),
        Command::NoteKeyUses(vec![(KeyId([1; 16]), Stamp(5))]),
        Command::PutTeam(team("Acme")),
        Command::DropTeam(ACME),
        Command::PutMember(member(1, Role::Owner)),
        Command::DropMember {
            team: ACME,
            user: UserId([1; 16]),
        },
    ];
    for command in all {
        let proposal = Proposal { at, command };
        assert_eq!(Proposal::decode(&proposal.encode()), Ok(proposal));
    }
    let command = by_ann(by_ann(Command::DropTeam(ACME)));
    assert!(Proposal::decode(&Proposal { at, command }.encode()).is_err());
}

fn member(n: u8, role: Role) -> Member {
    Member {
        team: ACME,
        user: UserId([n; 16]),
        email: format!("{n}@example.com"),
        name: format!("person {n}"),
        role,
        joined_at: Stamp(0),
    }
}

#[test]
fn a_member_who_goes_takes_the_keys_along_and_the_last_owner_stays() {
    let mut world = World::founded();
    world.act(Command::PutTeam(team("Acme"))).expect("made");
    world
        .act(Command::PutMember(member(1, Role::Owner)))
        .expect("added");
    world
        .act(Command::PutMember(member(2, Role::Member)))
        .expect("added");
    let held = Key {
        holder: Some(UserId([2; 16])),
        ..key(5, ACME)
    };
    world.act(Command::PutKey(held)).expect("made");
    world.act(Command::PutKey(key(6, ACME))).expect("made");
    let nobodys = Key {
        holder: Some(UserId([3; 16])),
        ..key(7, ACME)
    };
    assert!(matches!(
        world.act(Command::PutKey(nobodys)),
        Err(Refusal::NoSuchMember(_))
    ));
    let goes = |n| Command::DropMember {
        team: ACME,
        user: UserId([n; 16]),
    };
    assert!(matches!(world.act(goes(1)), Err(Refusal::Unfit(_))));
    let lesser = Command::PutMember(member(1, Role::Admin));
    assert!(matches!(world.act(lesser), Err(Refusal::Unfit(_))));
    world.act(goes(2)).expect("gone");
    assert!(world.state.key_by_hash(&[5; 32]).is_none(), "it was held");
    assert!(world.state.key_by_hash(&[6; 32]).is_some());
    world.act(goes(1)).expect("the last one may go");
}

#[test]
fn a_team_goes_with_its_keys_once_it_has_nothing_else() {
    let mut world = World::founded();
    world.act(Command::PutTeam(team("Acme"))).expect("made");
    world
        .act(Command::PutMember(member(1, Role::Owner)))
        .expect("added");
    world.act(Command::PutKey(key(5, ACME))).expect("made");
    let create = Command::CreateSandbox {
        id: sandbox_id(1),
        team: ACME,
        spec: waiting(512),
        hints: vec![],
    };
    world.act(create).expect("placed");
    let refused = world
        .act(Command::DropTeam(ACME))
        .expect_err("it has a capsule");
    assert!(refused.to_string().contains("1 capsules"), "{refused}");
    world
        .act(Command::StopSandbox {
            id: sandbox_id(1),
            cause: StopCause::Asked,
        })
        .expect("stopping");
    world
        .report(
            1,
            wrenn_raft::command::Report::Stopped {
                reason: String::new(),
            },
        )
        .expect("stopped");
    world.act(Command::DropTeam(ACME)).expect("gone");
    assert!(world.state.key_by_hash(&[5; 32]).is_none());
    assert_eq!(world.state.members_of(ACME).count(), 0);
    assert!(matches!(
        world.act(Command::DropTeam(ACME)),
        Err(Refusal::NoSuchTeam(_))
    ));
    assert!(world.act(Command::DropTeam(TeamId::default())).is_err());
}

#[test]
fn the_latest_use_of_a_key_stays() {
    let mut world = World::founded();
    world.act(Command::PutKey(key(5, ACME))).expect("made");
    let used = |at| Command::NoteKeyUses(vec![(KeyId([5; 16]), Stamp(at))]);
    assert_eq!(world.act(used(70)), Ok(Receipt::Done(1)));
    assert_eq!(world.act(used(60)), Ok(Receipt::Done(0)));
    let known = world.state.key(KeyId([5; 16])).expect("known");
    assert_eq!(known.last_used, Some(Stamp(70)));
    world
        .act(Command::RevokeKey(KeyId([5; 16])))
        .expect("revoked");
    assert_eq!(
        world.act(used(80)),
        Ok(Receipt::Done(0)),
        "it opens nothing"
    );
}

/// The rows of a state but for the audit log and what begins with it (usage and events), and how many
/// the log has.
fn parted(state: &State) -> (BTreeSet<Row>, usize) {
    let mut records = 0;
    let mut rest = BTreeSet::new();
    for row in state.rows() {
        match RowKey::decode(&row.0) {
            Ok(RowKey::Audit(..)) => records += 1,
            Ok(RowKey::Usage(..) | RowKey::Event(_)) => {}
            _ => drop(rest.insert(row)),
        }
    }
    (rest, records)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever is asked for, naming who asked changes the audit log, and what begins with it, and nothing else.
    #[test]
    fn a_name_on_a_change_adds_at_most_one_record_and_changes_nothing_else(history in any_history(80)) {
        let mut plain = busy_world();
        let mut named = plain.clone();
        for what in history {
            let Some(proposal) = plain.proposal(what) else { continue };
            let Proposal { at, command } = proposal.clone();
            // A channel is told of events, which begin with the first record.
            if matches!(command, Command::PutChannel(_) | Command::TellChannel(_)) {
                continue;
            }
            plain.index += 1;
            let index = plain.index;
            let applied = plain.state.apply(index, proposal);
            let before = named.state.clone();
            let command = by_ann(command);
            let said = named.state.apply(index, Proposal { at, command });
            prop_assert_eq!(&said.answer, &applied.answer);
            let (rest, records) = parted(&named.state);
            prop_assert_eq!(&rest, &parted(&plain.state).0);
            prop_assert!(records <= parted(&before).1 + 1);
            let touched: BTreeSet<_> = said.touched.iter().map(RowKey::encode).collect();
            for (key, _) in named.state.changes_since(&before) {
                prop_assert!(touched.contains(&key), "{key:?} changed in silence");
            }
            if said.answer.is_ok() && said.touched.is_empty() {
                prop_assert!(named.state == before);
            }
            plain.now = plain.now.max(at);
        }
        prop_assert_eq!(&State::from_rows(named.state.rows()).expect("own rows"), &named.state);
    }
}
