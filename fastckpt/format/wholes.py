"""What the votes of all ranks say together of a tensor: its shape as a whole, and which rank has which block of it. Pure."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastckpt.format.directory import Directory, TensorEntry
from fastckpt.format.shares import Claim, claims_of
from fastckpt.format.tensor_names import BOX, Name, dotted

_TENSORS, _END = b'"tensors":[', b"]}"
_ROW = re.compile(
    rb'\{"name":(\[[^][{}\\]*\]),"dtype":"([a-z0-9_]+)","shape":(\[[0-9,]*\]),"stride":\[[0-9,]*\],"offset":[0-9]+,"storage":[0-9]+,'
    rb'"kind":"(?:tensor|parameter)","requires_grad":(?:true|false)(?:,"global":\{"shape":(\[[0-9,]*\]),"offset":(\[[0-9,]*\])\})?\}'
)
"""A row of a directory's `tensors` as `directory.build` writes it: name, dtype, shape, shape and offset in the whole."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset in the whole, and shape."""


class Block(NamedTuple):
    """A block of a whole that one rank has: a strided view of one of its storages. Numbers are elements."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int
    storage: int
    offset: int
    stride: tuple[int, ...]


@dataclass
class Whole:
    """One tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    requires_grad: bool
    blocks: list[Block] = field(default_factory=list)
    """Of a DTensor each block once, whichever ranks have it; else all of it, as the first rank has it."""
    entry: TensorEntry | None = None
    """As the first rank lists it; None: it was a DTensor."""
    doubtful: list[tuple[Block, Block]] = field(default_factory=list)
    """Of the same place in the whole, on two ranks that do not say that they hold it alike: the first one's block, and another's."""
    location: str = "cpu"
    """Where the first rank had it, in torch's spelling."""
    ranks: list[int] = field(default_factory=list)
    """That have something of this name."""
    is_contradicted: bool = False
    """Whether ranks have something of this name that is of another shape or type."""

    @property
    def was_spread(self) -> bool:
        """Whether it was a DTensor."""
        return self.entry is None

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}{', a DTensor' if self.was_spread else ''}"


class Wholes:
    """Collects the wholes of a checkpoint from its directories, entered one by one. Keeps nothing else of them."""

    def __init__(self, wanted: Callable[[Name, Box], bool] = lambda name, box: True) -> None:
        """wanted: whether a block of a DTensor is to be kept: a rank needs few of 1,024 ranks'."""
        self._wanted = wanted
        self.found: dict[Name, Whole] = {}
        self.problems: list[str] = []
        """What votes say of one name and cannot both be true, in words."""
        self._seen: dict[Name, dict[Box, tuple[Block, Claim | None]]] = {}
        """The first block of each place, and what is said of who holds it."""
        self._first: int | None = None
        """The rank that was entered first."""
        self._names: dict[bytes, Name] = {}
        """Of JSON."""

    def add(self, rank: int, listed: Directory) -> None:
        """Enter what the vote of a rank lists."""
        self._first = rank if self._first is None else self._first
        claims = {number: claim for claim, number in claims_of(listed).items()}
        boxes: dict[Name, list[TensorEntry]] = defaultdict(list)
        for entry in listed.tensors:
            if _is_box(entry):
                boxes[entry.name[:-2]].append(entry)
        for entry in listed.tensors:
            if _is_box(entry):
                continue
            rows = boxes.get(entry.name) or ([entry] if entry.place is not None else [])
            place = rows[0].place if rows else None
            whole = self.found.get(entry.name)
            if whole is None:
                shape = entry.shape if place is None else place.shape
                location = listed.storages[entry.storage].location
                whole = Whole(entry.dtype, shape, entry.kind, entry.requires_grad, location=location)
                whole.entry = None if rows else entry
                self.found[entry.name] = whole
            whole.ranks.append(rank)
            if rows:
                self._add_blocks(rank, entry, rows, whole, claims)
            else:
                self._add_plain(rank, entry, whole, claims)

    def _add_blocks(
        self, rank: int, entry: TensorEntry, rows: Sequence[TensorEntry], whole: Whole, claims: Mapping[int, Claim]
    ) -> None:
        """entry: the row of the part; rows: those of its blocks."""
        for row in rows:
            shape = None if row.place is None else row.place.shape
            if whole.entry is not None or (entry.dtype, shape) != (whole.dtype, whole.shape) or not _is_inside(row):
                here = f"{entry.dtype} {None if shape is None else list(shape)}, a DTensor"
                whole.is_contradicted = True
                self.problems.append(
                    f"{dotted(entry.name)} is {here} in the vote of rank {rank}, and {whole} in another"
                )
                return
            if row.place is None or 0 in row.shape or not self._wanted(entry.name, (row.place.offset, row.shape)):
                continue
            block = _block(rank, row, row.place.offset)
            if self._is_first(entry.name, whole, block, claims.get(row.storage)):
                whole.blocks.append(block)

    def _add_plain(self, rank: int, entry: TensorEntry, whole: Whole, claims: Mapping[int, Claim]) -> None:
        if whole.entry is None:
            here = f"{entry.dtype} {list(entry.shape)}"
            whole.is_contradicted = True
            self.problems.append(f"{dotted(entry.name)} is {here} in the vote of rank {rank}, and {whole} in another")
            return
        block = _block(rank, entry, (0,) * len(entry.shape))
        if not whole.blocks:
            whole.blocks.append(block)
        if (entry.dtype, entry.shape) != (whole.dtype, whole.shape):
            whole.is_contradicted = True
        elif 0 not in entry.shape:
            self._is_first(entry.name, whole, block, claims.get(entry.storage))

    def _is_first(self, name: Name, whole: Whole, block: Block, claim: Claim | None) -> bool:
        """Whether no rank before had this place. If one had, it is noted unless both say that they hold the same."""
        seen = self._seen.setdefault(name, {})
        first, said = seen.setdefault((block.at, block.shape), (block, claim))
        if first is block:
            return True
        alike = claim is not None and claim == said and (first.offset, first.stride) == (block.offset, block.stride)
        if not alike:
            whole.doubtful.append((first, block))
        return False

    def add_unwanted(self, data: bytes) -> bool:
        """Whether a directory has nothing to enter: names, shapes and types are known, and its blocks are not wanted. Then nothing is left
        to do. False: it has to be parsed, and added.

        Reads only the rows of tensors, as our own writer puts them, in a tenth of the time: of 1,024 ranks a rank needs the blocks of few.
        """
        start, end = data.rfind(_TENSORS), len(data) - len(_END)
        if start < 0 or not data.endswith(_END):
            return False
        text = data[start + len(_TENSORS) : end]
        rows = _ROW.findall(text)
        if _ROW.sub(b"", text) != b"," * (len(rows) - 1):  # there is something else
            return False
        try:
            return all(map(self._is_unwanted, rows))
        except ValueError:  # numbers that JSON does not have
            return False

    def _is_unwanted(self, row: tuple[bytes, bytes, bytes, bytes, bytes]) -> bool:
        name_text, dtype, shape_text, whole_text, offset = row
        name = self._names.get(name_text)
        if name is None:
            name = self._names[name_text] = _name(name_text)
        whole = self.found.get(name)
        if whole is None or whole.dtype != dtype.decode():
            return False
        shape = _numbers(shape_text)
        if not whole_text:
            # What the first rank does not have comes from another: then all of them are to be compared.
            return whole.entry is not None and whole.shape == shape and whole.ranks[0] == self._first
        if whole.entry is not None or whole.shape != _numbers(whole_text):
            return False
        return 0 in shape or not self._wanted(name, (_numbers(offset), shape))


