"""Imports point down, and the modules that know bytes only do not know torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fastckpt

PACKAGE = Path(fastckpt.__file__).parent

# From the bottom up. A module or folder may import those of the layers below its own, and no other of its own layer.
# A new one is entered here, as low as it can be.
LAYERS = (
    ("_native", "_version", "errors", "workers"),
    ("torch_names",),
    ("attributes", "collector", "held", "recording", "interrupts", "location", "pages", "turns"),
    ("transform", "events", "files", "ranks", "trace"),
    ("kernels",),
    ("options", "sources", "sinks"),
    ("codec", "format", "store", "plan"),
    ("chunking", "delta_policy", "object_sink", "object_source"),
    ("state", "agreement", "ordered_sink"),
    ("reader",),
    ("snapshot", "chunk_source", "commit", "packs", "rng", "schedule"),
    ("repository", "settled"),
    ("catalog", "known_records", "restore_plan"),
    ("save", "restore", "newest"),
    ("upload", "retention", "check", "foreign", "tensors", "loading", "held_pack", "placement", "changes"),
    ("exact", "filling"),
    ("incarnation", "analyze", "export", "salvage", "check_repository", "targets"),
    ("repair",),
    ("spot", "retaining"),
    ("background",),
    ("final_save",),
    ("checkpointer",),
    ("api",),
    ("dcp", "integrations"),
    ("__init__",),
    ("testing", "cli"),
    ("__main__",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
ALLOWED = {name: {low for names in LAYERS[:number] for low in names} for name, number in LAYER_OF.items()}
KNOW_BYTES_ONLY = {"codec", "format", "store"}


def imported_modules(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, those inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{path}.{alias.name}") for alias in node.names)


def broken_rules(path: Path, source: str) -> list[str]:
    """What the imports of a module break. `path` is relative to the folder `fastckpt`."""
    unit = path.parts[0].removesuffix(".py")
    if unit not in LAYER_OF:
        return [f"fastckpt/{path}: fastckpt.{unit} is not in LAYERS of {Path(__file__).name}"]
    broken = []
    for line, name in imported_modules(ast.parse(source), ["fastckpt", *path.parent.parts]):
        root, *rest = name.split(".")
        where = f"fastckpt/{path}:{line}: "
        if root == "torch" and unit in KNOW_BYTES_ONLY:
            broken.append(f"{where}{unit} → torch, but {unit} knows bytes only")
        elif root == "fastckpt":
            target = rest[0] if rest and rest[0] in LAYER_OF else "__init__"
            if target != unit and target not in ALLOWED[unit]:
                broken.append(f"{where}{unit} → {target}, but {target} is not below {unit}")
    return broken


def test_imports_point_down() -> None:
    broken = [
        problem
        for path in sorted(PACKAGE.rglob("*.py"))
        for problem in broken_rules(path.relative_to(PACKAGE), path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_a_broken_rule_is_named_with_file_line_and_edge() -> None:
    assert (
        broken_rules(Path("codec/base.py"), "import numpy\nfrom ..errors import Damage\nfrom . import frames\n") == []
    )
    assert broken_rules(Path("cli.py"), "import torch\nimport fastckpt\nfrom fastckpt import errors\n") == []
    assert broken_rules(Path("codec/base.py"), "import zlib\n\ndef f():\n    import torch.nn\n") == [
        "fastckpt/codec/base.py:4: codec → torch, but codec knows bytes only"
    ]
    assert broken_rules(Path("format/index.py"), "from ..codec.base import x\nfrom fastckpt import store\n") == [
        "fastckpt/format/index.py:1: format → codec, but codec is not below format",
        "fastckpt/format/index.py:2: format → store, but store is not below format",
    ]
    assert broken_rules(Path("errors.py"), "from . import options\nfrom . import __version__\n") == [
        "fastckpt/errors.py:1: errors → options, but options is not below errors",
        "fastckpt/errors.py:2: errors → __init__, but __init__ is not below errors",
    ]
    assert broken_rules(Path("novel.py"), "") == [
        "fastckpt/novel.py: fastckpt.novel is not in LAYERS of test_imports.py"
    ]
