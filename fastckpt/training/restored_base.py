"""After a restore, the restored checkpoint is the base of the next save: where its chunks are stored, and their bytes in memory.

    same layout ──→ rows of the index that was read; bytes: a snapshot of the objects, each chunk compared with its row's digest
    another one ──→ rows of several ranks' indexes; bytes: of the tensors that were put together, as they were before the objects got them

Nothing here is needed for a checkpoint to be right: whatever cannot be found, or is not what the checkpoint has, is stored whole by the
next save. So no error of it is an error of the restore.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fastckpt._types import U8
from fastckpt.events import logger
from fastckpt.format.digest import digest
from fastckpt.format.repository_records import Parent
from fastckpt.format.tensor_names import Name
from fastckpt.host.threads import start_thread
from fastckpt.host.torch_names import local_of
from fastckpt.snapshot import DoesNotFit, Snapshot
from fastckpt.snapshot.base_slabs import BaseSlabs
from fastckpt.snapshot.copy_plan import CopyPlan, plan_copies
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts
from fastckpt.state.naming import named_tensors
from fastckpt.state.sealing import seal
from fastckpt.state.shards import is_box
from fastckpt.training.base_places import Placed, place_chunks, stretches_of_many, stretches_of_one
from fastckpt.training.engine import Engine
from fastckpt.training.restorer import Loaded
from fastckpt.writing.bases import Base

Prints = Mapping[Name, bytes]
"""Digests of tensors that were put together, by name."""


class RestoredBase:
    """See the module. Used by the thread that trains."""

    def __init__(self, engine: Engine, *, read_only: bool) -> None:
        self._live, self._stager, self._bases = engine.live, engine.stager, engine.queue.bases
        self._is_wanted = engine.options.deltas and not read_only

    def before(self, found: Loaded) -> Prints:
        """Note what was read, before the objects get it: what somebody changes on the way must not count as the checkpoint's."""
        if not self._is_wanted or found.together is None:
            return {}
        return {name: digest(content) for name, content in _contents(found.state)}

    def after(self, found: Loaded, prints: Prints) -> None:
        """The objects have the state of a checkpoint: it is the base of the next save. prints: of `before`."""
        self._bases.drop()
        if not self._is_wanted:
            return
        try:
            looked = self._live.peek()
            if looked is not None:
                self._take(found, *looked, prints)
        except Exception as error:
            logger.info("the next save will be a whole one: %s: %s", type(error).__name__, error)
            self._bases.drop()

    def _take(self, found: Loaded, captured: Captured, cuts: Cuts, prints: Prints) -> None:
        placed = _placed(found, captured, cuts)
        sealed, parent = seal(captured), Parent(found.commit.checkpoint, found.commit.digest)
        form = sealed.storages, sealed.tensors, sealed.chunks
        base = Base(parent, *form, placed.places, placed.records, placed.files, None, time.monotonic())
        self._bases.restored(base)
        plan = self._plan(captured, cuts)
        if plan is None:
            return
        digests = placed.digests(cuts)
        if found.together is not None:
            self._fill(base, plan, captured, cuts, dict(_contents(found.state)), prints, digests)
            return
        snapshot = self._stager.begin(captured, cuts, None, found.commit.save.step, ring=False)
        if snapshot is not None:
            snapshot.fence("restore")
            compare = functools.partial(self._compare, base, snapshot, digests)
            if start_thread(compare, "fastckpt-base") is None:  # the interpreter is ending
                compare()

    def _plan(self, captured: Captured, cuts: Cuts) -> CopyPlan | None:
        """Where the bytes go. None: they do not fit the budget beside the snapshot of a save."""
        pool = self._stager.pool
        try:
            plan = plan_copies(captured, cuts, pool.budget_bytes, None, ring=False)
        except DoesNotFit:
            return None
        return plan if cuts.chunks and 2 * sum(plan.layout.slab_bytes) <= pool.budget_bytes else None

    def _compare(self, base: Base, snapshot: Snapshot, digests: Mapping[int, bytes]) -> None:
        """Keep of a snapshot the chunks that are what the checkpoint has."""
        memory = snapshot.base
        assert memory is not None
        try:
            scratch = np.empty(0, np.uint8)  # not used: all chunks lie in slabs
            same: set[int] = set()
            for number in range(len(base.chunks)):
                if memory.is_dropped or self._bases.newest is not base:
                    return
                if digest(snapshot.raw(number, scratch)) == digests.get(number):
                    same.add(number)
                else:
                    memory.disown(number)
                snapshot.release(number)
            snapshot.confirm()
            prints = snapshot.prints()
            self._bases.complete(base, memory, None if prints is None else prints.only(same))
        except Exception as error:
            logger.info("the bytes of what was restored are not kept: %s: %s", type(error).__name__, error)
        finally:
            snapshot.close()

    def _fill(
        self,
        base: Base,
        plan: CopyPlan,
        captured: Captured,
        cuts: Cuts,
        contents: Mapping[Name, U8],
        prints: Prints,
        digests: Mapping[int, bytes],
    ) -> None:
        """Keep the chunks of tensors that were put together, and are still what they were."""
        pool = self._stager.pool
        slabs = pool.take_all(plan.layout.slab_bytes, plan.for_device)
        if slabs is None:
            return
        places = dict(zip(plan.order, plan.layout.slots, strict=True))
        memory = BaseSlabs(pool.bases, places, [chunk.n_bytes for chunk in cuts.chunks])
        try:
            of_storage = _by_storage(captured, contents, prints)
            for number, slot in list(places.items()):
                chunk = cuts.chunks[number]
                target = slabs[slot.slab].array[slot.offset : slot.offset + chunk.n_bytes]
                at = 0
                for piece in chunk.pieces if base.places[number] is not None else ():
                    content = of_storage.get(piece.storage)
                    if content is not None:
                        target[at : at + piece.n_bytes] = content[piece.offset : piece.offset + piece.n_bytes]
                        at += piece.n_bytes
                if at != chunk.n_bytes or digests.get(number, digest(target)) != digest(target):
                    memory.disown(number)
            for number, slab in enumerate(slabs):
                memory.keep(number, slab)
            self._bases.complete(base, memory)
        finally:
            pool.give_back(slabs)  # those that are not kept


