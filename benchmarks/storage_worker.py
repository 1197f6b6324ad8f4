"""One measurement of one contender of benchmarks/storage.py, in a process of its own: `save`, `restore` or `one` tensor.

Runs in the environment of its contender. The answer goes to the file named last.

    python -m benchmarks.storage_worker "tensorizer restore" '{"root": "s3://…", …}' OUT
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, measure
from benchmarks.processes import answer
from benchmarks.storage_contenders import make
from benchmarks.storage_contenders.base import ONE, Contender, Place, flat

TINY = "tiny"


def rehearse(contender: Contender, place: Place, action: str, tiny: str) -> None:
    """Imports, clients, pools of threads, connections: once, with a few bytes, before anything counts.

    What only writes is rehearsed by a save, what reads by all.
    """
    near = place.beside(f"rehearsal-{secrets.token_hex(4)}", TINY)
    contender.prepare(near, torch.load(tiny))
    if getattr(contender, "n_bytes", None) is None:
        contender.save()
    contender.close()
    if action == "save":
        return
    contender.prepare(near, None)
    if action == "one":
        contender.one(ONE)
    else:
        contender.restore()
    contender.close()


def save(contender: Contender, place: Place, given: dict[str, Any]) -> dict[str, Any]:
    """The durable save, `repeats` times; further ones have the memory of the first."""
    contender.prepare(place, torch.load(given["state"]))
    found: dict[str, list[float]] = {"seconds": [], "cpu": [], "memory": []}
    for _ in range(given.get("repeats", 1)):
        os.sync()
        span = measure.Span()
        contender.save()
        found["seconds"].append(span.seconds())
        found["cpu"].append(span.cpu())
        found["memory"].append(span.peak())
    more = {"bytes": contender.n_bytes} if hasattr(contender, "n_bytes") else {}
    return {**{key: values[-1] for key, values in found.items()}, "all": found, **more}


def restore(contender: Contender, place: Place, given: dict[str, Any]) -> dict[str, Any]:
    contender.in_place = given.get("in_place", contender.in_place)
    contender.overlap = given.get("overlap", False)
    contender.prepare(place, None)
    resident = {}
    if not place.endpoint:
        folder = Path(place.root)
        (measure.evict if given.get("cold") else measure.warm)(folder)
        resident = {"resident_before": measure.resident(folder)}
    span = measure.Span()
    found = contender.restore()
    returned = span.seconds()
    # What is mapped, or comes in pages that were there before, has not been paid for until each byte was read.
    touched = 0 if contender.in_place else measure.touch(found)
    result: dict[str, Any] = {
        "seconds": span.seconds(),
        "returned": returned,
        "cpu": span.cpu(),
        "memory": span.peak(),
        **resident,
    }
    result["touched"] = touched
    result["opened"] = getattr(contender, "opened_s", 0.0)
    result["called"] = result["seconds"] - result["opened"]
    found = contender.settle(found)
    result["settled"] = span.seconds()
    if given.get("check"):
        result["differences"] = differences(contender, torch.load(given["state"]), found)
    return result


def differences(contender: Contender, saved: Any, found: Any) -> list[str]:
    """What has not come back as it was saved."""
    if contender.tensors_only:
        lost = [f"WRONG: {name} is lost" for name in flat(saved) if name not in found]
        return lost[:3] + compare.compare_tensors(flat(saved), found)
    parts = ("model", "optimizer") if contender.in_place else tuple(saved)
    return compare.compare({part: saved[part] for part in parts}, {part: found[part] for part in parts})


def one(contender: Contender, place: Place, given: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each fetch in a process that has fetched before."""
    contender.prepare(place, None)
    expected = flat(torch.load(given["state"], mmap=True))[ONE]
    seconds, cpu = [], []
    for _ in range(given.get("repeats", 7) + 1):
        began, used = time.perf_counter(), time.process_time()
        found = contender.one(ONE)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        if not compare.equal_bytes(found, expected):
            return {"error": f"{contender.name}: {ONE} came back with other bytes"}
    return {
        "seconds": statistics.median(seconds[1:]),
        "first": seconds[0],
        "cpu": statistics.median(cpu[1:]),
        "bytes": expected.nbytes,
    }


def main(about: str, text: str, out: str) -> None:
    """about: "contender, action", for messages; text: what is asked, as JSON."""
    before = os.getloadavg()[0]
    given = json.loads(text)
    contender = make(given["contender"])
    place = Place(**given["place"])
    if given.get("rehearse", True):
        rehearse(contender, place, given["action"], given["tiny"])
    measured = {"save": save, "restore": restore, "one": one}[given["action"]](contender, place, given)
    with contextlib.suppress(Exception):  # it has been measured; whether it can close is its own matter
        contender.close()
    described = {"version": contender.version(), "settings": contender.settings, "verifies": contender.verifies}
    answer({**measured, **described, "threads": torch.get_num_threads()}, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
