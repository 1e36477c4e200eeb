//! What is written and composed for a user goes no further than the user, or links of root's, lead.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use common::{Envd, full};
use http::Request;
use serde_json::json;
use tempfile::TempDir;

/// The user `nobody` of every Linux.
const NOBODY: u32 = 65_534;

/// A directory that everybody may write in, with a file of root's beside it that nobody else may read.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        allow(dir.path(), 0o777);
        let place = Self { dir };
        fs::create_dir(place.path("secret")).expect("made");
        allow(&place.path("secret"), 0o700);
        fs::write(place.secret(), "root's").expect("written");
        allow(&place.secret(), 0o600);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn secret(&self) -> PathBuf {
        self.path("secret/file")
    }

    /// A link that belongs to `owner`.
    fn link(&self, name: &str, target: &Path, owner: u32) -> PathBuf {
        let link = self.path(name);
        symlink(target, &link).expect("made");
        lchown(&link, Some(owner), Some(owner)).expect("given away");
        link
    }

    fn is_untouched(&self) -> bool {
        let about = fs::metadata(self.secret()).expect("there");
        let text = fs::read_to_string(self.secret()).expect("there");
        (about.uid(), text.as_str()) == (0, "root's")
    }
}

fn allow(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
}

async fn upload(envd: &Envd, path: &Path, user: &str) -> u16 {
    let request = Request::post(format!("/files?path={}&username={user}", path.display()))
        .header("content-type", "application/octet-stream");
    let request = request.body(full("new")).expect("a request");
    envd.fetch(request).await.status
}

#[tokio::test]
async fn an_upload_is_not_led_to_what_its_user_may_not_write() {
    let envd = Envd::start();
    let place = Place::new();
    let bait = place.link("bait", &place.secret(), NOBODY);
    assert_eq!(upload(&envd, &bait, "nobody").await, 403);
    let way = place.link("way", &place.path("secret"), NOBODY);
    assert_eq!(upload(&envd, &way.join("file"), "nobody").await, 403);
    assert_eq!(upload(&envd, &way.join("new"), "nobody").await, 403);
    assert_eq!(upload(&envd, &way.join("sub/new"), "nobody").await, 403);
    assert!(place.is_untouched());
    assert_eq!(
        fs::read_dir(place.path("secret")).expect("listed").count(),
        1
    );
    // Root's programs follow links, and so does what is done for root.
    assert_eq!(upload(&envd, &bait, "root").await, 200);
    assert_eq!(fs::read(place.secret()).expect("there"), b"new");
}

#[tokio::test]
async fn an_upload_follows_its_users_links_and_roots() {
    let envd = Envd::start();
    let place = Place::new();
    let own = place.path("own");
    fs::write(&own, "long before").expect("written");
    chown(&own, Some(NOBODY), Some(NOBODY)).expect("given away");
    let link = place.link("link", Path::new("own"), NOBODY);
    assert_eq!(upload(&envd, &link, "nobody").await, 200);
    assert_eq!(fs::read(&own).expect("there"), b"new");

    // Out of the user's reach, and named by the client: made with root's rights, and the user's.
    let roots = place.link("roots", Path::new("secret"), 0);
    assert_eq!(upload(&envd, &roots.join("sub/new"), "nobody").await, 200);
    for made in ["secret/sub", "secret/sub/new"] {
        assert_eq!(fs::metadata(place.path(made)).expect("there").uid(), NOBODY);
    }
    let dangling = place.link("dangling", Path::new("not-yet"), NOBODY);
    assert_eq!(upload(&envd, &dangling, "nobody").await, 200);
    assert_eq!(fs::read(place.path("not-yet")).expect("there"), b"new");
    let circle = place.link("circle", Path::new("circle"), 0);
    assert_ne!(upload(&envd, &circle, "nobody").await, 200);
}

#[tokio::test]
async fn a_composition_takes_nothing_that_is_not_its_users() {
    let envd = Envd::start();
    let place = Place::new();
    let bait = place.link("bait", &place.secret(), NOBODY);
    let whole = place.path("whole");
    let order = |sources: &[&Path], destination: &Path| {
        json!({"source_paths": sources, "destination": destination, "username": "nobody"})
            .to_string()
    };
    let refused = envd.post("/files/compose", order(&[&bait], &whole)).await;
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert!(!whole.exists() && bait.is_symlink());

    let part = place.path("part");
    fs::write(&part, "part").expect("written");
    let refused = envd.post("/files/compose", order(&[&part], &bait)).await;
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert!(place.is_untouched() && part.exists());
    let done = envd.post("/files/compose", order(&[&part], &whole)).await;
    assert_eq!(done.status, 200, "{}", done.text());
    assert!(!part.exists());
}
