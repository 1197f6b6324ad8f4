"""Names of what is inside wrappers: a state dict of torch.compile's, DistributedDataParallel's or DataParallel's module under the names
that it has without the wrapper. So a run may put a wrapper on, or take it off, between a save and a restore.

Which part of a name is the wrapper's is seen in the modules, never in the text: a model may well have a layer that it calls `module`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastckpt.errors import SaveError
from fastckpt.host.torch_names import METADATA, compiled_module_attribute

_SHOWN = 3


def inside_attribute(kind: type) -> str | None:
    """Under which name modules of this class have the one that they wrap; None for a class that is no wrapper."""
    if issubclass(kind, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        return "module"
    return compiled_module_attribute(kind)


def names_inside(module: torch.nn.Module) -> InsideNames | None:
    """None where the module and those in it are no wrappers: all names stay as they are."""
    kinds = set(map(type, module.modules()))  # few
    if all(inside_attribute(kind) is None for kind in kinds):
        return None
    return InsideNames(module)


class InsideNames:
    """Own names of a module's tensors, as its state dict has them, and names without wrappers."""

    def __init__(self, module: torch.nn.Module) -> None:
        """The module has wrappers in it, or is one."""
        self._paths = [path for path, _ in module.named_modules(remove_duplicate=False)]
        self._wrapped: set[str] = set()
        """Paths of modules in wrappers: the last part of each is the wrapper's name for it."""
        for path, one in module.named_modules(remove_duplicate=False):
            attribute = inside_attribute(type(one))
            if attribute is not None:
                self._wrapped.add(f"{path}.{attribute}" if path else attribute)
        self._inside: dict[str, str] = {"": ""}

    def path(self, own: str) -> str:
        """The path of a module, without wrappers."""
        known = self._inside.get(own)
        if known is None:
            before, _, last = own.rpartition(".")
            outer = self.path(before)
            known = outer if own in self._wrapped else f"{outer}.{last}" if outer else last
            self._inside[own] = known
        return known

    def name(self, own: str) -> str:
        """The name of a tensor, without wrappers."""
        before, _, last = own.rpartition(".")
        outer = self.path(before)
        return f"{outer}.{last}" if outer else last

    def to_inside(self, state: Any, what: str) -> Any:
        """A state dict that the module has given, renamed. SaveError where two tensors get one name. what: the module, for the error."""
        if type(state) not in (dict, OrderedDict) or not all(type(key) is str for key in state):
            return state  # a state_dict() of the user's own
        renamed = type(state)((self.name(key), value) for key, value in state.items())
        if len(renamed) != len(state):
            counted = Counter(map(self.name, state))
            twice = [name for name, n in counted.items() if n > 1]
            more = f" and {len(twice) - _SHOWN} more" if len(twice) > _SHOWN else ""
            raise SaveError(
                f"{what} has two tensors of each of these names, one in a wrapper and one beside it: {', '.join(twice[:_SHOWN])}{more}. "
                "Nothing was committed. Rename one of them, or give the Checkpointer the module inside of the wrapper"
            )
        # A wrapper comes before its module, whose word counts.
        return _with_metadata(renamed, state, ((self.path(own), own) for own in _metadata(state)))

    def to_own(self, state: Any, live: Mapping[str, Any]) -> Any:
        """A saved state dict, of either names, under the module's own. live: the state dict that it has now."""
        if type(state) not in (dict, OrderedDict) or all(key in state for key in live):
            return state
        own = {self.name(key): key for key in live}
        renamed = type(state)((own.get(key, key), value) for key, value in state.items())
        return _with_metadata(renamed, state, ((path, self.path(path)) for path in self._paths))


def _metadata(state: Any) -> dict[str, Any]:
    """Path of a module → what its class says of the state dict, its version say."""
    found = getattr(state, "__dict__", {}).get(METADATA)
    return found if isinstance(found, dict) else {}


def _with_metadata(renamed: Any, state: Any, paths: Iterable[tuple[str, str]]) -> Any:
    """paths: new ones and those of `state`."""
    known = _metadata(state)
    if type(renamed) is OrderedDict:
        renamed.__dict__.update(state.__dict__)
        if known:
            renamed.__dict__[METADATA] = OrderedDict((new, known[old]) for new, old in paths if old in known)
    return renamed
