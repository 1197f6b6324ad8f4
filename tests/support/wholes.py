"""Checkpoints of many ranks that hold parts of tensors, made by one process without process groups: the layouts of any mesh."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastckpt.format.directory import GlobalPlace
from fastckpt.format.repository_records import Commit
from fastckpt.format.tensor_names import BOX, Name, dotted
from fastckpt.state import Captured
from fastckpt.store.base import Store
from tests.support.repositories import begin, save_shared, shared

Grid = tuple[int, ...]
"""Into how many parts each dimension is cut, as torch.chunk does it."""


def module(**tensors: Any) -> OrderedDict[str, Any]:
    """What the state dict of a module looks like."""
    found: OrderedDict[str, Any] = OrderedDict(tensors)
    found._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return found


def part_of(whole: torch.Tensor, grid: Grid, number: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """One part of a tensor, contiguous, and where it begins."""
    index = list(itertools.product(*map(range, grid)))[number]
    slices = []
    for size, n_parts, at in zip(whole.shape, grid, index, strict=True):
        step = -(-size // n_parts)
        slices.append(slice(min(at * step, size), min((at + 1) * step, size)))
    return whole[tuple(slices)].clone(), tuple(one.start for one in slices)


def captured_parts(
    state: Any, places: Mapping[str, tuple[Sequence[int], Sequence[int]]], rank: int, **how: Any
) -> Captured:
    """A rank's state; of the tensors with these (dotted) names it has parts: shape of the whole, and where the part begins."""
    found = shared(state, rank, how.get("shares", {}))
    for number, entry in enumerate(found.tensors):
        if dotted(entry.name) in places:
            shape, offset = places[dotted(entry.name)]
            found.tensors[number] = entry._replace(place=GlobalPlace(tuple(shape), tuple(offset)))
    return found


def as_boxes(state: Captured, name: Name, whole: Sequence[int], offsets: Sequence[Sequence[int]]) -> None:
    """Let a tensor of a rank stand for several blocks of its whole, each one row."""
    entry = next(e for e in state.tensors if e.name == name)
    for number, offset in enumerate(offsets):
        place = GlobalPlace(tuple(whole), tuple(offset))
        start = entry.offset + number * entry.stride[0]
        box = entry._replace(
            name=(*name, BOX, number), shape=(1, *entry.shape[1:]), offset=start, kind="part", place=place
        )
        state.tensors.append(box)


def save_parts(store: Store, states: Sequence[Captured], step: int = 1) -> Commit:
    """Commit a checkpoint of so many ranks."""
    if step == 1:
        begin(store, len(states))
    return save_shared(store, 1, step, states)
