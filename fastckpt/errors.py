"""Everything fastckpt raises on purpose.

    CheckpointError(RuntimeError)            catch this one to catch all of them
     ├─ CorruptCheckpointError               damage: bytes are not what a checksum says. Take another checkpoint
     ├─ UnsupportedFormatError               made by a newer fastckpt, or for another platform. Upgrade
     ├─ NotACheckpointError                  never was one. Check the path
     │   └─ EmptyCheckpointError(EOFError)   a file of 0 bytes, as torch.load's EOFError
     ├─ TooLargeError(MemoryError)           says it holds more than this machine has. Raise the limit if you trust it
     ├─ UnknownTensorError(KeyError)         a name that is not in the checkpoint
     └─ SaveError                            the state or the target cannot be saved as asked. Fix the call

Operating system errors (OSError: no such file, disk full, permission denied) and torch's own (UnpicklingError for a refused global,
RuntimeError for a device that is not there) pass through as they are, so that code written for torch.save and torch.load keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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
    """Dotted names of the tensors that cannot be restored because of it."""

    def __str__(self) -> str:
        text = f"{self.part}, {self.place}: expected {self.expected}, found {self.found}"
        if self.tensors:
            shown = ", ".join(f'"{name}"' for name in self.tensors[:3])
            more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
            text += f" (affects {shown}{more})"
        return text


class CorruptCheckpointError(CheckpointError):
    """Stored bytes are damaged. `.damage` lists every finding of the operation, not only the first."""

    def __init__(self, source: str, damage: Iterable[Damage]) -> None:
        self.source = source
        self.damage = tuple(damage)
        lines = [str(item) for item in self.damage[:_MESSAGE_LINES]]
        if len(self.damage) > _MESSAGE_LINES:
            lines.append(f"… and {len(self.damage) - _MESSAGE_LINES} more")
        super().__init__(
            f"{source} is damaged:\n  "
            + "\n  ".join(lines)
            + "\nNothing was loaded. Use another copy of it; `fastckpt check` lists everything affected."
        )


class UnsupportedFormatError(CheckpointError):
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
