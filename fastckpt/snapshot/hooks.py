"""The fence before each optimizer's update: sets the hooks, and judges whether they can be relied on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fastckpt.events import logger
from fastckpt.snapshot.side_stream import is_capturing


class FenceHooks:
    """Calls `fence` before any of the optimizers changes anything.

    If `step` gets a `closure`, the closure computes the gradients inside of `step`. Then the fence comes after its first run: before that
    nothing has changed, and waiting would cost the whole forward and backward pass. (L-BFGS runs it again between updates: the fence is a
    no-op then.)
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], fence: Callable[[], None]) -> None:
        self._fence = fence
        self.arriving: Callable[[], None] | None = None
        """Waits for state of the optimizers that has not come yet, and raises if it cannot come. Held here, because the optimizers hold
        this: who waits for it must not be gone when they begin a step.
        """
        self._devices: list[list[torch.device]] = []
        """For each optimizer, by position: a wrapper may pass a hook on to the optimizer that it wraps, which calls the hook with
        itself.
        """
        self._fired: set[int] = set()
        self._ever_fired: set[int] = set()
        self.begun = False
        """Whether an optimizer has begun a step since the owner last set this to False; the step may be half done."""
        self._distrusted = False
        self._handles: list[RemovableHandle] = []
        self._readings: list[RemovableHandle] = []
        for number, optimizer in enumerate(optimizers):
            try:
                self._devices.append(_devices(optimizer))
                self._handles.append(optimizer.register_step_pre_hook(functools.partial(self._before_step, number)))
            except (
                Exception
            ) as error:  # a wrapper that never called Optimizer.__init__ has no hooks, and may raise anything
                logger.info(
                    "%s takes no hook (%s: %s): its state is copied before each save returns",
                    type(optimizer).__name__,
                    type(error).__name__,
                    error,
                )
                self._distrusted = True
                continue
            with contextlib.suppress(Exception):  # a wrapper may pass on nothing but hooks of steps
                self._readings.append(optimizer.register_state_dict_pre_hook(self._before_reading))

    @property
    def can_be_trusted(self) -> bool:
        """Whether every optimizer has called its hook since `next_step`. Otherwise an optimizer may be stepped by other means (a replayed
        graph, a framework's own loop), and no copy may be left to its hook. Always False if an optimizer takes no hooks.
        """
        return bool(self._devices) and not self._distrusted and len(self._fired) == len(self._devices)

    @property
    def are_set(self) -> bool:
        """Whether every optimizer has taken its hook, and none was found out to be stepped without."""
        return bool(self._handles) and not self._distrusted and len(self._handles) == len(self._devices)

    @property
    def see_all(self) -> bool:
        """Whether `begun` reliably tells of every step: each optimizer has called its hook before, and no change was seen without a
        hook.
        """
        return bool(self._devices) and not self._distrusted and len(self._ever_fired) == len(self._devices)

    def next_step(self) -> None:
        """Begin a new observation of the hooks: a training step has ended."""
        self._fired.clear()

    def distrust(self) -> None:
        """Never trust a hook again: the state was seen to change without one."""
        self._distrusted = True

    def remove(self) -> None:
        """Unregister all hooks."""
        for handle in (*self._handles, *self._readings):
            handle.remove()
        self._handles, self._readings = [], []

    def _before_step(
        self, number: int, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.begun = True
        self._fired.add(number)
        self._ever_fired.add(number)
        if any(is_capturing(device) for device in self._devices[number]):
            self._distrusted = True  # from now on the graph updates the parameters, and calls no hook
        if not type(optimizer).step.__module__.startswith("torch."):  # it may use its state before it calls a closure
            self._before_reading(optimizer)
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], fence_after(args[1], self._fence), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": fence_after(kwargs["closure"], self._fence)}
        self._fence()
        return None

    def _before_reading(self, _: torch.optim.Optimizer) -> None:
        if self.arriving is not None:
            self.arriving()


def fence_after(closure: Callable[..., Any], fence: Callable[[], None]) -> Callable[..., Any]:
    """The closure, followed by the fence."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        fence()
        return result

    return run


def _devices(optimizer: torch.optim.Optimizer) -> list[torch.device]:
    """The accelerators that an optimizer's parameters are on."""
    found = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    return [device for device in found if device.type not in ("cpu", "meta")]
