"""The objects of a run, captured as one state again and again; and whether they still have the state that was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastckpt.events import logger
from fastckpt.format.tensor_names import Name
from fastckpt.ranks.world import ALONE, World
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


class _Seen(NamedTuple):
    """What was seen of a state: enough to tell whether it is still the same."""

    identity: Identity
    samples: Sampled | None

    def is_of(self, other: _Seen | None) -> bool:
        """Whether both describe the same state, as far as can be seen."""
        if other is None or self.identity != other.identity:
            return False
        return self.samples is None or other.samples is None or self.samples.digests == other.samples.digests


class LiveState:
    """See the module. Used by the thread that trains."""

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        sampled: bool,
        replicated: Sequence[str] = (),
        verify_replicas: bool = False,
        world: World = ALONE,
    ) -> None:
        """TypeError lists every object that cannot be restored in place.

        sampled: whether contents are compared. replicated: names of what the user says is the same on all ranks; ValueError for those of no
        object. verify_replicas: whether that is checked. world: the ranks that save together.
        """
        self.targets = stateful.check_targets(state)
        self._verify_replicas = verify_replicas
        self._replicas = Replicas(self.targets, check_replicated(replicated, self.targets), world)
        self.optimizers = [one for one in self.targets.values() if isinstance(one, torch.optim.Optimizer)]
        generators = {name for name, one in self.targets.items() if isinstance(one, RNGState)}
        self._recapturer, self._cuts, self._sampler = Recapturer(generators), KnownCuts(), Sampler(generators)
        self._sampled = sampled
        self._saved: tuple[int, _Seen] | None = None
        """The step of the newest save, and what its state looked like."""
        self._restored: _Seen | None = None
        """What could be seen of the objects right after the newest restore."""
        self._watch = Watch()
        self._untold: dict[str, list[Name]] = {}
        """Types that the watch has seen since the last save and that were not reported yet."""
        self._form: object = None
        self.weights_only = True
        """`weights_only` of the last restore. If False, restore refuses nothing, and no warning is needed."""

    @property
    def replicated(self) -> tuple[str, ...]:
        """Names of what the user says is the same on all ranks."""
        return self._replicas.declared

    def look(self) -> tuple[Captured, Cuts]:
        """Capture the objects; only small values are copied. Types that a restore would refuse are remembered, and the next save warns of
        them.
        """
        captured = self._recapturer.capture(*stateful.state_of(self.targets))
        self._replicas.share(captured)
        arrays = [] if captured.form is self._form else [e.name for e in captured.tensors if e.kind == "array"]
        self._form = captured.form
        self._untold |= self._watch.new_in(self._recapturer.pickled, arrays)
        return captured, self._cuts.of(captured)

    def take(self) -> Taken:
        """`look`, plus a sample of the contents."""
        captured, cuts = self.look()
        if self._verify_replicas:
            self._replicas.verify(captured)
        return Taken(captured, cuts, self._sampler.take(captured, cuts) if self._sampled else None)

    def remember(self, step: int, taken: Taken) -> None:
        """Remember that the state taken last is being saved as `step`."""
        self._saved = step, _Seen(self._recapturer.identity, taken.samples)

    def has_changed_since(self, step: int) -> bool | None:
        """Whether the state differs from the one saved as `step`, apart from random generators. None: that step was not the last one
        saved.
        """
        if self._saved is None or self._saved[0] != step:
            return None
        then = self._saved[1]
        captured, cuts = self.look()
        samples = None if then.samples is None else self._sampler.take(captured, cuts, then.samples.seed)
        return not then.is_of(_Seen(self._recapturer.identity, samples))

    def remember_restored(self) -> None:
        """A checkpoint was put into the objects: forget the saved state, and remember how the objects look now."""
        self._saved, self._restored = None, self._look_without_consequences()

    def watched_apart(self) -> Callable[[], bool]:
        """Look at all but optimizers, whose state is still coming. The result says later whether they have changed since, as far as can be
        seen.
        """
        asked = {
            name: target
            for name, target in self.targets.items()
            if stateful.may_be_looked_at(target) and not isinstance(target, torch.optim.Optimizer)
        }
        recapturer, sampler = Recapturer(), Sampler()

        def look(seed: Any = None) -> _Seen:
            captured = recapturer.capture(*stateful.state_of(asked))
            samples = sampler.take(captured, KnownCuts().of(captured), seed) if self._sampled else None
            return _Seen(recapturer.identity, samples)

        try:
            then = look()
        except Exception as error:  # the next save raises the same error
            logger.info("what was restored cannot be looked at: %s: %s", type(error).__name__, error)
            return lambda: False

        def has_changed() -> bool:
            try:
                return not then.is_of(look(None if then.samples is None else then.samples.seed))
            except Exception as error:
                logger.info("what was restored cannot be looked at any more: %s: %s", type(error).__name__, error)
                return True

        return has_changed

    def has_changed_since_restore(self) -> bool:
        """Whether the objects, as far as they can be inspected, have changed since `remember_restored`."""
        then = self._restored
        return then is not None and not then.is_of(self._look_without_consequences(then))

    def _look_without_consequences(self, before: _Seen | None = None) -> _Seen | None:
        """The state of all objects whose `state_dict` has no side effects; None if they cannot be saved. before: sample the same places as
        that one.
        """
        peeked = self._peek()
        if peeked is None:
            return None
        captured, cuts, recapturer, sampler = peeked
        samples = None
        if self._sampled:
            seed = None if before is None or before.samples is None else before.samples.seed
            samples = sampler.take(captured, cuts, seed)
        return _Seen(recapturer.identity, samples)

    def peek(self) -> tuple[Captured, Cuts] | None:
        """As `look`, of all objects whose `state_dict` has no side effects; None if they cannot be saved."""
        peeked = self._peek()
        return None if peeked is None else peeked[:2]

    def _peek(self) -> tuple[Captured, Cuts, Recapturer, Sampler] | None:
        asked = {name: target for name, target in self.targets.items() if stateful.may_be_looked_at(target)}
        try:
            if all(name in asked or isinstance(target, RNGState) for name, target in self.targets.items()):
                return *self.look(), self._recapturer, self._sampler  # its pickling is not repeated by the first save
            recapturer = Recapturer()
            captured = recapturer.capture(*stateful.state_of(asked))
            return captured, KnownCuts().of(captured), recapturer, Sampler()
        except Exception as error:  # the next save raises the same error
            logger.info("what was restored cannot be looked at: %s: %s", type(error).__name__, error)
            return None

    def tell_what_is_refused(self, step: int, where: str) -> None:
        """Warn once of each type that `restore` refuses. The warning comes at the save, because only then can the user still choose another
        type.
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
