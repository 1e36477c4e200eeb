//! A process that writes until it is killed, and the check of what it left.
//!
//! A test binary runs itself with [`CHILD`] set; that run is the writer. It notes each number in
//! `acknowledged` after its proposal was answered, and starts by checking what is already there.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use wrenn_raft::group::Group;

use super::toy::Toy;
use super::{get, set, start};

/// Names the folder that the writer works in.
const CHILD: &str = "WRENN_TEST_WRITER_DIR";
/// Names the file of acknowledgements.
const NOTES: &str = "WRENN_TEST_WRITER_NOTES";
/// Number of keys, so that rows change as well as grow.
const KEYS: u64 = 40;

/// Never returns if this process is the writer.
pub fn become_writer_if_asked() {
    if let (Some(dir), Some(notes)) = (std::env::var_os(CHILD), std::env::var_os(NOTES)) {
        write_until_killed(Path::new(&dir), Path::new(&notes));
    }
}

/// Starts a writer, in the test named `test`, and waits until it has checked what is there.
pub fn spawn(test: &str, dir: &Path, notes: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--include-ignored", "--nocapture"])
        .env(CHILD, dir)
        .env(NOTES, notes)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.any(|line| line.unwrap() == "ready");
    assert!(ready, "the writer found something missing");
    child
}

/// Number of writes acknowledged so far.
pub fn acknowledged(notes: &Path) -> u64 {
    let text = fs::read_to_string(notes).unwrap_or_default();
    // The last line may be half written.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().last().map_or(0, |line| line.parse().unwrap())
}

/// Opens the group in `dir` and checks that it has everything up to `last`.
pub async fn check(dir: &Path, last: u64) -> Group<Toy> {
    let group = start(dir).await;
    for number in last.saturating_sub(KEYS - 1).max(1)..=last {
        let found = get(&group, &format!("key {}", number % KEYS));
        let found: u64 = found.expect("the key is there").parse().unwrap();
        // What was written after the last note may be there too.
        assert!(
            found >= number && (found - number).is_multiple_of(KEYS),
            "{number}: {found}"
        );
    }
    group
}

fn write_until_killed(dir: &Path, notes: &Path) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let end = runtime.block_on(async {
        let mut number = acknowledged(notes) + 1;
        let group = check(dir, number - 1).await;
        let mut options = OpenOptions::new();
        let mut noted = options.create(true).append(true).open(notes).unwrap();
        println!("\nready");
        while number < u64::MAX {
            set(
                &group,
                &format!("key {}", number % KEYS),
                &number.to_string(),
            )
            .await;
            noted.write_all(format!("{number}\n").as_bytes()).unwrap();
            number += 1;
        }
        number
    });
    panic!("the writer ended by itself at {end}")
}
