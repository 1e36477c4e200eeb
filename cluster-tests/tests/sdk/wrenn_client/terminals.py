"""Terminals: typed into, resized, left and found again."""

import json

from nodes import refused, shared, soon
from wrenn import PtyEventType


def _until(term, wanted):
    """What the terminal shows up to some bytes."""
    shown = b""
    while wanted not in shown:
        event = next(term)
        assert event.type in (PtyEventType.started, PtyEventType.output), event
        shown += event.data or b""
    return shown


def _quiet(**options):
    """A terminal whose shell shows nothing that was not asked for."""
    return shared().pty(args=["--norc", "--noediting"], **options)


def what_is_typed_is_done():
    with _quiet(envs={"ABC": "12" "3"}, cwd="/tmp") as term:
        first = next(term)
        assert first.type == PtyEventType.started
        assert term.tag == first.tag and first.tag.startswith("pty-") and term.pid > 0
        term.write(b"echo =$ABC=$PWD=$HOME=\n")
        _until(term, b"=123=/tmp=/root=")
        term.write(b"printf '\\377\\n'; stty size; tty\n")
        _until(term, b"24 80")
        term.write(b"exit 5\n")
        told = list(term)
        assert told[-1].type == PtyEventType.exit and told[-1].exit_code == 5
        assert all(isinstance(it.data, bytes) for it in told[:-1])


def a_terminal_has_the_size_it_is_told():
    with _quiet(cols=100, rows=30) as term:
        term.write(b"stty size\n")
        _until(term, b"30 100")
        term.resize(132, 43)
        term.write(b"stty size\n")
        _until(term, b"43 132")
        with refused(ValueError):
            term.resize(0, 10)


def signals_are_typed_as_well():
    with _quiet() as term:
        term.write(b"sleep 4713\n")
        soon(lambda: shared().commands.run("pgrep -f '[4]713'").exit_code == 0)
        term.write(b"\x03")
        term.write(b"echo =$?=\n")
        _until(term, b"=130=")


def a_terminal_outlives_its_client():
    with _quiet() as term:
        assert next(term).type == PtyEventType.started
        tag, pid = term.tag, term.pid
        term.write(b"NAME=kept; echo =set=\n")
        _until(term, b"=set=")
    with shared().pty_connect(tag) as again:
        started = next(again)
        assert started.type == PtyEventType.started and (again.tag, again.pid) == (tag, pid)
        again.write(b"echo =$NAME=\n")
        _until(again, b"=kept=")
        again.kill()
        told = list(again)
        assert told[-1].type == PtyEventType.exit
    soon(lambda: pid not in [it.pid for it in shared().commands.list()])
    # How it ended is known for a while; what never was is not.
    with shared().pty_connect(tag) as ended:
        assert list(ended)[-1].type == PtyEventType.exit
    with shared().pty_connect("pty-0") as nobody:
        told = list(nobody)
        assert told[-1].type == PtyEventType.error and told[-1].fatal, told


def the_session_as_a_context_ends_its_terminal():
    with _quiet() as term:
        with term:
            next(term)
            pid = term.pid
    soon(lambda: pid not in [it.pid for it in shared().commands.list()])


def older_words_are_heard():
    with _quiet() as term:
        next(term)
        # As clients up to 0.2 typed.
        term._ws.send_text(json.dumps({"type": "input", "data": "ZWNobyA9b2xkPQo="}))
        while True:
            event = next(term)
            if b"=old=\r\n" in (event.data or b"") or event.type != PtyEventType.output:
                break
        term.kill()
