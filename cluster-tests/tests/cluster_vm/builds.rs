//! Templates built from recipes, in real guests: what a recipe says is what capsules of it have, steps are
//! done once, and a build outlives the node that was asked for it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::{MEMORY_MB, name, shorten_leases, wait_voters};

/// Longest a build may take: two guests boot for it, emulated.
const BUILD_TIMEOUT: Duration = Duration::from_secs(400);
/// The recipe, with everything a directive can be. Its last step before the service takes long enough
/// to be kept.
const RECIPE: &str = "FROM minimal
USER worker
WORKDIR /srv/app
ENV GREETING=hello
COPY files/ data/page ./
RUN test $(id -un) = worker && test -O page && sudo true && sleep 3 && date +%N | sudo tee built
START exec python3 -m http.server 8000
HEALTHCHECK --interval=500ms --retries=100 curl -sf localhost:8000/page
";

#[test]
fn a_recipe_becomes_a_template_once_and_outlives_the_node_that_was_asked() {
    let mut cluster = ClusterWorld::with(3, |_, world| {
        let disk = ("WRENN_DISK_MIB".into(), "65536".into());
        world.environment.push(disk);
    });
    wait_voters(&cluster, &[1, 2, 3], 3);
    shorten_leases(
        cluster.client(1),
        Duration::from_secs(4),
        Duration::from_secs(2),
    );
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(dir.path().join("files")).expect("made");
    fs::create_dir_all(dir.path().join("data")).expect("made");
    fs::write(dir.path().join("files/tool"), "a tool").expect("written");
    fs::write(dir.path().join("data/page"), "the page").expect("written");
    fs::write(dir.path().join("Wrennfile"), RECIPE).expect("written");

    let built = build(cluster.client(1), dir.path(), "mine");
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(built.status.success(), "{said}\n{}", cluster.logs());
    assert_eq!(String::from_utf8_lossy(&built.stdout), "mine\n");
    let stamp = what_it_has(cluster.client(2));

    // The same again under another name, at another node: nothing is done again up to the service.
    let again = build(cluster.client(3), dir.path(), "again");
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.success(), "{said}\n{}", cluster.logs());
    assert!(said.contains("sudo tee built (done before)"), "{said}");
    assert_eq!(made_of(cluster.client(1), "again", "cat built"), stamp);

    it_fails_where_a_step_does(cluster.client(2), dir.path());
    goes_on_elsewhere(&mut cluster);
}

/// What a capsule of the template has; the stamp of its build.
fn what_it_has(world: &World) -> String {
    let id = world.capsule_with(&json!({ "template": "mine" }));
    let seen = world.output(&id, "id -un; pwd; echo $GREETING; cat files/tool page; ls -d /tmp/build-files* 2>&1 | grep -c : || true");
    assert_eq!(
        seen,
        "worker\n/srv/app\nhello\na toolthe page1",
        "{}",
        world.log()
    );
    assert_eq!(world.output(&id, "curl -s localhost:8000/page"), "the page");
    assert_eq!(world.output(&id, "hostname"), id);
    let stamp = world.output(&id, "cat built");
    world.destroy(&id);
    stamp
}

fn made_of(world: &World, template: &str, line: &str) -> String {
    let id = world.capsule_with(&json!({ "template": template }));
    let seen = world.output(&id, line);
    world.destroy(&id);
    seen
}

fn it_fails_where_a_step_does(world: &World, dir: &Path) {
    fs::write(
        dir.join("Wrennfile"),
        "RUN echo before; exit 42\nRUN true\n",
    )
    .expect("written");
    let failed = build(world, dir, "broken");
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{said}");
    assert!(said.contains("before\n"), "{said}");
    assert!(
        said.contains("step 1 (recipe: RUN echo before; exit 42) ended with exit code 42"),
        "{said}"
    );
}

/// The node that was asked dies in the middle; another one goes on after the step that was kept.
fn goes_on_elsewhere(cluster: &mut ClusterWorld) {
    let recipe = [
        "RUN --timeout=60s sleep 3; date +%N > /root/first",
        "RUN --timeout=5m sleep 20",
    ];
    let asked = json!({
        "name": "moved", "recipe": recipe, "skip_pre_post": true, "memory_mb": MEMORY_MB,
    });
    // Its capsule runs elsewhere, and so does what is kept: nobody has a second copy yet.
    let act = |act: &str| {
        let path = format!("/v1/nodes/{}/{act}", name(1));
        assert_eq!(cluster.client(1).call("POST", &path, None).status, 200);
    };
    act("cordon");
    let made = cluster.client(1).call("POST", "/v1/builds", Some(&asked));
    assert_eq!(made.status, 201, "{}", made.json());
    let path = format!("/v1/builds/{}", made.json()["id"].as_str().expect("an id"));
    let at_second = wait_for(BUILD_TIMEOUT, || {
        let build = cluster.client(2).call("GET", &path, None).json();
        (build["current_step"] == 2).then_some(build)
    });
    let at_second = at_second.unwrap_or_else(|| panic!("no second step\n{}", cluster.logs()));
    assert_eq!(at_second["attempt"], 1);
    act("uncordon");
    cluster.kill(1);
    let ended = wait_for(BUILD_TIMEOUT, || {
        let build = cluster.client(2).call("GET", &path, None).json();
        let goes_on = matches!(build["status"].as_str(), Some("running" | "pending"));
        (!goes_on).then_some(build)
    });
    let ended: Value = ended.unwrap_or_else(|| panic!("it did not end\n{}", cluster.logs()));
    assert_eq!(ended["status"], "success", "{ended}\n{}", cluster.logs());
    assert_ne!(ended["host_id"], at_second["host_id"]);
    assert!(ended["attempt"].as_u64() >= Some(2), "{ended}");
    let first = ended["logs"].as_array().into_iter().flatten();
    let first: Vec<&Value> = first.filter(|step| step["step"] == 1).collect();
    assert!(first.iter().any(|step| step["cached"] == true), "{ended}");
    assert!(!made_of(cluster.client(3), "moved", "cat /root/first").is_empty());
    cluster.start(1);
    cluster.wait_members(3);
    assert_eq!(
        cluster.client(1).call("GET", &path, None).json()["status"],
        "success"
    );
    let left = wait_for(BUILD_TIMEOUT, || {
        let all = cluster.client(2).call("GET", "/v1/capsules", None).json();
        let over = |it: &Value| matches!(it["status"].as_str(), Some("stopped" | "error"));
        all.as_array()
            .is_some_and(|all| all.iter().all(over))
            .then_some(())
    });
    assert!(left.is_some(), "a capsule is left\n{}", cluster.logs());
}

/// Runs the command as a person would.
fn build(world: &World, dir: &Path, template: &str) -> Output {
    let memory = MEMORY_MB.to_string();
    Command::new(wrenn())
        .args([
            "template",
            "build",
            "--skip-pre-post",
            "--memory",
            &memory,
            "-t",
            template,
        ])
        .arg(dir)
        .env("WRENN_BASE_URL", world.url())
        .env("WRENN_API_KEY", world.key())
        .output()
        .expect("the command runs")
}
