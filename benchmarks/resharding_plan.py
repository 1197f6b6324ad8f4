"""One rank's plan, in a process of its own: `python -m benchmarks.resharding_plan FOLDER rows|columns ANSWER`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks import measure
from benchmarks.processes import answer
from benchmarks.resharding_votes import SAVE
from fastckpt.format.wholes import Box, Wholes, overlaps, touches
from fastckpt.reading.assembly import Move, Source, Target, _Layout
from fastckpt.repository.commit import read_commit
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.store.local import LocalStore


class Counting(LocalStore):
    n_bytes_read = 0

    def get(self, key: str) -> bytes:
        found = super().get(key)
        self.n_bytes_read += len(found)
        return found

    def get_into(self, key: str, offset: int, out: Any) -> None:
        super().get_into(key, offset, out)
        self.n_bytes_read += len(memoryview(out).cast("B"))


def box_of(cut: str, ranks: int, shape: tuple[int, ...]) -> Box:
    """What the second rank of three quarters as many has."""
    there = max(1, ranks * 3 // 4)
    if cut == "rows":
        step = -(-shape[0] // there)
        return (step, 0), (step, shape[1])
    return (0, 1), (shape[0], 1)


def main(folder: str, cut: str, out: str) -> None:
    load_average = os.getloadavg()[0]
    store = Counting(folder)
    commit = read_commit(store, SAVE.checkpoint)
    span = measure.Span()
    began_s, began_cpu_s, before = time.perf_counter(), time.process_time(), store.n_bytes_read
    ranks = SavedRanks(store, commit)  # type: ignore[arg-type]
    first = ranks.vote(0).directory.tensors[0].place
    assert first is not None
    box = box_of(cut, commit.world, first.shape)
    wholes = Wholes(lambda name, block: touches(block, [box]))
    ranks.list_in(wholes, 0)
    looked_s = time.perf_counter() - began_s
    targets = []
    for name, whole in wholes.found.items():
        moves = []
        for one in overlaps(whole.blocks, box):
            start = one.block.offset + sum(at * step for at, step in zip(one.within, one.block.stride, strict=True))
            moves.append(Move(Source(one.block.rank, one.block.storage, start, one.block.stride, one.shape), one.to))
        targets.append(Target(whole.dtype, box[1], tuple(moves), name))
    needed = {source.rank for target in targets for source, _ in target.moves}
    layout = _Layout({rank: ranks.vote(rank) for rank in needed})
    for target in targets:
        layout.plan(target)
    reader = layout.reader()
    answer(
        {
            "seconds": round(time.perf_counter() - began_s, 2),
            "of them for directories": round(looked_s, 2),
            "processor seconds": round(time.process_time() - began_cpu_s, 2),
            "memory, bytes": span.peak(),
            "read, bytes": store.n_bytes_read - before,
            "votes needed": len(needed),
            "chunks planned": len(reader.records),
        },
        load_average,
        out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
