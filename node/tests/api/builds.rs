//! Building templates through the interface: what is accepted, what is shown, and what becomes of a step
//! that fails.

use std::io::Write as _;
use std::path::PathBuf;

use http::Method;
use serde_json::{Value, json};
use wrenn_node::base::stop::Tasks;
use wrenn_node::build::{self, Builder};
use wrenn_node::relay::Relay;

use crate::world::{HERE, OTHER_KEY, World, eventually};

const UNKNOWN: &str = "bld-0000000000000000000000001";

/// A world whose node does its builds, until the tasks are dropped.
async fn world() -> (World, Tasks) {
    let world = World::new().await;
    let tasks = builder(&world);
    (world, tasks)
}

fn builder(world: &World) -> Tasks {
    let tasks = Tasks::new();
    Builder {
        here: HERE,
        proposer: world.proposer.clone(),
        relay: Relay::new(HERE, world.proposer.view(), world.guests.clone()),
        archives: archives(),
    }
    .spawn(&tasks);
    tasks
}

fn archives() -> PathBuf {
    std::env::temp_dir().join(build::ARCHIVES)
}

fn recipe(name: &str, lines: &[&str]) -> Value {
    json!({ "name": name, "recipe": lines, "skip_pre_post": true })
}

async fn started(world: &World, body: Value) -> String {
    let made = world.post("/v1/builds", body).await;
    let made = made.is(201).json();
    made["id"].as_str().unwrap().to_owned()
}

/// The build once it has ended.
async fn ended(world: &World, id: &str) -> Value {
    let path = format!("/v1/builds/{id}");
    eventually(async || {
        let build = world.get(&path).await.is(200).json();
        let status = build["status"].as_str().unwrap();
        (!matches!(status, "pending" | "running")).then_some(build)
    })
    .await
}

/// The names of the team's templates of a kind.
async fn of_team(world: &World, kind: &str) -> Vec<String> {
    let path = format!("/v1/snapshots?type={kind}");
    let listed = world.get(&path).await.is(200).json();
    let own = listed.as_array().unwrap().iter();
    let own = own.filter(|it| it["platform"] == false);
    own.map(|it| it["name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_build_is_a_disk_of_any_shape_unless_it_has_a_health_check() {
    let (world, _tasks) = world().await;
    for (name, check, kind) in [("disk", "", "base"), ("service", "true", "snapshot")] {
        let mut asked = recipe(name, &["RUN true"]);
        asked["healthcheck"] = check.into();
        asked["vcpus"] = json!(2);
        let id = started(&world, asked).await;
        let build = ended(&world, &id).await;
        assert_eq!(build["status"], "success", "{build}");
        assert_eq!(of_team(&world, kind).await, [name]);
        let listed = world.get(&format!("/v1/snapshots?type={kind}")).await;
        let listed = listed.json();
        let all = listed.as_array().unwrap();
        let made = all.iter().find(|it| it["name"] == name).unwrap();
        let is_disk = kind == "base";
        assert_eq!(made["vcpus"].is_null(), is_disk, "{made}");
        assert_eq!(made["memory_mb"].is_null(), is_disk, "{made}");
        assert_eq!(made["size_bytes"] == 0, is_disk, "{made}");
        assert_eq!(made["protected"], false);
        let ask = json!({ "template": name, "vcpus": 3, "memory_mb": 768 });
        let capsule = world.post("/v1/capsules", ask).await.is(201).json();
        let shape = (&capsule["vcpus"], &capsule["memory_mb"]);
        let (own, sealed) = ((json!(3), json!(768)), (json!(2), json!(512)));
        let wanted = if is_disk { own } else { sealed };
        assert_eq!(shape, (&wanted.0, &wanted.1), "{capsule}");
    }
    // One base may be the ground for another.
    let mut next = recipe("next", &["RUN true"]);
    next["base_template"] = "disk".into();
    let id = started(&world, next).await;
    assert_eq!(ended(&world, &id).await["status"], "success");
    let path = "/v1/snapshots/disk";
    world.delete(path).await.is(204);
    world.delete(path).await.refused(404, "not_found");
    assert_eq!(of_team(&world, "base").await, ["next"]);
}

#[tokio::test]
async fn a_recipe_becomes_a_template_with_its_environment() {
    let (world, _tasks) = world().await;
    let dir = tempfile::tempdir().unwrap();
    let workdir = format!("WORKDIR {}/deep/er", dir.path().display());
    let lines = [
        "ENV GREETING=hello",
        "ENV WHOLE=$GREETING-${GREETING}$$",
        &workdir,
        "RUN echo $WHOLE; pwd; echo oops >&2",
    ];
    let id = started(&world, recipe("mine", &lines)).await;
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "success", "{build}");
    assert_eq!(
        (&build["current_step"], &build["total_steps"]),
        (&json!(4), &json!(4))
    );
    assert_eq!(build["default_user"], "root");
    assert_eq!(build["default_env"]["GREETING"], "hello");
    assert_eq!(build["default_env"]["HOME"], Value::Null);
    let run = &build["logs"][3];
    let said = format!("hello-hello$\n{}/deep/er\n", dir.path().display());
    assert_eq!(
        (&run["stdout"], &run["stderr"]),
        (&json!(said), &json!("oops\n"))
    );
    assert_eq!((&run["cmd"], &run["exit"]), (&json!(lines[3]), &json!(0)));
    assert_eq!((&run["step"], &run["phase"]), (&json!(4), &json!("recipe")));
    // What it was built in is gone, and nothing but the template is listed.
    assert_eq!(of_team(&world, "base").await, ["mine"]);
    assert!(of_team(&world, "snapshot").await.is_empty());
    eventually(async || {
        let all = world.get("/v1/capsules").await.json();
        let running = all
            .as_array()
            .unwrap()
            .iter()
            .any(|it| it["status"] == "running");
        (!running).then_some(())
    })
    .await;
    let made = world
        .post("/v1/capsules", json!({"template": "mine"}))
        .await;
    made.is(201);
}

#[tokio::test]
async fn a_step_that_fails_is_named_with_its_output_and_ends_the_build() {
    let (world, _tasks) = world().await;
    let lines = ["RUN true", "RUN echo before it; exit 7", "RUN echo never"];
    let id = started(&world, recipe("broken", &lines)).await;
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "failed");
    let error = build["error"].as_str().unwrap();
    assert!(
        error.contains("step 2") && error.contains("exit code 7"),
        "{error}"
    );
    assert!(error.contains("exit 7"), "the step is quoted: {error}");
    let logs = build["logs"].as_array().unwrap();
    assert_eq!(logs.len(), 2, "{build}");
    assert_eq!(
        (&logs[1]["stdout"], &logs[1]["exit"]),
        (&json!("before it\n"), &json!(7))
    );
    assert_eq!(logs[1]["ok"], false);
    assert!(of_team(&world, "base").await.is_empty());
    assert!(of_team(&world, "snapshot").await.is_empty());
}

