//! The commands about building templates.
//!
//! ```text
//! (start) -> Pending -> Running -> Success | Failed     by the owner's word
//!               '----------+-----> Cancelled            by its client's
//! ```
//!
//! A claim begins the next attempt: what the owner of the one before says from then on is refused. The
//! sandbox of an attempt that is over is stopped by the same entry, so that none is left behind.

use proto::ids::{BuildId, NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use super::Applied;
use crate::command::{BuildChange, BuildEnd, DropNamed, Receipt, Refusal, StopCause};
use crate::state::{Build, BuildLog, BuildStatus, RowKey, STEP_PREFIX, State};

/// Why another node may not take a build up.
const HAS_OWNER: &str = "its owner is there and goes on with it";

/// How far an attempt is.
struct Progress {
    phase: String,
    step: u32,
    sandbox: Option<SandboxId>,
    log: Vec<u8>,
}

impl State {
    pub(super) fn change_build(&mut self, at: Stamp, change: BuildChange) -> Applied {
        match change {
            BuildChange::Start(build) => self.start_build(at, *build),
            BuildChange::Claim { id, attempt, node } => self.claim_build(at, id, attempt, node),
            BuildChange::Progress {
                id,
                attempt,
                phase,
                step,
                sandbox,
                log,
            } => {
                let progress = Progress {
                    phase,
                    step,
                    sandbox,
                    log,
                };
                self.advance_build(id, attempt, progress)
            }
            BuildChange::End(end) => self.end_build(at, end),
            BuildChange::Cancel(id) => self.cancel_build(at, id),
        }
    }

    fn start_build(&mut self, at: Stamp, asked: Build) -> Applied {
        let Build {
            id,
            team,
            mut spec,
            owner,
            ..
        } = asked;
        if let Some(known) = self.build(id) {
            // A release before this one did not keep by which name the base was asked for.
            let called = &known.spec.sandbox.asked_template;
            spec.sandbox.asked_template.clone_from(called);
            let same = known.team == team && known.spec == spec;
            let taken = Refusal::IdTaken(id.to_string());
            return Applied::untouched(if same {
                Ok(Receipt::Done(0))
            } else {
                Err(taken)
            });
        }
        if let Err(refusal) = self.may_be_built(team, &spec.name, spec.overwrite) {
            return Applied::untouched(Err(refusal));
        }
        self.put_build(Build {
            id,
            team,
            spec,
            owner,
            created_at: at,
            ..Build::default()
        });
        let mut touched = vec![RowKey::Build(id)];
        touched.extend(self.forget_builds());
        done(touched)
    }

    fn may_be_built(&self, team: TeamId, name: &str, overwrite: bool) -> Result<(), Refusal> {
        if self.template(name).is_some() {
            let why = format!("the template {name:?} is the platform's");
            return Err(Refusal::Unfit(why));
        }
        if !overwrite && self.named(team, name).is_some() {
            return Err(Refusal::NameTaken(name.to_owned()));
        }
        let open = self.builds().filter(|it| it.team == team);
        let open = open.filter(|it| !it.status.is_ended()).count();
        if open >= Build::OPEN_PER_TEAM {
            let why = format!("{open} builds of this team are under way: wait for one to end");
            return Err(Refusal::Unfit(why));
        }
        Ok(())
    }

    fn claim_build(&mut self, at: Stamp, id: BuildId, attempt: u32, node: NodeId) -> Applied {
        let known = match self.attempt_of(id, attempt) {
            Ok(known) => known,
            Err(refusal) => return Applied::untouched(Err(refusal)),
        };
        let is_there = |it: NodeId| self.node(it).is_some_and(|it| it.liveness.is_alive());
        if known.owner != node && is_there(known.owner) {
            return Applied::untouched(Err(Refusal::Unfit(HAS_OWNER.into())));
        }
        let over = known.sandbox;
        self.put_build(Build {
            owner: node,
            attempt: known.attempt.saturating_add(1),
            status: BuildStatus::Running,
            sandbox: None,
            started_at: known.started_at.or(Some(at)),
            ..known
        });
        let mut touched = vec![RowKey::Build(id)];
        touched.extend(self.stop_built_in(at, over));
        done(touched)
    }

    fn advance_build(&mut self, id: BuildId, attempt: u32, progress: Progress) -> Applied {
        let mut build = match self.attempt_of(id, attempt) {
            Ok(known) => known,
            Err(refusal) => return Applied::untouched(Err(refusal)),
        };
        build.phase = progress.phase;
        build.step = progress.step;
        build.sandbox = progress.sandbox;
        let mut touched = vec![RowKey::Build(id)];
        touched.extend(self.add_log(&mut build, progress.log));
        self.put_build(build);
        done(touched)
    }

    fn end_build(&mut self, at: Stamp, end: BuildEnd) -> Applied {
        let mut build = match self.attempt_of(end.id, end.attempt) {
            Ok(known) => known,
            Err(refusal) => return Applied::untouched(Err(refusal)),
        };
        if !matches!(end.status, BuildStatus::Success | BuildStatus::Failed) {
            let why = "an attempt ends in success or failure".to_owned();
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        let mut touched: Vec<RowKey> = self.add_log(&mut build, end.log).into_iter().collect();
        touched.extend(self.close_build(
            at,
            Build {
                status: end.status,
                error: end.error,
                default_user: end.default_user,
                default_env: end.default_env,
                ..build
            },
        ));
        done(touched)
    }

    fn cancel_build(&mut self, at: Stamp, id: BuildId) -> Applied {
        let Some(known) = self.build(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchBuild(id.to_string())));
        };
        if known.status == BuildStatus::Cancelled {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        if known.status.is_ended() {
            return Applied::untouched(Err(Refusal::Unfit("the build has ended".into())));
        }
        let status = BuildStatus::Cancelled;
        done(self.close_build(at, Build { status, ..known }))
    }

    /// The build, if `attempt` is its present one and it goes on.
    fn attempt_of(&self, id: BuildId, attempt: u32) -> Result<Build, Refusal> {
        let known = self.build(id);
        let known = known.ok_or_else(|| Refusal::NoSuchBuild(id.to_string()))?;
        if known.status.is_ended() {
            return Err(Refusal::Unfit("the build has ended".into()));
        }
        if known.attempt != attempt {
            let why = format!(
                "another attempt of the build is under way: {}",
                known.attempt
            );
            return Err(Refusal::Unfit(why));
        }
        Ok(known.clone())
    }

    /// Adds lines to a build's log, unless it is full.
    fn add_log(&mut self, build: &mut Build, text: Vec<u8>) -> Option<RowKey> {
        let bytes = build.log_bytes.saturating_add(text.len() as u64);
        if text.is_empty() || bytes > Build::LOG_BYTES {
            return None;
        }
        let piece = build.log_pieces;
        build.log_pieces = piece.saturating_add(1);
        build.log_bytes = bytes;
        let build = build.id;
        self.put_build_log(BuildLog { build, piece, text });
        Some(RowKey::BuildLog(build, piece))
    }

    /// Puts the last record of a build: its sandbox ends, and of what it kept the oldest goes.
    fn close_build(&mut self, at: Stamp, build: Build) -> Vec<RowKey> {
        let (id, team, over) = (build.id, build.team, build.sandbox);
        self.put_build(Build {
            phase: String::new(),
            sandbox: None,
            completed_at: Some(at),
            ..build
        });
        let mut touched = vec![RowKey::Build(id)];
        touched.extend(self.stop_built_in(at, over));
        touched.extend(self.unname(team, &Build::context_name(id)));
        touched.extend(self.forget_steps(team));
        touched
    }

    fn stop_built_in(&mut self, at: Stamp, sandbox: Option<SandboxId>) -> Vec<RowKey> {
        let Some(id) = sandbox else {
            return Vec::new();
        };
        self.stop_sandbox(at, id, StopCause::Asked).touched
    }

    fn unname(&mut self, team: TeamId, name: &str) -> Vec<RowKey> {
        let Some(snapshot) = self.named(team, name).map(|it| it.snapshot) else {
            return Vec::new();
        };
        let name = name.to_owned();
        let which = DropNamed {
            team,
            name,
            snapshot,
        };
        self.drop_name(&which).touched
    }

    /// Lets go of the oldest steps that are kept for a team, past [`Build::STEPS_KEPT`].
    fn forget_steps(&mut self, team: TeamId) -> Vec<RowKey> {
        let kept = self.named_by(team);
        let kept = kept.filter(|it| it.name.starts_with(STEP_PREFIX));
        let mut kept: Vec<(Stamp, String)> =
            kept.map(|it| (it.created_at, it.name.clone())).collect();
        kept.sort();
        let over = kept.len().saturating_sub(Build::STEPS_KEPT);
        let gone = kept.into_iter().take(over);
        gone.flat_map(|(_, name)| self.unname(team, &name))
            .collect()
    }

    /// Forgets the builds that ended first, past [`Build::KEPT`], with their logs.
    fn forget_builds(&mut self) -> Vec<RowKey> {
        let ended = self.builds().filter(|it| it.status.is_ended());
        let mut ended: Vec<_> = ended
            .map(|it| (it.completed_at, it.id, it.log_pieces))
            .collect();
        ended.sort_unstable();
        let over = ended.len().saturating_sub(Build::KEPT);
        let mut touched = Vec::new();
        for (_, id, pieces) in ended.into_iter().take(over) {
            self.drop_build(id);
            touched.push(RowKey::Build(id));
            for piece in 0..pieces {
                self.drop_build_log(id, piece);
                touched.push(RowKey::BuildLog(id, piece));
            }
        }
        touched
    }
}

fn done(touched: Vec<RowKey>) -> Applied {
    Applied {
        answer: Ok(Receipt::Done(1)),
        touched,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Answer, Command, Proposal};
    use crate::state::{BuildSpec, Liveness, Node};

    const ONE: NodeId = NodeId(1);
    const TWO: NodeId = NodeId(2);
    const ID: BuildId = BuildId([7; 16]);

    fn state() -> State {
        let mut state = State::default();
        for id in [ONE, TWO] {
            state.put_node(Node {
                id,
                ..Node::default()
            });
        }
        state
    }

    fn change(state: &mut State, at: u64, change: BuildChange) -> Answer {
        let command = Command::Build(change);
        let applied = state.apply(
            at,
            Proposal {
                at: Stamp(at),
                command,
            },
        );
        let rows = State::from_rows(state.rows()).expect("rows");
        assert_eq!(&rows, state, "the rows describe the state");
        applied.answer
    }

    fn start(id: BuildId) -> BuildChange {
        BuildChange::Start(Box::new(Build {
            id,
            owner: ONE,
            spec: BuildSpec {
                name: "mine".into(),
                ..BuildSpec::default()
            },
            ..Build::default()
        }))
    }

    const fn claim(attempt: u32, node: NodeId) -> BuildChange {
        BuildChange::Claim {
            id: ID,
            attempt,
            node,
        }
    }

    fn progress(attempt: u32, log: &[u8]) -> BuildChange {
        BuildChange::Progress {
            id: ID,
            attempt,
            phase: "recipe".into(),
            step: 1,
            sandbox: None,
            log: log.to_vec(),
        }
    }

    fn end(id: BuildId, attempt: u32) -> BuildChange {
        BuildChange::End(BuildEnd {
            id,
            attempt,
            status: BuildStatus::Success,
            error: String::new(),
            default_user: "root".into(),
            default_env: std::collections::BTreeMap::new(),
            log: b"end\n".to_vec(),
        })
    }

    #[test]
    fn a_build_that_is_asked_for_again_is_the_same_one_and_another_under_its_id_is_refused() {
        let mut state = state();
        assert_eq!(change(&mut state, 1, start(ID)), Ok(Receipt::Done(1)));
        assert_eq!(change(&mut state, 2, start(ID)), Ok(Receipt::Done(0)));
        let mut other = start(ID);
        if let BuildChange::Start(build) = &mut other {
            build.spec.recipe = vec!["RUN true".into()];
        }
        let refused = change(&mut state, 3, other);
        assert!(matches!(refused, Err(Refusal::IdTaken(_))), "{refused:?}");
    }

    #[test]
    fn only_the_present_attempt_is_heard() {
        let mut state = state();
        change(&mut state, 1, start(ID)).expect("started");
        change(&mut state, 2, claim(0, ONE)).expect("claimed");
        change(&mut state, 3, progress(1, b"one\n")).expect("heard");
        change(&mut state, 4, claim(1, ONE)).expect("begun anew");
        let stale = change(&mut state, 5, progress(1, b"stale\n"));
        assert!(matches!(stale, Err(Refusal::Unfit(_))), "{stale:?}");
        change(&mut state, 6, end(ID, 1)).expect_err("of the first attempt");
        change(&mut state, 7, end(ID, 2)).expect("of the second");
        assert_eq!(state.build_log(ID, 0), Some(&b"one\n"[..]));
        assert_eq!(state.build_log(ID, 1), Some(&b"end\n"[..]));
        let build = state.build(ID).expect("a build");
        assert_eq!(build.status, BuildStatus::Success);
        assert_eq!(build.completed_at, Some(Stamp(7)));
    }

    #[test]
    fn another_node_takes_a_build_up_only_where_its_owner_is_away() {
        let mut state = state();
        change(&mut state, 1, start(ID)).expect("started");
        change(&mut state, 2, claim(0, ONE)).expect("claimed");
        change(&mut state, 3, claim(1, TWO)).expect_err("its owner is there");
        let away = Liveness::Missing { since: Stamp(3) };
        let owner = state.node(ONE).expect("a node").clone();
        state.put_node(Node {
            liveness: away,
            ..owner
        });
        change(&mut state, 4, claim(1, TWO)).expect("its owner is away");
        change(&mut state, 5, claim(1, TWO)).expect_err("taken already");
        assert_eq!(state.build(ID).map(|it| it.owner), Some(TWO));
    }

    #[test]
    fn a_log_has_a_bound_and_so_has_what_is_remembered() {
        let mut state = state();
        change(&mut state, 1, start(ID)).expect("started");
        change(&mut state, 2, claim(0, ONE)).expect("claimed");
        let half = vec![b'x'; usize::try_from(Build::LOG_BYTES / 2).expect("small") + 1];
        change(&mut state, 3, progress(1, &half)).expect("heard");
        change(&mut state, 4, progress(1, &half)).expect("heard, and left out");
        assert_eq!(state.build(ID).map(|it| it.log_pieces), Some(1));
        change(&mut state, 5, end(ID, 1)).expect("ended");

        for number in 0..=u8::try_from(Build::KEPT).expect("few") {
            let id = BuildId([100 + number; 16]);
            change(&mut state, 10 + u64::from(number), start(id)).expect("started");
            change(&mut state, 10 + u64::from(number), BuildChange::Cancel(id)).expect("ended");
        }
        assert!(state.build(ID).is_none(), "the oldest is forgotten");
        assert_eq!(state.build_log(ID, 0), None);
        assert!(state.builds().count() <= Build::KEPT + 1);
    }

    #[test]
    fn one_team_has_a_limited_number_of_builds_under_way() {
        let mut state = state();
        for number in 0..u8::try_from(Build::OPEN_PER_TEAM).expect("few") {
            let id = BuildId([100 + number; 16]);
            change(&mut state, 1, start(id)).expect("started");
        }
        change(&mut state, 2, start(ID)).expect_err("one too many");
        change(&mut state, 3, BuildChange::Cancel(BuildId([100; 16]))).expect("called off");
        change(&mut state, 4, start(ID)).expect("room again");
    }
}
