"""Whether a saved object has tensors that torch conjugates or negates only when they are read: `c.conj()`, `c.conj().imag`.

Their bytes are not their values. The directory does not say which tensors these are, only the skeleton does, in what it tells torch of a
tensor: {"conj": True}, {"neg": True}.
"""

from __future__ import annotations

import pickletools

_KINDS = ("conj", "neg")


def lazy_views(skeleton: bytes) -> frozenset[str]:
    """Of "conj" and "neg" those that some tensor may be. Of an object's own dictionary that has such a key with True the same is said. Runs
    nothing; looks closer, for a second and more where there are many tensors, only if the words occur.
    """
    if not any(kind.encode() in skeleton for kind in _KINDS):
        return frozenset()
    found: set[str] = set()
    memo: dict[object, str | None] = {}
    last: str | None = None
    """The text that was pushed last, if nothing else was pushed since."""
    try:
        for opcode, argument, _ in pickletools.genops(skeleton):
            if "PUT" in opcode.name:
                memo[argument] = last
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = last
            elif "GET" in opcode.name:
                last = memo.get(argument)
            elif "UNICODE" in opcode.name:
                last = str(argument)
            else:
                if opcode.name == "NEWTRUE" and last in _KINDS:
                    found.add(str(last))
                last = None
    except Exception:  # a stream that cannot be scanned
        return frozenset(_KINDS)
    return frozenset(found)
