"""Private names of torch that fastckpt uses: each name once, with the versions that have it, and the fallback without it.

No other module uses a name of torch that begins with an underscore (tests/unit/test_torch_names.py reads the sources). `make test-matrix`
runs all tests on the oldest and the newest supported torch. A newer torch is not refused: if it lacks a name, the error comes when the name
is needed.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.storage import TypedStorage, UntypedStorage

TORCH_VERSION = str(torch.__version__)


def _missing(name: str, what_for: str) -> ImportError:
    from fastckpt._version import __version__

    return ImportError(
        f"torch {torch.__version__} has no {name}, which fastckpt {__version__} needs for {what_for}. It was tried with torch 2.6 to 2.14: "
        "install one of these, or a newer fastckpt"
    )


# The functions as they are now: a program may replace torch.load by fastckpt.load, and then our calls must not call ourselves.
torch_load, torch_save = torch.serialization.load, torch.serialization.save


# -- loading -------------------------------------------------------------------------------------------------------------

try:
    from torch import _weights_only_unpickler
except ImportError as error:
    raise _missing("_weights_only_unpickler", "loads that run no foreign code") from error

restricted: Any = _weights_only_unpickler
"""torch's restricted unpickler, used as a pickle module. Since 1.13."""

try:
    from torch.serialization import _get_restore_location
except ImportError as error:
    raise _missing("serialization._get_restore_location", "map_location") from error
restore_location: Any = _get_restore_location
"""map_location → a function that moves a storage there. Since 0.4."""


def user_allowed_globals() -> dict[str, Any]:
    """Name → class or function that the program has allowed with `torch.serialization.add_safe_globals`. Since 2.4."""
    found: dict[str, Any] = restricted._get_user_allowed_globals()
    return found


def allowed_globals() -> dict[str, Any]:
    """Name → class or function that torch itself allows. Since 1.13."""
    found: dict[str, Any] = restricted._get_allowed_globals()
    return found


def read_global(readline: Callable[[], bytes]) -> tuple[str, str]:
    """Module and name of a GLOBAL operation, as torch reads the two lines. Since 2.5; without it, as pickle does."""
    read = getattr(restricted, "_read_global_instruction", None)
    if read is None:
        return readline()[:-1].decode("utf-8"), readline()[:-1].decode("utf-8")
    module, name = read(readline)
    return module, name


def load_allowing(unpickler: Any, allowed: Callable[[], dict[str, Any]]) -> Any:
    """Call `restricted.Unpickler.load` with another list of allowed globals. The list is replaced for this call only, because a change of
    torch's own list would hold for the whole process. Since 1.13; if torch's function is built differently, only torch's list is used.
    """
    load = restricted.Unpickler.load
    with contextlib.suppress(
        AttributeError, TypeError, ValueError
    ):  # torch's function may be wrapped, or have become a closure
        load = types.FunctionType(load.__code__, {**vars(restricted), "_get_user_allowed_globals": allowed}, "load")
    return load(unpickler)


def is_meta_location(map_location: Any) -> bool:
    """Whether the load shall read no data. torch's own `_is_meta_location` came with 2.7."""
    return bool(map_location == "meta" or map_location == torch.device("meta"))


@contextlib.contextmanager
def loading_to(map_location: Any) -> Iterator[None]:
    """Make this map_location visible to torch's functions that rebuild tensors without a storage (wrapper subclasses, tensors rebuilt from
    arrays). Since 2.1 it is thread-local (`_serialization_tls`); torch itself leaves it set when unpickling raises.
    """
    local: Any = torch.serialization._serialization_tls
    before = local.map_location
    local.map_location = map_location
    try:
        yield
    finally:
        local.map_location = before


def fake_mode() -> Any:
    """The FakeTensorMode that is active, or None. Since 2.0.

    It can be active only after its module was imported. Asking torch earlier would import that module and sympy, which takes 0.3 s.
    """
    if "torch._subclasses.fake_tensor" not in sys.modules:
        return None
    return torch._guards.detect_fake_mode(None)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no data, on a device other than "meta". Since 2.0."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def fake_storage(n_bytes: int, location: str) -> UntypedStorage:
    """A storage of a load under a FakeTensorMode. Since 2.6."""
    storage = UntypedStorage(n_bytes, device="meta")
    storage._fake_device = location  # type: ignore[assignment]
    return storage


def forget_sparse_tensors() -> None:
    """Empty torch's list of rebuilt sparse tensors that wait for torch's own check. Since 1.13; without the list there is nothing to do."""
    waiting = getattr(torch._utils, "_sparse_tensors_to_validate", None)
    if waiting is not None:
        waiting.clear()


validate_sparse_coo: Any = torch._validate_sparse_coo_tensor_args
"""RuntimeError for indices outside of a shape. Since 1.13; `check_pinning` came with 2.9."""
validate_sparse_compressed: Any = torch._validate_sparse_compressed_tensor_args
"""The same check for the compressed layouts."""


def storage_behind(reference: StorageWeakRef) -> UntypedStorage | None:
    """The storage of a weak reference; None if it was freed. Since 2.1."""
    found: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(reference.cdata)
    return found


# -- saving --------------------------------------------------------------------------------------------------------------


def skips_data() -> bool:
    """Whether torch.serialization.skip_data is active. Since 2.6; older versions cannot skip data."""
    return bool(getattr(torch.serialization._serialization_tls, "skip_data", False))


def untyped_of(storage: TypedStorage) -> UntypedStorage:
    """All versions since 2.0. The public attribute warns: TypedStorage is deprecated, but torch still pickles it."""
    return storage._untyped_storage


