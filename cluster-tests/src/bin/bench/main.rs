//! Measures what Wrenn promises, on a real node with real guests.
//!
//! `bench [NAME...]` runs some benchmarks, all where none is named; `deploy/bench` builds what
//! they need first. Standard output has nothing but results, for programs to read:
//!
//! ```text
//! FIGURE <name> <value> <unit>    a measured value
//! RATIO  <name> <value> <goal>    a measured value over what it is compared with, or over what it
//!                                 may be at most; it holds when value <= goal
//! ```
//!
//! `_p50` is the median, `_p99` the 99th percentile by nearest rank: with fewer than a hundred runs
//! that is the slowest one. What is compared is measured in turns in one run, so that a busy
//! machine slows both. Progress goes to standard error. The exit code says whether everything was
//! measured, not whether every ratio holds: that depends on the machine, and is for a reader.
//!
//! Each benchmark makes its own world and takes it down again; an interrupt ends the run under way
//! and then does the same.

mod agent;
mod ch;
mod create;
mod etcd;
mod exec;
mod failover;
mod figures;
mod heartbeat;
mod http;
mod join;
mod log;
mod memory;
mod process;
mod qemu;
mod relay;
mod slots;
mod slow_link;
mod snapshots;
mod sshd;
mod statemachine;
mod trio;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Fewer runs than this give a median that one slow run can move.
const LEAST_RUNS: usize = 10;
/// Enough to see that a benchmark works.
const QUICK_RUNS: usize = 2;

/// Guests with less do not boot the template.
const LEAST_MEMORY_MIB: u32 = 128;

/// Benchmarks that measure etcd as well. Debian's `etcd-server` has it and, where systemd runs,
/// starts one of its own; so that is for a person to install.
const ETCD_TOO: [&str; 2] = ["etcd", "failover"];

/// What a benchmark comes to: its figures are printed, only trouble is returned.
type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// One benchmark.
struct Benchmark {
    name: &'static str,
    about: &'static str,
    run: fn(&Run) -> Outcome,
}

/// All there are, in the order in which they run: those that measure the quiet host come first.
const BENCHMARKS: [Benchmark; 21] = [
    Benchmark {
        name: "log",
        about: "durable proposals of a raft group of one, beside bare fdatasync",
        run: log::run,
    },
    Benchmark {
        name: "etcd",
        about: "durable writes of three members, beside etcd-server",
        run: etcd::run,
    },
    Benchmark {
        name: "failover",
        about: "kill of the leader to the next write, beside etcd-server",
        run: failover::run,
    },
    Benchmark {
        name: "statemachine",
        about: "the replicated state with 10,000 and 100,000 capsules",
        run: statemachine::run,
    },
    Benchmark {
        name: "heartbeat",
        about: "delay of small calls between two nodes while bulk saturates loopback",
        run: heartbeat::run,
    },
    Benchmark {
        name: "slots",
        about: "network slots: taken from the pool, made, unmade",
        run: slots::run,
    },
    Benchmark {
        name: "join",
        about: "a host joins: to its place in the list, to its own first answer",
        run: join::run,
    },
    Benchmark {
        name: "relay",
        about: "calls and streams through a node in between, beside direct ones",
        run: relay::run,
    },
    Benchmark {
        name: "memory",
        about: "daemon and shim at rest: memory, processor, syncs",
        run: memory::run,
    },
    Benchmark {
        name: "exec",
        about: "a command's round trip through the API, beside the agent called directly",
        run: exec::run,
    },
    Benchmark {
        name: "agent",
        about: "commands, output, terminals and files, here and through a node in between, beside ssh and scp",
        run: agent::run,
    },
    Benchmark {
        name: "create",
        about: "cold create to first answer, and our share of it",
        run: create::run,
    },
    Benchmark {
        name: "faults",
        about: "a guest's page from this node's packs and from a peer, beside a mapped file",
        run: snapshots::faults::run,
    },
    Benchmark {
        name: "pause",
        about: "pauses after 1, 5 and 25 % was written, beside a full pause",
        run: snapshots::pause::run,
    },
    Benchmark {
        name: "resume",
        about: "memory that comes as it is touched, beside memory copied before",
        run: snapshots::resume::run,
    },
    Benchmark {
        name: "anywhere",
        about: "resumes where it was paused, where a copy is, and where nothing is",
        run: snapshots::anywhere::run,
    },
    Benchmark {
        name: "qemu",
        about: "QEMU's own saving and loading of the same guest, beside pause and resume",
        run: snapshots::qemu::run,
    },
    Benchmark {
        name: "transfer",
        about: "a snapshot from one node to another, beside scp and rsync",
        run: snapshots::transfer::run,
    },
    Benchmark {
        name: "at-once",
        about: "many capsules resumed at the same instant",
        run: snapshots::at_once::run,
    },
    Benchmark {
        name: "dedup",
        about: "room that ten capsules of one template share",
        run: snapshots::dedup::run,
    },
    Benchmark {
        name: "ch",
        about: "a guest back under Cloud Hypervisor, beside its own ways and its offload daemon",
        run: ch::run,
    },
];

/// What one name stands for: all that is about snapshots.
const SNAPSHOTS: (&str, [&str; 8]) = (
    "snapshots",
    [
        "faults", "pause", "resume", "anywhere", "qemu", "transfer", "at-once", "dedup",
    ],
);

