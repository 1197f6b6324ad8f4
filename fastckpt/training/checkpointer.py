"""The training loop's object: saves when a step is due or the machine is about to go, restores in place.

A face over four others: `Saver` begins saves, `Restorer` reads them back, `Fence` keeps optimizers' steps and copies apart, `Ending` has
what notices, exceptions and `close` ask for. Its 13 attributes are these, and what guards each call.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from fastckpt.errors import CheckpointError, PartialRestoreError, SaveError
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit
from fastckpt.host.deadline import Deadline, bounded
from fastckpt.host.threads import hurried
from fastckpt.kernels import warm_up
from fastckpt.options import Options
from fastckpt.repository.catalog import Which
from fastckpt.repository.retention import GRACE_S, Keep
from fastckpt.spot import Notice, open_sources
from fastckpt.state.rebuild import resolve_weights_only
from fastckpt.store.base import Store
from fastckpt.training import stateful
from fastckpt.training.arguments import asked_for, check_kinds, check_rules, refuse_many_ranks
from fastckpt.training.ending import EXIT_CODE_NOTICE, Ending, exit_after, in_a_hurry
from fastckpt.training.engine import Engine
from fastckpt.training.live_state import LiveState
from fastckpt.training.restorer import Restorer
from fastckpt.training.save_queue import CommitHandle
from fastckpt.training.saver import Saver
from fastckpt.training.schedule import Due, Every
from fastckpt.training.stats import Stats
from fastckpt.writing.rank import SaveAsked


class Checkpointer:
    """Saves and restores the objects of a training loop; `help(fastckpt)` shows the loop. Close it, or use `with`.

    Errors of background saves are raised by the next call, and by `close`. No error, no notice and no store that hangs keeps `step`
    from returning, except for the final save, which has a deadline, and the first save of a run that has not called `restore`: it
    claims the repository.

    Args:
        url: a directory, "s3://bucket/prefix", or a Store.
        state: names → objects with state_dict and load_state_dict, tensors, dicts or lists.
        every: when to save; None: only `save_now` and notices.
        keep: which checkpoints stay; None: all.
        spot: "auto", None, or sources of notices (docs/spot.md).
        fresh: begin a new history where there are checkpoints.
        read_only: `restore` alone, for evaluation and inference beside a training job, which goes on: nothing is written and no epoch
            is claimed (GET, HEAD and LIST are all it needs); `step` and `save_now` are refused.
        on_exception: "save" saves the last step once more when the block is left by an exception, unless the next one had begun to
            change the state.
        close_timeout_s: seconds that a save in flight gets then.
        replicated: of several ranks, dotted names of what is the same on all of them, beside DTensors and DistributedDataParallel, whose
            replicas are known: ("model", "optim.state") is the object "model", and all names that begin with "optim.state.". It is
            written once. Nobody checks it: if it is not the same, what a restore brings back is a mixture.
        grace_s: seconds that bytes of retired checkpoints stay.
        options: every other knob; None: `Options.from_env()`.

    Raises:
        TypeError, ValueError: an argument is wrong; all problems are listed.
        StoreError: the store cannot be used.
        RepositoryError: something else lies at the URL, or, if this only reads, nothing.
        SaveError: several ranks; `spill_dir` cannot be written to.

    Threads: used by the thread that trains. `notice`, `exit_code` and `stats` may be read by any; optimizers' hooks may run in others.
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
        replicated: Sequence[str] = (),
        grace_s: float = GRACE_S,
        options: Options | None = None,
    ) -> None:
        """Read the repository's marker, or make it and probe the store. Arguments and errors: see the class."""
        check_rules(every, keep, on_exception)
        check_kinds({"fresh": fresh, "read_only": read_only}, {"close_timeout_s": close_timeout_s, "grace_s": grace_s})
        if read_only and fresh:
            raise ValueError("read_only=True and fresh=True exclude each other: beginning a new history writes")
        if not read_only:
            refuse_many_ranks()
        warm_up()  # without native kernels numba compiles for seconds: now, in the background, not when a notice has come
        options = options or Options.from_env()
        live = LiveState(state, sampled=options.verify_snapshot != "off", replicated=replicated)
        self._read_only = read_only
        self._closed, self._pid = False, os.getpid()
        self._broken: PartialRestoreError | None = None
        self._last: SaveAsked | None = None
        """The last step, and what was said of it: by `step` or `save_now`, or by the checkpoint that was restored."""
        self._due = Due(every)
        self._stall_s = 0.0
        self.restored: Commit | None = None
        """The record of the checkpoint that `restore` took: its metrics, meta, time."""
        with contextlib.ExitStack() as opened:  # what fails below leaves nothing open
            hurry = in_a_hurry(weakref.ref(self))
            self._engine = Engine.start(url, live, options, keep, grace_s, hurry, hooked=not read_only)
            opened.callback(self._engine.close)
            self._saver = Saver(self._engine, weakref.ref(self), fresh=fresh)
            self._restorer = Restorer(self._engine, read_only=read_only)
            self._ending = Ending(self._engine, self._saver, on_exception, bounded(close_timeout_s))
            opened.callback(self._ending.close)
            self._engine.open(read_only=read_only)
            if not read_only:
                self._ending.watch(open_sources(spot))
            self._opened = opened.pop_all()

    # -- restoring -----------------------------------------------------------------------------------------------------

    def restore(self, step: Which = "latest", *, weights_only: bool | None = None) -> int:
        """Put the newest complete checkpoint (or the one asked for) into the objects, in place.

        What becomes of modules, optimizers, dicts and lists, and which devices tensors go to: docs/how-to/training-loop.md. A warning names
        what an object did not take as it was saved.

        Args:
            step: a number goes back to it; "latest-valid" passes over damaged ones, with a warning and a record of it.
            weights_only: False lets the checkpoint run code, for your own only; None is True, unless one of
                TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says otherwise.

        Returns:
            The step of the checkpoint; 0 if the repository has never had one.

        Raises:
            CorruptCheckpointError, RefusedStateError, NoCheckpointError, StoreError, TooLargeError, RestoreError: nothing was changed.
                NoCheckpointError, if this only reads, also where there never was one: nothing is there to be evaluated.
            PartialRestoreError: an object did not take its state; `step` refuses to go on until a restore succeeds.
        """
        self._require_open()
        if weights_only is None:
            weights_only = resolve_weights_only(None, None)
        engine = self._engine
        engine.live.weights_only = weights_only
        engine.fence.wait("restore")
        engine.queue.wait_idle()
        self._engine.raise_failures()
        engine.queue.retaining.halt()  # or it might retire what is being restored
        try:
            return self._restore(step, weights_only)
        finally:
            engine.queue.retaining.go_on()

    def _restore(self, step: Which, weights_only: bool) -> int:
        if self._saver.fresh and step == "latest":
            self._saver.claim()
            return 0
        found = self._restorer.restore(step, weights_only)
        self._saver.begins_after(claimed=not self._read_only)
        if found is None:
            return 0
        commit = found.commit
        self._ending.forget_step()
        try:
            stateful.apply(
                self._engine.live.targets, found.state, self._engine.repository.location(commit.checkpoint), found.plan
            )
        except PartialRestoreError as error:
            self._broken = error
            raise
        self._broken, self.restored = None, commit
        self._last = SaveAsked(commit.save.step, metrics=commit.metrics, meta=commit.meta)
        self._saver.has_restored(commit, looked_at=not self._read_only)
        self._ending.mark_step()
        return commit.save.step

    # -- saving --------------------------------------------------------------------------------------------------------

    def step(
        self, step: int, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
    ) -> bool:
        """Save when due. To be called after each optimizer step.

        A save that was torn (something has changed the state while it was copied, without an optimizer's step) is not raised here: it is
        logged, and the next step is saved instead, before this returns. `wait` and `close` raise it if nothing newer is durable by then.

        Args:
            step: the number of steps done.
            metrics: numbers for `keep` and `ls`.
            meta: anything that JSON can hold.

        Returns:
            True: a notice has come and the final save is durable: leave the loop, and exit with `exit_code`.

        Raises:
            CheckpointError: what a background save has failed with since the last call. The state and earlier checkpoints are unharmed:
                catching it and going on is allowed.
            SaveError: the step goes backwards, or is no number.
            SupersededError: another incarnation has taken over.
            PartialRestoreError: the last restore left the objects in between.
        """
        started = time.monotonic()
        self._require_writing()
        if (
            self._ending.notice is None
        ):  # else there is no next call for which they could wait, and the final save tells them
            self._engine.raise_failures()
        asked = asked_for(step, "notice", metrics, meta, self._last)
        if self._ending.left:
            return True
        before, self._last = self._last, asked
        self._ending.mark_step()
        notice = self._ending.notice_after_step()
        if notice is not None:
            self._ending.save_finally(asked, notice)
            return True
        self._save_if_due(before, asked, started)
        self._saver.prepare()
        self._engine.fence.hooks.next_step()
        self._stall_s += time.monotonic() - started
        return False

    def _save_if_due(self, before: SaveAsked | None, asked: SaveAsked, now_s: float) -> None:
        due, torn = self._due, self._engine.torn
        since_s = now_s - self._saver.counts.begun_s
        due.look(
            None if before is None else before.step, asked.step, since_s, asked.metrics, early=self._ending.may_go_early
        )
        due.repeat(torn.trigger_for(asked.step))
        if due.trigger is None or torn.is_lost(asked.step) or self._saver.is_saved(asked.step):
            return
        if self._saver.begin_due(replace(asked, trigger=due.trigger)) is not None:
            due.done()

    def save_now(
        self, step: int, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
    ) -> CommitHandle:
        """Save this step, due or not. Waits while earlier saves hold the memory that this one needs.

        A step that is being saved, or is the last one saved, is not saved again: if the state is still the same (generators apart), the
        handle is that save's.

        Args:
            step, metrics, meta: as those of `step`.

        Returns:
            `handle.wait()` blocks until the save is durable.

        Raises:
            SaveError: also if the step is saved already, and the state has changed since: a checkpoint is made once.
            CheckpointError: as `step` does.
        """
        self._require_writing()
        self._engine.raise_failures()
        asked = asked_for(step, "manual", metrics, meta, self._last)
        self._saver.refuse_other_state(asked)
        handle = self._saver.begin(asked)
        self._last = asked
        return handle

    def fence(self) -> None:
        """Wait until the state has been copied. Call it before you change parameters or optimizer state by other means than a step.

        Raises:
            SnapshotStalledError: the copy was given up after `max_stall_s`; the state may be changed.
        """
        self._engine.fence.wait("fence()")

    # -- what has happened ---------------------------------------------------------------------------------------------

    @property
    def notice(self) -> Notice | None:
        """The notice that ends this run, once there is one; `step` acts on it."""
        return self._ending.notice

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 75 (EX_TEMPFAIL: start me again) after a notice, otherwise 0."""
        return EXIT_CODE_NOTICE if self._ending.left or self.notice is not None else 0

    @property
    def stats(self) -> Stats:
        """What saving has cost so far."""
        counts, durable = self._saver.counts, self._ending.durable
        return Stats(
            saves=counts.saves,
            durable_step=None if durable is None else durable.save.step,
            deferred=counts.deferred,
            stall_s=self._stall_s + self._engine.fence.stall_s,
            snapshot_bytes=self._engine.stager.pool.used_bytes,
        )

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all saves have ended, and, unless a notice has come, the retention behind them.

        Raises:
            TimeoutError: saves are still under way after `timeout_s` seconds.
            CheckpointError: what has failed since the last call, also what was torn.
        """
        self._require_open()
        self.fence()
        deadline, queue = Deadline.after(timeout_s, "timeout_s"), self._engine.queue
        with hurried():
            idle = queue.wait_idle(deadline.left_s())
        if not idle:
            raise TimeoutError(
                f"saves are still under way after {timeout_s} s: steps {[job.step for job in queue.jobs]}"
            )
        if self.notice is None:
            queue.retaining.wait_idle(deadline.left_s())
        self._engine.raise_failures(torn=True)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait until saves under way are durable, then let go of everything. May be called twice.

        Raises:
            SaveError: saves were not durable after FASTCKPT_EXIT_TIMEOUT_S (600), or what a notice left: a store that hangs must not keep
                the process.
            CheckpointError: what has failed since the last call of this object's methods, also if a handle's `wait` has raised it.
        """
        with self._closing() as open_yet:
            if open_yet:
                self.fence()
                self._ending.end()

    @contextlib.contextmanager
    def _closing(self) -> Iterator[bool]:
        """Around the last waits: afterwards all is closed, and what has failed is raised. False: it is closed already, or the parent's."""
        if self._closed or os.getpid() != self._pid:
            yield False
            return
        try:
            yield True
        finally:
            self._closed = True
            self._opened.close()
        self._engine.raise_failures(torn=True)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes. After a final notice an exception ends in SystemExit(exit_code), with it as the cause and in the log: it is mostly the
        notice's own consequence, and the launcher must know that the job is to be started again.
        """
        notice = self._ending.notice_behind(error)
        if error is None:
            try:
                self.close()
            except Exception as ours:
                if notice is None:
                    raise
                error = ours
        else:
            try:
                with self._closing() as open_yet:
                    if open_yet:
                        self._ending.after_exception(notice, None if self._broken is not None else self._last)
            except Exception as ours:
                # The first error is the one to see; ours goes with it.
                logger.error("closing the Checkpointer after an exception: %s: %s", type(ours).__name__, ours)
                if sys.version_info >= (3, 11):
                    error.add_note(f"fastckpt: {type(ours).__name__}: {ours}")
        # Who chooses a status of his own, or only closes a generator, has not failed.
        if notice is not None and error is not None and not isinstance(error, (SystemExit, GeneratorExit)):
            exit_after(notice, error)

    def _require_writing(self) -> None:
        self._require_open()
        if self._read_only:
            raise SaveError(
                f"this Checkpointer of {self._engine.repository.url} was opened with read_only=True: it restores, and saves nothing. Leave "
                "that out where the training loop is"
            )
        if self._broken is not None:
            raise self._broken

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this Checkpointer belongs to process {self._pid}, and this is a fork of it ({os.getpid()}): its threads are not here. "
                "A child that is to save needs one of its own"
            )
        if self._closed:
            raise CheckpointError("this Checkpointer is closed")


__all__ = ["EXIT_CODE_NOTICE", "Checkpointer", "CommitHandle", "Every", "Keep", "Stats"]
