"""Saves and loads through torch.distributed.checkpoint, without ranks."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastckpt.dcp import FastckptReader, FastckptWriter

IGNORED = "ignore:torch.distributed is (disabled|unavailable):UserWarning"
"""What torch says of every save and load of one process."""
HAS_USE_COLLECTIVES = "use_collectives" in inspect.signature(dcp_save).parameters


def save(url: str | os.PathLike[str], state: dict[str, Any], **settings: Any) -> Any:
    writer = settings.pop("writer", None) or FastckptWriter()
    return dcp_save(state, checkpoint_id=url, storage_writer=writer, **settings)


def load(url: str | os.PathLike[str], state: dict[str, Any], **settings: Any) -> dict[str, Any]:
    reader = settings.pop("reader", None) or FastckptReader()
    dcp_load(state, checkpoint_id=url, storage_reader=reader, **settings)
    return state


def cause(error: CheckpointException, rank: int = 0) -> BaseException:
    """What rank's error a CheckpointException carries."""
    return error.failures[rank][0]


def packs(url: str | os.PathLike[str]) -> list[Path]:
    return sorted(Path(url).glob("data/*/*/*.pack"))


def flip(path: Path, at: int) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
