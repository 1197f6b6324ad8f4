"""Typed members out of JSON objects, with every finding listed at once."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.keys import MAX_EPOCH, MAX_STEP, CheckpointId

_HEX32 = re.compile(r"[0-9a-f]{32}")
_MAX_BYTES = (1 << 63) - 1
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Members:
    """Takes typed members out of a JSON object and collects what is wrong with it."""

    def __init__(self, value: Any, kind: str, source: str) -> None:
        self._value = value if isinstance(value, dict) else {}
        self._kind = kind
        self._source = source
        self._damage: list[Damage] = []
        if not isinstance(value, dict):
            self._add("as a whole", "an object", value)

    def _add(self, place: str, expected: str, found: object) -> None:
        self._damage.append(Damage(self._kind, place, expected, reprlib.repr(found)))

    def _get(self, member: str, right: Callable[[Any], bool], expected: str, stand_in: Any) -> Any:
        value = self._value.get(member)
        if right(value):
            return value
        self._add(member, expected, value)
        return stand_in

    def integer(self, member: str, least: int = 0, most: int = _MAX_BYTES) -> int:
        def right(value: Any) -> bool:
            return type(value) is int and least <= value <= most

        return int(self._get(member, right, f"an integer from {least} to {most}", least))

    def seconds(self, member: str) -> float:
        def right(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value) and value >= 0

        return float(self._get(member, right, "a number ≥ 0", 0.0))

    def text(self, member: str) -> str:
        return str(self._get(member, lambda value: isinstance(value, str), "a string", ""))

    def boolean(self, member: str) -> bool:
        return bool(self._get(member, lambda value: isinstance(value, bool), "true or false", False))

    def hex32(self, member: str) -> str:
        def right(value: Any) -> bool:
            return isinstance(value, str) and _HEX32.fullmatch(value) is not None

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

    def nested(self, member: str, of: Any, place: str) -> Members:
        """Members of an object inside this one; what is wrong with it is listed here."""
        inner = Members(of, self._kind, self._source)
        inner._damage = self._damage  # one list
        if not isinstance(of, dict):
            self._add(f"{member}, {place}", "an object", of)
        return inner

    def checkpoint(self) -> CheckpointId:
        return CheckpointId(self.integer("epoch", 1, MAX_EPOCH), self.integer("step", 0, MAX_STEP))

    def optional(self, member: str) -> Members | None:
        """Members of the object at `member`, or None where that is null."""
        value = self._value.get(member)
        return None if value is None else self.nested(member, value, "as a whole")

    def demand(self, right: bool, place: str, expected: str, found: object) -> None:
        """List a finding unless `right`."""
        if not right:
            self._add(place, expected, found)

    def done(self) -> None:
        """CorruptCheckpointError if anything was wrong."""
        if self._damage:
            raise CorruptCheckpointError(self._source, self._damage)
