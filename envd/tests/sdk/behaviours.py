"""What users of the e2b SDK rely on, asked of one agent by the real SDK.

Run by tests/e2b_sdk.rs, which sets E2B_DEBUG and E2B_SANDBOX_URL. The first argument is an empty
directory. Each function is one behaviour; the first that fails ends the run.
"""

import asyncio
import io
import os
import sys

from e2b import (
    AsyncSandbox,
    AuthenticationException,
    CommandExitException,
    FileNotFoundException,
    FileType,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    TimeoutException,
)
from e2b.sandbox.filesystem.watch_handle import FilesystemEventType as Event

DIR = sys.argv[1]


def refused(kind, call, *args, **options):
    try:
        call(*args, **options)
    except kind as err:
        return err
    raise AssertionError(f"not refused with {kind.__name__}")


def output_is_exact(sandbox):
    run = sandbox.commands.run
    assert run("echo hello").stdout == "hello\n"
    assert run('printf "%s" "$FOO"', envs={"FOO": "a'\"\n$`"}).stdout == "a'\"\n$`"
    assert run("pwd", cwd="/tmp").stdout == "/tmp\n"
    cut = "python3 -c \"import sys; sys.stdout.buffer.write(b'a' * 8191 + b'\\xe2')\""
    assert run(cut).stdout == "a" * 8191 + "\ufffd"
    err = refused(CommandExitException, run, "echo out; echo err >&2; exit 3")
    assert (err.exit_code, err.stdout, err.stderr) == (3, "out\n", "err\n")
    err = refused(AuthenticationException, run, "true", user="no_such")
    assert "invalid username: 'no_such'" in str(err)


def deadlines_are_heard(sandbox):
    refused(TimeoutException, sandbox.commands.run, "sleep 10", timeout=1)
    handle = sandbox.commands.run("sleep 10", timeout=1, background=True)
    refused(TimeoutException, list, handle)


def input_reaches_the_command(sandbox):
    commands = sandbox.commands
    handle = commands.run("cat", background=True, stdin=True)
    commands.send_stdin(handle.pid, "Hello\n! \u00fc$`'\"")
    commands.stream_input(handle.pid, iter(["a", b"b", "c"]))
    commands.close_stdin(handle.pid)
    result = handle.wait()
    assert (result.exit_code, result.stdout) == (0, "Hello\n! \u00fc$`'\"abc")


def processes_are_found_and_killed(sandbox):
    commands = sandbox.commands
    handle = commands.run("sleep 50", background=True)
    assert commands.connect(handle.pid).pid == handle.pid
    assert any(process.pid == handle.pid for process in commands.list())
    assert commands.kill(handle.pid)
    gone = commands.run(f"kill -0 {handle.pid} 2>/dev/null; echo $?")
    assert gone.stdout == "1\n"
    assert commands.kill(999999) is False
    refused(NotFoundException, commands.connect, 999999)


def files_come_back(sandbox):
    files = sandbox.files
    info = files.write(f"{DIR}/a/b.txt", "content")
    assert (info.path, info.name, info.type) == (f"{DIR}/a/b.txt", "b.txt", FileType.FILE)
    assert files.read(f"{DIR}/a/b.txt") == "content"
    assert b"".join(files.read(f"{DIR}/a/b.txt", format="stream")) == b"content"
    files.write(f"{DIR}/bin", b"\x00\xff")
    assert bytes(files.read(f"{DIR}/bin", format="bytes")) == b"\x00\xff"
    many = [{"path": f"{DIR}/m1", "data": "1"}, {"path": f"{DIR}/m2", "data": b"2"}]
    assert len(files.write_files(many)) == 2
    for text in ["", "long " * 50_000, "x"]:
        for how in [{}, {"gzip": True}, {"use_octet_stream": True}]:
            files.write(f"{DIR}/f", io.BytesIO(text.encode()), **how)
            assert files.read(f"{DIR}/f") == text
            assert files.read(f"{DIR}/f", gzip=True) == text
    refused(FileNotFoundException, files.read, f"{DIR}/none")
    boot_id = "/proc/sys/kernel/random/boot_id"
    assert files.read(boot_id) == open(boot_id).read()


