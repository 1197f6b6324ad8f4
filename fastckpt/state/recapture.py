"""Captures the state of a training run again and again.

Pickling and naming take 30 µs a tensor, inspecting one takes 2. Between two saves little changes except bytes and a few numbers. So a state
is captured in *parts* (`model`, `optim.state`, `optim.param_groups`, …). If the *form* of a part (`form.py`) is unchanged since the
previous save, its pickle stream, tensor names and storage numbers are used again. The streams of all parts are joined to one skeleton.

One limit: a Python object that is referenced from two parts is pickled twice, so after loading it is two objects. Tensors still share
their storage, for storages are known by number.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastckpt.errors import SaveError
from fastckpt.format.digest import digest
from fastckpt.format.directory import TensorEntry
from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.host import cycle_collector
from fastckpt.host.torch_names import identity, version_of
from fastckpt.state.capture import (
    Captured,
    CapturedStorage,
    StorageNumbers,
    pickled,
    refuse_skipping_data,
)
from fastckpt.state.form import PROTOCOL, Look, Plain, look_at
from fastckpt.state.local_state import NO_DTENSORS
from fastckpt.state.rows import covers, entries
from fastckpt.state.shards import Shard

_MAX_SPLIT = 64  # one more part costs as much as ten tensors
_DEPTH = 2  # parts are the values in this many levels of dictionaries: an optimizer's moments and its learning rates are two parts
_MAX_NAMED_DEPTH = 8  # how deep to search for a value that cannot be pickled: enough to find it
_Path = tuple[str, ...]


class Identity(NamedTuple):
    """Equal for two captures if the state has not changed between them, as far as torch and Python can tell. Writes that torch does not
    count, and new storages, are not seen.
    """

    tensors: list[TensorEntry]
    streams: list[bytes]
    """Digests of the pickle streams of all parts."""
    versions: list[int]
    """How often each tensor was changed in place."""


@dataclass
class _Part:
    """Everything known of a part from its last pickling."""

    form: list[Any] | bytes | None
    """None: the part is pickled every time."""
    opcodes: bytes | memoryview
    digest: bytes
    """Digest of the opcodes."""
    entries: list[TensorEntry]
    numbers: list[int]
    """Numbers of its storages, in the order of `Look`; without a form, in the order of pickling."""
    own: list[int]
    """Numbers of the storages that occur in no earlier part."""
    wholes: dict[int, int]
    """Number of a storage on an accelerator → position, in the order of `Look`, of a tensor that covers all its bytes."""


class _Changed(Exception):
    """A part does not agree with what was remembered of it."""


class Recapturer:
    """Used by the thread that trains."""

    def __init__(self, no_identity: Collection[str] = ()) -> None:
        """no_identity: names of parts that are left out of `identity`."""
        self._no_identity = no_identity
        self.identity = Identity([], [], [])
        """The identity of the last capture."""
        self._parts: dict[_Path, _Part] = {}
        self._storages: list[CapturedStorage] = []
        """The storages of the last capture. Its tensors are not kept: temporary tensors of a state_dict() must not live until the next
        save.
        """
        self._tensors: list[TensorEntry] = []
        self._form: object = None
        self._layouts: list[tuple[Any, ...]] = []
        """Of the DTensors of the last capture, and what its directory says of them."""
        self._shards: dict[Name, Shard] = {}
        self.pickled: list[tuple[Name, bytes]] = []
        """Names and streams of the parts that the last capture had to pickle."""

    def capture(self, state: dict[str, Any], dtensors: Mapping[int, Any] = NO_DTENSORS) -> Captured:
        """As `fastckpt.state.capture`. SaveError, with its name, for what cannot be pickled. The arguments are a `LocalState`."""
        refuse_skipping_data()
        layouts = [(one.shape, one.placements, one.device_mesh) for one in dtensors.values()]
        self.pickled = []
        parts = dict(_parts(state, (), _DEPTH))
        looks = {path: look_at(value) for path, value in parts.items()}
        captured = None
        if self._form is not None and list(self._parts) == list(parts) and layouts == self._layouts:
            try:
                captured = self._again(parts, looks, dtensors)
            except _Changed:
                captured = None
        if captured is None:
            with cycle_collector.held_off():
                captured = self._anew(parts, looks, dtensors)
                self._layouts = layouts
        captured.skeleton = b"".join([b"\x80\x02", *self._joined(state, (), _DEPTH), b"."])
        self.identity = self._identity(looks, list(dtensors.values()))
        return captured

    def _identity(self, looks: dict[_Path, Look | Plain | None], dtensors: list[torch.Tensor]) -> Identity:
        counted = [path for path in self._parts if path[:1] == () or path[0] not in self._no_identity]
        versions = _versions(dtensors)  # what is done to a DTensor counts for itself, not for its local tensor
        for path in counted:
            look = looks[path]
            if look is not None:
                versions += _versions(look.tensors)
        return Identity(self._tensors, [self._parts[path].digest for path in counted], versions)

    def _anew(
        self, parts: dict[_Path, Any], looks: dict[_Path, Look | Plain | None], dtensors: Mapping[int, Any]
    ) -> Captured:
        numbers = StorageNumbers(dtensors)
        self._parts, self._form = {}, None
        for path, value in parts.items():
            first = len(numbers.storages)
            look = looks[path]
            if isinstance(look, Plain):
                self._parts[path] = _Part(look.form, look.opcodes, digest(look.form), [], [], [], {})
                self.pickled.append((path, look.form))
                continue
            stream = _pickled(path, value, numbers)
            self.pickled.append((path, stream))
            own = list(range(first, len(numbers.storages)))
            look = _seen_by(numbers, look)
            known = own if look is None else [numbers.number_of_storage[identity(s)] for s in look.storages]
            form, wholes = (None, {}) if look is None else (look.form, _wholes(look, known, numbers.storages))
            listed = _entries(path, value, numbers)
            self._parts[path] = _Part(form, stream[2:-1], digest(stream), listed, known, own, wholes)
        self._form = object()
        self._storages, self._shards = numbers.storages, numbers.shards
        self._tensors = [entry for part in self._parts.values() for entry in part.entries]
        return self._captured(numbers)

    def _again(
        self, parts: dict[_Path, Any], looks: dict[_Path, Look | Plain | None], dtensors: Mapping[int, Any]
    ) -> Captured:
        """_Changed if more has changed than bytes and what stands in streams."""
        numbers = _Renumbered(self._storages, dtensors)
        number_of = numbers.number_of_storage
        to_pickle = []
        for path in parts:
            look, part = looks[path], self._parts[path]
            if look is None or look.form != part.form:
                to_pickle.append(path)
                continue
            for storage, number in zip(look.storages, part.numbers, strict=True):
                if number_of.setdefault(identity(storage), number) != number:
                    raise _Changed
                known = self._storages[number]
                numbers.owners[number] = storage
                numbers.addresses[number] = storage.data_ptr() if known.has_data and known.n_bytes else 0
            numbers.wholes.update({number: look.tensors[position] for number, position in part.wholes.items()})
        for path in to_pickle:
            self._pickle_again(path, parts[path], looks[path], numbers)
        if any(owner is None for owner in numbers.owners) or len(number_of) != len({*number_of.values()}):
            raise _Changed
        return self._captured(numbers)

    def _pickle_again(self, path: _Path, value: Any, look: Look | Plain | None, numbers: _Renumbered) -> None:
        part = self._parts[path]
        if isinstance(look, Plain):
            if part.own or part.entries:
                raise _Changed
            part.opcodes, part.digest, part.form = look.opcodes, digest(look.form), look.form
            part.numbers, part.wholes = [], {}
            self.pickled.append((path, look.form))
            return
        numbers.give(part.own)
        stream = _pickled(path, value, numbers)
        self.pickled.append((path, stream))
        look = _seen_by(numbers, look)
        if _entries(path, value, numbers) != part.entries or numbers.differs(part.own):
            raise _Changed
        part.opcodes, part.digest = stream[2:-1], digest(stream)
        part.form = None if look is None else look.form
        if look is not None:
            part.numbers = [numbers.number_of_storage[identity(storage)] for storage in look.storages]
            part.wholes = _wholes(look, part.numbers, numbers.storages)

    def _captured(self, numbers: StorageNumbers) -> Captured:
        assert self._form is not None
        return Captured(
            b"",
            self._storages,
            self._tensors,
            numbers.addresses,
            numbers.owners,
            numbers.wholes,
            shards=self._shards,
            form=self._form,
        )

    def _joined(self, value: Any, path: _Path, depth: int) -> Iterator[bytes | memoryview]:
        """Yield the pickle stream of the whole, without its frame. Memo numbers of parts overlap, but no part reads entries of another
        one.
        """
        if not _is_split(value, depth):
            yield self._parts[path].opcodes
            return
        yield b"}("
        for key, child in value.items():
            encoded = key.encode("utf-8", "surrogatepass")
            yield b"X" + struct.pack("<I", len(encoded)) + encoded
            yield from self._joined(child, (*path, key), depth - 1)
        yield b"u"


class _Renumbered(StorageNumbers):
    """Gives a part's storages the numbers of the previous time, in the order in which they are met."""

    def __init__(self, known: Sequence[CapturedStorage], dtensors: Mapping[int, Any]) -> None:
        super().__init__(dtensors)
        self._known = known
        self.storages = list(known)
        self.addresses, self.owners = [0] * len(known), [None] * len(known)
        self._left: list[int] = []

    def give(self, own: Sequence[int]) -> None:
        """Set the numbers for the storages that are met from now on."""
        self._left = list(reversed(own))

    def differs(self, own: Sequence[int]) -> bool:
        """Whether the storages with these numbers are no longer the same."""
        return any(self.storages[number] != self._known[number] for number in own)

    def _enter(self, info: CapturedStorage, address: int, owner: Any) -> int:
        if not self._left:
            raise _Changed
        number = self._left.pop()
        self.storages[number], self.addresses[number], self.owners[number] = info, address, owner
        return number


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return [version_of(tensor) for tensor in tensors]
    except RuntimeError:  # tensors made under inference_mode count no versions
        return [0 if tensor.is_inference() else version_of(tensor) for tensor in tensors]


