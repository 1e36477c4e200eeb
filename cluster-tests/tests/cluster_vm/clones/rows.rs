//! The table: what is looked at in a guest that was brought back, what it must be, and why.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use wrenn_cluster_tests::client::Answer;

use super::life::Life;

/// How far a clock may be off, and how far two clocks may be apart.
const CLOCK_MARGIN: Duration = Duration::from_millis(500);
/// A connection that took longer, and not for want of a processor, lost its first packet: the kernel
/// sends it again after a second.
const FIRST_PACKET: Duration = Duration::from_millis(900);
/// Longest that a program may wait to hear that its peer of the past life is gone.
const STALE: Duration = Duration::from_secs(5);
/// Periods of a timer that begin or end between two looks at the clock.
const ROUNDED: u64 = 2;
/// What the generation of a guest is that was never brought back.
const SINCE_BOOT: &str = "00000000000000000000000000000000";
/// The hardware address of every guest, each in a network of its own, and of every gateway.
const GUEST_MAC: &str = "02:00:a9:fe:00:15";
const GATEWAY_MAC: &str = "02:00:a9:fe:00:16";
/// The address of every guest.
const GUEST_ADDRESS: &str = "169.254.0.21/30";

/// Whether a guest is to be the one that was sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// It goes on.
    Same,
    /// It is a copy, and somebody else from now on.
    New,
}

/// A guest that was brought back, and how that went.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) identity: Identity,
    /// As it was before it was sealed.
    pub(super) before: Life,
    /// As it is.
    pub(super) after: Life,
    /// Another life from the same snapshot.
    pub(super) twin: Option<Life>,
    /// The host's clock when the guest certainly stood still, and when it still did.
    pub(super) stopped: Duration,
    pub(super) asked: Duration,
    /// What came of asking for it twice at once.
    pub(super) answers: Vec<Answer>,
    /// What the client of a command heard that was under way at the pause; `None` where nothing.
    pub(super) cut: Option<String>,
    /// Commands that were refused because it was not running yet.
    pub(super) refused: u64,
    /// Commands that were answered otherwise than with their output or that refusal.
    pub(super) broken: Vec<String>,
    /// Most VMMs that it had at once.
    pub(super) vmms: usize,
}

/// What was seen, or what is wrong with it.
type Verdict = Result<String, String>;

/// One thing that is looked at.
struct Row {
    name: &'static str,
    /// What it must be in a guest that goes on, and why.
    same: &'static str,
    /// What it must be in a copy.
    new: &'static str,
    holds: fn(&Case) -> Verdict,
}

/// The same in both.
const LIKEWISE: &str = "the same";

