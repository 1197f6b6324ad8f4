"""Writing a sealed state to its target: before the call returns, or on a thread behind it."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.events import logger
from fastckpt.format.sealed_state import SealedState
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.host.sink import Sink, abandoning
from fastckpt.host.threads import start_thread
from fastckpt.options import Options
from fastckpt.writing.container import start_workers, write
from fastckpt.writing.handles import SaveHandle
from fastckpt.writing.ordered_sink import OrderedSink


def write_now(sealed: SealedState, sink: Sink, target: str, options: Options, skeleton_s: float) -> int:
    """Write the state as a container and commit it; returns its bytes. On any error the sink is abandoned."""
    with abandoning(sink):
        pool = start_workers(sealed.own_bytes, options)
        return write(sealed, sink, target, options, pool, skeleton_s)


def write_behind(
    sealed: SealedState,
    open_sink: Callable[[], OrderedSink],
    handle: SaveHandle,
    options: Options,
    skeleton_s: float,
    *,
    private: bool,
) -> None:
    """Write the state on a thread of its own; `handle` reports the outcome. Takes ownership of the source of its chunks, and of the sink
    that it opens.

    private: the source has copies. Otherwise, or if the interpreter is ending and allows no thread, the state is written before this
    returns, and errors are raised here.
    """
    sink: OrderedSink | None = None
    thread = pool = None

    def run() -> None:
        assert sink is not None
        try:
            handle.durable.set_result(write(sealed, sink, handle.target, options, pool, skeleton_s))
        except BaseException as error:
            logger.error("saving %s in the background failed: %s: %s", handle.target, type(error).__name__, error)
            handle.durable.set_exception(error)

    try:
        sink = open_sink()
        sink.expect(sealed.n_bytes)
        pool = start_workers(sealed.own_bytes, options)
        if private:
            with deferred_interrupt():  # source, sink and handle change their owner here
                thread = start_thread(run, "fastckpt-save")
                if thread is not None:
                    sink.hand_over()
        if thread is None:
            handle.durable.set_result(write(sealed, sink, handle.target, options, pool, skeleton_s))
        handle.staged.set_result(None)
    except BaseException:
        if thread is None:  # otherwise the thread goes on, although nobody gets its handle
            if pool is not None:
                pool.close()
            if sink is not None:
                sink.abandon()
            sealed.source.close()
        raise
