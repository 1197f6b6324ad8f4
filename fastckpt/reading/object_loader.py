"""Open container or vote → the saved object."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from fastckpt import events
from fastckpt.errors import CheckpointError
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.host import cycle_collector
from fastckpt.host.torch_names import fake_mode, is_meta_location
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.reads import Reads
from fastckpt.reading.storage_loader import StorageLoader, check_size
from fastckpt.state import Rebuild, may_be_refused, unsafe_globals

# Such a load ends within a second or two, so the cycle collector can be held off: small tensors are many objects, but few bytes.
_SOON_BYTES = 64 << 20


def load_object(
    reader: Reader,
    options: Options,
    threads: int,
    *,
    map_location: Any,
    pickle_module: Any,
    weights_only: bool,
    load_args: dict[str, Any],
    places: Sequence[str] | None = None,
    beyond_torch: bool = False,
    wanted: Sequence[int] | None = None,
    aliases: Mapping[int, UntypedStorage] | None = None,
) -> Any:
    """Unpickle the object; `threads` threads read, verify and decode its storages ahead of the unpickler.

    places, beyond_torch: see `Rebuild`. wanted: the only storages that are read, by number; tensors over others are meta tensors.
    aliases: storages that are not read: the tensors of the object are over these instead, which keep what they hold. `fill` reads them.

    CorruptCheckpointError lists all damage; TooLargeError is raised before anything is allocated; pickle.UnpicklingError.
    """
    started = time.perf_counter()
    storages = reader.directory.storages
    aliases = aliases or {}
    numbers = [n for n in (range(len(storages)) if wanted is None else wanted) if n not in aliases]
    n_bytes = sum(storages[n].n_bytes for n in numbers if storages[n].extents is not None)
    if not reader.skeleton:
        raise CheckpointError(
            f"{reader.source.name} holds tensors but no object to load: fetch them with fastckpt.open"
        )
    meta = is_meta_location(map_location)
    refused = weights_only and _refuses(reader, beyond_torch)
    # Do not read ahead if the load will be refused, or needs no data.
    read_ahead = not meta and not refused and fake_mode() is None
    # Checked even without reading ahead: storages before a refused global are read anyway, and arrays are read even for "meta".
    arrays = sum(storages[n].n_bytes for n in numbers if storages[n].dtype.startswith(NUMPY_PREFIX))
    check_size(reader, arrays if meta else n_bytes, options.max_load_bytes)
    reader.require_readable()
    events.emit(events.LoadStarted(source=reader.source.name, raw_bytes=n_bytes, chunks=len(reader.records)))
    reads, stays = Reads.of(options), _stays_on_host(reader, map_location, places, numbers)
    window = (None if stays else reads.window_bytes) if read_ahead else 0
    with StorageLoader(reader, min(threads, options.load_threads), window, numbers, reads=reads) as loader:
        rebuild = Rebuild(
            reader.skeleton,
            loader if wanted is None and not aliases else _Some(loader, frozenset(numbers), aliases),
            reader.source.name,
            map_location,
            weights_only,
            pickle_module,
            load_args,
            places,
            beyond_torch,
        )
        soon = n_bytes + len(reader.skeleton) <= _SOON_BYTES
        with cycle_collector.held_off() if soon else contextlib.nullcontext():
            result = rebuild.run()
    events.emit(
        events.LoadFinished(source=reader.source.name, raw_bytes=n_bytes, seconds=time.perf_counter() - started)
    )
    return result


class _Some(NamedTuple):
    """A StorageProvider of some storages, and of aliases of others; the rest has no data."""

    loader: StorageLoader
    wanted: frozenset[int]
    aliases: Mapping[int, UntypedStorage]

    def n_bytes(self, number: int) -> int | None:
        return self.loader.n_bytes(number)

    def has_data(self, number: int) -> bool:
        return number in self.aliases or (number in self.wanted and self.loader.has_data(number))

    def take(self, number: int) -> UntypedStorage:
        return self.aliases[number] if number in self.aliases else self.loader.take(number)


def _refuses(reader: Reader, beyond_torch: bool) -> bool:
    """Whether a restricted load will certainly fail. The unpickler raises the error; this test only avoids reading the payload."""
    if not may_be_refused(reader.skeleton, reader.holds_arrays):
        return False
    try:
        return bool(unsafe_globals(reader.skeleton, reader.holds_arrays, beyond_torch=beyond_torch))
    except Exception:  # a stream that cannot even be scanned cannot be loaded
        return True


def _stays_on_host(reader: Reader, map_location: Any, places: Sequence[str] | None, numbers: Sequence[int]) -> bool:
    if places is not None:
        return all(places[n] in ("cpu", "meta") for n in numbers)
    if map_location is None:
        return all(reader.directory.storages[n].location == "cpu" for n in numbers)
    return isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu"
