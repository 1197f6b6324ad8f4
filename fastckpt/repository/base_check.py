"""Whether a save may name packs of a base: only if that is the save's parent, and lives (docs/guarantees.md, section 3)."""

from __future__ import annotations

from typing import NamedTuple

from fastckpt.errors import UnreadableError
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.repository.commit import poll_commit
from fastckpt.store.base import Store
from fastckpt.writing.bases import Base

_SEEN_S = 60.0
"""For so long a checkpoint that was seen living is taken to live. Whoever commits looks once more; this saves an upload in vain."""


class Usable(NamedTuple):
    """A base that may be used, or the reason why there is none."""

    base: Base | None
    why_full: str = ""


def usable(base: Base | None, parent: Parent | None, store: Store, now_s: float) -> Usable:
    """Look at a base before anything is encoded. One request at most. StoreError.

    parent: of the save. now_s: by the clock of `Base.seen_s`.
    """
    if base is None:
        return Usable(None)
    if base.parent != parent:
        return _refused(base, f"the save continues from {'nothing' if parent is None else parent.checkpoint} instead")
    if now_s - base.seen_s <= _SEEN_S:
        return Usable(base)
    try:
        found = poll_commit(store, base.parent.checkpoint)
    except UnreadableError as error:
        return _refused(base, str(error))
    if found is None:
        return _refused(base, "it does not exist any more")
    if not isinstance(found, Commit):
        return _refused(base, f"it was retired ({found.why})")
    if found.digest != base.parent.digest:
        return _refused(base, "there is another checkpoint of its name")
    return Usable(base)


def _refused(base: Base, why: str) -> Usable:
    why = f"checkpoint {base.parent.checkpoint} is no base: {why}"
    logger.warning("the next save is written in full: %s", why)
    return Usable(None, why)
