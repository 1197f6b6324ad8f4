"""Reads typed members of JSON objects. A wrong value is replaced by a harmless one, so that all errors can be listed at once."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage, UnsupportedFormatError
from fastckpt.format.keys import MAX_EPOCH, MAX_STEP, CheckpointId

MAX_INTEGER = (1 << 63) - 1
MAX_DIMS = 64

HEX32 = re.compile(r"[0-9a-f]{32}")
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Findings:
    """Collects the errors in one part of one file or object."""

    def __init__(self, part: str, source: str) -> None:
        self.part, self.source = part, source
        self.damage: list[Damage] = []
        self.unsupported: list[str] = []
        """Features that only another version can read, in words."""

    def add(self, place: str, expected: str, found: object) -> None:
        self.damage.append(Damage(self.part, place, expected, reprlib.repr(found)))

    def add_text(self, place: str, expected: str, found: str) -> None:
        """Like `add`; found: a text of our own, shown in full."""
        self.damage.append(Damage(self.part, place, expected, found))

    def raise_damage(self) -> None:
        """CorruptCheckpointError if anything is damaged."""
        if self.damage:
            raise CorruptCheckpointError(self.source, self.damage)

    def raise_unsupported(self) -> None:
        """UnsupportedFormatError if anything needs another version."""
        if self.unsupported:
            shown = "; ".join(self.unsupported[:5])
            raise UnsupportedFormatError(
                f"{self.source} needs another fastckpt: {shown}. Upgrade with `pip install -U fastckpt-engine`"
            )


class JsonFields:
    """The members of one JSON object. Each method returns a value of its type, even if the member is wrong or missing."""

    def __init__(self, value: Any, findings: Findings, place: str = "") -> None:
        """place: the object's place in its part; "" for the part's own object."""
        self.findings = findings
        self.place = place
        self._value: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            findings.add(place or "as a whole", "an object", value)

    def _add(self, member: str, expected: str, found: object) -> None:
        self.findings.add(f"{self.place}, {member}" if self.place else member, expected, found)

    def _get(self, member: str, right: Callable[[Any], bool], expected: str, stand_in: Any) -> Any:
        value = self._value.get(member)
        if right(value):
            return value
        self._add(member, expected, value)
        return stand_in

    def integer(self, member: str, least: int = 0, most: int = MAX_INTEGER) -> int:
        def right(value: Any) -> bool:
            return type(value) is int and least <= value <= most

        shown = "2^63 − 1" if most == MAX_INTEGER else most
        return int(self._get(member, right, f"an integer from {least} to {shown}", least))

    def dimensions(self, member: str) -> tuple[int, ...]:
        """A short array of integers ≥ 0: a shape, strides or an offset."""
        value = self._value.get(member)
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_INTEGER for item in value):
            self._add(member, "an array of integers ≥ 0", value)
        elif len(value) > MAX_DIMS:
            self._add(member, f"at most {MAX_DIMS} dimensions", len(value))
        else:
            return tuple(value)
        return ()

    def seconds(self, member: str) -> float:
        def right(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value) and value >= 0

        return float(self._get(member, right, "a number ≥ 0", 0.0))

    def text(self, member: str, expected: str = "a string") -> str:
        return str(self._get(member, lambda value: isinstance(value, str), expected, ""))

    def boolean(self, member: str) -> bool:
        return bool(self._get(member, lambda value: isinstance(value, bool), "true or false", False))

    def hex32(self, member: str) -> str:
        def right(value: Any) -> bool:
            return isinstance(value, str) and HEX32.fullmatch(value) is not None

        return str(self._get(member, right, "32 hex digits", "0" * 32))

    def mapping(self, member: str) -> dict[str, Any]:
        return dict(self._get(member, lambda value: isinstance(value, dict), "an object", {}))

    def array(self, member: str) -> list[Any]:
        return list(self._get(member, lambda value: isinstance(value, list), "an array", []))

    def strings(self, member: str) -> dict[str, str]:
        return {key: str(value) for key, value in self.mapping(member).items()}

    def metrics(self, member: str) -> dict[str, float]:
        found = {}
        for name, value in self.mapping(member).items():
            if isinstance(value, str) and value in _SPECIAL:
                found[name] = _SPECIAL[value]
            elif type(value) in (int, float):
                found[name] = float(value)
            else:
                self._add(f"{member}, {name!r:.60}", "a number", value)
        return found

    def checkpoint(self) -> CheckpointId:
        """The members `epoch` and `step`."""
        return CheckpointId(self.integer("epoch", 1, MAX_EPOCH), self.integer("step", 0, MAX_STEP))

    def nested(self, value: Any, place: str) -> JsonFields:
        """The members of an object inside this one."""
        return JsonFields(value, self.findings, f"{self.place}, {place}" if self.place else place)

    def optional(self, member: str) -> JsonFields | None:
        """The members of the object at `member`; None if it is null or missing."""
        value = self._value.get(member)
        return None if value is None else self.nested(value, member)

    def objects(self, member: str) -> list[JsonFields]:
        """The members of each object of an array."""
        return [self.nested(value, f"{member} {i}") for i, value in enumerate(self.array(member))]

    def raw(self, member: str) -> Any:
        """The value of a member, unchecked; None if it is missing."""
        return self._value.get(member)

    def demand(self, right: bool, member: str, expected: str, found: object) -> None:
        """Add a finding unless `right` is true."""
        if not right:
            self._add(member, expected, found)
