//! One attempt at a build: a capsule, the steps in it, and the name it gets.
//!
//! ```text
//! where to begin > capsule > archive, if a step takes files > steps, outcomes kept on the way
//!   > defaults told to the agent > healthy > sealed under the name that was asked for
//! ```
//!
//! What the recipe does wrong fails the build; what breaks otherwise ends the attempt, and another one
//! goes on from the last outcome that was kept. The capsule is stopped by the entry that ends the
//! attempt, whatever that is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use raft::state::{Build, SnapshotKind, State};
use tokio::fs::File;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::io::ReaderStream;
use tracing::info;

use super::around::{Around, parse_env};
use super::capsule::{Capsule, NoCapsule, result_ask};
use super::journal::Journal;
use super::start::{self, Known, Start};
use super::{Stop, kind, steps};
use crate::base::chain::chain;
use crate::cluster::Proposer;
use crate::guest::{
    Defaults, EventStream, GuestCode, GuestError, ProcessCommand, ProcessEvent, RunOutput,
};
use crate::relay::Relay;
use crate::template::health::HealthCheck;
use crate::template::log::{Kind, Output};
use crate::template::plan::{self, Key, Step};
use crate::template::recipe::Directive;

/// How often what a step writes is told. Each telling is an entry of the cluster's log.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// Tellings between two signs that the capsule is in use.
const TOUCH_EVERY: u32 = 20;
/// Outcomes are kept once the steps since the last one took this long: below it, doing them again costs
/// less than a seal, which writes all of the guest's memory.
const WORTH_KEEPING: Duration = Duration::from_secs(2);
/// Longest the small commands of our own may take.
const SMALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest files may take to be unpacked or copied.
const FILES_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest a root file system may take to be unpacked: tens of thousands of files on an emulated disk.
const IMPORT_TIMEOUT: Duration = Duration::from_secs(900);
/// Longest a `START` may take to begin.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How much later than a command's own deadline its guest may say so.
const GRACE: Duration = Duration::from_secs(15);
/// Bytes of the archive sent at once.
const SEND_BYTES: usize = 64 << 10;

/// What an attempt needs of its node.
pub(super) struct Means {
    pub(super) proposer: Proposer,
    pub(super) relay: Relay,
    /// The build's archive, if it lies here.
    pub(super) archive: Option<PathBuf>,
}

/// What a build has made.
pub(super) struct Made {
    pub(super) default_user: String,
    pub(super) default_env: BTreeMap<String, String>,
    /// Lines that were not told yet.
    pub(super) log: Vec<u8>,
}

/// An attempt under way.
pub(super) struct Attempt {
    build: Build,
    means: Means,
    steps: Vec<Step>,
    keys: Vec<Key>,
    capsule: Capsule,
    journal: Journal,
    around: Around,
    kind: SnapshotKind,
    /// When the last outcome was kept, or the first step began.
    kept_at: Instant,
}

/// Whether the template of `build` is there already: it was named, and its owner died before it could
/// say so.
pub(super) fn is_made(state: &State, build: &Build) -> bool {
    let name = &build.spec.name;
    let named = state.named(build.team, name);
    named.is_some_and(|it| it.ask == result_ask(build.id, name))
}

impl Attempt {
    /// The present attempt at `build`.
    pub(super) fn new(build: Build, means: Means) -> Result<Self, Stop> {
        let spec = &build.spec;
        let steps = plan::steps(&spec.recipe, &spec.files, spec.skip_pre_post)
            .map_err(|err| Stop::Failed(err.to_string()))?;
        let state = means.proposer.view().state();
        let keys = start::keys(&state, &build, &steps)?;
        let capsule = Capsule::of(&build, means.proposer.clone(), means.relay.clone());
        let journal = Journal::new(means.proposer.clone(), build.id, build.attempt);
        let kind = kind::kind(&build.spec, state.nodes());
        Ok(Self {
            build,
            means,
            steps,
            keys,
            capsule,
            journal,
            around: Around::default(),
            kind,
            kept_at: Instant::now(),
        })
    }

    /// Lines that were not told yet.
    pub(super) fn take_lines(&mut self) -> Vec<u8> {
        self.journal.take_lines()
    }

