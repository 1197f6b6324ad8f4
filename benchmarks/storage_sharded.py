"""Rows of a load of a sharded checkpoint onto another layout: those of benchmarks/resharding_loads.py, against the bars of this table."""

from __future__ import annotations

import importlib.util
from typing import Any

from benchmarks.resharding_loads import loads
from benchmarks.storage_lab import Lab
from benchmarks.storage_rows import Row, missing, row

ASKED = "≤ 0.75 × the best of dcp.load and torch_checkpointing, or the floor × 1.15"


def count(lab: Lab) -> int:
    return 1


def measure(lab: Lab) -> list[Row]:
    try:
        found = loads(str(lab.work), lab.quick)
    except RuntimeError as error:
        lab.show("sharded load: failed")
        return [missing("sharded", "sharded load onto another layout", ASKED, str(error).strip().splitlines()[-1])]
    lab.show("sharded loads")
    return [_row(found, onto) for onto in dict.fromkeys(one["onto"] for one in found)]


def _row(found: list[dict[str, Any]], onto: str) -> Row:
    middles = {one["by"]: _number(one["seconds"]) for one in found if one["onto"] == onto}
    floor, own = middles.pop("floor"), middles.pop("fastckpt")
    rivals = {name: value for name, value in middles.items() if value is not None}
    note = "" if importlib.util.find_spec("torch_checkpointing") else "torch_checkpointing: not installed"
    return row(
        "sharded",
        f"load of a sharded checkpoint onto {onto}",
        ASKED,
        [] if own is None else [own],
        bar=0.75 * min(rivals.values()),
        against=rivals,
        floor=floor,
        floor_factor=1.15,
        note=note,
    )


def _number(cell: str) -> float | None:
    """The median of a cell such as "0.123 (0.120–0.131)"; None for words."""
    try:
        return float(cell.split(maxsplit=1)[0])
    except ValueError:
        return None
