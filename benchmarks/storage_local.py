"""Rows of states on a local disk: loads into new memory, restores into a live model, one tensor; from the page cache and without it."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.storage_lab import Lab, together
from benchmarks.storage_rows import Row, against_best, errors, figures, in_seconds, middle, missing, row

STORED = ("Checkpointer", "fastckpt.save/load", "torch.save", "safetensors mapped", "torch_checkpointing", "tensorizer")
FLOOR = "floor"
# What is kept → contender, action, what else the worker is asked
MEASURED: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "local load, warm": (("fastckpt.save/load", "torch.save", "safetensors mapped"), "restore", {"in_place": False}),
    "local restore in place, warm": (
        ("Checkpointer", "torch.save", "torch_checkpointing"),
        "restore",
        {"in_place": True},
    ),
    "local load, cold": (("fastckpt.save/load", "safetensors mapped"), "restore", {"in_place": False, "cold": True}),
    "local restore in place, cold": (("Checkpointer",), "restore", {"in_place": True, "cold": True}),
    "test device": (("Checkpointer",), "restore", {"in_place": True, "device": "fakegpu"}),
    "local one tensor": (("fastckpt.save/load", "tensorizer"), "one", {}),
}


def count(lab: Lab) -> int:
    return len(STORED) + lab.rounds * (1 + sum(len(names) for names, _, _ in MEASURED.values()))


def measure(lab: Lab) -> list[Row]:
    for name in STORED:
        lab.run(name, "save", _root(lab, name), into="local save, not compared")
    for number in range(lab.rounds):
        found = lab.process("benchmarks.storage_floor", "floor", {"state": str(lab.state()), "folder": str(lab.work)})
        lab.keep("local floor", FLOOR, found)
        for what, (names, action, more) in MEASURED.items():
            for name in together([(name,) for name in names], number):
                lab.run(name, action, _root(lab, name), into=what, check=number == 0, **more)
    return rows(lab)


def _root(lab: Lab, name: str) -> str:
    return str(lab.work / "local" / re.sub(r"\W+", "-", name))


def rows(lab: Lab) -> list[Row]:
    def rivals(what: str, *names: str) -> dict[str, list[dict[str, Any]]]:
        return {name: lab.of(what, name) for name in names}

    floors = lab.of("local floor", FLOOR)
    load_floor, decode = middle(figures(floors, "load_floor")), middle(figures(floors, "decode_all_threads"))
    warm, place, cold = "local load, warm", "local restore in place, warm", "local load, cold"
    mapped = rivals(cold, "safetensors mapped")
    found = [
        against_best(
            "local",
            f"{warm}: fastckpt.load, each byte read once",
            "≤ 0.9 × torch.load, or the floor × 1.15",
            lab.of(warm, "fastckpt.save/load"),
            rivals(warm, "torch.save"),
            0.9,
            floor=load_floor,
            floor_factor=1.15,
            note="floor: new memory, decoding of the chunks, one look at each byte; safetensors mapped: "
            f"{in_seconds(lab.of(warm, 'safetensors mapped'))}",
        ),
        against_best(
            "local",
            f"{place}: Checkpointer.restore",
            "≤ 0.75 × the best of torch_checkpointing in place and torch.load + load_state_dict",
            lab.of(place, "Checkpointer"),
            rivals(place, "torch_checkpointing", "torch.save"),
            0.75,
            floor=decode,
            key="called",
            note="floor: decoding of the chunks into memory that is there; the making of the Checkpointer: "
            f"{in_seconds(lab.of(place, 'Checkpointer'), 'opened')}",
        ),
        against_best(
            "local",
            f"{cold}: fastckpt.load",
            "≤ 0.9 × safetensors, mapped and read",
            lab.of(cold, "fastckpt.save/load"),
            mapped,
            0.9,
        ),
        against_best(
            "local",
            "local restore in place, cold: Checkpointer.restore",
            "≤ 0.9 × safetensors, mapped and read",
            lab.of("local restore in place, cold", "Checkpointer"),
            mapped,
            0.9,
            key="called",
        ),
        against_best(
            "local",
            "one tensor, local, warm process",
            "≤ 1 × tensorizer",
            lab.of("local one tensor", "fastckpt.save/load"),
            rivals("local one tensor", "tensorizer"),
            1.0,
        ),
    ]
    return [*found, *memory_rows(lab, place)]


def memory_rows(lab: Lab, place: str) -> list[Row]:
    asked = "≤ 256 MiB"
    found = []
    for where, kept in (("local", place), ("local, onto the test device, its slabs included", "test device")):
        what = f"Checkpointer.restore, {where}: peak memory over the live state"
        samples = lab.of(kept, "Checkpointer")
        memory = [value / 2**20 for value in figures(samples, "memory")]
        others = _others(lab, place) if kept == place else {}
        line = row("local", what, asked, memory, unit="MiB", bar=256, against=others)
        found.append(line if memory else missing("local", what, asked, errors(samples)))
    return found


def _others(lab: Lab, place: str) -> dict[str, float]:
    return {
        name: (middle(figures(lab.of(place, name), "memory")) or 0.0) / 2**20
        for name in ("torch_checkpointing", "torch.save")
        if figures(lab.of(place, name), "memory")
    }
