"""What behaviours share: the node that is asked now, a capsule for those that need no own, and checks.

The node in turn is set as a user would, in the environment. Host names below `localhost` are this
machine, as most resolvers have it; where this machine's has not, Python's is told.
"""

import os
import socket
import time
from contextlib import contextmanager

from wrenn import Capsule

#: A guest that is small and boots.
MEMORY_MB = 256
#: Longest that something soon to come may take on a busy machine.
PATIENCE = 30

_addresses = os.environ["WRENN_TEST_NODES"].split(",")
_turn = -1
_shared = None
_resolve = socket.getaddrinfo


def _resolve_localhost(host, *args, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name.endswith(".localhost"):
        name = "localhost"
    return _resolve(name, *args, **options)


socket.getaddrinfo = _resolve_localhost


class Skip(Exception):
    """What a behaviour needs is not there."""


def take_next():
    """Has the next node asked from now on; returns its number."""
    global _turn
    _turn = (_turn + 1) % len(_addresses)
    os.environ["WRENN_BASE_URL"] = address(_turn)
    return _turn + 1


def address(turn):
    """Where a node is."""
    return _addresses[turn % len(_addresses)]


def other_address():
    """Where the node is that is asked next."""
    return address(_turn + 1)


def shared():
    """A running capsule for all, as the node in turn knows it. It keeps what topics have done in it."""
    global _shared
    if _shared is None:
        _shared = Capsule(memory_mb=MEMORY_MB, wait=True).capsule_id
    return Capsule.connect(_shared)


def let_go():
    """Ends the shared capsule."""
    global _shared
    if _shared is not None:
        Capsule.destroy(_shared)
        _shared = None


@contextmanager
def refused(kind, **fields):
    """What is inside is refused with `kind`, and with these fields of it."""
    try:
        yield
    except kind as err:
        found = {name: getattr(err, name) for name in fields}
        assert found == fields, f"{err!r}: {found}"
        return
    raise AssertionError(f"not refused with {kind.__name__}")


def soon(look, patience=PATIENCE):
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + patience
    while not (found := look()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)
    return found
