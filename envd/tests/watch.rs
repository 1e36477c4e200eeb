//! Watching over real HTTP, in both codecs: the behaviours that clients assert.

mod common;

use std::fs;
use std::path::Path;

use common::{BOTH, Codec, Envd, Messages, RpcError, full};
use futures::stream;
use http::Request;
use proto::envd::filesystem as wire;
use wire::__buffa::oneof::watch_dir_response::Event;
use wire::EventType::{EVENT_TYPE_CHMOD, EVENT_TYPE_CREATE, EVENT_TYPE_REMOVE, EVENT_TYPE_WRITE};

async fn create(
    envd: &Envd,
    codec: Codec,
    request: wire::CreateWatcherRequest,
) -> Result<String, RpcError> {
    let answer = envd
        .call(codec, "filesystem.Filesystem/CreateWatcher", &request)
        .await;
    answer.map(|answer: wire::CreateWatcherResponse| answer.watcher_id)
}

fn of(path: &Path, recursive: bool) -> wire::CreateWatcherRequest {
    wire::CreateWatcherRequest {
        path: path.to_str().expect("text").to_owned(),
        recursive,
        ..Default::default()
    }
}

async fn events(
    envd: &Envd,
    codec: Codec,
    watcher_id: &str,
) -> Result<Vec<wire::FilesystemEvent>, RpcError> {
    let request = wire::GetWatcherEventsRequest {
        watcher_id: watcher_id.to_owned(),
        ..Default::default()
    };
    let answer = envd
        .call(codec, "filesystem.Filesystem/GetWatcherEvents", &request)
        .await;
    answer.map(|answer: wire::GetWatcherEventsResponse| answer.events)
}

fn shown(events: &[wire::FilesystemEvent]) -> Vec<(&str, wire::EventType)> {
    let known = |event: &wire::FilesystemEvent| event.r#type.as_known().expect("a known type");
    events.iter().map(|e| (e.name.as_str(), known(e))).collect()
}

async fn remove(envd: &Envd, codec: Codec, watcher_id: &str) -> Result<(), RpcError> {
    let request = wire::RemoveWatcherRequest {
        watcher_id: watcher_id.to_owned(),
        ..Default::default()
    };
    let answer = envd
        .call(codec, "filesystem.Filesystem/RemoveWatcher", &request)
        .await;
    answer.map(|_: wire::RemoveWatcherResponse| ())
}

/// Uploads as clients do.
async fn upload(envd: &Envd, path: &Path, content: &'static str) {
    let uri = format!("/files?path={}", path.display());
    let request = Request::post(uri)
        .header("content-type", "application/octet-stream")
        .body(full(content))
        .expect("a request");
    assert_eq!(envd.fetch(request).await.status, 200);
}

async fn watch(envd: &Envd, codec: Codec, path: &Path, headers: &[(&str, &str)]) -> Messages {
    let request = wire::WatchDirRequest {
        path: path.to_str().expect("text").to_owned(),
        recursive: true,
        include_entry: true,
        ..Default::default()
    };
    let method = "filesystem.Filesystem/WatchDir";
    envd.stream_with(codec, method, stream::iter([request]), headers)
        .await
}

async fn next(stream: &mut Messages) -> Option<Result<Event, RpcError>> {
    let response = stream.next::<wire::WatchDirResponse>().await?;
    Some(response.map(|response| response.event.expect("a known event")))
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, RpcError>) -> (u16, String) {
    let error = answer.expect_err("refused");
    (error.status, error.code)
}

#[tokio::test]
async fn a_small_new_file_is_exactly_three_events_in_the_very_next_poll() {
    let envd = Envd::start();
    for codec in BOTH {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("sub")).expect("made");
        for (recursive, name) in [(false, "a.txt"), (true, "sub/a.txt")] {
            let watcher = create(&envd, codec, of(dir.path(), recursive)).await;
            let watcher = watcher.expect("watched");
            assert!(watcher.starts_with('w'), "{watcher}");
            upload(&envd, &dir.path().join(name), "x").await;
            let told = events(&envd, codec, &watcher).await.expect("told");
            let wanted = [EVENT_TYPE_CREATE, EVENT_TYPE_CHMOD, EVENT_TYPE_WRITE];
            assert_eq!(shown(&told), wanted.map(|kind| (name, kind)));
            assert!(told.iter().all(|event| !event.entry.is_set()));
            let again = events(&envd, codec, &watcher).await.expect("told");
            assert!(again.is_empty(), "told once: {again:?}");
            remove(&envd, codec, &watcher).await.expect("removed");
        }
    }
}

#[tokio::test]
async fn an_overwritten_file_is_written_and_a_removed_one_removed() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("f");
    fs::write(&file, "old").expect("written");
    let watcher = create(&envd, Codec::Json, of(dir.path(), false)).await;
    let watcher = watcher.expect("watched");
    upload(&envd, &file, "new").await;
    let told = events(&envd, Codec::Json, &watcher).await.expect("told");
    assert!(shown(&told).contains(&("f", EVENT_TYPE_WRITE)), "{told:?}");
    fs::remove_file(&file).expect("removed");
    let told = events(&envd, Codec::Json, &watcher).await.expect("told");
    assert_eq!(shown(&told), [("f", EVENT_TYPE_REMOVE)]);
}