    /// Goes from the beginning to the name.
    pub(super) async fn run(&mut self) -> Result<Made, Stop> {
        let begun = self.begin().await?;
        self.bring_files(&begun).await?;
        self.kept_at = Instant::now();
        for at in begun.done..self.steps.len() {
            self.step(at).await?;
            if at + 1 < self.steps.len() && self.kept_at.elapsed() >= WORTH_KEEPING {
                self.keep(at).await?;
            }
        }
        let default_env = self.settle().await?;
        self.await_health().await?;
        self.name_it().await?;
        Ok(Made {
            default_user: self.around.user.clone(),
            default_env,
            log: self.journal.take_lines(),
        })
    }

    /// Starts the capsule from as far on as it can be.
    async fn begin(&mut self) -> Result<Start, Stop> {
        let state = self.means.proposer.view().state();
        let known = Known {
            state: &state,
            build: &self.build,
            steps: &self.steps,
            keys: &self.keys,
            has_archive: self.means.archive.is_some(),
        };
        let lost = "the archive with this build's files was lost with the host that had it: \
                    start the build again";
        let mut start = start::choose(known).ok_or_else(|| Stop::Failed(lost.into()))?;
        self.journal.built_in(self.capsule.id);
        self.journal.flush().await?;
        let mut started = self.capsule.start(&self.build, start.from.as_ref()).await;
        if let (Err(NoCapsule::NoRoom(why)), Some(_)) = (&started, &start.from) {
            self.journal
                .note(format!("nothing that was kept can be used: {why}"));
            start = start::at_base();
            started = self.capsule.start(&self.build, None).await;
        }
        started.map_err(|err| match err {
            NoCapsule::NoRoom(why) => Stop::Failed(why),
            NoCapsule::Stop(stop) => stop,
        })?;
        info!(build = %self.build.id, done = start.done, "an attempt has its capsule");
        self.tell_cached(start.done);
        match &start.around {
            Some(around) => self.around = around.clone(),
            None => self.around.own = self.environment().await?,
        }
        Ok(start)
    }

    fn tell_cached(&mut self, done: usize) {
        for at in 0..done {
            self.at(at);
            let text = self.steps[at].line.text.clone();
            self.journal.line(Kind::Cached, text);
        }
    }

    /// The step `at` is under way.
    fn at(&mut self, at: usize) {
        let number = u32::try_from(at + 1).unwrap_or(u32::MAX);
        self.journal.at(self.steps[at].part.name(), number);
    }

    /// Brings the archive into the guest, if a step that is left takes files along.
    async fn bring_files(&mut self, begun: &Start) -> Result<(), Stop> {
        let left = &self.steps[begun.done..];
        if begun.has_archive || !left.iter().any(Step::takes_files) {
            return Ok(());
        }
        let Some(archive) = self.means.archive.clone() else {
            let lost = "the archive with this build's files is not on this host: start it again";
            return Err(Stop::Failed(lost.into()));
        };
        let file = File::open(&archive).await;
        let file = file.map_err(|err| Stop::Broke(format!("open the build's archive: {err}")))?;
        let contents = ReaderStream::with_capacity(file, SEND_BYTES);
        let is_root = left.iter().any(Step::imports);
        let to = if is_root {
            steps::IMPORT_ARCHIVE
        } else {
            steps::ARCHIVE
        };
        let sent = self.capsule.guest().await?;
        let sent = sent.write_file(to, contents).await;
        sent.map_err(|err| refused("bring the files into the capsule", &err))?;
        if !is_root {
            let unpacked = self.quiet(steps::unpack(), FILES_TIMEOUT).await?;
            expect_ok("unpack the files", &unpacked)?;
        }
        let nodes = self.means.proposer.view().state().nodes().count();
        if nodes > 1 {
            // Otherwise they would be lost with this node.
            let name = Build::context_name(self.build.id);
            self.keep_as(&name, begun.done).await?;
        }
        Ok(())
    }

    /// Does one step.
    async fn step(&mut self, at: usize) -> Result<(), Stop> {
        self.at(at);
        let step = self.steps[at].clone();
        self.journal.line(Kind::Begin, step.line.text.clone());
        self.journal.flush().await?;
        let began = Instant::now();
        let done = self.carry_out(&step).await;
        let exit = match &done {
            Ok(exit) => *exit,
            Err(Stop::Failed(why)) => {
                self.journal.line(Kind::Stderr, format!("{why}\n"));
                -1
            }
            Err(_) => -1,
        };
        self.journal.end(exit, began.elapsed());
        let number = at + 1;
        let (part, text) = (step.part.name(), &step.line.text);
        match done {
            Ok(0) => Ok(()),
            Ok(exit) => Err(Stop::Failed(format!(
                "step {number} ({part}: {text}) ended with exit code {exit}"
            ))),
            Err(Stop::Failed(why)) => Err(Stop::Failed(format!(
                "step {number} ({part}: {text}): {why}"
            ))),
            Err(stop) => Err(stop),
        }
    }

