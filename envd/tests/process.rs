//! `process.Process` over real HTTP, in both codecs.

mod common;

use bytes::Bytes;
use common::{BOTH, Codec, Envd, RpcError, basic, by_pid, by_tag, command, exists, shell, soon};
use futures::stream;
use proto::envd::process as wire;
use serde_json::json;
use wire::__buffa::oneof;

fn stdin_input(data: &[u8]) -> wire::ProcessInput {
    let input = Some(oneof::process_input::Input::Stdin(data.to_vec()));
    wire::ProcessInput {
        input,
        ..Default::default()
    }
}

fn terminal_input(data: &[u8]) -> wire::ProcessInput {
    let input = Some(oneof::process_input::Input::Pty(data.to_vec()));
    wire::ProcessInput {
        input,
        ..Default::default()
    }
}

async fn send_input(
    envd: &Envd,
    codec: Codec,
    pid: u32,
    input: wire::ProcessInput,
) -> Result<(), RpcError> {
    let process = by_pid(pid).into();
    let request = wire::SendInputRequest {
        process,
        input: input.into(),
        ..Default::default()
    };
    let sent = envd
        .call(codec, "process.Process/SendInput", &request)
        .await;
    sent.map(|_: wire::SendInputResponse| ())
}

async fn close_stdin(envd: &Envd, codec: Codec, pid: u32) -> Result<(), RpcError> {
    let request = wire::CloseStdinRequest {
        process: by_pid(pid).into(),
        ..Default::default()
    };
    let closed = envd
        .call(codec, "process.Process/CloseStdin", &request)
        .await;
    closed.map(|_: wire::CloseStdinResponse| ())
}

/// Whether a process exists and is not a zombie.
fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

fn sleeper(tag: Option<&str>) -> wire::StartRequest {
    wire::StartRequest {
        tag: tag.map(str::to_owned),
        ..command("sleep", &["1000"])
    }
}

#[tokio::test]
async fn both_streams_and_the_exit_code_arrive_in_both_codecs() {
    let envd = Envd::start();
    for codec in BOTH {
        let request = shell("echo out; echo err >&2; exit 3");
        let ran = envd
            .start_process(codec, request, &[])
            .await
            .run()
            .await
            .expect("ran");
        assert_eq!((ran.out(), ran.err()), ("out\n", "err\n"));
        let end = ran.end();
        assert_eq!(
            (end.exit_code, end.exited, end.status.as_str()),
            (3, true, "exit status 3")
        );
        assert_eq!(end.error.as_deref(), Some("exit status 3"));
        let ran = envd
            .start_process(codec, shell("true"), &[])
            .await
            .run()
            .await
            .expect("ran");
        assert_eq!((ran.end().exit_code, ran.end().error.as_deref()), (0, None));
    }
}

#[tokio::test]
async fn short_commands_never_lose_output() {
    let envd = Envd::start();
    for round in 0..100 {
        let ran = envd.shell("echo here").await;
        assert_eq!(ran.out(), "here\n", "round {round}");
    }
}

#[tokio::test]
async fn binary_output_arrives_byte_for_byte() {
    let envd = Envd::start();
    for codec in BOTH {
        // A multi-byte character right across a usual buffer's edge, then every byte there is.
        let line = "head -c 8191 /dev/zero | tr '\\0' a; printf '\\342\\202\\254'; \
                    i=0; while [ $i -lt 256 ]; do printf \"\\\\$(printf %03o $i)\"; i=$((i+1)); done";
        let ran = envd
            .start_process(codec, shell(line), &[])
            .await
            .run()
            .await
            .expect("ran");
        let mut expected = vec![b'a'; 8191];
        expected.extend("€".as_bytes());
        expected.extend(0..=255_u8);
        assert_eq!(ran.stdout, expected);
    }
}

