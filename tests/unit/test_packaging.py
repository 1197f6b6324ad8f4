"""What a user of the installed package relies on: its public names."""

from __future__ import annotations
import __future__

import importlib
import importlib.util
from types import ModuleType

import fastckpt

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