const ROWS: [Row; 27] = [
    Row {
        name: "kernel random, getrandom",
        same: "differs from all before and from every other life of the snapshot, or keys repeat",
        new: LIKEWISE,
        holds: |case| case.random_is_fresh("sample", &["random"]),
    },
    Row {
        name: "kernel random, inside a read loop",
        same: "a program that was reading when it was stopped draws other bytes from then on",
        new: LIKEWISE,
        holds: |case| case.random_is_fresh("read", &["first", "last"]),
    },
    Row {
        name: "user-space random notice",
        same: "/run/wrenn/generation is another one, and who watches it is told without looking",
        new: LIKEWISE,
        holds: Case::notices,
    },
    Row {
        name: "wall clock",
        same: "within 0.5 s of the host's",
        new: LIKEWISE,
        holds: Case::clock_is_right,
    },
    Row {
        name: "workload waits for its clock",
        same: "no program reads a time at which the guest stood still",
        new: LIKEWISE,
        holds: Case::nobody_ran_by_an_old_clock,
    },
    Row {
        name: "monotonic clock",
        same: "never goes back, and stands still while the guest does: timeouts count running time",
        new: LIKEWISE,
        holds: Case::monotonic_goes_on,
    },
    Row {
        name: "boot-time clock",
        same: "as the monotonic one: a pause is no suspend that the kernel took part in",
        new: LIKEWISE,
        holds: Case::boot_time_is_monotonic,
    },
    Row {
        name: "monotonic timers",
        same: "owe nothing for the time away: no burst",
        new: LIKEWISE,
        holds: Case::timers_do_not_burst,
    },
    Row {
        name: "wall-clock timers",
        same: "who asked for it is told that the clock was stepped (ECANCELED), as cron does",
        new: LIKEWISE,
        holds: |case| match case.after.lines("stepped").count() {
            0 => Err("nobody was told".into()),
            told => Ok(format!("told {told} times")),
        },
    },
    Row {
        name: "MAC",
        same: "kept: every guest has the same one, in a network of its own",
        new: LIKEWISE,
        holds: |case| is(case.after.text("mac"), GUEST_MAC),
    },
    Row {
        name: "IP address and route",
        same: "kept: every guest has the same one, behind a slot's own address",
        new: LIKEWISE,
        holds: |case| {
            is(case.after.text("addresses"), GUEST_ADDRESS)?;
            is(case.after.text("route"), case.before.text("route"))
        },
    },
    Row {
        name: "neighbours (ARP)",
        same: "nobody but the gateway, at its fixed address",
        new: LIKEWISE,
        holds: Case::neighbours_are_new,
    },
    Row {
        name: "network at once",
        same: "the first packet of a new connection arrives",
        new: LIKEWISE,
        holds: Case::first_packet_arrives,
    },
    Row {
        name: "connections to the agent",
        same: "those of the past life are gone: their peers are",
        new: LIKEWISE,
        holds: Case::agent_peers_are_gone,
    },
    Row {
        name: "running commands",
        same: "go on, and their clients hear at once that they were cut off",
        new: LIKEWISE,
        holds: Case::command_goes_on,
    },
    Row {
        name: "connections to others",
        same: "are gone, and say so when next used instead of waiting for a packet's last try",
        new: LIKEWISE,
        holds: Case::stale_connections_say_so,
    },
    Row {
        name: "host name",
        same: "kept",
        new: "its own, in the kernel and in /etc",
        holds: |case| {
            is(case.after.text("etc_hostname"), case.after.text("hostname"))?;
            case.identifies("hostname")
        },
    },
    Row {
        name: "machine id",
        same: "kept",
        new: "its own",
        holds: |case| {
            let id = case.after.text("machine_id");
            let plain = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            if !plain {
                return Err(format!("{id:?} is none"));
            }
            case.identifies("machine_id")
        },
    },
    Row {
        name: "SSH host keys",
        same: "kept",
        new: "made anew",
        holds: |case| match case.after.facts["ssh_keys"].as_object() {
            Some(keys) if !keys.is_empty() => case.identifies("ssh_keys"),
            _ => Err("there are none".into()),
        },
    },
    Row {
        name: "sandbox id",
        same: "kept",
        new: "its own, in files and in the environment of programs started from now on",
        holds: |case| {
            is(case.after.text("sandbox_id"), &case.after.id)?;
            is(case.after.text("env_sandbox_id"), &case.after.id)?;
            case.identifies("sandbox_id")
        },
    },
    Row {
        name: "boot id",
        same: "kept: it lies in the kernel, and the guest was not booted (documented)",
        new: "the same, which is why programs must not take it for an identity",
        holds: |case| is(case.after.text("boot_id"), case.before.text("boot_id")),
    },
    Row {
        name: "agent token",
        same: "renewed: who knew the old one is refused",
        new: LIKEWISE,
        holds: Case::token_is_renewed,
    },
    Row {
        name: "epoch",
        same: "the guest knows its new owner and refuses the one before",
        new: "the guest knows its owner",
        holds: Case::epoch_is_known,
    },
    Row {
        name: "double resume",
        same: "one guest runs, and both who asked are told of it",
        new: "one guest runs",
        holds: Case::one_runs,
    },
    Row {
        name: "first request",
        same: "is refused by name before the guest runs and served from then on, never cut off",
        new: LIKEWISE,
        holds: |case| match case.broken.first() {
            Some(broken) => Err(format!("{} of them: {broken}", case.broken.len())),
            None => Ok(format!("{} refused before, then served", case.refused)),
        },
    },
    Row {
        name: "memory, page cache and disk",
        same: "agree with each other and with what was there",
        new: LIKEWISE,
        holds: |case| {
            is(case.after.text("disk"), case.before.text("cache"))?;
            is(case.after.text("cache"), case.before.text("cache"))?;
            is(case.after.text("memory"), case.before.text("memory"))
        },
    },
    Row {
        name: "processes and kernel",
        same: "go on as they were, without complaints of lost interrupts, locks or writes",
        new: LIKEWISE,
        holds: Case::goes_on_calmly,
    },
];

fn is(seen: &str, wanted: &str) -> Verdict {
    if seen == wanted {
        Ok(seen.to_owned())
    } else {
        Err(format!("{seen:?} instead of {wanted:?}"))
    }
}

fn nanos(line: &Value, clock: &str) -> Duration {
    Duration::from_nanos(line[clock].as_u64().unwrap_or_default())
}

