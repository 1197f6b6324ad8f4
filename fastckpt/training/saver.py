"""Begins saves: captures the state, starts its copy, and queues its upload."""

from __future__ import annotations

import time
import weakref
from concurrent import futures
from dataclasses import dataclass, replace

from fastckpt import events
from fastckpt.errors import SaveError, SnapshotStalledError, as_save_error
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit
from fastckpt.host.deadline import NEVER, Deadline
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.repository.joint_commit import JointTurn
from fastckpt.snapshot import DoesNotFit, Snapshot
from fastckpt.state.chunks import LiveChunks
from fastckpt.training.engine import Engine
from fastckpt.training.fence import Permit
from fastckpt.training.joint_start import claim_jointly
from fastckpt.training.live_state import Taken
from fastckpt.training.save_queue import MAX_JOBS, CommitHandle, Job
from fastckpt.training.stats import Counts
from fastckpt.writing.rank import SaveAsked, UploadThreads


class OutOfTime(SaveError):
    """Earlier saves held the memory until the deadline."""


class Saver:
    """See the module. Used by the thread that trains. Fourteen attributes: eight are the parts of an `Engine`, by their names."""

    def __init__(self, engine: Engine, owner: weakref.ref[object], *, fresh: bool) -> None:
        """owner: kept alive while a save is under way, because its hooks have to wait for the snapshot. fresh: the first save begins a new
        history.
        """
        (
            self._live,
            self._fence,
            self._stager,
            self._queue,
            self._torn,
            self._incarnation,
            self._options,
            _,
            self._team,
            _,
        ) = engine
        self._owner, self.fresh = owner, fresh
        self._began = False
        self._prepared = 0
        """How many snapshots there was memory made for."""
        self.counts = Counts()
        self.restored: Commit | None = None
        """The checkpoint that the objects were restored from last."""

    # -- what is saved already -----------------------------------------------------------------------------------------

    def is_saved(self, step: int) -> bool:
        """Whether a step is being saved, or was the last one saved or restored."""
        last = self._incarnation.last
        return self._job_of(step) is not None or (last is not None and last.checkpoint.step == step)

    def _job_of(self, step: int) -> Job | None:
        """The job that saves a step, if it is under way and has not failed."""
        return next((job for job in self._queue.jobs if job.step == step and not job.has_failed()), None)

    def _last_commit(self) -> Commit | None:
        """The checkpoint that the next save follows, if this object has saved or restored it."""
        last = self._incarnation.last
        known = (self._queue.last_commit, self.restored)
        return next((c for c in known if c is not None and last is not None and c.checkpoint == last.checkpoint), None)

    def _handle_of(self, step: int) -> CommitHandle | None:
        """The handle of a step for which `is_saved` is true."""
        job = self._job_of(step)
        if job is not None:
            return job.handle
        last = self._last_commit()
        if last is None or last.save.step != step:
            return None
        handle = CommitHandle(step)
        handle.durable.set_result(last)
        return handle

    def refuse_other_state(self, asked: SaveAsked) -> None:
        """SaveError if the step is saved with another state: a checkpoint of a step is made once and never replaced."""
        job, last = self._job_of(asked.step), self._last_commit()
        if job is None and (last is None or last.save.step != asked.step):
            return
        changed = self._live.has_changed_since(asked.step)
        if changed is None:  # the step was restored
            changed = self.restored is not None and (self._fence.updated or self._live.has_changed_since_restore())
        if changed:
            raise SaveError(
                f"step {asked.step} has been saved or restored, and the state has changed since: a step is saved once. Nothing was "
                "committed; the checkpoint of that step is as it was. Save under the next number; to go back, call restore(step=…)"
            )
        first = job.asked if job is not None else last
        assert first is not None
        if (asked.metrics and asked.metrics != first.metrics) or (asked.meta and asked.meta != first.meta):
            logger.warning(
                "step %d is saved already, without these metrics and meta (%s): they are not recorded. Pass them to the call that saves",
                asked.step,
                ", ".join(sorted({*asked.metrics, *asked.meta})),
            )

    # -- beginning -----------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Begin a history: there is none that a restore has given. RepositoryError if there are checkpoints."""
        if self._team is None:
            self._incarnation.begin(fresh=self.fresh)
        else:
            claim_jointly(self._team, self._incarnation, fresh=self.fresh)
        self._began = True

    def begins_after(self, *, claimed: bool) -> None:
        """A restore has chosen the checkpoint that the next save follows. claimed: whether it has claimed an epoch, too."""
        self._began = claimed

    def has_restored(self, commit: Commit, *, looked_at: bool) -> None:
        """Another state was put into the objects. looked_at: remember how they look now, so that later changes can be seen."""
        self.restored = commit
        self.counts.begun_s = time.monotonic()
        if looked_at:
            self._live.remember_restored()
        self._fence.forget_updates()
        self._torn.forget()

    def prepare(self) -> None:
        """At the first step, when optimizers have their state: allocate the memory of the first save in the background, and pickle the
        state. After the first save: allocate that of the next one, while the first one's bytes are kept. Errors here are left for the save
        to raise.
        """
        if not self._prepared:
            self._prepared = 1
            if not self.counts.saves:
                try:
                    self._stager.prepare(*self._live.look(), self._fence.fenced())
                except Exception as error:
                    logger.info("nothing could be prepared for the first save: %s: %s", type(error).__name__, error)
                return
        if self._prepared == 1 and self._queue.bases.memory is not None:
            self._prepared = 2
            # A second save that has begun brought its own: a third copy of the state would never be used.
            if self.counts.saves == 1:
                self._stager.prepare_next()

    def wait_for_step(self, step: int) -> None:
        """Wait for the end of a save of this step that is under way. Its error is told as that of any other."""
        for job in self._queue.jobs:
            if job.step == step:
                with self._fence.attended():
                    job.handle.durable.exception()

    def begin(self, asked: SaveAsked, deadline: Deadline = NEVER, turn: JointTurn | None = None) -> CommitHandle:
        """Begin a save, or find it if the step is saved already. Waits for room. turn: of a save that all ranks make.

        Raises:
            OutOfTime: there was no memory for it before the deadline.
            SaveError: a save that was given up still holds the memory; or the state or the step is refused.
        """
        handle = self._handle_of(asked.step)
        while handle is None:
            handle = self.try_begin(asked, deadline, turn)
            if handle is None:
                self._wait_for_room(asked.step, deadline)
        return handle

    def begin_due(self, asked: SaveAsked, turn: JointTurn | None = None) -> CommitHandle | None:
        """Begin a save if there is room for it now; None, counted, if it has to wait for earlier ones."""
        handle = self.try_begin(asked, turn=turn)
        if handle is None:
            self.counts.deferred += 1
            url = self._incarnation.repository.url
            events.emit(events.SaveDeferred(target=url, step=asked.step, waiting=len(self._queue)))
        return handle

    def _wait_for_room(self, step: int, deadline: Deadline) -> None:
        jobs = self._queue.jobs
        if not jobs:  # the save that held the memory has just ended
            return
        limit = deadline
        if jobs[0].handle.done():  # a save that was given up ends when its request ends, which may be never
            limit = Deadline.after(self._options.max_stall_s, "max_stall_s").sooner(deadline)
        with self._fence.attended():
            if self._queue.wait_fewer(len(jobs), limit.left_s()):
                return
        if limit is deadline:
            raise OutOfTime(f"step {step} was not saved: earlier saves left no room for it within {deadline.why}")
        raise SaveError(
            f"step {step} was not saved: the save of step {jobs[0].step}, which was given up, still waits for the store and holds its "
            f"memory. Earlier checkpoints are as they were. Look at {self._incarnation.repository.url}"
        )

    def try_begin(
        self, asked: SaveAsked, deadline: Deadline = NEVER, turn: JointTurn | None = None
    ) -> CommitHandle | None:
        """Have the state copied and queue its upload. None if earlier saves leave no room for it now."""
        if len(self._queue) >= MAX_JOBS:
            return None
        asked = replace(asked, called_s=time.monotonic())
        if not self._began:
            self.claim()
        if not len(self._queue):
            self._incarnation.check_step(asked.step)
        self._fence.wait("save", deadline)
        self._torn.look()
        taken = self._live.take()
        self._live.tell_what_is_refused(asked.step, self._incarnation.repository.url)
        beginning = _Beginning(
            asked, taken, self._fence.permit(taken), CommitHandle(asked.step, self._fence.attending()), turn
        )
        try:
            with deferred_interrupt():  # slabs, running copies and the queue's job change their owner
                if not self._queue_up(beginning):
                    return None
            self._let_training_go_on(beginning, deadline)
        except BaseException as error:
            self._break_off(beginning, error)
            raised = as_save_error(error, asked.step)
            if raised is error:
                raise
            raise raised from error
        self.counts.begun_s = asked.called_s
        return beginning.handle

    def _queue_up(self, beginning: _Beginning) -> bool:
        """Begin the copy and queue the job. False: there is no memory for it now."""
        asked, taken = beginning.asked, beginning.taken
        jobs = self._queue.jobs  # before the fingerprints: one of them may become the base at any time
        alone = not jobs
        try:
            beginning.source = self._stager.begin(
                taken.captured,
                taken.cuts,
                beginning.permit.fenced,
                asked.step,
                ring=alone,
                samples=taken.samples,
                known=None if asked.full else self._queue.known_prints(jobs),
                pending=[job.source for job in jobs if isinstance(job.source, Snapshot)],
            )
        except DoesNotFit:
            beginning.source = LiveChunks(taken.captured, taken.cuts) if alone else None
        source = beginning.source
        if source is None:
            return False
        if isinstance(source, Snapshot):
            self._fence.begun(source, beginning.permit)
        threads: UploadThreads | None = None
        try:
            # Start them now, even if an earlier save is under way: if that ends while the interpreter exits, no thread can be started any
            # more.
            connections = self._incarnation.uplink.link.connections
            threads = UploadThreads.start(taken.captured.own_bytes, self._options, connections)
            job = Job(asked, taken.captured, source, beginning.handle, threads, beginning.turn, self._owner())
            beginning.runs_here = not self._queue.put(job)
        except BaseException:
            if threads is not None:
                threads.close()
            source.close()
            raise
        self.counts.saves += 1
        self._live.remember(asked.step, taken)
        return True

    def _let_training_go_on(self, beginning: _Beginning, deadline: Deadline) -> None:
        """Wait for the copies that cannot be left to the fence before the next optimizer step."""
        if beginning.runs_here:
            self._queue.run_here()
        if isinstance(beginning.source, LiveChunks):
            self._write_through(beginning, beginning.source, deadline)
        elif (
            beginning.permit.eager
        ):  # only after the job is queued: a ring advances only when somebody takes chunks out of it
            self._fence.wait("save", deadline)
        self._fence.watch(beginning.permit)

    def _break_off(self, beginning: _Beginning, error: BaseException) -> None:
        """Undo a beginning after an error or an interrupt: the caller may catch it and train on, and no hook would wait for this save."""
        source = beginning.source
        with deferred_interrupt():  # both the launcher and the terminal send Ctrl-C, so it comes twice
            if isinstance(source, LiveChunks) or (source is not None and beginning.permit.eager):
                ended = SaveError(f"the save of step {beginning.asked.step} was interrupted. Nothing was committed")
                ended.__cause__ = error
                source.stop(ended)
                self._queue.fail_now(source, ended)
        if beginning.runs_here:  # run it to its end, as a thread would, even after an interrupt
            self._queue.run_here()

    def _write_through(self, beginning: _Beginning, source: LiveChunks, deadline: Deadline) -> None:
        """Save a state that does not even fit the budget in parts: it is uploaded from where it lies, and training waits."""
        limit_s = Deadline.after(self._options.max_stall_s, "max_stall_s").sooner(deadline).left_s()
        assert limit_s is not None
        step = beginning.asked.step
        logger.warning(
            "a copy of %d bytes does not fit the budget of %d, not even in parts: training waits until step %d is uploaded. "
            "Raise host_budget_bytes",
            beginning.taken.captured.n_bytes,
            self._options.host_budget_bytes,
            step,
        )
        try:
            beginning.handle.durable.exception(limit_s)  # the next call raises its error, as for any other save
        except futures.TimeoutError:
            error = SnapshotStalledError(
                f"the save of step {step} was given up: it was not uploaded after {limit_s:.3g} s (max_stall_s, or what "
                "was left before a deadline), and training goes on. Nothing was committed. Look at the store, or "
                "raise host_budget_bytes so that the state can be copied"
            )
            source.stop(error)
            self._queue.fail_now(source, error)


@dataclass
class _Beginning:
    """A save between its call and the moment at which training goes on."""

    asked: SaveAsked
    taken: Taken
    permit: Permit
    handle: CommitHandle
    turn: JointTurn | None
    source: Snapshot | LiveChunks | None = None
    runs_here: bool = False
    """The interpreter is ending and allows no thread: the calling thread runs the job."""
