"""One call of `Checkpointer.restore`: what it waits for, what it leaves to come later, and what holds when it has failed."""

from __future__ import annotations

from collections.abc import Callable

from fastckpt.errors import PartialRestoreError
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit
from fastckpt.repository.catalog import Which
from fastckpt.training.arrival import Arrival
from fastckpt.training.decisions import Decisions
from fastckpt.training.ending import Ending
from fastckpt.training.engine import Engine
from fastckpt.training.restore_asked import RestoreAsked
from fastckpt.training.restored_base import Prints, RestoredBase
from fastckpt.training.restorer import Loaded, Restorer
from fastckpt.training.saver import Saver
from fastckpt.training.straight import are_taken


class Restoring:
    """See the module. Used by the thread that trains."""

    def __init__(
        self, engine: Engine, restorer: Restorer, saver: Saver, ending: Ending, decisions: Decisions, *, read_only: bool
    ) -> None:
        self._engine, self._restorer, self._saver = engine, restorer, saver
        self._ending, self._decisions, self._read_only = ending, decisions, read_only
        self._arrival: Arrival | None = None
        self._broken: PartialRestoreError | None = None
        self._base = RestoredBase(engine, read_only=read_only)

    @property
    def is_whole(self) -> bool:
        """Whether the objects have one state, as far as restores go. Waits for nothing."""
        return self._broken is None and self._arrival is None

    def require_whole(self) -> None:
        """Wait until all of the last restore has come. PartialRestoreError if the objects are a mixture."""
        if self._arrival is not None:
            self._arrival.wait()
        if self._broken is not None:
            raise self._broken

    def give_up(self, limit_s: float | None = None) -> None:
        """End what is left of the last restore: it is followed by another one, or by nothing. limit_s: for the latter, see `Arrival`."""
        arrival = self._arrival
        if arrival is None:
            return
        arrival.give_up(limit_s)
        if arrival.error is None:
            arrival.wait()  # it was there already
            return
        self._broken = arrival.error
        logger.warning("%s", arrival.error)
        self._arrival = self._engine.fence.hooks.arriving = None
        self._engine.queue.retaining.go_on()

    def restore(self, step: Which, asked: RestoreAsked) -> Commit | None:
        """Put a checkpoint into the objects. None: there is none. Errors as those of `Checkpointer.restore`."""
        engine, writing = self._engine, self._restorer.writing
        if step == "latest-valid":
            asked = asked._replace(atomic=True)  # what is passed over leaves nothing behind
        self.give_up()
        engine.live.weights_only = asked.weights_only
        engine.fence.wait("restore")
        engine.queue.wait_idle()
        engine.raise_failures()
        engine.queue.retaining.halt()  # otherwise retention might retire the checkpoint that is being restored
        writing.has_begun = False
        try:
            return self._restore(step, asked)
        except BaseException as error:
            if writing.has_begun:
                self._broken = writing.broken_by(error)
                if isinstance(error, Exception):
                    raise self._broken from (None if error is self._broken else error)
            raise
        finally:
            if self._arrival is None:
                engine.queue.retaining.go_on()

    def _restore(self, step: Which, asked: RestoreAsked) -> Commit | None:
        if self._saver.fresh and step == "latest":
            self._saver.claim()
            return None
        found = self._restorer.restore(step, asked._replace(overlap=asked.overlap and self._may_overlap()))
        comes_later = found is not None and found.choice is not None
        self._saver.begins_after(claimed=not (self._read_only or comes_later))
        if found is None:
            return None
        self._ending.forget_step()
        prints = self._base.before(found)
        self._restorer.put_in(found)
        self._restorer.writing.ends_well()
        self._broken = None
        self._decisions.restored()
        self._engine.positions.restored(found.commit.save.step)
        if comes_later:
            self._let_come(found, step)
            if not are_taken(found.straight, self._engine.live.optimizers):  # they have made copies, of nothing yet
                self.require_whole()
                self._restorer.put_in(found)
                self._restorer.writing.ends_well()
        else:
            self._is_there(found, prints)
        self._ending.mark_step()
        return found.commit

    def _may_overlap(self) -> bool:
        """Whether what comes later is certainly waited for: by a hook of each optimizer, in a process that trains alone."""
        return not self._read_only and self._engine.team is None and self._engine.fence.hooks.are_set

    def _let_come(self, found: Loaded, step: Which) -> None:
        """Read states of optimizers while training goes on: into memory that the optimizers have taken already."""
        assert found.reader is not None
        has_changed = self._engine.live.watched_apart()
        fill = self._restorer.writing.filling(found.reader, found.straight, found.straight.states)

        def read(stops: Callable[[], bool]) -> None:
            self._restorer.arrive(found, step, fill, stops)

        def finish() -> None:
            fill.hold_back()
            self._arrival = self._engine.fence.hooks.arriving = None
            self._saver.begins_after(claimed=True)
            changed = has_changed()
            self._is_there(found, {})
            self._engine.fence.updated |= changed
            self._engine.queue.retaining.go_on()

        self._arrival = Arrival(read, finish, self._restorer.writing.broken_by)
        self._engine.fence.hooks.arriving = self._arrival.wait

    def _is_there(self, found: Loaded, prints: Prints) -> None:
        self._saver.has_restored(found.commit, looked_at=not self._read_only)
        self._base.after(found, prints)
