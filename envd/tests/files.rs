//! `GET|POST /files` over real HTTP: encodings, ranges, uploads of every kind, and refusals.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;
use common::{Answer, Envd, full, streamed};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use futures::stream;
use http::Request;
use serde_json::json;
use sha2::{Digest, Sha256};

const BOUNDARY: &str = "x-boundary-x";

fn multipart(parts: &[(&str, &str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, file, content) in parts {
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"; \
             filename=\"{file}\"\r\n\r\n"
        );
        body.extend(head.as_bytes());
        body.extend(*content);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(plain).expect("to memory");
    encoder.finish().expect("to memory")
}

fn gunzip(body: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    GzDecoder::new(body).read_to_end(&mut plain).expect("gzip");
    plain
}

/// Bytes that do not compress and repeat nowhere.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

async fn post_multipart(envd: &Envd, query: &str, body: Vec<u8>) -> Answer {
    let request = Request::post(format!("/files{query}"))
        .header(
            "content-type",
            format!("multipart/form-data; boundary={BOUNDARY}"),
        )
        .body(full(body))
        .expect("a request");
    envd.fetch(request).await
}

async fn post_octets(
    envd: &Envd,
    path: &str,
    body: impl Into<Bytes>,
    headers: &[(&str, &str)],
) -> Answer {
    let request = Request::post(format!("/files?path={path}"))
        .header("content-type", "application/octet-stream");
    let request = headers.iter().fold(request, |request, (name, value)| {
        request.header(*name, *value)
    });
    envd.fetch(request.body(full(body)).expect("a request"))
        .await
}

async fn get(envd: &Envd, path: &Path, headers: &[(&str, &str)]) -> Answer {
    let request = Request::get(format!("/files?path={}", path.display()));
    let request = headers.iter().fold(request, |request, (name, value)| {
        request.header(*name, *value)
    });
    envd.fetch(request.body(full("")).expect("a request")).await
}

#[tokio::test]
async fn download_describes_the_file_and_compresses_when_asked() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("a.json");
    let content = noise(1_000_000);
    fs::write(&file, &content).expect("written");

    let plain = get(&envd, &file, &[]).await;
    assert_eq!((plain.status, &plain.body[..]), (200, &content[..]));
    assert_eq!(plain.header("content-length"), Some("1000000"));
    assert_eq!(plain.header("content-type"), Some("application/json"));
    assert_eq!(
        plain.header("content-disposition"),
        Some("inline; filename=a.json")
    );
    assert_eq!(plain.header("vary"), Some("Accept-Encoding"));
    assert_eq!(plain.header("content-encoding"), None);

    for accepted in ["gzip", "gzip, deflate", "gzip, deflate, br, zstd"] {
        let packed = get(&envd, &file, &[("accept-encoding", accepted)]).await;
        assert_eq!(packed.header("content-encoding"), Some("gzip"));
        assert_eq!(packed.header("content-length"), None);
        assert!(gunzip(&packed.body) == content, "{accepted}");
    }
    let none = get(&envd, &file, &[("accept-encoding", "br, identity;q=0")]).await;
    assert_eq!((none.status, &none.json()["code"]), (406, &json!(406)));
}

#[tokio::test]
async fn ranges_and_conditions_speak_of_the_plain_file() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("f");
    let content = noise(400_000);
    fs::write(&file, &content).expect("written");

    for (range, from, to) in [
        ("bytes=0-9", 0, 10),
        ("bytes=150000-349999", 150_000, 350_000),
        ("bytes=-5", 399_995, 400_000),
        ("bytes=399999-", 399_999, 400_000),
    ] {
        let part = get(
            &envd,
            &file,
            &[("range", range), ("accept-encoding", "gzip")],
        )
        .await;
        assert_eq!(part.status, 206, "{range}");
        assert!(part.body == content[from..to], "{range}");
        let expected = format!("bytes {from}-{}/400000", to - 1);
        assert_eq!(part.header("content-range"), Some(&*expected));
        assert_eq!(part.header("content-encoding"), None);
    }
    let outside = get(&envd, &file, &[("range", "bytes=400000-")]).await;
    assert_eq!(
        (outside.status, outside.header("content-range")),
        (416, Some("bytes */400000"))
    );
    let several = get(&envd, &file, &[("range", "bytes=0-1,5-6")]).await;
    assert_eq!((several.status, several.body.len()), (200, 400_000));
    let refused = get(
        &envd,
        &file,
        &[
            ("range", "bytes=0-1"),
            ("accept-encoding", "gzip, identity;q=0"),
        ],
    )
    .await;
    assert_eq!(refused.status, 406);

    let modified = get(&envd, &file, &[])
        .await
        .header("last-modified")
        .expect("dated")
        .to_owned();
    let unchanged = get(&envd, &file, &[("if-modified-since", &modified)]).await;
    assert_eq!((unchanged.status, unchanged.body.len()), (304, 0));
    let old = "Thu, 01 Jan 1970 00:00:00 GMT";
    let stale = get(&envd, &file, &[("if-range", old), ("range", "bytes=0-1")]).await;
    assert_eq!((stale.status, stale.body.len()), (200, 400_000));
    let fresh = get(
        &envd,
        &file,
        &[("if-range", &modified), ("range", "bytes=0-1")],
    )
    .await;
    assert_eq!(fresh.status, 206);
}