impl Case {
    /// Prints all rows.
    ///
    /// # Panics
    /// Where one does not hold.
    pub(super) fn judge(&self, what: &str) {
        println!("{what}:");
        let mut wrong = Vec::new();
        for row in &ROWS {
            let wanted = match self.identity {
                Identity::New if row.new != LIKEWISE => row.new,
                Identity::Same | Identity::New => row.same,
            };
            match (row.holds)(self) {
                Ok(seen) => println!("  ok     {}: {seen}", row.name),
                Err(seen) => {
                    println!("  WRONG  {}: {seen}", row.name);
                    wrong.push(format!("{}: {seen}; wanted: {wanted}", row.name));
                }
            }
        }
        assert!(wrong.is_empty(), "{what}: {wrong:#?}");
    }

    /// What tells one guest from another is kept, or is new, and is nobody else's.
    fn identifies(&self, fact: &str) -> Verdict {
        let [was, is] = [&self.before, &self.after].map(|life| &life.facts[fact]);
        let right = match self.identity {
            Identity::Same => was == is,
            Identity::New => was != is,
        };
        let seen = format!("{is}, was {was}");
        if right { Ok(seen) } else { Err(seen) }
    }

    fn random_is_fresh(&self, kind: &str, fields: &[&str]) -> Verdict {
        let drawn = |life: &Life| -> BTreeSet<String> {
            let values = life
                .lines(kind)
                .flat_map(|line| fields.iter().map(|it| &line[*it]));
            values.map(Value::to_string).collect()
        };
        let own = drawn(&self.after);
        let count = self.after.lines(kind).count() * fields.len();
        if own.len() < 2 * fields.len() || own.len() != count {
            return Err(format!("{count} draws gave {} values", own.len()));
        }
        let before = self.before.lines(kind).count();
        let others = [
            drawn(&self.before),
            self.twin.as_ref().map(drawn).unwrap_or_default(),
        ];
        match others.iter().flatten().find(|value| own.contains(*value)) {
            Some(value) => Err(format!("{value} was drawn in another life")),
            None => Ok(format!("{count} values after {before}, none twice")),
        }
    }

    fn notices(&self) -> Verdict {
        let own = self.after.text("generation");
        let known = [SINCE_BOOT, self.before.text("generation")];
        let twin = self.twin.as_ref().map(|life| life.text("generation"));
        if own.len() != 32 || known.contains(&own) || twin == Some(own) {
            return Err(format!("generation {own}"));
        }
        match self.after.lines("noticed").count() {
            1 => Ok(format!("generation {own}, told once")),
            told => Err(format!("told {told} times of generation {own}")),
        }
    }

    fn clock_is_right(&self) -> Verdict {
        let shown = self.after.clock;
        let (asked, answered) = (self.after.asked, self.after.answered);
        let off = asked
            .saturating_sub(shown)
            .max(shown.saturating_sub(answered));
        let said = format!(
            "{off:?} outside of the {:?} it was asked in",
            answered - asked
        );
        if off <= CLOCK_MARGIN {
            Ok(said)
        } else {
            Err(said)
        }
    }

    /// Samples of the life before and of this one, in the order they were written.
    fn across(&self) -> Result<(Vec<&Value>, Vec<&Value>), String> {
        let own = &self.after.facts["generation"];
        let (own, former): (Vec<_>, Vec<_>) = self
            .after
            .all_lines("sample")
            .partition(|line| line["generation"] == *own);
        if former.is_empty() || own.is_empty() {
            return Err("there are no samples".into());
        }
        Ok((former, own))
    }

    fn nobody_ran_by_an_old_clock(&self) -> Verdict {
        let still = self.stopped + CLOCK_MARGIN..self.asked.saturating_sub(CLOCK_MARGIN);
        let (former, own) = self.across()?;
        let mut times = former.iter().chain(&own).map(|line| nanos(line, "real"));
        if still.is_empty() {
            return Err("it did not stand still for long enough to tell".into());
        }
        match times.find(|time| still.contains(time)) {
            Some(time) => Err(format!("a program ran at {time:?}, within {still:?}")),
            None => Ok(format!("nothing in {:?}", still.end - still.start)),
        }
    }

