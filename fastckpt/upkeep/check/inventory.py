"""Everything that a repository holds, by name: one LIST, sorted by kind of object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.repository.repository import Listing
from fastckpt.store.base import ObjectInfo


class Inventory(NamedTuple):
    """The objects of a repository, sorted by kind."""

    sizes: dict[str, int]
    """Length of every object in bytes, by key."""
    listing: Listing
    votes: dict[SaveId, list[VoteName]]
    packs: dict[SaveId, list[str]]
    pins: dict[str, float]
    """Modification time of each pin, by key."""
    foreign: list[str]
    """Keys of objects that no version of fastckpt writes, and of leftovers of probes."""
    now_s: float
    """The newest modification time: 'now' by the store's own clock."""

    @property
    def newest_epoch(self) -> int:
        """The highest epoch number that a record or a commit names; 0 if there is none."""
        return max((*self.listing.epochs, *(c.epoch for c in self.listing.commits)), default=0)


def classify(infos: Iterable[ObjectInfo]) -> Inventory:
    """Sort objects by the form of their keys (docs/format.md, section 11). Pure."""
    sizes: dict[str, int] = {}
    epochs: list[int] = []
    commits: dict[CheckpointId, float] = {}
    votes: dict[SaveId, list[VoteName]] = defaultdict(list)
    packs: dict[SaveId, list[str]] = defaultdict(list)
    pins: dict[str, float] = {}
    foreign: list[str] = []
    now_s = 0.0
    for info in infos:
        key = info.key
        sizes[key] = info.n_bytes
        now_s = max(now_s, info.modified_s)
        if (epoch := keys.parse_epoch(key)) is not None:
            epochs.append(epoch)
        elif (checkpoint := keys.parse_commit(key)) is not None:
            commits[checkpoint] = info.modified_s
        elif (vote := keys.parse_vote(key)) is not None:
            votes[vote.save].append(vote)
        elif (save := keys.parse_pack(key)) is not None:
            packs[save].append(key)
        elif keys.parse_pin(key) is not None:
            pins[key] = info.modified_s
        elif key not in (keys.MARKER, keys.README):
            foreign.append(key)
    listing = Listing(tuple(sorted(epochs)), tuple(sorted(commits)), commits)
    return Inventory(sizes, listing, dict(votes), dict(packs), pins, foreign, now_s)
