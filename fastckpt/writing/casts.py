"""Which float32 storage may be the master of a bfloat16 storage: found by sizes and names. Pure.

Training in mixed precision keeps float32 masters beside the weights that a model computes with. Nothing in a state says which is whose:

    {"model": {"w": …}, "master": {"w": …}}                 one key, or the end of the name, is the same
    optimizer.state[3]["master_param"], masters[3]          the third of its size here is the third of its size there

So candidates are named here, and `casting` compares their numbers: a wrong guess costs a comparison that ends early.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from fastckpt.format.shares import first_entries
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.writing.matching import Form

_MOST = 6
"""Candidates of one storage."""
_MOST_OF_A_KEY = 4
"""Storages of one size that share a key: moments and the master of one parameter."""
_TOKENS = 5
"""Longest end of names that is compared."""


def candidates(form: Form, known: Mapping[Name, Name]) -> dict[int, list[int]]:
    """For each bfloat16 storage the numbers of float32 storages that may be its master, likely ones first.

    Args:
        form: of a sealed state.
        known: first names of copies → those of their masters, as earlier saves have found them.
    """
    copies = [n for n, s in enumerate(form.storages) if s.dtype == "bfloat16" and s.extents]
    sizes = {form.storages[number].n_bytes for number in copies}
    masters = [n for n, s in enumerate(form.storages) if s.dtype == "float32" and s.extents and s.n_bytes / 2 in sizes]
    if not masters:
        return {}
    names = {n: first.name for n, first in first_entries(form.tensors, {*copies, *masters}).items()}
    index = _Index(form, [number for number in masters if number in names], names)
    nth: dict[int, int] = defaultdict(int)
    found = {}
    for number in copies:  # in the order in which the state was pickled, which is that of the parameters
        size = 2 * form.storages[number].n_bytes
        if number in names:
            tried = dict.fromkeys(index.of(names[number], size, nth[size], known))
            if tried:
                found[number] = list(tried)[:_MOST]
        nth[size] += 1
    return found


class _Index:
    """Masters, by what their names have in common with those of copies. All keys begin with the size."""

    def __init__(self, form: Form, masters: Iterable[int], names: Mapping[int, Name]) -> None:
        self._by_name: dict[tuple[int, Name], int] = {}
        self._by_key: dict[tuple[int, object], list[int]] = defaultdict(list)
        self._by_end: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        self._families: dict[int, dict[Name, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number in masters:
            name, size = names[number], form.storages[number].n_bytes
            self._by_name[size, name] = number
            for key in {key for key in name if type(key) is str}:
                self._by_key[size, key].append(number)
            for end in _ends(name):
                self._by_end[size, end].append(number)
            self._families[size][_family(name)].append(number)

    def of(self, name: Name, size: int, nth: int, known: Mapping[Name, Name]) -> Iterable[int]:
        """Candidates for a copy. nth: the number of copies of its size before it."""
        if name in known and (size, known[name]) in self._by_name:
            yield self._by_name[size, known[name]]
        if type(name[-1]) is str and len(alike := self._by_key[size, name[-1]]) <= _MOST_OF_A_KEY:
            yield from alike
        for end in reversed(list(_ends(name))):
            if len(alike := self._by_end[size, end]) == 1:
                yield alike[0]
                break
        families = self._families[size]
        for family in sorted(families, key=_likelihood):
            if nth < len(families[family]):
                yield families[family][nth]
        for alike in families.values():
            yield from alike[:_MOST]


def _ends(name: Name) -> Iterable[tuple[str, ...]]:
    """The ends of a name, of one word to several."""
    words = dotted(name).split(".")[-_TOKENS:]
    return (tuple(words[-n:]) for n in range(1, len(words) + 1))


def _family(name: Name) -> Name:
    """What the names of a list, or of one kind of state of an optimizer, have in common."""
    if len(name) >= 3 and name[-3] == "state":
        return (*name[:-2], name[-1])
    return name[:-1]


def _likelihood(family: Name) -> tuple[bool, str]:
    text = dotted(family).lower()
    return not any(word in text for word in ("master", "fp32", "float", "main")), text
