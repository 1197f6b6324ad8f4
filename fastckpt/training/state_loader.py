"""Loads a checkpoint's state for the objects of a Checkpointer: all of it, or all but what will be read straight into them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.training.placement import PlacementPlan
from fastckpt.training.restore_asked import RestoreAsked
from fastckpt.training.straight import NOTHING, Straight, find_straight


def load_state(
    reader: Reader, plan: PlacementPlan, targets: Mapping[str, Any], options: Options, asked: RestoreAsked
) -> tuple[Any, Straight]:
    """The state, and what of it has no data yet, because it goes straight into the objects. Errors as those of `load_object`."""

    def load(wanted: Sequence[int] | None = None, straight: Straight = NOTHING) -> Any:
        return load_object(
            reader,
            options,
            options.load_threads,
            map_location=plan.map_location,
            pickle_module=pickle,
            weights_only=asked.weights_only,
            load_args={"encoding": "utf-8"},
            places=["cpu" if n in straight.storages else place for n, place in enumerate(plan.places)],
            beyond_torch=True,
            wanted=wanted,
            aliases=straight.storages,
        )

    # With weights_only=False the checkpoint's own code runs, and an outline would run it twice.
    if asked.weights_only and not asked.atomic:
        straight = find_straight(targets, reader.directory, plan, load, new_on_host=asked.overlap)
        loaded = load(straight=straight)
        if straight.holds(loaded):
            return loaded, straight
        del loaded
    return load(), NOTHING
