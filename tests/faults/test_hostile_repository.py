"""Repositories made by a stranger who computes every digest right: each ends in one of our errors, soon, and touches nothing outside.

Sealed objects and votes are broken behind their seals, so that the parsers are what refuses them. The seed is printed.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastckpt.errors import CheckpointError, StoreError
from fastckpt.format import container, keys, records
from fastckpt.format.digest import digest
from fastckpt.format.keys import CheckpointId, commit_key, epoch_key, pin_key, vote_key
from fastckpt.format.repository_records import Commit, Pin, pin_bytes, utc_now
from fastckpt.format.vote import vote_name
from fastckpt.options import Options
from fastckpt.reading.object_loader import load_object
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.collector import Collector
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep, plan_retention
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.export import export
from fastckpt.upkeep.salvage import salvage
from fastckpt.writing.container import index_and_footer
from fastckpt.writing.rank import SaveAsked
from fastckpt.writing.sinks import FileObject
from tests.faults.test_hostile import junk, mutate_json
from tests.faults.tools import outcome
from tests.support.states import sealed, small_state

OPTIONS = Options(threads=1, connections=1, max_load_bytes=64 << 20)

SLOWEST_S = 5.0  # of one case on a busy machine; 0.05 s is usual


def reseal(value: Any) -> bytes:
    """Any JSON as a sealed object with a right digest, whatever it says."""
    text = json.dumps(value, ensure_ascii=True)
    body = (text[:-1] if text.endswith("}") else text).encode()
    return body + f',\n"digest": "{digest(body).hex()}"\n}}\n'.encode()


def resealed_text(body: bytes) -> bytes:
    return body + f',\n"digest": "{digest(body).hex()}"\n}}\n'.encode()


def mutate(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    kept = {key: value[key] for key in ("fastckpt", "format")} if rng.random() < 0.95 else {}
    for _ in range(rng.choice([1, 1, 2, 4])):
        if isinstance(value, dict):
            value = mutate_json(rng, value)
    if isinstance(value, dict):
        value.pop("digest", None)
        value |= kept
        if rng.random() < 0.1:
            value[rng.choice(["x\x00y", "\x1b[31m", "a" * 100_000])] = junk(rng)
    return value


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two steps and a pin, as key → bytes."""
    store = LocalStore(tmp_path_factory.mktemp("good"))
    job = Incarnation(Repository(store), OPTIONS)
    job.choose_and_claim()
    for step in (1, 2):
        commit = job.save(sealed(small_state(float(step))), SaveAsked(step, metrics={"loss": 0.5}, meta={"a": [1]}))
    reader = Pin(CheckpointId(commit.save.epoch, 1), 1 << 30, "a reader", utc_now())
    store.put(pin_key("reader"), pin_bytes(reader))
    return {info.key: store.get(info.key) for info in store.list("")}


def checkpoint_of(files: dict[str, bytes]) -> CheckpointId:
    return max(c for key in files if (c := keys.parse_commit(key)) is not None)


def sealed_case(rng: random.Random, files: dict[str, bytes], kind: str) -> None:
    newest = checkpoint_of(files)
    key = {
        "marker": keys.MARKER,
        "epoch": epoch_key(newest.epoch),
        "commit": commit_key(newest),
        "tombstone": commit_key(newest),
        "pin": pin_key("reader"),
    }[kind]
    value = json.loads(files[key])
    if kind == "tombstone":
        value = {
            "fastckpt": kind,
            "format": 1,
            "epoch": newest.epoch,
            "step": newest.step,
            "of": None,
            "why": "x",
            "utc": "x",
        }
    trick = rng.random()
    body = files[key].rpartition(b',\n"digest"')[0]
    if trick < 0.05:
        files[key] = resealed_text(body + b',\n"epoch": 1')
    elif trick < 0.1:
        files[key] = resealed_text(body.replace(b"1", b"NaN", 1))
    elif trick < 0.15:
        files[key] = resealed_text(body + b"\xff")
    elif trick < 0.2:
        files[key] = resealed_text(body + b',"z":' + b"[" * 100_000)
    else:
        files[key] = reseal(mutate(rng, value))


