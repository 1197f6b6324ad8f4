"""Saves of a Checkpointer in the background: one uploads while the next is staged.

A thread exists only while there is work, and the interpreter waits for it at exit: no save is lost at the end of a script, and an idle
Checkpointer does not keep the interpreter alive.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastckpt import events
from fastckpt.errors import (
    AbandonedError,
    BaseLostError,
    CorruptCheckpointError,
    SupersededError,
    TornSnapshotError,
    as_save_error,
)
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit
from fastckpt.format.sealed_state import SealedState
from fastckpt.host.threads import start_thread
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.joint_commit import JointTurn, abandon
from fastckpt.repository.retaining import Retaining
from fastckpt.repository.retention import Keep
from fastckpt.snapshot import KnownPrints, Snapshot
from fastckpt.state import Captured
from fastckpt.state.chunks import LiveChunks
from fastckpt.state.sealing import seal
from fastckpt.training.bases import Bases
from fastckpt.writing.bases import Uploaded
from fastckpt.writing.handles import Handle, Waiting
from fastckpt.writing.rank import SaveAsked, UploadThreads

MAX_JOBS = 2  # one uploads, one is staged


class CommitHandle(Handle[Commit]):
    """A save of a repository under way. The result of `durable` is the commit record, after it was seen and acknowledged. Any thread.

    You need not wait for it: the interpreter waits at exit, and the next call of the `Checkpointer` raises a failure.
    """

    def __init__(self, step: int, waiting: Waiting = contextlib.nullcontext) -> None:
        """Make the handle of a save of this step. waiting: see `Handle`."""
        super().__init__(f"step {step}", waiting)
        self.step = step


@dataclass(eq=False)
class Job:
    """One save. `source` is a Snapshot, or the live state itself: then the thread that queued the job waits for it."""

    asked: SaveAsked
    captured: Captured
    source: Snapshot | LiveChunks
    handle: CommitHandle
    threads: UploadThreads
    turn: JointTurn | None = None
    """Of a save that all ranks make."""
    owner: object = None
    """Kept alive while the job runs: an optimizer's hook needs it to wait for the source."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    reported: bool = False
    """The handle has its outcome, or is about to get it. Under the queue's lock."""
    logged: bool = False
    """The error was logged. Under the queue's lock."""

    @property
    def step(self) -> int:
        return self.asked.step

    def has_failed(self) -> bool:
        """Whether the handle carries an error, even if the save's thread still waits for the store."""
        return self.handle.done() and self.handle.durable.exception() is not None


@dataclass
class Torn:
    """A save that failed because the state changed during the copy. The training thread makes another save in its place."""

    step: int
    trigger: str
    error: TornSnapshotError


