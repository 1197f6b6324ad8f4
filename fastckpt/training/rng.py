"""The random number generators of a process as state to save: without them a resumed run differs from an uninterrupted one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastckpt.events import logger


class RNGState:
    """Python's `random`, NumPy's global generator, torch's on the CPU and on every device of the current accelerator.

    Give it to a Checkpointer beside model and optimizer. Generators of your own (`torch.Generator`, `numpy.random.Generator`) are not
    included. The state consists of tensors and plain values, so that a restricted load accepts it. Call from the thread that trains.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        kind, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
        return {
            "python": {
                "version": version,
                "words": torch.tensor(words, dtype=torch.int64, device="cpu"),
                "gauss": gauss,
            },
            "numpy": {
                "kind": str(kind),
                "words": torch.tensor(np.asarray(numpy_words, np.int64), device="cpu"),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "gauss": float(numpy_gauss),
            },
            "torch": torch.get_rng_state(),
            "devices": {name: list(module.get_rng_state_all()) for name, module in _accelerator()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all generators. Devices that this machine does not have are left out, with a warning."""
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        words = numpy["words"].cpu().numpy().astype(np.uint32)
        np.random.set_state((numpy["kind"], words, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
        torch.set_rng_state(state["torch"].cpu())
        here = dict(_accelerator())
        for name, states in state["devices"].items():
            module: Any = here.get(name)
            n_devices = 0 if module is None else module.device_count()
            if n_devices != len(states):
                logger.warning(
                    "the generators of %d %s devices were saved, %d are here: the rest draw other numbers",
                    len(states),
                    name,
                    n_devices,
                )
            for device, device_state in enumerate(states[:n_devices]):
                module.set_rng_state(device_state.cpu(), device)


@dataclass(frozen=True)
class Generators:
    """The same generators at one moment, kept within this process: taken in some 20 µs, in a form that cannot be saved."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: torch.Tensor
    devices: list[tuple[Any, list[torch.Tensor]]]

    @classmethod
    def now(cls) -> Generators:
        devices = [(module, list(module.get_rng_state_all())) for _, module in _accelerator()]
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), devices)

    def put_back(self) -> None:
        """Set the generators back: they repeat the numbers that followed that moment."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        for module, states in self.devices:
            module.set_rng_state_all(states)


def _accelerator() -> list[tuple[str, Any]]:
    """Name and torch module of the current accelerator; empty if it has no generators to save."""
    if not torch.accelerator.is_available():
        return []
    name = torch.accelerator.current_accelerator()
    if name is None:
        return []
    module = torch.get_device_module(name.type)
    return [(name.type, module)] if hasattr(module, "get_rng_state_all") else []