def what_is_read_may_be_left(sandbox):
    files = sandbox.files
    files.write(f"{DIR}/large", "x" * 3_000_000)
    with files.read(f"{DIR}/large", format="stream") as stream:
        assert next(iter(stream))
    assert files.read(f"{DIR}/large") == "x" * 3_000_000
    refused(FileNotFoundException, files.read, f"{DIR}/none", format="stream")
    many = [{"path": f"{DIR}/z{n}", "data": f"{n}" * 1000} for n in range(3)]
    assert len(files.write_files(many, gzip=True, metadata={"of": "all"})) == 3
    assert [files.read(f"{DIR}/z{n}", gzip=True) for n in range(3)] == [
        f"{n}" * 1000 for n in range(3)
    ]
    assert all(it.metadata == {"of": "all"} for it in files.list(DIR) if it.name.startswith("z"))
    assert files.rename(f"{DIR}/z0", f"{DIR}/y0").metadata == {"of": "all"}
    refused(FileNotFoundException, files.get_info, f"{DIR}/z0")


def metadata_stays_until_it_is_replaced(sandbox):
    files = sandbox.files
    assert files.write(f"{DIR}/meta", "m", metadata={"k": "v"}).metadata == {"k": "v"}
    assert files.get_info(f"{DIR}/meta").metadata == {"k": "v"}
    files.write(f"{DIR}/meta", "m")
    assert not files.get_info(f"{DIR}/meta").metadata


def directories_are_listed_and_changed(sandbox):
    files = sandbox.files
    root = f"{DIR}/tree"
    assert files.make_dir(f"{root}/x/y") is True
    assert files.make_dir(f"{root}/x/y") is False
    files.write(f"{root}/f", "")
    assert [it.path for it in files.list(root)] == [f"{root}/f", f"{root}/x"]
    deep = [it.path for it in files.list(root, depth=3)]
    assert deep == [f"{root}/f", f"{root}/x", f"{root}/x/y"]
    info = files.get_info(f"{root}/f")
    assert (info.mode, info.permissions, info.symlink_target) == (0o644, "-rw-r--r--", None)
    os.symlink("f", f"{root}/link")
    info = files.get_info(f"{root}/link")
    assert (info.type, info.symlink_target) == (FileType.FILE, f"{root}/f")
    assert files.rename(f"{root}/f", f"{root}/g").path == f"{root}/g"
    assert files.exists(f"{root}/g") and not files.exists(f"{root}/f")
    refused(NotFoundException, files.rename, f"{root}/f", f"{root}/h")
    files.remove(f"{root}/g")
    files.remove(f"{root}/g")


def watchers_tell_exactly(sandbox):
    files = sandbox.files
    root = f"{DIR}/watched"
    files.make_dir(f"{root}/sub")
    files.write(f"{root}/f", "old")
    handle = files.watch_dir(root)
    files.write(f"{root}/f", "new")
    assert any((it.type, it.name) == (Event.WRITE, "f") for it in handle.get_new_events())
    files.write(f"{root}/new", "x")
    told = handle.get_new_events()
    assert len(told) == 3 and told[0].type == Event.CREATE, told
    handle.stop()
    handle = files.watch_dir(root, recursive=True, include_entry=True)
    files.write(f"{root}/sub/f", "x")
    assert [it.name for it in handle.get_new_events()] == ["sub/f"] * 3
    files.make_dir(f"{root}/late")
    files.write(f"{root}/late/f", "x")
    told = {(it.type, it.name): it.entry for it in handle.get_new_events()}
    assert (Event.CREATE, "late") in told
    assert told[(Event.WRITE, "late/f")].path == f"{root}/late/f"
    handle.stop()
    refused(NotFoundException, files.watch_dir, f"{root}/none")
    refused(SandboxException, files.watch_dir, f"{root}/f")


