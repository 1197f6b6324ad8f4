"""How the reports' tables look."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any


def cell(values: Iterable[float | None], decimals: int) -> str:
    """Median, and below it the range if it shows at this precision."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    middle, low, high = (f"{v:.{decimals}f}" for v in (statistics.median(known), min(known), max(known)))
    return middle if low == high else f"{middle} ({low}–{high})"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(names: list[str]) -> list[str]:
    return [row(names), "|" + "---|" * len(names)]


def settings_lines(contenders: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"* {name}, {key}: `{value}`"
        for name, entry in contenders.items()
        for key, value in entry.get("settings", {}).items()
    ]
