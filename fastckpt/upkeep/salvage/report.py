"""The report of a salvage, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastckpt.format.directory import GlobalPlace
from fastckpt.format.keys import CheckpointId
from fastckpt.format.tensor_names import Name, to_json
from fastckpt.host.files import AtomicFile
from fastckpt.host.sink import committing


@dataclass(frozen=True)
class FoundIn:
    """Another checkpoint that has an undamaged tensor of the same name, shape and type."""

    checkpoint: CheckpointId
    rank: int


@dataclass
class LostTensor:
    """A tensor that could not be read."""

    name: Name
    dtype: str
    shape: tuple[int, ...]
    why: tuple[str, ...]
    found_in: FoundIn | None = None
    """The newest living checkpoint that has it; checkpoints of the history come first. None: no checkpoint has it."""
    assumed: bool = False
    """The index is lost; another checkpoint shows that this tensor must have existed."""
    place: GlobalPlace | None = None


@dataclass
class SalvagedRank:
    """The result for one rank."""

    rank: int
    file: str | None = None
    """The container with the tensors that were saved. None: no tensor could be saved."""
    saved: list[str] = field(default_factory=list)
    """Keys of the dictionary in `file`: dotted names. Names that look the same get #2, #3, … at their end."""
    saved_bytes: int = 0
    lost: list[LostTensor] = field(default_factory=list)
    lost_whole: bool = False
    """The rank's index is lost, and with it all tensors."""
    object_whole: bool = True
    """Whether the pickled object around the tensors (Python state) is undamaged; it is not part of `file`."""
    notes: list[str] = field(default_factory=list)


@dataclass
class SalvageReport:
    """The result of `salvage`. `nothing_lost`: all tensors of all requested ranks were written."""

    url: str
    checkpoint: CheckpointId
    attempt: int
    world: int
    commit: str
    """"whole", or the problem of the commit record."""
    ranks: list[SalvagedRank] = field(default_factory=list)

    @property
    def nothing_lost(self) -> bool:
        return not any(rank.lost or rank.lost_whole or not rank.object_whole for rank in self.ranks)

    @property
    def lost(self) -> list[tuple[int, LostTensor]]:
        """(rank, tensor) of every lost tensor."""
        return [(rank.rank, tensor) for rank in self.ranks for tensor in rank.lost]


def report_to_json(report: SalvageReport) -> dict[str, Any]:
    """The members of report.json and of `--json` (docs/cli.md), without `schema`."""
    return {
        "url": report.url,
        "epoch": report.checkpoint.epoch,
        "step": report.checkpoint.step,
        "try": report.attempt,
        "world": report.world,
        "commit": report.commit,
        "nothing_lost": report.nothing_lost,
        "ranks": [
            {
                "rank": rank.rank,
                "file": None if rank.file is None else Path(rank.file).name,
                "saved": rank.saved,
                "saved_bytes": rank.saved_bytes,
                "lost_whole": rank.lost_whole,
                "object_whole": rank.object_whole,
                "notes": rank.notes,
                "lost": [_lost_to_json(tensor) for tensor in rank.lost],
            }
            for rank in report.ranks
        ],
    }


def _lost_to_json(tensor: LostTensor) -> dict[str, Any]:
    found = tensor.found_in
    return {
        "name": to_json(tensor.name),
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "why": list(tensor.why),
        "assumed": tensor.assumed,
        "found_in": None
        if found is None
        else {"epoch": found.checkpoint.epoch, "step": found.checkpoint.step, "rank": found.rank},
    }


def write_report(path: str, report: SalvageReport) -> None:
    """Write report.json, whole or not at all. OSError, SaveError."""
    with committing(AtomicFile(path)) as sink:
        text = json.dumps({"schema": "fastckpt.salvage/1", **report_to_json(report)}, indent=1, ensure_ascii=True)
        sink.write(f"{text}\n".encode())