    /// What a step does; its exit code.
    async fn carry_out(&mut self, step: &Step) -> Result<i32, Stop> {
        match &step.line.directive {
            Directive::Run { command, timeout } => {
                let command = steps::run(&self.around, command, step.as_root());
                self.watched(command, *timeout).await
            }
            Directive::Start { command } => self.launch(command).await,
            Directive::Env { name, value } => {
                self.around.set(name, value);
                Ok(0)
            }
            Directive::Workdir { path } => {
                let path = self.around.absolute(path);
                let made = self.quiet(steps::make_dir(&path), SMALL_TIMEOUT).await?;
                self.tell_complaints(&made);
                self.around.workdir = Some(last_line(&made.stdout).unwrap_or(path));
                Ok(made.exit_code)
            }
            Directive::User { name } => {
                let made = self.quiet(steps::make_user(name), SMALL_TIMEOUT).await?;
                let home = last_line(&made.stdout).unwrap_or_else(|| "/".into());
                self.tell_complaints(&made);
                self.around.become_user(name, &home);
                Ok(made.exit_code)
            }
            Directive::Import { user } => self.import(user.as_deref()).await,
            Directive::Copy {
                sources,
                destination,
            } => {
                let copy = steps::copy(&self.around, sources, destination);
                self.watched(copy, FILES_TIMEOUT).await
            }
        }
    }

    /// Has the root file system that was brought in take the place of the guest's; everything is as in a
    /// guest that has just started from it.
    async fn import(&mut self, user: Option<&str>) -> Result<i32, Stop> {
        let exit = self.watched(steps::unpack_root(), IMPORT_TIMEOUT).await?;
        if exit != 0 {
            return Ok(exit);
        }
        let guest = self.capsule.guest().await?;
        let adopted = guest.adopt_root(steps::IMPORT).await;
        adopted.map_err(|err| refused("change to the root file system", &err))?;
        self.around = Around::default();
        self.around.own = self.environment().await?;
        let Some(user) = user else {
            return Ok(0);
        };
        let found = self.quiet(steps::find_user(user), SMALL_TIMEOUT).await?;
        self.tell_complaints(&found);
        let said = String::from_utf8_lossy(&found.stdout);
        if let Some((name, home)) = said.trim_end().split_once('\n') {
            self.around.become_user(name, home);
        }
        Ok(found.exit_code)
    }

    /// Starts something that goes on.
    async fn launch(&mut self, command: &str) -> Result<i32, Stop> {
        let command = steps::start(&self.around, command);
        let guest = self.capsule.guest().await?;
        let begun = async {
            let mut events = guest.start(command, None).await?;
            loop {
                match events.next().await? {
                    Some(ProcessEvent::Start { .. }) => return Ok(0),
                    Some(ProcessEvent::End { exit_code }) => return Ok(exit_code),
                    Some(_) => {}
                    None => return Err(GuestError::Nonsense("it did not begin".into())),
                }
            }
        };
        let begun = time::timeout(LAUNCH_TIMEOUT, begun).await;
        let late = || Stop::Failed(format!("it did not begin within {LAUNCH_TIMEOUT:?}"));
        begun
            .map_err(|_| late())?
            .map_err(|err| refused("start it", &err))
    }

