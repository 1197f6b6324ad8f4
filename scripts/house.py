"""Measures the plan of the source: rooms, arrows between them, the largest class, the longest module and function.

    python scripts/house.py              # a table; exit status 1 if a figure is over its limit
    python scripts/house.py --json

A room is what lies at the root of the package: a folder, or a module. An arrow is a pair of rooms of which one imports the other,
however often. Only the text of the source is read; nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastckpt"
TESTS = ROOT / "tests"

# From the bottom up. A room imports from the layers below its own and from itself, never from another room of its own layer.
# A new room is entered here, as low as it can be; tests/unit/test_imports.py reads this table.
LAYERS = (
    ("_native", "_types", "_version", "errors"),
    ("host",),
    ("kernels", "trace"),
    ("events", "options"),
    ("codec", "format", "store"),
    ("state", "spot", "ranks"),
    ("snapshot", "reading", "writing"),
    ("repository",),
    ("upkeep", "training", "api", "integrations"),
    ("cli", "testing", "dcp", "__init__"),
)
# `python -m fastckpt` is the command line's door, not a room of its own.
ROOM_OF = {"__main__": "cli"}
# Plug-ins, and their short names: seats at the edge that may know all rooms below and that no room knows. Their arrows are not counted.
SEATS = {"integrations", "dcp"}

LIMITS = {
    "modules at the root": 9,
    "layers": 10,
    "arrows between rooms": 130,
    "arrows that do not point down": 0,
    "attributes of a class": 14,
    "methods of a class": 20,
    "lines of a module": 400,
    "lines of a module of tests": 500,
    "lines of a function": 60,
}
# A table of settings for people: each is one line that depends on no other, and a second table would only be one more thing to know.
TABLES = {"Options", "Kernels"}
# What writes golden files is a list of cases, not a module to be read.
GENERATORS = {"make_goldens.py", "make_codec_data.py", "make_repository.py"}


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(folder: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}


def room_of(name: str) -> str:
    """The room of a module, given with dots and without the package's name."""
    first = name.split(".", maxsplit=1)[0] or "__init__"
    return ROOM_OF.get(first, first)


def imports_of(path: Path, tree: ast.Module, rooms: set[str]) -> Iterator[tuple[int, str, str]]:
    """Line, importing room and imported room of every import of the package's own, those inside functions too."""
    inside = path.relative_to(PACKAGE)
    here = room_of(inside.parts[0].removesuffix(".py"))
    package = ["fastckpt", *inside.parent.parts]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            where = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{where}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "fastckpt":
                there = room_of(rest)
                yield node.lineno, here, there if there in rooms else "__init__"


def rooms_of(package: Path) -> set[str]:
    return {
        room_of(path.name.removesuffix(".py"))
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } | {"_native"}


def arrows(trees: dict[Path, ast.Module], rooms: set[str]) -> dict[tuple[str, str], list[str]]:
    """Pairs of rooms, with the places of the imports."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for line, here, there in imports_of(path, tree, rooms):
            if here != there:
                found[here, there].append(f"{path.relative_to(ROOT)}:{line}")
    return found


def not_down(found: dict[tuple[str, str], list[str]]) -> list[str]:
    layer = {room: number for number, names in enumerate(LAYERS) for room in names}
    problems = []
    for (here, there), places in sorted(found.items()):
        if here not in layer or there not in layer:
            problems.append(f"{places[0]}: {here if here not in layer else there} is in no layer of scripts/house.py")
        elif layer[there] >= layer[here]:
            problems.append(f"{places[0]}: {here} → {there}, but {there} is not below {here}")
    return problems


def _fields(node: ast.ClassDef) -> set[str]:
    """Fields of a dataclass or a protocol."""
    annotated = (
        item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)
    )
    return {item.target.id for item in annotated if isinstance(item.target, ast.Name)}


def _assigned(node: ast.ClassDef) -> set[str]:
    """Names that are assigned to `self`, alone or in a tuple."""
    stored = (item for item in ast.walk(node) if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store))
    return {item.attr for item in stored if isinstance(item.value, ast.Name) and item.value.id == "self"}


def classes(trees: dict[Path, ast.Module]) -> list[tuple[str, int, int]]:
    """Place, attributes and methods of every class; what its bases of this package have counts as its own."""
    nodes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def family(node: ast.ClassDef, seen: set[str]) -> Iterator[ast.ClassDef]:
        if node.name in seen:
            return
        seen.add(node.name)
        yield node
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in nodes:
                yield from family(nodes[base.id], seen)

    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name not in TABLES:
                members = list(family(node, set()))
                attributes = {name for member in members for name in _fields(member) | _assigned(member)}
                methods = {item.name for member in members for item in member.body if isinstance(item, FUNCTIONS)}
                found.append((f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", len(attributes), len(methods)))
    return found


def functions(trees: dict[Path, ast.Module]) -> list[tuple[str, int]]:
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]


def by_lines(paths: Iterable[Path]) -> list[tuple[int, str]]:
    """Lines and name of each module, the longest first."""
    return sorted(
        ((len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(ROOT))) for path in paths),
        reverse=True,
    )


def measure() -> tuple[dict[str, int], dict[str, list[str]]]:
    """The figures, and for each the places that show it, largest first."""
    trees, rooms = sources(PACKAGE), rooms_of(PACKAGE)
    found = arrows(trees, rooms)
    up = not_down(found)
    held, lengths = classes(trees), functions(trees)
    modules = by_lines(trees)
    tests = by_lines(path for path in TESTS.rglob("*.py") if path.name not in GENERATORS)
    root = sorted(path.name for path in PACKAGE.glob("*.py"))
    by_attributes = sorted(held, key=lambda item: -item[1])
    by_methods = sorted(held, key=lambda item: -item[2])
    by_length = sorted(lengths, key=lambda item: -item[1])
    figures = {
        "modules at the root": len(root),
        "layers": len(LAYERS),
        "arrows between rooms": sum(here not in SEATS for here, _ in found),
        "arrows that do not point down": len(up),
        "attributes of a class": by_attributes[0][1],
        "methods of a class": by_methods[0][2],
        "lines of a module": modules[0][0],
        "lines of a module of tests": tests[0][0],
        "lines of a function": by_length[0][1],
    }
    shown = {
        "modules at the root": root,
        "arrows that do not point down": up,
        "attributes of a class": [
            f"{place}: {n}" for place, n, _ in by_attributes if n > LIMITS["attributes of a class"]
        ],
        "methods of a class": [f"{place}: {n}" for place, _, n in by_methods if n > LIMITS["methods of a class"]],
        "lines of a module": [f"{name}: {n}" for n, name in modules if n > LIMITS["lines of a module"]],
        "lines of a module of tests": [f"{name}: {n}" for n, name in tests if n > LIMITS["lines of a module of tests"]],
        "lines of a function": [f"{place}: {n}" for place, n in by_length if n > LIMITS["lines of a function"]],
    }
    return figures, shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    arguments = parser.parse_args()
    figures, shown = measure()
    over = [name for name, value in figures.items() if value > LIMITS[name]]
    if arguments.json:
        print(json.dumps({"figures": figures, "limits": LIMITS, "over": over}, indent=1))
        return bool(over)
    for name, value in figures.items():
        print(f"{name:32}{value:>6}  limit {LIMITS[name]}{'   OVER' if name in over else ''}")
        for place in shown.get(name, []) if name in over else []:
            print(f"    {place}")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