#[tokio::test]
async fn large_output_to_a_slow_reader_is_complete() {
    let envd = Envd::start();
    let request = shell("head -c 30000000 /dev/zero; echo done >&2");
    let ran = envd
        .start_process(Codec::Proto, request, &[])
        .await
        .run()
        .await
        .expect("ran");
    assert_eq!((ran.stdout.len(), ran.err()), (30_000_000, "done\n"));
}

#[tokio::test]
async fn killed_process_reports_its_signal() {
    let envd = Envd::start();
    let ran = envd.shell("kill -9 $$").await;
    let end = ran.end();
    assert_eq!(
        (end.exit_code, end.exited, end.status.as_str()),
        (-1, false, "signal: killed")
    );
    assert_eq!(end.error.as_deref(), Some("signal: killed"));
}

#[tokio::test]
async fn missing_command_exits_127_and_a_directory_126() {
    let envd = Envd::start();
    let run = async |cmd: &str| {
        let stream = envd
            .start_process(Codec::Json, command(cmd, &[]), &[])
            .await;
        stream.run().await.expect("no spawn failure")
    };
    for cmd in ["no-such-command", "/no/such/command"] {
        let ran = run(cmd).await;
        assert_eq!(ran.end().exit_code, 127, "{cmd}");
        assert!(ran.err().contains("not found"));
    }
    assert_eq!(run("/etc").await.end().exit_code, 126);
}

#[tokio::test]
async fn arguments_arrive_untouched_and_scripts_need_no_interpreter_line() {
    let envd = Envd::start();
    let args = ["%s|", "a b", "", "$HOME", "'\"", "-n"];
    let ran = envd
        .start_process(Codec::Proto, command("printf", &args), &[])
        .await
        .run()
        .await;
    assert_eq!(ran.expect("ran").out(), "a b||$HOME|'\"|-n|");
    let script = tempfile::NamedTempFile::new()
        .expect("a file")
        .into_temp_path();
    std::fs::write(&script, "echo script $1\n").expect("written");
    envd.shell(&format!("chmod +x {}", script.display())).await;
    let request = command(script.to_str().expect("text"), &["arg"]);
    let ran = envd
        .start_process(Codec::Json, request, &[])
        .await
        .run()
        .await
        .expect("ran");
    assert_eq!(ran.out(), "script arg\n");
}

#[tokio::test]
async fn children_start_with_plain_signals_and_three_descriptors() {
    let envd = Envd::start();
    // Descriptor 3 is the directory that `ls` itself reads.
    assert_eq!(envd.shell("ls /proc/self/fd").await.out(), "0\n1\n2\n3\n");
    let line = "grep -E 'Sig(Blk|Ign)|NSsid' /proc/self/status | tr -d '\\t0\\n'; echo; \
                [ $(ps -o sid= -p $$) = $$ ] && echo leader";
    let ran = envd.shell(line).await;
    let lines: Vec<_> = ran.out().lines().collect();
    assert!(lines[0].contains("SigBlk:SigIgn:"), "{lines:?}");
    assert_eq!(lines[1], "leader");
}

