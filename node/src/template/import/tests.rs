use std::fs;
use std::io::Write as _;

use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::*;
use crate::template::archive::Kind;

/// Name and contents; a name that ends in a slash is a directory.
fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, contents) in members {
        let mut header = Header::new_gnu();
        header.set_mode(0o755);
        header.set_uid(7);
        header.set_size(contents.len() as u64);
        if name.ends_with('/') {
            header.set_entry_type(EntryType::Directory);
        }
        builder
            .append_data(&mut header, name, *contents)
            .expect("room");
    }
    builder.into_inner().expect("room")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).expect("room");
    gzip.finish().expect("room")
}

/// Paths with what was written there.
type Members = Vec<(String, Vec<u8>)>;

/// What became of an archive: what was told, and what was written.
fn imported(bytes: &[u8]) -> Result<(Imported, Members), ImportError> {
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, bytes).expect("written");
    let told = import(&from, &to)?;
    let mut members = Vec::new();
    let read = |member: &archive::Member, contents: &mut dyn Read| {
        let mut bytes = Vec::new();
        contents.read_to_end(&mut bytes)?;
        members.push((member.path.clone(), bytes));
        Ok(())
    };
    walk(File::open(&to).expect("made"), LIMITS, read).expect("an archive");
    let left = fs::read_dir(dir.path()).expect("listed").count();
    assert_eq!(left, 2, "nothing is left beside the result");
    Ok((told, members))
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","config":{"User":"app:app",
    "Env":["PATH=/bin","PRICE=$5"],"WorkingDir":"/srv","Entrypoint":["/run it"],"Cmd":["-v","it's"]}}"#;

fn layers() -> [Vec<u8>; 2] {
    [
        tar_of(&[
            ("bin/", b""),
            ("bin/sh", b"shell"),
            ("gone", b"x"),
            ("kept", b"1"),
        ]),
        gzip(&tar_of(&[(".wh.gone", b""), ("kept", b"2")])),
    ]
}

fn saved() -> Vec<u8> {
    let [one, two] = layers();
    let manifest =
        r#"[{"Config":"c.json","RepoTags":null,"Layers":["1/layer.tar","2/layer.tar"]}]"#;
    tar_of(&[
        ("2/layer.tar", &two),
        ("1/layer.tar", &one),
        ("c.json", CONFIG.as_bytes()),
        ("manifest.json", manifest.as_bytes()),
    ])
}

fn oci(damage: bool) -> Vec<u8> {
    let [one, mut two] = layers();
    let layer = |bytes: &[u8]| {
        format!(
            r#"{{"mediaType":"x","digest":"sha256:{}","size":1}}"#,
            hex(bytes)
        )
    };
    let manifest = format!(
        r#"{{"config":{{"digest":"sha256:{}"}},"layers":[{},{}]}}"#,
        hex(CONFIG.as_bytes()),
        layer(&one),
        layer(&two),
    );
    let index = format!(
        r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{}",
            "platform":{{"architecture":"amd64","os":"linux"}}}},
            {{"digest":"sha256:{}","platform":{{"architecture":"arm64","os":"linux"}}}}]}}"#,
        hex(manifest.as_bytes()),
        hex(b"other"),
    );
    let names = [one.as_slice(), &two, CONFIG.as_bytes(), manifest.as_bytes()]
        .map(|it| format!("blobs/sha256/{}", hex(it)));
    if damage {
        *two.last_mut().expect("bytes") ^= 1;
    }
    tar_of(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&names[0], &one),
        (&names[1], &two),
        (&names[2], CONFIG.as_bytes()),
        (&names[3], manifest.as_bytes()),
    ])
}

#[test]
fn both_forms_of_an_image_become_the_same_root_with_layers_in_order() {
    let (told, members) = imported(&saved()).expect("docker's form");
    let bytes = |text: &str| text.as_bytes().to_vec();
    let wanted = [("bin", ""), ("bin/sh", "shell"), ("kept", "2")];
    let wanted: Vec<_> = wanted
        .iter()
        .map(|(path, text)| ((*path).to_owned(), bytes(text)))
        .collect();
    assert_eq!(members, wanted);
    assert_eq!(
        imported(&oci(false)).expect("OCI's form"),
        (told.clone(), members)
    );
    assert_eq!(imported(&gzip(&saved())).expect("compressed").0, told);

    let (first, start) = told.config.directives(false);
    let wanted = [
        "IMPORT --user=app:app",
        "ENV PATH=/bin",
        "ENV PRICE=$$5",
        "WORKDIR /srv",
    ];
    assert_eq!(first, wanted);
    assert_eq!(start.as_deref(), Some(r"START exec '/run it' -v 'it'\''s'"));
    assert_eq!(told.config.directives(true).1, None);
}

