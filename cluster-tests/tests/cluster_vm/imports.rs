//! Templates made of root file systems, in real guests: what an image is and says is what capsules of it
//! have, on every node, and the second time nothing is unpacked.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, images, wrenn};

use crate::{MEMORY_MB, wait_voters};

/// What is taken of the Debian that our own template is: enough to have a shell and its tools.
const PARTS: [&str; 10] = [
    "bin",
    "sbin",
    "lib",
    "lib64",
    "etc",
    "usr/bin",
    "usr/sbin",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
    "root",
];
/// What is left out of it: the largest things that nobody asks for here.
const LEFT_OUT: [&str; 4] = ["*/perl*", "*/python3*", "*/git*", "*/gconv*"];
/// What the image says of itself.
const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","config":{"User":"33","WorkingDir":"/srv/app",
    "Env":["GREETING=hello $USER"],"Cmd":["sleep","1000000"]}}"#;
/// The image's command is one that capsules find running.
const HEALTHY: &str = "RUN true\nHEALTHCHECK --interval=500ms --retries=60 pgrep -x sleep\n";
const MANIFEST: &str = r#"[{"Config":"config.json","Layers":["base.tar","top.tar.gz"]}]"#;

#[test]
fn an_image_becomes_a_template_on_every_node() {
    let cluster = ClusterWorld::with(2, |_, world| {
        let disk = ("WRENN_DISK_MIB".into(), "65536".into());
        world.environment.push(disk);
    });
    wait_voters(&cluster, &[1, 2], 1);
    let dir = tempfile::tempdir().expect("a directory");
    make_image(dir.path());
    let archive = dir.path().join("image.tar");

    fs::write(dir.path().join("healthy"), HEALTHY).expect("written");
    let healthy = dir.path().join("healthy");

    let built = build(cluster.client(1), &archive, "theirs", Some(&healthy));
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(built.status.success(), "{said}\n{}", cluster.logs());
    for node in [1, 2] {
        it_is_what_the_image_says(cluster.client(node), "theirs", "runs");
    }

    // Without a health check it is a disk, and boots by itself.
    let again = build(cluster.client(2), &archive, "again", None);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.success(), "{said}\n{}", cluster.logs());
    assert!(said.contains("IMPORT --user=33 (done before)"), "{said}");
    for node in [1, 2] {
        it_is_what_the_image_says(cluster.client(node), "again", "quiet");
    }

    let broken = dir.path().join("broken.tar");
    fs::write(&broken, &fs::read(&archive).expect("an image")[..1 << 20]).expect("written");
    let refused = build(cluster.client(1), &broken, "broken", None);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("read the archive"));
}

fn it_is_what_the_image_says(world: &World, template: &str, command: &str) {
    let id = world.capsule_with(&json!({ "template": template }));
    let line = "id -un; pwd; echo $GREETING; cat /srv/app/page; ls -A / | tr '\\n' ' '";
    let seen = world.output(&id, line);
    let mut lines = seen.lines();
    assert_eq!(lines.next(), Some("www-data"), "{seen}");
    assert_eq!(lines.next(), Some("/srv/app"), "{seen}");
    assert_eq!(lines.next(), Some("hello $USER"), "{seen}");
    assert_eq!(lines.next(), Some("from the upper layer"), "{seen}");
    let root = lines.next().expect("a list");
    assert!(
        !root.contains(".wrenn-import") && !root.contains("home"),
        "{root}"
    );
    assert_eq!(
        world.output(&id, "hostname; cat /etc/hostname"),
        format!("{id}\n{id}")
    );
    assert_eq!(
        world.output(&id, "pgrep -x sleep >/dev/null && echo runs || echo quiet"),
        command
    );
    assert_eq!(
        world.output(&id, "test -e /etc/removed || echo gone"),
        "gone"
    );
    world.destroy(&id);
}

/// An image of two layers, as `docker save` writes it, of the Debian in our own template.
fn make_image(dir: &Path) {
    let rootfs = images().join("templates/minimal/rootfs.raw");
    let parts: Vec<String> = PARTS
        .iter()
        .map(|it| format!("rdump /{it} tree/{}", parent(it)))
        .collect();
    for part in PARTS {
        fs::create_dir_all(dir.join("tree").join(parent(part))).expect("made");
    }
    fs::write(dir.join("parts"), parts.join("\n")).expect("written");
    fs::write(dir.join("config.json"), CONFIG).expect("written");
    fs::write(dir.join("manifest.json"), MANIFEST).expect("written");
    fs::create_dir_all(dir.join("top/srv/app")).expect("made");
    fs::create_dir_all(dir.join("top/etc")).expect("made");
    fs::write(dir.join("top/srv/app/page"), "from the upper layer\n").expect("written");
    fs::write(dir.join("top/etc/.wh.removed"), "").expect("written");
    let left_out: Vec<String> = LEFT_OUT
        .iter()
        .map(|it| format!("--exclude='{it}'"))
        .collect();
    let script = format!(
        "debugfs -f parts '{}' >/dev/null 2>&1
         echo x >tree/etc/removed
         tar -cf base.tar --numeric-owner {} -C tree .
         tar -czf top.tar.gz -C top .
         tar -cf image.tar config.json manifest.json base.tar top.tar.gz",
        rootfs.display(),
        left_out.join(" "),
    );
    let made = Command::new("sh")
        .args(["-ec", &script])
        .current_dir(dir)
        .output();
    let made = made.expect("a shell");
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn build(world: &World, archive: &Path, template: &str, recipe: Option<&Path>) -> Output {
    let memory = MEMORY_MB.to_string();
    Command::new(wrenn())
        .args([
            "template",
            "build",
            "--memory",
            &memory,
            "-t",
            template,
            "--from-archive",
        ])
        .arg(archive)
        .args(recipe.into_iter().flat_map(|it| [Path::new("--file"), it]))
        .env("WRENN_BASE_URL", world.url())
        .env("WRENN_API_KEY", world.key())
        .output()
        .expect("the command runs")
}
