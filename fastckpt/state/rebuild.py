"""Skeleton → object. torch's unpicklers do the work; a provider supplies storages, verified, one by one."""

from __future__ import annotations

import io
import os
import pickle
import re
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.serialization import StorageType
from torch.storage import TypedStorage, UntypedStorage

from fastckpt.errors import CheckpointError, CorruptCheckpointError, Damage
from fastckpt.format.element_types import NUMPY_PREFIX, element_type
from fastckpt.host.torch_names import (
    allowed_globals,
    fake_mode,
    fake_storage,
    forget_sparse_tensors,
    is_meta_location,
    loading_to,
    restore_location,
    restricted,
    user_allowed_globals,
)
from fastckpt.state import harmless, invariants

# torch's functions that place a tensor over a storage; they fail if it does not fit.
_PLACES_A_TENSOR = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
_TRUE = ("1", "y", "yes", "true")
_ARRAY_GLOBALS = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
# Modules in which an error is caused by the stream itself: the unpickler, and constructors that it calls.
_OF_THE_STREAM = (restricted.__name__, harmless.__name__, "argparse", "torch.nn.parameter")
_GLOBAL = re.compile(rb"c([a-zA-Z_][\w.]*)\n([a-zA-Z_][\w.]*)\n", re.ASCII)
_STORAGE_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
# torch renamed this module; its own loader maps it too.
_MOVED_MODULES = {"torch.tensor": "torch._tensor"}


class StorageProvider(Protocol):
    """Supplies the storages' bytes. Used by the unpickling thread."""

    def n_bytes(self, number: int) -> int | None:
        """Length of a storage; None if there is no storage of that number."""

    def has_data(self, number: int) -> bool:
        """False for a meta storage."""

    def take(self, number: int) -> UntypedStorage:
        """The storage in host memory, verified; the caller owns it. Called at most once for each number."""


def resolve_weights_only(weights_only: bool | None, pickle_module: Any) -> bool:
    """torch.load's rules for `weights_only`, its environment variables and `pickle_module`."""
    not_set = weights_only is None
    if weights_only is None:
        weights_only = pickle_module is None
    force = os.getenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in _TRUE
    force_not = os.getenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in _TRUE
    if force and force_not:
        raise RuntimeError(
            "Only one of `TORCH_FORCE_WEIGHTS_ONLY_LOAD` or `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` "
            "should be set, but both were set."
        )
    if force:
        weights_only = True
    elif force_not and not_set:
        warnings.warn(
            "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected, since the"
            "`weights_only` argument was not explicitly passed to `torch.load`, forcing weights_only=False.",
            UserWarning,
            stacklevel=4,
        )
        weights_only = False
    if weights_only and pickle_module is not None:
        raise RuntimeError("Can not safely load weights when explicit pickle_module is specified")
    return weights_only


def unsafe_globals(skeleton: bytes, holds_arrays: bool, *, beyond_torch: bool = False) -> list[str]:
    """Globals of the skeleton that a restricted load refuses, in the form of torch.serialization.get_unsafe_globals_in_checkpoint.

    beyond_torch: as in `Rebuild`.
    """
    used = restricted.get_globals_in_pkl(io.BytesIO(skeleton))
    if holds_arrays:
        used |= set(_ARRAY_GLOBALS)
    if beyond_torch:
        used -= harmless.NAMES
        if not holds_arrays:
            used.discard(harmless.NUMPY_DTYPE)  # belongs to a scalar, as far as the list of globals can tell
    return sorted(used - set(allowed_globals()) - set(user_allowed_globals()))


def may_be_refused(skeleton: bytes, holds_arrays: bool) -> bool:
    """False: a restricted load certainly refuses no global of the skeleton. True: ask `unsafe_globals`, which takes 50 times as long."""
    if holds_arrays:
        return True
    allowed = allowed_globals()
    found = set(_GLOBAL.findall(skeleton))  # also finds texts and numbers that look like a GLOBAL
    return any(f"{module.decode()}.{name.decode()}" not in allowed for module, name in found)


