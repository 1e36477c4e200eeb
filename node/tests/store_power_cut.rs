//! A process that seals, drops and collects is killed at random instants, again and again.
//!
//! What it had acknowledged must be there after every kill, byte for byte, and nothing else may
//! pile up. A failure prints the seed; `WRENN_STORE_SEED` repeats its instants as far as a machine
//! can, and `WRENN_STORE_SECONDS` makes it run longer.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use store_support::{LIMITS, content, file_with};
use wrenn_node::base::fault;
use wrenn_node::store::{ImageDigest, Pin, Store};

/// What the child is told: its directory, the images it may count on, where to go on, its seed.
const DIR: &str = "WRENN_STORE_CHILD_DIR";
const PINNED: &str = "WRENN_STORE_CHILD_PINNED";
const NEXT: &str = "WRENN_STORE_CHILD_NEXT";
const SEED: &str = "WRENN_STORE_CHILD_SEED";
/// How long the kills go on by default.
const SECONDS: u64 = 15;
/// Longest a child lives.
const LIFE_MS: u64 = 400;
/// As many images as the child keeps at a time.
const PINNED_AT_ONCE: usize = 6;
/// A child that has said nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the store may take beyond twice what it must keep: the pack being written, one being
/// copied, and what the last life wrote and nobody has collected.
const SLACK_BYTES: u64 = 24 << 20;

type Images = BTreeMap<u64, ImageDigest>;

/// Not a test: what the parents below start and kill.
#[test]
fn child_that_seals_drops_and_collects() {
    let Ok(dir) = env::var(DIR) else {
        return;
    };
    let store = Store::open(&Path::new(&dir).join("store"), LIMITS).unwrap();
    let pinned = Mutex::new(parse(&env::var(PINNED).unwrap()));
    let seed = env::var(SEED).unwrap().parse().unwrap();
    let next: u64 = env::var(NEXT).unwrap().parse().unwrap();
    say("open");
    thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let pins = || {
                    let pinned = pinned.lock().unwrap();
                    Ok::<_, Infallible>(pinned.values().map(|it| Pin::Image(*it)).collect())
                };
                store.collect(pins).unwrap();
                thread::sleep(Duration::from_millis(3));
            }
        });
        let mut random = StdRng::seed_from_u64(seed);
        for name in next.. {
            seal_one(&store, Path::new(&dir), name, &pinned, &mut random);
        }
    });
}

fn seal_one(store: &Store, dir: &Path, name: u64, pinned: &Mutex<Images>, random: &mut StdRng) {
    let bytes = content(name);
    let file = file_with(&dir.join("image"), &bytes);
    let seal = store.begin();
    let sealed = seal.image(&file, bytes.len() as u64).unwrap();
    if random.random_ratio(1, 4) {
        return;
    }
    let kept = seal.finish(None).unwrap();
    let digest = sealed.image.digest;
    // Acknowledged: from here on it may not be lost.
    say(&format!("sealed {name} {digest}"));
    let mut pinned = pinned.lock().unwrap();
    pinned.insert(name, digest);
    drop(kept);
    while pinned.len() > PINNED_AT_ONCE {
        let nth = random.random_range(0..pinned.len());
        let name = *pinned.keys().nth(nth).unwrap();
        say(&format!("dropping {name}"));
        pinned.remove(&name);
    }
}

/// One line to the parent, apart from what the test harness prints.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\n@{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn parse(text: &str) -> Images {
    let words: Vec<&str> = text.split_whitespace().collect();
    let pairs = words.chunks_exact(2);
    pairs
        .map(|pair| (pair[0].parse().unwrap(), pair[1].parse().unwrap()))
        .collect()
}

/// What the parent knows.
struct Expected {
    pinned: Images,
    next: u64,
}

