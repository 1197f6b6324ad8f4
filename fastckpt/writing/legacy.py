"""torch's format from before 1.6, written atomically."""

from __future__ import annotations

import os
from typing import IO, Any, cast

from fastckpt.host.sink import Sink, committing
from fastckpt.host.torch_names import torch_save
from fastckpt.options import Options
from fastckpt.writing.target import open_target


def save_legacy(obj: object, f: Any, pickle_module: Any, pickle_protocol: int, options: Options) -> None:
    """Save as torch.save does with `_use_new_zipfile_serialization=False`. Raises what torch.save and `open_target` raise."""
    sink = open_target(f, "save", options)
    with committing(sink):
        if isinstance(f, (str, os.PathLike)):
            file: Any = _SinkFile(sink)
        else:  # torch's own function may look at more of the object than `write`
            sink.wait()
            file = f
        torch_save(obj, cast(IO[bytes], file), pickle_module, pickle_protocol, False)


class _SinkFile:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: Any) -> int:
        self._sink.write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass
