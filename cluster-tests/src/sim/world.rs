//! The event queue, the machines and what befalls them.

mod clients;
mod judge;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use node::cluster::lease::LeaseTimes;
use proto::ids::{NodeId, NodeKey, TokenId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Proposal};
use raft::state::{Node, Resources, Template, Token};

use super::Ms;
use super::bugs::Bug;
use super::daemon::{Context, Daemon, Mail};
use super::faults::{Fault, Net};
use super::host::Body;
use super::log::{self, Disk, Entry, Members};
use super::oracle::{Oracle, Promise};
use super::rng::Rng;

/// How often a daemon looks at its timers.
const TICK: Ms = 100;
/// How long a client waits before it asks another node.
const CLIENT_PATIENCE: Ms = 2000;
/// The longest time a shim's look is late: nearly what freeze-ahead and margin cover together.
const STALL: Ms = 950;
/// Lines of history that a violation shows.
const NOTES: usize = 60;

/// What one simulation is made of.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Decides everything that chance decides.
    pub seed: u64,
    /// How many nodes there are.
    pub nodes: u64,
    /// The rule that is broken, if one is.
    pub bug: Option<Bug>,
    /// For how many seconds faults fall.
    pub faults_s: u64,
    /// How many seconds there are to come to rest.
    pub rest_s: u64,
    /// How many learners there may be.
    pub max_learners: usize,
    /// By how many millionths a clock may run wrong, either way.
    pub drift_ppm: u32,
    /// The lease's grace; `None` lets chance choose.
    pub grace_s: Option<u64>,
    /// Whether nodes ask before a guest begins; one in four is of a release that does not, anyway.
    pub asks: bool,
}

/// What a simulation that went well went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events handled.
    pub events: u64,
    /// Entries committed.
    pub committed: u64,
    /// Writes acknowledged to clients.
    pub acknowledged: usize,
    /// How often ownership was given out again.
    pub moved: usize,
    /// Voters, learners and mirrors at the end.
    pub members: (usize, usize, usize),
}

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Replays it.
    pub seed: u64,
    /// True time at which it showed.
    pub at: Duration,
    /// What was broken.
    pub what: String,
    /// The last things that happened.
    pub notes: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} at {:?}: {}", self.seed, self.at, self.what)?;
        for note in &self.notes {
            writeln!(f, "  {note}")?;
        }
        write!(f, "replay with WRENN_SEED={}", self.seed)
    }
}

#[derive(Debug)]
enum Event {
    Tick(NodeId, u64),
    Watch(NodeId, u64),
    Mail(NodeId, NodeId, Box<Mail>),
    Start(NodeId),
    Client,
    Retry(u64),
    Fault,
}

/// A machine and the daemon on it, if one runs.
#[derive(Debug)]
struct Machine {
    body: Body,
    disk: Disk,
    daemon: Option<Daemon>,
    is_up: bool,
    paused_until: Ms,
    /// Counts starts and boots: events of an earlier run mean nothing.
    run: u64,
}

/// What a client asked and has no answer to yet.
#[derive(Clone, Debug)]
struct Pending {
    command: Command,
    promise: Promise,
}

struct World {
    setup: Setup,
    now: Ms,
    faults_end: Ms,
    queue: BTreeMap<(Ms, u64), Event>,
    serial: u64,
    rng: Rng,
    net: Net,
    times: LeaseTimes,
    machines: BTreeMap<NodeId, Machine>,
    oracle: Oracle,
    pending: BTreeMap<u64, Pending>,
    requests: u64,
    notes: VecDeque<String>,
    summary: Summary,
}

