//! Files both ways, beside scp.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use wrenn_cluster_tests::client::{form, form_type};
use wrenn_cluster_tests::world::World;

use super::Measured;
use crate::figures::{figure, ratio};
use crate::{Outcome, Run};

/// Where the file is in the guest.
const PATH: &str = "/root/large";
/// Longest one transfer may take: an emulated guest writes some megabytes a second.
const PATIENCE: Duration = Duration::from_secs(900);
/// Most of scp's time that a transfer may take.
const SCP_GOAL: f64 = 1.0;

/// Measures all directions and ways.
pub(crate) fn measure(run: &Run, measured: &Measured<'_>) -> Outcome {
    let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let (file, copy) = (dir.path().join("file"), dir.path().join("copy"));
    make(&file, measured.mib)?;
    let scp = match &measured.sshd {
        None => None,
        Some(sshd) => {
            let up = timed(&mut sshd.upload(&file, &copy))?;
            fs::remove_file(&copy)?;
            let down = timed(&mut sshd.download(&file, &copy))?;
            told("up", "scp", measured.mib, up);
            told("down", "scp", measured.mib, down);
            Some((up, down))
        }
    };
    for (name, world) in measured.ways {
        run.go_on()?;
        let up = upload(world, &measured.id, &file)?;
        told("up", name, measured.mib, up);
        let down = download(world, &measured.id, measured.mib)?;
        told("down", name, measured.mib, down);
        if let Some((scp_up, scp_down)) = scp {
            for (direction, ours, theirs) in [("up", up, scp_up), ("down", down, scp_down)] {
                let name = format!("agent_{direction}_{name}_over_scp");
                ratio(&name, ours.as_secs_f64(), theirs.as_secs_f64(), SCP_GOAL);
            }
        }
    }
    Ok(())
}

fn told(direction: &str, way: &str, mib: u32, took: Duration) {
    let rate = f64::from(mib) / took.as_secs_f64();
    figure(&format!("agent_{direction}_{way}"), rate, "MiB/s");
}

/// A file of bytes of chance.
fn make(path: &Path, mib: u32) -> Outcome {
    let mut random = File::open("/dev/urandom")?.take(u64::from(mib) << 20);
    io::copy(&mut random, &mut File::create(path)?)?;
    Ok(())
}

fn timed(program: &mut Command) -> Outcome<Duration> {
    let began = Instant::now();
    let status = program.status()?;
    match status.success() {
        true => Ok(began.elapsed()),
        false => Err(format!("{program:?}: {status}").into()),
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE));
    ureq::Agent::new_with_config(config.build())
}

fn upload(world: &World, id: &str, file: &Path) -> Outcome<Duration> {
    let (_, frame) = form(PATH, b"");
    // The form around no contents, cut where they belong: before the break of its last line.
    let tail = frame.windows(4).rposition(|it| it == b"\r\n--");
    let (head, tail) = frame.split_at(tail.ok_or("a form has an end")?);
    let mut body = head.chain(File::open(file)?).chain(tail);
    let began = Instant::now();
    agent()
        .post(format!(
            "{}/v1/capsules/{id}/files/stream/write",
            world.url()
        ))
        .header("X-API-Key", world.key())
        .header("Content-Type", form_type())
        .send(ureq::SendBody::from_reader(&mut body))?;
    Ok(began.elapsed())
}

fn download(world: &World, id: &str, mib: u32) -> Outcome<Duration> {
    let began = Instant::now();
    let mut answer = agent()
        .post(format!(
            "{}/v1/capsules/{id}/files/stream/read",
            world.url()
        ))
        .header("X-API-Key", world.key())
        .header("Content-Type", "application/json")
        .send(json!({ "path": PATH }).to_string())?;
    let got = io::copy(&mut answer.body_mut().as_reader(), &mut io::sink())?;
    match got == u64::from(mib) << 20 {
        true => Ok(began.elapsed()),
        false => Err(format!("{got} bytes of {mib} MiB came").into()),
    }
}
