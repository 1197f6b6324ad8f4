"""Finds out whether the state, and each copy of it, is still equal to the state at the call of save.

torch counts in-place changes of tensors: the *versions* of fenced tensors are compared at the fence and before the commit. Other writes
show in *fingerprints* of the bytes, with which each copy is compared. A difference in either of them means that the copy is torn.
"""

from __future__ import annotations

from fastckpt._types import U8
from fastckpt.errors import TornSnapshotError
from fastckpt.format.tensor_names import dotted
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.fingerprints import SaveFingerprints
from fastckpt.snapshot.progress import Copy
from fastckpt.snapshot.unchanged import Unchanged
from fastckpt.state import Captured


class TearWatch:
    """See the module. Any thread."""

    def __init__(
        self,
        captured: Captured,
        fenced: FencedTensors | None,
        fingerprints: SaveFingerprints,
        step: int | None,
        unchanged: Unchanged | None = None,
    ) -> None:
        """fenced: with the versions of the call of save. fingerprints: taken before any copy is left for later. unchanged: knows chunks
        whose copies waited although they are not fenced.
        """
        self._captured, self._fingerprints, self._step = captured, fingerprints, step
        self._unchanged = unchanged
        self._fenced = fenced or FencedTensors()
        others = {
            number for number in captured.shares if not captured.stretch(number)[1]
        }  # what others write is theirs to watch
        addresses = captured.addresses
        self._fenced.keep_only([a for n, a in enumerate(addresses) if n not in others] if others else addresses)
        self.torn_name: str | None = None
        """The first tensor that was seen to be torn, whether or not its copy could be repeated."""

    def changed_state(self) -> TornSnapshotError | None:
        """An error if torch's versions show a change of the state; None if they do not."""
        address = self._fenced.changed()
        if address is None:
            return None
        name = self._name(self._captured.addresses.index(address))
        self.torn_name = self.torn_name or name
        return TornSnapshotError(
            f"{name} changed while it was copied, outside of an optimizer's step(). Nothing was committed. "
            "Call ckpt.fence() before changing parameters or optimizer state by other means"
        )

    def is_torn(self, copy: Copy, content: U8) -> bool:
        """Whether a copy's bytes differ from those at the call of save. Also False if those are not known."""
        is_copy = self._fingerprints.is_host_copy if copy.device is None else self._fingerprints.is_device_copy
        late = self._unchanged is None or self._unchanged.is_copy(copy.number, content)
        return self._note(copy, torn=not (late and is_copy(copy.number, content)))

    def is_changed(self, copy: Copy) -> bool:
        """Whether a chunk in host memory differs, as it is now, from the call of save. Asked before and after its copy: a write to a whole
        tensor that runs beside the copy spoils only a part of it, which a sample may miss.
        """
        if not all(self._captured.is_there(piece.storage) for piece in copy.chunk.pieces):
            return False  # the copy itself reports memory that is gone
        return self._note(copy, torn=not self._fingerprints.is_host_unchanged(copy.number))

    def _note(self, copy: Copy, *, torn: bool) -> bool:
        if torn:
            self.torn_name = self.torn_name or self._names(copy)
        return torn

    def torn_copy(self, copy: Copy) -> TornSnapshotError:
        """The error for a torn copy that cannot be repeated."""
        return TornSnapshotError(
            f"{self._names(copy)}: the bytes that were copied are not those of the call of save. Something has written to them without "
            f"torch's knowledge (.data, a NumPy view, a kernel of its own) before the optimizer's step. Nothing of step {self._step} was "
            "committed. Call ckpt.fence() before such writes"
        )

    def _names(self, copy: Copy) -> str:
        """A short description of a chunk's tensors."""
        return ", ".join(sorted({self._name(piece.storage) for piece in copy.chunk.pieces})[:3])

    def _name(self, storage: int) -> str:
        return next((dotted(t.name) for t in self._captured.tensors if t.storage == storage), f"storage {storage}")

    def forget_tensors(self) -> None:
        """Drop all references to tensors. Versions are not compared after this."""
        self._fenced = FencedTensors()
