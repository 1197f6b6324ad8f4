"""Items of torch's save plan → a captured state, as `writing.rank.upload` takes it. Nothing is pickled here.

A tensor item is a row with its place in the whole (`global`), so the votes say all that torch's Metadata says. An object item (torch:
BYTE_IO) is the array of the bytes that the planner has made of it; no tensor of DCP is an array.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from fastckpt.errors import SaveError
from fastckpt.format.directory import GlobalPlace, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.tensor_names import BOX, Name, ReprKey, key_of
from fastckpt.host.torch_names import identity
from fastckpt.integrations.dcp.planner import FastckptSavePlanner
from fastckpt.state.capture import Captured, CapturedStorage

META = "dcp"
"""The member of a vote's `meta` that says how DCP's planner named things."""
META_FORMAT = 1
BYTES_DTYPE = "numpy:|u1"

Path = tuple[Any, ...]


def captured_of(plan: SavePlan, planner: SavePlanner) -> Captured:
    """The state that this rank writes. The planner's tensors are referenced, not copied, except narrow views of large storages.

    SaveError lists every item that cannot be stored.
    """
    paths = paths_of(planner) or {}
    found = _Items()
    n_of = Counter(item.index.fqn for item in plan.items)
    nth: Counter[str] = Counter()
    for item in plan.items:
        fqn = item.index.fqn
        name = _name(fqn, paths.get(fqn))
        if name is None:
            found.problems.append(f"{fqn!r}: a name that is not valid Unicode")
            continue
        if n_of[fqn] > 1:
            name = (*name, BOX, nth[fqn])
            nth[fqn] += 1
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            found.add_object(name, data)
        else:
            found.add_tensor(name, item, data)
    if found.problems:
        listed = "\n  ".join(found.problems)
        raise SaveError(f"fastckpt cannot store some of what the planner gives it. Nothing was committed:\n  {listed}")
    return found.captured()


def meta_of(planner: SavePlanner) -> dict[str, Any]:
    """What a rank's vote says of its planner besides the rows."""
    paths = paths_of(planner)
    said: dict[str, Any] = {"format": META_FORMAT, "has_paths": paths is not None}
    unlike = {fqn: list(path) for fqn, path in (paths or {}).items() if joined(path) != fqn}
    if unlike:
        said["paths"] = unlike
    if isinstance(planner, FastckptSavePlanner) and planner.empty:
        said["empty"] = [list(path) for path in planner.empty]
    return {META: said}


def paths_of(planner: SavePlanner) -> Mapping[str, Path] | None:
    """The planner's places of flattened names in the nested state; None if it flattens nothing."""
    paths = getattr(planner, "mappings", None)
    return paths if getattr(planner, "flatten_state_dict", False) and is_paths(paths) else None


def is_paths(value: object) -> bool:
    """Whether a value is what torch's planners keep as `planner_data`: flattened names → places of strings and integers."""
    return isinstance(value, Mapping) and all(
        isinstance(fqn, str) and isinstance(path, tuple) and all(type(key) in (str, int) for key in path)
        for fqn, path in value.items()
    )


def joined(path: Iterable[Any]) -> str:
    """The flattened name of a place, as torch makes it."""
    return ".".join(map(str, path))


def _name(fqn: str, path: Path | None) -> Name | None:
    keys = tuple(map(key_of, path if path is not None and joined(path) == fqn else (fqn,)))
    return None if any(isinstance(key, ReprKey) for key in keys) else keys


