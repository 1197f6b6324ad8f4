"""What a training loop gives to a `Checkpointer`, checked: refused at the call that brings it, not in the background."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastckpt.errors import SaveError
from fastckpt.format.keys import MAX_STEP
from fastckpt.format.repository_records import metrics_to_json
from fastckpt.repository.retention import Keep
from fastckpt.state.rebuild import resolve_weights_only
from fastckpt.training.restore_asked import RestoreAsked
from fastckpt.training.schedule import Every
from fastckpt.writing.rank import SaveAsked


def checked(
    metrics: Mapping[str, float] | None, meta: Mapping[str, Any] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Copies that can be written. TypeError at the call that brings them, not in the background."""
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
        json.dumps(metrics_to_json(numbers), ensure_ascii=False).encode()
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"metrics must be names and numbers: {error}") from error
    try:
        copy = json.loads(json.dumps(dict(meta or {}), allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"meta must be what JSON can hold: {error}") from error
    return numbers, copy


def check_settings(
    every: object,
    keep: object,
    on_exception: object,
    switches: Mapping[str, object],
    seconds: Mapping[str, object],
    *,
    alone: bool,
) -> None:
    """Refuse what a `Checkpointer` cannot be made with. alone: whether there is no other rank. TypeError, ValueError."""
    check_rules(every, keep, on_exception)
    check_kinds(switches, seconds)
    if switches.get("read_only") and switches.get("fresh"):
        raise ValueError("read_only=True and fresh=True exclude each other: beginning a new history writes")
    if on_exception is not None and not alone:
        raise ValueError(
            'on_exception="save" is for one process: after an exception of one rank the others are at another step'
        )


def check_rules(every: object, keep: object, on_exception: object) -> None:
    """Refuse what would fail in the training loop, or in the background at every save."""
    problems = []
    if not isinstance(every, (Every, type(None))):
        problems.append(f"every is {every!r}: expected fastckpt.Every(steps=…), Every(minutes=…), or None")
    if not isinstance(keep, (Keep, type(None))):
        problems.append(f"keep is {keep!r}: expected fastckpt.Keep(last=…), or None for all")
    if problems:
        raise TypeError("; ".join(problems))
    if on_exception not in (None, "save"):
        raise ValueError(f'on_exception is {on_exception!r}: expected "save" or None')


def check_kinds(switches: Mapping[str, object], seconds: Mapping[str, object]) -> None:
    """TypeError, ValueError. Types matter: a configuration's text "no" would count as true, and a negative grace would take packs from
    readers.
    """
    problems = [
        f"{name} is {value!r}: expected True or False"
        for name, value in switches.items()
        if not isinstance(value, bool)
    ]
    numbers = {name: value for name, value in seconds.items() if isinstance(value, (int, float))}
    problems += [
        f"{name} is {value!r}: expected a number of seconds" for name, value in seconds.items() if name not in numbers
    ]
    if problems:
        raise TypeError("; ".join(problems))
    negative = [
        f"{name} is {value!r}: expected a number of seconds ≥ 0" for name, value in numbers.items() if not value >= 0
    ]
    if negative:
        raise ValueError("; ".join(negative))


def asked_for(
    step: int,
    trigger: str,
    metrics: Mapping[str, float] | None,
    meta: Mapping[str, Any] | None,
    last: SaveAsked | None,
    *,
    full: bool = False,
) -> SaveAsked:
    """Describe the save that a call asks for. TypeError: metrics or meta cannot be written; `full` is no bool. SaveError: the step is
    no number, or lies before the last one.
    """
    numbers, copy = checked(metrics, meta)
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise SaveError(f"step is {step!r}: expected an integer from 0 to {MAX_STEP}")
    if last is not None and step < last.step:
        raise SaveError(f"step {step} comes after step {last.step}: to go back, call restore(step=…)")
    if not isinstance(full, bool):
        raise TypeError(f"full is {full!r}: expected True or False")
    return SaveAsked(step, trigger=trigger, metrics=numbers, meta=copy, full=full)


def asked_of(step: object, weights_only: bool | None, *, strict: bool, atomic: bool, overlap: bool) -> RestoreAsked:
    """Describe the restore that a call asks for. weights_only: None leaves it to torch's environment variables. ValueError."""
    if overlap and (atomic or step == "latest-valid"):
        other = "atomic=True" if atomic else 'step="latest-valid"'
        raise ValueError(
            f"restore(overlap=True) returns before all bytes are verified, and {other} has them verified first: choose one"
        )
    if weights_only is None:
        weights_only = resolve_weights_only(None, None)
    return RestoreAsked(weights_only, strict, atomic, overlap)
