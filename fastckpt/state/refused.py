"""Finds what a restricted load would refuse in a pickle stream, and where. Runs no code of the stream."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.host.torch_names import allowed_globals, read_global, restricted, user_allowed_globals
from fastckpt.state import harmless

# GLOBAL in a stream of protocol 2: c, module, line feed, name, line feed. Text may look the same.
_GLOBAL = re.compile(rb"c([A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n)")
# LONG4, which torch does not read, with a length under 64 KiB.
_LONG4 = re.compile(rb"\x8b[\x00-\xff][\x01-\xff]\x00\x00")
_NUMBERS_ONE = b"qhK"  # BINPUT, BINGET and BININT1 are followed by an arbitrary byte
_LONG4_LOOKS = 8  # bytes of floats may look the same
_LONG1_BITS = 255 * 8 - 1
HUGE_INTEGER = "an integer of more than 255 bytes"
ARRAYS = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
SCALARS = "a NumPy scalar that is no plain number or text"
# Not searched inside: a scalar's dtype is part of the scalar, and tensors are many.
_WHOLE = (*ARRAYS, *harmless.NUMPY_SCALARS, "torch._utils._rebuild_tensor_v2")
_PLACES = 3
_ADVICE = {
    **dict.fromkeys(ARRAYS, "a NumPy array: save torch.from_numpy(array)"),
    harmless.NUMPY_DTYPE: "a NumPy dtype: save its str",
    HUGE_INTEGER: "save its hex()",
    SCALARS: "save its tolist()",
    "collections.deque": "save list(…)",
}


def is_allowed(name: str) -> bool:
    """Whether `restore` accepts this global: it is in torch's list, in the program's additions to it, or in `harmless`."""
    listed = (allowed_globals(), user_allowed_globals(), harmless.NAMES)
    return any(name in names for names in listed)


class Watch:
    """Reports, once each, the types in a run's streams that a restore would refuse. Used by the thread that trains.

    A stream without new types costs only a text search.
    """

    def __init__(self) -> None:
        self._met: set[bytes] = set()
        self._told: set[str] = set()
        self._long4_looks = 0

    def new_in(self, parts: Iterable[tuple[Name, bytes]], arrays: Iterable[Name]) -> dict[str, list[Name]]:
        """Types that have not been reported yet → their places.

        parts: names and streams (protocol 2) of the changed parts. arrays: names of arrays that are not in streams.
        """
        found: dict[str, list[Name]] = {}
        for prefix, stream in parts:
            if self._may_hold_new(stream):
                for name, places in find(stream, trusted=True).items():
                    found.setdefault(name, []).extend((*prefix, *place) for place in places)
        if not is_allowed(ARRAYS[0]):
            found.setdefault(ARRAYS[0], []).extend(arrays)
        new = {name: places[:_PLACES] for name, places in found.items() if name not in self._told}
        if not new.get(ARRAYS[0], True):
            del new[ARRAYS[0]]
        self._told |= new.keys()
        return new

    def _may_hold_new(self, stream: bytes) -> bool:
        new = {match[1] for match in _GLOBAL.finditer(stream)} - self._met
        self._met |= new
        if self._long4_looks < _LONG4_LOOKS and any(
            stream[match.start() - 1] not in _NUMBERS_ONE for match in _LONG4.finditer(stream)
        ):
            self._long4_looks += 1
            return True
        return any(not is_allowed(_full_name(raw)) for raw in new)


def _full_name(raw: bytes) -> str:
    """Module and name, joined as torch does it."""
    module, name = read_global(io.BytesIO(raw).readline)
    return f"{module}.{name}"


class _Inert:
    """Replaces every object that a stream names: stores its arguments, runs nothing."""

    name = ""
    parts: list[Any]

    def __new__(cls, *arguments: Any, **named: Any) -> _Inert:
        made = object.__new__(cls)
        made.parts = [*arguments, named] if named else list(arguments)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> _Inert:
        return type(self)(*arguments)

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    append = add = __setstate__

    def extend(self, items: Any) -> None:
        self.parts.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self.parts or not isinstance(self.parts[-1], dict):
            self.parts.append({})
        self.parts[-1][key] = value


def find(stream: bytes, *, trusted: bool) -> dict[str, list[Name]]:
    """Names of refused types → their places; [] if the places are unknown.

    trusted: the stream is our own, so pickle's C implementation may read it. Otherwise the one in Python is used, which allocates nothing
    in advance.
    """
    machine: Any = pickle.Unpickler if trusted else pickle._Unpickler
    names: set[str] = set()

    class Finder(machine):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            full = _full_name(f"{module}\n{name}\n".encode())
            names.add(full)
            return type("inert", (_Inert,), {"name": full})

        def persistent_load(self, _: Any) -> None:
            return None

    found: dict[str, list[Name]] = {}
    try:
        if not trusted:
            restricted.get_globals_in_pkl(io.BytesIO(stream))  # raises for operations that torch does not know
        for name, place in _places(Finder(io.BytesIO(stream)).load()):
            places = found.setdefault(name, [])
            if len(places) < _PLACES:
                places.append(place)
    except Exception:  # only places are lost: types that cannot be located are named without them
        pass
    for name in names:
        if not is_allowed(name) and not _goes_with_another(name):
            found.setdefault(name, [])
    return found


def _goes_with_another(name: str) -> bool:
    """Whether it is part of an array or scalar, which is named itself."""
    return name in ("numpy.ndarray", harmless.NUMPY_DTYPE)


def _places(root: Any) -> Iterator[tuple[str, Name]]:
    seen: set[int] = set()
    stack: list[tuple[Name, Any]] = [((), root)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, int):
            if abs(value).bit_length() > _LONG1_BITS:
                yield HUGE_INTEGER, place
            continue
        if value is None or isinstance(value, (str, float, bytes)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _Inert):
            if not is_allowed(value.name):
                yield value.name, place
            elif value.name in harmless.NUMPY_SCALARS and not _is_plain_scalar(value):
                yield SCALARS, place
            if value.name in _WHOLE:
                continue
            for part in value.parts:
                stack.append((place, part))
        elif isinstance(value, type) and issubclass(value, _Inert):
            if not is_allowed(value.name):
                yield value.name, place
        elif isinstance(value, Mapping):
            stack.extend(((*place, key_of(key)), child) for key, child in value.items())
            stack.extend((place, key) for key in value if not isinstance(key, (str, int)))
        elif isinstance(value, (list, tuple)):
            stack.extend(((*place, number), child) for number, child in enumerate(value))
        elif isinstance(value, (set, frozenset)):
            stack.extend((place, child) for child in value)


def _is_plain_scalar(value: _Inert) -> bool:
    dtype = value.parts[0] if value.parts else None
    return isinstance(dtype, _Inert) and bool(dtype.parts) and harmless.is_plain(dtype.parts[0])


def described(found: Mapping[str, list[Name]]) -> str:
    """One line for each type, for people."""
    lines = []
    for name in sorted(found):
        where = ", ".join(dotted(place) for place in found[name])
        advice = f" ({_ADVICE[name]})" if name in _ADVICE else ""
        lines.append(f"  {name}{f' at {where}' if where else ''}{advice}")
    return "\n".join(lines)
