"""Writing a captured state to its target: before the call returns, or on a thread behind it."""

from __future__ import annotations

from fastckpt.events import logger
from fastckpt.host.sink import Sink
from fastckpt.host.threads import start_thread
from fastckpt.options import Options
from fastckpt.state import Captured
from fastckpt.state.chunks import ChunkSource, LiveChunks
from fastckpt.writing.container import start_workers, write
from fastckpt.writing.handles import SaveHandle
from fastckpt.writing.ordered_sink import OrderedSink


def write_now(captured: Captured, sink: Sink, target: str, options: Options, skeleton_s: float) -> int:
    """Write the state itself as a container and commit it; returns its bytes. On any error the sink is abandoned."""
    try:
        pool = start_workers(captured, options)
    except BaseException:
        sink.abandon()
        raise
    return write(captured, sink, target, options, pool, skeleton_s)


def write_behind(
    captured: Captured, sink: OrderedSink, handle: SaveHandle, options: Options, skeleton_s: float, source: ChunkSource
) -> None:
    """Write the source's copy of the state on a thread of its own; `handle.durable` tells how it went. Takes the sink and the source.

    Where the source is the state itself, or the interpreter's end allows no thread, it is written before this returns, and an error raised.
    """
    try:
        pool = start_workers(captured, options)
    except BaseException:
        source.close()
        sink.abandon()
        raise

    def run() -> None:
        try:
            handle.durable.set_result(write(captured, sink, handle.target, options, pool, skeleton_s, source))
        except BaseException as error:
            logger.error("saving %s in the background failed: %s: %s", handle.target, type(error).__name__, error)
            handle.durable.set_exception(error)

    thread = None
    if not isinstance(source, LiveChunks):
        try:
            thread = start_thread(run, "fastckpt-save")
            if thread is not None:
                sink.hand_over()
        except BaseException:
            if pool is not None:
                pool.close()
            sink.abandon()
            source.close()
            raise
    if thread is None:
        handle.durable.set_result(write(captured, sink, handle.target, options, pool, skeleton_s, source))
