"""The same through the SDK's asynchronous half, several things at a time."""

import asyncio
import os

from nodes import MEMORY_MB, other_address, refused, shared
from wrenn import AsyncCapsule, AsyncWrennClient, PtyEventType, WrennNotFoundError
from wrenn.models import Status


def capsules_live_and_end():
    async def act():
        async with await AsyncCapsule.create(memory_mb=MEMORY_MB, wait=True) as capsule:
            assert (await capsule.pause(wait=True)).status == Status.paused
            through = await AsyncCapsule.connect(capsule.capsule_id, base_url=other_address())
            assert await through.is_running()
            assert (await through.commands.run("echo $((6*7))")).stdout == "42\n"
            await through.ping()
            assert capsule.capsule_id in [it.id for it in await AsyncCapsule.list()]
        info = await AsyncCapsule.get_info(capsule.capsule_id)
        assert info.status in (Status.stopped, Status.missing)

    asyncio.run(act())


def commands_run_at_once():
    async def act():
        commands = (await _shared()).commands
        ran = await asyncio.gather(*(commands.run(f"sleep 0.2; echo {n}") for n in range(20)))
        assert [it.stdout for it in ran] == [f"{n}\n" for n in range(20)]
        handle = await commands.run("sleep 1; echo seen; exit 4", background=True)
        assert handle.pid in [it.pid for it in await commands.list()]
        told = [it async for it in commands.connect(handle.pid)]
        assert [it.type for it in told] == ["start", "stdout", "exit"] and told[2].exit_code == 4
        told = [it async for it in commands.stream("echo out; exit 2")]
        assert [it.type for it in told] == ["start", "stdout", "exit"] and told[2].exit_code == 2
        with refused(WrennNotFoundError):
            await commands.kill(999999)

    asyncio.run(act())


def files_go_both_ways():
    async def pieces(data):
        for at in range(0, len(data), 65_536):
            yield data[at : at + 65_536]

    async def act():
        files = (await _shared()).files
        await files.write("/srv/as/text", "hello")
        assert await files.read("/srv/as/text") == "hello"
        assert (await files.make_dir("/srv/as")).path == "/srv/as"
        data = os.urandom(3 << 20)
        await files.upload_stream("/srv/as/large", pieces(data))
        assert b"".join([it async for it in files.download_stream("/srv/as/large")]) == data
        assert sorted(it.name for it in await files.list("/srv/as")) == ["large", "text"]
        await files.remove("/srv/as")
        assert not await files.exists("/srv/as")

    asyncio.run(act())


def terminals_are_typed_into():
    async def act():
        capsule = await _shared()
        async with capsule.pty(args=["--norc"], cols=90) as term:
            await term.write(b"stty size; exit 6\n")
            told = [it async for it in term]
        shown = b"".join(it.data for it in told if it.type == PtyEventType.output)
        assert b"24 90" in shown and told[0].type == PtyEventType.started
        assert told[-1].exit_code == 6
        async with capsule.pty() as left:
            tag = (await anext(left)).tag
        async with capsule.pty_connect(tag) as again:
            await again.write(b"exit 0\n")
            assert [it async for it in again][-1].exit_code == 0

    asyncio.run(act())


def repositories_and_snapshots_are_made():
    async def act():
        capsule = await _shared()
        await capsule.git.init("/root/as", initial_branch="main")
        assert (await capsule.git.status(cwd="/root/as")).is_clean
        made = await capsule.create_snapshot("sdk-test.as")
        async with AsyncWrennClient() as client:
            assert made.name in [it.name for it in await client.snapshots.list(type="snapshot")]
            await client.snapshots.delete(made.name)

    asyncio.run(act())


async def _shared():
    return await AsyncCapsule.connect(shared().capsule_id)
