use std::io::Write as _;

use proptest::prelude::*;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::super::{Contents, Kind, Member, open, walk};
use super::*;

/// Offsets in a header of the directory.
const MADE_BY: usize = 4;
const FLAGS: usize = 8;
const METHOD: usize = 10;
const SIZE: usize = 24;
const ATTRIBUTES: usize = 38;
const NAME: usize = 46;

fn stored() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored)
}

/// A zip file as honest writers make it.
fn zip_of(members: &[(&str, &[u8])], options: SimpleFileOptions) -> Vec<u8> {
    let mut writer = ZipWriter::new(io::Cursor::new(Vec::new()));
    for (name, contents) in members {
        match name.ends_with('/') {
            true => writer.add_directory(*name, options).expect("room"),
            false => {
                writer.start_file(*name, options).expect("room");
                writer.write_all(contents).expect("room");
            }
        }
    }
    writer.finish().expect("room").into_inner()
}

/// The same with bytes changed in its `nth` header of the directory: no writer would agree to them.
fn patched(mut zip: Vec<u8>, nth: usize, at: usize, with: &[u8]) -> Vec<u8> {
    let windows = zip.windows(DIRECTORY_HEADER.len()).enumerate();
    let mut headers = windows.filter(|(_, it)| *it == DIRECTORY_HEADER);
    let (header, _) = headers.nth(nth).expect("a header");
    zip[header + at..header + at + with.len()].copy_from_slice(with);
    zip
}

/// Makes the first member something else.
fn of_type(zip: Vec<u8>, mode: u32) -> Vec<u8> {
    const UNIX: u8 = 3;
    let zip = patched(zip, 0, MADE_BY, &[20, UNIX]);
    patched(zip, 0, ATTRIBUTES, &(mode << 16).to_le_bytes())
}

fn reopened(path: &Path) -> Result<Box<dyn Read + Send>, ArchiveError> {
    Ok(open(path)?)
}

fn repacked_within(bytes: &[u8], limits: Limits) -> Result<Vec<(Member, String)>, RepackError> {
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    std::fs::write(&from, bytes).expect("written");
    repack(&from, &to, limits)?;
    let mut members = Vec::new();
    let walked = walk(reopened(&to)?, limits, |member, contents| {
        let mut text = String::new();
        contents.read_to_string(&mut text)?;
        members.push((member.clone(), text));
        Ok(())
    });
    walked?;
    Contents::read(reopened(&to)?)?;
    Ok(members)
}

fn repacked(bytes: &[u8]) -> Vec<(Member, String)> {
    repacked_within(bytes, Limits::BUILD).expect("a tar file")
}

fn refused(bytes: &[u8]) -> ArchiveError {
    match repacked_within(bytes, Limits::BUILD) {
        Err(RepackError::Archive(err)) => err,
        other => panic!("it was not refused: {other:?}"),
    }
}

/// Where a header of the directory says that the header of its member is.
const MEMBER_AT: usize = 42;

#[test]
fn members_that_share_bytes_are_refused_before_any_is_read() {
    let zip = zip_of(&[("a", b"one"), ("b", b"two")], stored());
    let of_first = 0_u32.to_le_bytes();
    let shared = patched(zip, 1, MEMBER_AT, &of_first);
    let said = refused(&shared).to_string();
    let why = std::error::Error::source(&refused(&shared)).map(ToString::to_string);
    assert!(why.is_some_and(|it| it.contains("in common")), "{said}");
}

