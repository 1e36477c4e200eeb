"""Snapshots with a name, and capsules that start from them."""

from nodes import MEMORY_MB, refused, shared
from wrenn import Capsule, WrennClient, WrennConflictError, WrennError, WrennNotFoundError
from wrenn.models import Status

_NAME = "sdk-test.one"


def a_capsule_is_kept_under_a_name():
    capsule = shared()
    capsule.files.write("/root/marker", "kept")
    pid = capsule.commands.run("sleep 1000", background=True).pid
    made = capsule.create_snapshot(_NAME)
    assert (made.name, made.type.value, made.memory_mb) == (_NAME, "snapshot", MEMORY_MB), made
    assert made.size_bytes > 0 and made.created_at.tzinfo is not None
    assert capsule.is_running() and pid in [it.pid for it in capsule.commands.list()]
    with refused(WrennConflictError, code="conflict"):
        capsule.create_snapshot(_NAME)


def snapshots_are_listed_by_their_type():
    with WrennClient() as client:
        named = {it.name: it for it in client.snapshots.list(type="snapshot")}
        base = {it.name: it for it in client.snapshots.list(type="base")}
        assert _NAME in named and "minimal" in base and _NAME not in base
        both = {it.name for it in client.snapshots.list()}
        assert both >= {_NAME, "minimal"}
        assert base["minimal"].platform and not named[_NAME].platform


def a_capsule_starts_from_a_name():
    with Capsule(template=_NAME, wait=True) as capsule:
        assert capsule.capsule_id != shared().capsule_id
        assert capsule.info.memory_mb == MEMORY_MB and capsule.info.template == _NAME
        assert capsule.files.read("/root/marker") == "kept"
        assert capsule.commands.run("pgrep -fx 'sleep 1000'").exit_code == 0
        capsule.files.write("/root/marker", "changed")
        assert shared().files.read("/root/marker") == "kept"


def a_name_is_given_anew_when_asked():
    capsule = shared()
    capsule.files.write("/root/marker", "newer")
    assert capsule.create_snapshot(_NAME, overwrite=True).name == _NAME
    capsule.pause()
    unnamed = capsule.create_snapshot()
    assert unnamed.name.startswith("template-"), unnamed
    assert capsule.get_info().status == Status.paused
    with WrennClient() as client:
        client.snapshots.delete(unnamed.name)
    capsule.resume()


def names_that_are_not_theirs_are_refused():
    with WrennClient() as client:
        client.snapshots.delete(_NAME)
        assert _NAME not in [it.name for it in client.snapshots.list()]
        with refused(WrennNotFoundError, code="not_found"):
            client.snapshots.delete("never-there")
        with refused(WrennError, code="forbidden", status_code=403):
            client.snapshots.delete("minimal")
    with refused(WrennError, code="forbidden", status_code=403):
        shared().create_snapshot("minimal-ubuntu")
    with refused(WrennError, code="invalid_request", status_code=400):
        shared().create_snapshot("no name")
