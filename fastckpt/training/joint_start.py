"""How the ranks of a job begin as one: they compare what they were given, share a repository, and save under one epoch."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

from fastckpt.errors import CheckpointError, ObjectNotFoundError, RanksError, StoreError
from fastckpt.format.keys import epoch_key
from fastckpt.format.repository_records import Epoch, Parent, epoch_bytes, parse_epoch_record, writer
from fastckpt.format.repository_records import parent_to_json as parent_json
from fastckpt.ranks.team import Team
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.object_board import remove_old_notices
from fastckpt.repository.repository import Repository

_SHOWN = 5


def compare(team: Team, said: dict[str, Any]) -> None:
    """RanksError on every rank, with all differences, unless all say the same. said: what JSON can hold, by what it is called."""
    said = {"number of ranks": team.world.size, "version of fastckpt": writer()["version"], **said}

    def judge(all_said: list[dict[str, Any]]) -> None:
        differences = [words for what in said for words in _difference(what, [one.get(what) for one in all_said])]
        if differences:
            raise RanksError("the ranks of this job do not begin alike: " + "; ".join(differences))

    team.roll.decide("making a Checkpointer", said, judge, meets=True)


def _difference(what: str, values: list[Any]) -> list[str]:
    first = values[0]
    other = next((rank for rank, value in enumerate(values) if value != first), None)
    if other is None:
        return []
    value = values[other]
    if isinstance(first, list) and isinstance(value, list):
        only_0, only_other = [x for x in first if x not in value], [x for x in value if x not in first]
        parts = [f"only rank 0 has {_some(only_0)}"] if only_0 else []
        parts += [f"only rank {other} has {_some(only_other)}"] if only_other else []
        return [f"{what}: {', '.join(parts) or 'in another order'}"]
    return [f"{what}: {first!r} on rank 0, {value!r} on rank {other}"]


def _some(values: list[Any]) -> str:
    return ", ".join(map(repr, values[:_SHOWN])) + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


def share_repository(team: Team, repository: Repository) -> None:
    """Make or open the repository by rank 0, and see that all ranks see it. RepositoryError; RanksError if they do not."""
    nonce = f"probe/{secrets.token_hex(8)}/ranks"
    where = repository.url

    def make(urls: list[str]) -> dict[str, str]:
        marker = repository.initialise(team.world.size)
        repository.store.put(nonce, nonce.encode())
        return {"repository": marker.repository, "nonce": nonce, "url": urls[0]}

    shared = team.roll.decide("opening the repository", where, make)
    problem = None if team.world.leads else _problem(repository, shared)

    def judge(problems: list[str | None]) -> None:
        repository.store.delete(nonce)
        found = {rank: words for rank, words in enumerate(problems) if words is not None}
        if found:
            rank, words = next(iter(found.items()))
            raise RanksError(
                f"{len(found)} of {team.world.size} ranks do not share the repository of rank 0, {shared['url']}; rank {rank}: {words}. "
                "All ranks save to one place: a directory that all nodes mount, or an object store"
            )

    team.roll.decide("opening the repository", problem, judge)


def _problem(repository: Repository, shared: dict[str, str]) -> str | None:
    """Why this rank does not see what rank 0 has made, in words."""
    try:
        marker = repository.marker()
        if marker is None:
            return f"{repository.url} is no repository as this rank sees it"
        if marker.repository != shared["repository"]:
            return f"{repository.url} is another repository as this rank sees it"
        repository.store.head(shared["nonce"])
    except ObjectNotFoundError:
        return f"{repository.url} is a copy, as this rank sees it: what rank 0 has just written is not there"
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return None


def claim_jointly(team: Team, incarnation: Incarnation, *, fresh: bool) -> None:
    """Begin a history, by rank 0. RepositoryError on every rank if there are checkpoints and `fresh` was not asked for."""

    def claim(_: list[Any]) -> dict[str, Any]:
        return claimed(incarnation.begin(fresh=fresh), incarnation.last)

    adopt(team, incarnation, team.roll.decide("beginning to save", None, claim, meets=True))


def claimed(epoch: Epoch, last: Parent | None) -> dict[str, Any]:
    """What ranks have to know of an epoch that rank 0 has claimed."""
    return {"number": epoch.number, "record": epoch_bytes(epoch).decode(), "last": parent_json(last)}


def adopt(team: Team, incarnation: Incarnation, told: dict[str, Any]) -> None:
    """Save under the epoch that rank 0 has told of."""
    if team.world.leads:
        with contextlib.suppress(StoreError):  # without the right to delete they stay: some hundred bytes
            remove_old_notices(incarnation.repository.store, told["number"])
        return
    number, record = told["number"], told["record"].encode()
    epoch = parse_epoch_record(record, number, f"{incarnation.repository.url}/{epoch_key(number)}")
    incarnation.adopt(epoch, epoch.parent)
