"""The objects of a run, looked at as one state again and again: what is saved, and whether they still are what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastckpt.events import logger
from fastckpt.snapshot import Sampled, Sampler
from fastckpt.state import Captured, Identity, Recapturer
from fastckpt.state.chunking import Cuts
from fastckpt.state.chunks import KnownCuts
from fastckpt.state.refused import Watch, described
from fastckpt.training import stateful
from fastckpt.training.rng import RNGState


class Taken(NamedTuple):
    """The state at one moment. Its storages belong to the training, which may change them at any time."""

    captured: Captured
    cuts: Cuts
    samples: Sampled | None
    """None: contents are not compared."""


class _Saved(NamedTuple):
    """What tells whether the state is still that of a save."""

    step: int
    identity: Identity
    samples: Sampled | None


class LiveState:
    """See the module. Used by the thread that trains."""

    def __init__(self, state: Mapping[str, Any], *, sampled: bool) -> None:
        """TypeError lists every object that cannot be restored in place. sampled: whether contents are compared."""
        self.targets = stateful.check_targets(state)
        self.optimizers = [one for one in self.targets.values() if isinstance(one, torch.optim.Optimizer)]
        generators = {name for name, one in self.targets.items() if isinstance(one, RNGState)}
        self._recapturer, self._cuts, self._sampler = Recapturer(generators), KnownCuts(), Sampler(generators)
        self._sampled = sampled
        self._saved: _Saved | None = None
        self._watch = Watch()
        self._form: object = None
        self.weights_only = True
        """Of the last restore: what it does not refuse needs no warning."""

    def look(self) -> tuple[Captured, Cuts]:
        """Look at the objects: nothing is copied but small values."""
        captured = self._recapturer.capture(stateful.state_of(self.targets))
        return captured, self._cuts.of(captured)

    def take(self) -> Taken:
        """As `look`, with a sample of the contents."""
        captured, cuts = self.look()
        return Taken(captured, cuts, self._sampler.take(captured, cuts) if self._sampled else None)

    def remember(self, step: int, taken: Taken) -> None:
        """That state, the last that was taken, is being saved as `step`."""
        self._saved = _Saved(step, self._recapturer.identity, taken.samples)

    def forget(self) -> None:
        """Another state has come into the objects: what was saved says nothing of it."""
        self._saved = None

    def has_changed_since(self, step: int) -> bool | None:
        """Whether the state is another one than was saved as `step`, generators apart. None: it is not known what was saved."""
        saved = self._saved
        if saved is None or saved.step != step:
            return None
        captured, cuts = self.look()
        if saved.identity != self._recapturer.identity:
            return True
        if saved.samples is None:
            return False
        return self._sampler.take(captured, cuts, saved.samples.seed).digests != saved.samples.digests

    def tell_what_is_refused(self, step: int, where: str, captured: Captured) -> None:
        """Warn of types that `restore` refuses, once for each: at the save, not when the machine is gone. Only who saves can choose
        another type.
        """
        arrays = [] if captured.form is self._form else [e.name for e in captured.tensors if e.kind == "array"]
        self._form = captured.form
        found = self._watch.new_in(self._recapturer.pickled, arrays)
        if found and self.weights_only:
            logger.warning(
                "step %d is being saved to %s, but restore() will refuse it for what it holds:\n%s\nSave plain values in their place. "
                "restore(weights_only=False) reads them, and runs whatever code a checkpoint names: only for your own. "
                "torch.serialization.add_safe_globals, called before restore(), allows single classes",
                step,
                where,
                described(found),
            )
