"""The same objects as another client of S3 sees them: obstore, a library of its own in Rust, of which fastckpt has no line.

What the one writes the other lists and reads, under the same names and to the last byte. A fault that fastckpt's own writing and reading
share would be seen here.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")
pytest.importorskip("obstore", reason="the other client is not installed (pip install obstore)")

import obstore

import fastckpt
from fastckpt import Checkpointer
from fastckpt.errors import ObjectExistsError, ObjectNotFoundError
from fastckpt.store.cloud import S3Store
from tests.s3server import REGION, S3Server

pytestmark = pytest.mark.s3

# As `Store` takes them.
KEYS = ["plain", "a/b/c/d", "commits/000001/000000000042", "A-Z_a.z/0..9", "x" * 200, "-/_/--.-"]
# As people call their files, which only URLs of containers take. obstore refuses white space at the ends and `..`, as fastckpt does.
NAMES = [
    "epoch=0-step=1.ckpt",
    "model (1).pt",
    "best@3.pt",
    "model:test.ckpt",
    "a+b,c;d!e'f.pt",
    "größe.pt",
    "gro\u0308ße.pt",
    "重み/🙂.pt",
    "100%.pt",
    "a%20b?c#d.pt",
    "x&y=z$.pt",
    "[a]{b}^`|~.pt",
]
SIZES = [0, 1, 1000, (5 << 20) + 1]


@pytest.fixture
def their_store(s3_server: S3Server, bucket: str) -> Callable[[str], Any]:
    """obstore on a prefix of the bucket."""
    return lambda prefix: obstore.store.S3Store(
        bucket,
        prefix=prefix,
        endpoint=s3_server.url,
        region=REGION,
        access_key_id=s3_server.access_key,
        secret_access_key=s3_server.secret_key,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
    )


@pytest.fixture
def theirs(their_store: Callable[[str], Any]) -> Any:
    """obstore on what `store` is on."""
    return their_store("p")


def listed(theirs: Any, prefix: str | None = None) -> dict[str, int]:
    return {info["path"]: info["size"] for batch in obstore.list(theirs, prefix) for info in batch}


def test_what_fastckpt_writes_the_other_lists_and_reads(store: S3Store, theirs: Any) -> None:
    expected = {key: os.urandom(100 + n) for n, key in enumerate(KEYS)}
    for key, data in expected.items():
        store.put(key, data)
    assert listed(theirs) == {key: len(data) for key, data in expected.items()}
    for key, data in expected.items():
        assert bytes(obstore.get(theirs, key).bytes()) == data, key
        assert obstore.head(theirs, key)["size"] == len(data), key


def test_what_the_other_writes_fastckpt_lists_and_reads(store: S3Store, theirs: Any) -> None:
    expected = {key: os.urandom(100 + n) for n, key in enumerate(KEYS)}
    for key, data in expected.items():
        obstore.put(theirs, key, data)
    assert {info.key: info.n_bytes for info in store.list("")} == {key: len(data) for key, data in expected.items()}
    for key, data in expected.items():
        assert store.get(key) == data, key
        assert store.head(key).n_bytes == len(data), key


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_the_same_both_ways(store: S3Store, theirs: Any, size: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    data = draw.randbytes(size)
    store.put("mine", data)
    obstore.put(theirs, "yours", data)
    assert bytes(obstore.get(theirs, "mine").bytes()) == store.get("yours") == data
    if not size:
        return
    start = draw.randrange(size)
    length = draw.randint(1, size - start)
    out = bytearray(length)
    store.get_into("yours", start, out)
    assert out == bytes(obstore.get_range(theirs, "mine", start=start, length=length)) == data[start : start + length]


def test_parts_that_the_other_sent_are_one_object(store: S3Store, theirs: Any) -> None:
    data = os.urandom((12 << 20) + 7)
    obstore.put(theirs, "parts", data, use_multipart=True, chunk_size=5 << 20)
    assert store.get("parts") == data
    assert store.head("parts").n_bytes == len(data)


def test_listings_below_a_prefix_and_over_several_pages(store: S3Store, theirs: Any) -> None:
    """2 s: 1,100 objects, as a page has 1,000."""
    for n in range(1_100):
        obstore.put(theirs, f"many/{n:05}", b"x")
    store.put("manyfold", b"not below it")
    names = [f"many/{n:05}" for n in range(1_100)]
    assert [info.key for info in store.list("many/")] == sorted(listed(theirs, "many")) == names


def test_a_create_of_either_refuses_the_others(store: S3Store, theirs: Any) -> None:
    obstore.put(theirs, "yours", b"first", mode="create")
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("yours", b"second")
    store.put_if_absent("mine", b"first")
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(theirs, "mine", b"second", mode="create")
    assert store.get("yours") == bytes(obstore.get(theirs, "mine").bytes()) == b"first"


def test_what_one_deletes_the_other_misses(store: S3Store, theirs: Any) -> None:
    for key in KEYS:
        store.put(key, b"x")
    for key in KEYS[::2]:
        obstore.delete(theirs, key)
        with pytest.raises(ObjectNotFoundError):
            store.get(key)
    for key in KEYS[1::2]:
        store.delete(key)
        with pytest.raises(FileNotFoundError):
            obstore.head(theirs, key)
    assert listed(theirs) == {}
    assert list(store.list("")) == []


def test_a_repository_that_the_other_copied_is_that_repository(
    open_store: Callable[..., S3Store], store: S3Store, theirs: Any, their_store: Callable[[str], Any], bucket: str
) -> None:
    weight = torch.randn(500_000, generator=torch.Generator().manual_seed(3))
    with Checkpointer(store, {"state": {"weight": weight, "step": 1}}, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    copied = open_store(f"s3://{bucket}/elsewhere")
    elsewhere = their_store("elsewhere")
    names = listed(theirs)
    assert names == {info.key: info.n_bytes for info in store.list("")}
    for name in names:
        obstore.put(elsewhere, name, obstore.get(theirs, name).bytes())
    found = {"weight": torch.zeros(500_000), "step": 0}
    with Checkpointer(copied, {"state": found}, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1
    assert torch.equal(found["weight"], weight)
    assert found["step"] == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("aws")
def test_containers_have_the_same_name_and_bytes_both_ways(bucket: str, theirs: Any, name: str) -> None:
    state = {"weight": torch.randn(1000), "step": 7}
    fastckpt.save(state, f"s3://{bucket}/p/{name}")
    assert list(listed(theirs)) == [name]
    data = bytes(obstore.get(theirs, name).bytes())
    assert torch.equal(fastckpt.load(io.BytesIO(data))["weight"], state["weight"])
    obstore.put(theirs, f"again/{name}", data)
    assert torch.equal(fastckpt.load(f"s3://{bucket}/p/again/{name}")["weight"], state["weight"])


def test_names_that_only_the_other_gives_are_ignored(store: S3Store, theirs: Any) -> None:
    for name in NAMES:
        obstore.put(theirs, name, b"x")
    obstore.put(theirs, "mine", b"x")
    assert [info.key for info in store.list("")] == ["mine"]