def terminals_are_left_and_joined(sandbox):
    pty = sandbox.pty
    shown = []
    handle = pty.create(PtySize(rows=24, cols=80), envs={"ABC": "12" "3"}, cwd="/tmp")
    pty.send_stdin(handle.pid, b"echo =$ABC=$PWD=\nexit\n")
    assert handle.wait(on_pty=shown.append).exit_code == 0
    assert b"=123=/tmp=" in b"".join(shown)
    handle = pty.create(PtySize(rows=24, cols=80))
    handle.disconnect()
    again = pty.connect(handle.pid)
    pty.resize(handle.pid, PtySize(rows=24, cols=100))
    pty.send_stdin(handle.pid, b"echo =$(tput cols)=\nexit\n")
    shown.clear()
    assert again.wait(on_pty=shown.append).exit_code == 0
    assert b"=100=" in b"".join(shown), shown
    handle = pty.create(PtySize(rows=24, cols=80))
    assert pty.kill(handle.pid) is True and pty.kill(999999) is False


def repositories_are_kept(sandbox):
    git, repo, home = sandbox.git, f"{DIR}/repo", {"HOME": DIR}
    git.init(repo, initial_branch="main", envs=home)
    git.set_config("user.name", "A", path=repo, scope="local", envs=home)
    git.set_config("user.email", "a@b", path=repo, scope="local", envs=home)
    assert git.get_config("user.name", path=repo, scope="local", envs=home) == "A"
    sandbox.files.write(f"{repo}/file", "one")
    assert git.status(repo, envs=home).has_untracked
    git.add(repo, envs=home)
    git.commit(repo, "one", envs=home)
    assert git.status(repo, envs=home).is_clean
    git.create_branch(repo, "side", envs=home)
    assert set(git.branches(repo, envs=home).branches) == {"main", "side"}
    git.checkout_branch(repo, "main", envs=home)
    git.delete_branch(repo, "side", envs=home)
    git.init(f"{DIR}/remote.git", bare=True, initial_branch="main", envs=home)
    git.remote_add(repo, "origin", f"{DIR}/remote.git", envs=home)
    git.push(repo, remote="origin", branch="main", envs=home)
    git.clone(f"{DIR}/remote.git", path=f"{DIR}/copy", envs=home)
    assert sandbox.files.read(f"{DIR}/copy/file") == "one"


async def streams_are_watched():
    sandbox = await AsyncSandbox.create()
    root, told, written, over = f"{DIR}/async", [], asyncio.Event(), asyncio.Event()

    def on_event(event):
        told.append((event.type, event.name))
        if event.type == Event.WRITE:
            written.set()

    await sandbox.files.make_dir(root)
    handle = await sandbox.files.watch_dir(
        root, on_event=on_event, on_exit=lambda *_: over.set(), recursive=True
    )
    await sandbox.files.write(f"{root}/f", "x")
    await asyncio.wait_for(written.wait(), 10)
    await handle.stop()
    await asyncio.wait_for(over.wait(), 10)
    assert told == [(kind, "f") for kind in (Event.CREATE, Event.CHMOD, Event.WRITE)], told


def main():
    sandbox = Sandbox.create()
    for behaviour in [
        output_is_exact,
        deadlines_are_heard,
        input_reaches_the_command,
        processes_are_found_and_killed,
        files_come_back,
        what_is_read_may_be_left,
        metadata_stays_until_it_is_replaced,
        directories_are_listed_and_changed,
        watchers_tell_exactly,
        terminals_are_left_and_joined,
        repositories_are_kept,
    ]:
        behaviour(sandbox)
        print("ok", behaviour.__name__, flush=True)
    asyncio.run(streams_are_watched())
    print("ok streams_are_watched", flush=True)


main()
# All is said. How the SDK's own threads and loops end with the interpreter is not the agent's doing, and
# they sometimes end it with a signal.
os._exit(0)
