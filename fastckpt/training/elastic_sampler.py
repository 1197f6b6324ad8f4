"""Deals the samples of an epoch to however many ranks there are, and counts those of optimizer steps that are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, Literal

from fastckpt.errors import CheckpointError, RestoreError
from fastckpt.events import logger
from fastckpt.ranks.world import World, current_world
from fastckpt.training.sample_order import MAX_LENGTH, SampleOrder
from fastckpt.training.sample_steps import Position, Steps

_VERSION = 1
_COUNTS = ("version", "length", "batch_size", "epoch", "samples", "total")


class ElasticSampler:
    """The samples of each optimizer step, dealt to the ranks: a batch sampler for `DataLoader(batch_sampler=…)`.

    All ranks share one order of samples, which follows from length, seed and epoch alone. An optimizer step takes the next `batch_size` of
    them, and each rank gets an even part. The position is the number of samples of *optimizer steps that are done*, not of those that a
    loader has drawn ahead. So a run goes on with another number of ranks, and no sample of an epoch comes twice or is lost.

    Give it to a `Checkpointer` in the state: each `step(n)` then counts the steps up to n, before anything is saved. A loop without a
    `Checkpointer` calls `advance()` after each optimizer step.

        sampler = fastckpt.ElasticSampler(dataset, batch_size=256)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        for batch in loader:
            loss = mean_loss(batch) * sampler.weight()    # so that uneven parts count as they should
            …

    Each `iter()` (of the loader, too) begins at the position and ends with the epoch; when the epoch's last step is counted, the position
    is the beginning of the next one. `len()` is the number of lists in a whole epoch.

    A loop that takes its next batch before it has counted a step needs `endless=True`: otherwise it would begin an iteration at the epoch's
    end before the last step counts, and get that step's samples again.

    Args:
        dataset: the samples, or how many there are.
        batch_size: samples of one optimizer step, of all ranks and micro batches together.
        shuffle: a new order in every epoch; otherwise always 0, 1, 2, …
        seed: of the order; the same on all ranks.
        tail: what becomes of the samples that are left when an epoch has no whole step any more. "uneven": they are one smaller step, dealt
            as evenly as they can be. "drop": this epoch does not use them.
        micro_batches: lists that make one step, for gradients that are accumulated.
        endless: an iteration goes on through all epochs, and there is no `len()`.
        rank, world: this process's place among those that have different data; both or none. None: those of torch's default process group,
            asked when it is needed. Ranks that share their data (tensor or pipeline parallelism) have the same `rank` here.
        automatic: whether `Checkpointer.step` counts the steps. False: the loop calls `advance()`, before `step`; for samplers that do not
            take part in every step.

    Raises:
        TypeError, ValueError: an argument is wrong; all problems are listed.

    Threads: used by the training thread. `DataLoader` asks for indices there, also with workers.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        tail: Literal["uneven", "drop"] = "uneven",
        micro_batches: int = 1,
        endless: bool = False,
        rank: int | None = None,
        world: int | None = None,
        automatic: bool = True,
    ) -> None:
        length = dataset if isinstance(dataset, int) else len(dataset)
        counts = {"the number of samples": length, "batch_size": batch_size, "micro_batches": micro_batches}
        _check(counts, {"shuffle": shuffle, "endless": endless, "automatic": automatic}, seed, tail)
        _check_place(rank, world)
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self._order, self._tail = (shuffle, seed), tail
        self._steps = Steps(length, batch_size, drops_tail=tail == "drop")
        self._endless, self.automatic = endless, automatic
        self._given = None if rank is None or world is None else World(rank, world)
        self._position = self._dealt = Position(0, 0)
        self._total = 0
        self.steps_counted = 0
        """Steps that this object has counted since it was made, whatever was loaded into it."""
        self._loads = 0
        self.place()

    def __repr__(self) -> str:
        shuffle, seed = self._order
        return (
            f"ElasticSampler({self._steps.length}, batch_size={self.batch_size}, shuffle={shuffle}, seed={seed}, tail={self._tail!r}, "
            f"micro_batches={self.micro_batches})"
        )

    # -- where the run is ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self._position.epoch

    @property
    def samples(self) -> int:
        """Samples of this epoch that belong to steps that are done, of all ranks."""
        return self._position.samples

    @property
    def total(self) -> int:
        """Samples of all steps that are done, of all ranks and epochs."""
        return self._total

    @property
    def steps_ahead(self) -> int:
        """Steps that were dealt out to their end and are not counted: those that the loader has drawn ahead, and the one under way."""
        return self._steps.between(self._position, self._dealt)

    def place(self) -> World:
        """This process's place among those that have different data.

        Raises:
            ValueError: a step has fewer samples than lists.
        """
        world = self._given or current_world()
        lists = world.size * self.micro_batches
        if self.batch_size < lists:
            raise ValueError(
                f"batch_size is {self.batch_size}, and a step has {lists} lists ({world.size} ranks, {self.micro_batches} micro batches "
                "each): some would be empty in every step. batch_size counts the samples of all ranks together"
            )
        return world

    def advance(self, steps: int = 1) -> None:
        """Count optimizer steps as done. Not needed, and not to be called, where a `Checkpointer` does it.

        Raises:
            ValueError: `steps` is no number ≥ 0.
        """
        if type(steps) is not int or steps < 0:
            raise ValueError(f"steps is {steps!r}: expected a number of optimizer steps ≥ 0")
        for _ in range(steps):
            self._total += self._steps.size(self._position)
            self._position = self._steps.following(self._position)
        self.steps_counted += steps

    # -- dealing -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if self._endless:
            raise TypeError("an endless ElasticSampler has no len()")
        return self._steps.in_epoch() * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's samples of each optimizer step from the position to the end of the epoch (`endless`: and on); `micro_batches` lists a
        step.

        A rank for which there is no sample, because a small last step has fewer samples than there are lists, gets one of that step as a
        *stand-in*, with the `weight` 0: loaders cannot collate an empty list, and the other ranks wait for its backward pass.
        """
        loads, here = self._loads, self._position
        world = self.place()
        if self._dealt.epoch > here.epoch and not self._endless:
            logger.warning(
                "epoch %d was dealt out to its end, but only %d of its %d samples belong to steps that were counted as done: the rest is "
                "dealt again. Have the sampler in the Checkpointer's state and call step() after each optimizer step, or call advance(). A "
                "loop that draws its next batch before that needs endless=True",
                here.epoch,
                here.samples,
                self._steps.end(here.samples),
            )
        order = self._order_of(here.epoch)
        while True:
            following = self._steps.following(here)
            for micro_batch in range(self.micro_batches):
                if self._loads != loads:
                    raise CheckpointError(
                        "the sampler's position was loaded while this iteration was under way: its samples are those of another place. "
                        "Begin a new one, iter(loader), after each restore"
                    )
                if micro_batch == self.micro_batches - 1:
                    self._dealt = max(self._dealt, following)
                start, stop = self._steps.part(here, world.rank, world.size, micro_batch, self.micro_batches)
                yield order.samples(start, max(stop, start + 1))
            if following.epoch > here.epoch:
                if not self._endless:
                    return
                order = self._order_of(following.epoch)
            here = following

    def weight(self, micro_batch: int = 0) -> float:
        """What to multiply the mean loss of this rank's list by, in the step under way: gradients that are summed over micro batches, and
        averaged over ranks as DistributedDataParallel does, are then those of the mean over all samples of the step.

        1 / `micro_batches` where all parts are alike; 0 for a stand-in (see `__iter__`). To be asked before the step is counted.

        Raises:
            ValueError: there is no such micro batch.
        """
        if not 0 <= micro_batch < self.micro_batches:
            raise ValueError(f"micro_batch is {micro_batch!r}: expected 0 to {self.micro_batches - 1}")
        world = self.place()
        start, stop = self._steps.part(self._position, world.rank, world.size, micro_batch, self.micro_batches)
        return (stop - start) * world.size / self._steps.size(self._position)

    def _order_of(self, epoch: int) -> SampleOrder:
        shuffle, seed = self._order
        return SampleOrder(self._steps.length, shuffle=shuffle, seed=seed, epoch=epoch)

    # -- saving and loading --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers and text: the same on all ranks, and free of how many there are."""
        shuffle, seed = self._order
        return {
            "version": _VERSION,
            "length": self._steps.length,
            "shuffle": shuffle,
            "seed": seed,
            "batch_size": self.batch_size,
            "tail": self._tail,
            "epoch": self.epoch,
            "samples": self.samples,
            "total": self.total,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position that was saved on any number of ranks.

        `batch_size`, `tail` and `micro_batches` may differ: the epoch goes on at the same sample, with a warning for the first two. Within
        an epoch, length, seed and `shuffle` must be the same; between epochs they may differ.

        Raises:
            RestoreError: they differ within an epoch, or this is no such state. Nothing was changed.
        """
        problems = self.misfits(state)
        if problems:
            raise RestoreError(f"the position cannot be taken over: {'; '.join(problems)}. Nothing was changed")
        if (state["batch_size"], state["tail"]) != (self.batch_size, self._tail):
            logger.warning(
                "steps of %d samples (tail=%r) were saved, those from here on have %d (tail=%r): epoch %d goes on at sample %d",
                state["batch_size"],
                state["tail"],
                self.batch_size,
                self._tail,
                state["epoch"],
                state["samples"],
            )
        self._position = self._dealt = self._steps.normal(Position(state["epoch"], state["samples"]))
        self._total = state["total"]
        self._loads += 1

    def misfits(self, state: Any) -> list[str]:
        """Why `load_state_dict` would refuse a state, in words; nothing is changed."""
        if not isinstance(state, Mapping):
            return [f"expected the state of an ElasticSampler, found {type(state).__name__}"]
        problems = [
            f"{name} is {state.get(name)!r}: expected a number ≥ 0"
            for name in _COUNTS
            if type(state.get(name)) is not int or state[name] < 0
        ]
        if problems:
            return problems
        if state["version"] != _VERSION:
            return [
                f"version is {state['version']}, and this fastckpt reads {_VERSION}: take the fastckpt that saved it"
            ]
        if not state["samples"]:
            return []
        saved = {name: state.get(name) for name in ("length", "shuffle", "seed")}
        here: dict[str, Any] = dict(zip(saved, (self._steps.length, *self._order), strict=True))
        if not (saved["shuffle"] or here["shuffle"]):  # then the seed means nothing
            here["seed"] = saved["seed"]
        found = [
            f"{name} was {saved[name]!r} when it was saved and is {here[name]!r} now"
            for name in saved
            if saved[name] != here[name]
        ]
        if found:
            advice = "its order would be another, so samples would come twice or be lost. Take the same data and seed until the epoch ends"
            found[-1] += f" ({state['samples']} samples of epoch {state['epoch']} are done: {advice})"
        elif state["samples"] > self._steps.length:
            found = [f"samples is {state['samples']}: expected {self._steps.length} at most"]
        return found


def _check(counts: Mapping[str, int], switches: Mapping[str, bool], seed: int, tail: str) -> None:
    """Refuse what no position could be counted with. counts: samples in all, samples of a step, micro batches. TypeError, ValueError."""
    kinds = [
        f"{name} is {value!r}: expected a whole number"
        for name, value in {**counts, "seed": seed}.items()
        if type(value) is not int
    ]
    kinds += [
        f"{name} is {value!r}: expected True or False" for name, value in switches.items() if type(value) is not bool
    ]
    if kinds:
        raise TypeError("; ".join(kinds))
    problems = [f"{name} is {n}: expected 1 to {MAX_LENGTH}" for name, n in counts.items() if not 1 <= n <= MAX_LENGTH]
    length, batch_size, _ = counts.values()
    if tail not in ("uneven", "drop"):
        problems.append(f'tail is {tail!r}: expected "uneven" or "drop"')
    elif tail == "drop" and length < batch_size:
        problems.append(f'there are {length} samples and {batch_size} in a step, so tail="drop" would use none')
    if problems:
        raise ValueError("; ".join(problems))


def _check_place(rank: object, world: object) -> None:
    if rank is None and world is None:
        return
    if type(rank) is not int or type(world) is not int:
        raise TypeError(f"rank is {rank!r} and world is {world!r}: expected two whole numbers, or neither")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world is {world}: expected a rank from 0 to world − 1")
