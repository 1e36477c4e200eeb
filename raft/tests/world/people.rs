//! Random moves of people: teams, members, their keys, channels, what they decide about a sandbox, and builds
//! with the nodes that see to them.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;
use proto::ids::{BuildId, ChannelId, KeyId, TeamId, UserId};
use proto::units::Stamp;
use wrenn_raft::apply::Applied;
use wrenn_raft::command::{
    Attributed, BuildChange, BuildEnd, Command, Receipt, Refusal, Report, TellChannel,
};
use wrenn_raft::state::{
    Actor, Build, BuildSpec, BuildStatus, Channel, EventId, Key, Member, Phase, Role, Scope, Team,
};

use super::history::{self, TEAMS};
use super::{World, bound, mark};

const USERS: u8 = 4;
const CHANNELS: u8 = 5;
const BUILDS: u8 = 8;
/// Keys that members hold; those below are the teams' own.
const HELD_KEYS: std::ops::Range<u8> = 6..12;

/// What a person, or the leader for one, asks for.
#[derive(Clone, Debug)]
pub enum PeopleMove {
    Team {
        n: u8,
        name: u8,
    },
    DropTeam(u8),
    Member {
        team: u8,
        user: u8,
        role: Role,
        email: u8,
    },
    DropMember(Index),
    HeldKey {
        n: u8,
        team: u8,
        user: u8,
        scope: Scope,
    },
    KeyUse {
        n: u8,
        ago_ms: u64,
    },
    Channel {
        n: u8,
        team: u8,
        enabled: bool,
    },
    DropChannel {
        channel: Index,
        by_its_team: bool,
    },
    Tell {
        channel: Index,
        upto: Index,
        stale: bool,
        failure: bool,
    },
    Open {
        sandbox: Index,
        open: Option<bool>,
        wakes: Option<bool>,
    },
}

/// Something about a build: by its client, or by a node that says which attempt is its own.
#[derive(Clone, Debug)]
pub enum BuildMove {
    Start {
        n: u8,
        team: u8,
        name: u8,
        overwrite: bool,
        owner: Index,
    },
    Claim {
        build: Index,
        stale: bool,
        node: Index,
    },
    Progress {
        build: Index,
        stale: bool,
        step: u32,
        sandbox: Option<Index>,
        log_bytes: usize,
    },
    End {
        build: Index,
        stale: bool,
        status: BuildStatus,
    },
    Cancel(Index),
}

pub fn any_of_people() -> impl Strategy<Value = PeopleMove> {
    use PeopleMove::{
        Channel, DropChannel, DropMember, DropTeam, HeldKey, KeyUse, Member, Open, Team, Tell,
    };
    let roles = || prop::sample::select(vec![Role::Owner, Role::Owner, Role::Admin, Role::Member]);
    let scopes = prop::sample::select(vec![Scope::Read, Scope::Run, Scope::Admin]);
    let choice = || prop::option::of(any::<bool>());
    let stale = || prop::bool::weighted(0.2);
    prop_oneof![
        3 => (0..=TEAMS, 0_u8..2).prop_map(|(n, name)| Team { n, name }),
        1 => prop::sample::select(vec![0, 1, TEAMS, TEAMS]).prop_map(DropTeam),
        // Two people in four have one address.
        4 => (0..=TEAMS, 0..USERS, roles(), 0..3_u8)
            .prop_map(|(team, user, role, email)| Member { team, user, role, email }),
        2 => any::<Index>().prop_map(DropMember),
        3 => (HELD_KEYS, 0..=TEAMS, 0..USERS, scopes)
            .prop_map(|(n, team, user, scope)| HeldKey { n, team, user, scope }),
        2 => (0..HELD_KEYS.end, 0_u64..5000).prop_map(|(n, ago_ms)| KeyUse { n, ago_ms }),
        3 => (0..CHANNELS, 0..=TEAMS, any::<bool>())
            .prop_map(|(n, team, enabled)| Channel { n, team, enabled }),
        1 => (any::<Index>(), prop::bool::weighted(0.8))
            .prop_map(|(channel, by_its_team)| DropChannel { channel, by_its_team }),
        4 => (any::<Index>(), any::<Index>(), stale(), any::<bool>())
            .prop_map(|(channel, upto, stale, failure)| Tell { channel, upto, stale, failure }),
        2 => (any::<Index>(), choice(), choice())
            .prop_map(|(sandbox, open, wakes)| Open { sandbox, open, wakes }),
    ]
}