#[test]
fn members_keep_contents_modes_dates_and_links() {
    let mut writer = ZipWriter::new(io::Cursor::new(Vec::new()));
    let date = zip::DateTime::from_date_and_time(2024, 2, 29, 12, 30, 58).expect("a date");
    let run = SimpleFileOptions::default()
        .unix_permissions(0o755)
        .last_modified_time(date);
    writer.add_directory("d/", run).expect("room");
    let long = format!("d/{}", "x".repeat(200));
    writer.start_file(long.as_str(), run).expect("room");
    writer.write_all(&b"abc".repeat(1000)).expect("room");
    writer.start_file("./plain", stored()).expect("room");
    writer.write_all("ü".as_bytes()).expect("room");
    writer
        .add_symlink("link", "/etc/shadow", stored())
        .expect("room");
    let members = repacked(&writer.finish().expect("room").into_inner());
    let shown: Vec<_> = members
        .iter()
        .map(|(it, text)| (it.path.as_str(), &it.kind, it.mode, text.len()))
        .collect();
    let link = Kind::Symlink("/etc/shadow".into());
    let expected = [
        ("d", &Kind::Directory, 0o755, 0),
        (long.as_str(), &Kind::File, 0o755, 3000),
        ("plain", &Kind::File, 0o644, 2),
        ("link", &link, 0o777, 0),
    ];
    assert_eq!(shown, expected);
    assert_eq!(members[1].0.modified, 1_709_209_858);
    assert_eq!(members[2].1, "ü");
}

#[test]
fn a_zip_file_and_a_tar_file_of_the_same_files_hash_the_same() {
    let zip = zip_of(&[("src/a", b"1")], stored().unix_permissions(0o644));
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    std::fs::write(&from, zip).expect("written");
    assert!(is_zip(&from).expect("read"));
    repack(&from, &to, Limits::BUILD).expect("a tar file");
    assert!(!is_zip(&to).expect("read"));
    let mut tar = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(1);
    tar.append_data(&mut header, "src/a", &b"1"[..])
        .expect("room");
    let tar = tar.into_inner().expect("room");
    let of_zip = Contents::read(open(&to).expect("opened")).expect("read");
    assert_eq!(of_zip, Contents::read(&tar[..]).expect("read"));
}

#[test]
fn members_that_lie_outside_are_refused() {
    for name in ["../a", "/etc/passwd", "a/../../b"] {
        let honest = "h".repeat(name.len());
        let zip = zip_of(&[(&honest, b"x")], stored());
        let err = refused(&patched(zip, 0, NAME, name.as_bytes()));
        assert!(matches!(err, ArchiveError::Outside(_)), "{name}: {err:?}");
    }
}

#[test]
fn nothing_lies_behind_a_link_or_a_file() {
    let linked = |below: &str| {
        let mut writer = ZipWriter::new(io::Cursor::new(Vec::new()));
        writer.start_file(below, stored()).expect("room");
        writer.add_symlink("a", "/etc", stored()).expect("room");
        writer.finish().expect("room").into_inner()
    };
    for below in ["a/passwd", "a/deep/er/passwd"] {
        assert!(matches!(
            refused(&linked(below)),
            ArchiveError::Outside(path) if path == below
        ));
    }
    assert_eq!(repacked(&linked("ab/c")).len(), 2);
    let file = zip_of(&[("a", b"x"), ("a/b", b"y")], stored());
    assert!(matches!(refused(&file), ArchiveError::Outside(_)));
}

#[test]
fn a_link_that_leads_nowhere_or_is_no_text_is_refused() {
    let long = vec![b'a'; PATH_BYTES + 1];
    for target in [&b""[..], b"a\0b", b"\xff\xfe", &long] {
        let zip = of_type(zip_of(&[("a", target)], stored()), SYMLINK | 0o777);
        assert!(matches!(refused(&zip), ArchiveError::Name), "{target:?}");
    }
}

#[test]
fn devices_pipes_and_sockets_are_refused() {
    for kind in [0o020_000, 0o060_000, 0o010_000, 0o140_000] {
        let err = refused(&of_type(zip_of(&[("a", b"")], stored()), kind | 0o644));
        assert!(matches!(err, ArchiveError::Special(_)), "{kind:o}: {err:?}");
    }
}

#[test]
fn encrypted_members_and_unknown_compressions_are_refused_by_name() {
    let zip = patched(zip_of(&[("a", b"x")], stored()), 0, FLAGS, &[1]);
    assert!(matches!(refused(&zip), ArchiveError::Encrypted(name) if name == "a"));
    // bzip2, which is not read here.
    let zip = patched(zip_of(&[("a", b"x")], stored()), 0, METHOD, &[12]);
    let err = refused(&zip);
    assert!(matches!(err, ArchiveError::Read(_)), "{err:?}");
}

