"""What the votes of a checkpoint say together, as torch's Metadata. Pure: from directories.

Checkpoints of a `Checkpointer` are read, too: their names are arrays of keys, and the name for DCP is the dotted one. Of these, only
tensors are seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from fastckpt.errors import CorruptCheckpointError, Damage, UnsupportedFormatError
from fastckpt.format.directory import Directory, GlobalPlace, TensorEntry
from fastckpt.format.tensor_names import BOX, Name, dotted
from fastckpt.integrations.dcp.items import BYTES_DTYPE, META, META_FORMAT, joined
from fastckpt.reading.assembly import Source

Path = tuple[str | int, ...]


@dataclass
class SavedTensor:
    """A tensor of the checkpoint, and where its blocks are."""

    name: Name
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    blocks: dict[tuple[int, ...], Source] = field(default_factory=dict)
    """By their offsets in the whole; blocks without elements are left out."""


class SavedObject(NamedTuple):
    """The bytes of an object."""

    name: Name
    source: Source


@dataclass
class Layout:
    """A checkpoint, by flattened names."""

    names: dict[str, None] = field(default_factory=dict)
    """All names in the order of the ranks' plans; tied tensors side by side."""
    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    objects: dict[str, SavedObject] = field(default_factory=dict)
    paths: dict[str, Path] | None = None
    """The place of each name in the nested state; None: the planner had not flattened it."""
    empty: dict[Path, None] = field(default_factory=dict)
    """Places of empty dictionaries."""


def layout_of(directories: Mapping[int, Directory], url: str) -> Layout:
    """Put the directories of all ranks together. CorruptCheckpointError lists what cannot be true; UnsupportedFormatError."""
    found = _Reading(url)
    for rank in sorted(directories):
        found.add(rank, directories[rank])
    if found.damage:
        raise CorruptCheckpointError(url, found.damage)
    return found.layout


class _Reading:
    def __init__(self, url: str) -> None:
        self.layout, self.damage = Layout(), list[Damage]()
        self._url = url

    def add(self, rank: int, listed: Directory) -> None:
        """Enter what the vote of a rank lists."""
        said = listed.meta.get(META)
        is_dcp = isinstance(said, dict)
        if isinstance(said, dict):
            self._add_meta(rank, said)
        elif self.layout.paths is None:
            self.layout.paths = {}
        boxed = {entry.name[:-2] for entry in listed.tensors if _is_box(entry)}
        for entry in sorted(listed.tensors, key=lambda entry: (entry.storage, entry.offset)):
            if is_dcp and entry.dtype == BYTES_DTYPE:
                self._add_object(rank, entry)
            elif entry.kind in ("tensor", "parameter") and not (not is_dcp and entry.name in boxed):
                self._add_block(rank, entry, entry.name, is_dcp)
            elif _is_box(entry):
                self._add_block(rank, entry, entry.name[:-2], is_dcp)

    def _add_meta(self, rank: int, said: dict[str, Any]) -> None:
        if said.get("format") != META_FORMAT:
            raise UnsupportedFormatError(
                f"{self._url} was saved by a newer fastckpt: its DCP members are of format {said.get('format')!r}, this version reads "
                f"{META_FORMAT}. Upgrade with `pip install -U fastckpt-engine`"
            )
        if said.get("has_paths") is True and self.layout.paths is None:
            self.layout.paths = {}
        paths, empty = said.get("paths", {}), said.get("empty", [])
        if not isinstance(paths, dict) or not isinstance(empty, list):
            self._lost(rank, "meta", "paths and empty places", repr(said)[:80])
            return
        for fqn, path in paths.items():
            if self._is_path(rank, path) and self.layout.paths is not None:
                self.layout.paths[fqn] = tuple(path)
        for path in empty:
            if self._is_path(rank, path):
                self.layout.empty[tuple(path)] = None

    def _is_path(self, rank: int, path: object) -> bool:
        right = isinstance(path, list) and bool(path) and all(type(key) in (str, int) for key in path)
        if not right:
            self._lost(rank, "meta", "an array of strings and integers", repr(path)[:80])
        return right

    def _lost(self, rank: int, place: str, expected: str, found: str) -> None:
        self.damage.append(Damage("directory", f"{place} of rank {rank}", expected, found))

    def _enter(self, fqn: str, name: Name, is_dcp: bool) -> None:
        self.layout.names[fqn] = None
        if self.layout.paths is not None:
            keys = tuple(key if isinstance(key, int) and is_dcp else str(key) for key in name)
            self.layout.paths.setdefault(fqn, keys)

    def _add_object(self, rank: int, entry: TensorEntry) -> None:
        fqn = joined(entry.name)
        self._enter(fqn, entry.name, True)
        source = Source(rank, entry.storage, entry.offset, entry.stride, entry.shape)
        self.layout.objects.setdefault(fqn, SavedObject(entry.name, source))

    def _add_block(self, rank: int, entry: TensorEntry, name: Name, is_dcp: bool) -> None:
        fqn = joined(name)
        place = entry.place or GlobalPlace(entry.shape, (0,) * len(entry.shape))
        shape, at = place.shape, place.offset
        inside = len(shape) == len(at) == len(entry.shape) and all(
            start + size <= whole for start, size, whole in zip(at, entry.shape, shape, strict=True)
        )
        if not inside:
            self._lost(
                rank, f"tensor {dotted(name)!r}", f"a block within {list(shape)}", f"{list(entry.shape)} at {list(at)}"
            )
            return
        self._enter(fqn, name, is_dcp)
        whole = self.layout.tensors.setdefault(fqn, SavedTensor(name, entry.dtype, shape, entry.requires_grad))
        if (whole.dtype, whole.shape) != (entry.dtype, shape):
            here = f"{entry.dtype} {list(shape)}"
            self._lost(
                rank, f"tensor {dotted(name)!r}", f"{whole.dtype} {list(whole.shape)}, as other ranks have it", here
            )
        elif 0 not in entry.shape:
            source = Source(rank, entry.storage, entry.offset, entry.stride, entry.shape)
            if whole.blocks.setdefault(at, source).shape != entry.shape:
                self._lost(
                    rank, f"tensor {dotted(name)!r}", f"one shape of the block at {list(at)}", str(list(entry.shape))
                )


