"""The training loop's object: saves when a step is due or the machine is about to go, restores in place."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import time
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch

from fastckpt import events, targets
from fastckpt.background import MAX_JOBS, CommitHandle, Job, SaveQueue
from fastckpt.catalog import Catalog, Step
from fastckpt.chunk_source import KnownCuts, LiveChunks
from fastckpt.commit import open_vote
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    PartialRestoreError,
    RefusedStateError,
    RestoreError,
    SaveError,
    SnapshotStalledError,
    SupersededError,
    TornSnapshotError,
    of_save,
)
from fastckpt.events import logger
from fastckpt.final_save import final_save, too_late
from fastckpt.format.keys import MAX_STEP
from fastckpt.format.repository_records import Commit, Skipped, metrics_to_json
from fastckpt.incarnation import Incarnation
from fastckpt.interrupts import deferred_interrupt
from fastckpt.kernels import warm_up
from fastckpt.loading import load_object
from fastckpt.options import Options
from fastckpt.placement import Plan, look
from fastckpt.reader import Reader
from fastckpt.repository import Repository
from fastckpt.retention import GRACE_S, Keep
from fastckpt.schedule import Every
from fastckpt.snapshot import DoesNotFit, Fenced, FenceHooks, Snapshot, Stager
from fastckpt.spot import Notice, Watcher, open_sources
from fastckpt.state import Captured, Recapturer
from fastckpt.state.rebuild import resolve_weights_only
from fastckpt.state.refused import ARRAYS, Watch, described, find
from fastckpt.store.base import Store
from fastckpt.store.open import open_store
from fastckpt.upload import UploadThreads
from fastckpt.workers import ENV_EXIT_TIMEOUT, exit_timeout_s, hurried

EXIT_CODE_NOTICE = 75
"""EX_TEMPFAIL of sysexits.h: the job is not finished, start it again. Every launcher takes it for a failure worth a restart."""


@dataclass(frozen=True)
class Stats:
    """What saving has cost so far."""

    saves: int
    """Begun."""
    durable_step: int | None
    deferred: int
    """Calls of `step` at which a save was due and had to wait for an earlier one: back-pressure."""
    stall_s: float
    """Seconds that `step` and the optimizers' hooks have kept the training thread, final saves apart."""
    snapshot_bytes: int
    """Host memory that staged states hold now."""


