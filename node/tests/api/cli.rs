//! The command line against a running interface, as scripts use it.

use std::process::{Output, Stdio};

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::world::{ADMIN_KEY, Fate, KEY, World};

/// A world with the command line pointed at it.
struct Terminal {
    world: World,
    home: tempfile::TempDir,
    key: &'static str,
}

impl Terminal {
    async fn new() -> Self {
        Self {
            world: World::new().await,
            home: tempfile::tempdir().expect("a directory"),
            key: KEY,
        }
    }

    /// One with an administrator's key.
    async fn admin() -> Self {
        Self {
            key: ADMIN_KEY,
            ..Self::new().await
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command
            .args(args)
            .current_dir(self.home.path())
            .env(
                "WRENN_BASE_URL",
                format!("http://{}/api/", self.world.address),
            )
            .env("WRENN_API_KEY", self.key)
            .env_remove("WRENN_DEV_DIR")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, args: &[&str]) -> Output {
        let output = self.command(args).output();
        let ran = tokio::time::timeout(crate::world::PATIENCE, output).await;
        ran.expect("in time").expect("a process")
    }

    /// Runs a command that must succeed, and returns what it printed.
    async fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(ran.status.success(), "{args:?}: {}", text(&ran.stderr));
        assert_eq!(text(&ran.stderr), "", "{args:?}");
        text(&ran.stdout)
    }

    async fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all).await).expect("JSON")
    }

    /// Runs a command that must fail with this code; returns its complaint.
    async fn fails(&self, code: i32, args: &[&str]) -> String {
        let ran = self.run(args).await;
        let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(code), "{args:?}: {complaint}");
        complaint
    }

    async fn capsule(&self) -> String {
        self.ok(&["capsule", "create"]).await.trim().to_owned()
    }
}

#[tokio::test]
async fn a_capsule_is_created_shown_listed_and_destroyed() {
    let terminal = Terminal::new().await;
    let args = [
        "capsule",
        "create",
        "--memory",
        "256",
        "--timeout",
        "5m",
        "--metadata",
        "a=b=c",
    ];
    let made = terminal.json(&args).await;
    assert_eq!(
        (&made["memory_mb"], &made["timeout_sec"]),
        (&256.into(), &300.into())
    );
    assert_eq!(made["metadata"]["a"], "b=c");
    let id = made["id"].as_str().unwrap();
    assert_eq!(terminal.json(&["capsule", "get", id]).await["node"], "here");
    let table = terminal.ok(&["capsule", "ls"]).await;
    assert!(table.contains(id) && table.starts_with("ID "), "{table}");
    terminal.ok(&["capsule", "ping", id]).await;
    assert_eq!(terminal.ok(&["capsule", "destroy", id]).await, "");
    assert_eq!(
        terminal.json(&["capsule", "ls"]).await,
        serde_json::json!([])
    );
    assert!(terminal.ok(&["template", "ls"]).await.contains("minimal"));
    assert!(terminal.ok(&["node", "ls"]).await.contains("voter  yes"));
}

#[tokio::test]
async fn capsules_are_paused_and_resumed_by_name() {
    let terminal = Terminal::new().await;
    let (one, two) = (terminal.capsule().await, terminal.capsule().await);
    assert_eq!(terminal.ok(&["capsule", "pause", &one, &two]).await, "");
    let told = terminal.fails(1, &["capsule", "pause", &one]).await;
    assert!(told.contains("is paused"), "{told}");
    let resumed = terminal.json(&["capsule", "resume", &two, &one]).await;
    assert_eq!(
        (&resumed[0]["id"], &resumed[1]["status"]),
        (&two.as_str().into(), &"running".into())
    );
    assert_eq!(resumed[0]["replicas"], 1);

    *terminal.world.guests.pause.lock().unwrap() = Some(Fate::Break("the disk is full"));
    let told = terminal.fails(1, &["capsule", "pause", &one]).await;
    assert!(told.contains("the disk is full"), "{told}");
}

#[tokio::test]
async fn exec_passes_on_output_byte_by_byte_and_the_exit_code() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    let script = r"printf '\000\377\n'; printf 'e\376' >&2; echo $A; pwd; exit 7";
    let args = [
        "capsule", "exec", &id, "--cwd", "/usr", "--env", "A=x y", "--", "sh", "-c", script,
    ];
    let ran = terminal.run(&args).await;
    assert_eq!(ran.status.code(), Some(7));
    assert_eq!(ran.stdout, b"\0\xff\nx y\n/usr\n");
    assert_eq!(ran.stderr, b"e\xfe");
}

