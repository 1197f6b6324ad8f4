"""Names that torch does not promise stand in one module, where each says what is done without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
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


LACKS = """
import sys
import torch
{lacks}
import fastckpt
fastckpt.save({{"w": torch.ones(3)}}, sys.argv[1])
assert fastckpt.load(sys.argv[1])["w"].eq(1).all()
print("works")
"""


@pytest.mark.parametrize(
    "lacks",
    [
        "del torch.serialization._check_dill_version, torch.serialization._check_save_filelike",
        "del torch.serialization._check_seekable",
        "vars(torch.serialization).pop('_is_meta_location', None)",
    ],
)
def test_a_torch_without_names_that_can_be_done_without(lacks: str, tmp_path: Path) -> None:
    code = LACKS.format(lacks=lacks)
    # torch itself needs some of them, in calls that are not made here.
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f")], check=False, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout.strip()) == (0, "works"), done.stderr


def test_a_torch_without_a_name_that_is_needed_is_named() -> None:
    code = "import torch; del torch.serialization._get_restore_location; import fastckpt"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"ImportError: torch {torch.__version__} has no serialization._get_restore_location" in done.stderr