def _is_inside(row: TensorEntry) -> bool:
    """Whether a block is one of the whole that it says it is of. Only a hostile vote says otherwise."""
    if row.place is None or row.kind in ("array", "quantized"):
        return row.place is None
    shape, offset = row.place.shape, row.place.offset
    return len(shape) == len(offset) == len(row.shape) and all(
        at + size <= n for at, size, n in zip(offset, row.shape, shape, strict=True)
    )


@functools.lru_cache(maxsize=65536)
def _numbers(text: bytes) -> tuple[int, ...]:
    return tuple(json.loads(text))


def _name(text: bytes) -> Name:
    """() for one that is not read here: nothing has that name."""
    try:
        return tuple(json.loads(text))
    except ValueError:
        return ()


def _block(rank: int, row: TensorEntry, at: tuple[int, ...]) -> Block:
    return Block(at, row.shape, rank, row.storage, row.offset, row.stride)


def _is_box(entry: TensorEntry) -> bool:
    return entry.kind == "part" and entry.name[-2:-1] == (BOX,)


class Overlap(NamedTuple):
    """What a wanted block and a saved one have in common."""

    block: Block
    within: tuple[int, ...]
    """Where it begins in the saved block."""
    to: tuple[int, ...]
    """Where it begins in the wanted one."""
    shape: tuple[int, ...]


def overlaps(blocks: Sequence[Block], wanted: Box) -> Iterator[Overlap]:
    """What of a wanted block each of the saved ones has; nothing for one that has nothing of it."""
    offset, shape = wanted
    for block in blocks:
        first = tuple(map(max, block.at, offset))
        last = tuple(min(a + n, b + m) for a, n, b, m in zip(block.at, block.shape, offset, shape, strict=True))
        size = tuple(b - a for a, b in zip(first, last, strict=True))
        if all(n > 0 for n in size):
            within = tuple(a - b for a, b in zip(first, block.at, strict=True))
            yield Overlap(block, within, tuple(a - b for a, b in zip(first, offset, strict=True)), size)


def is_covered(found: Sequence[Overlap], wanted: Box) -> bool:
    """Whether saved blocks make up a wanted one. Blocks of one mesh do not overlap each other: those that do have too many elements."""
    return sum(math.prod(one.shape) for one in found) == math.prod(wanted[1])


def touches(box: Box, boxes: Sequence[Box]) -> bool:
    """Whether a block has anything of one of some others."""
    at, shape = box
    for offset, size in boxes:
        for a, n, b, m in zip(at, shape, offset, size, strict=True):
            if a >= b + m or b >= a + n:
                break
        else:
            return True
    return False


__all__ = ["Block", "Box", "Overlap", "Whole", "Wholes", "is_covered", "overlaps", "touches"]
