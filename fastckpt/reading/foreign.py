"""Reads files of other formats: torch.save's and safetensors, so that a caller can switch to fastckpt.load while old files exist."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from fastckpt.errors import NotACheckpointError
from fastckpt.host.torch_names import fake_mode, torch_load
from fastckpt.reading.sources import FileObjectSource, Source
from fastckpt.state import invariants

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_TAR_MAGIC_OFFSET = 257


def warn_unused_arguments() -> None:
    """Emit torch.load's warning at the line that called `fastckpt.load`, two calls above."""
    warnings.warn("pickle_load_args only works if `weights_only=False`.", stacklevel=4)


def load(f: Any, source: Source, map_location: Any, pickle_module: Any, **arguments: Any) -> Any:
    """Give the file to the loader of its own format. NotACheckpointError if it has no known format."""
    head = bytearray(min(512, source.n_bytes))
    source.read_into(0, head)
    if isinstance(source, FileObjectSource):
        source.seek_to(0)
    path = os.fsdecode(os.fspath(f)) if isinstance(f, (str, os.PathLike)) else ""
    safetensors = _looks_like_safetensors(head, source.n_bytes)
    if path.endswith(".safetensors") and not safetensors:
        return torch_load(f, map_location, pickle_module, **arguments)  # torch's own errors apply to its content
    if head.startswith((_ZIP, _PICKLE)) or head[_TAR_MAGIC_OFFSET : _TAR_MAGIC_OFFSET + 5] == b"ustar":
        loaded = torch_load(f, map_location, pickle_module, **arguments)
        may_run_code = arguments.get("weights_only") is False or pickle_module is not None
        if not may_run_code and fake_mode() is None:
            invariants.require_fit(
                loaded, source.name
            )  # torch before 2.14 checks nothing, later versions check only sparse tensors
        return loaded
    if safetensors:
        return _load_safetensors(source, path, map_location)
    raise NotACheckpointError(
        f"{source.name} is not a checkpoint: it starts with {bytes(head[:8])!r}; known are fastckpt containers (b'FASTCKPT'), "
        "torch.save's zip, pickle and tar files, and safetensors. If it was a checkpoint once, its beginning and end are gone"
    )


def _looks_like_safetensors(head: bytes | bytearray, n_bytes: int) -> bool:
    header_bytes = int.from_bytes(head[:8], "little")
    return len(head) > 9 and 2 <= header_bytes <= n_bytes - 8 and head[8:9] == b"{"


def _load_safetensors(source: Source, path: str, map_location: Any) -> dict[str, torch.Tensor]:
    """Not with torch.load: older versions cannot read safetensors."""
    import safetensors.torch

    if map_location is not None and not isinstance(map_location, (str, torch.device)):
        kind = "dict" if isinstance(map_location, dict) else "callable"
        raise RuntimeError(
            f"Loading safetensors file with {kind} map_location is not supported. "
            "Use a device string or torch.device instead."
        )
    with torch.device("cpu"):  # even if the program has set another default device
        if path:
            return safetensors.torch.load_file(path, str(map_location or "cpu"))
        data = bytearray(source.n_bytes)
        source.read_into(0, data)
        tensors = safetensors.torch.load(bytes(data))
    if isinstance(source, FileObjectSource):
        source.seek_to(source.n_bytes)
    return {name: tensor if map_location is None else tensor.to(map_location) for name, tensor in tensors.items()}
