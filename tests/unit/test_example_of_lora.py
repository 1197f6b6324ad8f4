"""examples/lora.py: what is frozen travels once, and a run that is started again goes on with small saves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore

PATH = Path(__file__).resolve().parents[2] / "examples" / "lora.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_of_lora", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_frozen_travels_once_also_over_a_restart(tmp_path: Path) -> None:
    module, url = example(), str(tmp_path / "run")
    first, *later = module.train(url, 15)
    again = module.train(url, 20)
    trained = 2 * module.LAYERS * module.WIDTH * module.RANK * 4 * 3  # adapters and their two moments
    assert first.stored_bytes > 5 * trained
    assert [one.step for one in (first, *later, *again)] == [5, 10, 15, 20]
    for one in (*later, *again):
        assert one.stored_bytes < 1.05 * trained
    assert next(Catalog(Repository(LocalStore(url))).history()).step == 20
