"""A load → jobs for threads: ranges of files, and batches of chains. Pure.

    bytes are read ahead, into buffers:   chains → their rows, the newest first → ranges, with whatever lies beside them
    each row is read where it belongs:    chains → batches, each for one thread

The newest rows of a chain are small: if they come first, and the whole row that they are relative to comes last, little has to be kept
until a chain can be decoded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fastckpt.format.records import Records
from fastckpt.reading.chains import Chain
from fastckpt.reading.ranges import Limits, Part, Range, plan


class Batch(NamedTuple):
    """Chains that one thread reads and decodes, row by row."""

    chains: tuple[int, ...]


Job: TypeAlias = Range | Batch


class Jobs(NamedTuple):
    """See the module."""

    all: Sequence[Job]
    settles: Sequence[tuple[int, ...]]
    """Of each job: the wanted chunks that may come to their places with it."""
    of_chunk: Mapping[int, Sequence[int]]
    """Of each wanted chunk: numbers of the jobs that it needs."""


def rows_needed(wanted: Iterable[int], chains: Sequence[Chain]) -> list[int]:
    """The rows that a load reads, each once."""
    found = dict.fromkeys(wanted)
    for chain in chains:
        found |= dict.fromkeys(link.row for link in chain.links)
    return list(found)


def plan_jobs(wanted: Sequence[int], chains: Sequence[Chain], records: Records, limits: Limits, *, ahead: bool) -> Jobs:
    """The jobs of a load.

    Args:
        wanted: numbers of chunks, each once, in the order in which they are needed.
        chains: of those (`plan_chains`).
        records: of all chunks.
        limits: of ranges and batches.
        ahead: whether stored bytes are read into buffers before they are decoded.
    """
    chain_of = {chunk: number for number, chain in enumerate(chains) for chunk in chain.wanted}
    plain = [chunk for chunk in wanted if chunk not in chain_of]
    jobs: list[Job]
    if not chains:
        jobs = [*plan(plain, records, limits)]
    elif ahead:
        jobs = [*_ranges(wanted, chain_of, chains, records, limits)]
    else:
        jobs = [*plan(plain, records, limits), *_batches(chains, records, limits)]
    settles = [tuple(_settled(job, chains)) for job in jobs]
    of_chunk: dict[int, list[int]] = defaultdict(list)
    for number, chunks in enumerate(settles):
        for chunk in chunks:
            of_chunk[chunk].append(number)
    return Jobs(jobs, settles, of_chunk)


def _settled(job: Job, chains: Sequence[Chain]) -> dict[int, None]:
    if isinstance(job, Batch):
        numbers: Iterable[int] = job.chains
    else:
        numbers = dict.fromkeys(chain for part in job.parts for chain, _ in part.takers)
    found = dict.fromkeys(chunk for number in numbers for chunk in chains[number].wanted)
    return found if isinstance(job, Batch) else dict.fromkeys(job.chunks) | found


def _ranges(
    wanted: Sequence[int], chain_of: Mapping[int, int], chains: Sequence[Chain], records: Records, limits: Limits
) -> list[Range]:
    """Ranges of plain chunks and of the rows of chains. Bytes that several chains need soon after each other are read once."""
    fields = [records[name].tolist() for name in ("file", "offset", "stored_bytes", "raw_bytes")]
    files, offsets, stored, raw = fields
    rows: list[int] = []
    takers: list[list[tuple[int, int]]] = []
    """Of each row; none of a plain chunk."""
    known: dict[tuple[int, int, int], tuple[int, int]] = {}
    """Stored bytes of chains → where they are among the rows, and how many raw bytes had been wanted before."""
    begun: set[int] = set()
    at = 0
    for chunk in wanted:
        number = chain_of.get(chunk)
        if number is None:
            rows.append(chunk)
            takers.append([])
        elif number not in begun:
            begun.add(number)
            for row in _read(chains[number], stored):
                key = files[row], offsets[row], stored[row]
                place, before = known.get(key, (-1, 0))
                if place < 0 or not stored[row] or at - before > limits.reach_bytes:
                    place, _ = known[key] = len(rows), at
                    rows.append(row)
                    takers.append([])
                takers[place].append((number, row))
        at += raw[chunk]
    found = []
    for one in plan(range(len(rows)), records[rows], limits):
        parts = tuple(Part(rows[at], tuple(takers[at])) for at in one.chunks if takers[at])
        found.append(one._replace(chunks=tuple(rows[at] for at in one.chunks if not takers[at]), parts=parts))
    return found


def _read(chain: Chain, stored: Sequence[int]) -> list[int]:
    """The rows of a chain that are read, the newest first; one of those that store nothing if there are no others."""
    rows = [link.row for link in reversed(chain.links)]
    return [row for row in rows if stored[row]] or rows[:1]


def _batches(chains: Sequence[Chain], records: Records, limits: Limits) -> list[Batch]:
    found: list[Batch] = []
    batch: list[int] = []
    held = 0
    for number, chain in enumerate(chains):
        raw_bytes = int(records["raw_bytes"][[link.row for link in chain.links]].sum())
        if batch and held + raw_bytes > limits.raw_bytes:
            found.append(Batch(tuple(batch)))
            batch, held = [], 0
        batch.append(number)
        held += raw_bytes
    return [*found, Batch(tuple(batch))] if batch else found
