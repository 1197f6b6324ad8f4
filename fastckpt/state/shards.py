"""What a directory says of a plain tensor that stands for this process's part of a DTensor."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastckpt.format.directory import GlobalPlace, TensorEntry
from fastckpt.format.tensor_names import BOX
from fastckpt.state.sharding import boxes_of, owns_storage, replica_group


class Shard(NamedTuple):
    """What is known of such a tensor, and stands in no directory."""

    group: tuple[int, ...]
    """The ranks whose parts are the same, this one among them."""
    owns_storage: bool
    """Whether its storage is for it alone, padding aside."""


def placed(entry: TensorEntry, dtensor: Any) -> tuple[Shard, list[TensorEntry]]:
    """The rows of a part, whose plain row is `entry`: it with its place in the whole. If it is several blocks of that, it has no place, and
    each block is a row besides.
    """
    is_plain = entry.kind in ("tensor", "parameter")
    shard = Shard(replica_group(dtensor), is_plain and owns_storage(dtensor))
    boxes, shape = boxes_of(dtensor), tuple(dtensor.shape)
    if len(boxes) == 1:
        return shard, [entry._replace(place=GlobalPlace(shape, boxes[0].offset))]
    rows = [entry]
    for number, box in enumerate(boxes):
        start = entry.offset + sum(at * step for at, step in zip(box.local_offset, entry.stride, strict=True))
        name, place = (*entry.name, BOX, number), GlobalPlace(shape, box.offset)
        rows.append(entry._replace(name=name, shape=box.shape, offset=start, kind="part", place=place))
    return shard, rows


def is_box(entry: TensorEntry) -> bool:
    """Whether a row is for a single block of a part that is several."""
    return entry.kind == "part" and entry.name[-2:-1] == (BOX,)
