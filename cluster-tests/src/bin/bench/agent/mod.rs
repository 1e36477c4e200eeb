//! What using a capsule costs its client: commands, what they print, files and terminals. Asked of the node
//! that has the capsule (*local*) and of one that has not (*relay*), beside ssh and scp on loopback.
//!
//! ssh and scp work on the host itself, while commands and files of a capsule are a guest's. Where guests are
//! emulated, what a guest does takes ten to twenty times as long as it would, and the ratios say little of us:
//! `exec` and `relay` measure what is ours alone. One capsule with one processor serves all parts.

mod files;
mod socket;

use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Runtime;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use self::socket::Socket;
use crate::create::connect;
use crate::figures::{Samples, at_most, figure, ms, ratio};
use crate::http::Connection;
use crate::sshd::Sshd;
use crate::{LEAST_RUNS, Outcome, Run};

/// Where the capsule is, and where it is not.
const OWNER: u16 = 1;
const RELAY: u16 = 2;
/// Memory of the capsule: enough for the caches of a large file.
const MEMORY_MB: u32 = 512;
/// Commands of each kind for each run asked for.
const COMMANDS_PER_RUN: usize = 10;
/// Commands that are not counted.
const WARM_UP: usize = 3;
/// Commands at once.
const AT_ONCE: usize = 200;
/// Keys typed for each run asked for.
const KEYS_PER_RUN: usize = 50;
/// Most of ssh's time that a command may take.
const SSH_GOAL: f64 = 1.0;
/// What a person does not notice between a key and its letter.
const ECHO_GOAL_MS: f64 = 50.0;
/// MiB of a file or of a command's output; and of a look.
const FULL_MIB: u32 = 1024;
const QUICK_MIB: u32 = 32;
/// Where a file of letters lies in the guest, which a command prints.
const LETTERS: &str = "/root/letters";
/// Output is a smaller part: it comes as JSON, through pipes of the guest.
const OUTPUT_SHARE: u32 = 8;

/// The capsule, and the ways to it.
struct Measured<'a> {
    id: String,
    ways: [(&'static str, &'a World); 2],
    sshd: Option<Sshd>,
    mib: u32,
}

/// Measures all parts.
pub(crate) fn run(run: &Run) -> Outcome {
    let cluster = ClusterWorld::new(RELAY);
    let (owner, relay) = (cluster.client(OWNER), cluster.client(RELAY));
    let wanted = json!({ "memory_mb": MEMORY_MB, "on_node": format!("node{OWNER}") });
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let measured = Measured {
        id: owner.capsule_with(&wanted),
        ways: [("local", owner), ("relay", relay)],
        sshd: Sshd::start_if_there(run, local, local)?,
        mib: if run.runs < LEAST_RUNS {
            QUICK_MIB
        } else {
            FULL_MIB
        },
    };
    run.note("commands, one after the other");
    round_trips(run, &measured)?;
    run.note("commands at once");
    at_once(run, &measured)?;
    run.note("keys and their letters, while the guest is busy");
    echoes(run, &measured)?;
    run.note("output of a command");
    output(run, &measured)?;
    run.note("files");
    files::measure(run, &measured)?;
    owner.destroy(&measured.id);
    Ok(())
}

fn command(api: &mut Connection, id: &str, line: &str) -> Outcome<Duration> {
    let request = json!({ "cmd": "/bin/sh", "args": ["-c", line], "timeout_sec": 600 });
    let path = format!("/v1/capsules/{id}/exec");
    let began = Instant::now();
    let answer = api.call("POST", &path, request.to_string().as_bytes())?;
    let took = began.elapsed();
    let ran = answer.expect(200)?.json()?;
    match ran["exit_code"] == 0 {
        true => Ok(took),
        false => Err(format!("{line}: {ran}").into()),
    }
}

fn round_trips(run: &Run, measured: &Measured<'_>) -> Outcome {
    let mut ways = Vec::new();
    for (name, world) in measured.ways {
        ways.push((name, connect(world)?, Samples::new()));
    }
    let mut ssh = Samples::new();
    for number in 0..WARM_UP + run.runs * COMMANDS_PER_RUN {
        run.go_on()?;
        for (_, api, samples) in &mut ways {
            let took = command(api, &measured.id, "true")?;
            if number >= WARM_UP {
                samples.add_ms(took);
            }
        }
        if let Some(sshd) = &measured.sshd {
            let took = sshd_command(sshd, "true")?;
            if number >= WARM_UP {
                ssh.add_ms(took);
            }
        }
    }
    for (name, _, samples) in &ways {
        samples.print(&format!("agent_exec_{name}"), "ms");
    }
    if measured.sshd.is_some() {
        ssh.print("agent_exec_ssh", "ms");
        for (name, _, samples) in &ways {
            let name = format!("agent_exec_{name}_over_ssh");
            ratio(&name, samples.p50(), ssh.p50(), SSH_GOAL);
        }
    }
    Ok(())
}