/// Measures what Wrenn promises, on a real node with real guests.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Which benchmarks to run; all where none is named.
    names: Vec<String>,
    /// Show the names there are.
    #[arg(long)]
    list: bool,
    /// How often the slow ones repeat. Quick ones repeat a multiple of it.
    #[arg(long, value_name = "N", default_value_t = LEAST_RUNS)]
    runs: usize,
    /// Only a look: so few runs that no figure is worth writing down.
    #[arg(long, conflicts_with = "runs")]
    quick: bool,
    /// Memory of the guests that are paused and resumed.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u32,
    /// Memory of the largest guest of `ch`; all smaller ones are measured too.
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    ch_memory: u32,
    /// How many capsules `at-once` resumes, and how many guests `ch` does.
    #[arg(long, value_name = "N", default_value_t = 16)]
    at_once: usize,
    /// Be the process whose memory is paged, for `faults`.
    #[arg(long, hide = true, value_name = "SOCKET")]
    paged: Option<PathBuf>,
    /// Measure `transfer` over a slow link, in this network namespace.
    #[arg(long, hide = true)]
    slow_link: bool,
    /// Be a member of a group that is measured.
    #[arg(long, hide = true, num_args = 3, value_names = ["ID", "ADDRESS", "FOLDER"])]
    member: Vec<String>,
}

/// How a benchmark is to run.
struct Run {
    runs: usize,
    memory_mib: u32,
    ch_memory_mib: u32,
    at_once: usize,
    interrupted: Arc<AtomicBool>,
}

impl Run {
    /// Says what is under way.
    fn note(&self, what: &str) {
        eprintln!("  {what}");
    }

    /// To be called between two runs.
    ///
    /// # Errors
    /// Somebody wants this to end.
    fn go_on(&self) -> Outcome {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err("interrupted".into());
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let [id, address, folder] = &arguments.member[..] {
        return exit(trio::member::run(id, address, folder));
    }
    if let Some(socket) = &arguments.paged {
        return exit(snapshots::faults::be_paged(socket));
    }
    if arguments.list {
        for benchmark in &BENCHMARKS {
            println!("{:12} {}", benchmark.name, benchmark.about);
        }
        return ExitCode::SUCCESS;
    }
    exit(run(&arguments))
}

fn exit(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("bench: {err}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Outcome {
    let chosen = choose(&arguments.names)?;
    let least = match arguments.slow_link {
        true => 1,
        false => LEAST_MEMORY_MIB,
    };
    let run = Run {
        runs: if arguments.quick {
            QUICK_RUNS
        } else {
            arguments.runs.max(1)
        },
        // A multiple of 16 pages, and enough for a kernel to boot.
        memory_mib: arguments.memory.max(least),
        ch_memory_mib: arguments.ch_memory,
        at_once: arguments.at_once.max(1),
        interrupted: notice_interrupts()?,
    };
    if arguments.slow_link {
        return snapshots::transfer::run_slow(&run);
    }
    if run.runs < LEAST_RUNS {
        eprintln!("fewer than {LEAST_RUNS} runs: the medians below are not worth writing down");
    }
    for benchmark in chosen {
        if arguments.names.is_empty()
            && let Some(lacks) = lacks(benchmark.name)
        {
            eprintln!("!!! {}: LEFT OUT, there is no {lacks} !!!", benchmark.name);
            continue;
        }
        eprintln!("{}: {}", benchmark.name, benchmark.about);
        (benchmark.run)(&run).map_err(|err| format!("{}: {err}", benchmark.name))?;
    }
    Ok(())
}

/// What is not there of what a benchmark needs and a person has to install.
fn lacks(benchmark: &str) -> Option<&'static str> {
    match benchmark {
        "ch" => ch::lacks(),
        name if ETCD_TOO.contains(&name) && !etcd_is_here() => Some("etcd"),
        _ => None,
    }
}

fn etcd_is_here() -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|path| path.join("etcd").exists())
}

fn choose(names: &[String]) -> Outcome<Vec<&'static Benchmark>> {
    let (group, members) = SNAPSHOTS;
    let names = names.iter().flat_map(|name| match name == group {
        true => members.to_vec(),
        false => vec![name.as_str()],
    });
    let names: Vec<&str> = names.collect();
    let known = |name: &str| BENCHMARKS.iter().any(|it| it.name == name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        return Err(format!("there is no benchmark {unknown:?}; --list shows them").into());
    }
    let wanted = |it: &&Benchmark| names.is_empty() || names.contains(&it.name);
    Ok(BENCHMARKS.iter().filter(wanted).collect())
}

/// Turns interrupts into a flag, so that worlds are taken down on the way out.
fn notice_interrupts() -> Outcome<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    let theirs = Arc::clone(&flag);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        theirs.store(true, Ordering::Relaxed);
    });
    Ok(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_means_all_of_them() {
        assert_eq!(choose(&[]).unwrap().len(), BENCHMARKS.len());
    }

    #[test]
    fn one_name_chooses_all_that_is_about_snapshots() {
        let chosen = choose(&[SNAPSHOTS.0.into()]).unwrap();
        let names: Vec<_> = chosen.iter().map(|it| it.name).collect();
        assert_eq!(names, SNAPSHOTS.1);
    }

    #[test]
    fn names_choose_and_an_unknown_one_is_refused_by_name() {
        let chosen = choose(&["exec".into(), "create".into()]).unwrap();
        assert_eq!(chosen.len(), 2);
        let refused = choose(&["exce".into()]).err().unwrap();
        assert!(refused.to_string().contains("exce"), "{refused}");
    }
}