pub fn any_of_builds() -> impl Strategy<Value = BuildMove> {
    use BuildMove::{Cancel, Claim, End, Progress, Start};
    let stale = || prop::bool::weighted(0.2);
    let sandbox = prop::option::weighted(0.7, any::<Index>());
    // As a rule some lines; now and then more than a log may have.
    let log_bytes = prop_oneof![40 => 0_usize..60, 1 => Just(700 << 10)];
    let ends = prop::sample::select(vec![
        BuildStatus::Success,
        BuildStatus::Failed,
        BuildStatus::Running,
    ]);
    prop_oneof![
        4 => (0..BUILDS, 0..TEAMS, 0_u8..3, any::<bool>(), any::<Index>()).prop_map(
            |(n, team, name, overwrite, owner)| Start { n, team, name, overwrite, owner }
        ),
        5 => (any::<Index>(), stale(), any::<Index>())
            .prop_map(|(build, stale, node)| Claim { build, stale, node }),
        5 => (any::<Index>(), stale(), 0_u32..4, sandbox, log_bytes).prop_map(
            |(build, stale, step, sandbox, log_bytes)| {
                Progress { build, stale, step, sandbox, log_bytes }
            }
        ),
        2 => (any::<Index>(), stale(), ends)
            .prop_map(|(build, stale, status)| End { build, stale, status }),
        1 => any::<Index>().prop_map(Cancel),
    ]
}

/// The change as a person asks for it.
pub fn asked(change: Command) -> Command {
    Command::By(Attributed {
        actor: Actor::Key {
            id: KeyId(mark(b'k', 0)),
            name: "a laptop".into(),
            holder: Some(user(0)),
            address: "10.1.2.3".into(),
        },
        change: Box::new(change),
    })
}

/// A change that is on record, as any cluster's first ones are.
pub fn first_asked() -> Command {
    asked(Command::PutTeam(Team {
        id: team(1),
        slug: "000001-000000".into(),
        ..Team::default()
    }))
}

/// The teams there are, and one that nobody works in: it can go.
fn team(n: u8) -> TeamId {
    if n == TEAMS {
        return TeamId(mark(b't', TEAMS));
    }
    history::team(n)
}

fn user(n: u8) -> UserId {
    UserId(mark(b'u', n))
}

fn key(n: u8) -> KeyId {
    KeyId(mark(b'k', n))
}

/// The one that `pick` means; none where there are none.
fn any_of<'a, T>(all: impl Iterator<Item = &'a T>, pick: Index) -> Option<&'a T> {
    let all: Vec<&T> = all.collect();
    (!all.is_empty()).then(|| *pick.get(&all))
}

fn a_member(of: u8, who: u8, role: Role, email: u8) -> Member {
    Member {
        team: team(of),
        user: user(who),
        email: format!("{email}@example.com"),
        name: format!("person {who}"),
        role,
        joined_at: Stamp(0),
    }
}

fn a_key(n: u8, of: u8, who: u8, scope: Scope) -> Key {
    Key {
        id: key(n),
        team: team(of),
        hash: mark(b'h', n),
        scope,
        holder: Some(user(who)),
        ..Key::default()
    }
}

fn a_channel(n: u8, of: u8, enabled: bool) -> Channel {
    Channel {
        id: ChannelId(mark(b'w', n)),
        team: team(of),
        url: "https://example.com".into(),
        secret: format!("secret-of-channel-{n}"),
        enabled,
        ..Channel::default()
    }
}

fn a_recipe(name: u8, overwrite: bool) -> BuildSpec {
    BuildSpec {
        name: format!("name-{name}"),
        overwrite,
        sandbox: bound(256),
        recipe: vec!["RUN true".into()],
        files: vec![vec![]],
        total_steps: 3,
        ..BuildSpec::default()
    }
}

impl World {
    pub(super) fn people_command(&self, what: &PeopleMove) -> Option<Command> {
        Some(match *what {
            PeopleMove::Team { n, name } => Command::PutTeam(Team {
                id: team(n),
                name: format!("team {name}"),
                slug: format!("00000{n}-000000"),
                created_at: Stamp(0),
            }),
            PeopleMove::DropTeam(n) => Command::DropTeam(team(n)),
            PeopleMove::Member {
                team: n,
                user: who,
                role,
                email,
            } => Command::PutMember(a_member(n, who, role, email)),
            PeopleMove::DropMember(pick) => {
                let known = any_of(self.state.members(), pick)?;
                Command::DropMember {
                    team: known.team,
                    user: known.user,
                }
            }
            PeopleMove::HeldKey {
                n,
                team: of,
                user: who,
                scope,
            } => Command::PutKey(a_key(n, of, who, scope)),
            PeopleMove::KeyUse { n, ago_ms } => {
                let at = Stamp(self.now.0.saturating_sub(ago_ms));
                Command::NoteKeyUses(vec![(key(n), at), (key(n / 2), at)])
            }
            PeopleMove::Channel {
                n,
                team: of,
                enabled,
            } => Command::PutChannel(a_channel(n, of, enabled)),
            PeopleMove::DropChannel {
                channel,
                by_its_team,
            } => {
                let known = any_of(self.state.channels(), channel)?;
                let (stranger, id) = (TeamId(mark(b't', 99)), known.id);
                let team = if by_its_team { known.team } else { stranger };
                Command::DropChannel { team, id }
            }
            PeopleMove::Tell {
                channel,
                upto,
                stale,
                failure,
            } => self.tell_command(channel, upto, stale, failure)?,
            PeopleMove::Open {
                sandbox,
                open,
                wakes,
            } => Command::ChangeSandbox {
                id: any_of(self.state.sandboxes(), sandbox)?.id,
                ports_open: open,
                wakes,
            },
        })
    }