impl Expected {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["@sealed", name, digest] => {
                let name = name.parse().unwrap();
                self.pinned.insert(name, digest.parse().unwrap());
                self.next = self.next.max(name + 1);
            }
            ["@dropping", name] => {
                self.pinned.remove(&name.parse().unwrap());
            }
            _ => {}
        }
    }

    fn start(&self, dir: &Path, seed: u64, fault: Option<&str>) -> Child {
        let pinned = self
            .pinned
            .iter()
            .map(|(name, digest)| format!("{name} {digest} "));
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args([
                "child_that_seals_drops_and_collects",
                "--exact",
                "--nocapture",
            ])
            .env(DIR, dir)
            .env(PINNED, pinned.collect::<String>())
            .env(NEXT, self.next.to_string())
            .env(SEED, seed.to_string())
            .stdout(Stdio::piped());
        if let Some(place) = fault {
            command.env(fault::ABORT_VARIABLE, place);
        }
        command.spawn().unwrap()
    }

    /// Lets a child run until `life` after it opened the store, or until it ends by itself. Says
    /// whether it did.
    fn live(&mut self, child: Child, life: Duration) -> bool {
        self.live_until(child, life, |_| {})
    }

    /// The same, with something that happens to the child before it is killed.
    fn live_until(
        &mut self,
        mut child: Child,
        life: Duration,
        happen: impl FnOnce(&Child),
    ) -> bool {
        let (tell, heard) = mpsc::channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listener = thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let mut end = Instant::now() + PATIENCE;
        let mut opened = false;
        let ended = loop {
            let left = end.saturating_duration_since(Instant::now());
            match heard.recv_timeout(left) {
                Ok(line) if line == "@open" => {
                    opened = true;
                    end = Instant::now() + life;
                }
                Ok(line) => self.hear(&line),
                Err(err) => break err == RecvTimeoutError::Disconnected,
            }
        };
        assert!(opened, "the child could not open its store");
        happen(&child);
        let _ = child.kill();
        child.wait().unwrap();
        listener.join().unwrap();
        heard.try_iter().for_each(|line| self.hear(&line));
        ended
    }

    /// Everything acknowledged is there, and the rest can be collected.
    fn verify(&self, dir: &Path, seed: u64) {
        let store = Store::open(&dir.join("store"), LIMITS).unwrap();
        let checked = store.check().unwrap();
        assert!(checked.is_sound(), "seed {seed}: {checked:?}");
        for (name, digest) in &self.pinned {
            let manifest = store
                .image(digest)
                .unwrap_or_else(|err| panic!("seed {seed}: image {name}: {err}"));
            let expected = content(*name);
            let path = dir.join("assembled");
            store
                .assemble(&manifest, expected.len() as u64, &path)
                .unwrap_or_else(|err| panic!("seed {seed}: image {name}: {err:?}"));
            assert!(
                std::fs::read(&path).unwrap() == expected,
                "seed {seed}: image {name}"
            );
        }
        let stats = store.stats().unwrap();
        let most = 2 * (stats.pack_bytes - stats.garbage_bytes) + SLACK_BYTES;
        assert!(stats.pack_bytes < most, "seed {seed}: {stats:?}");
    }

    fn collect_all(&self, dir: &Path) {
        let store = Store::open(&dir.join("store"), LIMITS).unwrap();
        let pins = self
            .pinned
            .values()
            .map(|digest| Pin::Image(*digest))
            .collect();
        store.collect(|| Ok::<_, Infallible>(pins)).unwrap();
        let stats = store.stats().unwrap();
        assert_eq!(stats.images, self.pinned.len() as u64);
        assert!(stats.garbage_share() <= 0.5, "{stats:?}");
    }
}

