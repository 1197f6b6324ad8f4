"""Checks the small objects of a repository: marker, epochs, commits and tombstones, pins; and whether they agree with each other."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

from fastckpt.errors import CorruptCheckpointError, Damage, ObjectNotFoundError, UnsupportedFormatError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit, Epoch, Parent, Pin, Tombstone, parse_marker, parse_pin
from fastckpt.repository.catalog import history, stand_in
from fastckpt.repository.commit import read_again, read_sealed
from fastckpt.repository.inventory import Inventory
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.upkeep.check.report import ReportBuilder


@dataclass
class Records:
    """The records that could be read, and the checkpoints whose records could not."""

    epochs: dict[int, Epoch] = field(default_factory=dict)
    commits: dict[CheckpointId, Commit] = field(default_factory=dict)
    tombstones: dict[CheckpointId, Tombstone] = field(default_factory=dict)
    unreadable: set[CheckpointId] = field(default_factory=set)


def check_marker(store: Store, inventory: Inventory, found: ReportBuilder) -> None:
    """Read the marker, and look for the README beside it."""
    where = f"{store.url}/{keys.MARKER}"
    marker = found.read(keys.MARKER, lambda: read_again(lambda: parse_marker(read_sealed(store, keys.MARKER), where)))
    if marker is not None:
        found.report.repository = marker.repository
    if keys.README not in inventory.infos:
        found.report.notes.append(f"{keys.README} is missing: it tells people what must not be deleted here")


def read_records(repository: Repository, inventory: Inventory, found: ReportBuilder) -> Records:
    """Read every epoch record, and the record at every commit key."""
    read = Records()
    _read_epochs(repository, inventory, read, found)
    for checkpoint in inventory.commits:
        key = keys.commit_key(checkpoint)
        record = found.read(key, functools.partial(_commit_or_gone, repository, checkpoint), checkpoint, rank_lost=True)
        if record is None:
            read.unreadable.add(checkpoint)
        elif isinstance(record, Commit):
            read.commits[checkpoint] = record
        elif isinstance(record, Tombstone):
            read.tombstones[checkpoint] = record
    return read


def _read_epochs(repository: Repository, inventory: Inventory, read: Records, found: ReportBuilder) -> None:
    for number in inventory.epochs:
        epoch = found.read(keys.epoch_key(number), functools.partial(repository.epoch, number))
        if epoch is not None:
            read.epochs[number] = epoch
    claimed = {c.epoch for c in inventory.commits} | set(range(1, max(inventory.epochs, default=0)))
    for number in sorted(claimed - set(inventory.epochs)):
        damage = Damage("epochs", "as a whole", "a record: epochs are claimed without gaps", "no such object")
        found.add(keys.epoch_key(number), [damage])


def _commit_or_gone(repository: Repository, checkpoint: CheckpointId) -> Commit | Tombstone | Literal["gone"]:
    """Read the record at a commit key. "gone": it does not exist any more; it was a tombstone that retention has deleted since the LIST."""
    try:
        return repository.commit(checkpoint)
    except ObjectNotFoundError:
        return "gone"


def check_parents(read: Records, found: ReportBuilder) -> None:
    """Compare each record's digest of its parent with the parent's record, if that exists."""
    parents: list[tuple[str, Parent | None]] = [(keys.epoch_key(n), e.parent) for n, e in read.epochs.items()]
    parents += [(keys.commit_key(c), commit.parent) for c, commit in read.commits.items()]
    for key, parent in parents:
        there = None if parent is None else read.commits.get(parent.checkpoint)
        if parent is not None and there is not None and there.digest != parent.digest:
            damage = Damage("parent", str(parent.checkpoint), parent.digest, f"{there.digest}: another record")
            found.add(key, [damage])


def _read_pin(store: Store, key: str) -> Pin:
    return parse_pin(read_sealed(store, key), f"{store.url}/{key}")


def check_pins(store: Store, inventory: Inventory, read: Records, found: ReportBuilder) -> None:
    """Read every pin. A pin that is missing since the LIST was removed by its owner: that is not damage."""
    for info in inventory.pins.values():
        key, modified_s = info.key, info.modified_s
        try:
            pin = read_again(functools.partial(_read_pin, store, key))
        except ObjectNotFoundError:
            continue
        except CorruptCheckpointError as error:
            found.add(key, error.damage)
            continue
        except UnsupportedFormatError as error:
            found.add_unsupported(str(error))
            continue
        found.report.pins.append(pin)
        if inventory.newest_s - modified_s > pin.expires_s:
            found.report.notes.append(f"{key} has expired: the next pass of retention, or prune, removes it")
        elif pin.checkpoint not in read.commits and pin.checkpoint not in read.unreadable:
            found.report.notes.append(f"{key} pins checkpoint {pin.checkpoint}, which is not there")


def history_of(inventory: Inventory, read: Records) -> list[CheckpointId] | None:
    """The history, newest first. None: it goes through an epoch record that is damaged."""
    newest_epoch = max((*inventory.epochs, *(c.epoch for c in inventory.commits)), default=0)
    damaged: list[int] = []

    def epoch_of(number: int) -> Epoch | None:
        if number in read.epochs:
            return read.epochs[number]
        if number in inventory.epochs:
            damaged.append(number)
            return None
        return stand_in(number, [c for checkpoint, c in read.commits.items() if checkpoint.epoch == number])

    found = list(history(newest_epoch, epoch_of, [*read.commits, *read.unreadable]))
    return None if damaged else found


def is_retired(repository: Repository, checkpoint: CheckpointId) -> bool:
    """Whether a checkpoint is retired by now. Asks the store again."""
    try:
        return isinstance(repository.commit(checkpoint), Tombstone)
    except ObjectNotFoundError:
        return True
    except (CorruptCheckpointError, UnsupportedFormatError):
        return False
