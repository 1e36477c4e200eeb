//! `filesystem.Filesystem` over real HTTP, in both codecs.

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use common::{BOTH, Codec, Envd, RpcError, basic, full};
use http::Request;
use proto::envd::filesystem as wire;
use serde_json::json;

fn path(at: &std::path::Path) -> String {
    at.to_str().expect("text").to_owned()
}

async fn stat(envd: &Envd, codec: Codec, path: &str) -> Result<wire::EntryInfo, RpcError> {
    let request = wire::StatRequest {
        path: path.to_owned(),
        ..Default::default()
    };
    let answer = envd
        .call(codec, "filesystem.Filesystem/Stat", &request)
        .await;
    answer.map(|answer: wire::StatResponse| answer.entry.into_option().expect("an entry"))
}

async fn make(envd: &Envd, codec: Codec, path: &str) -> Result<wire::EntryInfo, RpcError> {
    let request = wire::MakeDirRequest {
        path: path.to_owned(),
        ..Default::default()
    };
    let headers = [("authorization", &*basic("nobody"))];
    let answer = envd
        .call_with(codec, "filesystem.Filesystem/MakeDir", &request, &headers)
        .await;
    answer.map(|answer: wire::MakeDirResponse| answer.entry.into_option().expect("an entry"))
}

async fn rename(
    envd: &Envd,
    codec: Codec,
    from: &str,
    to: &str,
) -> Result<wire::EntryInfo, RpcError> {
    let (source, destination) = (from.to_owned(), to.to_owned());
    let request = wire::MoveRequest {
        source,
        destination,
        ..Default::default()
    };
    let answer = envd
        .call(codec, "filesystem.Filesystem/Move", &request)
        .await;
    answer.map(|answer: wire::MoveResponse| answer.entry.into_option().expect("an entry"))
}

async fn list(envd: &Envd, codec: Codec, path: &str, depth: u32) -> Result<Vec<String>, RpcError> {
    let request = wire::ListDirRequest {
        path: path.to_owned(),
        depth,
        ..Default::default()
    };
    let answer = envd
        .call(codec, "filesystem.Filesystem/ListDir", &request)
        .await;
    answer.map(|answer: wire::ListDirResponse| answer.entries.into_iter().map(|e| e.path).collect())
}

async fn remove(envd: &Envd, codec: Codec, path: &str) -> Result<(), RpcError> {
    let request = wire::RemoveRequest {
        path: path.to_owned(),
        ..Default::default()
    };
    let answer = envd
        .call(codec, "filesystem.Filesystem/Remove", &request)
        .await;
    answer.map(|_: wire::RemoveResponse| ())
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, RpcError>) -> (u16, String) {
    let error = answer.expect_err("refused");
    (error.status, error.code)
}

#[tokio::test]
async fn entries_are_described_in_full() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("f");
    fs::write(&file, "12345").expect("written");
    symlink(&file, dir.path().join("l")).expect("made");
    for codec in BOTH {
        let entry = stat(&envd, codec, &path(&file)).await.expect("there");
        assert_eq!(
            (entry.name.as_str(), entry.path.as_str()),
            ("f", &*path(&file))
        );
        assert_eq!(entry.r#type, wire::FileType::FILE_TYPE_FILE);
        assert_eq!(
            (entry.size, entry.mode, entry.permissions.as_str()),
            (5, 0o644, "-rw-r--r--")
        );
        assert_eq!(
            (entry.owner.as_str(), entry.group.as_str()),
            ("root", "root")
        );
        assert!(entry.modified_time.seconds > 1_700_000_000);
        assert_eq!(entry.symlink_target, None);
        let link = stat(&envd, codec, &path(&dir.path().join("l")))
            .await
            .expect("there");
        assert_eq!(link.r#type, wire::FileType::FILE_TYPE_FILE);
        assert_eq!(link.permissions.as_bytes()[0], b'L');
        assert!(
            link.symlink_target
                .is_some_and(|target| target.ends_with("/f"))
        );
        let missing = refusal(stat(&envd, codec, "/no/such/file").await);
        assert_eq!(missing, (404, "not_found".into()));
    }
}

#[tokio::test]
async fn json_has_protobufs_own_form() {
    let envd = Envd::start();
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), "12345").expect("written");
    let request = Request::post("/filesystem.Filesystem/Stat")
        .header("content-type", "application/json")
        .body(full(
            json!({"path": file.path(), "unknown": {}}).to_string(),
        ))
        .expect("a request");
    let entry = envd.fetch(request).await.json()["entry"].clone();
    assert_eq!(entry["size"], "5", "64-bit numbers are strings");
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert!(
        entry["modifiedTime"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z')),
        "{entry}"
    );
    assert_eq!(
        entry.get("symlinkTarget"),
        None,
        "absent fields are left out"
    );
    assert_eq!(entry.get("metadata"), None);
}