#[tokio::test]
async fn files_that_lie_about_their_size_are_read_to_the_end() {
    let envd = Envd::start();
    let boot_id = fs::read("/proc/sys/kernel/random/boot_id").expect("there");
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    assert_eq!(get(&envd, path, &[]).await.body, boot_id);
    assert_eq!(
        gunzip(&get(&envd, path, &[("accept-encoding", "gzip")]).await.body),
        boot_id
    );
    let part = get(&envd, path, &[("range", "bytes=0-3")]).await;
    assert_eq!((part.status, &part.body[..]), (206, &boot_id[..4]));
    let mtu = Path::new("/sys/class/net/lo/mtu");
    assert_eq!(
        get(&envd, mtu, &[]).await.body,
        fs::read(mtu).expect("there")
    );
    let empty = tempfile::NamedTempFile::new().expect("a file");
    let answer = get(&envd, empty.path(), &[]).await;
    assert_eq!(
        (answer.status, answer.header("content-length")),
        (200, Some("0"))
    );
}

#[tokio::test]
async fn what_is_no_file_is_refused_by_kind() {
    let envd = Envd::start();
    let missing = get(&envd, Path::new("/no/such/file"), &[]).await;
    assert_eq!(
        (missing.status, &missing.json()["code"]),
        (404, &json!(404))
    );
    let message = missing.json()["message"]
        .as_str()
        .expect("words")
        .to_owned();
    assert!(
        message.contains("/no/such/file") && message.contains("does not exist"),
        "{message}"
    );
    for path in ["/etc", "/dev/null", "~other/x", "%00"] {
        assert_eq!(get(&envd, Path::new(path), &[]).await.status, 400, "{path}");
    }
    assert_eq!(
        get(&envd, Path::new("/etc/passwd/x"), &[]).await.status,
        404
    );
    assert_eq!(
        envd.get("/files?path=/etc/passwd&username=nobody123")
            .await
            .status,
        401
    );
    assert_eq!(
        envd.get("/files?path=/etc/passwd&signature_expiration=soon")
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn uploads_make_parents_and_belong_to_the_user() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("set");
    let target = dir.path().join("new/deep/f.txt");
    let path = format!("{}&username=nobody", target.display());
    let answer = post_octets(&envd, &path, "hello", &[]).await;
    assert_eq!(answer.status, 200);
    let expected = json!([{"path": target.to_str(), "name": "f.txt", "type": "file"}]);
    assert_eq!(answer.json(), expected);
    assert_eq!(fs::read(&target).expect("there"), b"hello");
    for made in [
        target.as_path(),
        target.parent().expect("deep"),
        &dir.path().join("new"),
    ] {
        let stat = fs::metadata(made).expect("there");
        assert_eq!(
            (stat.uid(), stat.gid()),
            (65_534, 65_534),
            "{}",
            made.display()
        );
        let mode = if stat.is_dir() { 0o755 } else { 0o644 };
        assert_eq!(stat.mode() & 0o777, mode);
    }
    // Shorter than before, and another's: truncated and given away, on the same inode.
    let inode = fs::metadata(&target).expect("there").ino();
    post_octets(&envd, target.to_str().expect("text"), "hi", &[]).await;
    let stat = fs::metadata(&target).expect("there");
    assert_eq!((stat.uid(), stat.len(), stat.ino()), (0, 2, inode));
}

#[tokio::test]
async fn multipart_writes_every_file_part_under_its_full_name() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let name = |file: &str| dir.path().join(file).to_str().expect("text").to_owned();
    let big = noise(700_000);
    let (a, b) = (name("a"), name("sub/b"));
    let parts: [(&str, &str, &[u8]); 3] = [
        ("file", &a, b"first"),
        ("other", "x", b"skipped"),
        ("file", &b, &big),
    ];
    let answer = post_multipart(&envd, "", multipart(&parts)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json().as_array().expect("a list").len(), 2);
    assert_eq!(fs::read(&a).expect("there"), b"first");
    assert!(fs::read(&b).expect("there") == big);

    let to = name("c");
    let answer = post_multipart(
        &envd,
        &format!("?path={to}"),
        multipart(&[("file", "upload", b"x")]),
    )
    .await;
    assert_eq!(answer.json()[0]["path"], to);
}

