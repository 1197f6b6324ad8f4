"""Training with saves at every step whose contents are known without making the host wait, and delays at random."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastckpt.options import Options
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu.suite.tools import OPTIONS, Saved, load, train
from tests.gpu.machines import Machine


def kept(value: Any) -> Any:
    """A copy on the same devices, in stream order: the host waits for nothing, so copies of snapshots have all the time they want."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: kept(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [kept(one) for one in value]
    return value


def kept_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kept(one.state_dict() if hasattr(one, "state_dict") else one) for name, one in state.items()}


def differences(expected: Any, found: Any, at: str = "") -> list[str]:
    """Where the two differ, by dtype, shape or any byte."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or (expected.dtype, expected.shape) != (found.dtype, found.shape):
            return [at]
        return [] if torch.equal(_bytes(expected), _bytes(found)) else [at]
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or expected.keys() != found.keys():
            return [at]
        return [text for key in expected for text in differences(expected[key], found[key], f"{at}.{key}")]
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(expected) != len(found):
            return [at]
        pairs = enumerate(zip(expected, found, strict=True))
        return [text for i, (a, b) in pairs for text in differences(a, b, f"{at}[{i}]")]
    return [] if expected == found else [at]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().flatten().view(torch.uint8)


def wrong_steps(saved: Saved) -> dict[int, list[str]]:
    """Steps whose checkpoints do not hold what they should, and the tensors in which they differ."""
    found = {step: differences(state, load(saved.store, step)) for step, state in saved.states.items()}
    return {step: names for step, names in found.items() if names}


def train_kept(
    state: dict[str, Any],
    one_step: Callable[[int], None],
    *,
    steps: int = 4,
    options: Options = OPTIONS,
    checkpointer: type[Checkpointer] = Checkpointer,
) -> Saved:
    """As `train`, with states kept in stream order."""
    states: dict[int, Any] = {}

    def keeping(number: int) -> None:
        one_step(number)
        if number <= steps:
            states[number] = kept_state(state)

    saved = train(state, keeping, steps=steps, options=options, checkpointer=checkpointer, compare=False)
    saved.states = states
    return saved


@dataclass
class Delays:
    """Delays at random: on the stream that trains, wherever `perhaps` is called and around optimizers' steps; on that of the copies, before
    any of them.
    """

    machine: Machine
    seed: int
    longest_ms: float = 8.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self.given = {"train": 0, "copy": 0}

    def perhaps(self, *where: Any, stream: str = "train") -> None:
        with self._lock:
            ms = self.longest_ms * self._random.random() ** 3 if self._random.random() < 0.3 else 0.0
        if ms:
            self.given[stream] += 1
            self.machine.delay(ms)

    def install(self, monkeypatch: pytest.MonkeyPatch, state: Mapping[str, Any]) -> None:
        """Before the Checkpointer is made: delays come before its fence, too."""
        for one in state.values():
            if isinstance(one, torch.optim.Optimizer):
                one.register_step_pre_hook(self.perhaps)
                one.register_step_post_hook(self.perhaps)
        original = SideStream.copy

        def copy(side: SideStream, target: torch.Tensor, pieces: Sequence[torch.Tensor], *, pinned: bool) -> None:
            with side.stream:
                self.perhaps(stream="copy")
            original(side, target, pieces, pinned=pinned)

        monkeypatch.setattr(SideStream, "copy", copy)


def rounds(total: int, most: int) -> Iterator[int]:
    """`total` in parts of at most `most`."""
    while total > 0:
        yield min(total, most)
        total -= most
