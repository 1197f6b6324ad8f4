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
from fastckpt.state.chunking import Chunk, Cuts
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
        try:
            return {name: digest(_bytes_of(tensor)) for name, tensor in _tensors_of(found)}
        except Exception as error:
            logger.info("the bytes of what is restored will not be kept: %s: %s", type(error).__name__, error)
            return {}

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
        digests = placed.digests(cuts)
        base = Base(parent, *form, placed.places, placed.records, placed.files, None, time.monotonic(), digests)
        self._bases.restored(base)
        plan = self._plan(captured, cuts)
        if plan is None:
            return
        if found.together is not None:
            put_together = _PutTogether(found, captured, prints)
            self._fill(base, plan, cuts, put_together, digests)
            return
        snapshot = self._stager.begin(captured, cuts, None, found.commit.save.step, ring=False)
        if snapshot is None:
            return
        try:
            snapshot.fence("restore")
            compare = functools.partial(self._compare, base, snapshot, digests)
            if start_thread(compare, "fastckpt-base") is None:  # the interpreter is ending
                compare()
        except BaseException:
            snapshot.close()
            raise

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
                if self._bases.newest is not base:  # nobody needs the rest
                    break
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
        self, base: Base, plan: CopyPlan, cuts: Cuts, put_together: _PutTogether, digests: dict[int, bytes]
    ) -> None:
        """Keep the chunks of tensors that were put together, and are still what they were. digests: gets those of chunks without one."""
        pool = self._stager.pool
        slabs = pool.take_all(plan.layout.slab_bytes, plan.for_device)
        if slabs is None:
            return
        places = dict(zip(plan.order, plan.layout.slots, strict=True))
        memory = BaseSlabs(pool.bases, places, cuts.chunks)
        try:
            for number, slot in list(places.items()):
                chunk = cuts.chunks[number]
                target = slabs[slot.slab].array[slot.offset : slot.offset + chunk.n_bytes]
                known = base.places[number] is not None and put_together.read(chunk, target)
                if not known or (theirs := digest(target)) != digests.setdefault(number, theirs):
                    memory.disown(number)
            for number, slab in enumerate(slabs):
                memory.keep(number, slab)
            self._bases.complete(base, memory)
        finally:
            pool.give_back(slabs)  # those that are not kept


class _PutTogether:
    """The bytes of tensors that were put together from blocks of several ranks, each of which was verified when it was read."""

    def __init__(self, found: Loaded, captured: Captured, prints: Prints) -> None:
        """captured: the live objects, whose storages have the bytes now. prints: of the tensors before the objects got them."""
        known = dict(_tensors_of(found))
        self._tensors: dict[int, torch.Tensor] = {}
        """By the number of a live storage: of those that are one such tensor, which nobody has changed since."""
        for entry in captured.tensors:
            name = entry.name[:-2] if is_box(entry) else entry.name
            tensor = known.get(name)
            if (
                tensor is not None
                and entry.storage not in self._tensors
                and not entry.offset
                and captured.storages[entry.storage].n_bytes == tensor.nbytes
                and prints.get(name) == digest(_bytes_of(tensor))
            ):
                self._tensors[entry.storage] = tensor
        self._last: tuple[int, U8] = -1, np.empty(0, np.uint8)
        """A storage and its bytes: those on a device are copied, one at a time."""

    def read(self, chunk: Chunk, out: U8) -> bool:
        """Fill `out` with a chunk's bytes. False: not all of them are known."""
        at = 0
        for storage, offset, n_bytes in chunk.pieces:
            if storage not in self._tensors:
                return False
            if self._last[0] != storage:
                self._last = storage, _bytes_of(self._tensors[storage])
            out[at : at + n_bytes] = self._last[1][offset : offset + n_bytes]
            at += n_bytes
        return True


def _placed(found: Loaded, captured: Captured, cuts: Cuts) -> Placed:
    if found.together is None:
        assert found.reader is not None
        rank = found.reader.directory.rank
        return place_chunks(cuts, stretches_of_one(captured, found.reader.directory, rank), {rank: found.reader})
    ranks, first, assembled = found.together
    of_first = stretches_of_one(captured, ranks.whole(first).directory, first)
    stretches = stretches_of_many(captured, assembled, of_first)
    needed = {first, *(one.rank for some in stretches.values() for one in some)}
    return place_chunks(cuts, stretches, {rank: ranks.whole(rank) for rank in sorted(needed)})


def _tensors_of(found: Loaded) -> Iterator[tuple[Name, torch.Tensor]]:
    """This rank's parts of what was put together, by name. What else a state has may be anybody's: `reassign` decides."""
    assert found.together is not None
    for named in named_tensors(found.state):
        whole = found.together.assembled.get(named.name)
        if whole is not None and whole.was_spread and isinstance(named.value, torch.Tensor):
            part = local_of(named.value)
            tensor = named.value if part is None else part
            if tensor.layout is torch.strided and tensor.is_contiguous() and tensor.numel():
                yield named.name, tensor.detach()


def _bytes_of(tensor: torch.Tensor) -> U8:
    found: U8 = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return found


__all__ = ["Prints", "RestoredBase"]
