"""What the service tells of capsules: events, metrics, stats and usage."""

import threading
from datetime import date, timedelta

from nodes import MEMORY_MB, Skip, refused, shared, soon
from wrenn import Capsule, WrennClient, WrennError, WrennNotFoundError


def _unless_later(call, *args, **options):
    """The answer of a route, where this release has it."""
    try:
        return call(*args, **options)
    except WrennError as err:
        if err.status_code == 501:
            raise Skip(str(err)) from err
        raise


def events_are_told_as_they_happen():
    told = []
    with WrennClient() as client:
        events = client.events.stream()
        first = _unless_later(next, events)
        assert first.event == "connected", first

        def listen():
            for event in events:
                told.append(event)
                if event.event == "capsule.destroy":
                    return

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        with Capsule(memory_mb=MEMORY_MB, wait=True) as capsule:
            pass
        listener.join(timeout=30)
    own = [it.event.value for it in told if it.resource and it.resource.id == capsule.capsule_id]
    assert "capsule.create" in own and own[-1] == "capsule.destroy", own
    assert all(it.timestamp is None or it.timestamp.tzinfo for it in told)


def metrics_are_sampled():
    capsule = shared()
    with WrennClient() as client:
        _unless_later(client.capsules.metrics, capsule.capsule_id)
        points = soon(lambda: client.capsules.metrics(capsule.capsule_id, range="10m").points)
        assert points[-1].mem_bytes > 0 and points[-1].timestamp_unix > 1_500_000_000
        with refused(WrennError, status_code=400):
            client.capsules.metrics(capsule.capsule_id, range="9m")
        with refused(WrennNotFoundError):
            client.capsules.metrics("cl-0000000000000000000000001")


def stats_count_what_runs():
    shared()
    with WrennClient() as client:
        stats = _unless_later(client.capsules.stats)
        assert stats.range == "1h" and stats.current.running_count >= 1, stats
        assert stats.current.memory_mb_reserved >= MEMORY_MB
        series = stats.series
        assert len(series.labels) == len(series.running) == len(series.vcpus)
        with refused(WrennError, status_code=400):
            client.capsules.stats(range="1w")


def usage_is_told_by_the_day():
    today = date.today()
    with WrennClient() as client:
        usage = _unless_later(client.capsules.usage)
        assert usage.points is not None and usage.from_ < usage.to
        client.capsules.usage(from_=today - timedelta(days=7), to=today)
        with refused(WrennError, status_code=400):
            client.capsules.usage(from_=today, to=today - timedelta(days=1))
