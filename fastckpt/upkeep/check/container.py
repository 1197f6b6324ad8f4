"""Checks a container without loading it: every checksum, every chunk decoded, every finding listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format import records
from fastckpt.kernels.transform import MAX_RAW_BYTES, transform_name
from fastckpt.reading.chunk_reader import Reader, affected
from fastckpt.reading.sources import Source


@dataclass
class ContainerReport:
    """All findings of a check. `ok` is True if everything was checked and is right."""

    source: str
    chunks: int = 0
    raw_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """Sentences about parts that this version cannot read, and so cannot vouch for."""

    @property
    def ok(self) -> bool:
        return not self.damage and not self.not_checked

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all lost tensors."""
        return affected(self.damage)


def check_container(source: Source, progress: Callable[[int, int], None] = lambda done, total: None) -> ContainerReport:
    """Read and verify every byte of a container. Damage is reported, never raised. Takes 8 MiB besides the index, for any size of
    container.

    Args:
        progress: called on this thread with chunks done and chunks in all.

    Raises:
        UnsupportedFormatError: only a newer version reads this container.
        OSError: it cannot be read.
    """
    report = ContainerReport(source.name)
    try:
        reader = Reader.open(source, alone=True)
    except CorruptCheckpointError as error:
        report.damage.extend(error.damage)
        return report
    report.chunks = len(reader.records)
    bits = reader.footer.header.unknown_check_features
    if bits:
        report.not_checked.append(f"check features {bits:#x} of a newer fastckpt")
    unread = set(records.unsupported(reader.records))
    for number in sorted(unread):
        name = transform_name(int(reader.records["transform"][number]))
        report.not_checked.append(
            f"chunk {number}: transform {name} (affects {', '.join(reader.tensors_of(number)[:3])})"
        )
    unread = records.unreadable(reader.records)  # and what is made from them
    out = np.empty(MAX_RAW_BYTES, np.uint8)
    for number in range(report.chunks):
        progress(number, report.chunks)
        if number in unread:
            continue
        n_bytes = int(reader.records["raw_bytes"][number])
        found = reader.read_chunk(number, out[:n_bytes])
        if found is not None:
            report.damage.append(found)
        report.raw_bytes += n_bytes
    progress(report.chunks, report.chunks)
    return report
