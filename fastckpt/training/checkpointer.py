"""The training loop's object: saves when a step is due or the machine is about to go, restores in place."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch

from fastckpt import events
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    ObjectNotFoundError,
    PartialRestoreError,
    RefusedStateError,
    RestoreError,
    RetiredError,
    SaveError,
    SnapshotStalledError,
    SupersededError,
    of_save,
)
from fastckpt.events import logger
from fastckpt.format.keys import MAX_STEP
from fastckpt.format.repository_records import Commit, Skipped, metrics_to_json
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.host.threads import ENV_EXIT_TIMEOUT, exit_timeout_s, hurried
from fastckpt.kernels import warm_up
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.repository.catalog import Catalog, Choice, Step
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import GRACE_S, Keep
from fastckpt.snapshot import DoesNotFit, Fenced, FenceHooks, Probation, Sampled, Sampler, Snapshot, Stager
from fastckpt.spot import Notice, Watcher, WorkerErrors, open_sources
from fastckpt.state import Captured, Identity, Recapturer
from fastckpt.state.chunks import KnownCuts, LiveChunks
from fastckpt.state.rebuild import resolve_weights_only
from fastckpt.state.refused import ARRAYS, Watch, described, find
from fastckpt.store.base import Store
from fastckpt.store.open import open_store
from fastckpt.training import stateful
from fastckpt.training.final_save import final_save, too_late
from fastckpt.training.placement import Plan, look
from fastckpt.training.rng import RNGState
from fastckpt.training.save_queue import MAX_JOBS, CommitHandle, Job, SaveQueue, Torn
from fastckpt.training.schedule import Every
from fastckpt.training.settled import Settled
from fastckpt.writing.rank import UploadThreads

EXIT_CODE_NOTICE = 75
"""EX_TEMPFAIL of sysexits.h: the job is not finished, start it again. Every launcher takes it for a failure worth a restart."""

_SIGNAL_DELAY_S = 1.0  # some ms on a busy machine; an exit by an error can wait that long


_MOST_ROUNDS = 2
"""Times that a restore loads before it claims."""


class _Damaged(Exception):
    """What `_load` has found, of which checkpoint."""

    def __init__(self, commit: Commit, error: CorruptCheckpointError) -> None:
        super().__init__(str(error))
        self.commit, self.error = commit, error


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
    there are checkpoints. read_only: `restore` alone, for evaluation and inference beside a training job, which goes on: nothing is written
    and no epoch is claimed (GET, HEAD and LIST are all it needs); `step` and `save_now` are refused.
    spot: "auto", None, or sources (docs/spot.md). on_exception: "save" saves the last step once more when the block
    is left by an exception, unless the next one had begun to change the state. close_timeout_s: what a save in flight gets then. grace_s:
    how long bytes of retired checkpoints stay.

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
        read_only: bool = False,
        on_exception: Literal["save"] | None = None,
        close_timeout_s: float = 30.0,
        grace_s: float = GRACE_S,
        options: Options | None = None,
    ) -> None:
        if on_exception not in (None, "save"):
            raise ValueError(f'on_exception is {on_exception!r}: expected "save" or None')
        if read_only and fresh:
            raise ValueError("read_only=True and fresh=True exclude each other: beginning a new history writes")
        _check_rules(every, keep)
        if not read_only:
            _refuse_many_ranks()
        warm_up()  # without native kernels numba compiles for seconds: now, in the background, not when a notice has come
        self._targets = stateful.check_targets(state)
        self._optimizers = [t for t in self._targets.values() if isinstance(t, torch.optim.Optimizer)]
        self._every, self._fresh, self._read_only = every, fresh, read_only
        self._on_exception, self._close_timeout_s = on_exception, close_timeout_s
        self._owns_store = not isinstance(url, Store)
        self._store = url if isinstance(url, Store) else open_store(url)
        self._options = (options or Options.from_env()).for_store(self._store.useful_connections)
        self._repository = Repository(self._store)
        self._watcher: Watcher | None = None
        self._hooks: FenceHooks | None = None
        self._closed, self._pid = False, os.getpid()
        self._trained_by = threading.main_thread()
        self._worker_errors = WorkerErrors(functools.partial(_is_changing, weakref.ref(self)))
        self._incarnation = Incarnation(self._repository, self._options)
        self._stager = Stager(
            self._options.snapshot_bytes,
            self._options.threads,
            self._repository.url,
            self._options.max_stall_s,
            self._options.verify_snapshot,
            self._options.spill_dir,
        )
        generators = {name for name, target in self._targets.items() if isinstance(target, RNGState)}
        self._recapturer, self._cuts, self._sampler = Recapturer(generators), KnownCuts(), Sampler(generators)
        self._final: Notice | None = None
        self._queue = SaveQueue(self._incarnation, keep, grace_s, _in_a_hurry(weakref.ref(self)))
        try:
            if read_only:
                self._repository.require()
            else:
                self._repository.initialise()
            # Neither may keep one that was forgotten, without being closed: it would go on to take the process's signals.
            self._hooks = FenceHooks([] if read_only else self._optimizers, _weakly(self._before_update))
            self._settled = Settled(self._targets, self._hooks)
            sources = [] if read_only else open_sources(spot)
            if sources:
                self._watcher = Watcher(sources, at_signal=self._worker_errors.hold_for_good)
                self._watcher.start()
        except BaseException:
            self._let_go()
            raise
        self._began = self._prepared = False
        self._broken: PartialRestoreError | None = None
        self._snapshot: Snapshot | None = None
        """The newest one."""
        self._thread: int | None = None
        """That has asked for it."""
        self._saved_state: _SavedState | None = None
        """Of the newest save."""
        self._updated: Commit | None = None
        """What had been restored last when an optimizer updated last."""
        self._torn: Torn | None = None
        """A save that was torn, until a newer one is durable, or something is restored."""
        self._torn_after: Commit | None = None
        """What had been restored last by then."""
        self._told_of_torn = False
        self._proven = self._options.verify_snapshot in ("first", "off")
        """Whether a whole interval from a save to its fence has been seen in which nothing but optimizers changed the state."""
        self._probation: Probation | None = None
        self._step: int | None = None
        self._last_start_s = time.monotonic()
        self._due: str | None = None
        """The trigger of a save that is due and had to wait."""
        self._early_seen = False
        self._left = False
        self._told: tuple[Mapping[str, float], Mapping[str, Any]] = {}, {}
        """Metrics and meta of the last call of `step`."""
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

        0 if the repository has never had one (NoCheckpointError if this only reads: nothing is there to be evaluated).
        step: a number goes back to it; "latest-valid" passes over damaged ones, with a warning
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
        chosen = self._choose_and_load(step, weights_only)
        self._began = not self._read_only
        if chosen is None:
            return 0
        commit, loaded, plan = chosen
        self._settled.forget()
        try:
            stateful.apply(self._targets, loaded, self._repository.location(commit.checkpoint), plan)
        except PartialRestoreError as error:
            self._broken = error
            raise
        self._broken, self.restored, self._step = None, commit, commit.save.step
        self._mark_settled()
        self._last_start_s = time.monotonic()
        return commit.save.step

    def _choose_and_load(self, step: Step, weights_only: bool) -> tuple[Commit, Any, Plan] | None:
        """What is restored, checked and not yet put into the objects; unless this only reads, an epoch that continues from it is claimed.

        None: nothing was ever committed.
        """
        known_bad: list[Skipped] = []
        own: set[int] = set()
        rounds = retired = 0
        while True:
            # A head that moves each time while its checkpoint loads is first made to stand still.
            claims_first = rounds == _MOST_ROUNDS
            found: tuple[Commit, Any, Plan] | None = None
            try:
                if self._read_only:
                    choice = Catalog(self._repository).choose(step, known_bad)
                elif claims_first:
                    choice = self._incarnation.restore(step, known_bad, own)
                else:
                    choice = self._incarnation.choose(step, known_bad, own)
                if choice is not None:
                    found = choice.commit, *self._load(choice, weights_only)
            except RetiredError:
                retired += 1
                if not isinstance(step, str) or retired > 1:
                    raise
                continue
            except _Damaged as damaged:
                error, checkpoint = damaged.error, damaged.commit.checkpoint
                if step != "latest-valid":
                    raise Catalog(self._repository).with_advice(checkpoint, error) from error
                logger.warning("step %d is passed over: %s", checkpoint.step, error)
                known_bad = [*(() if choice is None else choice.skipped), Skipped(checkpoint, str(error)[:500])]
                continue
            if self._read_only and found is None:
                raise NoCheckpointError(f"{self._repository.url} has no checkpoint yet: there is nothing to read")
            if self._read_only or claims_first or self._incarnation.claim(choice, step, own):
                return found
            rounds += 1

    def _load(self, choice: Choice, weights_only: bool) -> tuple[Any, Plan]:
        commit = choice.commit
        if commit.world != 1:
            raise RestoreError(
                f"{self._repository.location(commit.checkpoint)} was saved by {commit.world} ranks; this version restores those of one. "
                "`fastckpt restore --rank` exports each rank's state"
            )
        try:
            loaded, plan = self._load_whole(commit, choice.reader, weights_only)
        except (CorruptCheckpointError, ObjectNotFoundError) as error:
            found = Catalog(self._repository).blame(commit.checkpoint, error)
            if isinstance(found, CorruptCheckpointError):
                raise _Damaged(commit, found) from error
            raise found from error
        stateful.check(self._targets, loaded, self._repository.location(commit.checkpoint), plan)
        return loaded, plan

    def _load_whole(self, commit: Commit, reader: Reader, weights_only: bool) -> tuple[Any, Plan]:
        location = self._repository.location(commit.checkpoint)
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

        A save that was torn (something has changed the state while it was copied, without an optimizer's step) is not raised here: it is
        logged, and the next step is saved instead, before this returns. `wait` and `close` raise it if nothing newer is durable by then.
        """
        started = time.monotonic()
        self._require_writing()
        if self._broken is not None:
            raise self._broken
        notice = self._watcher.final if self._watcher is not None else None
        if notice is None:  # else there is no next call for which they could wait, and the final save tells them
            self._raise_failures()
        metrics, meta = _checked(metrics, meta)
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise SaveError(f"step is {step!r}: expected an integer from 0 to {MAX_STEP}")
        if self._step is not None and step < self._step:
            raise SaveError(f"step {step} comes after step {self._step}: to go back, call restore(step=…)")
        if self._left:
            return True
        before, self._step = self._step, step
        self._told = metrics, meta
        self._mark_settled()
        if notice is None and self._watcher is not None and self._watcher.takes_signals:
            self._worker_errors.hold()
            notice = self._behind_worker_errors()
        if notice is not None:
            self._final_save(step, metrics, meta, notice)
            return True
        if self._every is not None and self._every.due(before, step, started - self._last_start_s, metrics):
            self._due = self._due or "interval"
        if self._watcher is not None and self._watcher.early is not None and not self._early_seen:
            self._early_seen, self._due = True, "rebalance"
        if self._torn is not None and step > self._torn.step:
            self._due = self._due or self._torn.trigger
        # The state that a torn save should have held is gone: what is there now is not that step's.
        is_torn = self._torn is not None and step <= self._torn.step
        if self._due is not None and not is_torn and not self._saved(step):
            if self._try_start(step, self._due, metrics, meta) is not None:
                self._due = None
            else:
                self._deferred += 1
                events.emit(events.SaveDeferred(target=self._repository.url, step=step, waiting=len(self._queue)))
        if not self._prepared:
            self._prepare()
        if self._hooks is not None:
            self._hooks.next_step()
        self._stall_s += time.monotonic() - started
        return False

    def _prepare(self) -> None:
        """At the first step, whose optimizers have their state now: the memory of the first save is made while training goes on, and its
        pickling is done. Whatever goes wrong is the save's to tell.
        """
        self._prepared = True
        if self._saves:
            return
        try:
            captured = self._recapturer.capture(stateful.state_of(self._targets))
            self._stager.prepare(captured, self._cuts.of(captured), Fenced(self._optimizers))
        except Exception as error:
            logger.info("nothing could be prepared for the first save: %s: %s", type(error).__name__, error)

    def save_now(
        self, step: int, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
    ) -> CommitHandle:
        """Save this step, due or not. Waits while earlier saves hold the memory that this one needs; `handle.wait()`: until it is durable.

        A step that is being saved, or is the last one saved, is not saved again: if the state is still the same (generators apart), the
        handle is that save's; otherwise SaveError, for a checkpoint is made once. Raises as `step` does.
        """
        self._require_writing()
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
        """Whether a step is being saved, or was saved or restored last."""
        last = self._incarnation.last
        return self._job_of(step) is not None or (last is not None and last.checkpoint.step == step)

    def _job_of(self, step: int) -> Job | None:
        """The save of a step that is under way, and has not failed."""
        return next((job for job in self._queue.jobs if job.step == step and not _has_failed(job.handle)), None)

    def _refuse_other_state(
        self, step: int, first: Job | Commit, metrics: Mapping[str, float], meta: Mapping[str, Any]
    ) -> None:
        """SaveError unless the state is that of the save of this step. A checkpoint of it is not made again: a save is never replaced."""
        saved = self._saved_state
        if saved is not None and saved.step == step and saved.restored is self.restored:
            captured = self._recapturer.capture(stateful.state_of(self._targets))
            changed = saved.identity != self._recapturer.identity
            if not changed and saved.samples is not None:
                now = self._sampler.take(captured, self._cuts.of(captured), saved.samples.seed)
                changed = now.digests != saved.samples.digests
        else:  # it was restored
            changed = self.restored is not None and self._updated is self.restored
        if changed:
            raise SaveError(
                f"step {step} has been saved or restored, and the state has changed since: a step is saved once. Nothing was committed; "
                "the checkpoint of that step is as it was. Save under the next number; to go back, call restore(step=…)"
            )
        if (metrics and metrics != first.metrics) or (meta and meta != first.meta):
            logger.warning(
                "step %d is saved already, without these metrics and meta (%s): they are not recorded. Pass them to the call that saves",
                step,
                ", ".join(sorted({*metrics, *meta})),
            )

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
        job = self._job_of(step)
        last = self._last_commit()
        first = job or (last if last is not None and last.save.step == step else None)
        if first is not None and notice is None and trigger == "manual":
            self._refuse_other_state(step, first, metrics, meta)
        if job is not None:
            return job.handle
        if last is not None and last.save.step == step:
            handle = CommitHandle(step)
            handle.durable.set_result(last)
            return handle
        if notice is not None and (left_s := notice.seconds_left(time.monotonic())) is not None:
            end_s = time.monotonic() + left_s
        while (handle_or_none := self._try_start(step, trigger, metrics, meta, end_s)) is None:
            self._wait_for_room(step, notice)
        return handle_or_none

    def _last_commit(self) -> Commit | None:
        """The checkpoint that the next one follows, if this object has saved or restored it."""
        last = self._incarnation.last
        known = (self._queue.last_commit, self.restored)
        return next((c for c in known if c is not None and last is not None and c.checkpoint == last.checkpoint), None)

    def _wait_for_room(self, step: int, notice: Notice | None) -> None:
        with self._waiting():
            self._wait_for_fewer_jobs(step, notice)

    def _wait_for_fewer_jobs(self, step: int, notice: Notice | None) -> None:
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
        self._see_torn()
        self._thread = threading.get_ident()
        captured = self._recapturer.capture(stateful.state_of(self._targets))
        self._tell_what_is_refused(step, captured)
        cuts = self._cuts.of(captured)
        samples = None if self._options.verify_snapshot == "off" else self._sampler.take(captured, cuts)
        handle = CommitHandle(step, _attending(weakref.ref(self)))
        trusted = self._hooks is not None and self._hooks.can_be_trusted
        fenced = Fenced(self._optimizers) if trusted else None
        probation = None
        if fenced is not None and samples is not None and not self._proven:
            if all(storage.device is None for storage in captured.storages):
                probation, fenced, trusted = Probation(captured, cuts, fenced, samples), None, False
            else:
                self._proven = True
        alone = not len(self._queue)
        source: Snapshot | LiveChunks | None = None
        here = False
        try:
            with deferred_interrupt():  # slabs, copies under way and the queue's job change hands
                try:
                    source = self._stager.begin(captured, cuts, fenced, step, ring=alone, samples=samples)
                except DoesNotFit:
                    source = LiveChunks(captured, cuts) if alone else None
                if source is None:
                    return None
                if isinstance(source, Snapshot):
                    self._snapshot = source
                    trusted = trusted and not source.must_fence
                threads: UploadThreads | None = None
                try:
                    # Now, although an earlier save may be under way: if it ends with the interpreter, none can be started any more.
                    threads = UploadThreads.start(captured, self._options)
                    here = not self._queue.put(
                        Job(step, trigger, metrics, meta, captured, source, called_s, handle, threads, owner=self)
                    )
                except BaseException:
                    if threads is not None:
                        threads.close()
                    source.close()
                    raise
                self._saves += 1
                self._saved_state = _SavedState(step, self.restored, self._recapturer.identity, samples)
            if here:
                self._queue.run_here()
            if isinstance(source, LiveChunks):
                self._write_through(source, handle, captured.n_bytes, end_s)
            elif not trusted:  # not before it is queued: a ring turns only when somebody takes chunks out of it
                self._fence("save", end_s)
            self._probation = probation
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
        probation, self._probation = self._probation, None
        if probation is not None:
            self._proven = probation.passed()
            if not self._proven:
                self._distrust_and_tell("after the last save", "The save is whole")
        snapshot = self._snapshot
        if snapshot is None:
            return
        snapshot.fence(why, _less(self._options.max_stall_s, end_s))
        self._look_at(snapshot)

    def _look_at(self, snapshot: Snapshot) -> None:
        """Tell of what is wrong with it. Nothing is left to a hook any more once something was torn."""
        error = snapshot.error
        if error is not None:
            self._queue.give_up(snapshot, error)
        if snapshot.torn_name is None:
            return
        if error is None:
            self._distrust_and_tell(f"while {snapshot.torn_name} was copied", "It was put back, and copied again")
        elif self._hooks is not None:
            self._hooks.distrust()

    def _distrust_and_tell(self, when: str, outcome: str) -> None:
        """Nothing is left to a hook any more. Told once."""
        if self._hooks is not None:
            self._hooks.distrust()
        if not self._told_of_torn:
            self._told_of_torn = True
            logger.warning(
                "parameters or optimizer state were overwritten %s, before the optimizer's step and without it (.data, a NumPy view, a "
                "kernel of its own). %s. From now on the state is copied before a save returns. Call ckpt.fence() before such writes",
                when,
                outcome,
            )

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around what waits for a save. If it is the training thread that waits, the state stays as it is meanwhile, and nobody comes to
        the fence: what is torn must be settled now.
        """
        snapshot = self._snapshot
        if snapshot is None or threading.get_ident() != self._thread or os.getpid() != self._pid:
            yield
            return
        with snapshot.attended():
            self._look_at(snapshot)
            yield
        self._look_at(snapshot)

    def _see_torn(self) -> None:
        """Learn of saves that were torn, and forget those after which a newer one is durable."""
        for torn in self._queue.take_torn():
            self._torn, self._torn_after = torn, self.restored
            if self._hooks is not None:
                self._hooks.distrust()
        last = self._incarnation.last
        if self._torn is not None and (
            self._torn_after is not self.restored or (last is not None and last.checkpoint.step > self._torn.step)
        ):
            self._torn = None

    def _before_update(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child trains a copy; the snapshot is the parent's, and so are the threads that would end this wait
        started = time.monotonic()
        self._updated = self.restored
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
        self._worker_errors.hold_for_good()
        final_save(
            self._queue,
            notice,
            step,
            self._repository.url,
            saved=self._saved(step),
            start=lambda: self._start(step, "notice", metrics, meta, notice),
        )
        self._left = True

    def _mark_settled(self) -> None:
        self._trained_by = threading.current_thread()
        if self._watcher is not None or self._on_exception is not None:
            self._settled.mark()

    def _may_be_saved(self) -> bool:
        """Whether the objects are those of the last step, now that an exception has come from somewhere. Says why they are not."""
        if self._step is None or self._broken is not None:
            return False
        moved = self._settled.moved
        if moved is None and not self._settled.sees_steps and self._on_exception != "save":
            moved = "no optimizer was seen to say when it begins a step, so one may have begun"
        if moved is not None:
            logger.warning("the state is not saved as step %d: %s", self._step, moved)
        return moved is None

    def _save_last(self, notice: Notice) -> None:
        """After an exception that came behind a notice: have the newest step durable that there is."""
        if self._left:
            return
        left_s = notice.seconds_left(time.monotonic())
        if self._step is not None and self._saved(self._step):
            given_up = any(job.step == self._step and job.handle.done() for job in self._queue.jobs)
            if given_up:  # interrupted before it was copied; its memory is needed
                self._queue.wait_fewer(1, left_s)
        if self._step is not None and (self._saved(self._step) or self._may_be_saved()):
            if not self._saved(self._step):
                self._settled.put_back()
            try:
                self._final_save(self._step, *self._told, notice)
            except Exception as error:  # a device that was lost takes no further copy; one on its way is complete
                logger.error("%s: %s: %s", notice.source, type(error).__name__, error)
            else:
                return
            left_s = notice.seconds_left(time.monotonic())
        with hurried():
            self._queue.wait_idle(self._close_timeout_s if left_s is None else left_s)
        durable = self.stats.durable_step
        logger.warning("%s: what stands is %s", notice.source, "no step" if durable is None else f"step {durable}")

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
        self._raise_failures(torn=True)

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
        self._raise_failures(torn=True)

    def _patience(self, limit_s: float, what: str) -> tuple[float, str]:
        """How long saves may take to end, and who says so. After a notice no longer than the machine stays."""
        left_s = None if self.notice is None else self.notice.seconds_left(time.monotonic())
        if left_s is None or left_s >= limit_s:
            return limit_s, what
        return max(0.0, left_s), "what the notice left"

    def _end_saves(self, timeout_s: float, what: str) -> None:
        """Wait for them, and give up those that are not durable by then. SaveError in that case."""
        with hurried(), self._waiting():
            idle = self._queue.wait_idle(timeout_s)
        if not idle:
            self._queue.cancel()
            raise SaveError(
                f"saves of steps {[job.step for job in self._queue.jobs]} were not durable after {what} = {timeout_s:g} s and were given "
                "up. Earlier checkpoints are as they were"
            )

    def _behind_worker_errors(self) -> Notice | None:
        """Errors of workers that were kept since the last step: by now a notice is behind them, or they are raised."""
        held = self._worker_errors.take()
        if not held:
            return None
        notice = self._notice_behind(held[0])
        if notice is None:
            raise held[0]
        for error in held:
            self._worker_errors.keep(error)  # for the log
        return notice

    def _tell_worker_errors(self) -> None:
        for error in self._worker_errors.take():
            logger.warning("kept back while the state was changing or saved: %s: %s", type(error).__name__, error)

    def _let_go(self) -> None:
        with contextlib.ExitStack() as last_first:  # one that fails keeps none of the others
            idle = self._queue.retaining.halt(0)
            if self._owns_store and idle and not len(self._queue):  # what was given up may still be in its last request
                last_first.callback(self._store.close)
            last_first.callback(self._incarnation.close)
            last_first.callback(self._stager.pool.drop_free)
            last_first.callback(self._stager.stop_preparing)
            if self._watcher is not None:
                last_first.callback(self._watcher.close)
            last_first.callback(self._worker_errors.close)
            last_first.callback(self._tell_worker_errors)
            if self._hooks is not None:
                last_first.callback(self._hooks.remove)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes. After a final notice an exception ends in SystemExit(exit_code), with it as the cause and in the log: it is mostly the
        notice's own consequence, and the launcher must know that the job is to be started again.
        """
        notice = self._notice_behind(error)
        if error is None:
            try:
                self.close()
            except Exception as ours:
                if notice is None:
                    raise
                error = ours
        else:
            try:
                self._abort(notice)
            except Exception as ours:
                # The first error is the one to see; ours goes with it.
                logger.error("closing the Checkpointer after an exception: %s: %s", type(ours).__name__, ours)
                if sys.version_info >= (3, 11):
                    error.add_note(f"fastckpt: {type(ours).__name__}: {ours}")
        # Who chooses a status of his own, or only closes a generator, has not failed.
        if notice is None or error is None or isinstance(error, (SystemExit, GeneratorExit)):
            return
        logger.error(
            "%s had told of the end before this exception came: the exit status is %d",
            notice.source,
            EXIT_CODE_NOTICE,
            exc_info=error,
        )
        raise SystemExit(EXIT_CODE_NOTICE) from error

    def _notice_behind(self, error: BaseException | None) -> Notice | None:
        """The one that this exception may be a consequence of, even if it is still on its way: a launcher signals one process after the
        other, and the kernel may give a signal to a thread that has to wait for its turn. Others of the group have died by then.
        """
        if os.getpid() != self._pid:
            return None
        end_s = time.monotonic()
        if isinstance(error, (RuntimeError, OSError, EOFError)) and self._watcher is not None and not self._closed:
            end_s += _SIGNAL_DELAY_S if self._watcher.takes_signals else 0.0
        while (notice := self.notice) is None and time.monotonic() < end_s:
            time.sleep(0.01)
        return notice

    def _abort(self, notice: Notice | None) -> None:
        """Leave after an exception: what is in flight gets `close_timeout_s`, and nothing new begins unless a notice has come or it was
        asked for.
        """
        if self._closed or os.getpid() != self._pid:
            return
        try:
            # No fence, which may take max_stall_s: until this returns nobody trains.
            end_s = time.monotonic() + self._close_timeout_s
            if notice is not None:
                self._save_last(notice)
                left_s = notice.seconds_left(time.monotonic())
                end_s = end_s if left_s is None else min(end_s, time.monotonic() + left_s)
            elif (
                self._on_exception == "save"
                and self._step is not None
                and not self._saved(self._step)
                and self._may_be_saved()
                and self._queue.wait_idle(self._close_timeout_s)
            ):
                self._settled.put_back()
                self._start(self._step, "exception", *self._told, end_s=end_s)
            self._end_saves(max(0.0, end_s - time.monotonic()), "close_timeout_s")
        finally:
            self._closed = True
            self._let_go()
        self._raise_failures(torn=True)

    def _require_writing(self) -> None:
        self._require_open()
        if self._read_only:
            raise SaveError(
                f"this Checkpointer of {self._repository.url} was opened with read_only=True: it restores, and saves nothing. Leave that "
                "out where the training loop is"
            )

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this Checkpointer belongs to process {self._pid}, and this is a fork of it ({os.getpid()}): its threads are not here. "
                "A child that is to save needs one of its own"
            )
        if self._closed:
            raise CheckpointError("this Checkpointer is closed")

    def _raise_failures(self, *, torn: bool = False) -> None:
        """torn: also what was torn and has not been made good."""
        failures = self._queue.take_failures()
        self._see_torn()
        if torn and self._torn is not None:
            failures.append(self._torn.error)
            self._torn = None
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


