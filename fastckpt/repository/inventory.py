"""Inventory of a repository by names: the one place that tells the keys of a LIST apart (docs/format.md, section 11)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.store.base import ObjectInfo, Store


@dataclass(frozen=True)
class Inventory:
    """Names in the listed folders; no object was read. All orders are ascending."""

    infos: Mapping[str, ObjectInfo] = field(default_factory=dict)
    """Everything that was listed, by key."""
    epochs: tuple[int, ...] = ()
    commits: tuple[CheckpointId, ...] = ()
    """Commit keys, including those of tombstones."""
    votes: Mapping[SaveId, tuple[VoteName, ...]] = field(default_factory=dict)
    packs: Mapping[SaveId, tuple[str, ...]] = field(default_factory=dict)
    """Keys of packs, by the save that wrote them."""
    pins: Mapping[str, ObjectInfo] = field(default_factory=dict)
    """Pins, by name."""
    unknown: tuple[str, ...] = ()
    """Keys of no known form: never read, never deleted."""

    @property
    def newest_epoch(self) -> int:
        """The highest epoch number; 0 if there is none."""
        return max(self.epochs, default=0)

    @property
    def sizes(self) -> dict[str, int]:
        """Length of every object in bytes, by key."""
        return {key: info.n_bytes for key, info in self.infos.items()}

    @property
    def newest_s(self) -> float:
        """The latest modification time of any object, by the store's clock."""
        return max((info.modified_s for info in self.infos.values()), default=0.0)

    @property
    def commit_times_s(self) -> dict[CheckpointId, float]:
        """When the record or tombstone at each commit key was written."""
        return {checkpoint: self.infos[keys.commit_key(checkpoint)].modified_s for checkpoint in self.commits}


def inventory_of(infos: Iterable[ObjectInfo]) -> Inventory:
    """Sort keys by their form. Pure."""
    by_key: dict[str, ObjectInfo] = {}
    epochs: list[int] = []
    commits: list[CheckpointId] = []
    votes: dict[SaveId, list[VoteName]] = defaultdict(list)
    packs: dict[SaveId, list[str]] = defaultdict(list)
    pins: dict[str, ObjectInfo] = {}
    unknown: list[str] = []
    for info in infos:
        key = info.key
        by_key[key] = info
        if (save := keys.parse_pack(key)) is not None:
            packs[save].append(key)
        elif (vote := keys.parse_vote(key)) is not None:
            votes[vote.save].append(vote)
        elif (checkpoint := keys.parse_commit(key)) is not None:
            commits.append(checkpoint)
        elif (epoch := keys.parse_epoch(key)) is not None:
            epochs.append(epoch)
        elif (pin := keys.parse_pin(key)) is not None:
            pins[pin] = info
        elif key not in (keys.MARKER, keys.README) and not keys.is_notice(key):
            unknown.append(key)
    return Inventory(
        by_key,
        tuple(sorted(epochs)),
        tuple(sorted(commits)),
        {save: tuple(sorted(votes[save])) for save in sorted(votes)},
        {save: tuple(sorted(packs[save])) for save in sorted(packs)},
        pins,
        tuple(sorted(unknown)),
    )


def take_inventory(store: Store, *prefixes: str) -> Inventory:
    """One LIST for each folder, in this order; of everything if none is named. StoreError."""
    return inventory_of(info for prefix in prefixes or ("",) for info in store.list(prefix))
