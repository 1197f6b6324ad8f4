"""Which tensors of a saved object torch conjugates or negates when they are read: `c.conj()`, `c.conj().imag`.

Their bytes are not their values. The directory does not say which tensors these are, only the skeleton does, in what it tells torch of a
tensor: {"conj": True}, {"neg": True}.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any, TypeAlias

View: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""A tensor by the number of its storage, offset, shape and stride."""

_KINDS = ("conj", "neg")
_REBUILDS = {
    ("torch._utils", "_rebuild_tensor_v2"): (0, 1, 2, 3, 6),
    ("torch._utils", "_rebuild_tensor_v3"): (0, 1, 2, 3, 7),
}
"""torch's functions, and where among their arguments storage, offset, shape, stride and what is told of the tensor are."""


def lazy_views(skeleton: bytes) -> Mapping[View, frozenset[str]] | None:
    """Of each such tensor what it is: "conj", "neg" or both. None: that cannot be said, though some may be.

    Runs nothing of what the skeleton names. Looks closer only if the words occur in it.
    """
    if not any(kind.encode() in skeleton for kind in _KINDS):
        return {}
    scan = _Scan(io.BytesIO(skeleton), encoding="utf-8")
    try:
        scan.load()
    except Exception:  # a stream that only its own classes can make sense of, or one that is none
        return None
    return scan.found


class _Scan(pickle.Unpickler):
    """Makes nothing of what a stream names but objects that do nothing."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.found: dict[View, frozenset[str]] = {}

    def find_class(self, module: str, name: str) -> Any:
        places = _REBUILDS.get((module, name))
        if places is None:
            return _Nothing
        return lambda *given: self._tensor(*(given[n] if n < len(given) else None for n in places))

    def persistent_load(self, saved_id: Any) -> Any:
        return saved_id

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, told: Any) -> _Nothing:
        kinds = frozenset(kind for kind in _KINDS if isinstance(told, dict) and told.get(kind) is True)
        if kinds:
            view = (int(storage[2]), int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
            self.found[view] = self.found.get(view, kinds) | kinds
        return _Nothing()


class _Nothing(dict[Any, Any]):
    """Takes whatever a pickle does with an object: a dictionary, a list, an object with a state."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return _Nothing()

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...