#[test]
fn names_that_are_no_text_are_refused() {
    for name in [&b"\xff"[..], b"\0"] {
        let zip = patched(zip_of(&[("a", b"x")], stored()), 0, NAME, name);
        assert!(matches!(refused(&zip), ArchiveError::Name));
    }
}

#[test]
fn two_members_of_one_name_are_refused_however_it_is_spelt() {
    for (second, spelt) in [("b", "a"), ("b/c", ".//"), ("xxa", "./a"), ("b/", "a/")] {
        let zip = zip_of(&[("a", b"1"), (second, b"2")], stored());
        let zip = match spelt {
            // The root twice: as a directory of nothing.
            ".//" => zip_of(&[("./", b""), (".//", b"")], stored()),
            _ => patched(zip, 1, NAME, spelt.as_bytes()),
        };
        assert!(matches!(refused(&zip), ArchiveError::Twice), "{spelt}");
    }
}

#[test]
fn a_bomb_is_given_up_on_whatever_it_says_of_its_size() {
    let limits = Limits {
        members: 10,
        bytes: 1 << 18,
    };
    let zeroes = vec![0; 1 << 20];
    let bomb = zip_of(&[("a", &zeroes)], SimpleFileOptions::default());
    assert!(bomb.len() < 1 << 14);
    let too_large = |bytes: &[u8]| {
        let err = repacked_within(bytes, limits).expect_err("a bomb");
        matches!(err, RepackError::Archive(ArchiveError::TooLarge { .. }))
    };
    assert!(too_large(&bomb));
    // One that says less than it has.
    let liar = patched(bomb, 0, SIZE, &100_u32.to_le_bytes());
    let err = repacked_within(&liar, limits).expect_err("a lie");
    assert!(
        matches!(err, RepackError::Archive(ArchiveError::Read(_))),
        "{err:?}"
    );
    let names: Vec<String> = (0..11).map(|at| at.to_string()).collect();
    let many: Vec<_> = names.iter().map(|it| (it.as_str(), &b""[..])).collect();
    assert!(too_large(&zip_of(&many, stored())));
    // Small ones add up.
    let half = vec![0; 100 << 10];
    let some = [("a", &half[..]), ("b", &half), ("c", &half)];
    assert!(too_large(&zip_of(&some, SimpleFileOptions::default())));
}

#[test]
fn headers_are_counted_across_the_border_of_two_reads() {
    let limits = Limits {
        members: 1,
        bytes: 1 << 30,
    };
    for before in READ_BYTES - 5..READ_BYTES + 5 {
        let mut bytes = vec![0; before];
        bytes.extend_from_slice(DIRECTORY_HEADER);
        let count = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().expect("a file");
            file.write_all(bytes).expect("written");
            file.rewind().expect("rewound");
            count_headers(&mut file, limits)
        };
        count(&bytes).expect("one");
        bytes.extend_from_slice(DIRECTORY_HEADER);
        count(&bytes).expect_err("two");
    }
}

#[test]
fn what_is_damaged_or_cut_is_told_as_such() {
    let whole = zip_of(&[("a", b"contents")], stored());
    let mut wrong = whole.clone();
    let at = wrong.windows(8).position(|it| it == b"contents");
    wrong[at.expect("it is stored")] ^= 1;
    let longer = patched(whole.clone(), 0, SIZE, &9_u32.to_le_bytes());
    for bytes in [
        &wrong[..],
        &longer,
        &whole[..whole.len() - 30],
        b"PK\x03\x04",
    ] {
        let err = refused(bytes);
        assert!(matches!(err, ArchiveError::Read(_)), "{err:?}");
    }
    assert_eq!(repacked(&zip_of(&[], stored())), []);
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        at in 0..400_usize,
        damage in proptest::collection::vec(any::<u8>(), 1..32),
    ) {
        let mut bytes = zip_of(&[("a/b", b"contents"), ("c", b"more")], stored());
        for (byte, with) in bytes.iter_mut().skip(at).zip(&damage) {
            *byte = *with;
        }
        let _ = repacked_within(&bytes, Limits::BUILD);
    }
}
