//! The book of serials, as a fuzz target.

use std::fs;

use proto::fuzzing::Target;

use super::serial::SerialBook;
use super::slot::SERIAL_MAX;
use crate::fuzzing::file_with;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[Target {
    name: "slot-serials",
    samples,
    run: book,
}];

fn samples() -> Vec<Vec<u8>> {
    let (_dir, path) = file_with("other", &[]);
    let path = path.with_file_name("serials");
    let mut book = SerialBook::open(path.clone(), None).expect("a new book");
    book.take().expect("there are some");
    vec![fs::read(path).expect("just written")]
}

/// A serial that is handed out fits a name, and the next one is another.
fn book(bytes: &[u8]) {
    let (_dir, path) = file_with("serials", bytes);
    let Ok(mut book) = SerialBook::open(path, None) else {
        return;
    };
    if let (Ok(first), Ok(second)) = (book.take(), book.take()) {
        assert!(first < second && second.0 < SERIAL_MAX);
    }
}