    fn monotonic_goes_on(&self) -> Verdict {
        let (former, own) = self.across()?;
        let all: Vec<_> = former.iter().chain(&own).copied().collect();
        let back = all
            .windows(2)
            .find(|two| nanos(two[0], "mono") > nanos(two[1], "mono"));
        if let Some(two) = back {
            return Err(format!("it went back: {two:?}"));
        }
        let (last, first) = (former[former.len() - 1], own[0]);
        let gap = |clock| nanos(first, clock).saturating_sub(nanos(last, clock));
        let (mono, real) = (gap("mono"), gap("real"));
        let said = format!("{mono:?} passed while the wall clock went on by {real:?}");
        let away = self.asked.saturating_sub(self.stopped);
        if mono + away <= real + CLOCK_MARGIN {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn boot_time_is_monotonic(&self) -> Verdict {
        let (former, own) = self.across()?;
        let apart = former.iter().chain(&own).map(|line| nanos(line, "apart"));
        let furthest = apart.max().unwrap_or_default();
        let said = format!("at most {furthest:?} apart");
        if furthest <= CLOCK_MARGIN {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn timers_do_not_burst(&self) -> Verdict {
        let figure = |line: &Value, name: &str| line[name].as_u64().unwrap_or_default();
        let ticks: Vec<_> = self.after.lines("tick").collect();
        let more = |line: &&&Value| figure(line, "total") > figure(line, "due") + ROUNDED;
        match (ticks.iter().find(more), ticks.last()) {
            (Some(more), _) => Err(format!("more periods than have passed: {more}")),
            (None, Some(last)) => Ok(format!("{} periods in all, all due", last["total"])),
            (None, None) => Err("it does not tick any more".into()),
        }
    }

    fn neighbours_are_new(&self) -> Verdict {
        let all = self.after.facts["neighbours"].as_array();
        let addresses: Vec<_> = all.into_iter().flatten().map(|line| &line[3]).collect();
        let said = format!("{addresses:?}");
        let gateway = addresses.iter().all(|address| **address == GATEWAY_MAC);
        if gateway { Ok(said) } else { Err(said) }
    }

    fn first_packet_arrives(&self) -> Verdict {
        let new = self.after.lines("new").next().ok_or("it was not tried")?;
        let took = new["took"].as_f64().unwrap_or(f64::MAX);
        let said = format!("{} after {took:.3} s", new["said"]);
        let at_once = took < FIRST_PACKET.as_secs_f64() || new["resent"] == 0;
        if new["said"] == "echo" && at_once {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn agent_peers_are_gone(&self) -> Verdict {
        let peers = |life: &Life| {
            life.facts["agent_peers"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        };
        let (was, is) = (peers(&self.before), peers(&self.after));
        let said = format!("{} then, {} now", was.len(), is.len());
        let stale = was.iter().filter(|peer| is.contains(peer)).count();
        if stale == 0 && !was.is_empty() {
            Ok(said)
        } else {
            Err(format!("{said}, {stale} of then"))
        }
    }

    fn command_goes_on(&self) -> Verdict {
        let [was, is] = [&self.before, &self.after].map(|life| life.text("under_way"));
        let heard = self.cut.as_ref().ok_or("its client heard nothing")?;
        let said = format!("process {is}, was {was}; its client heard {heard}");
        if is == was && !was.is_empty() {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn stale_connections_say_so(&self) -> Verdict {
        let old = self.after.lines("old").next().ok_or("none was tried")?;
        let took = old["took"].as_f64().unwrap_or(f64::MAX);
        let said = format!("{} after {took:.3} s", old["said"]);
        let gone = old["said"] != "echo" && took < STALE.as_secs_f64();
        if gone { Ok(said) } else { Err(said) }
    }

    fn token_is_renewed(&self) -> Verdict {
        let answers = [&self.after, &self.before].map(|life| self.after.answers_to(&life.token));
        let said = format!("new and old are answered with {answers:?}");
        if answers == [200, 401] {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn epoch_is_known(&self) -> Verdict {
        let own = self.after.epoch;
        let former = own.saturating_sub(1);
        let answers = [own, former].map(|epoch| self.after.obeys(epoch));
        let said = format!("{own} and {former} are answered with {answers:?}");
        let later = self.identity == Identity::New || own > self.before.epoch;
        if answers == [200, 409] && later {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn one_runs(&self) -> Verdict {
        let said: Vec<_> = self
            .answers
            .iter()
            .map(|answer| (answer.status, answer.json()["id"].clone()))
            .collect();
        let told = said
            .iter()
            .all(|(status, id)| [200, 202].contains(status) && *id == self.after.id);
        let said = format!("{} at most, answers {said:?}", self.vmms);
        if told && self.vmms == 1 {
            Ok(said)
        } else {
            Err(said)
        }
    }

    fn goes_on_calmly(&self) -> Verdict {
        let facts = &self.after.facts;
        is(
            self.after.text("resident_pid"),
            self.before.text("resident_pid"),
        )?;
        if facts["resident_lives"] != true {
            return Err("the process is gone".into());
        }
        let complaints = |life: &Life| life.facts["complaints"].as_array().cloned();
        let known = complaints(&self.before).unwrap_or_default();
        let mut complaints = complaints(&self.after).ok_or("it says nothing of its kernel")?;
        complaints.retain(|it| !known.contains(it));
        if complaints.is_empty() {
            Ok("the same process, a silent kernel".into())
        } else {
            Err(format!("the kernel says {complaints:?}"))
        }
    }
}