    fn tell_command(
        &self,
        channel: Index,
        upto: Index,
        stale: bool,
        failure: bool,
    ) -> Option<Command> {
        let known = any_of(self.state.channels(), channel)?;
        let upto = any_of(self.state.events_of(known.team), upto)?.id;
        // Whoever leads says of events that it delivered that it went on.
        let count = u32::from(upto > known.cursor);
        Some(Command::TellChannel(TellChannel {
            id: known.id,
            from: if stale { EventId::FIRST } else { known.cursor },
            upto,
            delivered: if failure { 0 } else { count },
            given_up: if failure { count } else { 0 },
            failure: if failure { "503".into() } else { String::new() },
        }))
    }

    pub(super) fn build_command(&self, what: &BuildMove) -> Option<Command> {
        let attempt_of = |build: Index, stale: bool| {
            let known = any_of(self.state.builds(), build)?;
            let attempt = known.attempt.saturating_sub(u32::from(stale));
            Some((known.id, attempt))
        };
        let change = match *what {
            BuildMove::Start {
                n,
                team: of,
                name,
                overwrite,
                owner,
            } => BuildChange::Start(Box::new(Build {
                id: BuildId(mark(b'b', n)),
                team: team(of),
                owner: any_of(self.state.nodes(), owner)?.id,
                spec: a_recipe(name, overwrite),
                ..Build::default()
            })),
            BuildMove::Claim { build, stale, node } => {
                let (id, attempt) = attempt_of(build, stale)?;
                BuildChange::Claim {
                    id,
                    attempt,
                    node: any_of(self.state.nodes(), node)?.id,
                }
            }
            BuildMove::Progress {
                build,
                stale,
                step,
                sandbox,
                log_bytes,
            } => {
                let (id, attempt) = attempt_of(build, stale)?;
                let sandbox = sandbox.and_then(|pick| any_of(self.state.sandboxes(), pick));
                BuildChange::Progress {
                    id,
                    attempt,
                    phase: "recipe".into(),
                    step,
                    sandbox: sandbox.map(|it| it.id),
                    log: vec![b'\n'; log_bytes],
                }
            }
            BuildMove::End {
                build,
                stale,
                status,
            } => {
                let (id, attempt) = attempt_of(build, stale)?;
                BuildChange::End(BuildEnd {
                    id,
                    attempt,
                    status,
                    error: "why".into(),
                    default_user: "root".into(),
                    default_env: BTreeMap::from([("A".into(), "1".into())]),
                    log: b"{}\n".to_vec(),
                })
            }
            BuildMove::Cancel(build) => BuildChange::Cancel(attempt_of(build, false)?.0),
        };
        Some(Command::Build(change))
    }
}

/// The word for what a command of people, or about a build, came to.
pub fn event_of(world: &World, command: &Command, applied: &Applied) -> Option<&'static str> {
    let did = matches!(applied.answer, Ok(Receipt::Done(1..)));
    let unfit = matches!(applied.answer, Err(Refusal::Unfit(_)));
    Some(match command {
        Command::PutTeam(_) if did => "team made or renamed",
        Command::DropTeam(_) if did => "team gone",
        Command::DropTeam(_) if unfit => "team not gone",
        Command::PutMember(_) if did => "member",
        Command::PutMember(_) if unfit => "not that member",
        Command::DropMember { .. } if did => "member gone",
        Command::DropMember { .. } if unfit => "last owner",
        Command::PutKey(key) if did && key.holder.is_some() => "key held",
        Command::NoteKeyUses(_) if did => "key used",
        Command::PutChannel(_) if did => "channel",
        Command::DropChannel { .. } if did => "channel gone",
        Command::TellChannel(_) if did => "channel told",
        Command::ChangeSandbox { .. } if did => "opened",
        Command::Build(BuildChange::Start(_)) if did => "build asked for",
        Command::Build(BuildChange::Claim { attempt: 0, .. }) if did => "build begun",
        Command::Build(BuildChange::Claim { .. }) if did => "build begun anew",
        Command::Build(BuildChange::Progress { .. }) if did => "build goes on",
        Command::Build(BuildChange::End(_)) if did => "build ended",
        Command::Build(BuildChange::Cancel(_)) if did => "build called off",
        Command::Build(_) if unfit => "build not changed",
        Command::ReportSandbox {
            id,
            report: Report::Failed { .. },
            ..
        } if did => {
            let known = world.state.sandbox(*id)?;
            let moved = known.phase == Phase::Resuming && !known.failed_on.is_empty();
            moved.then_some("tried on another host")?
        }
        _ => return None,
    })
}

/// All of them, and what else [`event_of`] knows.
pub const EVENTS: &str = "team made or renamed, team gone, team not gone, member, not that member, member gone, \
    key held, key used, channel, channel gone, channel told, opened, build asked for, build begun, \
    build begun anew, build goes on, build ended, build called off, build not changed, tried on another host";