@dataclass
class Rebuild:
    """One unpickling. `run` may be called once. Its 14 attributes are the arguments of torch.load and the values derived from them."""

    skeleton: bytes
    provider: StorageProvider
    source: str
    map_location: Any
    weights_only: bool
    pickle_module: Any
    load_args: dict[str, Any]
    places: Sequence[str] | None = None
    """The location for each storage, by number; None: `map_location` decides."""
    beyond_torch: bool = False
    """Whether a restricted load also accepts the types of `harmless`."""
    _loaded: dict[int, Any] = field(default_factory=dict)
    _typed: dict[tuple[int, torch.dtype], TypedStorage] = field(default_factory=dict)

    def run(self) -> Any:
        """Unpickle the object. pickle.UnpicklingError with torch's text if a restricted load refuses something."""
        self._restore_location = restore_location(self.map_location)
        self._to_meta = is_meta_location(self.map_location)
        self._fake = fake_mode() is not None  # asking takes as long as rebuilding a tensor
        try:
            if not self.weights_only:
                return self._unpickle(self.pickle_module)
            try:
                return self._unpickle(harmless if self.beyond_torch else restricted)
            except pickle.UnpicklingError as error:
                raise pickle.UnpicklingError(_weights_only_message(str(error))) from None
        except (CheckpointError, MemoryError, pickle.UnpicklingError):
            raise
        except Exception as error:
            module, function = _origin(error)
            if module in _OF_THE_STREAM:  # IndexError, KeyError, EOFError …: the stream itself is invalid
                raise self._damage("pickle stream", "one that torch can read", error) from error
            if module == "torch._utils" and function in _PLACES_A_TENSOR:
                raise self._damage("a tensor", "a place within its storage", error) from error
            raise
        finally:
            self._loaded.clear()
            self._typed.clear()

    def _unpickle(self, module: Any) -> Any:
        class Unpickler(module.Unpickler):  # type: ignore[misc]
            def find_class(self, module_name: str, name: str) -> Any:
                if type(name) is str and "Storage" in name:
                    try:
                        return StorageType(name)
                    except KeyError:
                        pass
                return super().find_class(_MOVED_MODULES.get(module_name, module_name), name)

        unpickler = Unpickler(io.BytesIO(self.skeleton), **self.load_args)
        unpickler.persistent_load = self._persistent_load
        with loading_to(self.map_location):
            result = unpickler.load()
            forget_sparse_tensors()  # the list is for torch's own check, which knows no names and no jagged tensors
        self._require_fit(result)
        return result

    def _require_fit(self, result: Any) -> None:
        """CorruptCheckpointError for tensors that do not fit their storages, or whose parts do not fit together."""
        if self._fake:
            return
        if self.weights_only:
            self._require_storages_as_long_as_they_were()
        if (self.weights_only or invariants.asked_for()) and invariants.may_hold_composites(self.skeleton):
            invariants.require_fit(result, self.source)

    def _require_storages_as_long_as_they_were(self) -> None:
        """On the host a storage cannot grow. On devices, torch enlarges a storage for a tensor that ends outside of it; the added bytes
        would be memory of somebody else.
        """
        for number, value in self._loaded.items():
            if isinstance(value, UntypedStorage) and value.nbytes() != self.provider.n_bytes(number):
                found = f"one that ends at byte {value.nbytes()}"
                raise self._damage(
                    f"a tensor of storage {number}", f"a place within its {self.provider.n_bytes(number)} bytes", found
                )

    def _damage(self, place: str, expected: str, found: object) -> CorruptCheckpointError:
        return CorruptCheckpointError(self.source, [Damage("skeleton", place, expected, reprlib.repr(found))])

    def _persistent_load(self, saved_id: Any) -> Any:
        if not isinstance(saved_id, tuple) or len(saved_id) not in (5, 9) or _text(saved_id[0]) != "storage":
            raise self._damage("persistent id", '("storage", type, key, location, elements)', saved_id)
        kind, key, location, numel = saved_id[1], _text(saved_id[2]), _text(saved_id[3]), saved_id[4]
        if not isinstance(key, str) or not _STORAGE_NUMBER.fullmatch(key) or not isinstance(location, str):
            raise self._damage("persistent id", "a storage number and a location", (key, location))
        number = int(key)
        n_bytes = self.provider.n_bytes(number)
        if n_bytes is None:
            raise self._damage(f"storage {key}", "a storage of the directory", "none of that number")
        dtype = torch.uint8 if kind is UntypedStorage else getattr(kind, "dtype", None)
        if not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise self._damage(f"storage {key}", "a storage type and a number of elements", (kind, numel))
        if numel * dtype.itemsize != n_bytes:
            raise self._damage(f"storage {key}", f"{n_bytes} bytes", f"{numel} elements of {dtype}")
        if number not in self._loaded:
            if len(saved_id) == 9:
                self._loaded[number] = self._array(number, n_bytes, *saved_id[5:])
            else:
                self._loaded[number] = self._storage(number, n_bytes, location)
        value = self._loaded[number]
        if isinstance(value, np.ndarray) != (len(saved_id) == 9):
            raise self._damage(f"storage {key}", "one kind of object", "an array and a storage")
        if isinstance(value, np.ndarray):
            return value
        # One for each element type: an empty storage may occur with several types.
        typed = self._typed.get((number, dtype))
        if typed is None:
            typed = self._typed[number, dtype] = TypedStorage(wrap_storage=value, dtype=dtype, _internal=True)
        return typed

    def _storage(self, number: int, n_bytes: int, location: str) -> UntypedStorage:
        if self._fake:
            storage = fake_storage(n_bytes, location)
        elif self._to_meta or not self.provider.has_data(number):
            storage = UntypedStorage(n_bytes, device="meta")
        else:
            taken = self.provider.take(number)
            if self.places is None:
                storage = self._restore_location(taken, location)
            else:
                storage = torch.serialization.default_restore_location(taken, self.places[number])
        return storage

    def _array(
        self, number: int, n_bytes: int, mark: Any, dtype_text: Any, shape: Any, order: Any
    ) -> np.ndarray[Any, Any]:
        words = '("ndarray", dtype, shape, "C" or "F")'
        if (
            mark != "ndarray"
            or not isinstance(dtype_text, str)
            or order not in ("C", "F")
            or not isinstance(shape, tuple)
        ):
            raise self._damage(f"storage {number}", words, (mark, dtype_text, shape, order))
        element = element_type(NUMPY_PREFIX + dtype_text)
        if element is None or len(shape) > 64 or not all(type(size) is int and size >= 0 for size in shape):
            raise self._damage(f"storage {number}", words, (mark, dtype_text, shape, order))
        numel = 1
        for size in shape:
            numel *= size
        if numel * element.n_bytes != n_bytes or not self.provider.has_data(number):
            raise self._damage(f"storage {number}", f"an array of {n_bytes} bytes", (dtype_text, shape))
        if self.weights_only:
            _refuse_array_unless_allowed(np.dtype(dtype_text))
        storage = self.provider.take(number)
        flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (n_bytes,), (1,)).numpy()
        return np.ndarray(shape, np.dtype(dtype_text), flat, order=order)