#[tokio::test]
async fn two_parts_for_one_path_are_refused() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let name = dir.path().join("a").to_str().expect("text").to_owned();
    let twisted = format!("{}/./x/../a", dir.path().display());
    let body = multipart(&[("file", &name, b"1"), ("file", &twisted, b"2")]);
    assert_eq!(post_multipart(&envd, "", body).await.status, 400);
}

#[tokio::test]
async fn malformed_uploads_are_refused() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("f").to_str().expect("text").to_owned();
    let post = async |query: &str, kind: &str, body: Vec<u8>| {
        let request = Request::post(format!("/files{query}")).header("content-type", kind);
        envd.fetch(request.body(full(body)).expect("a request"))
            .await
            .status
    };
    let octets = "application/octet-stream";
    let form = format!("multipart/form-data; boundary={BOUNDARY}");
    assert_eq!(post("", octets, b"x".to_vec()).await, 400, "no path");
    assert_eq!(
        post(&format!("?path={path}"), "text/plain", b"x".to_vec()).await,
        400
    );
    assert_eq!(
        post(&format!("?path={path}"), "multipart/form-data", vec![]).await,
        400
    );
    assert_eq!(
        post(&format!("?path={path}"), &form, b"garbage".to_vec()).await,
        400
    );
    let whole = multipart(&[("file", &path, &[b'x'; 1000])]);
    assert_eq!(
        post("", &form, whole[..whole.len() / 2].to_vec()).await,
        400,
        "cut off"
    );
    assert!(
        !Path::new(&path).exists(),
        "half a new file is removed again"
    );
    assert_eq!(
        post("", &form, multipart(&[("other", "x", b"x")])).await,
        400,
        "no file part"
    );
    assert_eq!(
        post("?path=/etc", octets, b"x".to_vec()).await,
        400,
        "a directory"
    );
    assert_eq!(
        post("?path=/etc/passwd/x", octets, b"x".to_vec()).await,
        400,
        "through a file"
    );
    assert_eq!(
        post("?path=/dev/null", octets, b"x".to_vec()).await,
        400,
        "a device"
    );
    let status = post_octets(&envd, &path, "x", &[("content-encoding", "br")])
        .await
        .status;
    assert_eq!(status, 400, "unknown encoding");
}

#[tokio::test]
async fn compressed_uploads_are_decompressed() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("f");
    let name = path.to_str().expect("text");
    let content = noise(300_000);
    let encoded = [("content-encoding", "gzip")];
    assert_eq!(
        post_octets(&envd, name, gzip(&content), &encoded)
            .await
            .status,
        200
    );
    assert!(fs::read(&path).expect("there") == content);

    let request = Request::post("/files")
        .header(
            "content-type",
            format!("multipart/form-data; boundary={BOUNDARY}"),
        )
        .header("content-encoding", "gzip")
        .body(full(gzip(&multipart(&[("file", name, b"in a form")]))))
        .expect("a request");
    assert_eq!(envd.fetch(request).await.status, 200);
    assert_eq!(fs::read(&path).expect("there"), b"in a form");

    let packed = gzip(&content);
    let cut = post_octets(&envd, name, packed[..packed.len() / 2].to_vec(), &encoded).await;
    assert_eq!(cut.status, 400);
    assert_eq!(
        post_octets(&envd, name, "not gzip", &encoded).await.status,
        400
    );
}