def _is_box(entry: TensorEntry) -> bool:
    return entry.kind == "part" and entry.name[-2:-1] == (BOX,)


def metadata_of(layout: Layout, url: str) -> Metadata:
    """torch's Metadata of a checkpoint. UnsupportedFormatError for an element type that this torch does not have."""
    state: dict[str, Any] = {}
    for fqn in layout.names:
        saved = layout.tensors.get(fqn)
        if saved is None:
            state[fqn] = BytesStorageMetadata()
            continue
        properties = TensorProperties(dtype=dtype_of(saved.dtype, url), requires_grad=saved.requires_grad)
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(source.shape)) for at, source in saved.blocks.items()]
        state[fqn] = TensorStorageMetadata(properties, torch.Size(saved.shape), chunks)
    return Metadata(state, planner_data=layout.paths, storage_data={})


def dtype_of(name: str, url: str) -> torch.dtype:
    """torch's type of that name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedFormatError(
            f"{url} has tensors of type {name}, which torch {torch.__version__} does not have. Use a newer one"
        )
    return found


def differences(layout: Layout, planned: Metadata) -> list[str]:
    """What the votes have otherwise than the planner has planned it, in words."""
    found = []
    for fqn, one in planned.state_dict_metadata.items():
        if isinstance(one, TensorStorageMetadata):
            saved = layout.tensors.get(fqn)
            chunks = {(tuple(c.offsets), tuple(c.sizes)) for c in one.chunks if math.prod(c.sizes)}
            blocks = set() if saved is None else {(at, source.shape) for at, source in saved.blocks.items()}
            if saved is None or saved.shape != tuple(one.size) or blocks != chunks:
                found.append(
                    f"{fqn}: {_shown(blocks - chunks)} where {_shown(chunks - blocks)} of {list(one.size)} was planned"
                )
        elif fqn not in layout.objects:
            found.append(f"{fqn}: no bytes of the object")
    more = (layout.tensors.keys() | layout.objects.keys()) - planned.state_dict_metadata.keys()
    return found + [f"{fqn}: was not planned" for fqn in sorted(more)]


def _shown(blocks: set[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    shown = ", ".join(f"{list(sizes)} at {list(at)}" for at, sizes in sorted(blocks)[:3])
    return (shown or "nothing") + (" …" if len(blocks) > 3 else "")
