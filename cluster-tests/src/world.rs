//! A real daemon with a data directory, ports and network slots of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::leaks;

/// Longest a daemon may take to be ready: it may have to probe the accelerator with a real boot.
const READY_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest a guest may take to boot under emulation on a busy machine.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Pause between two looks at something that another process changes.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Network slots of one world.
const SLOTS: u16 = 32;

/// Each world of this process gets other ports and slots.
static WORLDS: AtomicU16 = AtomicU16::new(0);

/// One daemon, and what it needs to be started again.
#[derive(Debug)]
pub struct World {
    dir: TempDir,
    number: u16,
    process: Option<Child>,
    /// Extra arguments of `node start`.
    pub arguments: Vec<String>,
    /// Extra environment of the daemon.
    pub environment: Vec<(String, String)>,
}

/// An answer of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, as it came.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; `null` where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The stable code of an error answer.
    #[must_use]
    pub fn code(&self) -> String {
        self.json()["error"]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

impl World {
    /// A world whose daemon is ready.
    #[must_use]
    pub fn new() -> Self {
        let mut world = Self::asleep();
        world.start();
        world
    }

    /// A world whose daemon has never been started.
    ///
    /// # Panics
    /// Where the images or the binary have not been built: a test of the real thing needs both.
    #[must_use]
    pub fn asleep() -> Self {
        assert!(
            images().join("initramfs").exists(),
            "no guest images; run deploy/test real-vm"
        );
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::Builder::new()
            .prefix("wrenn-test-")
            .tempdir()
            .expect("a temp dir");
        Self {
            dir,
            number,
            process: None,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// The daemon's data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The first port of this world. Ports of other processes on this machine are avoided by
    /// taking the process id into account.
    fn port(&self) -> u16 {
        let process = u16::try_from(std::process::id() % 1000).unwrap_or(0);
        20_000 + process * 20 + self.number % 10 * 2
    }

    /// The API's base URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    fn slot_base(&self) -> u16 {
        // Above what a quickstart on the same machine uses.
        8192 + u16::try_from(std::process::id() % 256).unwrap_or(0) * 64 + self.number % 2 * SLOTS
    }

    /// The bootstrap key.
    ///
    /// # Panics
    /// Before the first start.
    #[must_use]
    pub fn key(&self) -> String {
        let key = fs::read_to_string(self.data().join("bootstrap.key")).expect("a bootstrap key");
        key.trim().to_owned()
    }

    /// Starts the daemon and waits until it is ready.
    ///
    /// # Panics
    /// When it does not get ready; its log is shown.
    pub fn start(&mut self) {
        self.spawn();
        let deadline = Instant::now() + READY_TIMEOUT;
        while !self.is_ready() {
            assert!(self.is_alive(), "the daemon ended:\n{}", self.log());
            assert!(
                Instant::now() < deadline,
                "the daemon is not ready:\n{}",
                self.log()
            );
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Starts the daemon and does not wait.
    ///
    /// # Panics
    /// When the binary cannot be run.
    pub fn spawn(&mut self) {
        let _old = fs::remove_file(self.data().join("ready.json"));
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .expect("a log file");
        let port = self.port();
        let mut command = Command::new(wrenn());
        command
            .args(["node", "start", "--name", "test"])
            .arg("--data-dir")
            .arg(self.data())
            .arg("--images-dir")
            .arg(images())
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(["--cluster-listen", &format!("127.0.0.1:{port}")])
            .args(["--slot-base", &self.slot_base().to_string()])
            .args(["--slot-count", &SLOTS.to_string()])
            .args(&self.arguments)
            .envs(self.environment.clone())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log);
        self.process = Some(command.spawn().expect("the wrenn binary runs"));
    }

    fn is_ready(&self) -> bool {
        self.data().join("ready.json").exists()
            && self
                .get("/healthz")
                .is_some_and(|answer| answer.status == 200)
    }

    /// Whether the daemon's process lives.
    pub fn is_alive(&mut self) -> bool {
        match &mut self.process {
            Some(process) => process.try_wait().expect("an own child").is_none(),
            None => false,
        }
    }

    /// Waits until the daemon's process has ended by itself.
    ///
    /// # Panics
    /// When it has not after a while.
    pub fn wait_end(&mut self) {
        let deadline = Instant::now() + READY_TIMEOUT;
        while self.is_alive() {
            assert!(
                Instant::now() < deadline,
                "the daemon does not end:\n{}",
                self.log()
            );
            thread::sleep(LOOK_AGAIN);
        }
        self.process = None;
    }

    /// The daemon's process id.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running daemon").id()
    }

    /// Ends the daemon as a power cut would: no goodbye.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _gone = process.kill();
            let _status = process.wait();
        }
    }

    /// Asks the daemon to stop and waits until it has.
    ///
    /// # Panics
    /// When it cannot be signalled.
    pub fn stop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).expect("an own child");
        self.wait_end();
    }

    /// Everything the daemon has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("node.log")
    }

    /// What this world has on the host now.
    #[must_use]
    pub fn footprint(&self) -> std::collections::BTreeSet<String> {
        leaks::of_node(&self.slot_tag(), self.dir.path())
    }

    /// The tag in the names of this world's network slots.
    #[must_use]
    pub fn slot_tag(&self) -> String {
        fs::read_to_string(self.data().join("net/tag"))
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    /// A GET without a key; `None` where nobody answers.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<Answer> {
        self.send("GET", path, &[], None)
    }

    /// A request with the bootstrap key and a JSON body.
    ///
    /// # Panics
    /// Where nobody answers.
    #[must_use]
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let key = self.key();
        let mut headers = vec![("X-API-Key", key.as_str())];
        let bytes = body.map(|body| body.to_string().into_bytes());
        if bytes.is_some() {
            headers.push(("Content-Type", "application/json"));
        }
        self.send(method, path, &headers, bytes.as_deref())
            .unwrap_or_else(|| {
                panic!(
                    "{method} {path}: no answer; the daemon's log:\n{}",
                    self.log()
                )
            })
    }

    /// Any request; `None` where nobody answers.
    #[must_use]
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Option<Answer> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(BOOT_TIMEOUT))
            .build();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let agent = ureq::Agent::new_with_config(config);
        let mut response = match body {
            Some(body) => agent.run(request.body(body).expect("a request")).ok()?,
            None => agent.run(request.body(()).expect("a request")).ok()?,
        };
        let status = response.status().as_u16();
        let body = response
            .body_mut()
            .with_config()
            .limit(u64::MAX)
            .read_to_vec()
            .ok()?;
        Some(Answer { status, body })
    }

    /// A running capsule of the `minimal` template.
    ///
    /// # Panics
    /// When it does not get running.
    #[must_use]
    pub fn capsule(&self) -> String {
        self.capsule_with(&json!({ "memory_mb": 256 }))
    }

    /// A running capsule.
    ///
    /// # Panics
    /// When it does not get running.
    #[must_use]
    pub fn capsule_with(&self, request: &Value) -> String {
        let created = self.call("POST", "/v1/capsules", Some(request));
        assert!(
            matches!(created.status, 201 | 202),
            "{created:?}\n{}",
            self.log()
        );
        let id = created.json()["id"].as_str().expect("an id").to_owned();
        self.wait_status(&id, "running");
        id
    }

    /// Waits until a capsule has a status.
    ///
    /// # Panics
    /// When it gets another final one, or takes too long.
    pub fn wait_status(&self, id: &str, wanted: &str) {
        let deadline = Instant::now() + BOOT_TIMEOUT;
        loop {
            let seen = self.call("GET", &format!("/v1/capsules/{id}"), None).json();
            let status = seen["status"].as_str().unwrap_or_default();
            if status == wanted {
                return;
            }
            let final_one = matches!(status, "stopped" | "error");
            assert!(!final_one, "{id} is {seen}, not {wanted}\n{}", self.log());
            assert!(
                Instant::now() < deadline,
                "{id} stays {seen}\n{}",
                self.log()
            );
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Runs a shell line in a capsule.
    #[must_use]
    pub fn exec(&self, id: &str, line: &str) -> Value {
        let request = json!({ "cmd": "/bin/sh", "args": ["-c", line] });
        let answer = self.call("POST", &format!("/v1/capsules/{id}/exec"), Some(&request));
        assert_eq!(answer.status, 200, "{line}: {answer:?}");
        answer.json()
    }

    /// What a shell line prints in a capsule, without the last line break.
    #[must_use]
    pub fn output(&self, id: &str, line: &str) -> String {
        let ran = self.exec(id, line);
        assert_eq!(ran["exit_code"], 0, "{line}: {ran}");
        ran["stdout"]
            .as_str()
            .unwrap_or_default()
            .trim_end()
            .to_owned()
    }

    /// Process ids of the VMMs that work for a capsule.
    #[must_use]
    pub fn vmm_pids(&self, id: &str) -> Vec<u32> {
        processes_naming(id, "qemu")
    }

    /// Process ids of the shims that work for a capsule.
    #[must_use]
    pub fn shim_pids(&self, id: &str) -> Vec<u32> {
        processes_naming(id, "shim")
    }

    /// Ends everything this world left on the host.
    ///
    /// # Panics
    /// When the cleaning command fails.
    pub fn clean_up(&mut self) {
        self.kill();
        if self.data().exists() {
            let cleaned = Command::new(wrenn())
                .args(["node", "clean-up", "--data-dir"])
                .arg(self.data())
                .output()
                .expect("the wrenn binary runs");
            assert!(
                cleaned.status.success(),
                "{}",
                String::from_utf8_lossy(&cleaned.stderr)
            );
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let tag = self.slot_tag();
        self.clean_up();
        let left = if tag.is_empty() {
            std::collections::BTreeSet::default()
        } else {
            leaks::of_node(&tag, self.dir.path())
        };
        if thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        } else {
            assert!(left.is_empty(), "left behind: {left:#?}");
        }
    }
}

/// Live processes with both words in their command line.
fn processes_naming(id: &str, word: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let names_it = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains(id) && line.contains(word)
    };
    pids.filter(names_it).collect()
}

/// The guest images under test.
#[must_use]
pub fn images() -> PathBuf {
    env::var_os("WRENN_IMAGES").map_or_else(|| workspace().join(".wrenn-dev/images"), PathBuf::from)
}

/// The binary under test.
///
/// # Panics
/// Where it has not been built.
#[must_use]
pub fn wrenn() -> PathBuf {
    let chosen = env::var_os("WRENN_BIN").map(PathBuf::from);
    // Test binaries lie in target/<profile>/deps, the daemon beside that folder.
    let beside = || {
        let own = env::current_exe().expect("a test binary has a path");
        own.ancestors()
            .skip(1)
            .map(|dir| dir.join("wrenn"))
            .find(|path| path.is_file())
    };
    chosen
        .or_else(beside)
        .expect("no wrenn binary; run deploy/test real-vm")
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
}