#[tokio::test]
async fn metadata_is_kept_replaced_and_bounded() {
    let envd = Envd::start();
    // Not below /tmp, which may be a file system without user attributes.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = dir.path().join("f");
    let name = path.to_str().expect("text");
    let headers = [("X-Metadata-Purpose", "test"), ("x-metadata-b", "2")];
    let answer = post_octets(&envd, name, "x", &headers).await;
    assert_eq!(
        answer.json()[0]["metadata"],
        json!({"purpose": "test", "b": "2"})
    );
    let answer = post_octets(&envd, name, "x", &[("x-metadata-b", "3")]).await;
    assert_eq!(answer.json()[0]["metadata"], json!({"b": "3"}));
    let answer = post_octets(&envd, name, "x", &[]).await;
    assert_eq!(answer.json()[0].get("metadata"), None);
    let long = "v".repeat(4_100);
    assert_eq!(
        post_octets(&envd, name, "x", &[("x-metadata-b", &long)])
            .await
            .status,
        400
    );
}

/// A file system of its own, gone when dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(
            Some("envd-test"),
            dir.path(),
            Some("tmpfs"),
            flags,
            Some(options),
        )
        .expect("mounted");
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn full_disk_is_reported_as_such_and_left_clean() {
    let envd = Envd::start();
    let mounted = Mounted::new("size=1m,nr_inodes=5");
    let path = |name: &str| {
        mounted
            .0
            .path()
            .join(name)
            .to_str()
            .expect("text")
            .to_owned()
    };
    let answer = post_octets(&envd, &path("big"), noise(3_000_000), &[]).await;
    assert_eq!((answer.status, &answer.json()["code"]), (507, &json!(507)));
    assert!(!Path::new(&path("big")).exists());
    for number in 0..4 {
        assert_eq!(
            post_octets(&envd, &path(&number.to_string()), "", &[])
                .await
                .status,
            200
        );
    }
    assert_eq!(
        post_octets(&envd, &path("one-more"), "", &[]).await.status,
        507,
        "no inodes"
    );
}

#[tokio::test]
async fn refused_upload_is_answered_even_while_it_is_still_sent() {
    let envd = Envd::start();
    envd.post("/init", r#"{"accessToken":"secret"}"#).await;
    let body = noise(8 << 20);
    for path in ["/files?path=/tmp/x", "/envs", "/nowhere"] {
        let request = Request::post(path).header("content-type", "application/octet-stream");
        let answer = envd
            .fetch(request.body(full(body.clone())).expect("a request"))
            .await;
        assert_eq!(answer.status, 401, "{path}");
    }
}

#[tokio::test]
async fn large_upload_is_streamed_and_never_held() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("big");
    let piece = Bytes::from(noise(1 << 20));
    let pieces = stream::iter(std::iter::repeat_n(piece.clone(), 192));
    let request = Request::post(format!("/files?path={}", path.display()))
        .header("content-type", "application/octet-stream")
        .body(streamed(pieces))
        .expect("a request");
    assert_eq!(envd.fetch(request).await.status, 200);
    assert_eq!(fs::metadata(&path).expect("there").len(), 192 << 20);
    let status = fs::read_to_string(format!("/proc/{}/status", envd.pid())).expect("alive");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("listed");
    let peak_kib: u64 = peak
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    assert!(peak_kib < 64 * 1024, "peak of {peak_kib} KiB");
}

/// A guarded agent, a file in its guest, and what the caller knows to sign URLs with.
struct Signed {
    envd: Envd,
    path: String,
    _dir: tempfile::TempDir,
}

