"""Several processes that save at once, each its own state into its own repository, as the ranks of a node do.

python -m benchmarks.storage_processes ABOUT '{"place": …, "state": PATH, "processes": 2}' OUT
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

from benchmarks.processes import answer

LIMIT_S = 300.0


def _one(number: int, given: dict[str, Any], ready: Any, found: Any) -> None:
    import torch

    from benchmarks import measure
    from benchmarks.storage_contenders import make
    from benchmarks.storage_contenders.base import Place

    contender = make("Checkpointer")
    place = Place(**given["place"])
    contender.prepare(place.beside(str(number), place.size), torch.load(given["state"]))
    contender.save()
    ready.wait(LIMIT_S)
    span = measure.Span()
    contender.save()
    found.put((span.seconds(), span.cpu(), span.peak()))
    contender.close()


def main(_: str, text: str, out: str) -> None:
    before = os.getloadavg()[0]
    given = json.loads(text)
    n = given["processes"]
    context = multiprocessing.get_context("spawn")
    ready, found = context.Barrier(n), context.Queue()
    children = [context.Process(target=_one, args=(number, given, ready, found)) for number in range(n)]
    for child in children:
        child.start()
    end_s = time.monotonic() + LIMIT_S
    samples = [found.get(timeout=max(1.0, end_s - time.monotonic())) for _ in children]
    for child in children:
        child.join()
    seconds, cpu, memory = zip(*samples, strict=True)
    answer({"seconds": max(seconds), "cpu": sum(cpu) / n, "memory": max(memory)}, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