#[tokio::test]
async fn a_step_past_its_timeout_is_killed_and_a_missing_user_is_told() {
    let (world, _tasks) = world().await;
    let id = started(&world, recipe("slow", &["RUN --timeout=300ms sleep 60"])).await;
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "failed");
    let error = build["error"].as_str().unwrap();
    assert!(error.contains("timeout of 300ms"), "{error}");
}

#[tokio::test]
async fn steps_that_took_long_are_done_once() {
    let (world, _tasks) = world().await;
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("count");
    let slow = format!("RUN sleep 2.1; echo once >> {}", count.display());
    let first = started(&world, recipe("one", &[&slow, "RUN exit 3"])).await;
    assert_eq!(ended(&world, &first).await["status"], "failed");
    let second = started(&world, recipe("two", &[&slow, "RUN true"])).await;
    let second = ended(&world, &second).await;
    assert_eq!(second["status"], "success", "{second}");
    assert_eq!(second["logs"][0]["cached"], true, "{second}");
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "once\n");
    let mut anew = recipe("three", &[&slow, "RUN true"]);
    anew["no_cache"] = true.into();
    let third = started(&world, anew).await;
    assert_eq!(ended(&world, &third).await["status"], "success");
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "once\nonce\n");
    // What is kept is nobody's to name, to list or to remove.
    assert_eq!(of_team(&world, "base").await.len(), 2);
    assert!(of_team(&world, "snapshot").await.is_empty());
    let create = json!({"template": "_step.0123456789abcdef0123456789abcdef"});
    world
        .post("/v1/capsules", create)
        .await
        .refused(400, "invalid_request");
}