def vote_case(rng: random.Random, files: dict[str, bytes], kind: str) -> None:
    """A vote whose part is broken, named by a commit record that fits it."""
    newest = checkpoint_of(files)
    key = next(k for k in files if (v := keys.parse_vote(k)) is not None and v.save.checkpoint == newest)
    data = files.pop(key)
    footer = container.parse_footer(data[-container.FOOTER_BYTES :], len(data), "good")
    parts = {name: data[p.offset : p.offset + p.n_bytes] for name, p in footer.parts.items()}
    if kind == "records":
        rows = np.frombuffer(parts["records"], records.LAYOUT).copy()
        for _ in range(rng.choice([1, 1, 3])):
            row, field = rng.randrange(len(rows)), rng.choice(list(records.LAYOUT.names or ()))
            if rows.dtype[field].kind in "ui" and rows.dtype[field].shape == ():
                top = int(np.iinfo(rows.dtype[field]).max)
                rows[field][row] = rng.choice([0, 1, 2, 7, 255, top, rng.randint(0, top)]) & top
            else:
                rows[field][row] = np.frombuffer(rng.randbytes(rows.dtype[field].itemsize), rows.dtype[field])[0]
        parts["records"] = rows.tobytes()
    elif kind == "file table":
        value = json.loads(parts[kind])
        row = rng.choice(value)
        evil = [
            "../../etc/passwd",
            "/etc/passwd",
            "data/../fastckpt.json",
            "fastckpt.json",
            commit_key(newest),
            "",
            "\x00",
            "a" * 5000,
        ]
        trick = rng.random()
        if trick < 0.4:
            row["key"] = rng.choice(evil)
        elif trick < 0.6:
            row["bytes"] = rng.choice([0, 1, -1, 1 << 40, (1 << 63) - 1, 1 << 64, row["bytes"] + 1, row["bytes"] - 1])
        elif trick < 0.7:
            value.append(dict(row))
        elif trick < 0.8:
            row["crc64nvme"] = "0" * 16
        else:
            value = mutate_json(rng, value)
        parts[kind] = json.dumps(value).encode()
    else:
        value = json.loads(parts["directory"])
        if kind == "save":
            value["save"] = mutate_json(rng, value["save"])
        else:
            value = mutate_json(rng, value)
        parts["directory"] = json.dumps(value).encode()
    header = data[: container.HEADER_BYTES]
    made = b"".join([header, *index_and_footer(header, 0, list(parts.values()))])
    old = keys.parse_vote(key)
    assert old is not None
    name = vote_name(old.save, old.rank, old.world, made)
    files[vote_key(name)] = made
    if rng.random() < 0.7:  # otherwise the votes wait for somebody to commit them
        commit = json.loads(files[commit_key(newest)])
        commit.pop("digest")
        found = container.parse_footer(made[-container.FOOTER_BYTES :], len(made), "made").parts
        commit["votes"] = [
            {"bytes": len(made), "digest": name.digest, "parts": {p: [e.offset, e.n_bytes] for p, e in found.items()}}
        ]
        files[commit_key(newest)] = reseal(commit)
    else:
        del files[commit_key(newest)]


KINDS: dict[str, Callable[[random.Random, dict[str, bytes], str], None]] = {
    **dict.fromkeys(["marker", "epoch", "commit", "tombstone", "pin"], sealed_case),
    **dict.fromkeys(["records", "file table", "directory", "save"], vote_case),
}


def restore(store: LocalStore) -> Any:
    job = Incarnation(Repository(store), OPTIONS)
    choice = job.choose_and_claim()
    return None if choice is None else load(store, choice.commit)


def load(store: LocalStore, commit: Commit) -> Any:
    reader = open_vote(store, commit.vote(0))
    return load_object(reader, OPTIONS, 1, map_location=None, pickle_module=pickle, weights_only=True, load_args={})


def exported(store: LocalStore) -> None:
    choice = Catalog(Repository(store)).choose()
    if choice is not None:
        export(Repository(store), choice.commit, 0, FileObject(io.BytesIO()), OPTIONS, lambda done, total: None)


def collected(store: LocalStore) -> None:
    collector = Collector(Repository(store))
    collector.run(plan_retention(collector.look(), Keep(last=1), (), 0.0), None)


def committed(store: LocalStore) -> None:
    for name in {vote.save for info in store.list(keys.VOTES) if (vote := keys.parse_vote(info.key)) is not None}:
        try_commit(store, name)


def allowed(error: BaseException) -> bool:
    return isinstance(error, (CheckpointError, StoreError, pickle.UnpicklingError)) or type(error) in (
        RuntimeError,
        UserWarning,
    )


def attack(name: str, call: Callable[[LocalStore], object], store: LocalStore) -> None:
    error = outcome(call, store)
    assert error is None or allowed(error), f"{name}: {error!r}"
    assert error is None or len(str(error)) < 20_000, f"{name}: an error that floods the terminal"


@pytest.mark.parametrize("cases", [25, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_repository_gets_an_error(kind: str, cases: int, good: dict[str, bytes], tmp_path: Path) -> None:
    """2 s each: 25 repositories, looked at in seven ways."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    newest = checkpoint_of(good)
    (tmp_path / "file").write_bytes(b"not yours")
    ways: dict[str, Callable[[LocalStore], object]] = {
        "choose": lambda store: Catalog(Repository(store)).choose("latest-valid"),
        "export": exported,
        "check": lambda store: check_repository(Repository(store), options=OPTIONS),
        "salvage": lambda store: salvage(Repository(store), newest, str(tmp_path / "salvaged"), options=OPTIONS),
        "commit": committed,
        "restore": restore,
        "collect": collected,
    }
    for number in range(cases):
        files = dict(good)
        try:
            KINDS[kind](random.Random(f"{seed}-{number}"), files, kind)
        except RecursionError:
            continue  # too deep to be written as JSON here
        store = LocalStore(tmp_path / str(number))
        write_files(tmp_path / str(number), files)
        started = time.monotonic()
        for name, call in ways.items():
            attack(f"case {number}, {name}", call, store)
        took_s = time.monotonic() - started
        assert took_s < SLOWEST_S, f"case {number} took {took_s:.1f} s"
    assert (tmp_path / "file").read_bytes() == b"not yours"


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for key, data in files.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_the_cases_reach_the_parsers(good: dict[str, bytes], tmp_path: Path) -> None:
    """The same sealing, nothing broken, reads well: what the other test refuses is refused for its content."""
    files = {
        key: reseal({k: v for k, v in json.loads(data).items() if k != "digest"}) if key.endswith(".json") else data
        for key, data in good.items()
    }
    write_files(tmp_path, files)
    store = LocalStore(tmp_path)
    found = Repository(store).read_all(Repository(store).list())
    assert not found.failed
    assert len(found.commits) == 2
    assert restore(store)["value"] == 2.0
