//! What holds of teams, keys, channels, builds and the audit log after any command.

use std::collections::BTreeSet;

use wrenn_raft::apply::Applied;
use wrenn_raft::command::{BuildChange, Command};
use wrenn_raft::state::{Actor, Build, Liveness, Phase, Role, RowKey, State};

/// One command and both sides of it.
#[derive(Clone, Copy)]
pub struct Sides<'a> {
    pub index: u64,
    /// With who asked for it.
    pub command: &'a Command,
    pub applied: &'a Applied,
    pub before: &'a State,
    pub after: &'a State,
}

impl Sides<'_> {
    pub fn check(self) {
        self.check_members();
        self.check_keys();
        self.check_channels();
        self.check_builds();
        self.check_audit();
    }

    fn check_members(self) {
        for team in self.before.teams() {
            if let Some(now) = self.after.team(team.id) {
                assert_eq!((&now.slug, now.created_at), (&team.slug, team.created_at));
            }
        }
        let mut addresses = BTreeSet::new();
        for member in self.after.members() {
            let team = member.team;
            assert!(
                self.after.team(team).is_some() || team == Default::default(),
                "{member:?} is in no team"
            );
            assert!(addresses.insert((team, &member.email)), "twice: {member:?}");
            let owned = |state: &State| state.members_of(team).any(|it| it.role == Role::Owner);
            assert!(
                owned(self.after) || !owned(self.before),
                "{team} has no owner"
            );
        }
    }

    fn check_keys(self) {
        let mut secrets = BTreeSet::new();
        for key in self.after.keys() {
            assert!(secrets.insert(key.hash), "two keys of one secret: {key:?}");
            if let (Some(user), false) = (key.holder, key.revoked) {
                let member = self.after.member(key.team, user);
                assert!(member.is_some(), "nobody holds {key:?}");
            }
            if let Some(known) = self.before.key(key.id) {
                assert!(key.revoked || !known.revoked, "{key:?} is good again");
                assert!(key.last_used >= known.last_used);
                assert_eq!((key.team, key.scope), (known.team, known.scope));
            }
        }
    }

    fn check_channels(self) {
        for channel in self.after.channels() {
            assert!(
                channel.cursor.index <= self.index,
                "{channel:?} was told the future"
            );
            if let Some(known) = self.before.channel(channel.id) {
                assert_eq!(channel.team, known.team);
                assert!(channel.cursor >= known.cursor, "{channel:?} went back");
                assert!(channel.delivered >= known.delivered);
            }
        }
    }

    fn check_builds(self) {
        for build in self.after.builds() {
            let known = self.before.build(build.id);
            if let Some(known) = known {
                self.check_build_step(known, build);
            }
            if build.status.is_ended() {
                assert!(
                    build.sandbox.is_none() && build.completed_at.is_some(),
                    "{build:?}"
                );
            }
            let pieces = 0..build.log_pieces;
            let bytes = pieces.map(|it| self.after.build_log(build.id, it).map_or(0, <[u8]>::len));
            assert_eq!(bytes.sum::<usize>() as u64, build.log_bytes, "{build:?}");
            assert!(build.log_bytes <= Build::LOG_BYTES);
        }
    }

    /// What is over stays over, and nobody takes the place of an owner who is there.
    fn check_build_step(self, known: &Build, now: &Build) {
        if known.status.is_ended() {
            assert_eq!(known, now, "it had ended");
            return;
        }
        assert!(
            now.attempt >= known.attempt,
            "an attempt came back: {now:?}"
        );
        if now.owner != known.owner {
            let owner = self.before.node(known.owner);
            let is_there = owner.is_some_and(|it| it.liveness == Liveness::Alive);
            assert!(!is_there, "{now:?} was taken from its owner");
        }
        let is_over = now.status.is_ended() || now.attempt > known.attempt;
        if let Some(built_in) = known.sandbox.filter(|_| is_over) {
            let left = self.after.sandbox(built_in);
            let wanted = left.is_some_and(|it| !it.phase.is_ended() && it.phase != Phase::Stopping);
            assert!(!wanted, "the sandbox of {known:?} is left: {left:?}");
        }
    }

    /// One entry makes one record at most, which says who asked and what came of it.
    fn check_audit(self) {
        let records: Vec<_> = self.after.audit_after(self.index - 1).collect();
        assert!(records.len() <= 1, "{records:?}");
        let Some(record) = records.first() else {
            return;
        };
        assert_eq!(record.entry, self.index);
        let actor = match self.command {
            Command::By(attributed) => attributed.actor.clone(),
            _ => Actor::default(),
        };
        assert_eq!(record.actor, actor);
        assert_eq!(record.error.is_some(), self.applied.answer.is_err());
    }
}

/// Whether a change of this row may come of the same command applied once more: of a refusal that is on record
/// another record, and of a log line another line. Owners send theirs once, under an attempt of their own.
pub fn may_repeat(command: &Command, key: &[u8]) -> bool {
    match RowKey::decode(key) {
        Ok(RowKey::Audit(..)) => matches!(command, Command::By(_)),
        Ok(RowKey::Build(_) | RowKey::BuildLog(..)) => {
            matches!(
                command.change(),
                Command::Build(BuildChange::Progress { .. })
            )
        }
        _ => false,
    }
}
