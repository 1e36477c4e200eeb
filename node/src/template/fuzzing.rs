//! What an operator puts into the images directory, and what clients build from, as fuzz targets.

use std::io::{self, Write as _};

use proto::fuzzing::Target;

use super::archive::{self, Contents};
use super::health::HealthCheck;
use super::{catalog, import, log, recipe};
use crate::fuzzing::file_with;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[FILES, ARCHIVE, ZIP, IMPORT, RECIPE];

/// A tar file that a build takes files from. Its members lie inside, whatever they are called.
const ARCHIVE: Target = Target {
    name: "template-archive",
    samples: || vec![tar("a", b"contents"), tar(&"d/".repeat(80), b"")],
    run: |bytes| {
        if let Ok(contents) = Contents::read(bytes) {
            let _found = contents.hash_of(&[String::new()]);
        }
    },
};

/// A zip file of the same. What is made of it can be read.
const ZIP: Target = Target {
    name: "template-zip",
    samples: || vec![zip(&[("a/b", b"contents"), ("c", b"")]), zip(&[])],
    run: archive::zip::fuzz,
};

/// A root file system or an image that a template is made of. What is written can be read again.
const IMPORT: Target = Target {
    name: "template-import",
    samples: || {
        let config = br#"{"architecture":"amd64","config":{"Env":["A=b"],"Cmd":["sh"]}}"#;
        let saved = br#"[{"Config":"c.json","Layers":["l.tar","l.tar"]}]"#;
        let layer = tar("bin/sh", b"#!");
        let image = members(&[
            ("manifest.json", saved),
            ("c.json", config),
            ("l.tar", &layer),
        ]);
        vec![layer, image]
    },
    run: import::fuzz,
};

/// The lines of a recipe, a health check, and the lines of a log.
const RECIPE: Target = Target {
    name: "template-recipe",
    samples: || {
        vec![
            b"RUN --timeout=5m make\nENV A=$B${C}$$\nCOPY a ./b /c/".to_vec(),
            b"USER me\nWORKDIR /srv\nSTART serve\n--interval=1s true".to_vec(),
        ]
    },
    run: |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let lines: Vec<&str> = text.lines().collect();
        if let Ok(parsed) = recipe::parse(&lines) {
            assert_eq!(parsed.len(), lines.len());
        }
        let _checked = HealthCheck::parse(&text);
        let expanded = recipe::expand(&text, |_| None);
        assert!(expanded.len() <= text.len());
        let _steps = log::by_step(&log::entries([bytes].into_iter()));
    },
};

/// A zip file.
fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    for (name, contents) in members {
        let begun = writer.start_file(*name, zip::write::SimpleFileOptions::default());
        begun.expect("room");
        writer.write_all(contents).expect("room");
    }
    writer.finish().expect("room").into_inner()
}

/// An archive with one member.
fn tar(name: &str, contents: &[u8]) -> Vec<u8> {
    members(&[(name, contents)])
}

/// An archive with some.
fn members(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, contents) in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(contents.len() as u64);
        let added = builder.append_data(&mut header, name, *contents);
        added.expect("room");
    }
    builder.into_inner().expect("room")
}

const FILES: Target = Target {
    name: "template-files",
    samples: || {
        vec![
            br#"{"name":"minimal","disk_mib":512,"description":"Debian, little else"}"#.to_vec(),
            b"6.1.0-41-cloud-amd64\n".to_vec(),
        ]
    },
    run: |bytes| {
        let (_dir, path) = file_with("file", bytes);
        let _refused = catalog::read_description(&path);
        if let Ok(release) = catalog::read_release(&path) {
            assert!(release.len() <= bytes.len() && !release.is_empty());
        }
    },
};
