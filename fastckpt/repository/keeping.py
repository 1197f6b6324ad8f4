"""The rules of retention: which checkpoints of a history stay (docs/how-to/retention.md). Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fastckpt.format.keys import CheckpointId


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of the history stay: every checkpoint that at least one rule keeps. `Keep(last=1)` keeps the fewest.

    While no checkpoint has a value of the metric `best` (the name is mistyped, or nothing was measured yet), the best one is unknown: all
    checkpoints stay, with a warning.

    Times are those of the commit records by the store's own clock, which all incarnations share; no clock of a machine is asked.

    Args:
        last: How many of the newest checkpoints stay.
        every: Checkpoints stay whose step is a multiple of this.
        every_minutes: The nearest checkpoint stays to each multiple of so many minutes since the oldest checkpoint of the history; of two
            that are as near, the older one.
        for_minutes: Checkpoints stay that are younger than this; older ones only if another rule keeps them.
        steps: Checkpoints of these steps stay.
        best: Name of a metric. The checkpoints with its best values stay; one without a value, or with NaN, is never best.
        mode: Which value is best, "min" or "max".
        best_count: How many of the best stay.
        max_grace_bytes: How many bytes may wait for the end of their grace, in packs that no checkpoint needs. Beyond that the oldest packs
            of this incarnation go in the next pass (docs/guarantees.md, section 3). None: no limit.

    Raises:
        ValueError: A rule makes no sense; all problems are listed.
    """

    last: int = 3
    every: int | None = None
    every_minutes: float | None = None
    for_minutes: float | None = None
    steps: Collection[int] = ()
    best: str | None = None
    mode: str = "min"
    best_count: int = 1
    max_grace_bytes: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not _is_count(self.last, 1):
            problems.append(f"last is {self.last!r}: at least the newest checkpoint must stay")
        if self.every is not None and not _is_count(self.every, 1):
            problems.append(f"every is {self.every!r}: expected a number of steps ≥ 1 or None")
        for name in ("every_minutes", "for_minutes"):
            minutes = getattr(self, name)
            if minutes is not None and not (type(minutes) in (int, float) and 0 < minutes < math.inf):
                problems.append(f"{name} is {minutes!r}: expected a number of minutes > 0 or None")
        if not isinstance(self.steps, Collection) or not all(_is_count(step, 0) for step in self.steps):
            problems.append(f"steps is {self.steps!r}: expected steps, such as (1000, 5000)")
        else:
            object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))
        if self.best is not None and (type(self.best) is not str or not self.best.strip()):
            problems.append(f"best is {self.best!r}: expected the name of a metric (a string) or None")
        if self.mode not in ("min", "max"):
            problems.append(f'mode is {self.mode!r}: expected "min" or "max"')
        if not _is_count(self.best_count, 1):
            problems.append(f"best_count is {self.best_count!r}: expected a number ≥ 1")
        if self.max_grace_bytes is not None and not _is_count(self.max_grace_bytes, 0):
            problems.append(f"max_grace_bytes is {self.max_grace_bytes!r}: expected a number of bytes ≥ 0 or None")
        if problems:
            raise ValueError("; ".join(problems))


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


@dataclass(frozen=True)
class Candidate:
    """A living checkpoint of the history, as input of `not_kept`."""

    checkpoint: CheckpointId
    metrics: Mapping[str, float]
    committed_s: float = 0.0
    """When its commit record was written, by the store's clock."""


def not_kept(history: Sequence[Candidate], keep: Keep, now_s: float) -> list[CheckpointId]:
    """The checkpoints that no rule keeps, never the newest one.

    history: newest first, in the order in which a restore tries them. now_s: by the store's clock.

    Empty while a rule asks for the best checkpoint and nothing tells which it is (see `nothing_measured`): any of them may be the best.
    """
    if nothing_measured(history, keep):
        return []
    wanted = {candidate.checkpoint for candidate in history[: keep.last]}
    wanted |= {c.checkpoint for c in history if c.checkpoint.step in keep.steps}
    if keep.every is not None:
        wanted |= {c.checkpoint for c in history if c.checkpoint.step % keep.every == 0}
    if keep.every_minutes is not None:
        wanted |= _nearest(history, 60.0 * keep.every_minutes)
    if keep.for_minutes is not None:
        wanted |= {c.checkpoint for c in history if now_s - c.committed_s < 60.0 * keep.for_minutes}
    if keep.best is not None:
        sign = 1.0 if keep.mode == "min" else -1.0
        measured = [
            (sign * c.metrics[keep.best], -i, c.checkpoint) for i, c in enumerate(history) if keep.best in c.metrics
        ]
        ranked = sorted(entry for entry in measured if not math.isnan(entry[0]))
        wanted |= {checkpoint for *_, checkpoint in ranked[: keep.best_count]}
    return [c.checkpoint for c in history if c.checkpoint not in wanted]


def _nearest(history: Sequence[Candidate], interval_s: float) -> set[CheckpointId]:
    """The checkpoints that are nearest to a multiple of an interval since the oldest one.

    Each checkpoint has a stretch of time to which it is the nearest: from the middle between it and the one before, to the middle between
    it and the one after. It stays if a multiple lies there. What is dropped would not be chosen later either. A clock that steps puts
    single checkpoints at another place, and does no more. The oldest stays, and with it the place of all multiples.
    """
    if not history:
        return set()
    first_s = history[-1].committed_s
    at = {c.committed_s: c for c in history}  # of equal times the older one
    ordered = [at[time_s] for time_s in sorted(at)]
    middles = [(before.committed_s + after.committed_s) / 2 - first_s for before, after in pairwise(ordered)]
    # A multiple in the middle belongs to the older one: the stretch is without its beginning, and with its end.
    passed = [-math.inf, *(math.floor(middle / interval_s) for middle in middles), math.inf]
    has = [after > before for before, after in pairwise(passed)]
    return {c.checkpoint for c, stays in zip(ordered, has, strict=True) if stays}


def nothing_measured(history: Sequence[Candidate], keep: Keep) -> bool:
    """Whether a rule keeps the best by a metric of which no checkpoint has a value."""
    return keep.best is not None and all(math.isnan(c.metrics.get(keep.best, math.nan)) for c in history)


def without_measure(history: Sequence[Candidate], keep: Keep, now_s: float) -> str | None:
    """The warning for the case that `nothing_measured` keeps checkpoints that the other rules would not keep; else None."""
    if not history or not nothing_measured(history, keep) or not not_kept(history, replace(keep, best=None), now_s):
        return None
    assert keep.best is not None
    known = sorted({name for candidate in history for name in candidate.metrics})
    if keep.best in known:
        return f"the metric {keep.best!r} is NaN in every checkpoint, so nothing is known of the best one: all stay"
    close = difflib.get_close_matches(keep.best, known, 1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"no checkpoint has the metric {keep.best!r} (there are: {', '.join(map(repr, known)) or 'none'}), so nothing is known of the "
        f"best one: all stay.{meant} Pass metrics={{{keep.best!r}: …}} to step or save_now, or give another name to Keep(best=…)"
    )


__all__ = ["Candidate", "Keep", "not_kept", "nothing_measured", "without_measure"]