def class_of(storage: TypedStorage) -> Any:
    """torch's class for its element type, which is the name in pickles. All versions since 2.0."""
    return getattr(torch, storage._pickle_storage_type())


def identity(storage: UntypedStorage) -> int:
    """The address of the storage itself: the same for all tensors over it, even if different Python objects represent it. All versions."""
    address: int = storage._cdata
    return address


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place. All versions; RuntimeError for tensors made under inference_mode."""
    count: int = tensor._version
    return count


def check_dill(pickle_module: Any) -> None:
    """Check `pickle_module` as torch.save and torch.load do. Since 1.5; without it, dill raises its own error."""
    check = getattr(torch.serialization, "_check_dill_version", None)
    if check is not None:
        check(pickle_module)


def check_can_write(f: Any) -> None:
    """Check a target as torch.save does: AttributeError with its text. Since 1.6."""
    check = getattr(torch.serialization, "_check_save_filelike", None)
    if check is not None:
        check(f)
    elif not hasattr(f, "__fspath__") and not isinstance(f, str) and not hasattr(f, "write"):
        raise AttributeError("expected 'f' to be string, path, or a file-like object with a 'write' attribute")


def check_can_seek(f: Any) -> None:
    """Check a source as torch.load does: AttributeError with its text. Since 0.4."""
    check = getattr(torch.serialization, "_check_seekable", None)
    if check is not None:
        check(f)
    else:
        f.seek(f.tell())


# -- tensors -------------------------------------------------------------------------------------------------------------


def without_subclasses() -> contextlib.AbstractContextManager[Any]:
    """Context in which attributes of tensors are read without calling `__torch_function__` of subclasses. Since 2.0."""
    found: contextlib.AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return found


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a storage of its own: wrapper subclasses and some layouts have none. Since 1.13."""
    return torch._C._has_storage(tensor)


def dtensor_class() -> Any:
    """torch's DTensor; None where no program has imported it, so that there can be none. Importing it takes 0.5 s. Since 2.5."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def sharded_tensor_class() -> Any:
    """What came before DTensor, and still is in states of FSDP1 and torchrec. None where no program has imported it. Since 1.11."""
    return getattr(sys.modules.get("torch.distributed._shard.sharded_tensor.api"), "ShardedTensor", None)


def known_placements() -> tuple[type, ...]:
    """Placements that cut as torch.chunk does: `Shard`, and the one of what FSDP has cut after tensor parallelism. Since 2.5."""
    found = (
        getattr(sys.modules.get("torch.distributed.tensor.placement_types"), name, None)
        for name in ("Shard", "_StridedShard")
    )
    return tuple(kind for kind in found if kind is not None)


def local_of(tensor: Any) -> torch.Tensor | None:
    """A DTensor's own shard; None for other tensors. Since 2.5 (`to_local` takes part in autograd, this does not)."""
    kind = dtensor_class()
    if kind is None or not isinstance(tensor, kind):
        return None
    local: torch.Tensor = tensor._local_tensor
    return local


def process_group_store() -> tuple[Any, Any]:
    """The store of the default process group by a connection of its own, where torch can make one, and the group's own object: as long as
    that is kept, the store is there, although the group may be destroyed. Since 1.9; `clone` since 2.9.

    Without a connection of its own a request may have to wait for one of torch's, which wait for other ranks.
    """
    try:
        from torch.distributed.distributed_c10d import _get_default_store
    except ImportError as error:
        raise _missing("distributed_c10d._get_default_store", "saves of several ranks") from error
    store = _get_default_store()
    clone = getattr(store, "clone", None)
    if clone is None:
        return store, store
    try:
        return clone(), store
    except (RuntimeError, NotImplementedError):  # a store of somebody's own
        return store, store


def dtensor_around(local: torch.Tensor, like: Any) -> Any:
    """A DTensor, without gradients, whose shard is `local`, spread as another one is. No collectives. `from_local` since 2.5.

    It would move a shard that is offloaded from the mesh's devices: such a one goes by the constructor, with a `_spec`, as since 2.5.
    """
    kind, mesh = dtensor_class(), like.device_mesh
    whole: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    local = local.detach()
    with torch.no_grad():
        if local.device.type == mesh.device_type or local.is_meta:
            return kind.from_local(local, mesh, like.placements, **whole)
        shell = kind.from_local(torch.empty_like(local, device="meta"), mesh, like.placements, **whole)
        return kind(local, shell._spec, requires_grad=False)


def replicated_like(tensor: torch.Tensor, like: Any) -> Any:
    """A DTensor that each rank of another one's mesh has all of. No collectives. `from_local` without placements since 2.5."""
    return dtensor_class().from_local(tensor, like.device_mesh, run_check=False)


# -- modules -------------------------------------------------------------------------------------------------------------

METADATA = "_metadata"
"""The attribute of a module's state dict that has versions of classes, by paths. Since 0.4."""


def compiled_module_attribute(kind: type) -> str | None:
    """Under which name modules that torch.compile has made have the one that it was given; None for other classes. Since 2.0.

    There can be such modules only once theirs was imported; importing it takes 1 s.
    """
    made = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return "_orig_mod" if made is not None and issubclass(kind, made) else None


def persistent_buffers(module: torch.nn.Module) -> list[str]:
    """Names of the buffers that a module itself, not one in it, saves. `_non_persistent_buffers_set` since 1.6."""
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def gradient_hooks(module: torch.nn.parallel.DistributedDataParallel) -> list[Any]:
    """What averages the gradients in place of torch's own way; [] where nothing does. A list of the module since 2.0."""
    return [hook for hook, _ in getattr(module, "_comm_hooks", ())]


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, negated when it is read. `torch._neg_view` since 1.10."""
    found: torch.Tensor = torch._neg_view(tensor)
    return found