#[tokio::test]
async fn directories_are_made_with_their_parents_for_the_user() {
    let envd = Envd::start();
    for codec in BOTH {
        let dir = tempfile::tempdir().expect("a directory");
        let deep = path(&dir.path().join("a/b"));
        let entry = make(&envd, codec, &deep).await.expect("made");
        assert_eq!(entry.r#type, wire::FileType::FILE_TYPE_DIRECTORY);
        assert_eq!((entry.owner.as_str(), entry.mode), ("nobody", 0o755));
        assert_eq!(
            refusal(make(&envd, codec, &deep).await),
            (409, "already_exists".into())
        );
        fs::write(dir.path().join("f"), "").expect("written");
        for file in ["f", "f/below"] {
            let made = make(&envd, codec, &path(&dir.path().join(file))).await;
            assert_eq!(refusal(made), (400, "invalid_argument".into()), "{file}");
        }
    }
}

#[tokio::test]
async fn listing_is_depth_first_and_keeps_the_asked_prefix() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(dir.path().join("real/b/c")).expect("made");
    fs::write(dir.path().join("real/a"), "").expect("written");
    symlink("real", dir.path().join("link")).expect("made");
    symlink("loop", dir.path().join("loop")).expect("made");
    let link = path(&dir.path().join("link"));
    for codec in BOTH {
        let shallow = [format!("{link}/a"), format!("{link}/b")];
        assert_eq!(list(&envd, codec, &link, 0).await.expect("listed"), shallow);
        let deep = [
            format!("{link}/a"),
            format!("{link}/b"),
            format!("{link}/b/c"),
        ];
        assert_eq!(list(&envd, codec, &link, 5).await.expect("listed"), deep);
        let asked = [
            ("/no/such/dir".to_owned(), (404, "not_found")),
            (format!("{link}/a"), (400, "invalid_argument")),
            (path(&dir.path().join("loop")), (400, "failed_precondition")),
        ];
        for (at, (status, code)) in asked {
            assert_eq!(
                refusal(list(&envd, codec, &at, 1).await),
                (status, code.into()),
                "{at}"
            );
        }
    }
}

#[tokio::test]
async fn moving_makes_parents_and_crosses_file_systems() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    for (number, codec) in BOTH.into_iter().enumerate() {
        let from = path(&dir.path().join("from"));
        fs::write(&from, "content").expect("written");
        let to = path(&dir.path().join(format!("new{number}/to")));
        let entry = rename(&envd, codec, &from, &to).await.expect("moved");
        assert_eq!((entry.path.as_str(), entry.size), (&*to, 7));
        assert_eq!(
            refusal(rename(&envd, codec, &from, &to).await),
            (404, "not_found".into())
        );
        // /dev/shm is a file system of its own.
        let other = format!("/dev/shm/envd-test-{}-{number}", envd.pid());
        rename(&envd, codec, &to, &other)
            .await
            .expect("moved across");
        assert_eq!(fs::read_to_string(&other).expect("there"), "content");
        assert!(!fs::exists(&to).expect("readable"));
        remove(&envd, codec, &other).await.expect("removed");
        let into_itself = path(dir.path());
        let moved = rename(&envd, codec, &into_itself, &format!("{into_itself}/x/y")).await;
        assert_eq!(refusal(moved), (400, "invalid_argument".into()));
    }
}

#[tokio::test]
async fn removing_is_recursive_and_twice_is_fine() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let kept = dir.path().join("kept");
    fs::write(&kept, "").expect("written");
    for codec in BOTH {
        let gone = dir.path().join("gone");
        fs::create_dir_all(gone.join("deep")).expect("made");
        symlink(&kept, gone.join("link")).expect("made");
        remove(&envd, codec, &path(&gone)).await.expect("removed");
        assert!(!gone.exists() && kept.exists());
        remove(&envd, codec, &path(&gone))
            .await
            .expect("nothing to do");
        assert_eq!(refusal(remove(&envd, codec, "/").await).0, 400);
        assert_eq!(refusal(remove(&envd, codec, "~bob").await).0, 400);
    }
}
