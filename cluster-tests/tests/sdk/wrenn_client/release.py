"""A release, as one is cut in a capsule: tools are installed, sources cloned, a build is watched by its
pid, and what it made is listed and fetched.

WRENN_TEST_SOURCES is the address of a web server that has an apt repository in `debian/` and a git
repository in `seed.git`.
"""

import hashlib
import os

from nodes import other_address
from wrenn import Capsule, GitCommandError

_SOURCES = os.environ.get("WRENN_TEST_SOURCES", "")
_CHECKOUT = "/root/seed"


def a_release_is_cut():
    with Capsule(vcpus=2, memory_mb=512, wait=True) as capsule:
        assert capsule.commands.run("nproc").stdout == "2\n"
        _install(capsule)
        _clone(capsule)
        # Each half is watched through another node than it was begun at.
        through = Capsule.connect(capsule.capsule_id, base_url=other_address())
        _build(capsule, through)
        _fetch(through)


def _install(capsule):
    repository = f"deb [trusted=yes] {_SOURCES}/debian ./\n"
    capsule.files.write("/etc/apt/sources.list", repository)
    line = "apt-get -q update && apt-get -qy install wrenn-seed-tool"
    installed = capsule.commands.run(
        line, timeout=300, envs={"DEBIAN_FRONTEND": "noninteractive"}
    )
    assert installed.exit_code == 0, installed
    assert capsule.commands.run("seed-pack --version").stdout == "seed-pack 1.0\n"


def _clone(capsule):
    capsule.git.clone(f"{_SOURCES}/seed.git", _CHECKOUT, branch="main")
    assert capsule.git.status(cwd=_CHECKOUT).is_clean
    assert capsule.files.exists(f"{_CHECKOUT}/build.sh")
    try:
        capsule.git.clone(f"{_SOURCES}/none.git", "/root/none")
    except GitCommandError as err:
        assert "none.git" in str(err) or err.stderr
    else:
        raise AssertionError("there is no such repository")


def _build(capsule, through):
    build = capsule.commands.run("sh build.sh", background=True, cwd=_CHECKOUT, tag="release")
    events = through.commands.connect(build.pid)
    assert next(events).pid == build.pid
    capsule.files.write(f"{_CHECKOUT}/go", "")
    told = list(events)
    assert told[-1].type == "exit" and told[-1].exit_code == 0, vars(told[-1])
    shown = "".join(it.data for it in told if it.type == "stdout").splitlines()
    assert [it for it in shown if it.startswith("step ")] == [f"step {n} of 5" for n in range(1, 6)]
    assert shown[-1] == "done", shown
    complaints = "".join(it.data for it in told if it.type == "stderr")
    assert complaints.count("warning") == 5, complaints


def _fetch(capsule):
    made = {it.name: it for it in capsule.files.list(f"{_CHECKOUT}/dist")}
    assert set(made) == {"SHA256SUMS", *(f"part{n}.tar.gz" for n in range(1, 6))}
    sums = capsule.files.read(f"{_CHECKOUT}/dist/SHA256SUMS").splitlines()
    for line in sums:
        wanted, name = line.split()
        got, size = hashlib.sha256(), 0
        for piece in capsule.files.download_stream(made[name].path):
            got.update(piece)
            size += len(piece)
        assert (got.hexdigest(), size) == (wanted, made[name].size), name
