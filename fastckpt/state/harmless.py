"""Types that `restore` accepts in addition to torch's list, because none of their values can run code, whatever the file contains
(docs/security.md, 2).

torch's own list, with its `add_safe_globals`, holds for the whole process; this list holds for one unpickling. If a type's own constructor
trusts its arguments, a checking function of ours replaces it.
"""

from __future__ import annotations

import argparse
import datetime
import io
import pathlib
import pickle
import re
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastckpt.host.torch_names import allowed_globals, load_allowing, restricted, user_allowed_globals

NUMPY_DTYPE = "numpy.dtype"
"""Accepted only as part of a NumPy scalar; by itself, or in an array, it is refused."""
NUMPY_SCALARS = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
# Booleans, numbers and text only; no fields, no objects, no unit.
_PLAIN_DTYPE = re.compile(r"[biufcSU][0-9]{1,6}")
_ORDERS = ("<", ">", "|", "=")


def is_plain(dtype: Any) -> bool:
    """Whether a scalar may have a dtype of this text."""
    return isinstance(dtype, str) and _PLAIN_DTYPE.fullmatch(dtype) is not None


class _Dtype:
    """Replaces `numpy.dtype`, whose `__setstate__` accepts a file's claim that bytes are pointers to objects."""

    def __init__(self, text: Any, *_: Any) -> None:
        if not is_plain(text):
            raise pickle.UnpicklingError(f"a NumPy scalar of type {text!r:.80} is refused: expected a plain one")
        self._text, self._order = text, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in _ORDERS or any(state[2:5]):
            raise pickle.UnpicklingError("a NumPy scalar with fields is refused")
        self._order = state[1]

    def real(self) -> np.dtype[Any]:
        return np.dtype(self._text).newbyteorder(self._order)  # type: ignore[no-any-return]


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    real = dtype.real() if isinstance(dtype, _Dtype) else None
    if real is None or not isinstance(data, bytes) or len(data) != real.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar whose bytes are not those of its type is refused")
    if real.kind == "U":  # NumPy itself makes strings of invalid Unicode
        try:
            data.decode("utf-32-be" if real.byteorder == ">" else "utf-32-le", "surrogatepass")
        except UnicodeDecodeError as error:
            raise pickle.UnpicklingError(f"a NumPy scalar is refused: {error}") from None
    return np.frombuffer(data, real)[0] if data else real.type()


def _empty_bytes(*arguments: Any) -> bytes:
    """pickle's way to write b"". With a number as argument, bytes() would allocate that much memory."""
    if arguments:
        raise pickle.UnpicklingError("bytes that are made of something are refused")
    return b""


def _paths() -> dict[str, Any]:
    kinds = (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))
    # Python 3.13 calls the module pathlib._local, other versions call it pathlib.
    return {
        f"{module}.{kind.__name__}": _made_of_text(kind) for kind in kinds for module in ("pathlib", "pathlib._local")
    }


def _made_of_text(kind: Any) -> Callable[..., Any]:
    def make(*parts: Any) -> Any:
        if not all(isinstance(part, str) for part in parts):
            raise pickle.UnpicklingError(f"a {kind.__name__} that is not made of text is refused")
        return kind(*parts)

    return make


_TABLE: dict[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, list, tuple, dict, frozenset)},
    "builtins.bytes": _empty_bytes,
    "_io.BytesIO": io.BytesIO,
    "argparse.Namespace": argparse.Namespace,
    **{
        f"datetime.{kind.__name__}": kind
        for kind in (datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone)
    },
    "torch.nn.parameter.UninitializedParameter": torch.nn.parameter.UninitializedParameter,
    "torch.nn.parameter.UninitializedBuffer": torch.nn.parameter.UninitializedBuffer,
    **_paths(),
}
NAMES = frozenset({*_TABLE, *NUMPY_SCALARS, "collections.defaultdict"})


class Unpickler(restricted.Unpickler):  # type: ignore[misc]
    """torch's restricted unpickler, extended by the types above. It refuses other types with torch's own text."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._dtypes: weakref.WeakSet[_Dtype] = weakref.WeakSet()

    def load(self) -> Any:
        """Load the object. pickle.UnpicklingError if something is refused."""
        table = self._table()

        def allowed() -> dict[str, Any]:
            users = user_allowed_globals()
            if any(
                name.startswith("numpy.") for name in users
            ):  # the program's own NumPy functions match each other, but not ours
                return {**{name: value for name, value in table.items() if not name.startswith("numpy.")}, **users}
            return {**table, **users}

        result = load_allowing(self, allowed)
        self.memo.clear()
        self.stack: list[Any] = []
        self.metastack: list[Any] = []
        self.append = self.stack.append
        if len(self._dtypes):
            raise pickle.UnpicklingError(
                f"Unsupported global: GLOBAL {NUMPY_DTYPE} was not an allowed global by default. "
                "It is read as a part of a NumPy scalar only."
            )
        return result

    def _table(self) -> dict[str, Any]:
        dtypes = self._dtypes

        class Dtype(_Dtype):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                dtypes.add(self)

        def make_defaultdict(factory: Any = None, *rest: Any) -> Any:
            known = (allowed_globals(), user_allowed_globals(), _TABLE)
            allowed = factory is None or any(factory is one for names in known for one in names.values())
            if rest or not allowed:
                raise pickle.UnpicklingError(f"a defaultdict whose factory is {factory!r:.80} is refused")
            return defaultdict(factory)

        scalars: dict[str, Callable[..., Any]] = dict.fromkeys(NUMPY_SCALARS, _numpy_scalar)
        return {**_TABLE, **scalars, NUMPY_DTYPE: Dtype, "collections.defaultdict": make_defaultdict}

    def _check_set_item_target(self, opcode: str) -> None:
        # Elsewhere torch allows dict, OrderedDict and Counter.
        if type(self.stack[-1]) is not defaultdict:
            super()._check_set_item_target(opcode)
