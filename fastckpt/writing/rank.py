"""One rank's part of a save: writes its chunks into packs and its index into a vote (docs/guarantees.md, section 3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

from fastckpt import events
from fastckpt.errors import SaveError, StoreFullError
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, vote_key
from fastckpt.format.repository_records import Parent, utc_now, writer
from fastckpt.format.sealed_state import SealedState
from fastckpt.format.vote import SaveInfo, Vote, save_to_json
from fastckpt.host import cycle_collector
from fastckpt.host.threads import WorkerPool
from fastckpt.options import Options
from fastckpt.store.base import Store
from fastckpt.writing import index_rows
from fastckpt.writing.bases import Base, Uploaded
from fastckpt.writing.casting import Casting
from fastckpt.writing.chunk_coder import ChunkCoder
from fastckpt.writing.container import start_workers
from fastckpt.writing.deltas import Deltas
from fastckpt.writing.index_rows import Built
from fastckpt.writing.packing import PackingWriter
from fastckpt.writing.packs import PackWriter
from fastckpt.writing.uplink import Uplink
from fastckpt.writing.vote_builder import build_vote


@dataclass(frozen=True)
class SaveAsked:
    """Everything a save records besides the state. Made where the save is asked for, and passed on as a whole."""

    step: int
    _: KW_ONLY
    trigger: str = "manual"
    metrics: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    called_s: float = field(default_factory=time.monotonic)
    """time.monotonic() at which the save was asked for."""
    full: bool = False
    """Whether the save must name no other one: then it is given no base."""


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """One rank's part of one try of a save."""

    asked: SaveAsked
    save: SaveId
    parent: Parent | None
    rank: int = 0
    world: int = 1


class UploadThreads(NamedTuple):
    """The threads of one upload. `upload` starts them itself unless it is given some. They are given to a save that has to wait for an
    earlier one: by the time it begins, the interpreter may be ending and allow no new threads.
    """

    encoders: WorkerPool | None
    uploaders: WorkerPool

    @classmethod
    def start(cls, raw_bytes: int, options: Options, connections: int | None = None) -> UploadThreads:
        """Start them. raw_bytes: all that is to be uploaded. connections: other than in `options`. Takes some 50 µs for each thread.

        RuntimeError if no thread can be started.
        """
        encoders = start_workers(raw_bytes, options, background=True)
        try:
            n = options.connections if connections is None else connections
            return cls(encoders, WorkerPool(n, "fastckpt-upload", nice=options.background_nice))
        except BaseException:
            if encoders is not None:
                encoders.close()
            raise

    def close(self) -> None:
        """Cancel jobs that have not begun, and wait for the others. May be called twice."""
        for pool in (self.encoders, self.uploaders):
            if pool is not None:
                pool.close()


def upload(
    sealed: SealedState,
    store: Store,
    request: SaveRequest,
    options: Options,
    cancelled: Callable[[], bool] = lambda: False,
    uplink: Uplink | None = None,
    threads: UploadThreads | None = None,
    base: Base | None = None,
    why_full: str = "",
) -> Uploaded:
    """Encode and upload a rank's state, then place its vote. Blocks; the first error cancels the rest and is raised.

    The chunks' source has to be closed by the caller. cancelled: asked before every chunk; True ends the
    save with a SaveError. uplink: kept by the caller for its next save to this store. threads: closed by this function. base: what the
    vote may name instead of uploading it: the parent, of which the caller has seen that it lives. why_full: why there is none, for events.
    Memory needed besides the state: `options.encoder_bytes` and `options.pack_bytes`.
    """
    started = time.perf_counter()
    target = f"{store.url} step {request.save.step}"
    packs: PackWriter | None = None
    uplink = uplink or Uplink(options)
    try:
        threads = threads or UploadThreads.start(sealed.own_bytes, options, uplink.link.connections)
        try:
            threads.uploaders.grow(uplink.link.connections - len(threads.uploaders))
            uplink.begin(sealed.own_bytes)
            with PackWriter(store, request.save, request.rank, threads.uploaders, uplink, cancelled) as packs:
                deltas = _deltas(sealed, base, request, options)
                coder = ChunkCoder(sealed, deltas, Casting(sealed, uplink.masters, request.rank))
                chunks = PackingWriter(sealed, packs, target, threads.encoders, uplink, options.encoders, coder)
                chunks.tell_start(skeleton_s=0.0)
                chunks.run()
                files = packs.finish()
                chunks.tell_efforts(request.save.step)
        finally:
            threads.close()
        built = index_rows.build(chunks.records, chunks.links, base, len(files), sealed.storages)
        vote, data = _build(chunks, sealed, built, files, request, packs.stored_bytes)
        vote = replace(vote, groups=sealed.groups)
        if cancelled():  # the last moment at which the save can still be cancelled
            raise SaveError(f"the save of step {request.save.step} was cancelled. Nothing was committed")
        store.put(vote_key(vote.name), data)
    except BaseException as error:
        if isinstance(error, StoreFullError) and packs is not None:
            packs.remove()  # otherwise they take the space that the next save needs, until their grace is over
        events.emit(events.SaveFailed(target=target, error=error))
        raise
    events.emit(
        events.SaveFinished(
            target=target,
            raw_bytes=sealed.own_bytes,
            file_bytes=packs.stored_bytes + len(data),
            seconds=time.perf_counter() - started,
            durable_s=0.0,
        )
    )
    _tell_deltas(target, request, coder, base, why_full)
    return Uploaded(vote, built.records, built.places, {} if deltas is None else deltas.saved)


def _deltas(sealed: SealedState, base: Base | None, request: SaveRequest, options: Options) -> Deltas | None:
    if base is None or not len(base.records) or not sealed.chunks:
        return None
    if base.parent != request.parent:
        raise SaveError(
            f"step {request.save.step} continues from {request.parent}, and its base is {base.parent}: a save may name nothing but packs "
            "of its parent. Nothing was committed"
        )
    return Deltas(base, sealed, request.rank, options.read_amplification)


def _tell_deltas(target: str, request: SaveRequest, coder: ChunkCoder, base: Base | None, why_full: str) -> None:
    chunks, raw_bytes = coder.outcome
    if base is None and not why_full and not chunks["cast"]:
        return
    events.emit(
        events.DeltasUsed(
            target=target,
            step=request.save.step,
            base_step=None if base is None else base.parent.checkpoint.step,
            chunks=dict(chunks),
            raw_bytes=dict(raw_bytes),
            why_full=why_full,
        )
    )


def _build(
    chunks: PackingWriter,
    sealed: SealedState,
    built: Built,
    files: Sequence[FileEntry],
    request: SaveRequest,
    stored_bytes: int,
) -> tuple[Vote, bytes]:
    """Build the vote and its bytes. SaveError if a reader would refuse it."""
    asked = request.asked
    seconds = time.monotonic() - asked.called_s
    info = SaveInfo(
        request.save,
        request.parent,
        asked.trigger,
        asked.metrics,
        sealed.own_bytes,
        stored_bytes,
        seconds,
        utc_now(),
    )
    listed = chunks.directory()
    listed = replace(
        listed,
        storages=built.storages,
        step=request.save.step,
        rank=request.rank,
        world=request.world,
        meta=dict(asked.meta),
        writer={**listed.writer, **writer()},
        save=save_to_json(info),
    )
    with cycle_collector.held_off():
        return build_vote(request.save, listed, [*files, *built.files], built.records, sealed.skeleton)
