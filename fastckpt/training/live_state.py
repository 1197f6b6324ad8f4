"""The objects of a run, looked at as one state again and again: what is saved, and whether they still are what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastckpt.events import logger
from fastckpt.format.tensor_names import Name
from fastckpt.snapshot import Sampled, Sampler
from fastckpt.state import Captured, Identity, Recapturer
from fastckpt.state.chunking import Cuts
from fastckpt.state.chunks import KnownCuts
from fastckpt.state.refused import Watch, described
from fastckpt.training import stateful
from fastckpt.training.replicas import Replicas, check_replicated
from fastckpt.training.rng import RNGState


class Taken(NamedTuple):
    """The state at one moment. Its storages belong to the training, which may change them at any time."""

    captured: Captured
    cuts: Cuts
    samples: Sampled | None
    """None: contents are not compared."""


class _Look(NamedTuple):
    """What tells whether a state is still the same."""

    identity: Identity
    samples: Sampled | None

    def is_of(self, other: _Look | None) -> bool:
        """Whether both were the same, as far as that can be seen."""
        if other is None or self.identity != other.identity:
            return False
        return self.samples is None or other.samples is None or self.samples.digests == other.samples.digests


class LiveState:
    """See the module. Used by the thread that trains."""

    def __init__(self, state: Mapping[str, Any], *, sampled: bool, replicated: Sequence[str] = ()) -> None:
        """TypeError lists every object that cannot be restored in place. sampled: whether contents are compared. replicated: names of
        what the user says is the same on all ranks; ValueError for those of no object.
        """
        self.targets = stateful.check_targets(state)
        self._replicas = Replicas(self.targets, check_replicated(replicated, self.targets))
        self.optimizers = [one for one in self.targets.values() if isinstance(one, torch.optim.Optimizer)]
        generators = {name for name, one in self.targets.items() if isinstance(one, RNGState)}
        self._recapturer, self._cuts, self._sampler = Recapturer(generators), KnownCuts(), Sampler(generators)
        self._sampled = sampled
        self._saved: tuple[int, _Look] | None = None
        """The step of the newest save, and what its state looked like."""
        self._restored: _Look | None = None
        """What could be seen of the objects right after the newest restore."""
        self._watch = Watch()
        self._untold: dict[str, list[Name]] = {}
        """What it has seen since the last save."""
        self._form: object = None
        self.weights_only = True
        """Of the last restore: what it does not refuse needs no warning."""

    def look(self) -> tuple[Captured, Cuts]:
        """Look at the objects: nothing is copied but small values. What a restore would refuse is told by the next save, whoever has
        pickled it.
        """
        captured = self._recapturer.capture(*stateful.state_of(self.targets))
        self._replicas.share(captured)
        arrays = [] if captured.form is self._form else [e.name for e in captured.tensors if e.kind == "array"]
        self._form = captured.form
        self._untold |= self._watch.new_in(self._recapturer.pickled, arrays)
        return captured, self._cuts.of(captured)

    def take(self) -> Taken:
        """As `look`, with a sample of the contents."""
        captured, cuts = self.look()
        return Taken(captured, cuts, self._sampler.take(captured, cuts) if self._sampled else None)

    def remember(self, step: int, taken: Taken) -> None:
        """That state, the last that was taken, is being saved as `step`."""
        self._saved = step, _Look(self._recapturer.identity, taken.samples)

    def has_changed_since(self, step: int) -> bool | None:
        """Whether the state is another one than was saved as `step`, generators apart. None: that step was not saved last."""
        if self._saved is None or self._saved[0] != step:
            return None
        then = self._saved[1]
        captured, cuts = self.look()
        samples = None if then.samples is None else self._sampler.take(captured, cuts, then.samples.seed)
        return not then.is_of(_Look(self._recapturer.identity, samples))

    def remember_restored(self) -> None:
        """A checkpoint has come into the objects: what was saved before says nothing of them."""
        self._saved, self._restored = None, self._look_without_consequences()

    def has_changed_since_restore(self) -> bool:
        """Whether the objects, as far as they can be looked at, are not those of `remember_restored`."""
        then = self._restored
        return then is not None and not then.is_of(self._look_without_consequences(then))

    def _look_without_consequences(self, before: _Look | None = None) -> _Look | None:
        """The state of all objects that can be asked for it without consequences; None if they cannot be saved. before: looks where that
        one has looked.
        """
        asked = {name: target for name, target in self.targets.items() if stateful.may_be_looked_at(target)}
        recapturer, sampler = self._recapturer, self._sampler
        try:
            if all(name in asked or isinstance(target, RNGState) for name, target in self.targets.items()):
                captured, cuts = self.look()  # what is pickled now need not be for the first save
            else:
                recapturer, sampler = Recapturer(), Sampler()
                captured = recapturer.capture(*stateful.state_of(asked))
                cuts = KnownCuts().of(captured)
        except Exception as error:  # the next save will say so
            logger.info("what was restored cannot be looked at: %s: %s", type(error).__name__, error)
            return None
        samples = None
        if self._sampled:
            seed = None if before is None or before.samples is None else before.samples.seed
            samples = sampler.take(captured, cuts, seed)
        return _Look(recapturer.identity, samples)

    def tell_what_is_refused(self, step: int, where: str) -> None:
        """Warn of types that `restore` refuses, once for each: at the save, not when the machine is gone. Only who saves can choose
        another type.
        """
        found, self._untold = self._untold, {}
        if found and self.weights_only:
            logger.warning(
                "step %d is being saved to %s, but restore() will refuse it for what it holds:\n%s\nSave plain values in their place. "
                "restore(weights_only=False) reads them, and runs whatever code a checkpoint names: only for your own. "
                "torch.serialization.add_safe_globals, called before restore(), allows single classes",
                step,
                where,
                described(found),
            )