class Checkpointer:
    """See `help(fastckpt)` for the loop around it. Used by the thread that trains; close it, or use `with`.

    url: a directory, "s3://bucket/prefix", or a Store. state: names → objects with state_dict and load_state_dict, tensors, dicts or lists.

    every: when to save; None: only `save_now` and notices. keep: which checkpoints stay; None: all. fresh: begin a new history where
    there are checkpoints. spot: "auto", None, or sources (docs/spot.md). on_exception: "save" saves once more when the block is left by an
    exception. close_timeout_s: what a save in flight gets then. grace_s: how long bytes of retired checkpoints stay.

    Opening reads the repository's marker, or makes it and probes the store. Errors of background saves are raised by the next call, and by
    `close`. No error, no notice and no store that hangs keeps `step` from returning, except for the final save, which has a deadline,
    and the first save of a run that has not called `restore`: it claims the repository.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        state: Mapping[str, Any],
        *,
        every: Every | None = Every(minutes=10),  # noqa: B008 - frozen
        keep: Keep | None = Keep(last=3),  # noqa: B008 - frozen
        spot: Any = "auto",
        fresh: bool = False,
        on_exception: Literal["save"] | None = None,
        close_timeout_s: float = 30.0,
        grace_s: float = GRACE_S,
        options: Options | None = None,
    ) -> None:
        if on_exception not in (None, "save"):
            raise ValueError(f'on_exception is {on_exception!r}: expected "save" or None')
        _check_rules(every, keep)
        _refuse_many_ranks()
        warm_up()  # without native kernels numba compiles for seconds: now, in the background, not when a notice has come
        self._targets = targets.check_targets(state)
        self._optimizers = [t for t in self._targets.values() if isinstance(t, torch.optim.Optimizer)]
        self._every, self._fresh = every, fresh
        self._on_exception, self._close_timeout_s = on_exception, close_timeout_s
        self._owns_store = not isinstance(url, Store)
        self._store = url if isinstance(url, Store) else open_store(url)
        self._options = (options or Options.from_env()).for_store(self._store.useful_connections)
        self._repository = Repository(self._store)
        self._watcher: Watcher | None = None
        self._hooks: FenceHooks | None = None
        self._closed, self._pid = False, os.getpid()
        self._incarnation = Incarnation(self._repository, self._options)
        self._stager = Stager(
            self._options.snapshot_bytes,
            self._options.threads,
            self._repository.url,
            self._options.max_stall_s,
            self._options.verify_snapshot,
            self._options.spill_dir,
        )
        self._recapturer, self._cuts = Recapturer(), KnownCuts()
        self._final: Notice | None = None
        self._queue = SaveQueue(self._incarnation, keep, grace_s, lambda: self.notice is not None)
        try:
            self._repository.initialise()
            sources = open_sources(spot)
            if sources:
                self._watcher = Watcher(sources)
                self._watcher.start()
            self._hooks = FenceHooks(self._optimizers, self._before_update)
        except BaseException:
            self._let_go()
            raise
        self._began = False
        self._broken: PartialRestoreError | None = None
        self._snapshot: Snapshot | None = None
        """The newest one."""
        self._step: int | None = None
        self._last_start_s = time.monotonic()
        self._due: str | None = None
        """The trigger of a save that is due and had to wait."""
        self._early_seen = False
        self._left = False
        self._saves = self._deferred = 0
        self._stall_s = 0.0
        self._weights_only = True
        """Of the last restore: what it does not refuse needs no warning."""
        self._refused = Watch()
        self._form: object = None
        self.restored: Commit | None = None
        """The record of the checkpoint that `restore` took: its metrics, meta, time."""

    # -- restoring -----------------------------------------------------------------------------------------------------

    def restore(self, step: Step = "latest", *, weights_only: bool | None = None) -> int:
        """Put the newest complete checkpoint (or the one asked for) into the objects, in place; returns its step.

        What becomes of modules, optimizers, dicts and lists, and which devices tensors go to: docs/how-to/training-loop.md. A warning names
        what an object did not take as it was saved.

        0 if the repository has never had one. step: a number goes back to it; "latest-valid" passes over damaged ones, with a warning
        and a record of it. weights_only: False lets the checkpoint run code, for your own only; None is True, unless one of
        TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says otherwise.

        CorruptCheckpointError, RefusedStateError, NoCheckpointError, StoreError, TooLargeError, RestoreError: nothing was changed.
        PartialRestoreError: an object did not take its state; `step` refuses to go on until a restore succeeds.
        """
        self._require_open()
        if weights_only is None:
            weights_only = resolve_weights_only(None, None)
        self._weights_only = weights_only
        self._fence("restore")
        self._queue.wait_idle()
        self._raise_failures()
        self._queue.retaining.halt()  # or it might retire what is being restored
        try:
            return self._restore(step, weights_only)
        finally:
            self._queue.retaining.go_on()

    def _restore(self, step: Step, weights_only: bool) -> int:
        if self._fresh and step == "latest":
            self._begin()
            return 0
        known_bad: list[Skipped] = []
        while True:
            choice = self._incarnation.restore(step, known_bad)
            self._began = True
            if choice is None:
                return 0
            commit = choice.commit
            try:
                loaded, plan = self._load(commit, weights_only)
            except CorruptCheckpointError as error:
                if step != "latest-valid":
                    raise Catalog(self._repository).with_advice(commit.checkpoint, error) from error
                logger.warning("step %d is passed over: %s", commit.save.step, error)
                known_bad = [*choice.skipped, Skipped(commit.checkpoint, str(error)[:500])]
                continue
            break
        try:
            targets.apply(self._targets, loaded, self._repository.location(commit.checkpoint), plan)
        except PartialRestoreError as error:
            self._broken = error
            raise
        self._broken, self.restored, self._step = None, commit, commit.save.step
        self._last_start_s = time.monotonic()
        return commit.save.step

    def _load(self, commit: Commit, weights_only: bool) -> tuple[Any, Plan]:
        if commit.world != 1:
            raise RestoreError(
                f"{self._repository.location(commit.checkpoint)} was saved by {commit.world} ranks; this version restores those of one. "
                "`fastckpt restore --rank` exports each rank's state"
            )
        location = self._repository.location(commit.checkpoint)
        reader = open_vote(self._store, commit.vote(0))
        plan = look(self._targets, reader.directory, location)
        # Where objects travel over a network, threads wait rather than work: as many as there may be connections.
        threads = max(self._options.threads, self._options.connections)
        try:
            loaded = load_object(
                reader,
                self._options,
                threads,
                map_location=plan.map_location,
                pickle_module=pickle,
                weights_only=weights_only,
                load_args={"encoding": "utf-8"},
                places=plan.places,
                beyond_torch=True,
            )
        except pickle.UnpicklingError as error:
            if not weights_only:
                raise
            raise _refused(reader, location, error) from error
        return loaded, plan

    def _begin(self) -> None:
        self._incarnation.begin(fresh=self._fresh)
        self._began = True

    # -- saving --------------------------------------------------------------------------------------------------------

    def step(
        self, step: int, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
    ) -> bool:
        """To be called after each optimizer step, with the number of steps done. Saves when due.

        True: a notice has come and the final save is durable: leave the loop, and exit with `exit_code`. metrics: numbers for `keep` and
        `ls`; meta: anything that JSON can hold.

        Raises what a background save has failed with since the last call (the state and earlier checkpoints are unharmed: catching it and
        going on is allowed), SaveError for a step that goes backwards, SupersededError when another incarnation has taken over.
        """
        started = time.monotonic()
        self._require_open()
        if self._broken is not None:
            raise self._broken
        self._raise_failures()
        metrics, meta = _checked(metrics, meta)
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise SaveError(f"step is {step!r}: expected an integer from 0 to {MAX_STEP}")
        if self._step is not None and step < self._step:
            raise SaveError(f"step {step} comes after step {self._step}: to go back, call restore(step=…)")
        if self._left:
            return True
        before, self._step = self._step, step
        notice = self._watcher.final if self._watcher is not None else None
        if notice is not None:
            self._final_save(step, metrics, meta, notice)
            return True
        if self._every is not None and self._every.due(before, step, started - self._last_start_s, metrics):
            self._due = self._due or "interval"
        if self._watcher is not None and self._watcher.early is not None and not self._early_seen:
            self._early_seen, self._due = True, "rebalance"
        if self._due is not None and not self._saved(step):
            if self._try_start(step, self._due, metrics, meta) is not None:
                self._due = None
            else:
                self._deferred += 1
                events.emit(events.SaveDeferred(target=self._repository.url, step=step, waiting=len(self._queue)))
        if self._hooks is not None:
            self._hooks.next_step()
        self._stall_s += time.monotonic() - started
        return False

    def save_now(
        self, step: int, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
    ) -> CommitHandle:
        """Save this step, due or not. Waits while earlier saves hold the memory that this one needs; `handle.wait()`: until it is durable.

        A step that is being saved, or is the last one saved, is not saved again. Raises as `step` does.
        """
        self._require_open()
        if self._broken is not None:
            raise self._broken
        self._raise_failures()
        metrics, meta = _checked(metrics, meta)
        if self._step is not None and type(step) is int and step < self._step:
            raise SaveError(f"step {step} comes after step {self._step}: to go back, call restore(step=…)")
        handle = self._start(step, "manual", metrics, meta)
        self._step = step
        return handle

    def _saved(self, step: int) -> bool:
        last = self._incarnation.last
        return any(job.step == step for job in self._queue.jobs) or (last is not None and last.checkpoint.step == step)

    def _start(
        self,
        step: int,
        trigger: str,
        metrics: Mapping[str, float],
        meta: Mapping[str, Any],
        notice: Notice | None = None,
        end_s: float | None = None,
    ) -> CommitHandle:
        """Begin a save, waiting for room: until the notice's deadline, if there is one. SaveError if there is none.

        end_s: when (time.monotonic()) the caller must have its answer, if that is before max_stall_s.
        """
        for job in self._queue.jobs:
            if job.step == step:
                return job.handle
        last = self._queue.last_commit or self.restored
        if last is not None and last.save.step == step and self._saved(step):
            handle = CommitHandle(step)
            handle.durable.set_result(last)
            return handle
        if notice is not None and (left_s := notice.seconds_left(time.monotonic())) is not None:
            end_s = time.monotonic() + left_s
        while (handle_or_none := self._try_start(step, trigger, metrics, meta, end_s)) is None:
            self._wait_for_room(step, notice)
        return handle_or_none

    def _wait_for_room(self, step: int, notice: Notice | None) -> None:
        jobs = self._queue.jobs
        if not jobs:  # the one that held the memory has just ended
            return
        left_s = None if notice is None else notice.seconds_left(time.monotonic())
        # A save that was given up ends when its store does: that may be never.
        given_up = bool(jobs) and jobs[0].handle.done()
        bounds = [bound for bound in (left_s, self._options.max_stall_s if given_up else None) if bound is not None]
        if self._queue.wait_fewer(len(jobs), min(bounds, default=None)):
            return
        if notice is not None and left_s in bounds and left_s == min(bounds):
            raise too_late(self._queue, notice, step)
        raise SaveError(
            f"step {step} was not saved: the save of step {jobs[0].step}, which was given up, still waits for the store and holds its "
            f"memory. Earlier checkpoints are as they were. Look at {self._repository.url}"
        )

    def _try_start(
        self,
        step: int,
        trigger: str,
        metrics: Mapping[str, float],
        meta: Mapping[str, Any],
        end_s: float | None = None,
    ) -> CommitHandle | None:
        """Stage the state and queue its upload. None if earlier saves leave no room for it now. end_s: see `_start`."""
        if len(self._queue) >= MAX_JOBS:
            return None
        called_s = time.monotonic()
        if not self._began:
            self._begin()
        if not len(self._queue):
            self._incarnation.check_step(step)
        self._fence("save", end_s)
        captured = self._recapturer.capture(targets.state_of(self._targets))
        self._tell_what_is_refused(step, captured)
        cuts = self._cuts.of(captured)
        handle = CommitHandle(step)
        trusted = self._hooks is not None and self._hooks.can_be_trusted
        fenced = Fenced(self._optimizers) if trusted else None
        alone = not len(self._queue)
        source: Snapshot | LiveChunks | None = None
        here = False
        try:
            with deferred_interrupt():  # slabs, copies under way and the queue's job change hands
                try:
                    source = self._stager.begin(captured, cuts, fenced, step, ring=alone)
                except DoesNotFit:
                    source = LiveChunks(captured, cuts) if alone else None
                if source is None:
                    return None
                if isinstance(source, Snapshot):
                    self._snapshot = source
                threads: UploadThreads | None = None
                try:
                    # Now, although an earlier save may be under way: if it ends with the interpreter, none can be started any more.
                    threads = UploadThreads.start(captured, self._options)
                    here = not self._queue.put(
                        Job(step, trigger, metrics, meta, captured, source, called_s, handle, threads)
                    )
                except BaseException:
                    if threads is not None:
                        threads.close()
                    source.close()
                    raise
                self._saves += 1
            if here:
                self._queue.run_here()
            if isinstance(source, LiveChunks):
                self._write_through(source, handle, captured.n_bytes, end_s)
            elif not trusted:  # not before it is queued: a ring turns only when somebody takes chunks out of it
                self._fence("save", end_s)
        except BaseException as error:
            # An interrupt, too: whoever catches it may train on, and no hook would wait for this save.
            with deferred_interrupt():  # launchers and terminals both pass Ctrl-C on: it comes twice
                if isinstance(source, LiveChunks) or (source is not None and not trusted):
                    ended = SaveError(f"the save of step {step} was interrupted. Nothing was committed")
                    ended.__cause__ = error
                    source.stop(ended)
                    self._queue.give_up(source, ended)
            if here:  # as a thread would, whatever has come between
                self._queue.run_here()
            raised = of_save(error, step)
            if raised is error:
                raise
            raise raised from error
        self._last_start_s = called_s
        return handle

    def _tell_what_is_refused(self, step: int, captured: Captured) -> None:
        """At the save, not when the machine is gone: only the one who saves can choose another type."""
        arrays = [] if captured.form is self._form else [e.name for e in captured.tensors if e.kind == "array"]
        self._form = captured.form
        found = self._refused.new_in(self._recapturer.pickled, arrays)
        if found and self._weights_only:
            logger.warning(
                "step %d is being saved to %s, but restore() will refuse it for what it holds:\n%s\nSave plain values in their place. "
                "restore(weights_only=False) reads them, and runs whatever code a checkpoint names: only for your own. "
                "torch.serialization.add_safe_globals, called before restore(), allows single classes",
                step,
                self._repository.url,
                described(found),
            )

    def _write_through(self, source: LiveChunks, handle: CommitHandle, n_bytes: int, end_s: float | None) -> None:
        """Not even parts of the state fit the budget: it is uploaded from where it is, and training waits."""
        limit_s = _less(self._options.max_stall_s, end_s)
        logger.warning(
            "a copy of %d bytes does not fit the budget of %d, not even in parts: training waits until step %d is uploaded. "
            "Raise host_budget_bytes",
            n_bytes,
            self._options.host_budget_bytes,
            handle.step,
        )
        try:
            handle.durable.exception(limit_s)  # its error is raised by the next call, as that of any other save
        except futures.TimeoutError:
            error = SnapshotStalledError(
                f"the save of step {handle.step} was given up: it was not uploaded after {limit_s:.3g} s (max_stall_s, or what "
                "was left before a deadline), and training goes on. Nothing was committed. Look at the store, or "
                "raise host_budget_bytes so that the state can be copied"
            )
            source.stop(error)
            self._queue.give_up(source, error)

    # -- the fence -----------------------------------------------------------------------------------------------------

    def fence(self) -> None:
        """Wait until the state has been copied. Call it before you change parameters or optimizer state by other means than a step."""
        self._fence("fence()")

    def _fence(self, why: str, end_s: float | None = None) -> None:
        """May be called by several threads, and again after an interrupt: the snapshot stays until the next one."""
        snapshot = self._snapshot
        if snapshot is None:
            return
        snapshot.fence(why, _less(self._options.max_stall_s, end_s))
        error = snapshot.error
        if error is not None:
            self._queue.give_up(snapshot, error)
            if isinstance(error, TornSnapshotError) and self._hooks is not None:
                self._hooks.distrust()

    def _before_update(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child trains a copy; the snapshot is the parent's, and so are the threads that would end this wait
        started = time.monotonic()
        self._fence("optimizer step")
        self._stall_s += time.monotonic() - started

    # -- notices -------------------------------------------------------------------------------------------------------

    @property
    def notice(self) -> Notice | None:
        """The notice that ends this run, once there is one; `step` acts on it."""
        return self._final or (self._watcher.final if self._watcher is not None else None)

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 75 (EX_TEMPFAIL: start me again) after a notice, otherwise 0."""
        return EXIT_CODE_NOTICE if self._left or self.notice is not None else 0

    def _final_save(self, step: int, metrics: Mapping[str, float], meta: Mapping[str, Any], notice: Notice) -> None:
        self._final = notice
        final_save(
            self._queue,
            notice,
            step,
            self._repository.url,
            saved=self._saved(step),
            start=lambda: self._start(step, "notice", metrics, meta, notice),
        )
        self._left = True

    # -- the end -------------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all saves have ended, and, unless a notice has come, the retention behind them; raises what failed, or TimeoutError
        if saves are still under way."""
        self._require_open()
        self.fence()
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        with hurried():
            idle = self._queue.wait_idle(timeout_s)
        if idle and self.notice is None:
            self._queue.retaining.wait_idle(None if end_s is None else max(0.0, end_s - time.monotonic()))
        if not idle:
            raise TimeoutError(
                f"saves are still under way after {timeout_s} s: steps {[job.step for job in self._queue.jobs]}"
            )
        self._raise_failures()

    @property
    def stats(self) -> Stats:
        """What saving has cost so far."""
        last = self._queue.last_commit or self.restored
        return Stats(
            saves=self._saves,
            durable_step=None if last is None else last.save.step,
            deferred=self._deferred,
            stall_s=self._stall_s,
            snapshot_bytes=self._stager.pool.used_bytes,
        )

    def close(self) -> None:
        """Wait until saves under way are durable, then let go of everything. Raises what has failed since the last call of
        this object's methods, also if a handle's `wait` has raised it.

        SaveError after FASTCKPT_EXIT_TIMEOUT_S (600): a store that hangs must not keep the process.
        """
        if self._closed or os.getpid() != self._pid:
            return
        try:
            self.fence()
            self._end_saves(*self._patience(exit_timeout_s(), ENV_EXIT_TIMEOUT))
            if self.notice is None:  # so that `keep` holds when a run has ended
                self._queue.retaining.wait_idle(self._close_timeout_s)
        finally:
            self._closed = True
            self._let_go()
        self._raise_failures()

    def _patience(self, limit_s: float, what: str) -> tuple[float, str]:
        """How long saves may take to end, and who says so. After a notice no longer than the machine stays."""
        left_s = None if self.notice is None else self.notice.seconds_left(time.monotonic())
        if left_s is None or left_s >= limit_s:
            return limit_s, what
        return max(0.0, left_s), "what the notice left"

    def _end_saves(self, timeout_s: float, what: str) -> None:
        """Wait for them, and give up those that are not durable by then. SaveError in that case."""
        with hurried():
            idle = self._queue.wait_idle(timeout_s)
        if not idle:
            self._queue.cancel()
            raise SaveError(
                f"saves of steps {[job.step for job in self._queue.jobs]} were not durable after {what} = {timeout_s:g} s and were given "
                "up. Earlier checkpoints are as they were"
            )

    def _let_go(self) -> None:
        with contextlib.ExitStack() as last_first:  # one that fails keeps none of the others
            idle = self._queue.retaining.halt(0)
            if self._owns_store and idle and not len(self._queue):  # what was given up may still be in its last request
                last_first.callback(self._store.close)
            last_first.callback(self._incarnation.close)
            last_first.callback(self._stager.pool.drop_free)
            if self._watcher is not None:
                last_first.callback(self._watcher.close)
            if self._hooks is not None:
                last_first.callback(self._hooks.remove)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._abort()
        except Exception as ours:
            # The first error is the one to see; ours goes with it.
            logger.error("closing the Checkpointer after an exception: %s: %s", type(ours).__name__, ours)
            if sys.version_info >= (3, 11):
                error.add_note(f"fastckpt: {type(ours).__name__}: {ours}")

    def _abort(self) -> None:
        """Leave after an exception: what is in flight gets `close_timeout_s`, and nothing new begins unless it was asked for."""
        if self._closed or os.getpid() != self._pid:
            return
        try:
            # No fence, which may take max_stall_s: until this returns nobody trains.
            limit_s, what = self._patience(self._close_timeout_s, "close_timeout_s")
            end_s = time.monotonic() + limit_s
            if (
                self._on_exception == "save"
                and self._step is not None
                and self._broken is None
                and not self._saved(self._step)
                and self._queue.wait_idle(limit_s)
            ):
                self._start(self._step, "exception", {}, {}, end_s=end_s)
            self._end_saves(max(0.0, end_s - time.monotonic()), what)
        finally:
            self._closed = True
            self._let_go()
        self._raise_failures()

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this Checkpointer belongs to process {self._pid}, and this is a fork of it ({os.getpid()}): its threads are not here. "
                "A child that is to save needs one of its own"
            )
        if self._closed:
            raise CheckpointError("this Checkpointer is closed")

    def _raise_failures(self) -> None:
        failures = self._queue.take_failures()
        if not failures:
            return
        first = next((f for f in failures if isinstance(f, SupersededError)), failures[0])
        for other in failures:
            if other is not first:
                logger.error("another save failed too: %s: %s", type(other).__name__, other)
        raise first


def _refused(reader: Reader, location: str, error: pickle.UnpicklingError) -> RefusedStateError:
    found = find(reader.skeleton, trusted=False)
    if reader.holds_arrays:
        found.setdefault(ARRAYS[0], []).extend(e.name for e in reader.directory.tensors if e.kind == "array")
    words = described(found) or f"  {str(error).strip().splitlines()[-1]}"
    return RefusedStateError(
        f"{location} holds what restore() refuses, as it could run code:\n{words}\nNothing was changed. If you trust whoever "
        "wrote it, call restore(weights_only=False), or allow single classes with torch.serialization.add_safe_globals before restore()"
    )


def _less(limit_s: float, end_s: float | None) -> float:
    """The limit, or what is left until `end_s`, if that is less."""
    return limit_s if end_s is None else max(0.0, min(limit_s, end_s - time.monotonic()))


def _checked(
    metrics: Mapping[str, float] | None, meta: Mapping[str, Any] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Copies that can be written. TypeError at the call that brings them, not in the background."""
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
        json.dumps(metrics_to_json(numbers), ensure_ascii=False).encode()
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"metrics must be names and numbers: {error}") from error
    try:
        copy = json.loads(json.dumps(dict(meta or {}), allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"meta must be what JSON can hold: {error}") from error
    return numbers, copy


def _check_rules(every: object, keep: object) -> None:
    """TypeError for what would fail in the training loop, or in the background at every save."""
    problems = []
    if not isinstance(every, (Every, type(None))):
        problems.append(f"every is {every!r}: expected fastckpt.Every(steps=…), Every(minutes=…), or None")
    if not isinstance(keep, (Keep, type(None))):
        problems.append(f"keep is {keep!r}: expected fastckpt.Keep(last=…), or None for all")
    if problems:
        raise TypeError("; ".join(problems))


def _refuse_many_ranks() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise SaveError(
            "Checkpointer saves the state of one process; this version does not yet coordinate several ranks"
        )


__all__ = ["EXIT_CODE_NOTICE", "Checkpointer", "CommitHandle", "Every", "Keep", "Stats"]
