//! Templates that are a disk alone, in real guests: a build without a health check makes one, its capsules
//! boot in whatever shape is asked for, as somebody else each, and on nodes that never saw the build.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::{MEMORY_MB, led_to, name, shorten_leases, wait_voters};

/// Longest that copies, a lost host's capsules and emulated boots may take.
const LONG: Duration = Duration::from_secs(240);
/// What the build does, and what its capsules have of it; the service is what they do not have.
const RECIPE: &str = "FROM minimal
USER worker
WORKDIR /srv/app
ENV GREETING=hello
COPY page ./
RUN date +%N | sudo tee built
START exec python3 -m http.server 8000
";
/// What is built from there on: user and directory are the recipe's to say, the environment is carried on.
const NEXT: &str = "FROM disk
RUN test \"$GREETING\" = hello && cp /srv/app/page /srv/app/again
";
const SEEN: &str =
    "id -un; pwd; echo $GREETING; cat page; hostname; nproc; pgrep -x python3 || echo quiet";

#[test]
fn a_build_without_a_health_check_is_a_disk_that_boots_anywhere_in_any_shape() {
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
    fs::write(dir.path().join("page"), "the page\n").expect("written");
    on_the_first(&cluster, || {
        let said = built(cluster.client(1), dir.path(), "disk", RECIPE);
        assert!(said.contains("\"disk\" is there (base)"), "{said}");
        assert!(said.contains("START has begun does not run"), "{said}");
    });
    let listed = listed_as(cluster.client(2), "disk");
    assert!(
        listed["vcpus"].is_null() && listed["memory_mb"].is_null(),
        "{listed}"
    );

    boots_in_any_shape_as_another(cluster.client(1));
    goes_on_from_its_own_pause(cluster.client(2));
    let said = built(cluster.client(2), dir.path(), "next", NEXT);
    assert!(said.contains("\"next\" is there (base)"), "{said}");
    let of_next = cluster
        .client(3)
        .capsule_with(&json!({ "template": "next" }));
    let again = "id -un; pwd; echo $GREETING; cat /srv/app/again";
    assert_eq!(
        cluster.client(3).output(&of_next, again),
        "root\n/root\nhello\nthe page"
    );
    cluster.client(3).destroy(&of_next);
    outlives_the_node_that_built_it(&mut cluster);
}

/// Two at once, of shapes that no template was made in.
fn boots_in_any_shape_as_another(world: &World) {
    let (one, other) = (("node1", 2, 320), ("node3", 1, 384));
    let made = [one, other].map(|(node, vcpus, memory)| {
        let asked = json!({
            "template": "disk", "vcpus": vcpus, "memory_mb": memory, "on_node": node,
        });
        let id = world.capsule_with(&asked);
        let wanted = format!("worker\n/srv/app\nhello\nthe page\n{id}\n{vcpus}\nquiet");
        assert_eq!(world.output(&id, SEEN), wanted, "{}", world.log());
        let total = world.output(&id, "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo");
        let total: u32 = total.parse().expect("a number");
        assert!((memory - 96..=memory).contains(&total), "{total} MiB");
        // The disk is one's own.
        world.output(&id, "echo mine | sudo tee mine; sync; ls mine");
        id
    });
    let [one, other] = &made;
    let of = |id: &str, file: &str| world.output(id, &format!("cat {file}"));
    assert_eq!(of(one, "built"), of(other, "built"), "it was built once");
    // A guest that goes on where another one was sealed shares its boot with all that do.
    for own in ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"] {
        let ids = [one, other].map(|id| of(id, own));
        assert!(ids[0] != ids[1] && ids[0].len() >= 32, "{own}: {ids:?}");
    }
    for id in made {
        world.destroy(&id);
    }
}