impl Signed {
    async fn new() -> Self {
        let envd = Envd::start();
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("f").to_str().expect("text").to_owned();
        fs::write(&path, "content").expect("written");
        envd.post("/init", r#"{"accessToken":"secret"}"#).await;
        Self {
            envd,
            path,
            _dir: dir,
        }
    }

    fn sign(&self, operation: &str, user: &str, expiration: &str) -> String {
        let text = format!("{}:{operation}:{user}:secret{expiration}", self.path);
        format!(
            "v1_{}",
            STANDARD_NO_PAD
                .encode(Sha256::digest(text))
                .replace('+', "%2B")
        )
    }

    async fn get(&self, query: &str) -> Answer {
        self.envd
            .get(&format!("/files?path={}{query}", self.path))
            .await
    }
}

#[tokio::test]
async fn signed_urls_stand_in_for_the_token() {
    let signed = Signed::new().await;
    assert_eq!(signed.get("").await.status, 401);
    let read = signed.sign("read", "", "");
    assert_eq!(
        signed.get(&format!("&signature={read}")).await.text(),
        "content"
    );
    let as_root = signed.sign("read", "root", "");
    let query = format!("&username=root&signature={as_root}");
    assert_eq!(signed.get(&query).await.status, 200);
    let query = format!("&username=nobody&signature={as_root}");
    assert_eq!(signed.get(&query).await.status, 401);
    let write = signed.sign("write", "", "");
    assert_eq!(signed.get(&format!("&signature={write}")).await.status, 401);
}

#[tokio::test]
async fn signed_urls_expire_with_the_words_clients_know() {
    let signed = Signed::new().await;
    let later = signed.sign("read", "", ":4102444800");
    let query = format!("&signature={later}&signature_expiration=4102444800");
    assert_eq!(signed.get(&query).await.status, 200);
    let query = format!("&signature={later}&signature_expiration=4102444801");
    assert_eq!(signed.get(&query).await.status, 401);
    let past = signed.sign("read", "", ":1000");
    let query = format!("&signature={past}&signature_expiration=1000");
    let expired = signed.get(&query).await;
    assert_eq!(expired.status, 401);
    assert_eq!(
        expired.text(),
        r#"{"code":401,"message":"signature is already expired"}"#
    );
}

#[tokio::test]
async fn uploads_are_signed_for_writing_and_a_token_is_checked_first() {
    let signed = Signed::new().await;
    let (envd, path) = (&signed.envd, &signed.path);
    let url = format!("{path}&signature={}", signed.sign("write", "", ""));
    assert_eq!(post_octets(envd, &url, "new", &[]).await.status, 200);
    assert_eq!(post_octets(envd, path, "new", &[]).await.status, 401);
    let token = [("x-access-token", "secret")];
    assert_eq!(post_octets(envd, path, "new", &token).await.status, 200);
    let wrong = [("x-access-token", "wrong")];
    assert_eq!(post_octets(envd, &url, "x", &wrong).await.status, 401);
}

async fn compose(envd: &Envd, body: serde_json::Value) -> Answer {
    envd.post("/files/compose", body.to_string()).await
}

#[tokio::test]
async fn files_are_composed_in_order_for_the_user_and_their_sources_go() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let (one, other) = (dir.path().join("1"), dir.path().join("2"));
    let large = noise(300_000);
    fs::write(&one, &large).expect("written");
    fs::write(&other, "end").expect("written");
    let whole = dir.path().join("new/whole");
    let order = json!({"source_paths": [one, other], "destination": whole, "username": "nobody"});
    let answer = compose(&envd, order).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let entry = answer.json();
    assert_eq!(entry["path"], *whole.to_str().expect("text"));
    assert_eq!(
        (&entry["name"], &entry["type"]),
        (&json!("whole"), &json!("file"))
    );
    let written = fs::read(&whole).expect("there");
    assert_eq!(written, [&large[..], b"end"].concat());
    let owner = fs::metadata(&whole).expect("there").uid();
    assert_eq!(owner, 65534, "nobody's");
    assert!(!one.exists() && !other.exists());
}

#[tokio::test]
async fn a_composition_that_cannot_be_changes_nothing() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    fs::write(path("a"), "a").expect("written");
    std::os::unix::fs::symlink(path("a"), path("link")).expect("made");
    for (sources, destination, user, status) in [
        (vec![], path("x"), "root", 400),
        (vec![path("a"), path("none")], path("x"), "root", 404),
        (vec![path("a"), path("")], path("x"), "root", 400),
        (vec![path("a")], path("a"), "root", 400),
        (vec![path("a")], path("link"), "root", 400),
        (vec![path("a")], path(""), "root", 400),
        (vec![path("a")], String::new(), "root", 400),
        (vec!["/dev/zero".to_owned()], path("x"), "root", 400),
        (vec![path("a")], path("x"), "no-such-user", 401),
        (vec![path("a"); 1025], path("x"), "root", 413),
    ] {
        let order = json!({
            "source_paths": sources, "destination": destination, "username": user
        });
        let shown = format!("{} to {destination} as {user}", sources.len());
        assert_eq!(compose(&envd, order).await.status, status, "{shown}");
        assert_eq!(fs::read_to_string(path("a")).expect("there"), "a");
        assert!(!Path::new(&path("x")).exists());
    }
    for body in ["", "{", "[]", r#"{"source_paths":"a","destination":"x"}"#] {
        assert_eq!(envd.post("/files/compose", body).await.status, 400);
    }
    let token = json!({"accessToken": "secret"}).to_string();
    assert_eq!(envd.post("/init", token).await.status, 204);
    let order = json!({"source_paths": [path("a")], "destination": path("x")});
    assert_eq!(compose(&envd, order).await.status, 401);
}
