use std::io::Write as _;

use proptest::prelude::*;
use tar::{Builder, Header};

use super::*;

/// A member as hostile archives have them: no writer would agree to its name.
fn raw(name: &[u8], kind: EntryType, link: &[u8], size: u64) -> Header {
    let mut header = Header::new_gnu();
    let gnu = header.as_gnu_mut().expect("a GNU header");
    gnu.name[..name.len()].copy_from_slice(name);
    gnu.linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    header
}

/// Name, kind, link and contents.
type Raw<'a> = (&'a [u8], EntryType, &'a [u8], &'a [u8]);

fn archive(members: &[Raw<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, link, contents) in members {
        let header = raw(name, *kind, link, contents.len() as u64);
        builder.append(&header, *contents).expect("room");
    }
    builder.into_inner().expect("room")
}

fn file(name: &str, contents: &str) -> Vec<u8> {
    archive(&[(
        name.as_bytes(),
        EntryType::Regular,
        b"",
        contents.as_bytes(),
    )])
}

fn refused(bytes: &[u8]) -> ArchiveError {
    Contents::read(bytes).expect_err("it was accepted")
}

#[test]
fn members_that_lie_outside_are_refused() {
    for name in ["../a", "/etc/passwd", "a/../../b"] {
        let err = refused(&file(name, "x"));
        assert!(matches!(err, ArchiveError::Outside(_)), "{name}: {err:?}");
    }
    let link = archive(&[(b"a", EntryType::Link, b"../../etc/shadow", b"")]);
    assert!(matches!(refused(&link), ArchiveError::Outside(_)));
    // A symbolic link may say anything: it is followed in the guest, or not at all.
    let link = archive(&[(b"a", EntryType::Symlink, b"/etc/shadow", b"")]);
    Contents::read(&link[..]).expect("accepted");
}

#[test]
fn devices_pipes_and_unknown_kinds_are_refused() {
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo] {
        let err = refused(&archive(&[(b"a", kind, b"", b"")]));
        assert!(matches!(err, ArchiveError::Special(_)), "{err:?}");
    }
    let odd = archive(&[(b"a", EntryType::new(b'Z'), b"", b"")]);
    assert!(matches!(refused(&odd), ArchiveError::Read(_)));
}

#[test]
fn a_bomb_is_given_up_on() {
    let zeroes = vec![0; 1 << 20];
    let bomb = archive(&[(b"a", EntryType::Regular, b"", &zeroes)]);
    let limits = Limits {
        members: 10,
        bytes: 1 << 18,
    };
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&bomb).expect("room");
    let small = io::Cursor::new(gzip.finish().expect("room"));
    let read = |_: &Member, contents: &mut dyn Read| {
        io::copy(contents, &mut io::sink())?;
        Ok(())
    };
    let err = walk(decompressed(small).expect("gzip"), limits, read).expect_err("a bomb");
    assert!(matches!(err, ArchiveError::TooLarge { .. }), "{err:?}");
    let many: Vec<_> = (0..11)
        .map(|_| (&b"a"[..], EntryType::Regular, &b""[..], &b""[..]))
        .collect();
    let err = walk(&archive(&many)[..], limits, read).expect_err("too many");
    assert!(matches!(err, ArchiveError::TooLarge { .. }), "{err:?}");
}

#[test]
fn a_name_that_is_longer_than_any_takes_no_memory() {
    let long = vec![b'a'; usize::try_from(EXTENSION_BYTES).expect("small") + 1];
    let bytes = archive(&[
        (b"././@LongLink", EntryType::GNULongName, b"", &long),
        (b"a", EntryType::Regular, b"", b"x"),
    ]);
    assert!(matches!(refused(&bytes), ArchiveError::Name));
}

#[test]
fn long_names_and_pax_records_name_the_member_that_follows() {
    let long = format!("{}/x", "d".repeat(200));
    let pax = format!("{} path={long}\n", long.len() + 10);
    for extension in [
        (&b"x"[..], EntryType::XHeader, &b""[..], pax.as_bytes()),
        (b"x", EntryType::GNULongName, b"", long.as_bytes()),
    ] {
        let bytes = archive(&[extension, (b"short", EntryType::Regular, b"", b"x")]);
        let contents = Contents::read(&bytes[..]).expect("an archive");
        contents
            .hash_of(std::slice::from_ref(&long))
            .expect("it is there");
        contents
            .hash_of(&["short".into()])
            .expect_err("it has another name");
    }
    let bad = archive(&[(b"x", EntryType::XHeader, b"", b"99999 path=a\n")]);
    assert!(matches!(refused(&bad), ArchiveError::Read(_)));
}

#[test]
fn a_hash_covers_contents_modes_and_what_lies_below_and_nothing_else() {
    let of = |contents: &str| {
        let bytes = archive(&[
            (b"src/a", EntryType::Regular, b"", contents.as_bytes()),
            (b"srcs", EntryType::Regular, b"", b"other"),
        ]);
        Contents::read(&bytes[..]).expect("an archive")
    };
    let source = vec!["src".to_owned()];
    assert_eq!(of("1").hash_of(&source), of("1").hash_of(&source));
    assert_ne!(of("1").hash_of(&source), of("2").hash_of(&source));
    let all = vec![String::new()];
    assert_ne!(of("1").hash_of(&all), of("1").hash_of(&source));
    assert_eq!(of("1").hash_of(&["none".into()]), Err("none"));
}

#[test]
fn what_is_no_archive_is_told_as_such() {
    let zip = b"PK\x03\x04".repeat(200);
    assert!(matches!(refused(&zip), ArchiveError::Read(_)));
    let cut = file("a", &"x".repeat(2000));
    assert!(matches!(refused(&cut[..700]), ArchiveError::Read(_)));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        at in 0..2048_usize,
        damage in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        let mut bytes = archive(&[
            (b"x", EntryType::XHeader, b"", b"12 path=abc\n"),
            (b"a", EntryType::Regular, b"", b"contents"),
        ]);
        for (byte, with) in bytes.iter_mut().skip(at).zip(&damage) {
            *byte = *with;
        }
        let _ = Contents::read(&bytes[..]);
    }
}
