//! The book, on a clock moved by hand and files that a test makes up.

use std::cell::RefCell;
use std::path::Path;

use super::*;
use crate::base::clock::HandClock;

const ID: SandboxId = SandboxId([7; 16]);
const OTHER: SandboxId = SandboxId([8; 16]);
const START: Stamp = Stamp(1_700_000_000_250);
const MINUTE: Duration = Duration::from_secs(60);
const RANGES: [u64; 6] = [5, 10, 60, 120, 360, 1440];

/// A host with one VMM that keeps half a core busy; it notes what it is asked for.
struct Host {
    clock: HandClock,
    asked: RefCell<Vec<String>>,
    runs: bool,
}

impl Files for Host {
    fn text(&self, path: &Path) -> Option<String> {
        let path = path.to_str().unwrap().replace("/proc/41/", "");
        let passed = self.clock.now().since(START);
        let said = match path.as_str() {
            "stat" => format!(
                "41 (vmm) S 1 1 1 0 -1 0 0 0 0 0 {} 0 0 0 20 0 4 0 100",
                passed.as_millis() / 20
            ),
            "statm" => "900 25 7 1 0 80 0".to_owned(),
            "net/dev" => {
                let sent = passed.as_secs();
                format!(" tap0: {sent} 0 0 0 0 0 0 0 7 0 0 0 0 0 0 0")
            }
            other => panic!("nobody needs {other}"),
        };
        self.asked.borrow_mut().push(path);
        self.runs.then_some(said)
    }

    fn allocated_bytes(&self, _: &Path) -> u64 {
        self.asked.borrow_mut().push("disk".to_owned());
        4096
    }
}

struct World {
    root: tempfile::TempDir,
    host: Host,
    book: Book,
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let host = Host {
            clock: HandClock::at(START),
            asked: RefCell::default(),
            runs: true,
        };
        let book = Book::new(root.path().join("samples"));
        book.recall(START);
        let world = Self { root, host, book };
        world.begin();
        world
    }

    /// A guest of which its shim has just named the VMM.
    fn begin(&self) {
        assert!(self.book.found(ID, Epoch(1), 41));
    }

    fn look(&self) {
        let target = Target {
            id: ID,
            pid: 41,
            overlay: PathBuf::from("/nowhere"),
        };
        self.book.look(&[target], &self.host, &self.host.clock);
    }

    /// As many looks, one each period.
    fn run(&self, looks: u32) {
        for _ in 0..looks {
            self.look();
            self.host.clock.advance(FINEST);
        }
    }

    fn samples(&self, minutes: u64) -> Vec<Sample> {
        let range = Duration::from_secs(minutes * 60);
        self.book.samples(ID, range, self.host.clock.now())
    }

    /// Another daemon over the same directory. The one before had no time to do anything.
    fn restart(&mut self) {
        self.book = Book::new(self.root.path().join("samples"));
        self.book.recall(self.host.clock.now());
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.root.path().join("samples"))
            .unwrap()
            .count()
    }
}

#[test]
fn a_sample_is_what_was_used_between_two_looks() {
    let mut kept = Kept::default();
    let reading = |busy_ms| Reading {
        busy_ms,
        resident_kib: 7,
        ..Reading::default()
    };
    assert!(
        kept.look(Stamp(10_000), reading(500)).is_none(),
        "there is nothing to compare with"
    );
    assert!(kept.look(Stamp(11_000), reading(2000)).is_some());
    assert!(
        kept.look(Stamp(11_000), reading(3000)).is_none(),
        "no time has passed"
    );
    let samples = kept.rings.last(MINUTE, Stamp(12_000));
    assert_eq!(samples.len(), 1);
    assert!((samples[0].busy_cores - 1.5).abs() < 1e-3);
    assert_eq!(samples[0].resident_kib, 7);
}

#[test]
fn a_guest_is_known_by_half_seconds_and_its_counters_by_seconds() {
    let world = World::new();
    world.run(21);
    let samples = world.samples(10);
    assert_eq!(samples.len(), 20);
    for pair in samples.windows(2) {
        assert_eq!(pair[1].at.since(pair[0].at), FINEST);
    }
    for sample in &samples {
        assert!((sample.busy_cores - 0.5).abs() < 1e-3);
        assert_eq!((sample.resident_kib, sample.disk_kib), (100, 4));
        let passed = sample.at.since(START);
        assert_eq!(sample.sent_bytes, passed.as_secs(), "at {passed:?}");
    }
}

#[test]
fn a_second_costs_five_files_a_guest_and_a_look_at_its_disk() {
    let world = World::new();
    world.run(1);
    world.host.asked.take();
    world.run(2);
    let mut asked = world.host.asked.take();
    asked.sort();
    assert_eq!(asked, ["disk", "net/dev", "stat", "stat", "statm", "statm"]);
}

#[test]
fn a_node_without_guests_reads_and_writes_nothing() {
    let world = World::new();
    world.book.look(&[], &world.host, &world.host.clock);
    assert!(world.host.asked.take().is_empty());
    assert_eq!(world.files(), 0);
}

#[test]
fn a_chart_has_no_hole_but_the_time_that_the_daemon_was_down() {
    let mut world = World::new();
    // Two and a half hours, and some of each period.
    world.run(5 * 3600 + 77);
    let before = RANGES.map(|minutes| world.samples(minutes));
    world.restart();
    assert_eq!(RANGES.map(|minutes| world.samples(minutes)), before);

    let ended = world.samples(10).last().unwrap().at;
    let down = Duration::from_secs(10);
    world.host.clock.advance(down);
    world.restart();
    world.begin();
    world.run(120);
    let after = world.samples(10);
    let gaps = after.windows(2).map(|it| it[1].at.since(it[0].at));
    let gaps: Vec<_> = gaps.filter(|it| *it != FINEST).collect();
    // The sample that its first look begins, too, is missing.
    assert_eq!(gaps, [down + 2 * FINEST]);
    assert!(after.iter().any(|it| it.at == ended));
    let day = world.samples(1440);
    let gaps = day.windows(2).map(|it| it[1].at.since(it[0].at));
    assert!(gaps.clone().all(|it| it <= 5 * MINUTE), "{gaps:?}");
}

