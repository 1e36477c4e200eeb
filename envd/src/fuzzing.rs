//! What the host, its clients and the guest's own files say, as fuzz targets.

use std::path::Path;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use futures::TryStreamExt;
use proto::fuzzing::Target;

use crate::boot::cmdline::Options;
use crate::files::inflate::gunzip;
use crate::files::{content, encoding, metadata, range};
use crate::paths::Base;
use crate::users::Accounts;
use crate::{http, ports};

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "envd-init",
        samples: || {
            let full =
                br#"{"accessToken":"t","envVars":{"A":"1"},"timestamp":"2026-01-01T00:00:00Z",
                "defaultUser":"u","entropy":"AAAA","hostname":"h","hyperloopIP":"10.0.0.1"}"#;
            vec![b"{}".to_vec(), full.to_vec()]
        },
        run: http::init::fuzz,
    },
    Target {
        name: "envd-range",
        samples: || {
            [b"bytes=0-99", &b"bytes=-5"[..], b"bytes=7-"]
                .map(<[u8]>::to_vec)
                .to_vec()
        },
        run: part,
    },
    Target {
        name: "envd-encoding",
        samples: || vec![b"gzip, deflate;q=0.5, identity;q=0, *;q=0.001".to_vec()],
        run: |bytes| {
            let header = String::from_utf8_lossy(bytes);
            let chosen = encoding::choose(Some(&header));
            if chosen == Some(encoding::Encoding::Identity) {
                assert!(encoding::accepts_identity(Some(&header)), "{header:?}");
            }
        },
    },
    Target {
        name: "envd-metadata",
        samples: || vec![b"x-metadata-key\nvalue".to_vec()],
        run: pairs,
    },
    Target {
        name: "envd-path",
        samples: || ["~/a/../b", "a//./b", "/x/y/", "~"].map(Vec::from).to_vec(),
        run: path,
    },
    Target {
        name: "envd-name",
        samples: || vec![b"a \"b\"\n.txt".to_vec()],
        run: |bytes| {
            let shown = content::disposition(&String::from_utf8_lossy(bytes));
            HeaderValue::try_from(shown).expect("always a header");
        },
    },
    Target {
        name: "envd-accounts",
        samples: || vec![b"root:x:0:0:root:/root:/bin/sh\nu:x:1:1::/h:\n\ng:x:5:u,root\n".to_vec()],
        run: accounts,
    },
    Target {
        name: "envd-sockets",
        samples: || {
            let list = "head\n 0: 0100007F:1F90 00000000:0000 0A 0\n \
                        1: 00000000000000000000000001000000:1F91 0:0 0A 0\n";
            vec![list.into()]
        },
        run: |bytes| {
            for address in ports::scan::parse(bytes) {
                assert!(address.ip().is_loopback());
            }
        },
    },
    Target {
        name: "envd-cmdline",
        samples: || {
            let line = "quiet wrenn.root=/dev/vda wrenn.ip=10.0.0.2/24 wrenn.gateway=10.0.0.1 \
                        wrenn.dns=8.8.8.8,1.1.1.1 wrenn.hostname=h wrenn.probe=1";
            vec![line.into()]
        },
        run: |bytes| drop(Options::parse(&String::from_utf8_lossy(bytes))),
    },
    Target {
        name: "envd-gzip",
        samples: || vec![gzip(&[7; 3000]), gzip(b"content")],
        run: inflate,
    },
];

/// A part lies inside the file it is of, and holds something.
fn part(bytes: &[u8]) {
    let header = String::from_utf8_lossy(bytes);
    for size in [0, 1, 100, u64::MAX] {
        if let range::Part::Bytes { start, length } = range::parse(&header, size) {
            assert!(length > 0 && start.checked_add(length).is_some_and(|end| end <= size));
        }
    }
}

/// A line each: name and value of a header.
fn pairs(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    let mut lines = bytes.split(|byte| *byte == b'\n');
    while let (Some(name), Some(value)) = (lines.next(), lines.next()) {
        let (name, value) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value));
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.insert(name, value);
        }
    }
    if let Ok(metadata) = metadata::from_headers(&headers) {
        assert!(
            metadata
                .keys()
                .all(|key| !key.is_empty() && key.len() <= 246)
        );
    }
}

/// What is resolved is absolute and leads nowhere up.
fn path(bytes: &[u8]) {
    let base = Base {
        home: Path::new("/home/u"),
        workdir: Some(Path::new("/work")),
    };
    if let Ok(resolved) = base.resolve(&String::from_utf8_lossy(bytes)) {
        assert!(resolved.is_absolute());
        assert!(!resolved.components().any(|part| part.as_os_str() == ".."));
    }
}

/// Both files in one, with an empty line between them.
fn accounts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (passwd, group) = text.split_once("\n\n").unwrap_or((&text, ""));
    let accounts = Accounts::from_text(passwd, group);
    for name in ["root", "u", ""] {
        if let Ok(user) = accounts.user(name) {
            assert_eq!(user.name, name);
        }
    }
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(plain).expect("to memory");
    encoder.finish().expect("to memory")
}

fn inflate(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let body = Body::from(bytes.to_vec()).into_data_stream();
    // Piece by piece, as an upload takes it: nothing is gathered.
    let pieces = gunzip(body).try_for_each(|_piece| std::future::ready(Ok(())));
    let _refused = runtime.expect("a runtime").block_on(pieces);
}
