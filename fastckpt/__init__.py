"""fastckpt: a checkpoint storage engine for PyTorch.

    the way out                                               the way back
    state ─→ chunking ─→ codec ─→ format ─→ file       file ─→ reader ─→ restore ─→ state
    nested   where to    bytes →  container  atomic           verified   decoded     unpickled,
    objects  cut         fewer    + index    replace          index      in threads  restricted
             └────────── save.py moves it all ─────┘

`save`, `load` and `save_async` take torch.save's and torch.load's arguments; `open` fetches single tensors by name.
docs/architecture.md has the whole map, docs/format.md the bytes.
"""

from __future__ import annotations

import importlib.metadata as _metadata

from fastckpt import errors, events
from fastckpt._version import __version__
from fastckpt.api import SaveHandle, get_unsafe_globals, load, open, save, save_async
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    EmptyCheckpointError,
    NotACheckpointError,
    SaveError,
    TooLargeError,
    UnknownTensorError,
    UnsupportedFormatError,
)
from fastckpt.options import Options
from fastckpt.tensors import TensorReader

__all__ = [
    "CheckpointError",
    "CorruptCheckpointError",
    "EmptyCheckpointError",
    "NotACheckpointError",
    "Options",
    "SaveError",
    "SaveHandle",
    "TensorReader",
    "TooLargeError",
    "UnknownTensorError",
    "UnsupportedFormatError",
    "__version__",
    "errors",
    "events",
    "get_unsafe_globals",
    "load",
    "open",
    "save",
    "save_async",
]


def _refuse_namesake() -> None:
    """The distribution called fastckpt on PyPI is another project with a package of the same name; ours is fastckpt-engine."""
    try:
        other = _metadata.version("fastckpt")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the unrelated PyPI package `fastckpt` {other} is installed over this one, and their files mix in one folder. "
        "Mend it with: pip uninstall -y fastckpt fastckpt-engine && pip install fastckpt-engine"
    )


_refuse_namesake()