/// What has booted from a disk is paused and resumed as anything else, with its memory.
fn goes_on_from_its_own_pause(world: &World) {
    let id = world.capsule_with(&json!({ "template": "disk", "memory_mb": 320 }));
    world.output(&id, "echo kept >/dev/shm/mark; cat /dev/shm/mark");
    for act in ["pause", "resume"] {
        let done = world.about("POST", &id, &format!("/{act}"), None);
        assert!(matches!(done.status, 200 | 202), "{done:?}");
    }
    world.wait_status(&id, "running");
    assert_eq!(
        world.output(&id, "cat /dev/shm/mark; id -un"),
        "kept\nworker"
    );
    world.destroy(&id);
}

/// A capsule that may be restarted boots elsewhere from the same disk, and so does what is created then.
fn outlives_the_node_that_built_it(cluster: &mut ClusterWorld) {
    let asked = json!({
        "template": "disk", "memory_mb": MEMORY_MB, "on_host_loss": "restart",
    });
    let bound = led_to(cluster, 1, &asked);
    // The host cannot be removed while a capsule runs there; what it says names what else is in the way.
    let copied = wait_for(LONG, || {
        let path = format!("/v1/nodes/{}", name(1));
        let refused = cluster.client(2).call("DELETE", &path, None);
        assert!(refused.status >= 400, "{refused:?}");
        (!refused.message().contains("no other host holds")).then_some(())
    });
    assert!(copied.is_some(), "not copied\n{}", cluster.logs());
    cluster.kill(1);
    let moved = wait_for(LONG, || {
        let record = cluster.client(2).record(&bound);
        (record["status"] == "running" && record["node"] != name(1)).then_some(())
    });
    assert!(moved.is_some(), "not moved\n{}", cluster.logs());
    let seen = "id -un; cat page; test -e mine || echo new";
    assert_eq!(
        cluster.client(2).output(&bound, seen),
        "worker\nthe page\nnew"
    );
    cluster.client(2).destroy(&bound);
    for number in [2, 3] {
        let asked = json!({ "template": "disk", "vcpus": 2, "on_node": name(number) });
        let id = cluster.client(2).capsule_with(&asked);
        assert_eq!(cluster.client(3).output(&id, "cat page"), "the page");
        cluster.client(2).destroy(&id);
    }
    let world = cluster.client(2);
    for template in ["disk", "next"] {
        let path = format!("/v1/snapshots/{template}");
        assert_eq!(world.call("DELETE", &path, None).status, 204);
        assert_eq!(world.call("DELETE", &path, None).status, 404);
    }
    cluster.start(1);
    cluster.wait_members(3);
}

/// Does something while only the first node takes capsules.
fn on_the_first(cluster: &ClusterWorld, what: impl FnOnce()) {
    let act = |act: &str| {
        for number in [2, 3] {
            let path = format!("/v1/nodes/{}/{act}", name(number));
            assert_eq!(cluster.client(1).call("POST", &path, None).status, 200);
        }
    };
    act("cordon");
    what();
    act("uncordon");
}

/// What the list of one kind says of a template, which the other does not have.
fn listed_as(world: &World, template: &str) -> Value {
    let listed = |kind: &str| {
        let path = format!("/v1/snapshots?type={kind}");
        let all = world.call("GET", &path, None).json();
        let mut all = all.as_array().cloned().unwrap_or_default();
        all.retain(|it| it["name"] == template);
        all.pop()
    };
    assert_eq!(listed("snapshot"), None);
    let found = listed("base").expect("listed as a base");
    assert_eq!(
        (&found["type"], &found["platform"], &found["protected"]),
        (&json!("base"), &json!(false), &json!(false))
    );
    found
}

/// Builds as a person would; what the command said.
fn built(world: &World, dir: &Path, template: &str, recipe: &str) -> String {
    fs::write(dir.join("Wrennfile"), recipe).expect("written");
    let memory = MEMORY_MB.to_string();
    let made: Output = Command::new(wrenn())
        .args(["template", "build", "--skip-pre-post", "--memory", &memory])
        .args(["-t", template])
        .arg(dir)
        .env("WRENN_BASE_URL", world.url())
        .env("WRENN_API_KEY", world.key())
        .output()
        .expect("the command runs");
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "{said}\n{}", world.log());
    said
}
