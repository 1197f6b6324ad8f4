"""Files that fastckpt did not write: torch.save's formats and safetensors, so that a caller can switch before old files are gone."""

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
    """torch.load's warning, at the line that called `fastckpt.load`, two calls above."""
    warnings.warn("pickle_load_args only works if `weights_only=False`.", stacklevel=4)


def load(f: Any, source: Source, map_location: Any, pickle_module: Any, **arguments: Any) -> Any:
    """Hand the file to its own loader. NotACheckpointError if it is nobody's."""
    head = bytearray(min(512, source.n_bytes))
    source.read_into(0, head)
    if isinstance(source, FileObjectSource):
        source.seek_to(0)
    path = os.fsdecode(os.fspath(f)) if isinstance(f, (str, os.PathLike)) else ""
    safetensors = _looks_like_safetensors(head, source.n_bytes)
    if path.endswith(".safetensors") and not safetensors:
        return torch_load(f, map_location, pickle_module, **arguments)  # its words for what it finds there
    if head.startswith((_ZIP, _PICKLE)) or head[_TAR_MAGIC_OFFSET : _TAR_MAGIC_OFFSET + 5] == b"ustar":
        loaded = torch_load(f, map_location, pickle_module, **arguments)
        may_run_code = arguments.get("weights_only") is False or pickle_module is not None
        if not may_run_code and fake_mode() is None:
            invariants.require_fit(
                loaded, source.name
            )  # torch before 2.14 does not look, later ones at sparse tensors only
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
    """Not by torch.load: older versions do not read them."""
    import safetensors.torch

    if map_location is not None and not isinstance(map_location, (str, torch.device)):
        kind = "dict" if isinstance(map_location, dict) else "callable"
        raise RuntimeError(
            f"Loading safetensors file with {kind} map_location is not supported. "
            "Use a device string or torch.device instead."
        )
    with torch.device("cpu"):  # whatever the program's default device is
        if path:
            return safetensors.torch.load_file(path, str(map_location or "cpu"))
        data = bytearray(source.n_bytes)
        source.read_into(0, data)
        tensors = safetensors.torch.load(bytes(data))
    if isinstance(source, FileObjectSource):
        source.seek_to(source.n_bytes)
    return {name: tensor if map_location is None else tensor.to(map_location) for name, tensor in tensors.items()}
