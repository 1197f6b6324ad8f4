"""What restores write into the live objects before `stateful.apply`, and what becomes of the objects when that fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastckpt.errors import CorruptCheckpointError, PartialRestoreError
from fastckpt.format.tensor_names import Name
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.training.fitting import named_places, refuse_leftovers
from fastckpt.training.placement import PlacementPlan
from fastckpt.training.straight import Straight
from fastckpt.training.straight_fill import StraightFill, count_as_written


class LiveWriting:
    """See the module. Used by the thread that trains."""

    def __init__(self, url: str, targets: Mapping[str, Any], options: Options) -> None:
        """url: of the repository. targets: the objects. options: how many read and decode at once."""
        self._url, self._targets, self._options = url, targets, options
        self._mixed: set[Name] = set()
        """What has been written since the objects had the state of one checkpoint: objects, and tensors of modules."""
        self.has_begun = False
        """Whether the newest restore has changed the objects, and has not ended well."""

    def begins(self, plan: PlacementPlan) -> None:
        """From now on the objects may be a mixture. plan: of the checkpoint that they are to have."""
        self.has_begun = True
        self._mixed |= named_places(self._targets, plan)

    def ends_well(self) -> None:
        """All objects have the state of one checkpoint."""
        self._mixed.clear()
        self.has_begun = False

    def refuse_leftovers(self, loaded: Mapping[Any, Any], where: str, plan: PlacementPlan) -> None:
        """RestoreError if something that a failed restore has written would stay as it is."""
        refuse_leftovers(self._mixed, loaded, where, plan)

    def filling(self, reader: Reader, straight: Straight, numbers: Collection[int]) -> StraightFill:
        """What reads storages of a checkpoint straight into the objects."""
        return StraightFill(reader, {number: straight.storages[number] for number in numbers}, self._options)

    def fill(
        self,
        reader: Reader | None,
        straight: Straight,
        plan: PlacementPlan,
        run: Callable[[Callable[[], None]], None],
        *,
        states: bool,
    ) -> None:
        """Read what goes straight into the objects. states: those of optimizers, too. run: calls what it is given, and names its errors."""
        numbers = [number for number in straight.storages if states or number not in straight.states]
        if reader is None or not numbers:
            return
        self.begins(plan)
        fill = self.filling(reader, straight, numbers)
        try:
            run(fill.run)
        finally:
            count_as_written(straight.live)
        fill.hold_back()

    def broken_by(self, error: BaseException) -> PartialRestoreError:
        """The error for objects that hold a mixture because of another one."""
        if isinstance(error, PartialRestoreError):
            return error
        words = f"{error.findings}\n{error.advice}" if isinstance(error, CorruptCheckpointError) else str(error)
        return PartialRestoreError(
            f"the restore from {self._url} failed when it had begun to write into the objects: {type(error).__name__}: {words}\n"
            "They hold a mixture of two states and must not be trained: `step` and `save_now` raise this error until a restore succeeds. "
            'restore(step="latest-valid") passes over checkpoints that are damaged; restore(atomic=True) verifies all bytes before it '
            "changes anything, and needs memory for them"
        )