def _placed(found: Loaded, captured: Captured, cuts: Cuts) -> Placed:
    if found.together is None:
        assert found.reader is not None
        rank = found.reader.directory.rank
        return place_chunks(cuts, stretches_of_one(captured, found.reader.directory, rank), {rank: found.reader})
    ranks, first, wholes = found.together
    of_first = stretches_of_one(captured, ranks.whole(first).directory, first)
    stretches = stretches_of_many(captured, wholes, of_first)
    needed = {first, *(one.rank for some in stretches.values() for one in some)}
    return place_chunks(cuts, stretches, {rank: ranks.whole(rank) for rank in sorted(needed)})


def _contents(state: Any) -> Iterator[tuple[Name, U8]]:
    """The bytes of the contiguous tensors of a state, by name. On a device: copied."""
    for named in named_tensors(state):
        if isinstance(named.value, torch.Tensor):
            tensor = local_of(named.value)
            tensor = named.value if tensor is None else tensor
            if tensor.layout is torch.strided and tensor.is_contiguous() and tensor.device.type != "meta":
                flat = tensor.detach().cpu().reshape(-1)
                yield named.name, flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _by_storage(captured: Captured, contents: Mapping[Name, U8], prints: Prints) -> dict[int, U8]:
    """The bytes of live storages, as they were read: of those that are one tensor, whose bytes have not changed since."""
    found: dict[int, U8] = {}
    for entry in captured.tensors:
        name = entry.name[:-2] if is_box(entry) else entry.name
        content = contents.get(name)
        if (
            content is not None
            and entry.storage not in found
            and not entry.offset
            and captured.storages[entry.storage].n_bytes == content.nbytes
            and prints.get(name) == digest(content)
        ):
            found[entry.storage] = content
    return found


__all__ = ["Prints", "RestoredBase"]
