"""The end of a run: after a notice, after an exception, or by `close`."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NoReturn, Protocol

from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit
from fastckpt.host.deadline import Deadline
from fastckpt.host.threads import ENV_EXIT_TIMEOUT, exit_timeout_s, hurried
from fastckpt.spot import Notice, NoticeSource, Watcher, WorkerErrors
from fastckpt.spot.ladder import Rung
from fastckpt.training.engine import Engine
from fastckpt.training.final_save import final_save
from fastckpt.training.save_queue import CommitHandle
from fastckpt.training.saver import Saver
from fastckpt.training.settled import Settled
from fastckpt.writing.rank import SaveAsked

EXIT_CODE_NOTICE = 75
"""EX_TEMPFAIL of sysexits.h: the job is not finished, start it again. Every launcher treats it as a failure that is worth a restart."""
_SIGNAL_DELAY_S = 1.0  # a signal takes some ms on a busy machine; a process that exits by an error can wait that long


class Ending:
    """See the module. Used by the thread that trains."""

    def __init__(
        self,
        engine: Engine,
        saver: Saver,
        on_exception: Literal["save"] | None,
        close_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """on_exception: "save" saves the last step once more, if the objects still have its state. close_timeout_s: the time that saves in
        flight get then. clock, sleep: for the notice that may still be on its way; deadlines of notices refer to the clock.
        """
        self._clock, self._sleep = clock, sleep
        self._engine, self._saver = engine, saver
        self._on_exception, self._close_timeout_s = on_exception, close_timeout_s
        self._settled = Settled(engine.live.targets, engine.fence.hooks)
        self._worker_errors = WorkerErrors(functools.partial(is_changing, weakref.ref(self)))
        self._watcher: Watcher | None = None
        self._pid = os.getpid()
        self._trained_by = threading.main_thread()
        self._final: Notice | None = None
        self._closed = False
        self.left = False
        """True after the final save: the training loop should end."""

    # -- notices -------------------------------------------------------------------------------------------------------

    def watch(self, sources: list[NoticeSource]) -> None:
        """Listen to these sources from now on."""
        if sources:
            self._watcher = Watcher(sources, at_signal=self._worker_errors.hold_for_good, clock=self._clock)
            self._watcher.start()

    @property
    def notice(self) -> Notice | None:
        """The notice that ends this run, or None."""
        return self._final or (self._watcher.final if self._watcher is not None else None)

    @property
    def may_go_early(self) -> bool:
        """Whether a notice said that this machine will go sooner than others."""
        return self._watcher is not None and self._watcher.early is not None

    def notice_after_step(self) -> Notice | None:
        """The notice that is there when a step ends. If there is none, errors of data-loader workers that were kept since the last step are
        raised.
        """
        notice = self._watcher.final if self._watcher is not None else None
        if notice is None and self._watcher is not None and self._watcher.takes_signals:
            self._worker_errors.hold()
            notice = self._behind_worker_errors()
        return notice

    def _behind_worker_errors(self) -> Notice | None:
        held = self._worker_errors.take()
        if not held:
            return None
        notice = self.notice_behind(held[0])
        if notice is None:
            raise held[0]
        for error in held:
            self._worker_errors.keep(error)  # kept for the log
        return notice

    def notice_behind(self, error: BaseException | None) -> Notice | None:
        """The notice that probably caused this exception, even if it is still on its way. A launcher signals one process after the other,
        and the kernel may deliver a signal to a thread that is not running yet; other processes of the group may already be dead by then.
        """
        if os.getpid() != self._pid:
            return None
        end_s = self._clock()
        if isinstance(error, (RuntimeError, OSError, EOFError)) and self._watcher is not None and not self._closed:
            end_s += _SIGNAL_DELAY_S if self._watcher.takes_signals else 0.0
        while (notice := self.notice) is None and self._clock() < end_s:
            self._sleep(0.01)
        return notice

    # -- the state of the last step ------------------------------------------------------------------------------------

    def mark_step(self) -> None:
        """Note that the objects are now as a finished step left them."""
        self._trained_by = threading.current_thread()
        if self._watcher is not None or self._on_exception is not None:
            self._settled.mark()

    def forget_step(self) -> None:
        """Note that the objects are about to change by something other than a step."""
        self._settled.forget()

    def _may_be_saved(self, step: int) -> bool:
        """Whether the objects still have the state of the last step, after an exception of unknown origin. Logs the reason if they do
        not.
        """
        moved = self._settled.moved
        if moved is None and not self._settled.sees_steps and self._on_exception != "save":
            moved = "no optimizer was seen to say when it begins a step, so one may have begun"
        if moved is not None:
            logger.warning("the state is not saved as step %d: %s", step, moved)
        return moved is None

    # -- the last saves ------------------------------------------------------------------------------------------------

    def save_finally(
        self,
        asked: SaveAsked,
        notice: Notice,
        rung: Rung | None = None,
        begin: Callable[[SaveAsked, Deadline], CommitHandle] | None = None,
    ) -> None:
        """The final save of a run that a notice ends. Raises if no step could be made durable in time. begin, rung: see `final_save`."""
        self._final = notice
        self._worker_errors.hold_for_good()
        saver, queue = self._saver, self._engine.queue
        final_save(begin or saver.begin, saver, queue, notice, rung, asked, self._engine.repository.url)
        self.left = True

    def after_exception(self, notice: Notice | None, last: SaveAsked | None) -> None:
        """Wait up to `close_timeout_s` for saves in flight. A new save begins only if a notice has come, or if `on_exception` asks for it.

        last: the last complete step; None: no step may be saved.
        """
        # No fence here: a fence may take max_stall_s, and nobody trains until this returns.
        deadline = Deadline.after(self._close_timeout_s, f"close_timeout_s = {self._close_timeout_s:g} s")
        if notice is not None:
            self._save_last(notice, last)
            deadline = notice.deadline.sooner(deadline)
        elif (
            self._on_exception == "save"
            and last is not None
            and not self._saver.is_saved(last.step)
            and self._may_be_saved(last.step)
            and self._engine.queue.wait_idle(self._close_timeout_s)
        ):
            self._settled.put_back()
            self._saver.begin(replace(last, trigger="exception"), deadline)
        self._end_saves(deadline)

    def _save_last(self, notice: Notice, last: SaveAsked | None) -> None:
        """After an exception that followed a notice: make the newest step durable that still exists."""
        if self.left:
            return
        if self._engine.team is not None:  # the other ranks may be at another step, or dead
            last = None
        queue, saver = self._engine.queue, self._saver
        if last is not None and saver.is_saved(last.step):
            given_up = any(job.step == last.step and job.handle.done() for job in queue.jobs)
            if given_up:  # its copy was interrupted, and its memory is needed
                queue.wait_fewer(1, notice.deadline.left_s())
        if last is not None and (saver.is_saved(last.step) or self._may_be_saved(last.step)):
            if not saver.is_saved(last.step):
                self._settled.put_back()
            try:
                self.save_finally(replace(last, trigger="notice"), notice)
            except Exception as error:  # a lost device allows no new copy; a copy that is already complete on the host can still be saved
                logger.error("%s: %s: %s", notice.source, type(error).__name__, error)
            else:
                return
        left_s = notice.deadline.left_s()
        with hurried():
            queue.wait_idle(self._close_timeout_s if left_s is None else left_s)
        durable = self.durable
        logger.warning(
            "%s: what stands is %s", notice.source, "no step" if durable is None else f"step {durable.save.step}"
        )

    @property
    def durable(self) -> Commit | None:
        """The newest checkpoint that this run has made or restored."""
        return self._engine.queue.last_commit or self._saver.restored

    # -- waiting for saves ---------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Wait until saves under way are durable and retention has applied its rules, but no longer than the machine stays.

        SaveError after FASTCKPT_EXIT_TIMEOUT_S: a store that hangs must not keep the process alive.
        """
        limit = Deadline.after(exit_timeout_s(), f"{ENV_EXIT_TIMEOUT} = {exit_timeout_s():g} s")
        if self.notice is not None:
            limit = limit.sooner(self.notice.deadline)
        self._end_saves(limit)
        if self.notice is None:  # so that the rules of `keep` hold when a run has ended
            self._engine.queue.retaining.wait_idle(self._close_timeout_s)

    def _end_saves(self, deadline: Deadline) -> None:
        """Wait for the saves, and give up those that are not durable by the deadline. SaveError in that case."""
        queue = self._engine.queue
        self._engine.incarnation.uplink.limit.lift()
        with hurried(), self._engine.fence.attended():
            idle = queue.wait_idle(deadline.left_s())
        if not idle:
            queue.cancel()
            raise SaveError(
                f"saves of steps {[job.step for job in queue.jobs]} were not durable after {deadline.why} and were given up. Earlier "
                "checkpoints are as they were"
            )

    def close(self) -> None:
        """Put signal handlers back and stop listening. Kept errors of workers are logged. May be called twice."""
        self._closed = True
        try:
            if self._watcher is not None:
                self._watcher.close()
        finally:
            self._worker_errors.close()
            for error in self._worker_errors.take():
                logger.warning("kept back while the state was changing or saved: %s: %s", type(error).__name__, error)

    @property
    def changes_now(self) -> bool:
        """Whether the main thread must not be interrupted now: because it updates the state, or because another thread trains."""
        return self._engine.fence.hooks.begun or self._trained_by is not threading.main_thread()


def is_changing(reference: weakref.ref[Ending]) -> bool:
    """`Ending.changes_now` for a signal handler: it holds only a weak reference to the object."""
    living = reference()
    return living is not None and living.changes_now


def exit_after(notice: Notice, error: BaseException) -> NoReturn:
    """End the process with the notice's exit status, after an exception that followed the notice. SystemExit, with the error as its
    cause.
    """
    logger.error(
        "%s had told of the end before this exception came: the exit status is %d",
        notice.source,
        EXIT_CODE_NOTICE,
        exc_info=error,
    )
    raise SystemExit(EXIT_CODE_NOTICE) from error


class _Noticed(Protocol):
    @property
    def notice(self) -> Notice | None: ...


def in_a_hurry(reference: weakref.ref[_Noticed]) -> Callable[[], bool]:
    """Make a function that tells whether a notice has come, or the object was collected. It holds only a weak reference."""

    def call() -> bool:
        living = reference()
        return living is None or living.notice is not None

    return call
