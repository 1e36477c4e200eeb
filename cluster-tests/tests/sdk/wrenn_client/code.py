"""Ports of a capsule by their address, and the code runner, whose kernel is behind one.

Where there is no template with a Jupyter server, a stand-in in a plain capsule speaks as much of its
language as the SDK hears: what is tried then is our way to it, not Jupyter.
"""

import asyncio
import base64
import pathlib
import queue

import httpx
from nodes import MEMORY_MB, Skip, shared, soon
from wrenn import WrennClient
from wrenn.code_runner import AsyncCapsule as AsyncRunner
from wrenn.code_runner import Capsule as Runner
from wrenn.code_runner.capsule import DEFAULT_TEMPLATE

#: As much of a picture as anybody looks at here.
_PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
_STAND_IN = pathlib.Path(__file__).with_name("stand_in.py")


def a_port_is_visited_by_its_address():
    capsule = shared()
    capsule.files.write("/srv/www/index.html", "hello")
    capsule.commands.run("python3 -m http.server --bind 127.0.0.1 8000", background=True, cwd="/srv/www")
    with WrennClient() as client:
        key = {"X-API-Key": client.http.headers["X-API-Key"]}
    url = capsule.get_url(8000)
    assert url.startswith(f"http://8000-{capsule.capsule_id}.localhost:")

    def answer():
        visited = httpx.get(url, headers=key)
        return visited if visited.status_code != 502 else None

    visited = soon(answer)
    assert (visited.status_code, visited.text) == (200, "hello"), visited.text
    assert httpx.get(url + "/none", headers=key).status_code == 404
    assert httpx.get(url).status_code == 401
    assert httpx.get(capsule.get_url(8001), headers=key).status_code == 502


def code_runs_in_a_stand_in():
    capsule = shared()
    capsule.files.write("/srv/stand_in.py", _STAND_IN.read_text())
    capsule.commands.run("python3 /srv/stand_in.py", background=True)
    runner = Runner.connect(capsule.capsule_id)
    try:
        _runs_code(runner)
    finally:
        runner.close()


def code_runs_in_the_template():
    with WrennClient() as client:
        if DEFAULT_TEMPLATE not in [it.name for it in client.snapshots.list()]:
            raise Skip(f"there is no template {DEFAULT_TEMPLATE}")
    with Runner(wait=True) as runner:
        _runs_code(runner)
        shown = runner.run_code("from IPython.display import HTML; display(HTML('<b>x</b>'))")
        assert shown.results[0].html == "<b>x</b>", shown
        image = runner.run_code(f"from IPython.display import Image; Image({_PNG!r})")
        assert base64.b64decode(image.results[0].png) == _PNG, image

    async def act():
        async with await AsyncRunner.create(wait=True) as runner:
            assert (await runner.run_code("6 * 7")).text == "42"

    asyncio.run(act())


def _runs_code(runner):
    heard = []
    ran = runner.run_code("x = 40\nprint('seen')\nx + 2", on_stdout=heard.append)
    assert ran.error is None and ran.text == "42", ran
    assert "".join(ran.logs.stdout) == "seen\n" == "".join(heard)
    assert runner.run_code("x").text == "40", "what was set is kept"
    failed = runner.run_code("1 / 0")
    assert failed.error.name == "ZeroDivisionError" and failed.error.traceback
    try:
        late = runner.run_code("import time; time.sleep(3)", timeout=0.5)
        assert late.timed_out and late.error.name == "Timeout"
    except queue.Empty:
        # What 0.3.0 says of it depends on where it waited.
        pass