#[tokio::test]
async fn environment_is_built_and_not_inherited() {
    let envd = Envd::start();
    envd.post("/init", r#"{"envVars":{"GLOBAL":"g","BOTH":"g"}}"#)
        .await;
    let mut request = command("env", &[]);
    request
        .process
        .get_or_insert_default()
        .envs
        .insert("BOTH".into(), "r".into());
    let ran = envd
        .start_process(Codec::Json, request, &[])
        .await
        .run()
        .await
        .expect("ran");
    let lines: Vec<_> = ran.out().lines().collect();
    for expected in [
        "GLOBAL=g",
        "BOTH=r",
        "USER=root",
        "LOGNAME=root",
        "HOME=/root",
    ] {
        assert!(lines.contains(&expected), "{expected} in {lines:?}");
    }
    assert!(!ran.out().contains("ENVD_SECRET"));
}

#[tokio::test]
async fn basic_credentials_choose_the_user() {
    let envd = Envd::start();
    for codec in BOTH {
        let headers = [("authorization", &*basic("nobody"))];
        let mut request = shell("id -u; id -G; pwd; cat /proc/self/oom_score_adj");
        request.process.get_or_insert_default().cwd = Some("/tmp".into());
        let ran = envd
            .start_process(codec, request, &headers)
            .await
            .run()
            .await
            .expect("ran");
        assert_eq!(ran.out(), "65534\n65534\n/tmp\n100\n");
        let headers = [("authorization", &*basic("root123"))];
        let refused = envd
            .start_process(codec, shell("true"), &headers)
            .await
            .run()
            .await;
        let error = refused.expect_err("no such user");
        assert_eq!(error.code, "unauthenticated");
        assert!(
            error.message.contains("invalid username: 'root123'"),
            "{}",
            error.message
        );
    }
}

#[tokio::test]
async fn working_directory_resolves_and_must_exist() {
    let envd = Envd::start();
    let pwd = async |cwd: &str| {
        let mut request = command("pwd", &[]);
        request.process.get_or_insert_default().cwd = Some(cwd.into());
        envd.start_process(Codec::Json, request, &[])
            .await
            .run()
            .await
    };
    assert_eq!(
        pwd("/usr/../usr/bin").await.expect("ran").out(),
        "/usr/bin\n"
    );
    assert_eq!(pwd("~").await.expect("ran").out(), "/root\n");
    for missing in ["/no/such/dir", "/etc/passwd"] {
        let error = pwd(missing).await.expect_err("missing");
        assert_eq!(error.code, "invalid_argument");
        assert!(
            error.message.contains("does not exist"),
            "{}",
            error.message
        );
    }
    envd.post("/init", r#"{"defaultWorkdir":"/usr"}"#).await;
    assert_eq!(envd.shell("pwd").await.out(), "/usr\n");
    assert_eq!(pwd("bin").await.expect("ran").out(), "/usr/bin\n");
}

#[tokio::test]
async fn deadline_kills_the_group_and_ends_the_stream() {
    let envd = Envd::start();
    for codec in BOTH {
        // Enough for a busy machine to start two programs.
        let headers = [("connect-timeout-ms", "3000")];
        let line = "sleep 1000 & echo $!; wait";
        let mut stream = envd.start_process(codec, shell(line), &headers).await;
        let pid = stream.pid().await;
        let sleeper = String::from_utf8(stream.until("\n").await).expect("text");
        let error = stream
            .event()
            .await
            .expect("an end")
            .expect_err("cut by the deadline");
        assert_eq!(error.code, "deadline_exceeded");
        assert!(!exists(pid));
        let sleeper: u32 = sleeper.trim().parse().expect("a pid");
        // Its parent is gone, so somebody else reaps it; dying is what counts.
        soon(async {
            while is_running(sleeper) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn closed_stream_leaves_the_process_alive_and_it_can_be_joined_again() {
    let envd = Envd::start();
    for codec in BOTH {
        let line = "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        let mut stream = envd.start_process(codec, shell(line), &[]).await;
        let pid = stream.pid().await;
        stream.until("ready").await;
        drop(stream);
        envd.get("/health").await;
        assert!(
            envd.list(codec)
                .await
                .iter()
                .any(|process| process.pid == pid)
        );
        let joined = envd.connect(codec, by_pid(pid)).await;
        envd.signal(pid, wire::Signal::SIGNAL_SIGTERM)
            .await
            .expect("alive");
        let ran = joined.run().await.expect("joined");
        assert_eq!((ran.pid, ran.out(), ran.end().exit_code), (pid, "bye\n", 0));
    }
}

#[tokio::test]
async fn everyone_attached_gets_every_chunk() {
    let envd = Envd::start();
    let request = wire::StartRequest {
        stdin: Some(true),
        tag: Some("t".into()),
        ..command("cat", &[])
    };
    let mut first = envd.start_process(Codec::Json, request, &[]).await;
    let pid = first.pid().await;
    let second = envd.connect(Codec::Proto, by_tag("t")).await;
    send_input(&envd, Codec::Json, pid, stdin_input(b"hello"))
        .await
        .expect("sent");
    close_stdin(&envd, Codec::Json, pid).await.expect("closed");
    assert_eq!(first.until("hello").await, b"hello");
    assert_eq!(second.run().await.expect("ran").out(), "hello");
}

#[tokio::test]
async fn late_connect_still_learns_the_end() {
    let envd = Envd::start();
    let request = wire::StartRequest {
        tag: Some("late".into()),
        ..shell("exit 5")
    };
    let ran = envd
        .start_process(Codec::Json, request, &[])
        .await
        .run()
        .await
        .expect("ran");
    for codec in BOTH {
        for selector in [by_pid(ran.pid), by_tag("late")] {
            let late = envd
                .connect(codec, selector)
                .await
                .run()
                .await
                .expect("retained");
            assert_eq!(
                (late.pid, late.end().exit_code, late.out()),
                (ran.pid, 5, "")
            );
        }
    }
    let error = send_input(&envd, Codec::Json, ran.pid, stdin_input(b"x")).await;
    assert_eq!(error.expect_err("dead").code, "not_found");
}

#[tokio::test]
async fn standard_input_is_fed_and_closed() {
    let envd = Envd::start();
    for codec in BOTH {
        let request = wire::StartRequest {
            stdin: None,
            ..command("cat", &[])
        };
        let mut stream = envd.start_process(codec, request, &[]).await;
        let pid = stream.pid().await;
        let data: Vec<u8> = (0..=255).collect();
        send_input(&envd, codec, pid, stdin_input(&data))
            .await
            .expect("sent");
        let error = send_input(&envd, codec, pid, terminal_input(b"x")).await;
        assert_eq!(error.expect_err("no terminal").code, "failed_precondition");
        close_stdin(&envd, codec, pid).await.expect("closed");
        let mut ran = common::Ran::default();
        while let Some(Ok(event)) = stream.event().await {
            match event {
                oneof::process_event::Event::Data(data) => {
                    if let Some(oneof::process_event::data_event::Output::Stdout(d)) = data.output {
                        ran.stdout.extend(d);
                    }
                }
                oneof::process_event::Event::End(end) => ran.end = Some(*end),
                _ => {}
            }
        }
        assert_eq!((ran.stdout.clone(), ran.end().exit_code), (data, 0));
    }
}

#[tokio::test]
async fn process_without_input_reads_the_end_and_takes_none() {
    let envd = Envd::start();
    let ran = envd
        .start_process(Codec::Json, command("cat", &[]), &[])
        .await
        .run()
        .await;
    assert_eq!(ran.expect("ran").end().exit_code, 0);
    let mut stream = envd.start_process(Codec::Json, sleeper(None), &[]).await;
    let pid = stream.pid().await;
    let error = send_input(&envd, Codec::Json, pid, stdin_input(b"x")).await;
    assert_eq!(error.expect_err("closed").code, "failed_precondition");
    close_stdin(&envd, Codec::Json, pid)
        .await
        .expect("closing twice is fine");
}

#[tokio::test]
async fn input_stream_feeds_in_order_and_leaves_input_open() {
    use wire::stream_input_request::{DataEvent, KeepAlive, StartEvent};
    let envd = Envd::start();
    for codec in BOTH {
        let request = wire::StartRequest {
            stdin: Some(true),
            ..command("cat", &[])
        };
        let mut stream = envd.start_process(codec, request, &[]).await;
        let pid = stream.pid().await;
        let event = |event| wire::StreamInputRequest {
            event: Some(event),
            ..Default::default()
        };
        let mut messages = vec![event(
            StartEvent {
                process: by_pid(pid).into(),
                ..Default::default()
            }
            .into(),
        )];
        for number in 0..20 {
            let input = stdin_input(format!("{number} ").as_bytes()).into();
            messages.push(event(
                DataEvent {
                    input,
                    ..Default::default()
                }
                .into(),
            ));
            messages.push(event(KeepAlive::default().into()));
        }
        let method = "process.Process/StreamInput";
        let mut answer = envd
            .stream_with(codec, method, stream::iter(messages), &[])
            .await;
        answer
            .next::<wire::StreamInputResponse>()
            .await
            .expect("one answer")
            .expect("no error");
        assert!(answer.next::<wire::StreamInputResponse>().await.is_none());
        let expected: String = (0..20).map(|number| format!("{number} ")).collect();
        assert_eq!(stream.until("19 ").await, expected.as_bytes());
        send_input(&envd, codec, pid, stdin_input(b"more"))
            .await
            .expect("still open");
        assert_eq!(stream.until("more").await, b"more");
    }
}

#[tokio::test]
async fn killed_process_is_gone_when_the_kill_is_answered() {
    let envd = Envd::start();
    for _ in 0..20 {
        let mut stream = envd.start_process(Codec::Proto, sleeper(None), &[]).await;
        let pid = stream.pid().await;
        envd.signal(pid, wire::Signal::SIGNAL_SIGKILL)
            .await
            .expect("alive");
        assert!(!exists(pid), "reaped, not merely killed");
        assert!(envd.list(Codec::Json).await.is_empty());
        let again = envd
            .signal(pid, wire::Signal::SIGNAL_SIGKILL)
            .await
            .expect_err("dead");
        assert_eq!((again.status, again.code.as_str()), (404, "not_found"));
        let end = stream.event().await;
        assert!(
            matches!(end, Some(Ok(oneof::process_event::Event::End(_)))),
            "{end:?}"
        );
    }
}

/// Starts a shell that waits for a child of its own; gives the pids of both.
async fn tree(envd: &Envd) -> (u32, u32) {
    // A shell may become the last command; here that is one of its own.
    let line = "sleep 1000 & echo $!; sleep 1000; true";
    let mut stream = envd.start_process(Codec::Proto, shell(line), &[]).await;
    let pid = stream.pid().await;
    let child = String::from_utf8(stream.until("\n").await).expect("text");
    (pid, child.trim().parse().expect("a pid"))
}

/// Both children of that shell, the one in the background and the one it waits for.
fn sleepers_of(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    let pids = children.split_whitespace();
    pids.map(|pid| pid.parse().expect("a pid")).collect()
}

#[tokio::test]
async fn a_kill_of_a_node_ends_the_whole_tree_and_a_plain_one_the_process_alone() {
    let envd = Envd::start();
    let kill = async |pid: u32, headers: &[(&str, &str)]| {
        let request = wire::SendSignalRequest {
            process: by_pid(pid).into(),
            signal: wire::Signal::SIGNAL_SIGKILL.into(),
            ..Default::default()
        };
        let method = "process.Process/SendSignal";
        let answer = envd.call_with(Codec::Proto, method, &request, headers);
        let _killed: wire::SendSignalResponse = answer.await.expect("alive");
    };
    let (plain, child) = tree(&envd).await;
    kill(plain, &[]).await;
    assert!(!exists(plain));
    assert!(is_running(child), "a plain signal goes no further");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(-plain.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("its group is still there");

    let (pid, child) = tree(&envd).await;
    let sleepers = soon(async {
        loop {
            let sleepers = sleepers_of(pid);
            if sleepers.len() == 2 {
                return sleepers;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(sleepers.contains(&child));
    kill(pid, &[("x-wrenn-signal-reach", "tree")]).await;
    assert!(!exists(pid));
    // Their parent is gone, so somebody else reaps them; dying is what counts.
    soon(async {
        while sleepers.iter().any(|sleeper| is_running(*sleeper)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn dead_process_leaves_the_list_at_once() {
    let envd = Envd::start();
    let mut stream = envd
        .start_process(Codec::Json, sleeper(Some("mine")), &[])
        .await;
    let pid = stream.pid().await;
    let listed = envd.list(Codec::Proto).await;
    assert_eq!(
        (listed[0].pid, listed[0].tag.as_deref()),
        (pid, Some("mine"))
    );
    assert_eq!(
        (listed[0].config.cmd.as_str(), &*listed[0].config.args),
        ("sleep", &["1000".to_owned()][..])
    );
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("alive");
    // The kernel makes it a zombie at its own pace; from then on no list may show it.
    soon(async {
        while is_running(pid) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(envd.list(Codec::Json).await.is_empty());
}

#[tokio::test]
async fn only_two_signals_can_be_sent() {
    let envd = Envd::start();
    let mut stream = envd.start_process(Codec::Json, sleeper(None), &[]).await;
    let pid = stream.pid().await;
    let error = envd
        .signal(pid, wire::Signal::SIGNAL_UNSPECIFIED)
        .await
        .expect_err("refused");
    assert_eq!(error.code, "invalid_argument");
    let body = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGTERM"}).to_string();
    let request = http::Request::post("/process.Process/SendSignal")
        .header("content-type", "application/json")
        .body(common::full(body))
        .expect("a request");
    assert_eq!(envd.fetch(request).await.status, 200);
    let end = stream.event().await;
    let Some(Ok(oneof::process_event::Event::End(end))) = end else {
        panic!("{end:?}")
    };
    assert_eq!(end.status, "signal: terminated");
}

#[tokio::test]
async fn background_descendant_neither_delays_the_end_nor_dies() {
    let envd = Envd::start();
    let file = tempfile::NamedTempFile::new().expect("a file");
    let (path, dir) = (
        file.path().display(),
        tempfile::tempdir().expect("a directory"),
    );
    let go = dir.path().join("go");
    let waits = format!("while [ ! -e {} ]; do sleep 0.05; done", go.display());
    let line = format!("({waits}; echo late; echo survived > {path}) & echo early");
    let ran = envd.shell(&line).await;
    assert_eq!((ran.out(), ran.end().exit_code), ("early\n", 0));
    std::fs::write(&go, "").expect("written");
    soon(async {
        while std::fs::read_to_string(file.path()).unwrap_or_default() != "survived\n" {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn silence_is_broken_by_keepalives() {
    let envd = Envd::start();
    let headers = [("keepalive-ping-interval", "1")];
    let ran = envd
        .start_process(Codec::Json, shell("sleep 1.5; echo x"), &headers)
        .await;
    let ran = ran.run().await.expect("ran");
    // A second one where the machine stood still.
    assert!((1..=2).contains(&ran.keepalives), "{}", ran.keepalives);
    assert_eq!(ran.out(), "x\n");
}

#[tokio::test]
async fn terminal_has_its_size_and_echoes_input() {
    let envd = Envd::start();
    for codec in BOTH {
        let size = wire::pty::Size {
            cols: 100,
            rows: 30,
            ..Default::default()
        };
        let pty = wire::PTY {
            size: size.into(),
            ..Default::default()
        };
        let line = "tty; stty size; read x; echo got $x; stty size; ps -o tty= -p $$";
        let request = wire::StartRequest {
            pty: pty.into(),
            ..shell(line)
        };
        let mut stream = envd.start_process(codec, request, &[]).await;
        let pid = stream.pid().await;
        stream.until("30 100\r\n").await;
        let error = send_input(&envd, codec, pid, stdin_input(b"x")).await;
        assert_eq!(error.expect_err("a terminal").code, "failed_precondition");
        let error = close_stdin(&envd, codec, pid).await;
        assert_eq!(error.expect_err("a terminal").code, "failed_precondition");
        let size = wire::pty::Size {
            cols: 90,
            rows: 20,
            ..Default::default()
        };
        let pty = wire::PTY {
            size: size.into(),
            ..Default::default()
        };
        let process = by_pid(pid).into();
        let request = wire::UpdateRequest {
            process,
            pty: pty.into(),
            ..Default::default()
        };
        let resized = envd.call(codec, "process.Process/Update", &request).await;
        resized.map(|_: wire::UpdateResponse| ()).expect("resized");
        send_input(&envd, codec, pid, terminal_input(b"line\n"))
            .await
            .expect("sent");
        let seen = String::from_utf8(stream.until("pts/").await).expect("text");
        assert!(seen.contains("got line\r\n20 90\r\n"), "{seen:?}");
        loop {
            match stream.event().await.expect("an end").expect("no error") {
                oneof::process_event::Event::End(end) => break assert_eq!(end.exit_code, 0),
                oneof::process_event::Event::Data(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn pty(cols: u32, rows: u32) -> wire::PTY {
    let size = wire::pty::Size {
        cols,
        rows,
        ..Default::default()
    };
    wire::PTY {
        size: size.into(),
        ..Default::default()
    }
}

/// What leads the foreground group of the terminal of process `pid`; nothing while there is none.
fn in_front(pid: u32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    // Behind the name, which may have spaces: state, parent, group, session, terminal, its group.
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let group = fields.split_whitespace().nth(5).expect("a group");
    let name = std::fs::read_to_string(format!("/proc/{group}/comm"));
    name.unwrap_or_default().trim_end().to_owned()
}

/// As a terminal's user has it: a shell with job control, left alone and found again by its tag.
#[tokio::test]
async fn a_terminal_is_a_login_with_jobs_that_can_be_left_and_joined_by_its_tag() {
    let envd = Envd::start();
    for codec in BOTH {
        let tag = format!("term-{codec:?}");
        let request = wire::StartRequest {
            pty: pty(80, 24).into(),
            tag: Some(tag.clone()),
            ..command("/bin/bash", &["--norc", "--noprofile", "-i"])
        };
        let headers = [("authorization", &*basic("root"))];
        let mut stream = envd.start_process(codec, request, &headers).await;
        let pid = stream.pid().await;
        let keys = async |line: &str| {
            let typed = terminal_input(line.as_bytes());
            send_input(&envd, codec, pid, typed).await.expect("typed");
        };
        keys("cd; echo home=$PWD=$HOME\n").await;
        stream.until("home=/root=/root\r\n").await;
        // Control and Z stops what is in front, and the shell is told of it.
        keys("sleep 1000\n").await;
        stream.until("sleep 1000\r\n").await;
        soon(async {
            while in_front(pid) != "sleep" {
                tokio::task::yield_now().await;
            }
        })
        .await;
        keys("\u{1a}").await;
        stream.until("Stopped").await;
        keys("jobs; kill %1; echo o\"\"ver\n").await;
        stream.until("over\r\n").await;
        drop(stream);

        let mut again = envd.connect(codec, by_tag(&tag)).await;
        assert_eq!(again.pid().await, pid);
        let request = wire::UpdateRequest {
            process: by_tag(&tag).into(),
            pty: pty(100, 40).into(),
            ..Default::default()
        };
        let resized = envd.call(codec, "process.Process/Update", &request).await;
        resized.map(|_: wire::UpdateResponse| ()).expect("resized");
        keys("stty size; exit 3\n").await;
        again.until("40 100\r\n").await;
        loop {
            match again.event().await.expect("an end").expect("no error") {
                oneof::process_event::Event::End(end) => break assert_eq!(end.exit_code, 3),
                oneof::process_event::Event::Data(_) => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(!is_running(pid));
    }
}

/// A size of nothing leaves the kernel's default, and no size is too large to be asked for.
#[tokio::test]
async fn terminals_take_any_size() {
    let envd = Envd::start();
    for (cols, rows, shown) in [(0, 0, "0 0"), (70_000, u32::MAX, "65535 65535")] {
        let request = wire::StartRequest {
            pty: pty(cols, rows).into(),
            ..shell("stty size")
        };
        let mut stream = envd.start_process(Codec::Proto, request, &[]).await;
        stream.pid().await;
        stream.until(&format!("{shown}\r\n")).await;
    }
}

#[tokio::test]
async fn only_terminals_are_resized() {
    let envd = Envd::start();
    let mut stream = envd.start_process(Codec::Json, sleeper(None), &[]).await;
    let process = by_pid(stream.pid().await);
    let update = async |pty: Option<wire::PTY>| {
        let request = wire::UpdateRequest {
            process: process.clone().into(),
            pty: pty.into(),
            ..Default::default()
        };
        let updated = envd
            .call(Codec::Json, "process.Process/Update", &request)
            .await;
        updated.map(|_: wire::UpdateResponse| ())
    };
    assert_eq!(update(None).await, Ok(()));
    let error = update(Some(wire::PTY::default()))
        .await
        .expect_err("no terminal");
    assert_eq!(error.code, "failed_precondition");
}

#[tokio::test]
async fn unknown_processes_and_empty_selectors_are_named() {
    let envd = Envd::start();
    for codec in BOTH {
        let error = close_stdin(&envd, codec, 4_000_000)
            .await
            .expect_err("unknown");
        assert_eq!((error.status, error.code.as_str()), (404, "not_found"));
        let error = envd
            .connect(codec, by_tag("none"))
            .await
            .run()
            .await
            .expect_err("unknown");
        assert_eq!((error.status, error.code.as_str()), (200, "not_found"));
        let request = wire::CloseStdinRequest::default();
        let error = envd
            .call(codec, "process.Process/CloseStdin", &request)
            .await;
        let error = error
            .map(|_: wire::CloseStdinResponse| ())
            .expect_err("selects nothing");
        assert_eq!(
            (error.status, error.code.as_str()),
            (400, "invalid_argument")
        );
    }
}

#[tokio::test]
async fn unknown_request_fields_and_both_spellings_are_accepted() {
    let envd = Envd::start();
    let post = async |body: &str| {
        let request = http::Request::post("/process.Process/SendSignal")
            .header("content-type", "application/json")
            .body(common::full(body.to_owned()))
            .expect("a request");
        envd.fetch(request).await
    };
    let answer = post(r#"{"future":{"a":[1]},"process":{"pid":"4000000","x":1},"signal":9}"#).await;
    assert_eq!(
        (answer.status, &answer.json()["code"]),
        (404, &json!("not_found"))
    );
    for garbage in ["{", "[]", "null x", r#"{"process":{"pid":-1}}"#, "\u{0}"] {
        let answer = post(garbage).await;
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (400, &json!("invalid_argument")),
            "{garbage}"
        );
    }
}

#[tokio::test]
async fn truncated_and_garbage_streams_end_in_an_error() {
    let envd = Envd::start();
    let bodies: [&'static [u8]; 5] = [
        b"",
        b"\x00\x00\x00\x00\x09{}",
        b"\x00\x00\x00\x00\x02{{",
        b"\x00\xff\xff\xff\xff{}",
        b"\x01",
    ];
    for body in bodies {
        for codec in ["json", "proto"] {
            let request = http::Request::post("/process.Process/Start")
                .header("content-type", format!("application/connect+{codec}"))
                .body(common::full(Bytes::from_static(body)))
                .expect("a request");
            let answer = envd.fetch(request).await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.body[0] & 2, 2, "only an end-of-stream envelope");
            let end: serde_json::Value = serde_json::from_slice(&answer.body[5..]).expect("JSON");
            assert!(end["error"]["code"].is_string(), "{body:?}: {end}");
        }
    }
    assert!(envd.list(Codec::Json).await.is_empty());
}

#[tokio::test]
async fn command_given_at_start_runs() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let envd = Envd::start_with(&[
        "--cmd",
        &format!("echo started > {}", file.path().display()),
    ]);
    soon(async {
        while std::fs::read_to_string(file.path()).unwrap_or_default() != "started\n" {
            envd.get("/health").await;
        }
    })
    .await;
}
