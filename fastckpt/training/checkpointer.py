"""The training loop's object: saves when a step is due or the machine is about to go, restores in place.

A facade over four parts: `Saver` begins saves, `Restoring` reads them back, `Fence` keeps optimizers' steps and copies apart, `Ending`
handles notices, exceptions and `close`. Its 13 attributes are these parts, and the guards of each call.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from fastckpt.errors import CheckpointError, SaveError
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit
from fastckpt.host.deadline import Deadline, bounded
from fastckpt.host.threads import hurried
from fastckpt.kernels import warm_up
from fastckpt.options import Options
from fastckpt.ranks.world import current_world
from fastckpt.repository.catalog import Which
from fastckpt.repository.retention import GRACE_S, Keep
from fastckpt.spot import Notice, open_sources
from fastckpt.store.base import Store
from fastckpt.training.arguments import asked_for, asked_of, check_settings
from fastckpt.training.ending import EXIT_CODE_NOTICE, Ending, exit_after, in_a_hurry
from fastckpt.training.engine import Engine
from fastckpt.training.joint import decisions_of, restorer_of
from fastckpt.training.live_state import LiveState
from fastckpt.training.restore_asked import Reassign
from fastckpt.training.restoring import Restoring
from fastckpt.training.save_queue import CommitHandle
from fastckpt.training.saver import Saver
from fastckpt.training.schedule import Every
from fastckpt.training.stats import Stats
from fastckpt.writing.rank import SaveAsked


class Checkpointer:
    """Saves and restores the objects of a training loop; `help(fastckpt)` shows the loop. Close it, or use `with`.

    Errors of background saves are raised by the next call, and by `close`. Errors, notices and hanging stores never keep `step` from
    returning, with two exceptions: the final save (it has a deadline), and the first save without a `restore` (it claims the repository).

    Args:
        url: a directory, "s3://bucket/prefix", or a Store.
        state: names → objects with state_dict and load_state_dict, tensors, dicts or lists.
        every: when to save; None: only `save_now` and notices cause saves.
        keep: which checkpoints stay; None: all.
        spot: "auto", None, or sources of notices (docs/spot.md).
        fresh: begin a new history where there are checkpoints.
        read_only: `restore` alone, for evaluation and inference beside a training job, which goes on: nothing is written and no epoch
            is claimed (GET, HEAD and LIST are all it needs); `step` and `save_now` are refused.
        on_exception: "save" saves the last step once more when the block is left by an exception, unless the next one had begun to
            change the state.
        close_timeout_s: seconds that a save in flight gets then, and what a restore has left to come.
        replicated: of several ranks, dotted names of what is the same on all of them, beside DTensors and DistributedDataParallel, whose
            replicas are known: ("model", "optim.state") is the object "model", and all names that begin with "optim.state.". It is
            written once. If it is not the same, a restore brings back a mixture: see `verify_replicas`.
        verify_replicas: compare, at each save, what several ranks should hold alike, and commit nothing if it differs. Reads all of it
            before `step` returns: for a few saves of a new setup.
        reassign: says, at a restore on another number of ranks, what becomes of an object that each saved rank had for itself, such as
            random generators. Called on each rank with the object's name, its states (one for each saved rank, read when asked for), this
            rank and the number of ranks. Returns a state, or None to leave the object as it is. Without it such a restore is refused.
        grace_s: seconds that bytes of retired checkpoints stay.
        options: every other knob; None: `Options.from_env()`.

    Raises:
        TypeError, ValueError: an argument is wrong; all problems are listed.
        StoreError: the store cannot be used.
        RepositoryError: something else lies at the URL; or, with `read_only`, nothing lies there.
        SaveError: several ranks; `spill_dir` cannot be written to.

    Threads: used by the training thread. Any thread may read `notice`, `exit_code` and `stats`; optimizers' hooks may run in others.
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
        verify_replicas: bool = False,
        reassign: Reassign | None = None,
        grace_s: float = GRACE_S,
        options: Options | None = None,
    ) -> None:
        """Read the repository's marker, or make it and probe the store. Arguments and errors: see the class."""
        world = current_world()
        switches = {"fresh": fresh, "read_only": read_only, "verify_replicas": verify_replicas}
        seconds = {"close_timeout_s": close_timeout_s, "grace_s": grace_s}
        check_settings(every, keep, on_exception, switches, seconds, alone=world.is_alone)
        warm_up()  # without native kernels numba compiles for seconds: do that now, in the background, and not when a notice has come
        options = (options or Options.from_env()).shared_by(world.local_size)
        sampled = options.verify_snapshot != "off"
        live = LiveState(state, sampled=sampled, replicated=replicated, verify_replicas=verify_replicas, world=world)
        self._read_only = read_only
        self._closed, self._pid = False, os.getpid()
        self._last: SaveAsked | None = None
        """The last step with its metrics and meta: as given to `step` or `save_now`, or as stored in the checkpoint that was restored."""
        self._stall_s = 0.0
        self.restored: Commit | None = None
        """The commit record of the checkpoint that `restore` loaded, with its metrics, meta and time."""
        with contextlib.ExitStack() as opened:  # if a line below fails, this closes what is open
            hurry = in_a_hurry(weakref.ref(self))
            self._engine = Engine.start(url, live, options, keep, grace_s, hurry, hooked=not read_only, world=world)
            opened.callback(self._engine.close)
            self._saver = Saver(self._engine, weakref.ref(self), fresh=fresh)
            self._ending = Ending(self._engine, self._saver, on_exception, bounded(close_timeout_s))
            self._decisions = decisions_of(self._engine, self._saver, self._ending, every)
            opened.callback(self._ending.close)
            restorer = restorer_of(self._engine, read_only=read_only, reassign=reassign)
            parts = restorer, self._saver, self._ending, self._decisions
            self._restoring = Restoring(self._engine, *parts, read_only=read_only)
            opened.callback(self._restoring.give_up, bounded(close_timeout_s))
            alike = {"keys of the state": sorted(live.targets), "every": repr(every), "replicated": list(replicated)}
            alike["samplers"] = self._engine.positions.shared
            self._engine.open({**alike, **switches}, read_only=read_only)
            if not read_only:
                self._ending.watch(open_sources(spot, leads_node=world.leads_node))
            self._opened = opened.pop_all()

    # -- restoring -----------------------------------------------------------------------------------------------------

    def restore(
        self,
        step: Which = "latest",
        *,
        weights_only: bool | None = None,
        strict: bool = True,
        atomic: bool = False,
        overlap: bool = False,
    ) -> int:
        """Put the newest complete checkpoint (or the one asked for) into the objects, in place.

        What becomes of modules, optimizers, dicts and lists, and which devices tensors go to: docs/how-to/training-loop.md. A warning names
        what an object did not take as it was saved.

        Args:
            step: a number goes back to it; "latest-valid" passes over damaged ones, with a warning and a record of it.
            weights_only: False lets the checkpoint run code: use it only for checkpoints of your own. None means True, unless one of
                TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says otherwise.
            strict: False: objects, and tensors of modules, that are not in the checkpoint stay as they are, and what it has besides is
                passed over. A warning lists both. What has another shape is refused all the same.
            atomic: True: verify every byte before anything is changed. Takes memory for the whole state, which is read straight into
                parameters and optimizer state otherwise.
            overlap: True: return when all but the state of optimizers is there. That comes meanwhile, and an optimizer's `step` and
                `state_dict`, `step`, `save_now`, `fence` and `close` wait for it. Where that cannot be relied on, this waits for it.

        Returns:
            The step of the checkpoint; 0 if the repository has never had one.

        Raises:
            CorruptCheckpointError, RefusedStateError, NoCheckpointError, StoreError, TooLargeError, RestoreError: this has changed nothing.
                NoCheckpointError, with `read_only`, also if the repository never had a checkpoint: there is nothing to evaluate.
            PartialRestoreError: tensors were found damaged, or could not be read, when some had been written; or an object did not take
                its state. The objects are a mixture: `step` and `save_now` raise this until a restore succeeds.
            ValueError: `overlap` with `atomic`, or with "latest-valid".
        """
        self._require_open()
        commit = self._restoring.restore(
            step, asked_of(step, weights_only, strict=strict, atomic=atomic, overlap=overlap)
        )
        if commit is None:
            return 0
        self.restored, self._last = commit, SaveAsked(commit.save.step, metrics=commit.metrics, meta=commit.meta)
        return commit.save.step

    # -- saving --------------------------------------------------------------------------------------------------------

    def step(
        self, step: int, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
    ) -> bool:
        """Save when due. To be called after each optimizer step. Counts it in the samplers of the state (`ElasticSampler`) first.

        A torn save (the state changed during its copy, without an optimizer's step) is not raised here. It is logged, and the next step is
        saved instead, before this returns. `wait` and `close` raise it if no newer step is durable by then.

        Args:
            step: the number of steps done.
            metrics: numbers for `keep` and `ls`.
            meta: anything that JSON can hold.

        Returns:
            True: a notice has come and the final save is durable: leave the loop, and exit with `exit_code`.

        Raises:
            CheckpointError: the error of a background save that failed since the last call. The state and earlier checkpoints are unharmed:
                you may catch it and go on.
            SaveError: the step goes backwards, is no number, or cannot be right for a sampler of the state.
            SupersededError: another incarnation has taken over.
            PartialRestoreError: the last restore changed only some of the objects.
        """
        started = time.monotonic()
        self._require_writing()
        decisions = self._decisions
        if (
            self._ending.notice is None and decisions.raises_first
        ):  # otherwise no next call will raise them, and the final save reports them
            self._engine.raise_failures()
        asked = asked_for(step, "notice", metrics, meta, self._last)
        if self._ending.left:
            return True
        self._engine.positions.reached(step)
        before, self._last = self._last, asked
        self._ending.mark_step()
        decisions.begin_call()
        final = decisions.final()
        if final is not None:
            self._ending.save_finally(asked, final.notice, final.rung, decisions.begin)
            return True
        decisions.save_if_due(before, asked, started)
        if not decisions.raises_first:
            self._engine.raise_failures()
        self._saver.prepare()
        self._engine.fence.hooks.next_step()
        self._stall_s += time.monotonic() - started
        return False

    def save_now(
        self,
        step: int,
        *,
        metrics: Mapping[str, float] | None = None,
        meta: Mapping[str, Any] | None = None,
        full: bool = False,
    ) -> CommitHandle:
        """Save this step, due or not. Waits while earlier saves hold the memory that this one needs.

        A step that is being saved, or was saved last, is not saved again: if the state is still the same (apart from random generators),
        this returns the handle of that save.

        Args:
            step, metrics, meta: as those of `step`.
            full: True: the new checkpoint names bytes of no other one. Of several ranks each speaks for its own part.

        Returns:
            `handle.wait()` blocks until the save is durable.

        Raises:
            SaveError: also if the step is saved already and the state has changed since then: a checkpoint of a step is made only once.
            CheckpointError: as `step` does.
        """
        self._require_writing()
        if self._decisions.raises_first:
            self._engine.raise_failures()
        asked = asked_for(step, "manual", metrics, meta, self._last, full=full)
        self._engine.positions.reached(step)
        handle = self._decisions.save_now(asked)
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
        """The notice that ends this run, or None; `step` acts on it."""
        return self._ending.notice

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 75 (EX_TEMPFAIL: start me again) after a notice, otherwise 0."""
        return EXIT_CODE_NOTICE if self._ending.left or self.notice is not None else 0

    @property
    def stats(self) -> Stats:
        """What saving has cost so far."""
        stall_s = self._stall_s + self._engine.fence.stall_s
        return self._saver.counts.stats(self._ending.durable, stall_s, self._engine.stager.pool.used_bytes)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all saves have ended, and, unless a notice has come, the retention behind them.

        Raises:
            TimeoutError: saves are still under way after `timeout_s` seconds.
            CheckpointError: the error of a save that failed or was torn since the last call.
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
        """Wait until saves under way are durable, then release all resources. May be called twice.

        Raises:
            SaveError: saves were not durable after FASTCKPT_EXIT_TIMEOUT_S (600 s), or after the seconds that a notice left. A store that
                hangs must not keep the process alive.
            CheckpointError: the error of a save that failed since the last call of this object's methods, even if a handle's `wait` raised
                it already.
        """
        with self._closing() as open_yet:
            if open_yet:
                self.fence()
                self._ending.end()

    @contextlib.contextmanager
    def _closing(self) -> Iterator[bool]:
        """Context around the last waits: at its end everything is closed, and errors of saves are raised. Yields False if the object is
        closed already, or belongs to the parent process.
        """
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
        """Close. If a final notice has come, an exception ends in SystemExit(exit_code), with the exception as its cause and in the log:
        the exception is mostly a consequence of the notice, and the launcher must know that it has to start the job again.
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
                        self._ending.after_exception(notice, self._last if self._restoring.is_whole else None)
            except Exception as ours:
                # The user's exception is the one to raise; the error of closing is logged beside it.
                logger.error("closing the Checkpointer after an exception: %s: %s", type(ours).__name__, ours)
                if sys.version_info >= (3, 11):
                    error.add_note(f"fastckpt: {type(ours).__name__}: {ours}")
        # A SystemExit has a status that the user chose, and a GeneratorExit only closes a generator: neither is a failure.
        if notice is not None and error is not None and not isinstance(error, (SystemExit, GeneratorExit)):
            exit_after(notice, error)

    def _require_writing(self) -> None:
        self._require_open()
        if self._read_only:
            raise SaveError(
                f"this Checkpointer of {self._engine.repository.url} was opened with read_only=True: it restores, and saves nothing. Leave "
                "that out where the training loop is"
            )
        self._restoring.require_whole()

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this Checkpointer belongs to process {self._pid}, and this is a fork of it ({os.getpid()}): its threads are not here. "
                "A child that is to save needs one of its own"
            )
        if self._closed:
            raise CheckpointError("this Checkpointer is closed")


__all__ = ["EXIT_CODE_NOTICE", "Checkpointer", "CommitHandle", "Every", "Keep", "Stats"]