#[tokio::test]
async fn exec_ends_with_124_when_the_time_runs_out() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    let args = [
        "capsule",
        "exec",
        &id,
        "--timeout",
        "1",
        "--",
        "sleep",
        "1000",
    ];
    let complaint = terminal.fails(124, &args).await;
    assert!(
        complaint.starts_with("error: ") && complaint.contains("hint: "),
        "{complaint}"
    );
    // This side may give up a moment before the agent does; the process must be gone all the same.
    let path = format!("/v1/capsules/{id}/processes");
    let is_gone = async || {
        let all = terminal.world.get(&path).await.json();
        all["processes"]
            .as_array()
            .is_some_and(Vec::is_empty)
            .then_some(())
    };
    crate::world::eventually(is_gone).await;
}

#[tokio::test]
async fn a_background_process_is_named_and_stays() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    let args = [
        "capsule",
        "exec",
        &id,
        "--background",
        "--tag",
        "mine",
        "--",
        "sleep",
        "1000",
    ];
    let printed = terminal.ok(&args).await;
    let (pid, tag) = printed.trim().split_once(' ').expect("two words");
    assert!(pid.parse::<u32>().is_ok() && tag == "mine");
    let path = format!("/v1/capsules/{id}/processes/{pid}");
    terminal.world.delete(&path).await.is(204);
}

#[tokio::test]
async fn files_are_copied_in_and_out() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    std::fs::write(terminal.home.path().join("in"), &bytes).unwrap();
    let dir = terminal.home.path().display();
    terminal
        .ok(&["capsule", "cp", "in", &format!("{id}:{dir}/there/")])
        .await;
    terminal
        .ok(&["capsule", "cp", &format!("{id}:{dir}/there/in"), "out"])
        .await;
    assert_eq!(
        std::fs::read(terminal.home.path().join("out")).unwrap(),
        bytes
    );
    let piped = terminal
        .run(&["capsule", "cp", &format!("{id}:{dir}/there/in"), "-"])
        .await;
    assert_eq!(piped.stdout, bytes);

    let missing = format!("{id}:/no/such/file");
    let complaint = terminal
        .fails(1, &["capsule", "cp", &missing, "gone"])
        .await;
    assert!(complaint.contains("hint: "), "{complaint}");
    assert!(!terminal.home.path().join("gone").exists());
    terminal.fails(2, &["capsule", "cp", "in", "out"]).await;
    terminal.fails(2, &["capsule", "cp", ".", &missing]).await;
}

#[tokio::test]
async fn a_shell_keeps_directory_and_variables_between_lines() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    let mut shell = terminal
        .command(&["capsule", "shell", &id])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process");
    let lines = "cd /usr\nexport A='it''s'\n\npwd; echo $A\nsh -c 'exit 3'\n";
    let mut stdin = shell.stdin.take().unwrap();
    stdin.write_all(lines.as_bytes()).await.expect("sent");
    drop(stdin);
    let ran = shell.wait_with_output().await.expect("an end");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "/usr\nits\n");
    assert_eq!(ran.status.code(), Some(3));
}

#[tokio::test]
async fn logs_are_printed_as_they_are() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    *terminal.world.guests.console.lock().unwrap() = Some(b"one\ntwo\n".to_vec());
    assert_eq!(terminal.ok(&["capsule", "logs", &id]).await, "one\ntwo\n");
    assert_eq!(
        terminal.ok(&["capsule", "logs", &id, "--tail", "1"]).await,
        "two\n"
    );
}

#[tokio::test]
async fn failures_are_one_line_and_a_hint() {
    let terminal = Terminal::new().await;
    let unknown = "cl-0000000000000000000000001";
    for (code, args) in [
        (1, vec!["capsule", "get", unknown]),
        (1, vec!["capsule", "exec", unknown, "--", "true"]),
        (1, vec!["capsule", "create", "--template", "no-such"]),
        (1, vec!["--api-key", "wrong", "capsule", "ls"]),
        (1, vec!["--url", "http://127.0.0.1:1", "capsule", "ls"]),
        (2, vec!["--url", "https://example.invalid", "capsule", "ls"]),
    ] {
        let complaint = terminal.fails(code, &args).await;
        let lines: Vec<_> = complaint.lines().collect();
        assert_eq!(lines.len(), 2, "{args:?}: {complaint}");
        assert!(
            lines[0].starts_with("error: ") && lines[1].starts_with("hint: "),
            "{complaint}"
        );
    }
    terminal.fails(2, &["capsule", "get", "../nodes"]).await;
    terminal.fails(2, &["capsule", "exec", unknown]).await;
    terminal.fails(2, &["no-such-noun"]).await;
}