    /// Runs a command whose output is told while it runs; its exit code.
    async fn watched(&mut self, command: ProcessCommand, timeout: Duration) -> Result<i32, Stop> {
        let guest = self.capsule.guest().await?;
        let deadline = Instant::now() + timeout + GRACE;
        let events = guest.start(command, Some(timeout)).await;
        let events = events.map_err(|err| refused("start it", &err))?;
        let mut output = Output::default();
        let mut ticks = time::interval(TELL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticked = 0;
        let mut coming = Box::pin(next(events));
        loop {
            tokio::select! {
                (event, events) = &mut coming => match self.heard(event, &mut output, timeout)? {
                    Some(exit) => return Ok(exit),
                    None => coming = Box::pin(next(events)),
                },
                _ = ticks.tick() => {
                    self.journal.flush().await?;
                    if ticked % TOUCH_EVERY == 0 {
                        self.capsule.touch();
                    }
                    ticked += 1;
                }
                () = time::sleep_until(deadline) => {
                    return Err(Stop::Broke("the guest no longer answers".into()));
                }
            }
            if self.journal.is_full() {
                self.journal.flush().await?;
            }
        }
    }

    /// Takes an event of a command in; its exit code, if that was the end.
    fn heard(
        &mut self,
        event: Result<Option<ProcessEvent>, GuestError>,
        output: &mut Output,
        timeout: Duration,
    ) -> Result<Option<i32>, Stop> {
        let (is_stderr, bytes) = match event {
            Ok(Some(ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes))) => (false, bytes),
            Ok(Some(ProcessEvent::Stderr(bytes))) => (true, bytes),
            Ok(Some(ProcessEvent::Start { .. } | ProcessEvent::KeepAlive)) => return Ok(None),
            Ok(Some(ProcessEvent::End { exit_code })) => {
                self.tell_rest(output);
                return Ok(Some(exit_code));
            }
            Ok(None) => return Err(Stop::Broke("the guest broke off the command".into())),
            Err(err) => {
                self.tell_rest(output);
                return Err(timed_out(&err, timeout).unwrap_or_else(|| refused("run it", &err)));
            }
        };
        let kind = if is_stderr {
            Kind::Stderr
        } else {
            Kind::Stdout
        };
        if let Some(text) = output.take(is_stderr, &bytes) {
            self.journal.line(kind, text);
        }
        Ok(None)
    }

    fn tell_rest(&mut self, output: &Output) {
        if let Some(rest) = output.rest() {
            self.journal.line(Kind::Stdout, rest);
        }
    }

    /// Runs a small command of ours.
    async fn quiet(&self, command: ProcessCommand, timeout: Duration) -> Result<RunOutput, Stop> {
        let guest = self.capsule.guest().await?;
        let ran = guest.run(command, Some(timeout)).await;
        ran.map_err(|err| timed_out(&err, timeout).unwrap_or_else(|| refused("run it", &err)))
    }

    /// What a small command of ours wrote to its standard error.
    fn tell_complaints(&mut self, ran: &RunOutput) {
        if !ran.stderr.is_empty() {
            let text = String::from_utf8_lossy(&ran.stderr).into_owned();
            self.journal.line(Kind::Stderr, text);
        }
    }

    /// Keeps the outcome of step `at` for attempts and builds to come.
    async fn keep(&mut self, at: usize) -> Result<(), Stop> {
        let name = start::step_name(&self.keys[at]);
        self.keep_as(&name, at + 1).await
    }

    async fn keep_as(&mut self, name: &str, done: usize) -> Result<(), Stop> {
        self.journal.flush().await?;
        let labels = start::labels(self.build.id, done, &self.around);
        let what = (SnapshotKind::Snapshot, name);
        if let Err(why) = self.capsule.seal(what, true, labels).await? {
            // It is done again where it is needed, no more.
            self.journal.note(format!("could not be kept: {why}"));
        }
        self.kept_at = Instant::now();
        Ok(())
    }

    /// Removes what the build has brought in, and tells the agent what every capsule of this template
    /// has: its user, directory and environment. Returns the environment.
    async fn settle(&mut self) -> Result<BTreeMap<String, String>, Stop> {
        self.journal.at("settling", self.build.spec.total_steps);
        let tidied = self.quiet(steps::tidy(), SMALL_TIMEOUT).await?;
        expect_ok("remove the files of the build", &tidied)?;
        let seen = self.environment().await?;
        let env = Around::carried_on(seen);
        let defaults = Defaults {
            user: self.around.user.clone(),
            workdir: self.around.workdir.clone(),
            env: env.clone(),
        };
        let guest = self.capsule.guest().await?;
        let told = guest.set_defaults(&defaults).await;
        told.map_err(|err| refused("tell the agent of user and environment", &err))?;
        if self.kind == SnapshotKind::Base {
            let kept = guest.keep_defaults(&defaults).await;
            kept.map_err(|err| refused("keep user and environment on the disk", &err))?;
        }
        Ok(env)
    }

