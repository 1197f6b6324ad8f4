"""Measures, on a state's own bytes, how well the codec would compress it, and how much deltas against an older state would gain.

    state ─→ chunks as a save cuts them ─→ encoded, timed, thrown away ─→ sums for each group of tensors
    older state ─→ bases, by name ──────┘

Nothing is written. A group is a pair of element type and role (`exp_avg`, `step`, …; parameters have none).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fastckpt import codec
from fastckpt._types import U8, Progress
from fastckpt.format.tensor_names import Name
from fastckpt.kernels.transform import MAX_RAW_BYTES, Transform
from fastckpt.state import Captured, chunking
from fastckpt.state.chunking import Chunk
from fastckpt.state.chunks import storage_shapes


@dataclass
class CodingResult:
    """The cost of storing a group in one way: alone, or as a delta."""

    stored_bytes: int = 0
    seconds: float = 0.0
    transforms: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Raw bytes by transform."""


@dataclass
class TensorGroup:
    """All tensors of one element type and role, with their measurements."""

    dtype: str
    role: str
    tensors: int = 0
    raw_bytes: int = 0
    entropy_bytes: float = 0.0
    """Order-0 entropy of the byte planes, summed over chunks: the size with an ideal coder of single bytes."""
    alone: CodingResult = field(default_factory=CodingResult)
    delta: CodingResult | None = None
    """The cost as a delta against the older state. None: there is no older state."""
    based_bytes: int = 0
    """Raw bytes whose older version is known: the same name, type and size."""
    same_bytes: int = 0
    """The part of `based_bytes` in chunks that have not changed at all."""


def analyze(
    captured: Captured, older: Captured | None = None, progress: Progress = lambda done, total: None
) -> list[TensorGroup]:
    """Encode everything once, and once more against an older state if there is one. Returns the groups, the largest first.

    Runs on one thread, because speeds are given for one thread. Takes some 20 MiB besides the states.

    Args:
        older: None measures no delta.
        progress: called with raw bytes done and raw bytes in all.
    """
    shapes = storage_shapes(captured)
    cuts = chunking.cut(shapes)
    bases = _storages_by_name(older) if older is not None else {}
    groups: dict[tuple[str, str], TensorGroup] = {}
    counted: set[int] = set()
    out, raw_scratch, base_scratch = (np.empty(MAX_RAW_BYTES, np.uint8) for _ in range(3))
    total, done = sum(chunk.n_bytes for chunk in cuts.chunks), 0
    for chunk in cuts.chunks:
        first = shapes[chunk.pieces[0].storage]
        group = groups.setdefault((first.element.name, first.role), TensorGroup(first.element.name, first.role))
        for piece in chunk.pieces:
            if piece.storage not in counted:
                counted.add(piece.storage)
                group.tensors += sum(tensor.storage == piece.storage for tensor in captured.tensors)
        raw = _gather(chunk, ((captured, piece.storage) for piece in chunk.pieces), raw_scratch)
        group.raw_bytes += raw.size
        group.entropy_bytes += _entropy_bytes(raw, chunk.element.float_lane_bytes)
        alone = _encode(raw, chunk, None, out, group.alone)
        if older is not None:
            group.delta = group.delta or CodingResult()
            found = [bases.get(shapes[p.storage].name) for p in chunk.pieces]
            base = _base(chunk, captured, older, found, base_scratch)
            if base is None:
                _add(group.delta, alone, raw.size)
            else:
                group.based_bytes += raw.size
                if np.array_equal(raw, base):
                    group.same_bytes += raw.size
                    group.delta.transforms["REF"] += raw.size
                else:
                    _encode(raw, chunk, base, out, group.delta)
        done += raw.size
        progress(done, total)
    return sorted(groups.values(), key=lambda g: g.raw_bytes, reverse=True)


def _storages_by_name(captured: Captured) -> dict[Name | None, int]:
    return {shape.name: shape.number for shape in storage_shapes(captured) if shape.name is not None}


def _gather(chunk: Chunk, sources: Iterator[tuple[Captured, int]], scratch: U8) -> U8:
    raw, position = scratch[: chunk.n_bytes], 0
    for piece, (state, storage) in zip(chunk.pieces, sources, strict=True):
        state.read([(storage, piece.offset, piece.n_bytes)], raw[position : position + piece.n_bytes])
        position += piece.n_bytes
    return raw


def _base(chunk: Chunk, state: Captured, older: Captured, found: list[int | None], scratch: U8) -> U8 | None:
    """Gather the same stretches from the older state's storages. None: a tensor is missing, or has another type or size."""
    storages: list[int] = []
    for piece, number in zip(chunk.pieces, found, strict=True):
        if number is None:
            return None
        new, old = state.storages[piece.storage], older.storages[number]
        if (new.dtype, new.n_bytes) != (old.dtype, old.n_bytes) or not old.has_data:
            return None
        storages.append(number)
    return _gather(chunk, ((older, number) for number in storages), scratch)


def _encode(raw: U8, chunk: Chunk, base: U8 | None, out: U8, result: CodingResult) -> codec.Encoded:
    started = time.perf_counter()
    element = chunk.element
    encoded = codec.encode(raw, element.const_lane_bytes, element.float_lane_bytes, base=base, out=out[: raw.size])
    result.seconds += time.perf_counter() - started
    _add(result, encoded, raw.size)
    return encoded


def _add(result: CodingResult, encoded: codec.Encoded, raw_bytes: int) -> None:
    result.stored_bytes += len(encoded.stored)
    result.transforms[_words(encoded)] += raw_bytes


def _words(encoded: codec.Encoded) -> str:
    name = encoded.transform.name
    return f"{name} {encoded.pack_bits}" if encoded.transform is Transform.SUBPACK else name


def _entropy_bytes(raw: U8, lane_bytes: int) -> float:
    planes = raw.reshape(-1, lane_bytes or 1)
    if lane_bytes:
        x = raw.view(f"<u{lane_bytes}")
        rotated = (x << x.dtype.type(1)) | (x >> x.dtype.type(8 * lane_bytes - 1))
        planes = rotated.view(np.uint8).reshape(-1, lane_bytes)
    total = 0.0
    for k in range(planes.shape[1]):
        counts = np.bincount(planes[:, k], minlength=256)
        counts = counts[counts > 0]
        total += len(planes) * np.log2(len(planes)) - float((counts * np.log2(counts)).sum())
    return total / 8


__all__ = ["CodingResult", "TensorGroup", "analyze"]
