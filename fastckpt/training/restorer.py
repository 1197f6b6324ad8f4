"""Chooses a checkpoint, loads it, and claims an epoch that continues from it.

What goes straight into the live objects is read last, when all else has been loaded and found to fit: until then nothing was changed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from fastckpt.errors import (
    CorruptCheckpointError,
    NoCheckpointError,
    ObjectNotFoundError,
    RefusedStateError,
    RestoreError,
    RetiredError,
)
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit, Skipped
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.format.wholes import Whole
from fastckpt.ranks.world import ALONE
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.catalog import Catalog, Choice, Which
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import open_rank, with_owners
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.state.refused import ARRAYS, described, find
from fastckpt.store.base import Store
from fastckpt.training import stateful
from fastckpt.training.differing import Differing, SavedStates
from fastckpt.training.engine import Engine
from fastckpt.training.fitting import refuse_misfits, refuse_untied, spread_otherwise
from fastckpt.training.live_writing import LiveWriting
from fastckpt.training.placement import PlacementPlan, plan_placement
from fastckpt.training.resharding import Resharding, is_to_be_spread
from fastckpt.training.restore_asked import Reassign, RestoreAsked
from fastckpt.training.state_loader import load_state
from fastckpt.training.straight import NOTHING, Straight
from fastckpt.training.straight_fill import Stopped, StraightFill

T = TypeVar("T")
MOST_ROUNDS = 2
"""How often a restore loads before it claims first."""


class Together(NamedTuple):
    """Where the parts of a state come from."""

    ranks: SavedRanks
    first: int
    """The rank that all else than parts comes from."""
    assembled: Mapping[Name, Whole]
    """What was put together from blocks."""


class Loaded(NamedTuple):
    """A checkpoint that fits the objects, and was read completely but for what goes straight into them."""

    commit: Commit
    state: Any
    plan: PlacementPlan
    strict: bool
    left: frozenset[str] = frozenset()
    """Names of objects that stay as they are: `reassign` has said so."""
    reader: Reader | None = None
    """Reads what goes straight."""
    straight: Straight = NOTHING
    choice: Choice | None = None
    """What is to be claimed, if it was not."""
    together: Together | None = None
    """How it was put together from what ranks of another layout have saved; None: it is one rank's."""


class Compared(NamedTuple):
    """What was found out of the ranks that have saved a checkpoint."""

    ranks: SavedRanks
    differing: Mapping[str, str]
    """What they had for themselves: names of objects → in words."""


class Damaged(Exception):
    """Damage that a load has found in a checkpoint."""

    def __init__(self, commit: Commit, error: CorruptCheckpointError) -> None:
        super().__init__(str(error))
        self.commit, self.error = commit, error