fn sshd_command(sshd: &Sshd, line: &str) -> Outcome<Duration> {
    let began = Instant::now();
    let status = sshd.ssh(line).stdout(Stdio::null()).status()?;
    match status.success() {
        true => Ok(began.elapsed()),
        false => Err(format!("ssh {line}: {status}").into()),
    }
}

/// Everybody connects first, then all ask.
fn at_once(run: &Run, measured: &Measured<'_>) -> Outcome {
    for (name, world) in measured.ways {
        run.go_on()?;
        let mut clients = Vec::new();
        for _ in 0..AT_ONCE {
            clients.push(connect(world)?);
        }
        let began = Instant::now();
        let asked = |mut api: Connection| {
            let id = measured.id.clone();
            thread::spawn(move || command(&mut api, &id, "true").map_err(|err| err.to_string()))
        };
        let asked: Vec<_> = clients.into_iter().map(asked).collect();
        let mut samples = Samples::new();
        for thread in asked {
            samples.add_ms(thread.join().map_err(|_| "a client broke")??);
        }
        let name = format!("agent_{AT_ONCE}_execs_{name}");
        figure(&name, ms(began.elapsed()), "ms");
        samples.print(&name, "ms");
    }
    Ok(())
}

/// A terminal's own letters, while commands of the same guest take all its processor.
fn echoes(run: &Run, measured: &Measured<'_>) -> Outcome {
    let runtime = Runtime::new()?;
    for (name, world) in measured.ways {
        let mut api = connect(world)?;
        let hogs = "for n in 1 2 3 4; do setsid sh -c 'while :; do :; done' hog & done";
        command(&mut api, &measured.id, &format!("{hogs} >/dev/null 2>&1"))?;
        let samples = runtime.block_on(typed(run, world, &measured.id));
        command(&mut api, &measured.id, "pkill -9 -f '[h]og'")?;
        let samples = samples?;
        samples.print(&format!("agent_echo_{name}"), "ms");
        let goal = format!("agent_echo_{name}_p99");
        at_most(&goal, samples.p99(), ECHO_GOAL_MS);
    }
    Ok(())
}

async fn typed(run: &Run, world: &World, id: &str) -> Outcome<Samples> {
    let mut terminal = Socket::open(world, id, "pty").await?;
    terminal
        .say(&json!({ "type": "start", "cmd": "/bin/cat", "cols": 80, "rows": 24 }))
        .await?;
    terminal.told("started").await?;
    let mut samples = Samples::new();
    for number in 0..WARM_UP + run.runs * KEYS_PER_RUN {
        run.go_on()?;
        let began = Instant::now();
        terminal.type_key(b'x').await?;
        if number >= WARM_UP {
            samples.add_ms(began.elapsed());
        }
    }
    terminal.say(&json!({ "type": "kill" })).await?;
    Ok(samples)
}

/// How fast letters come that a command prints.
fn output(run: &Run, measured: &Measured<'_>) -> Outcome {
    let mib = (measured.mib / OUTPUT_SHARE).max(1);
    let make = format!("head -c {mib}M /dev/zero | tr '\\0' x >{LETTERS}");
    command(&mut connect(measured.ways[0].1)?, &measured.id, &make)?;
    let runtime = Runtime::new()?;
    for (name, world) in measured.ways {
        run.go_on()?;
        let took = runtime.block_on(printed(world, &measured.id, u64::from(mib) << 20))?;
        let name = format!("agent_output_{name}");
        figure(&name, f64::from(mib) / took.as_secs_f64(), "MiB/s");
    }
    if let Some(sshd) = &measured.sshd {
        let took = sshd_command(sshd, &format!("head -c {mib}M /dev/zero | tr '\\0' x"))?;
        figure(
            "agent_output_ssh",
            f64::from(mib) / took.as_secs_f64(),
            "MiB/s",
        );
    }
    Ok(())
}

async fn printed(world: &World, id: &str, bytes: u64) -> Outcome<Duration> {
    let mut stream = Socket::open(world, id, "exec/stream").await?;
    let began = Instant::now();
    stream
        .say(&json!({ "type": "start", "cmd": "cat", "args": [LETTERS] }))
        .await?;
    let mut heard = 0;
    loop {
        let told = stream.hear().await?;
        match told["type"].as_str() {
            Some("stdout") => heard += told["data"].as_str().map_or(0, str::len) as u64,
            Some("exit") => break,
            Some("error") => return Err(told.to_string().into()),
            _ => {}
        }
    }
    match heard == bytes {
        true => Ok(began.elapsed()),
        false => Err(format!("{heard} of {bytes} bytes came").into()),
    }
}

/// The word under `type`.
fn kind(told: &Value) -> &str {
    told["type"].as_str().unwrap_or_default()
}
