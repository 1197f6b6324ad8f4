"""Keys of a repository's objects (docs/format.md, section 11): builds and parses them."""

from __future__ import annotations

import re
from typing import NamedTuple

MARKER = "fastckpt.json"
README = "README.txt"
EPOCHS = "epochs/"
DATA = "data/"
VOTES = "votes/"
COMMITS = "commits/"
PINS = "pins/"
NOTICES = "notices/"

MAX_EPOCH = 10**6 - 1
MAX_STEP = 10**12 - 1
MAX_TRY = 10**3 - 1
MAX_WORLD = 10**5 - 1

_EPOCH = re.compile(r"epochs/(\d{6})\.json")
_COMMIT = re.compile(r"commits/(\d{6})-(\d{12})\.json")
_VOTE = re.compile(r"votes/(\d{6})-(\d{12})-(\d{3})/r(\d{5})-of-(\d{5})\.(0|[1-9]\d{0,18})\.([0-9a-f]{32})")
_PACK = re.compile(r"data/(\d{6})-(\d{12})-(\d{3})/r(\d{5})/(\d{6})\.pack")
_NOTICE = re.compile(r"notices/\d{6}/[a-z]+(/\d+){1,2}")
_PIN = re.compile(r"pins/([A-Za-z0-9_-]{1,64})\.json")


class CheckpointId(NamedTuple):
    """A checkpoint: at most one commit record has this name. Sorts in the order of the keys."""

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.step}"


class SaveId(NamedTuple):
    """One try to save a checkpoint (`try` is a keyword in Python)."""

    epoch: int
    step: int
    attempt: int

    @property
    def checkpoint(self) -> CheckpointId:
        return CheckpointId(self.epoch, self.step)

    def __str__(self) -> str:
        return f"{self.epoch:06}-{self.step:012}-{self.attempt:03}"


class VoteName(NamedTuple):
    """The facts in the key of a vote."""

    save: SaveId
    rank: int
    world: int
    n_bytes: int
    digest: str


def epoch_key(epoch: int) -> str:
    return f"{EPOCHS}{epoch:06}.json"


def commit_key(checkpoint: CheckpointId) -> str:
    return f"{COMMITS}{checkpoint.epoch:06}-{checkpoint.step:012}.json"


def votes_prefix(save: SaveId) -> str:
    return f"{VOTES}{save}/"


def vote_key(vote: VoteName) -> str:
    return f"{VOTES}{vote.save}/r{vote.rank:05}-of-{vote.world:05}.{vote.n_bytes}.{vote.digest}"


def pack_key(save: SaveId, rank: int, number: int) -> str:
    return f"{DATA}{save}/r{rank:05}/{number:06}.pack"


def pin_key(name: str) -> str:
    return f"{PINS}{name}.json"


def notices_prefix(epoch: int) -> str:
    return f"{NOTICES}{epoch:06}/"


def notice_key(epoch: int, name: str) -> str:
    return f"{notices_prefix(epoch)}{name}"


def is_notice(key: str) -> bool:
    return _NOTICE.fullmatch(key) is not None


def parse_epoch(key: str) -> int | None:
    """The number; None for a key of another form. The other parsers do the same."""
    found = _EPOCH.fullmatch(key)
    return int(found[1]) or None if found else None


def parse_commit(key: str) -> CheckpointId | None:
    found = _COMMIT.fullmatch(key)
    return CheckpointId(int(found[1]), int(found[2])) if found and int(found[1]) else None


def parse_vote(key: str) -> VoteName | None:
    found = _VOTE.fullmatch(key)
    if found is None:
        return None
    epoch, step, attempt, rank, world, n_bytes = (int(text) for text in found.groups()[:6])
    if not epoch or rank >= world:
        return None
    return VoteName(SaveId(epoch, step, attempt), rank, world, n_bytes, found[7])


def parse_pack(key: str) -> SaveId | None:
    """The save that wrote a pack."""
    found = _PACK.fullmatch(key)
    if found is None or not int(found[1]):
        return None
    return SaveId(int(found[1]), int(found[2]), int(found[3]))


def parse_pin(key: str) -> str | None:
    found = _PIN.fullmatch(key)
    return found[1] if found else None