class Restorer:
    """See the module. Used by the thread that trains."""

    def __init__(self, engine: Engine, *, read_only: bool, reassign: Reassign | None = None) -> None:
        """read_only: nothing is claimed, completed or written. reassign: see `Checkpointer`."""
        self._reassign = reassign
        self._incarnation, self._repository = engine.incarnation, engine.repository
        self._live, self._options, self._read_only = engine.live, engine.options, read_only
        self._world = ALONE if engine.team is None else engine.team.world
        self.writing = LiveWriting(engine.repository.url, engine.live.targets, engine.options)

    def restore(self, step: Which, asked: RestoreAsked) -> Loaded | None:
        """Load the state that is to be put into the objects. Unless `read_only`, also claim an epoch that continues from it; with `overlap`
        that is left to `arrive`, as are states of optimizers: the result has a `choice` then.

        None: nothing was ever committed. Errors as those of `Checkpointer.restore`; if `writing` has begun, they leave a mixture.
        """
        known_bad: list[Skipped] = []
        own: set[int] = set()
        rounds = retired = 0
        while True:
            # If the newest checkpoint changes each time while one is loading, claim first: then it cannot change any more.
            claims_first = rounds == MOST_ROUNDS
            choice: Choice | None = None
            found: Loaded | None = None  # the state of the round before is freed before the next one is read
            try:
                choice = self._choose(step, known_bad, own, claims_first=claims_first)
                found = None if choice is None else self._load(choice.commit, asked, choice.reader)
                if found is not None:
                    self._fill(found, states=not asked.overlap)
            except RetiredError:
                retired += 1
                if not isinstance(step, str) or retired > 1:
                    raise
                continue
            except Damaged as damaged:
                known_bad = self._pass_over(damaged, step, choice)
                continue
            if asked.overlap and found is not None and found.straight.states:
                return found._replace(choice=choice)
            if self._read_only or claims_first or self._incarnation.claim(choice, step, own):
                return found_or_refused(found, self._repository.url, read_only=self._read_only)
            rounds += 1

    def put_in(self, found: Loaded) -> None:
        """Put a loaded state into the objects. PartialRestoreError if one of them refuses its part."""
        self.writing.begins(found.plan)
        where = self._repository.location(found.commit.checkpoint)
        taken = {key: target for key, target in self._live.targets.items() if key not in found.left}
        stateful.apply(taken, found.state, where, found.plan, strict=found.strict)

    def _fill(self, found: Loaded, *, states: bool = True) -> None:
        """Read what goes straight into the objects. states: those of optimizers, too. Damaged, RetiredError, StoreError."""

        def run(call: Callable[[], None]) -> None:
            self._with_damage_named(found.commit, call)

        self.writing.fill(found.reader, found.straight, found.plan, run, states=states)

    def arrive(self, found: Loaded, step: Which, fill: StraightFill, stops: Callable[[], bool]) -> None:
        """Read states of optimizers, then claim. Any error means that the objects are a mixture."""
        choice = found.choice
        try:
            self._with_damage_named(found.commit, lambda: fill.run(stops))
            if stops():  # nobody saves after it: a claim would only end those who do
                raise Stopped("it was given up when all had come")
            if not self._incarnation.claim(choice, step, set()):
                raise RestoreError(f"{self._repository.url} has a newer checkpoint by now: restore again")
        except BaseException as error:
            self.writing.begins(found.plan)
            if isinstance(error, Damaged):
                self._pass_over(error, step, choice)
            raise

    def _choose(self, step: Which, known_bad: list[Skipped], own: set[int], *, claims_first: bool) -> Choice | None:
        if self._read_only:
            return Catalog(self._repository, checks_votes=self._world.is_alone).choose(step, known_bad)
        return (self._incarnation.choose_and_claim if claims_first else self._incarnation.choose)(step, known_bad, own)

    def _pass_over(self, damaged: Damaged, step: Which, choice: Choice | None) -> list[Skipped]:
        """The checkpoints to skip in the next round. Raises the error instead, unless "latest-valid" was asked for."""
        error, checkpoint = damaged.error, damaged.commit.checkpoint
        if step != "latest-valid":
            raise Catalog(self._repository).with_advice(checkpoint, error) from error
        logger.warning("step %d is passed over: %s", checkpoint.step, error)
        return [*(() if choice is None else choice.skipped), Skipped(checkpoint, str(error)[:500])]

    def _load(
        self,
        commit: Commit,
        asked: RestoreAsked,
        reader: Reader | None = None,
        store: Store | None = None,
        compared: Compared | None = None,
    ) -> Loaded:
        """reader: of this rank's part, if it was opened before. store: where this rank reads; None: in the repository's. compared: if all
        ranks have compared the saved ones together.
        """
        store = store or self._repository.store
        return self._with_damage_named(commit, lambda: self._loaded(commit, asked, reader, store, compared))

    def _loaded(
        self,
        commit: Commit,
        asked: RestoreAsked,
        reader: Reader | None,
        store: Store,
        compared: Compared | None,
    ) -> Loaded:
        location, targets = self._repository.location(commit.checkpoint), self._live.targets
        try:
            if commit.world == self._world.size:
                rank = self._world.rank
                reader = open_rank(store, commit, rank) if reader is None else with_owners(store, commit, reader)
                plan = plan_placement(targets, reader.directory, location)
                if not (spread_otherwise(targets, plan) or is_to_be_spread(targets, plan)):
                    loaded, straight = load_state(reader, plan, targets, self._options, asked)
                    refuse_misfits(targets, loaded, location, plan, strict=asked.strict)
                    refuse_untied(targets, loaded, location)
                    self.writing.refuse_leftovers(loaded, location, plan)
                    return Loaded(commit, loaded, plan, asked.strict, reader=reader, straight=straight)
            # Not through `store`: what one rank of a node leaves there is not what the others need.
            ranks = SavedRanks(self._repository.store, commit) if compared is None else compared.ranks
            return self._load_resharded(ranks, location, asked, None if compared is None else compared.differing)
        except pickle.UnpicklingError as error:
            if not asked.weights_only:
                raise
            raise _refused(reader or open_vote(store, commit.vote(0)), location, error) from error

    def _with_damage_named(self, commit: Commit, call: Callable[[], T]) -> T:
        """The result of a call that reads a checkpoint. Damaged, RetiredError in place of what it says of damage and missing objects."""
        try:
            return call()
        except (CorruptCheckpointError, ObjectNotFoundError) as error:
            found = Catalog(self._repository).blame(commit.checkpoint, error)
            if isinstance(found, CorruptCheckpointError):
                raise Damaged(commit, found) from error
            raise found from error

    def _load_resharded(
        self, ranks: SavedRanks, location: str, asked: RestoreAsked, differing: Mapping[str, str] | None
    ) -> Loaded:
        """The state for this rank of a checkpoint of other ranks, or of another parallelism."""
        commit, world, targets = ranks.commit, self._world, self._live.targets
        given: dict[str, Any] = {}
        left: set[str] = set()
        parts: dict[int, torch.Tensor] = {}
        if commit.world != world.size:
            if differing is None:
                differing = self._differing(ranks, asked, range(commit.world))
            if differing and self._reassign is None:
                words = "; ".join(f"{key!r}: {why}" for key, why in differing.items())
                raise RestoreError(
                    f"{location} was saved by {commit.world} ranks, and this job has {world.size}. What each of them had for itself has no "
                    f"place here: {words}. Nothing was changed. Restore on {commit.world} ranks, or say what becomes of it: "
                    "Checkpointer(reassign=lambda key, states, rank, world: states[rank % len(states)]); replicated=(…) names what is "
                    "taken from rank 0"
                )
            for key in differing:
                states = SavedStates(key, ranks, self._options, weights_only=asked.weights_only)
                assert self._reassign is not None
                value = self._reassign(key, states, world.rank, world.size)
                if value is None:
                    left.add(key)
                else:
                    given[key] = value
                    parts |= states.parts
        base = world.rank if commit.world == world.size else 0
        taken = {key: target for key, target in targets.items() if key not in left}
        resharding = Resharding(taken, ranks, base, self._options, location, asked)
        loaded, plan = resharding.load(given, left, parts)
        refuse_untied(taken, loaded, location)
        self.writing.refuse_leftovers({key: loaded[key] for key in loaded if key not in left}, location, plan)
        if base:
            self._refuse_mixture(ranks, base, plan, asked)
        together = Together(ranks, base, resharding.assembled)
        return Loaded(commit, loaded, plan, asked.strict, frozenset(left), together=together)

    def _refuse_mixture(self, ranks: SavedRanks, base: int, plan: PlacementPlan, asked: RestoreAsked) -> None:
        """RestoreError if DTensors would be made of plain tensors of several ranks that are not the same."""
        compared = Differing(
            self._live.targets, self._live.replicated, ranks, self._options, weights_only=asked.weights_only
        )
        found = [dotted(name) for name in compared.mixed(base, plan.sharded)]
        if found:
            raise RestoreError(
                f"{self._repository.location(ranks.commit.checkpoint)}: {', '.join(found[:20])} of rank {base} is not that of rank 0, and "
                "is to be spread over ranks here, which would mix them. Nothing was changed. Restore in the layout that was saved, or load "
                "one rank's with fastckpt.open(url, rank=…)"
            )

    def _differing(self, ranks: SavedRanks, asked: RestoreAsked, numbers: Iterable[int]) -> dict[str, str]:
        """What of the objects is not the same on these saved ranks. RefusedStateError where that cannot be seen without running code."""
        compared = Differing(
            self._live.targets, self._live.replicated, ranks, self._options, weights_only=asked.weights_only
        )
        try:
            return compared.find(numbers)
        except pickle.UnpicklingError as error:
            if not asked.weights_only:
                raise
            raise _refused(ranks.vote(0), self._repository.location(ranks.commit.checkpoint), error) from error


def found_or_refused(found: Loaded | None, url: str, *, read_only: bool) -> Loaded | None:
    """NoCheckpointError, where nothing is to be written, if there is nothing to read."""
    if read_only and found is None:
        raise NoCheckpointError(f"{url} has no checkpoint yet: there is nothing to read")
    return found


def _refused(reader: Reader, location: str, error: pickle.UnpicklingError) -> RefusedStateError:
    found = find(reader.skeleton, trusted=False)
    if reader.holds_arrays:
        found.setdefault(ARRAYS[0], []).extend(e.name for e in reader.directory.tensors if e.kind == "array")
    words = described(found) or f"  {str(error).strip().splitlines()[-1]}"
    return RefusedStateError(
        f"{location} holds what restore() refuses, as it could run code:\n{words}\nNothing was changed. If you trust whoever "
        "wrote it, call restore(weights_only=False), or allow single classes with torch.serialization.add_safe_globals before restore()"
    )
