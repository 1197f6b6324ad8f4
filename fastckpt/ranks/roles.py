"""Who does what one rank is enough for, or a few. Pure: every rank finds the same.

Sixteen thousand ranks that all ask for something each second are more than a store answers. So a few ranks ask, and the others look for
what these have found.
"""

from __future__ import annotations

from fastckpt.ranks.world import World

N_COMMITTERS = 3
"""Ranks that may commit, one after the other: whoever of them lives."""
N_WATCHERS = 64
"""Ranks that look whether those live."""


def committers(world: World) -> tuple[int, ...]:
    """Ranks that commit, in their order: the first rank of each of the first nodes, as ranks of a node die together. Of few nodes the
    first ranks.
    """
    apart = world.local_size if world.size >= N_COMMITTERS * world.local_size else 1
    return tuple(range(0, min(world.size, N_COMMITTERS * apart), apart))


def commit_turn(world: World) -> int | None:
    """This rank's place among those that commit; None: it does not."""
    order = committers(world)
    return order.index(world.rank) if world.rank in order else None


def watches(world: World) -> bool:
    """Whether this rank looks if those that commit live."""
    return world.rank % max(1, world.size // N_WATCHERS) == 0


def share_s(size: int, requests_per_s: float) -> float:
    """Seconds between two requests of one rank, if `size` of them are to make so many a second together."""
    return size / requests_per_s
