"""check: read and verify every byte of files and repositories; with --repair, commit the saves whose votes are all there."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fastckpt.cli.output import (
    BAD_CHECKPOINT,
    FOUND_DAMAGE,
    OK,
    USAGE,
    bar,
    confirm,
    human,
    note,
    print_json,
    say,
)
from fastckpt.cli.target import add_endpoint, maybe_repository, open_container, options
from fastckpt.errors import CheckpointError, StoreError
from fastckpt.format.keys import MARKER, CheckpointId, epoch_key
from fastckpt.format.repository_records import Epoch
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.upkeep import repair as repairing
from fastckpt.upkeep.check import repository as checking
from fastckpt.upkeep.check.container import ContainerReport, check_container
from fastckpt.upkeep.check.report import CheckpointState, Finding, RepositoryReport

HELP = "read and verify every byte; names everything that is damaged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt check`."""
    add_endpoint(parser)
    parser.add_argument("paths", nargs="+", metavar="FILE|URL")
    parser.add_argument("--step", type=int, metavar="N", help="of a repository: checkpoints of this step only")
    parser.add_argument(
        "--quick", action="store_true", help="of a repository: records and indexes, packs by length only"
    )
    parser.add_argument(
        "--repair", action="store_true", help="then commit saves whose votes are all there (shows them, and asks)"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace) -> int:
    """Check all paths. The other paths are checked even if one is no checkpoint."""
    reports, errors, checked = [], [], []
    for path in arguments.paths:
        try:
            with maybe_repository(path, arguments.endpoint_url) as repository:
                if repository is not None:
                    checked.append(_check_repository(repository, arguments))
                    continue
            reports.append(_check_container(path, arguments.endpoint_url))
        except StoreError:
            raise
        except CheckpointError as error:  # the other paths are still worth checking
            errors.append((path, error))
    if arguments.json:
        failed = [{"path": path, "error": type(e).__name__, "message": str(e)} for path, e in errors]
        value = {"checked": [_container_to_json(report) for report in reports], "failed": failed}
        print_json("check", {**value, "repositories": [_checked_to_json(one) for one in checked]})
    else:
        for report in reports:
            _print_container(report)
        for _, failure in errors:
            note(f"fastckpt: {failure}")
    if errors:
        return BAD_CHECKPOINT
    if any(one.unanswered for one in checked):
        return USAGE
    if any(one.status == FOUND_DAMAGE for one in checked) or not all(report.ok for report in reports):
        return FOUND_DAMAGE
    return BAD_CHECKPOINT if any(one.status != OK for one in checked) else OK


# Repositories.


@dataclasses.dataclass
class _Checked:
    """A report, and the outcome of the repair."""

    report: RepositoryReport
    plan: repairing.RepairPlan | None = None
    repaired: list[repairing.Repaired] = dataclasses.field(default_factory=list)

    unanswered: bool = False
    """There was something to repair, but nobody could confirm it."""

    @property
    def status(self) -> int:
        failed = any(one.error is not None for one in self.repaired)
        if failed or not self.report.ok:
            return FOUND_DAMAGE
        return OK if self.repaired or _looked_into(self.report) else BAD_CHECKPOINT


def _check_repository(repository: Repository, arguments: argparse.Namespace) -> _Checked:
    """Read everything, print all findings, and repair if that is wanted."""
    steps = None if arguments.step is None else {arguments.step}
    report = checking.check_repository(
        repository, bar(repository.url), steps=steps, quick=arguments.quick, options=options()
    )
    if not arguments.json:
        _print_report(report, arguments.step)
    checked = _Checked(report)
    if not arguments.repair:
        return checked
    checked.plan = _plan_of(repository, report)
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


def _plan_of(repository: Repository, report: RepositoryReport) -> repairing.RepairPlan:
    """The plan for a report, with the epoch records that it needs."""
    catalog = Catalog(repository)

    def epoch_of(number: int) -> Epoch | None:
        return catalog.epoch(number)

    return repairing.plan_repair(report, epoch_of, max(catalog.listing.epochs, default=0))


def _looked_into(report: RepositoryReport) -> bool:
    """Whether any checkpoint was checked. A wrong prefix must not count as a sound repository."""
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


def _checked_to_json(checked: _Checked) -> dict[str, Any]:
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
    return {**value, "rank": finding.rank, "rank_lost": finding.rank_lost, "also_ranks": finding.also_ranks}


# Files.


def _check_container(path: str, endpoint_url: str | None) -> ContainerReport:
    """Read every byte of one container. NotACheckpointError."""
    with open_container(path, endpoint_url) as source:
        return check_container(source, bar(path))


def _container_to_json(report: ContainerReport) -> dict[str, Any]:
    return {
        "path": report.source,
        "ok": report.ok,
        "chunks": report.chunks,
        "raw_bytes": report.raw_bytes,
        "damage": [dataclasses.asdict(item) for item in report.damage],
        "not_checked": report.not_checked,
        "tensors_lost": report.tensors,
    }


def _print_container(report: ContainerReport) -> None:
    if report.ok:
        say(f"{report.source}: ok, {report.chunks} chunks, {human(report.raw_bytes)} verified")
    for item in report.damage:
        say(f"{report.source}: DAMAGED: {item}")
    for words in report.not_checked:
        say(f"{report.source}: NOT CHECKED: {words}")
    if report.tensors:
        say(f"{report.source}: {len(report.tensors)} tensors cannot be restored: {', '.join(report.tensors)}")