#[tokio::test]
async fn a_daemon_that_starts_again_goes_on_at_the_last_step_that_was_kept() {
    let (world, tasks) = world().await;
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("count");
    let gate = dir.path().join("gate");
    let slow = format!("RUN sleep 2.1; echo once >> {}", count.display());
    let wait = format!("RUN while ! [ -e {} ]; do sleep 0.05; done", gate.display());
    let id = started(&world, recipe("mine", &[&slow, &wait])).await;
    let path = format!("/v1/builds/{id}");
    eventually(async || {
        let build = world.get(&path).await.json();
        (build["current_step"] == 2 && build["phase"] == "recipe").then_some(())
    })
    .await;
    tasks.stop_and_join().await;
    std::fs::write(&gate, "").unwrap();
    let _again = builder(&world);
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "success", "{build}");
    assert_eq!(build["attempt"], 2);
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "once\n");
    let mut sandboxes = world.proposer.view().state();
    let left = eventually(async || {
        sandboxes = world.proposer.view().state();
        let left = sandboxes
            .sandboxes()
            .filter(|it| !it.phase.is_ended())
            .count();
        (left == 0).then_some(left)
    });
    assert_eq!(left.await, 0);
}

#[tokio::test]
async fn a_health_check_decides_when_the_template_is_made() {
    let (world, _tasks) = world().await;
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let start = format!("START sleep 0.5; touch {}", ready.display());
    let mut asked = recipe("healthy", &[&start]);
    asked["healthcheck"] = format!("--interval=50ms test -e {}", ready.display()).into();
    let id = started(&world, asked).await;
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "success", "{build}");
    let mut never = recipe("ill", &["RUN true"]);
    never["healthcheck"] = "--interval=10ms --retries=3 false".into();
    let id = started(&world, never).await;
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "failed");
    let error = build["error"].as_str().unwrap();
    assert!(error.contains("health check"), "{error}");
}