#[test]
fn samples_of_a_guest_that_rests_outlive_the_daemon_and_go_when_they_are_a_day_old() {
    let mut world = World::new();
    world.run(1300);
    world.host.clock.advance(60 * MINUTE);
    world.restart();
    world.book.sweep(world.host.clock.now(), |_| true);
    assert_eq!(world.samples(10), []);
    assert!(world.samples(120).len() >= 20);
    assert_eq!(world.files(), 1);
    world.host.clock.advance(25 * 60 * MINUTE);
    world.book.sweep(world.host.clock.now(), |_| true);
    assert_eq!((world.book.len(), world.files()), (0, 0));
}

#[test]
fn what_has_ended_or_gone_takes_its_file_along() {
    let world = World::new();
    world.run(10);
    assert!(world.book.found(OTHER, Epoch(1), 42));
    assert_eq!((world.book.len(), world.files()), (2, 1));
    world.book.sweep(world.host.clock.now(), |id| id == OTHER);
    assert_eq!((world.book.len(), world.files()), (1, 0));
}

#[test]
fn a_guest_that_ended_while_the_daemon_was_down_leaves_no_file() {
    let mut world = World::new();
    world.run(10);
    world.restart();
    world.book.sweep(world.host.clock.now(), |_| false);
    assert_eq!((world.book.len(), world.files()), (0, 0));
}

#[test]
fn a_disk_that_refuses_costs_no_sample_of_this_daemon() {
    let world = World::new();
    let samples = world.root.path().join("samples");
    std::fs::remove_dir(&samples).unwrap();
    std::fs::write(&samples, "in the way").unwrap();
    world.run(10);
    assert_eq!(world.samples(10).len(), 9);
}

#[test]
fn a_disk_that_refuses_is_told_once_until_all_is_written_again() {
    let world = World::new();
    let refused = [false, true, true, false, true];
    let told = refused.map(|it| world.book.is_news(it));
    assert_eq!(told, [false, true, false, false, true]);

    // One that is written down clears nothing of one that is not, in the same look.
    assert!(world.book.found(OTHER, Epoch(1), 41));
    std::fs::create_dir(world.root.path().join("samples").join(OTHER.to_string())).unwrap();
    let targets = [ID, OTHER, ID].map(|id| Target {
        id,
        pid: 41,
        overlay: PathBuf::from("/nowhere"),
    });
    for _ in 0..3 {
        world.book.look(&targets, &world.host, &world.host.clock);
        world.host.clock.advance(FINEST);
    }
    assert!(world.book.refused.load(Ordering::Relaxed));
    assert!(!world.book.is_news(true));
}

#[test]
fn a_clock_that_is_set_back_hides_nothing_of_what_comes() {
    let world = World::new();
    world.run(100);
    world.host.clock.set(Stamp(START.0 - 3_600_000));
    // The first look after it has nothing to compare with.
    world.run(11);
    for minutes in RANGES {
        let samples = world.samples(minutes);
        assert!(samples.is_sorted_by_key(|it| it.at));
        assert!(samples.iter().all(|it| it.at < START), "{samples:?}");
    }
    assert_eq!(world.samples(10).len(), 10);
}

#[test]
fn a_daemon_that_starts_before_its_clock_is_right_loses_nothing() {
    let mut world = World::new();
    world.run(10);
    let (now, before) = (world.host.clock.now(), world.samples(10));
    world.host.clock.set(Stamp(1000));
    world.restart();
    world.book.sweep(world.host.clock.now(), |_| true);
    assert_eq!((world.samples(10).len(), world.files()), (0, 1));
    world.host.clock.set(now);
    world.restart();
    assert_eq!(world.samples(10), before);
}

#[test]
fn what_a_guest_said_of_itself_is_known_over_a_restart() {
    let mut world = World::new();
    let inside = Inside {
        mem_total_kib: 1024,
        ..Inside::default()
    };
    world.book.heard(ID, inside);
    world.run(10);
    world.restart();
    world.begin();
    world.run(2);
    let samples = world.samples(10);
    assert_eq!(samples.last().unwrap().inside, inside);
}

#[test]
fn a_vmm_that_is_no_more_is_asked_for_again() {
    let mut world = World::new();
    assert_eq!(world.book.vmm(ID, Epoch(1)), Some(41));
    assert_eq!(world.book.vmm(ID, Epoch(2)), None);
    world.host.runs = false;
    world.look();
    assert_eq!(world.book.vmm(ID, Epoch(1)), None);
}

#[test]
fn where_there_is_no_room_whoever_rested_longest_gives_way() {
    let world = World::new();
    world.run(10);
    for guest in 1..MOST_GUESTS {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(guest as u64).to_le_bytes());
        let id = SandboxId(id);
        assert!(world.book.found(id, Epoch(1), 41));
        let overlay = PathBuf::from("/nowhere");
        let target = Target {
            id,
            pid: 41,
            overlay,
        };
        world.book.look(&[target], &world.host, &world.host.clock);
    }
    assert!(!world.book.found(OTHER, Epoch(1), 42));
    world.book.sweep(world.host.clock.now(), |_| true);
    assert_eq!(world.book.len(), MOST_GUESTS - 1);
    assert_eq!((world.samples(10), world.files()), (Vec::new(), 0));
    assert!(world.book.found(OTHER, Epoch(1), 42));
}
