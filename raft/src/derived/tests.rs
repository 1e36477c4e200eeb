//! The copy on a real sled: sizes, replacements, tampering.

use super::*;
use crate::types::CommittedLeader;

fn at(index: u64) -> Position {
    let leader = CommittedLeader {
        term: 1,
        node_id: 1,
    };
    Position {
        applied: Some(LogId::new(leader, index)),
        membership: StoredMembership::default(),
    }
}

fn start(dir: &Path) -> (Derived, Position, Vec<Row>) {
    let loaded = load(dir).expect("no doubt");
    Derived::start(dir, loaded).expect("starts")
}

fn row(key: &str, bytes: usize) -> Row {
    (key.into(), vec![b'v'; bytes])
}

fn some(row: Row) -> Change {
    (row.0, Some(row.1))
}

/// Rows of every size around that of a part, written and stopped.
fn written(dir: &Path) -> Vec<Row> {
    let sizes = [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 50_000];
    // Keys that are prefixes of one another, and one that looks like a part number.
    let keys = ["a", "aa", "a\0\0", "b", "", "c"];
    let rows: Vec<Row> = keys
        .into_iter()
        .zip(sizes)
        .map(|(key, bytes)| row(key, bytes))
        .collect();
    let derived = start(dir).0;
    derived.put(rows.iter().cloned().map(some), at(7));
    derived.stop();
    rows
}

fn sorted(mut rows: Vec<Row>) -> Vec<Row> {
    rows.sort();
    rows
}

#[test]
fn rows_of_any_size_come_back_with_their_position() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    let rows = written(&dir);
    let (_derived, position, found) = start(&dir);
    assert_eq!(position, at(7));
    assert!(sorted(found) == sorted(rows));
}

#[test]
fn shrunk_grown_and_removed_rows_leave_no_parts_behind() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    written(&dir);
    let (derived, ..) = start(&dir);
    derived.put(
        [
            some(row("c", 10)),
            some(row("a", 9000)),
            (b"".to_vec(), None),
        ],
        at(8),
    );
    derived.put(
        [(b"b".to_vec(), None), (b"never there".to_vec(), None)],
        at(9),
    );
    derived.flush();
    derived.stop();
    drop(derived);
    let (_derived, position, found) = start(&dir);
    assert_eq!(position, at(9));
    let expected = vec![
        row("a", 9000),
        row("aa", 1),
        row("a\0\0", PART_BYTES - 1),
        row("c", 10),
    ];
    assert!(sorted(found) == sorted(expected));
}

#[test]
fn a_replacement_leaves_nothing_of_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    written(&dir);
    let (derived, ..) = start(&dir);
    let rows: Vec<Row> = (0..2500)
        .map(|key| row(&format!("new {key}"), 20))
        .collect();
    derived.replace(rows.clone(), at(70));
    derived.stop();
    drop(derived);
    let (_derived, position, found) = start(&dir);
    assert_eq!(position, at(70));
    assert!(sorted(found) == sorted(rows));
}

#[test]
fn a_missing_stale_or_foreign_entry_is_doubted() {
    let dir = tempfile::tempdir().unwrap();
    let tamper = |name: &str, with: fn(&sled::Db)| {
        let dir = dir.path().join(name);
        written(&dir);
        let db = open(&dir).unwrap();
        with(&db);
        db.flush().unwrap();
        drop(db);
        assert!(matches!(load(&dir), Err(Doubt::Wrong(_))), "{name}");
    };
    tamper("no head", |db| {
        drop(db.remove(part_key(HEAD, &[], 0)).unwrap())
    });
    tamper("no row", |db| {
        drop(db.remove(part_key(ROW, b"aa", 0)).unwrap())
    });
    tamper("no part", |db| {
        drop(db.remove(part_key(ROW, b"c", 3)).unwrap())
    });
    tamper("one part too many", |db| {
        drop(db.insert(part_key(ROW, b"aa", 1), b"x").unwrap())
    });
    tamper("another value", |db| {
        let key = part_key(ROW, b"aa", 0);
        let mut value = db.get(&key).unwrap().unwrap().to_vec();
        value[PART_HEAD_BYTES] ^= 1;
        drop(db.insert(key, value).unwrap());
    });
    tamper("a foreign key", |db| drop(db.insert(b"?", b"x").unwrap()));
}

#[test]
fn garbage_in_the_folder_is_never_taken_for_rows() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    for (conf, db) in [
        (&b"garbage"[..], 0xa5_u8),
        (b"", 0xff),
        (b"segment_size: 1", 0),
    ] {
        fs::create_dir(&state).unwrap();
        fs::write(state.join("conf"), conf).unwrap();
        fs::write(state.join("db"), vec![db; 5000]).unwrap();
        // sled takes some garbage for an empty database; that is as good as a refusal.
        let taken = load(&state).is_ok_and(|loaded| loaded.position != Position::default());
        assert!(!taken, "{db:x}");
        move_aside(&state).unwrap();
    }
    assert!(load(&state).is_ok());
}