#[tokio::test]
async fn a_create_that_fails_tells_why() {
    let terminal = Terminal::new().await;
    *terminal.world.guests.start.lock().unwrap() = Some(Fate::Break("no kernel"));
    let complaint = terminal.fails(1, &["capsule", "create"]).await;
    assert!(complaint.contains("no kernel"), "{complaint}");
}

#[tokio::test]
async fn a_reader_that_has_seen_enough_ends_the_command_quietly() {
    let terminal = Terminal::new().await;
    let id = terminal.capsule().await;
    *terminal.world.guests.console.lock().unwrap() = Some(vec![b'x'; 1 << 20]);
    let mut logs = terminal
        .command(&["capsule", "logs", &id])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a process");
    drop(logs.stdout.take());
    let ran = logs.wait_with_output().await.expect("an end");
    assert!(ran.status.success());
    assert_eq!(String::from_utf8_lossy(&ran.stderr), "");
}

#[tokio::test]
async fn a_local_key_goes_to_no_other_node() {
    let terminal = Terminal::new().await;
    let data = terminal.home.path().join(".wrenn-dev/node1");
    std::fs::create_dir_all(&data).unwrap();
    let ready = format!(
        r#"{{"id":"node-1","name":"n","url":"http://{}","pid":1}}"#,
        terminal.world.address
    );
    std::fs::write(data.join("ready.json"), ready).unwrap();
    std::fs::write(data.join("bootstrap.key"), format!("{KEY}\n")).unwrap();
    let below = terminal.home.path().join("a/b");
    std::fs::create_dir_all(&below).unwrap();
    let run = async |args: &[&str]| {
        let mut command = terminal.command(args);
        command
            .env_remove("WRENN_BASE_URL")
            .env_remove("WRENN_API_KEY");
        command
            .current_dir(&below)
            .output()
            .await
            .expect("a process")
    };
    let found = run(&["capsule", "ls"]).await;
    assert!(
        found.status.success(),
        "{}",
        String::from_utf8_lossy(&found.stderr)
    );
    let other = run(&["--url", "http://127.0.0.1:1", "capsule", "ls"]).await;
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&other.stderr).contains("no API key"));

    // Port 1 is now a node of the same cluster: its key is good there as well.
    let second = terminal.home.path().join(".wrenn-dev/node2");
    std::fs::create_dir_all(&second).unwrap();
    let ready = r#"{"id":"node-2","name":"m","url":"http://127.0.0.1:1","pid":1}"#;
    std::fs::write(second.join("ready.json"), ready).unwrap();
    let other = run(&["--url", "http://127.0.0.1:1", "capsule", "ls"]).await;
    let complaint = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(complaint.contains("cannot reach"), "{complaint}");
}

#[tokio::test]
async fn a_clean_up_of_no_node_is_refused_and_makes_nothing() {
    let terminal = Terminal::new().await;
    let nothing = terminal.home.path().join("nothing");
    let args = ["node", "clean-up", "--data-dir", nothing.to_str().unwrap()];
    let complaint = terminal.fails(1, &args).await;
    assert!(complaint.contains("no data directory"), "{complaint}");
    assert!(!nothing.exists());
}

#[tokio::test]
async fn a_token_is_one_line_that_can_be_run() {
    let terminal = Terminal::admin().await;
    let line = terminal
        .ok(&["token", "create", "--ttl", "90s", "--uses", "2"])
        .await;
    assert!(
        line.starts_with("wrenn node start --join secret-of-tok-"),
        "{line}"
    );
    assert_eq!(line.lines().count(), 1);
    let listed = terminal.json(&["token", "ls"]).await;
    let id = listed[0]["id"].as_str().unwrap();
    assert_eq!(listed[0]["uses_left"], 2);
    terminal.ok(&["token", "revoke", id]).await;
    let table = terminal.ok(&["token", "ls"]).await;
    assert!(table.contains(id) && table.contains("revoked"), "{table}");
    assert!(!table.contains("secret-of"));
    terminal
        .fails(2, &["token", "create", "--role", "host"])
        .await;
    terminal
        .fails(2, &["token", "revoke", "../nodes/here"])
        .await;

    let team = Terminal::new().await;
    let complaint = team.fails(1, &["token", "create"]).await;
    assert!(complaint.contains("administrator") && complaint.contains("hint: "));
}

