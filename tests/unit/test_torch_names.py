"""Names that torch does not promise stand in one module, where each says what is done without it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

import fastckpt
from fastckpt.host import torch_names

PACKAGE = Path(fastckpt.__file__).parent
OWN = PACKAGE / "host" / "torch_names.py"
# Of tensors and storages: such an attribute can only be torch's.
OF_TENSORS = {
    "_cdata", "_version", "_untyped_storage", "_size", "_pickle_storage_type", "_fake_device", "_local_tensor", "_element_size",
}  # fmt: skip


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.startswith("torch.") and private(a.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                if private(f"{node.module}.{alias.name}"):
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and private(node.attr):
            path = ast.unparse(node)
            if path.startswith(("torch.", "restricted.")) or node.attr in OF_TENSORS:
                yield node.lineno, path


def test_private_names_of_torch_stand_in_one_module() -> None:
    found = [
        f"fastckpt/{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != OWN
        for line, name in private_names(ast.parse(path.read_text(encoding="utf-8")))
        if not name.startswith("self.")
    ]
    assert not found, "put them into torch_names.py:\n" + "\n".join(found)


def test_the_search_finds_each_kind() -> None:
    code = "import torch._utils\nfrom torch import _guards\nfrom torch.serialization import _x\ntorch._C.f()\nstorage._cdata\n"
    assert {line for line, _ in private_names(ast.parse(code))} == {1, 2, 3, 4, 5}


def test_is_meta_location_is_torchs() -> None:
    theirs = getattr(torch.serialization, "_is_meta_location", None)
    for location in (None, "cpu", "meta", torch.device("meta"), torch.device("cpu"), {"cpu": "meta"}, lambda s, tag: s):
        assert torch_names.is_meta_location(location) == (location in ("meta", torch.device("meta")))
        if theirs is not None:
            assert torch_names.is_meta_location(location) == theirs(location)
