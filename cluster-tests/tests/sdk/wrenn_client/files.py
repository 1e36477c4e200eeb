"""Files: written, read, listed, and streamed both ways."""

import hashlib
import os

import httpx
from nodes import refused, shared
from wrenn import WrennNotFoundError, WrennValidationError

_MIB = 1 << 20


def what_is_written_is_read():
    files = shared().files
    files.write("/srv/a/b/text", "hello \u00fc\n")
    assert files.read("/srv/a/b/text") == "hello \u00fc\n"
    every_byte = bytes(range(256)) * 400
    files.write("/srv/a/bytes", every_byte)
    assert files.read_bytes("/srv/a/bytes") == every_byte
    files.write("/srv/a/bytes", "short")
    assert files.read("/srv/a/bytes") == "short"
    files.write("/srv/empty", "")
    assert files.read_bytes("/srv/empty") == b""
    with refused(WrennNotFoundError, code="not_found"):
        files.read("/srv/none")
    with refused(WrennValidationError):
        files.read("relative")
    assert len(files.read("/proc/sys/kernel/random/boot_id")) == 37


def names_may_be_odd():
    files = shared().files
    for name in ["a b", "\u00fc\u20ac", "quo'te\"s", "new\nline", "-dash", "per%20cent", "semi;colon"]:
        files.write(f"/srv/odd/{name}", name)
        assert files.read(f"/srv/odd/{name}") == name
        assert files.exists(f"/srv/odd/{name}"), name
    assert len(files.list("/srv/odd")) == 7


def a_directory_lists_what_is_in_it():
    capsule = shared()
    files = capsule.files
    for path in ["/srv/tree/one", "/srv/tree/sub/two", "/srv/tree/sub/deep/three"]:
        files.write(path, "12345")
    capsule.commands.run("cd /srv/tree && ln -s one link && ln -s none dangling && mkfifo pipe")
    flat = {it.name: it for it in files.list("/srv/tree")}
    assert set(flat) == {"one", "sub", "link", "dangling", "pipe"}
    one = flat["one"]
    assert (one.path, one.size, one.owner, one.group) == ("/srv/tree/one", 5, "root", "root")
    assert one.permissions == "-rw-r--r--" and one.mode == 0o644 and one.modified_at > 1_500_000_000
    assert (one.type.value, flat["sub"].type.value) == ("file", "directory")
    assert flat["link"].symlink_target == "/srv/tree/one"
    deep = [it.path for it in files.list("/srv/tree", depth=3)]
    assert "/srv/tree/sub/deep/three" in deep and len(deep) > len(flat)
    assert deep.index("/srv/tree/sub") < deep.index("/srv/tree/sub/two")
    with refused(WrennNotFoundError, code="not_found"):
        files.list("/srv/none")
    with refused(WrennValidationError):
        files.list("/srv/tree/one")


def what_is_there_exists():
    files = shared().files
    files.write("/srv/there", "")
    assert files.exists("/srv/there") and files.exists("/srv")
    assert not files.exists("/srv/not-there") and not files.exists("/no/parent")


def a_directory_may_be_made_twice():
    files = shared().files
    made = files.make_dir("/srv/made/deep")
    assert (made.name, made.path, made.type.value) == ("deep", "/srv/made/deep", "directory")
    assert files.make_dir("/srv/made/deep").path == "/srv/made/deep"
    assert made.permissions == "drwxr-xr-x"


def removal_takes_what_is_below():
    files = shared().files
    files.write("/srv/gone/a/b", "x")
    files.remove("/srv/gone/a/b")
    assert not files.exists("/srv/gone/a/b") and files.exists("/srv/gone/a")
    files.remove("/srv/gone")
    assert not files.exists("/srv/gone")


def large_files_are_streamed():
    files = shared().files
    pieces = [os.urandom(_MIB // 2) for _ in range(32)]
    files.upload_stream("/srv/large/file", iter(pieces))
    wanted = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert shared().commands.run("sha256sum < /srv/large/file").stdout.split()[0] == wanted
    got = hashlib.sha256()
    for piece in files.download_stream("/srv/large/file"):
        got.update(piece)
    assert got.hexdigest() == wanted
    files.upload_stream("/srv/large/nothing", iter([]))
    assert b"".join(files.download_stream("/srv/large/nothing")) == b""
    with refused(httpx.HTTPStatusError):
        list(files.download_stream("/srv/large/none"))
