"""Where a state is cut, and its chunks read from where it lies."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import AbstractContextManager, nullcontext

from fastckpt._types import U8
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.shares import first_entries
from fastckpt.format.tensor_names import Name
from fastckpt.host import cycle_collector
from fastckpt.state import Captured, chunking
from fastckpt.state.chunking import Cuts, StorageShape


class LiveChunks:
    """A `ChunkSource` of the live state: sealed by its owner's word not to change it until the save is done, or `stop` has returned."""

    any_order = True

    def __init__(self, captured: Captured, cuts: Cuts | None = None) -> None:
        self.cuts = cuts or cuts_of(captured)
        self._captured = captured
        self._changed = threading.Condition()
        self._reading = 0
        self._error: BaseException | None = None

    def stop(self, error: BaseException) -> None:
        """Make the save fail: its next `raw` raises the error. When this returns, nobody reads the state any more."""
        with self._changed:
            self._error = error
            self._changed.wait_for(lambda: not self._reading)

    def known(self, number: int) -> bytes | None:
        """None: every chunk is read."""

    def raw(self, number: int, scratch: U8) -> U8:
        """A private copy, although the pieces could often be encoded in place. If another thread wrote to them between digest and encoder,
        the file would be written with damage.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            self._reading += 1
        try:
            chunk = self.cuts.chunks[number]
            raw = scratch[: chunk.n_bytes]
            self._captured.read(chunk.pieces, raw)
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()
        return raw

    def peek(self, number: int, scratch: U8) -> AbstractContextManager[U8 | None]:
        """A private copy, too."""
        return nullcontext(self.raw(number, scratch))

    def release(self, number: int) -> None:
        """Does nothing: the scratch buffer belongs to the caller."""

    def confirm(self) -> None:
        """Raise the error that `stop` was given."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Does nothing: no resources to release."""


def cuts_of(captured: Captured) -> Cuts:
    """Cut a state into chunks."""
    with cycle_collector.held_off():
        return chunking.cut(storage_shapes(captured))


class KnownCuts:
    """Where the states of a run are cut: decided anew only when their form has changed, or who writes what."""

    def __init__(self) -> None:
        self._form: object = None
        self._shares: object = None
        self._cuts = Cuts([], {})

    def of(self, captured: Captured) -> Cuts:
        """As `cuts_of`."""
        shares = captured.rank, captured.shares
        if captured.form is not self._form or shares != self._shares:
            self._cuts, self._form, self._shares = cuts_of(captured), captured.form, shares
        return self._cuts


def _role(name: Name) -> str:
    """The role of a tensor in the optimizer: the key after […, "state", parameter]."""
    return str(name[-1]) if len(name) >= 3 and name[-3] == "state" else ""


def storage_shapes(captured: Captured) -> list[StorageShape]:
    """What `chunking.cut` wants to know about each storage."""
    names = first_entries(captured.tensors)
    shapes = []
    for number, storage in enumerate(captured.storages):
        element = element_type(storage.dtype)
        assert element is not None, storage.dtype
        if element.n_bytes not in (1, 2, 4, 8, 16):  # NumPy strings: bytes are as good a unit as any other
            element = element._replace(n_bytes=1, float_lane_bytes=0)
        first = names.get(number)
        n_bytes = storage.n_bytes if storage.has_data else 0
        own = captured.stretch(number) if number in captured.shares else None
        if first is None:
            shapes.append(StorageShape(number, n_bytes, element, location=storage.location, own=own))
        else:
            place = _first_global_element(first)
            role, grad, location = _role(first.name), first.requires_grad, storage.location
            shapes.append(StorageShape(number, n_bytes, element, first.name, role, grad, location, place, own))
    return shapes


def shareable(captured: Captured) -> dict[int, StorageShape]:
    """The storages that ranks can share, by number: those with bytes, and with a first name that no other storage has."""
    shapes = storage_shapes(captured)
    n_named = Counter(shape.name for shape in shapes)
    return {
        shape.number: shape for shape in shapes if shape.n_bytes and shape.name is not None and n_named[shape.name] == 1
    }


def _first_global_element(tensor: TensorEntry) -> int:
    """The offset of a shard in the flattened whole tensor; 0 unless the shard is one contiguous stretch of it."""
    if tensor.place is None or not tensor.shape or tensor.offset:
        return 0
    whole, offset = tensor.place.shape, tensor.place.offset
    if len(whole) != len(tensor.shape) or tensor.shape[1:] != whole[1:] or any(offset[1:]):
        return 0  # cut in a dimension other than the first: not contiguous in the whole tensor
    row = 1
    for size in whole[1:]:
        row *= size
    return offset[0] * row
