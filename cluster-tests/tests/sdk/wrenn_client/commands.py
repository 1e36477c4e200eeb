"""Commands: waited for, left running, watched as they go."""

import time

from nodes import refused, shared, soon
from wrenn import WrennAgentError, WrennNotFoundError, WrennValidationError


def output_and_exit_code_come_back():
    run = shared().commands.run
    ran = run("echo out; echo err >&2; exit 42")
    assert (ran.stdout, ran.stderr, ran.exit_code) == ("out\n", "err\n", 42)
    assert run("true").exit_code == 0 and run("true").stdout == ""
    assert run("kill -9 $$").exit_code == -1
    slept = run("sleep 1")
    assert slept.duration_ms >= 900, slept
    assert run("no_such_program").exit_code == 127


def the_shell_is_a_shell():
    run = shared().commands.run
    assert run("pwd").stdout == "/root\n" and run("id -un").stdout == "root\n"
    assert run("cd /tmp && pwd\necho $HOME; echo \"a'b\\\"c\"").stdout == "/tmp\n/root\na'b\"c\n"
    given = run('printf "%s" "$WORD"; pwd', envs={"WORD": "a'\"\n$`\u00fc"}, cwd="/usr")
    assert given.stdout == "a'\"\n$`\u00fc/usr\n", given
    assert run("echo ${WORD-unset}").stdout == "unset\n"
    with refused(WrennValidationError):
        run("true", cwd="/no/such/directory")


def bytes_that_are_no_text_are_replaced():
    ran = shared().commands.run("printf 'a\\377b'; echo fine >&2")
    assert (ran.stdout, ran.stderr) == ("a\ufffdb", "fine\n")
    long = shared().commands.run("head -c 3000000 /dev/zero | tr '\\0' x")
    assert long.stdout == "x" * 3_000_000


def a_deadline_ends_the_command():
    commands = shared().commands
    began = time.monotonic()
    with refused(WrennAgentError, code="agent_error"):
        commands.run("sleep 4711 & setsid sleep 4711 & sleep 4711", timeout=1)
    assert time.monotonic() - began < 10
    assert commands.run("sleep 1; echo done", timeout=None).stdout == "done\n"
    left = commands.run("pgrep -f '[4]711'")
    assert left.exit_code == 1, left


def what_is_left_running_is_listed_until_it_ends():
    commands = shared().commands
    handle = commands.run("sleep 1000", background=True, tag="kept", envs={"A": "b"}, cwd="/tmp")
    assert handle.pid > 0 and handle.tag == "kept" and handle.capsule_id
    unnamed = commands.run("sleep 1000", background=True)
    assert unnamed.tag and unnamed.tag != "kept"
    listed = {it.pid: it for it in commands.list()}
    assert {handle.pid, unnamed.pid} <= set(listed)
    assert listed[handle.pid].tag == "kept" and listed[handle.pid].cmd == "/bin/sh"
    assert listed[handle.pid].args == ["-c", "sleep 1000"]
    around = commands.run(f"tr '\\0' '\\n' </proc/{handle.pid}/environ; readlink /proc/{handle.pid}/cwd")
    assert "A=b" in around.stdout.split() and "/tmp" in around.stdout.split()
    for pid in (handle.pid, unnamed.pid):
        commands.kill(pid)
    soon(lambda: not {handle.pid, unnamed.pid} & {it.pid for it in commands.list()}, 0.5)
    with refused(WrennNotFoundError, code="not_found"):
        commands.kill(999999)


def a_running_command_is_watched_by_its_pid():
    commands = shared().commands
    # It waits for its watcher: what was said before is not told again.
    line = "rm -f /tmp/go; until [ -e /tmp/go ]; do sleep 0.1; done; echo out; echo err >&2; exit 7"
    handle = commands.run(line, background=True)
    events = commands.connect(handle.pid)
    first = next(events)
    assert first.type == "start" and first.pid == handle.pid
    commands.run("touch /tmp/go")
    told = list(events)
    assert sorted(it.data for it in told[:-1]) == ["err\n", "out\n"], [it.type for it in told]
    assert told[-1].type == "exit" and told[-1].exit_code == 7


def who_stops_watching_leaves_the_command_alone():
    commands = shared().commands
    handle = commands.run("sleep 1000", background=True)
    events = commands.connect(handle.pid)
    assert next(events).type == "start"
    events.close()
    assert handle.pid in [it.pid for it in commands.list()]
    commands.kill(handle.pid)
    told = list(commands.connect(999999))
    assert [it.type for it in told] == ["error"] and told[0].data


def a_streamed_command_is_told_as_it_goes():
    stream = shared().commands.stream
    told = list(stream("echo out; sleep 0.3; echo err >&2; sleep 0.3; exit 3"))
    assert [it.type for it in told] == ["start", "stdout", "stderr", "exit"], told
    assert told[0].pid > 0 and (told[1].data, told[2].data) == ("out\n", "err\n")
    assert told[-1].exit_code == 3
    told = list(stream("echo", args=["a b", "$c"]))
    assert "".join(it.data for it in told if it.type == "stdout") == "a b $c\n"
    assert told[-1].exit_code == 0
    failed = list(stream("/no/such/program", args=["x"]))
    assert failed[-1].type == "error" or failed[-1].exit_code == 127, failed[-1].type


def letters_stay_whole_in_a_stream():
    line = "i=0; while [ $i -lt 2000 ]; do printf '\u00fc\u20ac\U0001f980'; i=$((i+1)); done"
    told = list(shared().commands.stream(line))
    text = "".join(it.data for it in told if it.type == "stdout")
    assert text == "\u00fc\u20ac\U0001f980" * 2000


def a_stream_left_alone_ends_its_command():
    commands = shared().commands
    events = commands.stream("exec sleep 4712")
    pid = next(events).pid
    assert pid in [it.pid for it in commands.list()]
    events.close()
    soon(lambda: pid not in [it.pid for it in commands.list()])