/// What makes the instants random; printed, so that it can be given again.
fn seed() -> u64 {
    let given = env::var("WRENN_STORE_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().unwrap());
    println!("WRENN_STORE_SEED={seed}");
    seed
}

fn seconds() -> u64 {
    let given = env::var("WRENN_STORE_SECONDS").ok();
    given.map_or(SECONDS, |text| text.parse().unwrap())
}

#[test]
fn kills_at_random_instants_lose_nothing_acknowledged() {
    let seed =
        env::var("WRENN_STORE_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("WRENN_STORE_SEED={seed}");
    let seconds = env::var("WRENN_STORE_SECONDS").map_or(SECONDS, |text| text.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let dir = tempfile::tempdir().unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    let mut expected = Expected {
        pinned: Images::new(),
        next: 0,
    };
    let mut kills = 0;
    while Instant::now() < end || kills == 0 {
        let child = expected.start(dir.path(), random.random(), None);
        let life = Duration::from_micros(random.random_range(0..LIFE_MS * 1000));
        let ended = expected.live(child, life);
        assert!(!ended, "seed {seed}: the child ended by itself");
        expected.verify(dir.path(), seed);
        kills += 1;
    }
    println!("{kills} kills, {} images sealed", expected.next);
    expected.collect_all(dir.path());
    expected.verify(dir.path(), seed);
}

#[test]
fn a_crash_between_any_two_steps_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Expected {
        pinned: Images::new(),
        next: 0,
    };
    let places = [
        "store-seal-synced",
        "store-seal-images",
        "store-collect-swept",
        "store-collect-copied",
        "store-collect-unlinked",
    ];
    for (place, seed) in places.into_iter().zip(0..) {
        // Something to lose.
        let child = expected.start(dir.path(), seed, None);
        expected.live(child, Duration::from_millis(LIFE_MS));
        let child = expected.start(dir.path(), seed, Some(place));
        assert!(expected.live(child, PATIENCE), "{place} was not reached");
        expected.verify(dir.path(), seed);
    }
    expected.collect_all(dir.path());
}

/// A file system in a file, and what its medium held at the instant of a power cut.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mounted")).unwrap();
        let image = File::create(dir.path().join("disk")).unwrap();
        image.set_len(512 << 20).unwrap();
        let disk = Self { dir };
        run(
            "mkfs.ext4",
            &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
            &[disk.path("disk")],
        );
        disk.mount();
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mount(&self) {
        run(
            "mount",
            &["-o", "loop"],
            &[self.path("disk"), self.path("mounted")],
        );
    }

    fn unmount(&self) {
        run("umount", &[], &[self.path("mounted")]);
    }

    /// Keeps what the medium holds now: what was written and not synced is mostly still in memory.
    fn cut_power(&self, child: &Child) {
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        run(
            "cp",
            &["--sparse=always"],
            &[self.path("disk"), self.path("cut")],
        );
    }

    /// Goes on from the medium as it was kept.
    fn restore_power(&self) {
        self.unmount();
        std::fs::rename(self.path("cut"), self.path("disk")).unwrap();
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path("mounted")).status();
    }
}

fn run(program: &str, options: &[&str], paths: &[PathBuf]) {
    let status = Command::new(program).args(options).args(paths).status();
    assert!(status.unwrap().success(), "{program} {options:?} {paths:?}");
}

/// Unlike a kill, this loses what was written and never synced.
#[test]
#[ignore = "mounts a loop device, which needs root"]
fn power_cuts_lose_nothing_acknowledged() {
    let seed = seed();
    let end = Instant::now() + Duration::from_secs(seconds());
    let disk = Disk::new();
    let mut random = StdRng::seed_from_u64(seed);
    let mut expected = Expected {
        pinned: Images::new(),
        next: 0,
    };
    let mut cuts = 0;
    while Instant::now() < end || cuts == 0 {
        let child = expected.start(&disk.path("mounted"), random.random(), None);
        let life = Duration::from_micros(random.random_range(0..LIFE_MS * 1000));
        let ended = expected.live_until(child, life, |child| disk.cut_power(child));
        assert!(!ended, "seed {seed}: the child ended by itself");
        disk.restore_power();
        expected.verify(&disk.path("mounted"), seed);
        cuts += 1;
    }
    println!("{cuts} power cuts, {} images sealed", expected.next);
    expected.collect_all(&disk.path("mounted"));
}