#[test]
fn a_plain_archive_is_one_layer_and_says_nothing() {
    let (told, members) =
        imported(&tar_of(&[("./bin/sh", b"s"), ("./.wh.x", b"")])).expect("a root");
    assert_eq!(told.config, ImageConfig::default());
    let paths: Vec<&str> = members.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["bin", "bin/sh", ".wh.x"]);
}

#[test]
fn images_that_lie_or_do_not_fit_are_named() {
    let err = imported(&oci(true)).expect_err("damaged");
    assert!(
        matches!(err, ImportError::Image(ImageError::Corrupt(_))),
        "{err:?}"
    );
    let arm = CONFIG.replace("amd64", "arm64");
    let manifest = br#"[{"Config":"c.json","Layers":["../../etc/passwd"]}]"#;
    let with = |config: &str| tar_of(&[("manifest.json", manifest), ("c.json", config.as_bytes())]);
    let err = imported(&with(&arm)).expect_err("another platform");
    assert!(
        matches!(err, ImportError::Image(ImageError::Platform(_))),
        "{err:?}"
    );
    let err = imported(&with(CONFIG)).expect_err("outside");
    assert!(
        matches!(err, ImportError::Image(ImageError::Missing(_))),
        "{err:?}"
    );
    let err = imported(&tar_of(&[("manifest.json", b"[{},")])).expect_err("no JSON");
    assert!(
        matches!(err, ImportError::Image(ImageError::Json(..))),
        "{err:?}"
    );
    let err = imported(&tar_of(&[("manifest.json", b"[]")])).expect_err("no image");
    assert!(
        matches!(err, ImportError::Image(ImageError::Several(0))),
        "{err:?}"
    );
}

#[test]
fn a_root_without_a_shell_and_hostile_members_are_refused_and_leave_nothing() {
    let err = imported(&tar_of(&[("etc/passwd", b"")])).expect_err("no shell");
    assert!(matches!(err, ImportError::NoShell), "{err:?}");
    let mut header = Header::new_gnu();
    header.as_gnu_mut().expect("GNU").name[..6].copy_from_slice(b"../../");
    header.set_size(0);
    header.set_cksum();
    let mut builder = Builder::new(Vec::new());
    builder.append(&header, io::empty()).expect("room");
    let err = imported(&builder.into_inner().expect("room")).expect_err("outside");
    assert!(
        matches!(err, ImportError::Archive(ArchiveError::Outside(_))),
        "{err:?}"
    );
    let err = imported(b"PK\x03\x04 nothing of ours").expect_err("no archive");
    assert!(
        matches!(err, ImportError::Archive(ArchiveError::Read(_))),
        "{err:?}"
    );
}

#[test]
fn owners_modes_capabilities_and_other_names_are_kept() {
    let mut builder = Builder::new(Vec::new());
    let key = String::from_utf8_lossy(archive::CAPABILITY);
    builder
        .append_pax_extensions([(key.as_ref(), &b"\x01\x00cap"[..])])
        .expect("room");
    let mut header = Header::new_gnu();
    header.set_mode(0o4755);
    header.set_uid(12);
    header.set_gid(13);
    header.set_mtime(14);
    header.set_size(2);
    builder
        .append_data(&mut header, "bin/sh", &b"sh"[..])
        .expect("room");
    header.set_entry_type(EntryType::Link);
    header.set_size(0);
    builder
        .append_link(&mut header, "bin/ash", "bin/sh")
        .expect("room");
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, builder.into_inner().expect("room")).expect("written");
    import(&from, &to).expect("a root");
    let mut found = Vec::new();
    let read = |member: &archive::Member, _: &mut dyn Read| {
        found.push((
            member.path.clone(),
            member.kind.clone(),
            member.mode,
            member.owner,
            member.modified,
            member.capability.clone(),
        ));
        Ok(())
    };
    walk(File::open(&to).expect("made"), LIMITS, read).expect("an archive");
    assert_eq!(
        found[1],
        (
            "bin/ash".into(),
            Kind::File,
            0o4755,
            (12, 13),
            14,
            b"\x01\x00cap".to_vec()
        )
    );
    assert_eq!(
        (found[2].0.as_str(), &found[2].1),
        ("bin/sh", &Kind::Link("bin/ash".into()))
    );
}
