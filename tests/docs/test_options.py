"""docs/options.md has every option, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import fastckpt

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_every_option_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", PAGE.read_text(), re.M)
    assert {name for name, _ in rows} == {field.name for field in fields(fastckpt.Options)}
    for field in fields(fastckpt.Options):
        default = dict(rows)[field.name].strip()
        expected = {"": "none", True: "true"}.get(
            field.default, f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        )
        assert default.partition(":")[0].strip("`") == expected, field.name