#[tokio::test]
async fn nodes_are_cared_for_by_name() {
    let terminal = Terminal::admin().await;
    let table = terminal.ok(&["node", "ls"]).await;
    let headings = [
        "NAME",
        "ADDRESS",
        "ROLE",
        "LEADER",
        "VERSION",
        "STATE",
        "LAST SEEN",
    ];
    assert!(headings.iter().all(|it| table.contains(it)), "{table}");
    terminal.ok(&["node", "cordon", "here"]).await;
    assert!(
        terminal
            .ok(&["node", "ls"])
            .await
            .contains("alive, cordoned")
    );
    let tagged = terminal
        .json(&["node", "tag", "here", "zone=a", "rack=7"])
        .await;
    assert_eq!(tagged["tags"]["rack"], "7");
    let tagged = terminal.json(&["node", "tag", "here", "rack-"]).await;
    assert_eq!(tagged["tags"], serde_json::json!({"zone": "a"}));
    let drained = terminal.json(&["node", "drain", "here"]).await;
    assert_eq!(drained["node"]["draining"], true);
    terminal.ok(&["node", "uncordon", "here"]).await;

    let complaint = terminal.fails(1, &["node", "remove", "here"]).await;
    assert!(complaint.contains("last node"), "{complaint}");
    let complaint = terminal.fails(1, &["node", "cordon", "nobody"]).await;
    assert!(complaint.contains("nobody"), "{complaint}");
    assert!(complaint.contains("`wrenn node ls`"), "{complaint}");
    terminal.fails(2, &["node", "cordon", "../tokens"]).await;
}

#[tokio::test]
async fn a_drain_that_runs_out_of_time_fails_and_says_what_to_do() {
    let terminal = Terminal::admin().await;
    let id = terminal.capsule().await;
    let args = ["node", "drain", "here", "--timeout", "0s"];
    let complaint = terminal.fails(1, &args).await;
    assert!(complaint.contains("1 capsule ") && complaint.contains("--stop-capsules"));
    terminal
        .ok(&["node", "drain", "here", "--stop-capsules"])
        .await;
    let ended = terminal.json(&["capsule", "get", &id]).await;
    assert_eq!(ended["status"], "stopped");
}

