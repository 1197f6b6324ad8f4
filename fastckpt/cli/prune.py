"""prune: retention for a run that, as a person confirms, is stopped. The plan is shown first, exact to the byte, and then carried out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastckpt.cli.output import OK, USAGE, WrongUsageError, bar, confirm, human, note, print_json, say
from fastckpt.cli.target import add_endpoint, open_repository
from fastckpt.errors import CheckpointError, RepositoryError, UnreadableError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.pack_ranges import ranges_of
from fastckpt.format.repository_records import Commit
from fastckpt.repository.collector import Collector
from fastckpt.repository.file_tables import packs_of
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import (
    HeldBytes,
    Keep,
    RepositoryView,
    RetentionPlan,
    TombstoneSeen,
    plan_retention,
)

HELP = "remove checkpoints that no rule keeps, and debris; shows its plan first"

_PREFIXES = (keys.COMMITS, keys.DATA, keys.VOTES, keys.PINS)  # everything that may be deleted lies here
_MOST_PASSES = 100  # three are enough; the bound ensures that a bug cannot delete for ever

Needs = Mapping[CheckpointId, frozenset[str] | None]
"""The packs that each living checkpoint names. None: its index cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt prune`."""
    add_endpoint(parser)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--keep-last", type=int, required=True, metavar="N", help="keep the newest N of the history")
    parser.add_argument("--keep-every", type=int, metavar="K", help="keep steps that are multiples of K")
    parser.add_argument(
        "--keep-every-minutes",
        type=float,
        metavar="M",
        help="keep those nearest to multiples of M minutes since the oldest",
    )
    parser.add_argument("--keep-for-minutes", type=float, metavar="M", help="keep those younger than M minutes")
    parser.add_argument("--keep-steps", metavar="N,N,…", help="keep these steps")
    parser.add_argument("--keep-best", metavar="METRIC:min|max", help="keep the one with the best value of a metric")
    parser.add_argument("--keep-best-count", type=int, default=1, metavar="N", help="… the best N (default 1)")
    parser.add_argument("--branches", action="store_true", help="remove abandoned branches too")
    parser.add_argument(
        "--run-is-stopped", action="store_true", help="no job writes here, by your word; required unless --dry-run"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="leave packs this long after their tombstone (default 0)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan only")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    # argparse cannot express "at least one of them".
    parser.usage = (
        "%(prog)s [-h] [--json] [--endpoint-url URL] --keep-last N [--keep-every K] [--keep-every-minutes M]\n"
        "                      [--keep-for-minutes M] [--keep-steps N,N,…] [--keep-best METRIC:min|max] [--keep-best-count N]\n"
        "                      [--branches] [--grace SECONDS] (--run-is-stopped | --dry-run) [--yes] URL"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the plan, ask, and carry it out. RepositoryError, StoreError, WrongUsageError, OSError."""
    with open_repository(arguments.url, arguments.endpoint_url) as repository:
        return prune(repository, arguments)


@dataclass
class Forecast:
    """The work of all passes of a prune, known before the first one."""

    retire: list[tuple[CheckpointId, str]] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Packs that may be deleted only after their grace: by another prune, or by the job's retention."""
    kept: list[CheckpointId] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    held: HeldBytes = field(default_factory=HeldBytes)
    """What is left."""


def forecast(view: RepositoryView, needs: Needs, keep: Keep, grace_s: float, branches: bool) -> Forecast:
    """Predict the work of repeated passes. Pure."""
    result = Forecast()
    for _ in range(_MOST_PASSES):
        todo = plan_retention(view, keep, (), grace_s, abandoned=branches, stopped=True)
        result.notes += [words for words in (*todo.warnings, *todo.notes) if words not in result.notes]
        result.held = todo.held
        if not todo.retire and not todo.delete:
            break
        result.retire += todo.retire
        result.delete += todo.delete
        view = after(view, todo, needs)
    result.waiting = [
        key
        for save, packs in view.packs.items()
        if save.checkpoint in view.tombstones
        for key in packs
        if view.needed is not None and key not in view.needed
    ]
    result.kept = sorted(view.living, reverse=True)
    return result


def after(view: RepositoryView, todo: RetentionPlan, needs: Needs) -> RepositoryView:
    """Predict the repository after one pass. Pure."""
    gone = {checkpoint for checkpoint, _ in todo.retire}
    deleted = set(todo.delete)
    living = {c: commit for c, commit in view.living.items() if c not in gone}
    tombstones = {**view.tombstones, **{c: _tombstone_of(view, c, needs) for c in gone}}
    votes = {save: [key for key in names if key not in deleted] for save, names in view.votes.items()}
    packs = {save: [key for key in names if key not in deleted] for save, names in view.packs.items()}
    named = [needs.get(c) for c in living]
    unknown = bool(view.unreadable) or None in named
    needed = None if unknown else {key for packs in named for key in packs or ()}
    return replace(
        view,
        living=living,
        history=[candidate for candidate in view.history if candidate.checkpoint not in gone],
        tombstones={c: t for c, t in tombstones.items() if keys.commit_key(c) not in deleted},
        votes={save: names for save, names in votes.items() if names},
        packs={save: names for save, names in packs.items() if names},
        needed=needed,
        pins=replace(view.pins, expired=[key for key in view.pins.expired if key not in deleted]),
    )


def _tombstone_of(view: RepositoryView, checkpoint: CheckpointId, needs: Needs) -> TombstoneSeen:
    packs, commit = needs.get(checkpoint), view.living.get(checkpoint)
    if commit is None:  # it never was a checkpoint
        return TombstoneSeen(view.now_s)
    others = None if packs is None else ranges_of(key for key in packs if keys.parse_pack(key) != commit.save)
    return TombstoneSeen(view.now_s, replaced=True, named=others)


def prune(repository: Repository, arguments: argparse.Namespace) -> int:
    if not arguments.run_is_stopped and not arguments.dry_run:
        raise WrongUsageError(
            "while a job runs, retention belongs to it: Checkpointer(keep=Keep(last=…)). If it is stopped and will not come back while "
            "this works, say so with --run-is-stopped; --dry-run shows the plan without"
        )
    keep = keep_of(arguments)
    repository.require()
    collector = Collector(repository)
    view = collector.look()
    sizes = {info.key: info.n_bytes for prefix in _PREFIXES for info in repository.store.list(prefix)}
    found = forecast(view, needs_of(repository, view), keep, arguments.grace, arguments.branches)
    if not arguments.json:
        _print_forecast(repository, found, view, sizes)
    deleted, status = None, OK
    if (found.retire or found.delete) and not arguments.dry_run:
        freed = human(sum(sizes.get(key, 0) for key in found.delete))
        question = f"Remove {len(found.retire)} checkpoints and unfinished saves, and free {freed}?"
        answer = confirm(question, yes=arguments.yes, json_only=arguments.json)
        if answer is None:
            status = USAGE
        elif answer:
            deleted = _carry_out(repository, collector, view, keep, arguments)
    if arguments.json:
        print_json("prune", {"url": repository.url, **_to_json(found, sizes), "done": deleted is not None})
    elif deleted is not None:
        say(f"{repository.url}: done, {deleted} objects deleted")
    return status


def keep_of(arguments: argparse.Namespace) -> Keep:
    """The rules that the arguments give. WrongUsageError."""
    best, mode = None, "min"
    if arguments.keep_best is not None:
        best, _, mode = arguments.keep_best.rpartition(":")
        if not best:
            raise WrongUsageError(f"--keep-best is {arguments.keep_best!r}: expected METRIC:min or METRIC:max")
    if not arguments.grace >= 0:
        raise WrongUsageError(f"--grace is {arguments.grace}: expected a number of seconds ≥ 0")
    try:
        return Keep(
            last=arguments.keep_last,
            every=arguments.keep_every,
            every_minutes=arguments.keep_every_minutes,
            for_minutes=arguments.keep_for_minutes,
            steps=_steps(arguments.keep_steps),
            best=best,
            mode=mode,
            best_count=arguments.keep_best_count,
        )
    except ValueError as error:
        raise WrongUsageError(str(error)) from None


def _steps(text: str | None) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise WrongUsageError(f"--keep-steps is {text!r}: expected steps, such as 1000,5000") from None


def needs_of(repository: Repository, view: RepositoryView) -> Needs:
    """Read the packs that each living checkpoint names. StoreError."""
    return {checkpoint: _packs(repository, commit) for checkpoint, commit in view.living.items()}


def _packs(repository: Repository, commit: Commit) -> frozenset[str] | None:
    try:
        return packs_of(repository.store, commit)
    except UnreadableError:
        return None


def _carry_out(
    repository: Repository, collector: Collector, view: RepositoryView, keep: Keep, arguments: argparse.Namespace
) -> int:
    """Run passes until nothing is left to do. Returns the number of deleted objects."""
    deleted, last = 0, None
    refused: list[CheckpointError] = []
    draw = bar(repository.url)
    for n_pass in range(_MOST_PASSES):
        seen = repository.newest_epoch()
        if seen != view.newest_epoch:
            raise RepositoryError(
                f"{repository.url}: a job has started (epoch {seen}) while this was pruning; it was stopped here. Nothing is damaged: "
                "run prune again once that job is stopped, or give it Checkpointer(keep=…)"
            )
        fresh = collector.look()
        todo = plan_retention(fresh, keep, (), arguments.grace, abandoned=arguments.branches, stopped=True)
        if (not todo.retire and not todo.delete) or todo == last:
            break
        draw(n_pass, n_pass + 3)
        new = collector.run(todo, as_epoch=None)
        refused += new
        deleted += len(todo.delete) - len(new)
        last = todo
    draw(1, 1)
    for error in refused[1:]:
        note(f"{repository.url}: {error}")
    if refused:
        note(f"{repository.url}: {deleted} objects deleted; {len(refused)} could not be deleted or replaced")
        raise refused[0]
    return deleted


def _print_forecast(repository: Repository, found: Forecast, view: RepositoryView, sizes: Mapping[str, int]) -> None:
    url = repository.url
    for checkpoint, why in found.retire:
        commit = view.living.get(checkpoint)
        size = "" if commit is None else f", saved {commit.utc}, {human(commit.stored_bytes)}"
        say(f"{url}: remove epoch {checkpoint.epoch}, step {checkpoint.step}{size}: {why}")
    kept = ", ".join(f"{c.step} (epoch {c.epoch})" for c in found.kept[:20]) or "none"
    say(f"{url}: keep {len(found.kept)} checkpoints: steps {kept}{' …' if len(found.kept) > 20 else ''}")
    freed = sum(sizes.get(key, 0) for key in found.delete)
    say(f"{url}: {len(found.delete)} objects go, {human(freed)} are freed")
    if found.held.base:
        say(
            f"{url}: {human(found.held.base)} of what stays are packs of saves that are no checkpoint any more: the checkpoints refer to "
            "them"
        )
    if found.waiting:
        n_bytes = human(sum(sizes.get(key, 0) for key in found.waiting))
        say(f"{url}: {n_bytes} more once the grace is over: run prune again then")
    for words in found.notes:
        note(f"{url}: note: {words}")


def _to_json(found: Forecast, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "retire": [{"epoch": c.epoch, "step": c.step, "why": why} for c, why in found.retire],
        "keep": [{"epoch": c.epoch, "step": c.step} for c in found.kept],
        "delete": found.delete,
        "freed_bytes": sum(sizes.get(key, 0) for key in found.delete),
        "waiting_bytes": sum(sizes.get(key, 0) for key in found.waiting),
        "base_bytes": found.held.base,
        "notes": found.notes,
    }