#[tokio::test]
async fn a_build_can_be_called_off_and_a_request_sent_again() {
    let (world, _tasks) = world().await;
    let body = recipe("mine", &["RUN --timeout=1h sleep 3000"]);
    let retry = ("again", crate::world::KEY);
    let first = world
        .post_again(world.address, "/v1/builds", retry, body.clone())
        .await;
    let first = first.is(201).json();
    let second = world
        .post_again(world.address, "/v1/builds", retry, body)
        .await;
    assert_eq!(second.is(201).json()["id"], first["id"]);
    let other = recipe("mine", &["RUN true"]);
    let other = world
        .post_again(world.address, "/v1/builds", retry, other)
        .await;
    other.refused(409, "conflict");
    let id = first["id"].as_str().unwrap();
    let path = format!("/v1/builds/{id}");
    eventually(async || (world.get(&path).await.json()["current_step"] == 1).then_some(())).await;
    world
        .post(&format!("{path}/cancel"), json!({}))
        .await
        .is(204);
    assert_eq!(ended(&world, id).await["status"], "cancelled");
    world
        .post(&format!("{path}/cancel"), json!({}))
        .await
        .is(204);
    eventually(async || {
        let state = world.proposer.view().state();
        state
            .sandboxes()
            .all(|it| it.phase.is_ended())
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_built_is_refused_before_anything_happens() {
    let (world, _tasks) = world().await;
    for (body, why) in [
        (json!({}), "name"),
        (recipe("../x", &["RUN true"]), "name"),
        (recipe("a", &[]), "directives"),
        (recipe("a", &["RUN true", "EXPOSE 80"]), "recipe line 2"),
        (recipe("a", &["COPY a /b"]), "archive"),
        (
            json!({"name": "a", "recipe": ["RUN true"], "healthcheck": "--x=1 y"}),
            "health check",
        ),
        (
            json!({"name": "a", "recipe": ["RUN true"], "vcpus": 9999}),
            "vcpus",
        ),
    ] {
        let refused = world.post("/v1/builds", body).await;
        refused.refused(400, "invalid_request");
        let said = refused.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(said.contains(why), "{said}");
    }
    let unknown = json!({"name": "a", "recipe": ["RUN true"], "base_template": "none"});
    world
        .post("/v1/builds", unknown)
        .await
        .refused(404, "not_found");
    // A name that is promised to everybody is nobody's, present or not.
    for platform in ["minimal", "minimal-ubuntu", "minimal-arch"] {
        let platform = recipe(platform, &["RUN true"]);
        world
            .post("/v1/builds", platform)
            .await
            .refused(403, "forbidden");
    }
    assert_eq!(world.get("/v1/builds").await.json(), json!([]));
}

#[tokio::test]
async fn files_come_with_an_archive_and_a_hostile_one_is_refused() {
    let (world, _tasks) = world().await;
    let config = recipe("a", &["COPY a /tmp/x"]).to_string();
    let form = |archive: Vec<u8>| {
        let config = config.clone();
        let world = &world;
        async move {
            let fields = [("config", config.as_bytes()), ("archive", &archive[..])];
            world.form("/v1/builds", &fields).await
        }
    };
    form(b"no archive at all".repeat(100))
        .await
        .refused(400, "invalid_request");
    form(Vec::new()).await.refused(400, "invalid_request");
    let missing = form(vec![0; 1024]).await;
    missing.refused(400, "invalid_request");
    let said = missing.json()["error"]["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(said.contains("no \"a\""), "{said}");
    form(b"PK\x03\x04 no zip file at all".repeat(100))
        .await
        .refused(400, "invalid_request");
    let outside = form(zip_of(&[("../a", b"x")])).await;
    outside.refused(400, "invalid_request");
    let said = outside.json()["error"]["message"].to_string();
    assert!(said.contains("../a") && said.contains("outside"), "{said}");
    // What it would unpack to is told by its directory.
    let mut bomb = zip_of(&[("a", b"x")]);
    let header = bomb.windows(4).position(|it| it == b"PK\x01\x02").unwrap();
    bomb[header + 24..header + 28].copy_from_slice(&(2_u32 << 30).to_le_bytes());
    form(bomb).await.refused(413, "too_large");
    let left = std::fs::read_dir(archives()).unwrap().count();
    assert_eq!(left, 0, "nothing is left of refused archives");

    // What is in a zip file gets into the guest.
    let dir = tempfile::tempdir().unwrap();
    let copy = format!("COPY src {}/x", dir.path().display());
    let config = recipe("zipped", &[&copy]).to_string();
    let zip = zip_of(&[("src/deep/a", b"contents"), ("other", b"")]);
    let fields = [("config", config.as_bytes()), ("archive", &zip[..])];
    let made = world.form("/v1/builds", &fields).await;
    let id = made.is(201).json()["id"].as_str().unwrap().to_owned();
    let build = ended(&world, &id).await;
    assert_eq!(build["status"], "success", "{build}");
    let copied = std::fs::read(dir.path().join("x/deep/a")).unwrap();
    assert_eq!(copied, b"contents");
}

fn zip_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, contents) in members {
        let options = zip::write::SimpleFileOptions::default();
        writer.start_file(*name, options).unwrap();
        writer.write_all(contents).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

#[tokio::test]
async fn a_log_is_followed_to_its_end_and_read_from_anywhere() {
    let (world, _tasks) = world().await;
    let id = started(
        &world,
        recipe("mine", &["RUN echo one; sleep 1.3; echo two"]),
    )
    .await;
    let log = world
        .get(&format!("/v1/builds/{id}/stream?follow=true"))
        .await;
    let text = String::from_utf8(log.is(200).body.to_vec()).unwrap();
    assert!(text.contains("one") && text.contains("two"), "{text}");
    assert!(text.contains("event: end"), "{text}");
    assert!(
        text.trim_end().ends_with('}'),
        "the build comes last: {text}"
    );
    let rest = world
        .get(&format!("/v1/builds/{id}/stream?from=1000"))
        .await;
    let rest = String::from_utf8(rest.is(200).body.to_vec()).unwrap();
    assert!(rest.starts_with("event: end"), "{rest}");
}

#[tokio::test]
async fn builds_are_their_teams_and_answer_where_administrators_look() {
    let (world, _tasks) = world().await;
    let id = started(&world, recipe("mine", &["RUN true"])).await;
    let path = format!("/v1/builds/{id}");
    ended(&world, &id).await;
    let steps = world.get(&format!("{path}/logs")).await.is(200).json();
    assert_eq!(steps.as_array().map(Vec::len), Some(1), "{steps}");
    let admins = format!("/v1/admin/builds/{id}");
    world.get(&admins).await.refused(403, "forbidden");
    for (method, path) in [
        (Method::GET, path.clone()),
        (Method::GET, format!("{path}/stream")),
        (Method::POST, format!("{path}/cancel")),
    ] {
        let answer = world.ask(method, &path, OTHER_KEY, "").await;
        answer.refused(404, "not_found");
    }
    let others = world.ask(Method::GET, "/v1/builds", OTHER_KEY, "").await;
    assert_eq!(others.json(), json!([]));
    world
        .get(&format!("/v1/builds/{UNKNOWN}"))
        .await
        .refused(404, "not_found");
    world
        .get("/v1/builds/x")
        .await
        .refused(400, "invalid_request");
}