def _refuse_array_unless_allowed(dtype: np.dtype[Any]) -> None:
    """torch refuses small arrays, which are in the pickle, with this text; large arrays must behave the same."""
    names = user_allowed_globals()
    allowed = list(names.values())
    here = (any(name.endswith("multiarray._reconstruct") for name in names), np.ndarray in allowed, np.dtype in allowed)
    for name, present in zip(_ARRAY_GLOBALS, here, strict=True):
        if not present:
            raise pickle.UnpicklingError(
                f"Unsupported global: GLOBAL {name} was not an allowed global by default. "
                f"Please use `torch.serialization.add_safe_globals([{name}])` or the "
                f"`torch.serialization.safe_globals([{name}])` context manager to allowlist this global "
                "if you trust this class/function."
            )
    if type(dtype) not in allowed:
        raise pickle.UnpicklingError(
            "Can only build Tensor, Parameter, OrderedDict or types allowlisted "
            f"via `add_safe_globals`, but got {type(dtype)}"
        )


def _text(value: Any) -> Any:
    """Decode a string that is bytes in the stream, as written by Python 2 or by a hostile writer."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _origin(error: BaseException) -> tuple[str, str]:
    """Module and function of the innermost Python frame that the error passed through."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "", ""
    return str(trace.tb_frame.f_globals.get("__name__")), trace.tb_frame.f_code.co_name


def _weights_only_message(message: str) -> str:
    """torch.load's text for a refusal. torch makes it inside of torch.load, so the text is repeated here: users search for it."""
    advice: str = torch.serialization.UNSAFE_MESSAGE
    docs = (
        "\n\nCheck the documentation of torch.load to learn more about types accepted by default with "
        "weights_only https://pytorch.org/docs/stable/generated/torch.load.html."
    )
    if re.search(r"GLOBAL (\S+) was not an allowed global by default.", message):
        return (
            "Weights only load failed. This file can still be loaded, to do so you have two options, "
            "\033[1mdo those steps only if you trust the source of the checkpoint\033[0m. "
            f"\n\t(1) {advice}\n\t(2) Alternatively, to load with `weights_only=True` please check "
            "the recommended steps in the following error message.\n\tWeightsUnpickler error: " + message + docs
        )
    if re.search(r"(\S+) must be (\S+) to load", message):
        return f"Weights only load failed. {message}\n {advice}\n"
    text = f"Weights only load failed. {advice}\n"
    if not re.search(r"whose module (\S+) is blocked", message):
        text += (
            "Please file an issue with the following so that we can make "
            "`weights_only=True` compatible with your use case: WeightsUnpickler error: "
        )
    return text + "\n\n" + message + docs