#[tokio::test]
async fn a_directory_made_after_the_watch_is_watched_at_once() {
    let envd = Envd::start();
    for codec in BOTH {
        let dir = tempfile::tempdir().expect("a directory");
        let watcher = create(&envd, codec, of(dir.path(), true)).await;
        let watcher = watcher.expect("watched");
        fs::create_dir(dir.path().join("new")).expect("made");
        upload(&envd, &dir.path().join("new/f"), "x").await;
        let told = events(&envd, codec, &watcher).await.expect("told");
        let told = shown(&told);
        assert_eq!(told[0], ("new", EVENT_TYPE_CREATE));
        let writes = told.iter().filter(|it| **it == ("new/f", EVENT_TYPE_WRITE));
        assert_eq!(writes.count(), 1, "{told:?}");
    }
}

#[tokio::test]
async fn entries_come_along_where_asked_for_and_names_may_hold_anything() {
    let envd = Envd::start();
    for codec in BOTH {
        let dir = tempfile::tempdir().expect("a directory");
        let request = wire::CreateWatcherRequest {
            include_entry: true,
            allow_network_mounts: true,
            ..of(dir.path(), false)
        };
        let watcher = create(&envd, codec, request).await.expect("watched");
        let name = "a\nb \u{fc}\"";
        fs::write(dir.path().join(name), "12").expect("written");
        let told = events(&envd, codec, &watcher).await.expect("told");
        assert_eq!(
            shown(&told),
            [(name, EVENT_TYPE_CREATE), (name, EVENT_TYPE_WRITE)]
        );
        let entry = told[1].entry.as_option().expect("an entry");
        assert_eq!((entry.name.as_str(), entry.size), (name, 2));
        assert_eq!(entry.path, dir.path().join(name).to_str().expect("text"));
        assert_eq!(entry.r#type, wire::FileType::FILE_TYPE_FILE);
    }
}

#[tokio::test]
async fn a_stream_starts_tells_and_ends_with_its_client_or_its_deadline() {
    let envd = Envd::start();
    for codec in BOTH {
        let dir = tempfile::tempdir().expect("a directory");
        let mut stream = watch(&envd, codec, dir.path(), &[]).await;
        assert!(matches!(next(&mut stream).await, Some(Ok(Event::Start(_)))));
        fs::create_dir(dir.path().join("d")).expect("made");
        fs::write(dir.path().join("d/f"), "x").expect("written");
        let mut seen = Vec::new();
        while !seen.contains(&("d/f".to_owned(), EVENT_TYPE_WRITE)) {
            match next(&mut stream).await {
                Some(Ok(Event::Filesystem(event))) => {
                    assert!(event.entry.is_set(), "{event:?}");
                    let kind = event.r#type.as_known().expect("known");
                    seen.push((event.name.clone(), kind));
                }
                other => panic!("an event expected, got {other:?}"),
            }
        }
        assert_eq!(seen[0], ("d".to_owned(), EVENT_TYPE_CREATE));
        drop(stream);

        let hurried = [("connect-timeout-ms", "3000")];
        let mut stream = watch(&envd, codec, dir.path(), &hurried).await;
        assert!(matches!(next(&mut stream).await, Some(Ok(Event::Start(_)))));
        match next(&mut stream).await {
            Some(Err(error)) => assert_eq!(error.code, "deadline_exceeded"),
            other => panic!("the deadline expected, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_silent_stream_says_that_it_lives() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let headers = [("keepalive-ping-interval", "1")];
    let mut stream = watch(&envd, Codec::Json, dir.path(), &headers).await;
    assert!(matches!(next(&mut stream).await, Some(Ok(Event::Start(_)))));
    let silence = next(&mut stream).await;
    assert!(
        matches!(silence, Some(Ok(Event::Keepalive(_)))),
        "{silence:?}"
    );
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused_with_the_right_code() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("f"), "").expect("written");
    std::os::unix::fs::symlink("loop", dir.path().join("loop")).expect("made");
    for codec in BOTH {
        for (path, status, code) in [
            ("none", 404, "not_found"),
            ("f", 400, "invalid_argument"),
            ("f/x", 400, "invalid_argument"),
            ("loop", 400, "failed_precondition"),
        ] {
            let path = dir.path().join(path);
            let answer = create(&envd, codec, of(&path, false)).await;
            assert_eq!(refusal(answer), (status, code.into()), "{path:?}");
            let mut stream = watch(&envd, codec, &path, &[]).await;
            match next(&mut stream).await {
                Some(Err(error)) => assert_eq!(error.code, code),
                other => panic!("{code} expected, got {other:?}"),
            }
        }
        let unknown = (404, "not_found".to_owned());
        assert_eq!(refusal(events(&envd, codec, "w0").await), unknown);
        assert_eq!(refusal(remove(&envd, codec, "w0").await), unknown);
    }
}

#[tokio::test]
async fn watchers_are_limited_and_their_end_makes_room() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let mut made = Vec::new();
    let refused = loop {
        match create(&envd, Codec::Proto, of(dir.path(), false)).await {
            Ok(watcher) => made.push(watcher),
            Err(refused) => break refused,
        }
        assert!(made.len() < 200, "there is a limit");
    };
    assert_eq!(
        (refused.status, &*refused.code),
        (429, "resource_exhausted")
    );
    let last = made.pop().expect("some");
    remove(&envd, Codec::Proto, &last).await.expect("removed");
    let again = create(&envd, Codec::Proto, of(dir.path(), false)).await;
    again.expect("room");
}
