"""Everything fastckpt raises on purpose.

    CheckpointError(RuntimeError)            catch this one to catch all of them
     ├─ UnreadableError                      this checkpoint cannot be read; the store can. Take another checkpoint
     │   ├─ CorruptCheckpointError           damage: bytes are not what a checksum says
     │   ├─ UnsupportedFormatError           made by a newer fastckpt, or for another platform. Upgrade
     │   └─ MissingObjectError               an object that it needs is not there (an ObjectNotFoundError too)
     ├─ NotACheckpointError                  never was one. Check the path
     │   └─ EmptyCheckpointError(EOFError)   a file of 0 bytes, as torch.load's EOFError
     ├─ TooLargeError(MemoryError)           says it holds more than this machine has. Raise the limit if you trust it
     ├─ UnknownTensorError(KeyError)         a name that is not in the checkpoint
     ├─ SaveError                            the state or the target cannot be saved as asked. Fix the call
     │   ├─ TornSnapshotError                the state changed while it was copied. Nothing was committed
     │   ├─ BaseLostError                    the checkpoint that it refers to was retired. Nothing was committed; the next save is whole
     │   ├─ AbandonedError                   another rank could not save this step, so no rank does. Nothing was committed
     │   ├─ TargetBusyError                  an earlier save to the same target did not end in time. Nothing was committed
     │   ├─ OvertakenError                   a later save to the same target was written first. This one was not
     │   ├─ OutOfHostMemoryError(MemoryError)  no memory for the copy of the state, or for its upload
     │   └─ SnapshotStalledError             training had waited max_stall_s for a copy of the state. Nothing was committed
     ├─ RestoreError                         a restore cannot do what was asked. Nothing was changed
     │   ├─ NoCheckpointError                there is no such checkpoint
     │   │   └─ RetiredError                 retention took it while it was read. Take the newest
     │   ├─ RefusedStateError(UnpicklingError)  it holds what a restricted restore does not read
     │   └─ PartialRestoreError              it failed midway: the state is a mixture. Restore again before training
     ├─ RepositoryError                      a directory or prefix that is not what it must be, or is used against its rules
     │   └─ SupersededError                  another incarnation of this job has taken over. Stop this one
     ├─ RanksError                           ranks of one job disagree, or one is not heard of. Every rank gets the same words
     └─ StoreError                           a store refused, for good
         ├─ StoreFullError                   no room left on the disk, or none of the quota. Free some
         ├─ StoreAccessError                 credentials, permissions, wrong owner
         ├─ StoreUnavailableError            no answer, or "later": worth another try (already tried several times)
         ├─ ObjectNotFoundError              no such key
         │   └─ MissingObjectError           … and a repository needs it: UnreadableError tells the two apart
         └─ ObjectExistsError                create-if-absent met an object

Operating system errors (OSError: no such file, disk full, permission denied) and torch's own (UnpicklingError for a refused global,
RuntimeError for a device that is not there) pass through as they are, so that code written for torch.save and torch.load keeps working. A
Checkpointer's saves wrap errors of memory and devices: see `as_save_error`.
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_MESSAGE_LINES = 10


class CheckpointError(RuntimeError):
    """Base of all errors that fastckpt raises on purpose."""


@dataclass(frozen=True, order=True)
class Damage:
    """One finding: what is wrong, and where."""

    part: str
    """header, payload, directory, file table, records, skeleton or footer (docs/glossary.md)."""
    place: str
    """Chunk, byte range or member within the part."""
    expected: str
    found: str
    tensors: tuple[str, ...] = field(default=())
    """Dotted names of the tensors that cannot be restored because of this damage."""
    stored: tuple[str, int] | None = field(default=None, compare=False)
    """Of stored bytes of a repository: the key of their pack, and the first byte's offset there. Other checkpoints may name them, too."""

    def __str__(self) -> str:
        text = f"{self.part}, {self.place}: expected {self.expected}, found {self.found}"
        if self.tensors:
            shown = ", ".join(f'"{name}"' for name in self.tensors[:3])
            more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
            text += f" (affects {shown}{more})"
        return text


class UnreadableError(CheckpointError):
    """A checkpoint, or a record of a repository, cannot be read, whatever the store does: another try will find the same."""


class CorruptCheckpointError(UnreadableError):
    """Stored bytes are damaged. `.damage` lists every finding of the operation, not only the first."""

    def __init__(self, source: str, damage: Iterable[Damage], advice: str = "") -> None:
        self.source = source
        self.damage = tuple(damage)
        self.advice = advice
        lines = [str(item) for item in self.damage[:_MESSAGE_LINES]]
        if len(self.damage) > _MESSAGE_LINES:
            lines.append(f"… and {len(self.damage) - _MESSAGE_LINES} more")
        self.findings = f"{source} is damaged:\n  " + "\n  ".join(lines)
        """What is damaged, in words."""
        then = advice or "Use another copy of it; `fastckpt check` lists everything affected."
        super().__init__(f"{self.findings}\nNothing was loaded. {then}")

    def __reduce__(self) -> tuple[Any, ...]:  # ranks tell each other their errors
        return type(self), (self.source, self.damage, self.advice)


class UnsupportedFormatError(UnreadableError):
    """The file is whole as far as can be told, but this version of fastckpt must not read it."""