class _SavedState(NamedTuple):
    """What tells whether the state is still that of a save."""

    step: int
    restored: Commit | None
    """By then."""
    identity: Identity
    samples: Sampled | None


def _has_failed(handle: CommitHandle) -> bool:
    return handle.done() and handle.durable.exception() is not None


def _is_changing(reference: weakref.ref[Checkpointer]) -> bool:
    """Whether the main thread should not be interrupted: it updates the state, or is not the one that trains."""
    living = reference()
    if living is None:
        return False
    begun = living._hooks is not None and living._hooks.begun
    return begun or living._trained_by is not threading.main_thread()


def _attending(reference: weakref.ref[Checkpointer]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`Checkpointer._waiting`, for handles, which do not keep the object. While their save is under way its job does."""

    def attended() -> contextlib.AbstractContextManager[None]:
        living = reference()
        return contextlib.nullcontext() if living is None else living._waiting()

    return attended


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Calls it while its object is there, and does not keep the object."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        living = reference()
        if living is not None:
            living()

    return call


def _in_a_hurry(reference: weakref.ref[Checkpointer]) -> Callable[[], bool]:
    """Whether a notice has come, or nobody has the Checkpointer any more."""

    def call() -> bool:
        living = reference()
        return living is None or living.notice is not None

    return call


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