def _pickled(path: _Path, value: Any, numbers: StorageNumbers) -> bytes:
    try:
        return pickled(value, numbers, pickle, PROTOCOL)
    except (_Changed, MemoryError):
        raise
    except Exception as error:
        name, culprit = _culprit(path, value)
        words = str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
        raise SaveError(
            f"{dotted(name)} ({type(culprit).__module__}.{type(culprit).__qualname__}) cannot be saved: {words}. Nothing was committed. "
            "Leave it out of the state, or keep it there as something that torch.save takes"
        ) from error


def _culprit(path: _Path, value: Any) -> tuple[Name, Any]:
    """The innermost value that cannot be pickled even by itself, and its name. Only for the text of an error."""
    name: Name = tuple(key_of(key) for key in path)
    for _ in range(_MAX_NAMED_DEPTH):
        inside = next((one for one in _inside(value) if not _can_be_pickled(one[1])), None)
        if inside is None:
            break
        name, value = (*name, key_of(inside[0])), inside[1]
    return name, value


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, torch.nn.Module):
        yield from vars(value).items()


def _can_be_pickled(value: Any) -> bool:
    try:
        pickled(value, StorageNumbers(), pickle, PROTOCOL)
    except Exception:
        return False
    return True


def _is_split(value: object, depth: int) -> bool:
    return depth > 0 and type(value) is dict and 0 < len(value) <= _MAX_SPLIT and all(type(key) is str for key in value)


def _parts(value: Any, path: _Path, depth: int) -> Iterator[tuple[_Path, Any]]:
    if not _is_split(value, depth):
        yield path, value
        return
    for key, child in value.items():
        yield from _parts(child, (*path, key), depth - 1)


def _entries(path: _Path, value: Any, numbers: StorageNumbers) -> list[TensorEntry]:
    return entries(value, numbers, tuple(key_of(key) for key in path))


def _wholes(look: Look | Plain, numbers: Sequence[int], storages: Sequence[CapturedStorage]) -> dict[int, int]:
    found = {}
    for position, (tensor, at) in enumerate(zip(look.tensors, look.storage_of, strict=True)):
        storage = storages[numbers[at]]
        if storage.device is not None and covers(tensor, storage.n_bytes):
            found[numbers[at]] = position
    return found


def _seen_by(numbers: StorageNumbers, look: Look | None) -> Look | None:
    """The look; None if pickling bypassed one of its storages (some devices' tensors are pickled as arrays), because then nothing is
    known.
    """
    known = look is None or all(identity(storage) in numbers.number_of_storage for storage in look.storages)
    return look if known else None
