"""Who this process is among the ranks of its job."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """A rank's place. The default is that of a process that trains alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this node; 0 if the launcher does not tell."""
    local_size: int = 1
    """Ranks of this node that share its cores, memory and link; 1 if the launcher does not tell."""

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides where one has to."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this rank does what is done once on each node."""
        return self.local_rank == 0


ALONE = World()


def current_world() -> World:
    """The place of this process in torch's default process group; `ALONE` where there is none, or none of several ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    size = distributed.get_world_size()
    if size == 1:
        return ALONE
    rank = distributed.get_rank()
    local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if not 0 <= local_rank < local_size <= size:  # left over from another launch
        local_rank, local_size = 0, 1
    return World(rank, size, local_rank, local_size)


def _number(variable: str, default: int) -> int:
    """What a launcher has put into the environment."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default
