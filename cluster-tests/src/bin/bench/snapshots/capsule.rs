//! A capsule as a client of the API sees it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::{Value, json};
use wrenn_cluster_tests::world::World;

use crate::Outcome;
use crate::create::connect;
use crate::figures::ms;
use crate::http::Connection;

/// The file in the guest's memory.
const FILE: &str = "/dev/shm/fill";
/// Written by one command: an emulated guest takes a second or two for it.
const PIECE_MIB: u32 = 64;
/// Bytes of a block of the kernel's books.
const BLOCK_BYTES: u64 = 512;
/// Pause between two looks at something that was answered before it was done.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Longest a pause or a resume may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// A capsule, and a connection to the node that is asked for it.
pub(super) struct Capsule {
    api: Connection,
    pub(super) id: String,
}

/// What a pause took.
pub(super) struct Paused {
    /// From the request to the answer, in milliseconds.
    pub(super) took: f64,
    /// What the node says of its steps.
    pub(super) steps: BTreeMap<String, f64>,
    /// What it had to store anew, in MiB.
    pub(super) new_mib: f64,
    /// What is in the snapshot, in MiB.
    pub(super) whole_mib: f64,
}

/// What a resume took, in milliseconds.
pub(super) struct Resumed {
    /// Until it runs.
    pub(super) running: f64,
    /// Until the first command has answered.
    pub(super) first_answer: f64,
    /// What the node says of its stages.
    pub(super) stages: BTreeMap<String, f64>,
}

impl Capsule {
    /// A running capsule.
    pub(super) fn create(world: &World, memory_mib: u32) -> Outcome<Self> {
        let mut api = connect(world)?;
        let request = json!({ "memory_mb": memory_mib, "timeout_sec": 0 }).to_string();
        let answer = api.call("POST", "/v1/capsules", request.as_bytes())?;
        let shown = answer.json()?;
        let id = shown["id"].as_str().ok_or_else(|| shown.to_string())?;
        let mut capsule = Self {
            id: id.to_owned(),
            api,
        };
        capsule.wait_for("running")?;
        Ok(capsule)
    }

    /// The same capsule, asked for through another daemon, or one that was started anew.
    pub(super) fn through(self, world: &World) -> Outcome<Self> {
        let api = connect(world)?;
        Ok(Self { api, ..self })
    }

    /// What the API says of it.
    pub(super) fn shown(&mut self) -> Outcome<Value> {
        let path = format!("/v1/capsules/{}", self.id);
        Ok(self.api.call("GET", &path, b"")?.expect(200)?.json()?)
    }

    /// Runs a command line and returns what it wrote.
    pub(super) fn exec(&mut self, line: &str) -> Outcome<String> {
        let path = format!("/v1/capsules/{}/exec", self.id);
        let command = json!({ "cmd": "/bin/sh", "args": ["-c", line], "timeout_sec": 300 });
        let answer = self
            .api
            .call("POST", &path, command.to_string().as_bytes())?;
        let ran = answer.expect(200)?.json()?;
        if ran["exit_code"] != 0 {
            return Err(format!("{line}: {ran}").into());
        }
        Ok(ran["stdout"].as_str().unwrap_or_default().to_owned())
    }

    /// Fills `mib` of its memory with bytes of chance.
    pub(super) fn fill(&mut self, mib: u32) -> Outcome {
        self.exec(
            "mkdir -p /dev/shm; umount /dev/shm 2>/dev/null; \
             mount -t tmpfs -o size=90% tmpfs /dev/shm",
        )?;
        for from in (0..mib).step_by(PIECE_MIB as usize) {
            self.write(from, PIECE_MIB.min(mib - from))?;
        }
        Ok(())
    }

    /// Writes `mib` of the file anew, in place: just as much of its memory is written.
    pub(super) fn write(&mut self, from_mib: u32, mib: u32) -> Outcome {
        self.exec(&format!(
            "dd if=/dev/urandom of={FILE} bs=1M seek={from_mib} count={mib} conv=notrunc 2>&1"
        ))?;
        Ok(())
    }

    /// Has the guest read all of the file.
    pub(super) fn read_all(&mut self) -> Outcome<Duration> {
        let began = Instant::now();
        self.exec(&format!("cat {FILE} > /dev/null"))?;
        Ok(began.elapsed())
    }

    /// Pauses it.
    pub(super) fn pause(&mut self) -> Outcome<Paused> {
        let (took, shown) = self.ask("pause", "paused")?;
        let rest = &shown["snapshot"];
        let mib = |name: &str| rest[name].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20);
        Ok(Paused {
            took,
            steps: times(&rest["pause_ms"]),
            new_mib: mib("new_bytes"),
            whole_mib: mib("memory_bytes") + mib("disk_bytes"),
        })
    }

    /// Resumes it where it likes, and runs a first command.
    pub(super) fn resume(&mut self) -> Outcome<Resumed> {
        self.resume_by("resume")
    }

    /// The same on the node of that name.
    pub(super) fn resume_on(&mut self, node: &str) -> Outcome<Resumed> {
        self.resume_by(&format!("resume?node={node}"))
    }

    fn resume_by(&mut self, route: &str) -> Outcome<Resumed> {
        let began = Instant::now();
        let (running, _) = self.ask(route, "running")?;
        self.exec("true")?;
        let first_answer = ms(began.elapsed());
        Ok(Resumed {
            running,
            first_answer,
            stages: times(&self.shown()?["start_ms"]),
        })
    }

    /// Ends it.
    pub(super) fn destroy(mut self) -> Outcome {
        let path = format!("/v1/capsules/{}", self.id);
        self.api.call("DELETE", &path, b"")?.expect(204)?;
        Ok(())
    }

    /// Asks for a change and waits for it; an overloaded node answers before it is done.
    fn ask(&mut self, what: &str, wanted: &str) -> Outcome<(f64, Value)> {
        let began = Instant::now();
        let path = format!("/v1/capsules/{}/{what}", self.id);
        let answer = self.api.call("POST", &path, b"")?;
        let mut took = began.elapsed();
        match answer.status {
            200 => {}
            202 => {
                self.wait_for(wanted)?;
                took = began.elapsed();
            }
            _ => drop(answer.expect(200)?),
        }
        Ok((ms(took), self.shown()?))
    }

    fn wait_for(&mut self, wanted: &str) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.shown()?;
            let status = shown["status"].as_str().unwrap_or_default();
            if status == wanted {
                return Ok(());
            }
            let over = ["error", "stopped", "missing"].contains(&status);
            if over || Instant::now() > deadline {
                return Err(shown.to_string().into());
            }
            thread::sleep(LOOK_AGAIN);
        }
    }
}

/// How much of a guest's memory its host holds, in MiB: what exists of the memfd of that length
/// which its shim has.
pub(super) fn held_mib(world: &World, id: &str, memory_mib: u32) -> Outcome<f64> {
    let dir = format!("/proc/{}/fd", world.shim_pid(id));
    for entry in fs::read_dir(dir)? {
        let Ok(meta) = fs::metadata(entry?.path()) else {
            continue;
        };
        if meta.is_file() && meta.len() == u64::from(memory_mib) << 20 {
            return Ok((meta.blocks() * BLOCK_BYTES) as f64 / f64::from(1 << 20));
        }
    }
    Err("the shim has no such memory".into())
}

fn times(told: &Value) -> BTreeMap<String, f64> {
    let stages = told.as_object().into_iter().flatten();
    let stages = stages.filter_map(|(name, took)| Some((name.clone(), took.as_f64()?)));
    stages.collect()
}
