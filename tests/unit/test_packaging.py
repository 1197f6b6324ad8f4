"""What a user of the installed package relies on: its public names, its types, and a cheap import."""

from __future__ import annotations
import __future__

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import fastckpt

PACKAGE = Path(fastckpt.__file__).parent
PUBLIC_MODULES = {"errors", "events"}


def test_all_lists_exactly_the_public_names() -> None:
    public = {
        name
        for name, value in vars(fastckpt).items()
        if not name.startswith("_") and not isinstance(value, (ModuleType, __future__._Feature))
    }
    assert len(fastckpt.__all__) == len(set(fastckpt.__all__))
    assert {name for name in fastckpt.__all__ if not name.startswith("_")} == public | PUBLIC_MODULES
    assert all(hasattr(fastckpt, name) for name in fastckpt.__all__)


def test_no_module_has_a_public_name() -> None:
    # `import fastckpt.save` would hide the function fastckpt.save.
    assert not [name for name in set(fastckpt.__all__) - PUBLIC_MODULES if importlib.util.find_spec(f"fastckpt.{name}")]


HEAVY = {"boto3", "botocore", "matplotlib", "numba", "obstore", "sympy", "torch.distributed.tensor"}


def test_heavy_dependencies_are_imported_only_when_used() -> None:
    program = "import sys, torch; before = {*sys.modules}; import fastckpt; print(*sorted({*sys.modules} - before))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, check=True, text=True
    )
    assert not HEAVY & {*done.stdout.split()}


def test_a_big_endian_machine_is_refused_before_anything_heavy_is_imported() -> None:
    program = "import sys; sys.byteorder = 'big'\ntry: import fastckpt\nexcept ImportError as e: print('torch' in sys.modules, e)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, check=True, text=True
    )
    assert done.stdout == "False fastckpt runs on little-endian machines only, and this one is big-endian\n"


def test_nothing_is_built_on_a_big_endian_machine(tmp_path: Path) -> None:
    setup = PACKAGE.parent / "setup.py"
    if not setup.exists():
        pytest.skip("an installed package has no setup.py")
    program = f"import runpy, sys; sys.byteorder = 'big'; sys.argv = ['setup.py', '--version']; runpy.run_path({str(setup)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert "little-endian machines only" in done.stderr


CONSUMER = """
    import fastckpt
    import torch

    model = torch.nn.Linear(2, 2)
    fastckpt.save(model.state_dict(), "x.fckpt")
    state: dict[str, torch.Tensor] = fastckpt.load("x.fckpt", map_location="cpu")
    with fastckpt.open("x.fckpt") as reader:
        weight: torch.Tensor = reader["weight"]
    fastckpt.save(state)  # type: ignore[call-arg]  # strict refuses an ignore that nothing needs
"""


def test_a_users_program_type_checks(tmp_path: Path) -> None:
    """Takes up to a minute at first: mypy reads all of torch. Later runs find it in the cache."""
    assert (PACKAGE / "py.typed").is_file()
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "consumer.py").write_text(textwrap.dedent(CONSUMER), encoding="utf-8")
    cache = PACKAGE.parent / ".mypy_cache" / "consumer"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        f"--cache-dir={cache}",
        "consumer.py",
    ]
    env = os.environ | {"MYPYPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
