"""What every contender of benchmarks/storage.py must answer. The worker measures around these calls and knows nothing else about them.

Imports torch and NumPy alone: it runs in the rivals' environment, too.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

State = dict[str, Any]
CONNECTIONS = 8
"""Of rivals that leave the number to their caller; research found no more speed beyond it at one server."""
ONE = "model/blocks.0.mlp.0.weight"
"""The tensor that is fetched alone, by its name in a flat state; every size of the workload has it."""


@dataclass(frozen=True)
class Place:
    """Where one contender keeps one checkpoint."""

    root: str
    """s3://bucket/prefix, or a directory."""
    size: str
    """Of the workload (benchmarks/workloads/gpt.py)."""
    endpoint: str = ""
    """Of S3, with its scheme."""
    device: str = "cpu"
    """Where a live model is that is restored into; "fakegpu" is the test device."""
    source: str = ""
    """The root of a checkpoint of fastckpt whose stored bytes count; for those who move only them."""

    @property
    def bucket(self) -> str:
        return self.root.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        return self.root.removeprefix("s3://").partition("/")[2]

    def beside(self, name: str, size: str) -> Place:
        """Another place, for a state of another size."""
        return replace(self, root=f"{self.root}-{name}", size=size)


class Contender(abc.ABC):
    """One way to store a state. Each call of `prepare` begins anew; the calls after it are measured."""

    name = ""
    tensors_only = False  # restores a flat dictionary of tensors, compared as such
    in_place = False  # restores into the tensors of a live model and optimizer
    overlap = False  # restores what a first forward needs, and the rest behind it
    verifies = "no"  # what of the restored bytes
    settings: dict[str, object] = {}  # what differs from the library's defaults, and the defaults that matter

    @abc.abstractmethod
    def version(self) -> str: ...

    @abc.abstractmethod
    def prepare(self, place: Place, state: State | None) -> None:
        """Make what a program has before its first save or restore. state: what is to be saved; None before a restore."""

    @abc.abstractmethod
    def save(self) -> None:
        """Save the state, until it is durable."""

    def restore(self) -> Any:
        """The whole state, its bytes in memory."""
        raise TypeError(f"{self.name} only saves")

    def settle(self, found: Any) -> Any:
        """What `restore` has returned, once all of it is there."""
        return found

    def one(self, name: str) -> Any:
        """A single tensor, by its name in a flat state."""
        raise TypeError(f"{self.name} reads no single tensors")

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Ends what `prepare` made."""


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of a state with the names that they have in a flat one."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}/{key}" if name else str(key))


def flat(state: State) -> dict[str, Any]:
    """Each memory once, under its first name: formats of named tensors refuse, or repeat, shared ones."""
    found: dict[str, Any] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in tensors_of(state):
        memory = (tensor.data_ptr(), tensor.numel())
        if memory not in seen:
            found[name] = tensor.contiguous()
            seen.add(memory)
    return found


def keys() -> dict[str, str]:
    """The access key and the secret key of S3."""
    return {"access": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"]}


def live(size: str, device: str = "cpu") -> Any:
    """A model and an optimizer that has a state, as a program has before it restores."""
    import torch

    from benchmarks.workloads.gpt import Training

    training = Training(size)
    if device == "fakegpu":
        test_device = import_module("tests.fakegpu.device")  # a name alone: nothing else here needs it
        test_device.load()
        test_device.configure("lazy", races=False, poison=False, trap=False)
    if device != "cpu":
        training.model.to(device)
    for parameter in training.model.parameters():
        training.optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return training