class SaveQueue:
    """Runs jobs in order. `put`, `wait_idle` and `cancel` are for the training thread; failures are collected and never raised here."""

    def __init__(
        self,
        incarnation: Incarnation,
        keep: Keep | None,
        grace_s: float,
        in_a_hurry: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        *,
        deltas: bool = True,
    ) -> None:
        """in_a_hurry: whether a notice has come; after that no retention runs. clock: measures saves; that of `SaveAsked.called_s`. deltas:
        whether a save may refer to the checkpoint before it.
        """
        self._incarnation, self._clock = incarnation, clock
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        """The running job first. A job leaves when it has ended."""
        self._worker: object = None
        """Token of the thread that runs jobs; None when there is none. A thread that finds another token here was replaced, and exits."""
        self._failures: list[BaseException] = []
        self._torn: list[Torn] = []
        self.measured_s: float | None = None
        """Seconds of the last save, from the start of the upload to the acknowledgement. Used to estimate the next one."""
        self.last_commit: Commit | None = None
        self.bases = Bases(incarnation.repository.url, wanted=deltas)
        self.retaining = Retaining(incarnation, keep, grace_s, functools.partial(bool, self._jobs), in_a_hurry)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Jobs that have not ended, oldest first."""
        with self._changed:
            return tuple(self._jobs)

    def known_prints(self, jobs: Sequence[Job]) -> KnownPrints | None:
        """The fingerprints of the newest checkpoint. None: there are none, or one of these jobs has none, and may become the newest."""
        return self.bases.prints if all(isinstance(job.source, Snapshot) for job in jobs) else None

    def put(self, job: Job) -> bool:
        """Queue a job. The caller has checked `len` before. If this raises (no thread can be started, an interrupt), the job is not queued.

        False: the interpreter is ending and allows no new thread; the caller has to call `run_here`.
        """
        with self._changed:
            before = self._worker
            try:
                self._jobs.append(job)
                if self._worker is None:
                    self._worker = worker = object()
                    return start_thread(functools.partial(self._work, worker), "fastckpt-checkpointer") is not None
                return True
            except BaseException:
                self._worker = before  # if the thread has started nevertheless, it finds another token and exits
                if job in self._jobs:
                    self._jobs.remove(job)
                raise

    def run_here(self) -> None:
        """Run the queued jobs on this thread, after `put` returned False. May be called several times."""
        if self._worker is not None:
            self._work(self._worker)

    def take_failures(self) -> list[BaseException]:
        """Return the failures since the last call."""
        with self._changed:
            failures, self._failures = self._failures, []
        return failures

    def take_torn(self) -> list[Torn]:
        """Return the torn saves since the last call. They do not count as failures, see `take_failures`."""
        with self._changed:
            torn, self._torn = self._torn, []
        return torn

    def mark_raised(self, error: BaseException) -> None:
        """Forget an error that another method has raised already."""
        with self._changed:
            self._failures = [failure for failure in self._failures if failure is not error]
            self._torn = [torn for torn in self._torn if torn.error is not error]

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no job is left. False after the time-out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and self._worker is None, timeout_s)

    def wait_fewer(self, n: int, timeout_s: float | None = None) -> bool:
        """Wait until there are fewer than n jobs. False after the time-out."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._jobs) < n, timeout_s)

    def cancel(self) -> None:
        """End all jobs at the next chunk or pack. Does not wait."""
        for job in self.jobs:
            job.cancelled.set()

    def _work(self, worker: object) -> None:
        try:
            self._run_jobs(worker)
        finally:
            with self._changed:
                if self._worker is worker:  # whatever ended this thread
                    self._worker = None
                    self._changed.notify_all()

    def _run_jobs(self, worker: object) -> None:
        while True:
            with self._changed:
                if self._worker is not worker:
                    return
                if not self._jobs:
                    self._worker = None
                    self._changed.notify_all()
                    return
                job = self._jobs[0]
            commit = self._save(job)
            if commit is not None and self._finish(job):
                job.handle.durable.set_result(commit)
            self.retaining.wake(commit is not None)
            del job, commit

    def _save(self, job: Job) -> Commit | None:
        """Run a save. None: it failed, and the failure was reported."""
        try:
            return self._run(job)
        except BaseException as raised:
            error = as_save_error(raised, job.step)
            self._log(job, error)
            if isinstance(job.source, Snapshot):
                job.source.fail(error)
                if job.source.base is not None:  # it may have been confirmed, and not be committed
                    job.source.base.drop()
            if isinstance(error, (SupersededError, BaseLostError, CorruptCheckpointError)):
                self.bases.drop()
            _forget_locals(raised)
        try:
            if self._finish(job, error):
                job.handle.durable.set_exception(error)
            return None
        finally:
            del error  # its traceback refers to this frame

    def _run(self, job: Job) -> Commit:
        started = self._clock()
        sealed, uploaded = _seal(job), list[Uploaded]()
        base = None if job.asked.full else self.bases.newest
        if base is not None:
            self.bases.tell_of_lost_memory(job.step, base)
        commit = self._incarnation.save(
            sealed,
            job.asked,
            cancelled=job.cancelled.is_set,
            threads=job.threads,
            turn=job.turn,
            base=base,
            uploaded=uploaded.append,
        )
        memory = job.source.base if isinstance(job.source, Snapshot) else None
        prints = job.source.prints() if isinstance(job.source, Snapshot) else None
        self.bases.committed(commit, sealed, uploaded[0] if uploaded else None, memory, prints)
        self.measured_s = self._clock() - started
        self.last_commit = commit
        events.emit(
            events.CheckpointDurable(
                target=self._incarnation.repository.url,
                step=job.step,
                trigger=job.asked.trigger,
                raw_bytes=commit.raw_bytes,
                stored_bytes=commit.stored_bytes,
                seconds=self._clock() - job.asked.called_s,
            )
        )
        return commit

    def _finish(self, job: Job, error: BaseException | None = None) -> bool:
        """Release what the job holds, and take it out of the queue. Returns whether the caller has to set the outcome of its handle. The
        caller does that without the lock, because a handle's callbacks are the user's code.
        """
        try:
            job.threads.close()  # does nothing if an upload has closed them
            job.source.close()
        except BaseException as raised:  # after the commit: the save is valid, even if freeing memory failed
            failure = as_save_error(raised, job.step)
            logger.error("letting go of the snapshot of step %d: %s: %s", job.step, type(failure).__name__, failure)
        with self._changed:
            reports = self._report_once(job, error)
            self._jobs.popleft()
            self._changed.notify_all()
        return reports

    def _report_once(self, job: Job, error: BaseException | None) -> bool:
        """Note the outcome. False if it was noted before. The caller holds the lock."""
        if job.reported:
            return False
        job.reported = True
        if isinstance(error, AbandonedError) and not error.is_failure:
            pass  # nothing went wrong here or elsewhere: all ranks save another step
        elif isinstance(error, TornSnapshotError):
            self._torn.append(Torn(job.step, job.asked.trigger, error))
        elif error is not None:
            self._failures.append(error)
        return True

    def fail_now(self, source: Snapshot | LiveChunks, error: BaseException) -> None:
        """Fail a save whose chunks have failed while its thread waits for something else, perhaps for ever. Whatever the thread reports
        later is ignored.
        """
        for job in self.jobs:
            if job.source is source:
                job.cancelled.set()
                outcome = as_save_error(error, job.step)
                with self._changed:
                    reports = self._report_once(job, outcome)
                if reports:
                    self._log(job, outcome)
                    job.handle.durable.set_exception(outcome)

    def _log(self, job: Job, error: BaseException) -> None:
        """Log an error once for each save: a save may be given up while its thread meets the same error."""
        with self._changed:
            if job.logged:
                return
            job.logged = True
        if isinstance(error, TornSnapshotError):
            logger.warning("step %d was not saved; the next one is, before `step` returns: %s", job.step, error)
        elif isinstance(error, AbandonedError):
            logger.warning("%s", error)
        else:
            logger.error("saving step %d failed: %s: %s", job.step, type(error).__name__, error)


def _seal(job: Job) -> SealedState:
    """Ranks that save with this one learn of it if that fails: its upload, which would tell them, does not begin then."""
    try:
        return seal(job.captured, job.source)
    except BaseException as error:
        if job.turn is not None:
            abandon(job.turn.fate, job.turn.fate.rank, error)
        raise


def _forget_locals(error: BaseException) -> None:
    """Clear the frames that an error went through. They refer to the save's buffers in a reference cycle; only the cyclic collector would
    free it, and large trainings switch that off.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__