class _Items:
    """Collects storages and rows. Storage 0 is what the first item needs, and so on: readers list items in this order."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._rows: list[tuple[TensorEntry, torch.Tensor | None, Any]] = []
        """A row with its tensor, or with the bytes of an object; its storage's number and its strides come last."""

    def add_object(self, name: Name, data: Any) -> None:
        """Enter an object by its bytes."""
        if not isinstance(data, io.BytesIO):
            self.problems.append(f"{joined(name)}: {type(data).__name__} where the plan says bytes")
            return
        array = np.frombuffer(data.getbuffer(), np.uint8)
        row = TensorEntry(name, BYTES_DTYPE, (array.size,), (1,), 0, -1, "array", False)
        self._rows.append((row, None, array))

    def add_tensor(self, name: Name, item: WriteItem, data: Any) -> None:
        """Enter a tensor, or a block of one."""
        planned = item.tensor_data
        assert planned is not None, item
        why = _refused(data, tuple(planned.chunk.sizes))
        if why:
            self.problems.append(f"{joined(name)}: {why}")
            return
        with torch.no_grad():
            tensor = data.detach().resolve_conj().resolve_neg()
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = GlobalPlace(tuple(planned.size), tuple(planned.chunk.offsets))
        kind = "part" if name[-2:-1] == (BOX,) else "tensor"
        grad = bool(planned.properties.requires_grad)
        self._rows.append((TensorEntry(name, dtype, tuple(tensor.shape), (), 0, -1, kind, grad, place), tensor, None))

    def captured(self) -> Captured:
        """All of it. A storage that several items view (tied weights) is there once."""
        tensors = _without_rest([tensor for _, tensor, _ in self._rows if tensor is not None])
        captured = Captured(b"")
        number_of: dict[int, int] = {}
        devices = set()
        moved = iter(tensors)
        for row, tensor, array in self._rows:
            if tensor is None:
                info, address, owner = CapturedStorage(BYTES_DTYPE, array.size, "cpu", True), array.ctypes.data, array
                number = _enter(captured, info, address if array.size else 0, owner)
                captured.tensors.append(row._replace(storage=number))
                continue
            kept = next(moved)
            storage = kept.untyped_storage()
            number = number_of.get(identity(storage), -1)
            if number < 0:
                info = _info(storage, row.dtype)
                devices.add(info.device)
                address = storage.data_ptr() if info.n_bytes else 0
                number = number_of[identity(storage)] = _enter(captured, info, address, storage)
            captured.tensors.append(
                row._replace(storage=number, stride=tuple(kept.stride()), offset=int(kept.storage_offset()))
            )
        for device in devices - {None}:  # the threads that read the bytes do so in a stream of their own
            torch.accelerator.synchronize(device)
        return captured


def _enter(captured: Captured, info: CapturedStorage, address: int, owner: Any) -> int:
    captured.storages.append(info)
    captured.addresses.append(address)
    captured.owners.append(owner)
    return len(captured.storages) - 1


def _info(storage: torch.UntypedStorage, dtype: str) -> CapturedStorage:
    element = element_type(dtype)
    assert element is not None, dtype
    device = storage.device
    kind = dtype if storage.nbytes() % element.n_bytes == 0 else "uint8"
    return CapturedStorage(
        kind,
        storage.nbytes(),
        torch.serialization.location_tag(storage),
        True,
        None if device.type == "cpu" else device,
    )


def _refused(data: Any, planned: tuple[int, ...]) -> str:
    """Why a value cannot be stored as a tensor; "" if it can."""
    if not isinstance(data, torch.Tensor):
        return f"{type(data).__name__} where the plan says a tensor"
    if type(data).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(data).__name__}, which is made of other tensors. Save those"
    if data.layout != torch.strided or data.is_nested:
        return f"a tensor of layout {data.layout}. Save its indices and values"
    if data.is_quantized:
        return "a quantized tensor. Save its int_repr() and its scales"
    if data.device.type == "meta":
        return "a meta tensor, which has no data"
    if tuple(data.shape) != planned:
        return f"a tensor of shape {list(data.shape)} where the plan says {list(planned)}"
    if element_type(str(data.dtype).removeprefix("torch.")) is None:
        return f"of {data.dtype}, which format version 1 does not have"
    return ""


def _without_rest(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, those that are small parts of their storages copied out of them: a storage is saved whole. Equal views stay one."""
    views: dict[int, dict[Any, int]] = {}
    for tensor in tensors:
        views.setdefault(identity(tensor.untyped_storage()), {})[_view(tensor)] = tensor.nbytes
    copies: dict[tuple[int, Any], torch.Tensor] = {}
    found = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if 2 * sum(views[identity(storage)].values()) >= storage.nbytes():  # padded shards of FSDP2, too
            found.append(tensor)
            continue
        key = identity(storage), _view(tensor)
        if key not in copies:
            copies[key] = tensor.clone(memory_format=torch.contiguous_format)
        found.append(copies[key])
    return found


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
