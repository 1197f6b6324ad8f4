"""ls, show and check of repositories."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from fastckpt.cli.containers import tensor_to_json
from fastckpt.cli.output import BAD_CHECKPOINT, FOUND_DAMAGE, OK, bar, confirm, human, note, print_json, say, table
from fastckpt.cli.target import find, options, safe_history
from fastckpt.errors import CheckpointError, ObjectNotFoundError, StoreError
from fastckpt.format.keys import MARKER, CheckpointId, SaveId, epoch_key
from fastckpt.format.repository_records import Commit, Epoch, Tombstone, metrics_to_json
from fastckpt.format.tensor_names import dotted
from fastckpt.format.vote import save_info
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.catalog import Catalog, describe, pending_saves
from fastckpt.repository.commit import list_votes, open_vote
from fastckpt.repository.repository import Repository
from fastckpt.upkeep import repair as repairing
from fastckpt.upkeep.check import repository as checking
from fastckpt.upkeep.check.report import CheckpointState, Finding, RepositoryReport

_MANY_METRICS = 4


# ls


def list_repository(repository: Repository) -> dict[str, Any]:
    """Everything `ls` says about a repository, newest first. Reads records and names, no index."""
    catalog = Catalog(repository)
    found = repository.read_all(catalog.listing)
    inside = safe_history(catalog)
    rows = [_row(commit, inside) for commit in found.commits.values()]
    for checkpoint, error in found.failed.items():
        rows.append(_empty_row(checkpoint, "damaged", str(error)))
    for save in pending_saves(repository.store, catalog.listing):
        votes = list_votes(repository.store, save)
        if votes:
            words = f"votes of {len({v.rank for v in votes})} of {votes[0].world} ranks"
            rows.append({**_empty_row(save.checkpoint, "unfinished", words), "try": save.attempt})
    rows.sort(key=lambda row: (row["epoch"], row["step"], row["try"] or 0), reverse=True)
    newest = max(catalog.listing.epochs, default=0)
    return {"url": repository.url, "newest_epoch": newest, "retired": len(found.tombstones), "checkpoints": rows}


def _row(commit: Commit, inside: list[CheckpointId] | None) -> dict[str, Any]:
    checkpoint = commit.checkpoint
    branch = "unknown" if inside is None else "history" if checkpoint in inside else "abandoned"
    row = {**describe(commit), "metrics": metrics_to_json(commit.metrics), "branch": branch, "error": None}
    return {**row, "newest": bool(inside) and inside is not None and inside[0] == checkpoint}


def _empty_row(checkpoint: CheckpointId, branch: str, error: str) -> dict[str, Any]:
    return {
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "try": None,
        "branch": branch,
        "newest": False,
        "error": error,
    }


def print_repository(found: Mapping[str, Any]) -> None:
    if not found["checkpoints"]:
        note(f"{found['url']}: no checkpoints")
        return
    rows: list[list[object]] = [["epoch", "step", "when (UTC)", "size", "state", "trigger", "metrics", ""]]
    for one in found["checkpoints"]:
        if one["error"] is None:
            when = one["utc"].replace("T", " ").removesuffix("Z")
            sizes = [human(one["stored_bytes"]), human(one["raw_bytes"])]
            mark = "newest" if one["newest"] else "" if one["branch"] == "history" else one["branch"]
            rows.append([one["epoch"], one["step"], when, *sizes, one["trigger"], _metrics(one["metrics"]), mark])
        else:
            words = one["error"] if one["branch"] == "unfinished" else "see fastckpt check"
            rows.append([one["epoch"], one["step"], "", "", "", "", "", f"{one['branch']}: {words}"])
    table(rows, right=(0, 1, 3, 4))


def _metrics(metrics: Mapping[str, Any]) -> str:
    shown = [
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in metrics.items()
    ]
    return " ".join(shown[:_MANY_METRICS]) + (" …" if len(shown) > _MANY_METRICS else "")


# show


def show(repository: Repository, arguments: argparse.Namespace) -> int:
    """A commit record, its ranks and their tensors. What cannot be read is said, and the status is BAD_CHECKPOINT."""
    catalog = Catalog(repository)
    inside = safe_history(catalog)
    checkpoint = find(repository.url, inside, _living(catalog), arguments.step, arguments.epoch)
    commit = repository.commit(checkpoint)
    assert isinstance(commit, Commit)
    ranks = [_rank(repository, commit, rank) for rank in range(commit.world)]
    row = _row(commit, inside)
    if arguments.json:
        print_json("show-repository", {"url": repository.url, **row, "writer": commit.writer, "ranks": ranks})
    else:
        _print_commit(repository, row, commit)
        _print_ranks(ranks)
    broken = [rank for rank in ranks if rank["error"] is not None]
    for rank in broken:
        note(f"fastckpt: rank {rank['rank']} cannot be shown: {rank['error']}")
    return BAD_CHECKPOINT if broken else OK


def _living(catalog: Catalog) -> list[CheckpointId]:
    """Commits that are no tombstones; damaged ones too."""
    found = []
    for checkpoint in catalog.listing.commits:
        try:
            if isinstance(catalog.commit(checkpoint), Tombstone):
                continue
        except ObjectNotFoundError:
            continue
        except StoreError:
            raise
        except CheckpointError:
            pass
        found.append(checkpoint)
    return found


def _rank(repository: Repository, commit: Commit, rank: int) -> dict[str, Any]:
    name = commit.vote(rank)
    try:
        reader = open_vote(repository.store, name)
        info = save_info(reader.directory, name, reader.source.name)
    except (StoreError, CheckpointError) as error:
        if isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError):
            raise
        return {"rank": rank, "error": str(error)}
    return {
        "rank": rank,
        "error": None,
        "raw_bytes": info.raw_bytes,
        "stored_bytes": info.stored_bytes,
        "shared_bytes": _shared_bytes(reader, commit.save),
        "seconds": info.seconds,
        "chunks": len(reader.records),
        "packs": len(reader.files),
        "tensors": [tensor_to_json(entry) for entry in reader.directory.tensors],
        "names": [dotted(entry.name) for entry in reader.directory.tensors],
    }


def _shared_bytes(reader: Reader, save: SaveId) -> int:
    """Of packs that earlier saves wrote."""
    own = f"data/{save}/"
    foreign = {n for n, file in enumerate(reader.files, 1) if not file.key.startswith(own)}
    places = {
        (int(r["file"]), int(r["offset"])): int(r["stored_bytes"]) for r in reader.records if int(r["file"]) in foreign
    }
    return sum(places.values())


def _print_commit(repository: Repository, row: Mapping[str, Any], commit: Commit) -> None:
    mark = "newest" if row["newest"] else row["branch"]
    parent = "none" if commit.parent is None else "epoch {}, step {}".format(*commit.parent.checkpoint)
    lines = [
        ("repository", repository.url),
        ("checkpoint", f"epoch {commit.save.epoch}, step {commit.save.step}, try {commit.save.attempt} ({mark})"),
        ("parent", parent),
        ("saved", f"{commit.utc}, trigger {commit.trigger}, {commit.seconds:.1f} s"),
        ("size", f"{human(commit.stored_bytes)} stored for {human(commit.raw_bytes)} of state, {commit.world} ranks"),
        ("metrics", " ".join(f"{name}={value}" for name, value in row["metrics"].items())),
        ("meta", commit.meta or ""),
        ("writer", " ".join(f"{key} {value}" for key, value in commit.writer.items() if key != "name")),
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        if text != "":
            say(f"{label.ljust(width)}  {text}")
    say()


def _print_ranks(ranks: list[dict[str, Any]]) -> None:
    good = [rank for rank in ranks if rank["error"] is None]
    if not good:
        return
    rows: list[list[object]] = [["rank", "state", "stored", "of earlier saves", "packs", "tensors", "seconds"]]
    for one in good:
        sizes = [human(one[member]) for member in ("raw_bytes", "stored_bytes", "shared_bytes")]
        rows.append([one["rank"], *sizes, one["packs"], len(one["tensors"]), f"{one['seconds']:.1f}"])
    table(rows, right=range(7))
    say()
    tensors: list[list[object]] = [["rank", "tensor", "type", "shape", "kind"]]
    for one in good:
        for name, entry in zip(one["names"], one["tensors"], strict=True):
            tensors.append([one["rank"], name, entry["dtype"], str(list(entry["shape"])), entry["kind"]])
    if len(tensors) > 1:
        table(tensors, right=(0,))


# check


@dataclasses.dataclass
class Checked:
    """A report, and what was or was not repaired."""

    report: RepositoryReport
    plan: repairing.RepairPlan | None = None
    repaired: list[repairing.Repaired] = dataclasses.field(default_factory=list)

    unanswered: bool = False
    """There was something to repair, and nobody to say yes."""

    @property
    def status(self) -> int:
        failed = any(one.error is not None for one in self.repaired)
        if failed or not self.report.ok:
            return FOUND_DAMAGE
        return OK if self.repaired or _looked_into(self.report) else BAD_CHECKPOINT


def check(repository: Repository, arguments: argparse.Namespace) -> Checked:
    """Read everything, say what is wrong, and complete what can be completed if that is wanted."""
    steps = None if arguments.step is None else {arguments.step}
    report = checking.check_repository(
        repository, bar(repository.url), steps=steps, quick=arguments.quick, options=options()
    )
    if not arguments.json:
        _print_report(report, arguments.step)
    checked = Checked(report)
    if not arguments.repair:
        return checked
    checked.plan = plan_of(repository, report)
    if not arguments.json:
        _print_plan(checked.plan)
    if checked.plan.complete or checked.plan.records:
        question = (
            f"Commit {len(checked.plan.complete)} finished saves, and make {len(checked.plan.records)} missing records?"
        )
        if not checked.plan.records:
            question = f"Commit {len(checked.plan.complete)} finished saves?"
        answer = confirm(question, yes=arguments.yes, json_only=arguments.json)
        checked.unanswered = answer is None
        if answer:
            checked.repaired = repairing.repair(repository, checked.plan)
    if not arguments.json:
        for one in checked.repaired:
            what = "committed" if one.error is None else f"NOT REPAIRED: {one.error}"
            say(f"{repository.url}: epoch {one.save.epoch}, step {one.save.step}: {what}")
    return checked


def plan_of(repository: Repository, report: RepositoryReport) -> repairing.RepairPlan:
    """The plan for a report, with the epoch records that it needs."""
    catalog = Catalog(repository)

    def epoch_of(number: int) -> Epoch | None:
        return catalog.epoch(number)

    return repairing.plan_repair(report, epoch_of, max(catalog.listing.epochs, default=0))


def _looked_into(report: RepositoryReport) -> bool:
    """Whether there was any checkpoint to check. A wrong prefix must not pass for a sound repository."""
    return any(one.state != "not checked" for one in report.checkpoints)


def _print_report(report: RepositoryReport, step: int | None) -> None:
    for one in report.checkpoints:
        if one.state == "not checked":
            continue
        words = {"ok": "ok", "damaged": "DAMAGED"}.get(one.state, one.state.upper())
        if one.state == "ok" and report.quick:
            words = "ok (quick: packs by length only)"
        branch = "" if one.branch == "history" else f", {one.branch}"
        say(f"{report.url}: epoch {one.checkpoint.epoch}, step {one.checkpoint.step}{branch}: {words}")
        if one.ranks_lost:
            say(f"  all tensors of ranks {', '.join(map(str, one.ranks_lost))} are lost")
        if one.tensors_lost:
            say(f"  {len(one.tensors_lost)} tensors cannot be restored: {', '.join(one.tensors_lost)}")
    for finding in report.findings:
        say(f"{report.url}/{finding.key}: DAMAGED: {finding}")
    for words in report.not_checked:
        say(f"{report.url}: NOT CHECKED: {words}")
    for save in report.unfinished:
        where = f"unfinished save of epoch {save.save.epoch}, step {save.save.step}, try {save.save.attempt}"
        hint = "; `fastckpt check --repair` commits it" if save.state == "completable" else ""
        say(f"{report.url}: {where} ({human(save.n_bytes)}): {save.state}: {save.why}{hint}")
    for words in report.notes:
        say(f"{report.url}: note: {words}")
    if not _looked_into(report):
        say(f"{report.url}: no checkpoints{'' if step is None else f' of step {step}'}: nothing to verify")
    if report.packs or report.chunks:
        say(f"{report.url}: {report.packs} packs, {human(report.pack_bytes)}, {report.chunks} chunks verified")
    if any(one.state == "damaged" for one in report.checkpoints):
        note("fastckpt: `fastckpt salvage` gets out of a damaged checkpoint what can be read")


def _print_plan(plan: repairing.RepairPlan) -> None:
    becomes = {
        "newest": "the next restore continues from it",
        "history": "an older step of the history",
        "abandoned": "outside of the history: restored only by its step",
    }
    for one in plan.complete:
        say(
            f"to repair: commit epoch {one.save.epoch}, step {one.save.step}, try {one.save.attempt}: {becomes[one.becomes]}"
        )
    for number in plan.records:
        say(f"to repair: make {epoch_key(number) if number else MARKER}, which is missing")
    for words in plan.left:
        say(f"not repaired: {words}")
    if not plan.complete and not plan.records:
        say("there is nothing to repair")


def checked_to_json(checked: Checked) -> dict[str, Any]:
    """A member of `repositories` of `fastckpt.check/1`."""
    report = checked.report
    plan = checked.plan
    return {
        "url": report.url,
        "ok": report.ok,
        "repository": report.repository,
        "quick": report.quick,
        "packs": report.packs,
        "pack_bytes": report.pack_bytes,
        "chunks": report.chunks,
        "damage": [_finding_to_json(finding) for finding in report.findings],
        "not_checked": report.not_checked,
        "notes": report.notes,
        "checkpoints": [{**_where(c.checkpoint), **_rest(c)} for c in report.checkpoints],
        "unfinished": [
            {**_where(s.save.checkpoint), "try": s.save.attempt, **_without(s, "save")} for s in report.unfinished
        ],
        "repair": None
        if plan is None
        else {
            "complete": [
                {**_where(c.save.checkpoint), "try": c.save.attempt, "becomes": c.becomes} for c in plan.complete
            ],
            "left": list(plan.left),
            "done": [{**_where(r.save.checkpoint), "error": r.error} for r in checked.repaired],
        },
    }


def _where(checkpoint: CheckpointId) -> dict[str, int]:
    return {"epoch": checkpoint.epoch, "step": checkpoint.step}


def _without(value: Any, member: str) -> dict[str, Any]:
    found = dataclasses.asdict(value)
    del found[member]
    return found


def _rest(state: CheckpointState) -> dict[str, Any]:
    return _without(state, "checkpoint")


def _finding_to_json(finding: Finding) -> dict[str, Any]:
    where = None if finding.checkpoint is None else _where(finding.checkpoint)
    value = {"key": finding.key, **dataclasses.asdict(finding.damage), "checkpoint": where}
    return {**value, "rank": finding.rank, "rank_lost": finding.rank_lost}


__all__ = ["Checked", "check", "checked_to_json", "list_repository", "plan_of", "print_repository", "show"]