/// Runs one simulation to its end.
///
/// # Errors
/// The first [`Violation`].
pub fn run(setup: Setup) -> Result<Summary, Violation> {
    let mut world = World::new(setup);
    world.found();
    let end = world.faults_end + setup.rest_s * 1000;
    while let Some(((at, _), event)) = world.queue.pop_first() {
        if at > end {
            break;
        }
        world.now = at;
        world.summary.events += 1;
        world.handle(event);
        world.verdict()?;
    }
    world.now = end;
    world.check_rest();
    world.oracle.check_promises();
    world.verdict()?;
    Ok(world.summary())
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut rng = Rng::new(setup.seed);
        let drawn = *rng.pick(&[0, 0, 2, 8]);
        let grace = Duration::from_secs(setup.grace_s.unwrap_or(drawn));
        let times = LeaseTimes::new(Duration::from_secs(4), grace).unwrap_or_default();
        Self {
            setup,
            now: 0,
            faults_end: setup.faults_s * 1000,
            queue: BTreeMap::new(),
            serial: 0,
            rng,
            net: Net::default(),
            times,
            machines: BTreeMap::new(),
            oracle: Oracle::new(setup.bug),
            pending: BTreeMap::new(),
            requests: 0,
            notes: VecDeque::new(),
            summary: Summary::default(),
        }
    }

    /// A cluster of one that everybody else has just been let into.
    fn found(&mut self) {
        let token = TokenId([1; 16]);
        let first = NodeId(1);
        let mut commands = vec![
            Command::AdmitNode(self.record(first, 1)),
            Command::PutTemplate(template()),
            Command::PutToken(Token {
                id: token,
                uses_left: u32::try_from(self.setup.nodes).unwrap_or(u32::MAX),
                expires_at: Stamp(u64::MAX),
                public_key: [0; 32],
                team: None,
                created_at: Stamp(0),
                created_by: String::new(),
                revoked: false,
                redeemed: Vec::new(),
            }),
        ];
        for number in 2..=self.setup.nodes {
            let id = NodeId(commands.len() as u64 + 1);
            let node = self.record(id, number);
            commands.push(Command::RedeemToken { token, node });
        }
        let entry = |body| Rc::new(Entry { term: 0, body });
        let at = Stamp(0);
        let proposal = |command| entry(log::Body::Command(Box::new(Proposal { at, command })));
        let mut entries: Vec<Rc<Entry>> = commands.into_iter().map(proposal).collect();
        let voters = [first].into();
        entries.push(entry(log::Body::Members(Members {
            voters,
            ..Members::default()
        })));
        for (index, entry) in (1..).zip(&entries) {
            self.oracle.commit(first, index, entry);
        }
        let disk = Disk {
            commit: entries.len() as u64,
            entries,
            ..Disk::default()
        };
        let nodes: Vec<Node> = self.oracle.newest().nodes().cloned().collect();
        for record in nodes {
            self.install(record, disk.clone());
        }
        self.after(1, Event::Client);
        if self.setup.faults_s > 0 {
            self.after(8000, Event::Fault);
        }
    }

    fn record(&self, id: NodeId, number: u64) -> Node {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        Node {
            id,
            name: format!("n{number}"),
            key: NodeKey(key),
            capacity: Resources {
                vcpus: 16,
                memory: Mib(2048),
                disk: Mib(100_000),
                sandboxes: 8,
            },
            templates: BTreeMap::from([(template().name, template().digest)]),
            asks_first: self.setup.asks && !number.is_multiple_of(4),
            ..Node::default()
        }
    }

    fn install(&mut self, record: Node, disk: Disk) {
        let id = record.id;
        self.oracle.capacity.insert(id, record.capacity);
        let drift = u64::from(self.setup.drift_ppm);
        let body = Body {
            record,
            ahead: self.rng.within(0, 1_000_000),
            drift_ppm: i64::try_from(self.rng.within(0, 2 * drift)).unwrap_or(0)
                - i64::from(self.setup.drift_ppm),
            guests: BTreeMap::new(),
            lease: None,
        };
        let machine = Machine {
            body,
            disk,
            daemon: None,
            is_up: true,
            paused_until: 0,
            run: 0,
        };
        self.machines.insert(id, machine);
        self.start(id);
        self.after(1, Event::Watch(id, 1));
    }

    fn after(&mut self, wait: Ms, event: Event) {
        self.serial += 1;
        self.queue.insert((self.now + wait, self.serial), event);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick(id, run) => self.tick(id, run),
            Event::Watch(id, run) => self.watch(id, run),
            Event::Mail(from, to, mail) => self.deliver(from, to, mail),
            Event::Start(id) => self.start(id),
            Event::Client => self.client(),
            Event::Retry(request) => self.retry(request),
            Event::Fault => self.fault(),
        }
    }

    /// Lets a daemon do something and carries away what came of it.
    fn with<T>(
        &mut self,
        id: NodeId,
        act: impl FnOnce(&mut Option<Daemon>, &mut Context<'_>) -> T,
    ) -> Option<T> {
        let machine = self.machines.get_mut(&id)?;
        let mut context = Context {
            now: self.now,
            bug: self.setup.bug,
            times: self.times,
            max_learners: self.setup.max_learners,
            rng: &mut self.rng,
            oracle: &mut self.oracle,
            body: &mut machine.body,
            out: Vec::new(),
            done: Vec::new(),
            notes: Vec::new(),
        };
        let result = act(&mut machine.daemon, &mut context);
        let Context {
            out, done, notes, ..
        } = context;
        for (to, mail) in out {
            self.send(id, to, mail);
        }
        for (request, answer) in done {
            self.answered(request, answer);
        }
        for note in notes {
            self.note(note);
        }
        Some(result)
    }

    fn send(&mut self, from: NodeId, to: NodeId, mail: Mail) {
        let mail = if self.net.starves(to, self.now) {
            mail.without_entries()
        } else {
            mail
        };
        if let Some(wait) = self.net.carry(&mut self.rng, self.now, from, to) {
            self.after(wait, Event::Mail(from, to, Box::new(mail)));
        }
    }

    fn tick(&mut self, id: NodeId, run: u64) {
        let Some(machine) = self
            .machines
            .get(&id)
            .filter(|it| it.run == run && it.is_up)
        else {
            return;
        };
        if self.now < machine.paused_until {
            let wait = machine.paused_until - self.now;
            return self.after(wait, Event::Tick(id, run));
        }
        self.with(id, |daemon, context| {
            if let Some(daemon) = daemon {
                daemon.tick(context);
            }
        });
        // Mirrors and learners of a large cluster have little to do.
        let slow = if self.setup.nodes > 50 { 5 } else { 1 };
        let wait = self.rng.within(TICK * slow * 9 / 10, TICK * slow * 11 / 10);
        self.after(wait, Event::Tick(id, run));
        self.check_guests(id);
    }

    /// The shims of a machine look at their lease and their guests, now and then late.
    fn watch(&mut self, id: NodeId, run: u64) {
        let (now, times, bug) = (self.now, self.times, self.setup.bug);
        let Some(machine) = self
            .machines
            .get_mut(&id)
            .filter(|it| it.run >= run && it.is_up)
        else {
            return;
        };
        machine.body.watch(now, times, bug);
        machine.body.progress(now);
        let wait = if self.rng.chance(100) {
            self.rng.within(TICK, STALL)
        } else {
            TICK
        };
        let wait = if self.setup.nodes > 50 { 1000 } else { wait };
        self.after(wait, Event::Watch(id, run));
        self.check_guests(id);
    }

    fn deliver(&mut self, from: NodeId, to: NodeId, mail: Box<Mail>) {
        let Some(machine) = self
            .machines
            .get(&to)
            .filter(|it| it.is_up && it.daemon.is_some())
        else {
            return;
        };
        if self.now < machine.paused_until {
            // It lies in the socket's buffer.
            let wait = machine.paused_until - self.now;
            return self.after(wait, Event::Mail(from, to, mail));
        }
        self.with(to, |daemon, context| {
            if let Some(daemon) = daemon {
                daemon.receive(from, *mail, context);
            }
        });
    }

    fn start(&mut self, id: NodeId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        if machine.daemon.is_some() {
            return;
        }
        if !machine.is_up {
            machine.is_up = true;
            machine.run += 1;
            let run = machine.run + 1;
            self.after(1, Event::Watch(id, run));
        }
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.run += 1;
        let run = machine.run;
        let disk = std::mem::take(&mut machine.disk);
        self.with(id, |daemon, context| {
            *daemon = Some(Daemon::start(id, disk, context))
        });
        self.after(1, Event::Tick(id, run));
    }

    /// Stops a daemon; its disk stays.
    fn stop(&mut self, id: NodeId) {
        if let Some(machine) = self.machines.get_mut(&id)
            && let Some(daemon) = machine.daemon.take()
        {
            machine.disk = daemon.replica.disk;
            machine.paused_until = 0;
        }
    }

    fn fault(&mut self) {
        if self.now >= self.faults_end {
            self.net.heal();
            for machine in self.machines.values_mut() {
                machine.paused_until = machine.paused_until.min(self.now);
            }
            return self.note("the faults stop".into());
        }
        let nodes: Vec<NodeId> = self.machines.keys().copied().collect();
        let fault = Fault::any(&mut self.rng, &nodes, self.setup.bug);
        self.note(format!("{fault:?}"));
        self.net.break_by(&fault, self.now);
        match fault {
            Fault::Crash(id, wait) => {
                self.stop(id);
                self.restart(id, wait);
            }
            Fault::LoseHost(id, wait) => {
                self.lose(id);
                self.restart(id, wait);
            }
            Fault::Wipe(id, wait) => {
                self.lose(id);
                if let Some(machine) = self.machines.get_mut(&id) {
                    machine.disk = Disk::default();
                }
                self.restart(id, wait);
            }
            Fault::Pause(id, wait) | Fault::Break(id, wait) => {
                if let Some(machine) = self.machines.get_mut(&id) {
                    machine.paused_until = self.now + wait;
                    if matches!(fault, Fault::Break(..)) {
                        machine.body.break_guests();
                    }
                }
            }
            Fault::Cut(..)
            | Fault::Fade(..)
            | Fault::Slow(..)
            | Fault::Starve(..)
            | Fault::Loss(..) => {}
        }
        let wait = self.rng.within(500, 6000).min(self.faults_end - self.now);
        self.after(wait.max(1), Event::Fault);
    }

    fn restart(&mut self, id: NodeId, wait: Ms) {
        let latest = self.faults_end.saturating_sub(self.now).max(1);
        self.after(wait.min(latest), Event::Start(id));
    }

    /// A machine loses its power.
    fn lose(&mut self, id: NodeId) {
        self.stop(id);
        if let Some(machine) = self.machines.get_mut(&id) {
            machine.is_up = false;
            machine.body.guests.clear();
            machine.body.lease = None;
        }
    }

    fn note(&mut self, note: String) {
        if self.notes.len() == NOTES {
            self.notes.pop_front();
        }
        let at = Duration::from_millis(self.now);
        self.notes.push_back(format!("{at:?} {note}"));
    }

    fn verdict(&mut self) -> Result<(), Violation> {
        let Some(what) = self.oracle.violation.take() else {
            return Ok(());
        };
        Err(Violation {
            seed: self.setup.seed,
            at: Duration::from_millis(self.now),
            what,
            notes: self.notes.drain(..).collect(),
        })
    }

    fn summary(&self) -> Summary {
        let state = self.oracle.newest();
        let created = |index: u64| self.oracle.state(index);
        let moved = state.sandboxes().filter(|it| {
            created(it.epoch.0.saturating_sub(1))
                .sandbox(it.id)
                .is_some()
        });
        Summary {
            committed: self.oracle.committed(),
            acknowledged: self.oracle.promises.len(),
            moved: moved.count(),
            ..self.summary
        }
    }
}

pub(crate) fn template() -> Template {
    Template {
        name: "minimal".into(),
        digest: [7; 32],
        disk: Mib(10),
        size_bytes: 1,
        created_at: Stamp(0),
    }
}