#[tokio::test]
async fn settings_of_the_cluster_are_shown_and_set() {
    let terminal = Terminal::admin().await;
    let shown = terminal.ok(&["cluster", "get"]).await;
    assert!(
        shown.contains("leader") && shown.contains("max_voters"),
        "{shown}"
    );
    let set = ["cluster", "set", "max_voters=3", "lease_grace_sec=1m"];
    let settings = terminal.json(&set).await["settings"].clone();
    assert_eq!(
        (&settings["max_voters"], &settings["lease_grace_sec"]),
        (&3.into(), &60.into())
    );
    terminal.fails(1, &["cluster", "set", "max_voters=4"]).await;
    for wrong in ["max_voters=many", "max_voters=3s", "lease_ttl_sec=1500ms"] {
        terminal.fails(2, &["cluster", "set", wrong]).await;
    }
    let complaint = terminal.fails(2, &["cluster", "set", "voters=3"]).await;
    assert!(complaint.contains("max_learners"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_opened_and_linked_to() {
    let terminal = Terminal::new().await;
    let id = terminal.world.capsule().await;
    let set = [
        "capsule",
        "set",
        &id,
        "--ports",
        "public",
        "--auto-resume",
        "true",
    ];
    let changed = terminal.json(&set).await;
    assert_eq!(
        (&changed["ports"], &changed["auto_resume"]),
        (&"public".into(), &true.into())
    );
    let url = terminal
        .ok(&["capsule", "link", &id, "8080", "--expires", "5m"])
        .await;
    assert!(
        url.starts_with(&format!("http://8080-{id}.localhost:")),
        "{url}"
    );
    let refused = terminal
        .fails(1, &["capsule", "link", &id, "8080", "--expires", "30d"])
        .await;
    assert!(refused.contains("expires_in_sec"), "{refused}");
    terminal
        .fails(1, &["capsule", "set", &id, "--ports", "ajar"])
        .await;
}

/// A terminal of this side: what is typed into it, and what it shows.
struct Desk {
    master: std::fs::File,
    slave: std::os::fd::OwnedFd,
}

impl Desk {
    fn new(cols: u16, rows: u16) -> Self {
        let size = nix::pty::Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pair = nix::pty::openpty(&size, None).expect("a terminal");
        Self {
            master: pair.master.into(),
            slave: pair.slave,
        }
    }

    fn seat(&self) -> Stdio {
        self.slave.try_clone().expect("a descriptor").into()
    }

    /// Reads on a thread until `wanted` was shown.
    async fn shown(&self, wanted: &'static str) -> String {
        use std::io::Read as _;
        let mut master = self.master.try_clone().expect("a descriptor");
        let read = tokio::task::spawn_blocking(move || {
            let (mut shown, mut bytes) = (Vec::new(), [0; 4096]);
            loop {
                let count = master.read(&mut bytes).expect("it is open");
                shown.extend_from_slice(&bytes[..count]);
                let text = String::from_utf8_lossy(&shown);
                if text.contains(wanted) {
                    return text.into_owned();
                }
            }
        });
        let read = tokio::time::timeout(crate::world::PATIENCE, read).await;
        read.expect("in time").expect("no panic")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_at_a_terminal_is_a_terminal_there_and_leaves_ours_as_it_was() {
    use std::io::Write as _;
    let terminal = Terminal::new().await;
    let id = terminal.world.capsule().await;
    let mut desk = Desk::new(91, 17);
    let before = nix::sys::termios::tcgetattr(&desk.slave).expect("attributes");
    let mut shell = terminal
        .command(&["capsule", "shell", &id, "--", "/bin/sh"])
        .env("PS1", "$ ")
        .stdin(desk.seat())
        .stdout(desk.seat())
        .stderr(desk.seat())
        .spawn()
        .expect("a process");
    desk.shown("# ").await;
    // Typed as keys: this side's terminal echoes nothing, the other one does.
    desk.master.write_all(b"stty size; echo m''ark\r").unwrap();
    let shown = desk.shown("mark").await;
    assert!(shown.contains("17 91"), "{shown}");
    desk.master.write_all(b"exit 7\r").unwrap();
    let ended = tokio::time::timeout(crate::world::PATIENCE, shell.wait()).await;
    assert_eq!(ended.expect("in time").expect("an end").code(), Some(7));
    let after = nix::sys::termios::tcgetattr(&desk.slave).expect("attributes");
    assert_eq!(after, before);

    let complaint = terminal
        .fails(1, &["capsule", "shell", &id, "--attach", "pty-0"])
        .await;
    assert!(complaint.starts_with("error: "), "{complaint}");
}

#[tokio::test]
async fn keys_teams_and_members_are_made_used_and_taken_away() {
    let terminal = Terminal::admin().await;
    let team = terminal.ok(&["team", "create", "Acme"]).await;
    let team = team.trim();
    assert!(terminal.ok(&["team", "ls"]).await.contains("Acme"));
    let ann = ["team", "add", "ann@example.com", "--team", team];
    let ann = terminal.ok(&ann).await.trim().to_owned();
    let members = terminal.ok(&["team", "members", team]).await;
    assert!(
        members.contains("ann@example.com") && members.contains("owner"),
        "{members}"
    );
    let made = [
        "key", "create", "laptop", "--scope", "read", "--team", team, "--user", &ann,
    ];
    let made = terminal.json(&made).await;
    assert_eq!(
        (&made["scope"], &made["creator_email"]),
        (&"read".into(), &"ann@example.com".into())
    );
    let secret = made["key"].as_str().unwrap();
    let listed = terminal.ok(&["key", "list", "--team", team]).await;
    assert!(
        listed.contains("laptop") && !listed.contains(secret),
        "{listed}"
    );
    let hers = ["--api-key", secret, "capsule", "ls"];
    assert!(terminal.ok(&hers).await.starts_with("ID "));
    let refused = ["--api-key", secret, "capsule", "create"];
    let refused = terminal.fails(1, &refused).await;
    assert!(
        refused.contains("scope \"read\"") && refused.contains("hint:"),
        "{refused}"
    );
    terminal
        .ok(&["key", "revoke", made["id"].as_str().unwrap()])
        .await;
    terminal.fails(1, &hers).await;
    assert!(
        terminal
            .fails(2, &["key", "revoke", "../x"])
            .await
            .contains("not a valid id")
    );
    terminal.ok(&["team", "drop", &ann, "--team", team]).await;
    terminal.ok(&["team", "rm", team]).await;
    let log = terminal.ok(&["audit", "--all-teams", "-n", "4"]).await;
    for word in [
        "team.delete",
        "member.remove",
        "api_key.revoke",
        "127.0.0.1",
    ] {
        assert!(log.contains(word), "{log}");
    }
    let keys = [
        "audit",
        "--all-teams",
        "--type",
        "api_key",
        "--action",
        "create",
    ];
    assert_eq!(terminal.json(&keys).await.as_array().unwrap().len(), 1);
    let only_key = terminal.ok(&["key", "create"]).await;
    assert!(only_key.starts_with("wrn_") && only_key.trim().len() == 36);
    let set = terminal.ok(&["cluster", "set", "key_rate=50"]).await;
    assert!(set.contains("key_burst") && set.contains("100"), "{set}");
}
