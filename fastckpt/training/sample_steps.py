"""How an epoch is divided into optimizer steps, and a step into the lists of ranks. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """A place between two optimizer steps. Positions compare as they follow each other."""

    epoch: int
    samples: int
    """Of this epoch, before this place."""


class Steps(NamedTuple):
    """The rule."""

    length: int
    """Samples in an epoch."""
    batch_size: int
    """Samples of one step."""
    drops_tail: bool
    """Whether what is no whole step is left out, instead of being a smaller step."""

    def end(self, samples: int) -> int:
        """Where an epoch ends whose steps go on after `samples`."""
        rest = self.length - samples
        return self.length - rest % self.batch_size if self.drops_tail else self.length

    def size(self, here: Position) -> int:
        """Samples of the step that follows."""
        return min(self.batch_size, self.end(here.samples) - here.samples)

    def following(self, here: Position) -> Position:
        """The position after one more step."""
        return self.normal(Position(here.epoch, here.samples + self.size(here)))

    def normal(self, here: Position) -> Position:
        """The end of an epoch is the beginning of the next one."""
        return here if here.samples < self.end(here.samples) else Position(here.epoch + 1, 0)

    def in_epoch(self) -> int:
        """Steps of a whole epoch."""
        return self._between(0, self.end(0))

    def between(self, here: Position, there: Position) -> int:
        """Steps from one position to a later one; 0 if it is none."""
        if there <= here:
            return 0
        if there.epoch == here.epoch:
            return self._between(here.samples, there.samples)
        whole = (there.epoch - here.epoch - 1) * self.in_epoch()
        return self._between(here.samples, self.end(here.samples)) + whole + self._between(0, there.samples)

    def _between(self, start: int, stop: int) -> int:
        return -(-(stop - start) // self.batch_size)

    def part(self, here: Position, rank: int, world: int, micro_batch: int, micro_batches: int) -> tuple[int, int]:
        """The places, in the epoch's order, of one list of the step that follows. They may be none; then the first is one of the step's."""
        size = self.size(here)
        first, last = (size * number // world for number in (rank, rank + 1))
        start, stop = (first + (last - first) * number // micro_batches for number in (micro_batch, micro_batch + 1))
        return here.samples + start, here.samples + stop
