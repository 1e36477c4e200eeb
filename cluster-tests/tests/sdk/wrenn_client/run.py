"""Runs behaviours of the real `wrenn` SDK, each against another node of a real cluster.

Run by tests/sdk/main.rs: `run.py TOPIC...`, with the nodes' addresses in WRENN_TEST_NODES, parted by
commas, and a key in WRENN_API_KEY. A topic is a module beside this one whose public functions are
behaviours, in the order in which they are written. All of them are tried; what failed is told at the end.
"""

import importlib
import sys
import time
import traceback

import nodes


def behaviours(topic):
    module = importlib.import_module(topic)
    own = [it for it in vars(module).values() if getattr(it, "__module__", None) == topic]
    return [it for it in own if callable(it) and not it.__name__.startswith("_")]


def tried(behaviour):
    number, began = nodes.take_next(), time.monotonic()
    try:
        behaviour()
        outcome = "ok"
    except nodes.Skip as why:
        outcome = f"SKIPPED ({why})"
    except Exception:
        traceback.print_exc()
        outcome = "FAILED"
    took = time.monotonic() - began
    name = f"{behaviour.__module__}.{behaviour.__name__}"
    print(f"{outcome} {name} (node {number}, {took:.1f} s)", flush=True)
    return outcome != "FAILED"


def main():
    failed = []
    for topic in sys.argv[1:]:
        failed += [it.__name__ for it in behaviours(topic) if not tried(it)]
    nodes.let_go()
    if failed:
        sys.exit(f"not as the SDK expects: {', '.join(failed)}")


main()