    /// The environment of a process in the guest.
    async fn environment(&self) -> Result<BTreeMap<String, String>, Stop> {
        let asked = steps::environment(&self.around.user, &self.around.env);
        let written = self.quiet(asked, SMALL_TIMEOUT).await?;
        expect_ok("ask for the environment", &written)?;
        Ok(parse_env(&written.stdout))
    }

    /// Waits until the health check says yes, if there is one.
    async fn await_health(&mut self) -> Result<(), Stop> {
        if self.build.spec.healthcheck.is_empty() {
            return Ok(());
        }
        let check = HealthCheck::parse(&self.build.spec.healthcheck);
        let check = check.map_err(|err| Stop::Failed(err.to_string()))?;
        self.journal.at("health check", self.build.spec.total_steps);
        self.journal
            .note(format!("waiting until {:?} says yes", check.command));
        let began = Instant::now();
        loop {
            self.journal.flush().await?;
            self.capsule.touch();
            let command = steps::run(&self.around, &check.command, false);
            let tried = match self.quiet(command, check.timeout).await {
                Ok(ran) if ran.exit_code == 0 => break,
                Ok(ran) => outcome(&ran),
                Err(Stop::Failed(why)) => why,
                Err(stop) => return Err(stop),
            };
            let patience = check.patience();
            if patience.is_some_and(|it| began.elapsed() + check.interval > it) {
                let waited = began.elapsed().as_secs();
                let why = format!("the health check did not pass within {waited} s: {tried}");
                return Err(Stop::Failed(why));
            }
            time::sleep(check.interval).await;
        }
        self.journal
            .note(format!("healthy after {} s", began.elapsed().as_secs()));
        Ok(())
    }

    /// Seals the capsule under the name that was asked for.
    async fn name_it(&mut self) -> Result<(), Stop> {
        self.journal.at("sealing", self.build.spec.total_steps);
        self.journal.flush().await?;
        let (name, overwrite) = (self.build.spec.name.clone(), self.build.spec.overwrite);
        let kind = self.kind;
        let what = (kind, name.as_str());
        let sealed = self.capsule.seal(what, overwrite, BTreeMap::new()).await?;
        sealed.map_err(|why| Stop::Failed(format!("the template could not be made: {why}")))?;
        let state = self.means.proposer.view().state();
        let made = state.named(self.build.team, &name);
        let made = made.map_or(kind, |it| it.kind).word();
        self.journal
            .note(format!("the template {name:?} is there ({made})"));
        if self.kind == SnapshotKind::Base {
            for lack in kind::lacks(&self.steps, self.around.cwd()) {
                self.journal.note(lack);
            }
        }
        Ok(())
    }
}

/// The next event; the stream comes along, so that waiting may be cut and gone on with.
async fn next(mut events: EventStream) -> (Result<Option<ProcessEvent>, GuestError>, EventStream) {
    let event = events.next().await;
    (event, events)
}

/// The last line of an output, if there is one.
fn last_line(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let line = text.trim_end().lines().next_back()?;
    (!line.is_empty()).then(|| line.to_owned())
}

fn expect_ok(what: &str, ran: &RunOutput) -> Result<(), Stop> {
    if ran.exit_code == 0 {
        return Ok(());
    }
    Err(Stop::Failed(format!("could not {what}: {}", outcome(ran))))
}

/// How a small command ended, with the last it said.
fn outcome(ran: &RunOutput) -> String {
    let said = last_line(&ran.stderr).or_else(|| last_line(&ran.stdout));
    let said = said.map(|line| format!(" ({line})")).unwrap_or_default();
    format!("exit code {}{said}", ran.exit_code)
}

fn timed_out(err: &GuestError, timeout: Duration) -> Option<Stop> {
    let is_late = matches!(
        err,
        GuestError::Refused {
            code: GuestCode::DeadlineExceeded,
            ..
        }
    );
    is_late.then(|| {
        Stop::Failed(format!(
            "it ran past its timeout of {timeout:?} and was killed"
        ))
    })
}

/// What a guest refuses is the recipe's fault; that it cannot be reached is nobody's.
fn refused(what: &str, err: &GuestError) -> Stop {
    match err {
        GuestError::Refused { message, .. } => Stop::Failed(format!("could not {what}: {message}")),
        err => Stop::Broke(format!("{what}: {}", chain(err))),
    }
}
