"""Imports point down, and the rooms that know bytes only do not know torch. The layers stand in scripts/house.py."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fastckpt

PACKAGE = Path(fastckpt.__file__).parent
sys.path.insert(0, str(PACKAGE.parent / "scripts"))

import house  # type: ignore[import-not-found]  # noqa: E402  (a script, not a package)

KNOW_BYTES_ONLY = {"codec", "format", "store"}
# They take what others have captured and copied: whoever uploads, votes and commits asks torch for nothing.
KNOW_NO_TORCH = KNOW_BYTES_ONLY | {"writing", "repository"}


def broken(path: str, source: str) -> list[str]:
    """What the imports of a module break. `path` is relative to the package's folder."""
    return house.not_down(house.arrows({PACKAGE / path: ast.parse(source)}, house.rooms_of(PACKAGE)))


def test_imports_point_down() -> None:
    found = house.arrows(house.sources(PACKAGE), house.rooms_of(PACKAGE))
    assert found
    assert not house.not_down(found), "\n" + "\n".join(house.not_down(found))


def test_the_layers_list_what_exists_and_nothing_else() -> None:
    listed = [room for names in house.LAYERS for room in names]
    assert sorted(listed) == sorted(house.rooms_of(PACKAGE))


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("codec/base.py", "import numpy\nfrom ..errors import Damage\nfrom . import frames\n", None),
        ("cli/main.py", "import torch\nfrom fastckpt import errors\n", None),
        ("format/index.py", "from ..codec.base import x\n", "fastckpt/format/index.py:1: format → codec, but codec is not below format"),
        ("format/index.py", "from fastckpt import store\n", "fastckpt/format/index.py:1: format → store, but store is not below format"),
        ("errors.py", "from . import options\n", "fastckpt/errors.py:1: errors → options, but options is not below errors"),
        ("errors.py", "from . import __version__\n", "fastckpt/errors.py:1: errors → __init__, but __init__ is not below errors"),
        ("state/x.py", "def f():\n    import fastckpt.api\n", "fastckpt/state/x.py:2: state → api, but api is not below state"),
        ("novel/x.py", "from fastckpt import errors", "fastckpt/novel/x.py:1: novel is in no layer of scripts/house.py"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named_with_file_line_and_edge(path: str, source: str, problem: str | None) -> None:
    assert broken(path, source) == ([] if problem is None else [problem])


def test_whoever_uploads_takes_sealed_states_alone() -> None:
    """Of the rooms that know torch it imports nothing; torch's old format is written by torch itself."""
    trees = house.sources(PACKAGE / "writing")
    for path, tree in trees.items():
        imported = {
            alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in [node.module or ""]
        }
        wrong = {
            name for name in imported if name.startswith(("fastckpt.state", "fastckpt.snapshot", "fastckpt.host.torch"))
        }
        assert not wrong or path.name == "legacy.py", (path, wrong)


def test_rooms_behind_the_snapshot_do_not_know_torch() -> None:
    for room in KNOW_NO_TORCH:
        for path, tree in house.sources(PACKAGE / room).items():
            for node in ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not [name for name in names if name.split(".")[0] == "torch"], (
                    f"{path}:{getattr(node, 'lineno', 0)}"
                )
