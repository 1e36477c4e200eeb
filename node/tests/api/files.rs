//! Files through the interface, kept by the real agent in a directory of the test's own.

use bytes::Bytes;
use futures::stream;
use http::Method;
use http_body_util::BodyExt as _;
use serde_json::json;
use tempfile::TempDir;

use crate::world::{Answer, KEY, World, encode_form, eventually, full, streamed, streamed_results};

/// A capsule, and a directory that it can reach.
struct Place {
    world: World,
    route: String,
    dir: TempDir,
}

impl Place {
    async fn new() -> Self {
        let world = World::new().await;
        let id = world.capsule().await;
        Self {
            world,
            route: format!("/v1/capsules/{id}/files"),
            dir: tempfile::tempdir().expect("a directory"),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    async fn post(&self, what: &str, path: &str) -> Answer {
        self.world
            .post(&format!("{}/{what}", self.route), json!({"path": path}))
            .await
    }

    async fn form(&self, what: &str, fields: &[(&str, &[u8])]) -> Answer {
        self.world
            .form(&format!("{}/{what}", self.route), fields)
            .await
    }
}

#[tokio::test]
async fn bytes_survive_being_written_and_read_with_the_fields_in_any_order() {
    let place = Place::new().await;
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let path = place.path("deep/er/file");
    let fields = [("path", path.as_bytes()), ("file", &bytes[..])];
    place.form("write", &fields).await.is(204);
    assert_eq!(place.post("read", &path).await.is(200).body, bytes);

    let reversed = [
        ("file", &b"\r\n--xy"[..]),
        ("other", b"x"),
        ("path", path.as_bytes()),
    ];
    place.form("write", &reversed).await.is(204);
    let read = place.post("stream/read", &path).await;
    assert_eq!(read.is(200).body, "\r\n--xy");
    assert_eq!(read.headers["content-type"], "application/octet-stream");
}

#[tokio::test]
async fn an_empty_file_can_be_written_and_read() {
    let place = Place::new().await;
    let path = place.path("empty");
    let fields = [("path", path.as_bytes()), ("file", &b""[..])];
    place.form("stream/write", &fields).await.is(204);
    assert_eq!(place.post("read", &path).await.is(200).body, "");
}

#[tokio::test]
async fn a_streamed_write_wants_the_path_first() {
    let place = Place::new().await;
    let path = place.path("file");
    let fields = [("file", &b"x"[..]), ("path", path.as_bytes())];
    place
        .form("stream/write", &fields)
        .await
        .refused(400, "invalid_request");
    place.post("read", &path).await.refused(404, "not_found");
}

#[tokio::test]
async fn incomplete_forms_are_refused() {
    let place = Place::new().await;
    let path = place.path("file");
    for what in ["write", "stream/write"] {
        place
            .form(what, &[("path", path.as_bytes())])
            .await
            .refused(400, "invalid_request");
        place
            .form(what, &[("file", b"x")])
            .await
            .refused(400, "invalid_request");
        place.form(what, &[]).await.refused(400, "invalid_request");
        let relative = [("path", &b"file"[..]), ("file", b"x")];
        place
            .form(what, &relative)
            .await
            .refused(400, "invalid_request");
        let no_text = [("path", &b"/\xff"[..]), ("file", b"x")];
        place
            .form(what, &no_text)
            .await
            .refused(400, "invalid_request");
        place
            .post(what, &path)
            .await
            .refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_truncated_upload_never_passes_for_a_whole_file() {
    let place = Place::new().await;
    for what in ["write", "stream/write"] {
        let path = place.path("cut");
        let mut form = encode_form(&[("path", path.as_bytes()), ("file", &[b'x'; 100_000])]);
        form.truncate(form.len() - 20_000);
        let request = place
            .world
            .request(Method::POST, &format!("{}/{what}", place.route))
            .header("x-api-key", KEY)
            .header("content-type", "multipart/form-data; boundary=xyz");
        let answer = place.world.send(request.body(full(form)).unwrap()).await;
        answer.refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_client_that_vanishes_breaks_the_guests_upload_off() {
    let place = Place::new().await;
    let path = place.path("vanished");
    let mut form = encode_form(&[("path", path.as_bytes()), ("file", &[b'x'; 100_000])]);
    form.truncate(form.len() - 50_000);
    let pieces = [
        Ok(Bytes::from(form)),
        Err(std::io::ErrorKind::BrokenPipe.into()),
    ];
    let request = place
        .world
        .request(Method::POST, &format!("{}/stream/write", place.route))
        .header("x-api-key", KEY)
        .header("content-type", "multipart/form-data; boundary=xyz")
        .body(streamed_results(stream::iter(pieces)))
        .unwrap();
    let http: hyper_util::client::legacy::Client<_, crate::world::Body> =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
            .build_http();
    http.request(request)
        .await
        .expect_err("the client itself broke off");
    // The node goes on as if nothing was.
    let after = place.path("after");
    let fields = [("path", after.as_bytes()), ("file", &b"ok"[..])];
    place.form("stream/write", &fields).await.is(204);
}

#[tokio::test]
async fn a_file_past_the_limit_is_refused_and_the_client_sees_it() {
    let place = Place::new().await;
    let path = place.path("huge");
    let piece = Bytes::from(vec![b'x'; 1 << 20]);
    let head = encode_form(&[("path", path.as_bytes()), ("file", b"")]);
    let (head, tail) = head.split_at(head.len() - b"\r\n--xyz--\r\n".len());
    let (head, tail) = (Bytes::copy_from_slice(head), Bytes::copy_from_slice(tail));
    let pieces = move || {
        let body = std::iter::repeat_n(piece.clone(), 101);
        stream::iter(
            std::iter::once(head.clone())
                .chain(body)
                .chain([tail.clone()]),
        )
    };
    let request = |length: Option<u64>| {
        let request = place
            .world
            .request(Method::POST, &format!("{}/write", place.route))
            .header("x-api-key", KEY)
            .header("content-type", "multipart/form-data; boundary=xyz");
        match length {
            Some(length) => request.header("content-length", length),
            None => request,
        }
    };
    // Found out on the way.
    let chunked = request(None).body(streamed(pieces())).unwrap();
    place.world.send(chunked).await.refused(413, "too_large");
    // Announced.
    let length = 101 * (1 << 20) + encode_form(&[("path", path.as_bytes()), ("file", b"")]).len();
    let announced = request(Some(length as u64))
        .body(streamed(pieces()))
        .unwrap();
    place.world.send(announced).await.refused(413, "too_large");
}

#[tokio::test]
async fn listing_goes_as_deep_as_asked_and_tells_kinds_apart() {
    let place = Place::new().await;
    std::fs::create_dir_all(place.path("a/b")).unwrap();
    std::fs::write(place.path("a/b/c"), "123").unwrap();
    std::os::unix::fs::symlink("a", place.path("link")).unwrap();
    let list = async |depth: serde_json::Value| {
        let body = json!({"path": place.path(""), "depth": depth});
        let answer = place
            .world
            .post(&format!("{}/list", place.route), body)
            .await;
        answer.is(200).json()["entries"]
            .as_array()
            .expect("entries")
            .clone()
    };
    for depth in [json!(0), json!(1), json!(null)] {
        let entries = list(depth).await;
        let kinds: Vec<_> = entries
            .iter()
            .map(|it| (&it["name"], &it["type"]))
            .collect();
        assert_eq!(
            kinds,
            [
                (&json!("a"), &json!("directory")),
                (&json!("link"), &json!("symlink"))
            ]
        );
    }
    let deep = list(json!(3)).await;
    let file = deep.iter().find(|it| it["name"] == "c").expect("the file");
    assert_eq!((&file["type"], &file["size"]), (&json!("file"), &json!(3)));
    assert_eq!(
        (&file["mode"], &file["permissions"]),
        (&json!(0o644), &json!("-rw-r--r--"))
    );
    assert_eq!(
        (&file["owner"], &file["path"]),
        (&json!("root"), &json!(place.path("a/b/c")))
    );
    assert!(
        file["modified_at"]
            .as_i64()
            .is_some_and(|it| it > 1_600_000_000)
    );
    for depth in [json!(-1), json!(1.5), json!("1"), json!(1_u64 << 40)] {
        let body = json!({"path": "/", "depth": depth});
        let answer = place
            .world
            .post(&format!("{}/list", place.route), body)
            .await;
        answer.refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn what_is_missing_or_of_another_kind_has_its_own_answer() {
    let place = Place::new().await;
    let file = place.path("file");
    std::fs::write(&file, "x").unwrap();
    let missing = place.path("missing");
    let dir = place.path("");
    place.post("list", &missing).await.refused(404, "not_found");
    place
        .post("list", &file)
        .await
        .refused(400, "invalid_request");
    place.post("read", &missing).await.refused(404, "not_found");
    place
        .post("stream/read", &missing)
        .await
        .refused(404, "not_found");
    place
        .post("read", &dir)
        .await
        .refused(400, "invalid_request");
    place
        .post("mkdir", &file)
        .await
        .refused(400, "invalid_request");
    let onto_dir = [("path", dir.as_bytes()), ("file", &b"x"[..])];
    place
        .form("write", &onto_dir)
        .await
        .refused(400, "invalid_request");
    for what in ["read", "stream/read", "list", "mkdir", "remove"] {
        for bad in ["", "relative", "/a\0b"] {
            place.post(what, bad).await.refused(400, "invalid_request");
        }
    }
}

#[tokio::test]
async fn a_directory_is_made_once_with_its_parents() {
    let place = Place::new().await;
    let path = place.path("one/two");
    let made = place.post("mkdir", &path).await.is(200).json();
    assert_eq!(
        (&made["entry"]["name"], &made["entry"]["type"]),
        (&json!("two"), &json!("directory"))
    );
    place
        .post("mkdir", &path)
        .await
        .refused(409, "already_exists");
}

#[tokio::test]
async fn removing_takes_directories_whole_and_forgives_what_is_missing() {
    let place = Place::new().await;
    std::fs::create_dir_all(place.path("a/b")).unwrap();
    std::fs::write(place.path("a/b/c"), "x").unwrap();
    place.post("remove", &place.path("a")).await.is(204);
    assert!(!std::path::Path::new(&place.path("a")).exists());
    place.post("remove", &place.path("a")).await.is(204);
}

#[tokio::test]
async fn a_download_can_be_left_in_the_middle() {
    let place = Place::new().await;
    let path = place.path("big");
    std::fs::write(&path, vec![7; 8 << 20]).unwrap();
    let request = place
        .world
        .request(Method::POST, &format!("{}/stream/read", place.route))
        .header("x-api-key", KEY)
        .body(full(json!({"path": path}).to_string()))
        .unwrap();
    let mut answer = place.world.open(request).await;
    assert!(answer.frame().await.is_some());
    drop(answer);
    let again = eventually(async || Some(place.post("read", &path).await)).await;
    assert_eq!(again.is(200).body.len(), 8 << 20);
}
