"""The suite makes the test device the accelerator of its process, so it is only collected where it was asked for by name."""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "suite"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path != SUITE and SUITE not in collection_path.parents:
        return None
    asked = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path == SUITE or SUITE in path.parents for path in asked) else True
