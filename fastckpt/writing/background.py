"""Writing a captured state to its target: before the call returns, or on a thread behind it."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.events import logger
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.host.sink import Sink, abandoning
from fastckpt.host.threads import start_thread
from fastckpt.options import Options
from fastckpt.state import Captured
from fastckpt.state.chunks import ChunkSource, LiveChunks
from fastckpt.writing.container import start_workers, write
from fastckpt.writing.handles import SaveHandle
from fastckpt.writing.ordered_sink import OrderedSink


def write_now(
    captured: Captured, sink: Sink, target: str, options: Options, skeleton_s: float, source: ChunkSource | None = None
) -> int:
    """Write the state as a container and commit it; returns its bytes. On any error the sink is abandoned.

    source: gives the state's chunks; None: they are read from the state itself.
    """
    with abandoning(sink):
        pool = start_workers(captured, options)
        return write(captured, sink, target, options, pool, skeleton_s, source)


def write_behind(
    captured: Captured,
    open_sink: Callable[[], OrderedSink],
    handle: SaveHandle,
    options: Options,
    skeleton_s: float,
    source: ChunkSource,
) -> None:
    """Write the source's copy of the state on a thread of its own; `handle` reports the outcome. Takes ownership of the source, and of the
    sink that it opens.

    If the source is the state itself, or the interpreter is ending and allows no thread, the state is written before this returns, and
    errors are raised here.
    """
    sink: OrderedSink | None = None
    thread = pool = None

    def run() -> None:
        assert sink is not None
        try:
            handle.durable.set_result(write(captured, sink, handle.target, options, pool, skeleton_s, source))
        except BaseException as error:
            logger.error("saving %s in the background failed: %s: %s", handle.target, type(error).__name__, error)
            handle.durable.set_exception(error)

    try:
        sink = open_sink()
        sink.expect(captured.n_bytes)
        pool = start_workers(captured, options)
        if not isinstance(source, LiveChunks):
            with deferred_interrupt():  # source, sink and handle change their owner here
                thread = start_thread(run, "fastckpt-save")
                if thread is not None:
                    sink.hand_over()
        if thread is None:
            handle.durable.set_result(write(captured, sink, handle.target, options, pool, skeleton_s, source))
        handle.staged.set_result(None)
    except BaseException:
        if thread is None:  # otherwise the thread goes on, although nobody gets its handle
            if pool is not None:
                pool.close()
            if sink is not None:
                sink.abandon()
            source.close()
        raise
