"""Capsules: created, found, paused, resumed and ended, through any node."""

import os

from nodes import MEMORY_MB, address, other_address, refused, shared
from wrenn import (
    Capsule,
    WrennAuthenticationError,
    WrennClient,
    WrennConflictError,
    WrennNotFoundError,
    WrennValidationError,
)
from wrenn.models import Status

_NOBODY = "cl-0000000000000000000000001"


def nothing_needs_to_be_said_to_create_one():
    capsule = Capsule()
    assert capsule.capsule_id.startswith("cl-") and len(capsule.capsule_id) == 28
    assert (capsule.info.vcpus, capsule.info.memory_mb) == (1, 512), capsule.info
    assert capsule.info.created_at.tzinfo is not None
    capsule.wait_ready(timeout=60)
    capsule.destroy()
    info = capsule.get_info()
    assert info.status in (Status.stopped, Status.missing), info
    assert capsule.capsule_id not in [it.id for it in Capsule.list()]
    # What has ended can be ended again.
    Capsule.destroy(capsule.capsule_id)


def a_context_ends_its_capsule():
    with Capsule.create(memory_mb=MEMORY_MB, timeout=5, wait=True) as capsule:
        assert capsule.is_running() and capsule.info.status == Status.running
        assert capsule.info.timeout_sec == 60, "raised to a minute"
        own = [it for it in Capsule.list() if it.id == capsule.capsule_id]
        assert [it.status for it in own] == [Status.running]
        capsule.ping()
    ended = Capsule.get_info(capsule.capsule_id, base_url=other_address())
    assert ended.status in (Status.stopped, Status.missing), ended


def a_pause_and_a_resume_are_answered_when_done():
    capsule = shared()
    capsule.commands.run("echo kept > /root/kept")
    pid = capsule.commands.run("sleep 1000", background=True).pid
    assert capsule.pause().status == Status.paused
    assert not capsule.is_running()
    with refused(WrennConflictError, code="invalid_state", status_code=409):
        capsule.commands.run("true")
    with refused(WrennConflictError, code="invalid_state"):
        capsule.pause()
    with refused(WrennConflictError, code="invalid_state"):
        capsule.ping()
    assert capsule.resume().status == Status.running
    with refused(WrennConflictError, code="invalid_state"):
        capsule.resume()
    assert capsule.commands.run("cat /root/kept").stdout == "kept\n"
    assert pid in [it.pid for it in capsule.commands.list()]


def whoever_connects_finds_it_running():
    capsule = shared()
    again = Capsule.connect(capsule.capsule_id, base_url=other_address())
    assert again.capsule_id == capsule.capsule_id and again.is_running()
    assert Capsule.pause(capsule.capsule_id, wait=True).status == Status.paused
    resumed = Capsule.connect(capsule.capsule_id)
    assert resumed.is_running() and resumed.commands.run("true").exit_code == 0


def waiting_ends_with_what_was_waited_for():
    capsule = shared()
    assert capsule.pause(wait=True).status == Status.paused
    assert Capsule.resume(capsule.capsule_id, wait=True).status == Status.running
    with Capsule(memory_mb=MEMORY_MB) as other:
        # Also while it starts.
        other.destroy(wait=True)
        assert other.info.status in (Status.stopped, Status.missing)


def mistakes_have_their_class():
    with refused(WrennNotFoundError, code="not_found", status_code=404):
        Capsule.get_info(_NOBODY)
    with refused(WrennNotFoundError):
        Capsule.destroy(_NOBODY)
    with refused(WrennNotFoundError):
        Capsule.connect(_NOBODY)
    with refused(WrennValidationError, code="invalid_request", status_code=400):
        Capsule.get_info("no-such-id")
    with refused(WrennAuthenticationError, code="unauthorized", status_code=401):
        Capsule.list(api_key="wrn_" + "0" * 32)
    with refused(WrennNotFoundError):
        Capsule(template="no-such-template")
    with refused(WrennValidationError):
        Capsule(template="../etc")
    key = os.environ.pop("WRENN_API_KEY")
    try:
        with refused(ValueError):
            Capsule.list()
    finally:
        os.environ["WRENN_API_KEY"] = key


def a_prefix_of_the_address_is_kept():
    capsule = shared()
    with WrennClient(base_url=address(0) + "/api") as client:
        assert client.capsules.get(capsule.capsule_id).status == Status.running
    prefixed = Capsule.connect(capsule.capsule_id, base_url=address(1) + "/api")
    assert [it.type for it in prefixed.commands.stream("true")] == ["start", "exit"]