class NotACheckpointError(CheckpointError):
    """Neither a fastckpt container nor a file of torch.save or safetensors."""


class EmptyCheckpointError(NotACheckpointError, EOFError):
    """A file of no bytes."""


class TooLargeError(CheckpointError, MemoryError):
    """The checkpoint says that it holds more bytes than may be allocated (`max_load_bytes`)."""


class UnknownTensorError(CheckpointError, KeyError):
    """No tensor of that name, or more than one."""

    def __str__(self) -> str:  # KeyError would show the repr of the text
        return str(self.args[0])


class SaveError(CheckpointError):
    """The state or the target cannot be saved as asked."""


class TornSnapshotError(SaveError):
    """A tensor changed between the call of `save` and the end of its copy. Nothing was committed."""


class BaseLostError(SaveError):
    """The checkpoint that a save refers to is none any more. Nothing was committed; a save that refers to nothing can be made."""


class AbandonedError(SaveError):
    """All ranks have abandoned a save because one of them could not make its part."""

    def __init__(self, step: int, why: str) -> None:
        """why: as it stands on the board; a reason that begins with "!" is another rank's error, others are no failure of anybody."""
        self.is_failure = why.startswith("!")
        self._made_of = step, why
        super().__init__(f"step {step} was abandoned by all ranks: {why.lstrip('!')}. Nothing was committed")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of


class TargetBusyError(SaveError):
    """An earlier save to the same target had not ended after `max_order_wait_s`. Nothing of this one was committed."""


class OvertakenError(SaveError):
    """A later save to the same target was made first: it is there, and this one, which is older, was not written over it."""


class SnapshotStalledError(SaveError):
    """Training had to wait too long for the copy of its state, which was then dropped. Nothing was committed."""


class OutOfHostMemoryError(SaveError, MemoryError):
    """There was no host memory for the copy of the state, or for its upload."""


class RestoreError(CheckpointError):
    """A restore cannot be done as requested. The state was not changed, unless this is a PartialRestoreError."""


class NoCheckpointError(RestoreError):
    """The repository has no checkpoint that matches the request."""


class RetiredError(NoCheckpointError):
    """The checkpoint was retired while it was being read: a newer one exists."""


class RefusedStateError(RestoreError, pickle.UnpicklingError):
    """The checkpoint holds types that a restricted restore refuses, as they could run code. Nothing was changed."""


class PartialRestoreError(RestoreError):
    """A restore failed when it had begun to write into the objects: they are a mixture of old and new values. Training must not continue
    from here; a restore that succeeds writes all of them. The cause, such as CorruptCheckpointError, is chained.
    """


class RepositoryError(CheckpointError):
    """A repository is not what it must be, or is used against its rules (docs/guarantees.md)."""


class SupersededError(RepositoryError):
    """A newer incarnation of this job has claimed the repository: checkpoints of this one will not be restored by default."""


class RanksError(CheckpointError):
    """The ranks of one job disagree, or one of them is not heard of."""


class StoreError(CheckpointError):
    """A store refused an operation, and another try will not help."""


class StoreAccessError(StoreError):
    """The store refuses access: because of the credentials, the permissions, or the bucket's owner."""


class StoreFullError(StoreError):
    """The store has no space for the object. Nothing of the object was written."""


class StoreUnavailableError(StoreError):
    """The store did not answer, or asked to come back later. A write that ends like this may have been done."""

    refused = False
    """True: the operation was certainly not done, because the request was never sent, or the answer said so."""


class ObjectNotFoundError(StoreError):
    """There is no object with that key."""


class MissingObjectError(UnreadableError, ObjectNotFoundError):
    """An object that a repository needs is missing: a record, or a rank's index."""


class ObjectExistsError(StoreError):
    """`put_if_absent` found an existing object."""


class ObjectChangedError(StoreError):
    """`replace_if_match` found another version of the object than the one that was read. Nothing was written."""


class UnsupportedVerbError(StoreError):
    """The store does not have this optional operation. Nothing was written."""


def as_save_error(error: BaseException, step: int) -> BaseException:
    """Convert an error of the machine into the one that a Checkpointer's save raises: a SaveError with `error` as its cause.

    Returned unchanged: fastckpt's own errors, OSErrors other than ENOMEM, KeyboardInterrupt and SystemExit, and exception classes that
    other libraries define.
    """
    if isinstance(error, CheckpointError):
        return error
    words = f"the save of step {step} failed: "
    stands = "It was not acknowledged; earlier checkpoints are as they were"  # the error may have come after the commit
    found: SaveError
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        detail = f": {error}" if str(error) else ""
        found = OutOfHostMemoryError(
            f"{words}there is no host memory left{detail}. {stands}. Lower host_budget_bytes (FASTCKPT_HOST_BUDGET_BYTES) to what is free"
        )
    elif type(error) is RuntimeError or (
        isinstance(error, RuntimeError) and type(error).__module__.startswith("torch")
    ):
        # torch's errors of devices, Python's of threads. Subclasses of RuntimeError from other libraries are left for their authors.
        found = SaveError(
            f"{words}{type(error).__name__}: {str(error).partition(chr(10))[0]}. {stands}. If a device has failed, start the process again"
        )
    else:
        return error
    found.__cause__ = error
    return found
