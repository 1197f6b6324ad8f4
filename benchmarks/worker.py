"""One measurement in a process of its own: `save`, `warm` or `cold` load of one contender, `isolation`, or `probe`.

Started by run.py; writes one JSON object to the file named last.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, contenders, measure
from benchmarks.contenders.base import Contender, State
from benchmarks.probes import probe
from benchmarks.processes import answer


def rehearse(contender: Contender, state: State, directory: Path) -> None:
    """Imports, thread pools, process groups: once, with a few bytes, before anything counts."""
    place = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=directory.parent))
    inner = place / "tiny"
    inner.mkdir()
    contender.save(contender.tiny(state), inner)
    contender.load(inner)
    shutil.rmtree(place)


def one_save(contender: Contender, state: State, directory: Path, trim: bool = True) -> dict[str, Any]:
    os.sync()  # somebody else's dirty pages are not this contender's
    span = measure.Span(trim)
    wait = contender.begin(state, directory)
    stall = span.seconds()
    wait()
    return {
        "stall": stall,
        "durable": span.seconds(),
        "cpu": span.cpu(),
        "memory": span.peak(),
        "bytes": measure.size(directory),
        "files": len(measure.files(directory)),
    }


def save(contender: Contender, state: State, directory: Path) -> dict[str, Any]:
    rehearse(contender, state, directory)
    result = one_save(contender, state, directory)
    if contender.asynchronous:
        # In a long run buffers, or freed memory, are there from the save before; the first save pays for their pages.
        again = directory.with_name(directory.name + "-again")
        again.mkdir()
        result["again"] = one_save(contender, state, again, trim=False)
        shutil.rmtree(again)
    return result


def load(contender: Contender, directory: Path, cold: bool, original: Path, check: bool) -> dict[str, Any]:
    # The rehearsal needs the state's form; mapped, so that its bytes stay out of this process.
    rehearse(contender, torch.load(original, mmap=True), directory)
    if cold:
        measure.evict(directory)
    else:
        measure.warm(directory)
    cached = measure.resident(directory)
    span = measure.Span()
    state = contender.load(directory)
    returned = span.seconds()
    touched = measure.touch(state)
    result: dict[str, Any] = {
        "seconds": span.seconds(),
        "returned": returned,
        "cpu": span.cpu(),
        "memory": span.peak(),
        "touched": touched,
        "resident_before": cached,
    }
    if check:
        result["differences"] = differences(contender, torch.load(original), state)
    return result


def isolation(contender: Contender, original: Path, directory: Path) -> dict[str, Any]:
    """Is the stall the whole stall? Changes every byte as soon as `begin` returns and looks at what was stored."""
    state = torch.load(original)
    wait = contender.begin(state, directory)
    for data in measure.memories(state):
        data.bitwise_not_()
    wait()
    return {"differences": differences(contender, torch.load(original), contender.load(directory))}


def differences(contender: Contender, saved: State, loaded: State) -> list[str]:
    if contender.tensors_only:
        from benchmarks.contenders.safetensors_file import tensors_of

        return compare.compare_tensors(dict(tensors_of(saved)), loaded)
    return compare.compare(saved, loaded)


def main(mode: str, name: str, original: str, directory: str, check: str, out: str) -> None:
    result: dict[str, Any]
    before = os.getloadavg()[0]
    if mode == "probe":
        result = dict(probe(Path(original), Path(directory)))
    else:
        contender = contenders.make(name)
        if mode == "describe":
            result = describe(contender)
        elif mode == "save":
            result = save(contender, torch.load(original), Path(directory))
        elif mode == "isolation":
            result = isolation(contender, Path(original), Path(directory))
        else:
            result = load(contender, Path(directory), mode == "cold", Path(original), check == "check")
    answer(result, before, out)


def describe(contender: Contender) -> dict[str, Any]:
    return {
        "version": contender.version(),
        "unavailable": contender.unavailable(),
        "asynchronous": contender.asynchronous,
        "tensors_only": contender.tensors_only,
        "settings": contender.settings,
        "note": contender.note,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
