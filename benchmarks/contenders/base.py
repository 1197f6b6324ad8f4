"""What every contender must answer. The worker measures around these calls and knows nothing else about them."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

State = dict[str, Any]


class Contender(abc.ABC):
    """One way to store a state. `directory` is empty when `begin` gets it and belongs to the contender alone."""

    name = ""
    asynchronous = False
    tensors_only = False  # loads a flat dictionary of tensors, compared as such
    note = ""  # one line for the table: what this contender does not keep, or why it cannot run
    settings: dict[str, object] = {}  # what differs from the library's defaults, and the defaults that matter

    @abc.abstractmethod
    def version(self) -> str: ...

    def unavailable(self) -> str:
        """Why it cannot run on this machine; empty if it can."""
        return ""

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        """Blocks as long as the training loop would be blocked. The returned call blocks until the state is durable:
        file contents, and the directory entries that lead to them, on stable storage."""
        raise TypeError(f"{self.name} does not save")

    def save(self, state: State, directory: Path) -> None:
        self.begin(state, directory)()

    def load(self, directory: Path) -> State:
        raise TypeError(f"{self.name} does not load")

    def tiny(self, state: State) -> State:
        """A state of the same form and next to no bytes: saved and loaded once before anything is measured, so that
        imports, thread pools and process groups are paid for by nobody."""
        return {part: _shrink(value) for part, value in state.items()}


def _shrink(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return torch.zeros([min(n, 1) for n in value.shape], dtype=value.dtype)
    if isinstance(value, dict):
        return {k: _shrink(v) for k, v in value.items()}
    return value


def nothing_to_wait_for() -> None:
    """The second half of a synchronous save."""


def fsync_tree(directory: Path) -> None:
    """fsync of each file, then of each directory from the inside out, then of the directory's own entry."""
    for folder, _, names in os.walk(directory, topdown=False):
        for place in [os.path.join(folder, name) for name in names] + [folder]:
            fsync(place)
    fsync(directory.parent)


def fsync(place: str | Path) -> None:
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
