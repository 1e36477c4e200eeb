//! The commands about API keys, teams and members.

use proto::ids::{KeyId, TeamId, UserId};
use proto::units::Stamp;

use super::Applied;
use crate::command::{Receipt, Refusal};
use crate::state::{Key, Member, Role, RowKey, State, Team};

/// Most teams of a cluster: each is in every member's memory, and there is nobody to ask for them but
/// the platform's administrators.
const MAX_TEAMS: usize = 10_000;
/// Most members of a team, and most keys that are not revoked: a page of people look at them.
const MAX_MEMBERS: usize = 1000;
/// Most keys of a team that are not revoked.
const MAX_KEYS: usize = 1000;
/// Most revoked keys that are remembered of a team. A forgotten one opens nothing either: it is unknown.
const MAX_REVOKED: usize = 1000;

impl State {
    pub(super) fn add_key(&mut self, at: Stamp, mut key: Key) -> Applied {
        key.created_at = at;
        let taken = || Applied::untouched(Err(Refusal::IdTaken(key.id.to_string())));
        if let Some(known) = self.key(key.id) {
            if known.hash != key.hash {
                return taken();
            }
            return Applied::untouched(Ok(Receipt::Done(1)));
        }
        // A secret has one record: under another id, a revoked one would come alive again.
        if self.has_key_hash(&key.hash) {
            return taken();
        }
        if let Some(user) = key.holder
            && self.member(key.team, user).is_none()
        {
            return Applied::untouched(Err(Refusal::NoSuchMember(user.to_string())));
        }
        let theirs = self.keys().filter(|it| it.team == key.team && !it.revoked);
        if theirs.count() >= MAX_KEYS {
            let why = format!("a team has {MAX_KEYS} API keys at most: revoke some");
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        let id = key.id;
        self.put_key(key);
        Applied::touched(Receipt::Done(1), RowKey::Key(id))
    }

    pub(super) fn revoke_key(&mut self, id: KeyId) -> Applied {
        let Some(known) = self.key(id) else {
            return Applied::untouched(Err(Refusal::NoSuchKey(id.to_string())));
        };
        if known.revoked {
            return Applied::untouched(Ok(Receipt::Done(1)));
        }
        let team = known.team;
        let mut touched = vec![self.end_key(id)];
        touched.extend(self.forget_keys(team));
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// Later uses win, so nodes may tell of theirs in any order.
    pub(super) fn note_key_uses(&mut self, uses: &[(KeyId, Stamp)]) -> Applied {
        let mut touched = Vec::new();
        for (id, at) in uses {
            let known = self.key(*id).filter(|key| key.last_used < Some(*at));
            if let Some(known) = known.filter(|key| !key.revoked).cloned() {
                self.put_key(Key {
                    last_used: Some(*at),
                    ..known
                });
                touched.push(RowKey::Key(*id));
            }
        }
        Applied {
            answer: Ok(Receipt::Done(touched.len() as u64)),
            touched,
        }
    }

    pub(super) fn set_team(&mut self, at: Stamp, team: Team) -> Applied {
        let id = team.id;
        let next = match self.team(id) {
            // Its slug is a name that never changes.
            Some(known) => Team {
                name: team.name,
                ..known.clone()
            },
            None if self.teams().count() >= MAX_TEAMS => {
                let why = format!("a cluster has {MAX_TEAMS} teams at most");
                return Applied::untouched(Err(Refusal::Unfit(why)));
            }
            None => Team {
                created_at: at,
                ..team
            },
        };
        if self.team(id) == Some(&next) {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        self.put_team(next);
        Applied::touched(Receipt::Done(1), RowKey::Team(id))
    }

    /// What a team has must be gone before, so that nothing is left that nobody may touch.
    pub(super) fn remove_team(&mut self, id: TeamId) -> Applied {
        if id == TeamId::default() {
            let why = "the platform itself is no team that could go".into();
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        if self.team(id).is_none() {
            return Applied::untouched(Err(Refusal::NoSuchTeam(id.to_string())));
        }
        if let Err(why) = self.has_nothing(id) {
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        let mut touched = vec![RowKey::Team(id)];
        let members: Vec<UserId> = self.members_of(id).map(|it| it.user).collect();
        for user in members {
            self.drop_member(id, user);
            touched.push(RowKey::Member(id, user));
        }
        touched.extend(self.end_keys(|key| key.team == id));
        self.drop_team(id);
        touched.extend(self.forget_keys(id));
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    fn has_nothing(&self, team: TeamId) -> Result<(), String> {
        let live = self.sandboxes_of(team).filter(|it| !it.phase.is_ended());
        let (live, named) = (live.count(), self.named_by(team).count());
        let hosts = self.nodes().filter(|node| node.team == Some(team)).count();
        if (live, named, hosts) == (0, 0, 0) {
            return Ok(());
        }
        Err(format!(
            "the team still has {live} capsules, {named} snapshots and {hosts} hosts: remove them first"
        ))
    }

    pub(super) fn set_member(&mut self, at: Stamp, member: Member) -> Applied {
        let (team, user) = (member.team, member.user);
        // The platform is there without a record.
        if self.team(team).is_none() && team != TeamId::default() {
            return Applied::untouched(Err(Refusal::NoSuchTeam(team.to_string())));
        }
        let is_other = |it: &Member| it.user != user && it.email == member.email;
        if self.members_of(team).any(is_other) {
            return Applied::untouched(Err(Refusal::Unfit(format!(
                "{} is a member already",
                member.email
            ))));
        }
        let next = match self.member(team, user) {
            Some(known) if self.is_last_owner(known) && member.role != Role::Owner => {
                return Applied::untouched(Err(last_owner()));
            }
            Some(known) => Member {
                joined_at: known.joined_at,
                ..member
            },
            None if self.members_of(team).count() >= MAX_MEMBERS => {
                let why = format!("a team has {MAX_MEMBERS} members at most");
                return Applied::untouched(Err(Refusal::Unfit(why)));
            }
            None => Member {
                joined_at: at,
                ..member
            },
        };
        if self.member(team, user) == Some(&next) {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        self.put_member(next);
        Applied::touched(Receipt::Done(1), RowKey::Member(team, user))
    }

    pub(super) fn remove_member(&mut self, team: TeamId, user: UserId) -> Applied {
        let Some(known) = self.member(team, user) else {
            return Applied::untouched(Err(Refusal::NoSuchMember(user.to_string())));
        };
        if self.is_last_owner(known) && self.members_of(team).count() > 1 {
            return Applied::untouched(Err(last_owner()));
        }
        self.drop_member(team, user);
        let mut touched = vec![RowKey::Member(team, user)];
        touched.extend(self.end_keys(|key| key.team == team && key.holder == Some(user)));
        touched.extend(self.forget_keys(team));
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    fn is_last_owner(&self, member: &Member) -> bool {
        let mut others = self.members_of(member.team);
        member.role == Role::Owner
            && !others.any(|it| it.role == Role::Owner && it.user != member.user)
    }

    fn end_keys(&mut self, of: impl Fn(&Key) -> bool) -> Vec<RowKey> {
        let theirs = self.keys().filter(|key| !key.revoked && of(key));
        let ids: Vec<KeyId> = theirs.map(|key| key.id).collect();
        ids.into_iter().map(|id| self.end_key(id)).collect()
    }

    fn end_key(&mut self, id: KeyId) -> RowKey {
        if let Some(known) = self.key(id).cloned() {
            self.put_key(Key {
                revoked: true,
                ..known
            });
        }
        RowKey::Key(id)
    }

    /// Forgets the revoked keys of a team that were made first, where there are too many.
    fn forget_keys(&mut self, team: TeamId) -> Vec<RowKey> {
        let revoked = self.keys().filter(|key| key.team == team && key.revoked);
        let mut revoked: Vec<_> = revoked.map(|key| (key.created_at, key.id)).collect();
        revoked.sort_unstable();
        let surplus = revoked.len().saturating_sub(MAX_REVOKED);
        revoked.truncate(surplus);
        let forgotten = revoked.into_iter().map(|(_, id)| {
            self.drop_key(id);
            RowKey::Key(id)
        });
        forgotten.collect()
    }
}

fn last_owner() -> Refusal {
    Refusal::Unfit("a team keeps its last owner: make another member one first".into())
}
