"""The contract of all stores on S3, and what only S3 has: pages, versions, TLS, what other clients see."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastckpt.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from fastckpt.store.base import Store
from fastckpt.store.cloud import S3Store
from fastckpt.testing.store_contract import StoreContract
from tests.s3server import S3Server

pytestmark = pytest.mark.s3


class TestHttps(StoreContract):
    many = 10
    rounds = 5

    @pytest.fixture
    def store(self, s3_server: S3Server, open_store: Callable[..., S3Store]) -> Store:
        if s3_server.https_url is None:
            pytest.skip("the server has no TLS (radosgw with openssl has)")
        return open_store(endpoint_url=s3_server.https_url)


class TestVersioned(StoreContract):
    """In a versioned bucket, but for the creates where the server does not know them there."""

    many = 10
    rounds = 5

    @pytest.fixture
    def store(self, s3_server: S3Server, open_store: Callable[..., S3Store]) -> Store:
        return open_store(f"s3://{s3_server.new_bucket(versioned=True)}/p")

    @pytest.fixture
    def creating_store(self, s3_server: S3Server, store: S3Store) -> Store:
        if not s3_server.creates_in(store.connection.bucket):
            pytest.skip("Ceph 16 ignores If-None-Match in versioned buckets")
        return store

    def test_put_if_absent_does_not(self, creating_store: Store) -> None:
        super().test_put_if_absent_does_not(creating_store)

    def test_one_of_many_creates_wins(self, creating_store: Store) -> None:
        super().test_one_of_many_creates_wins(creating_store)


@pytest.fixture(params=["http", "https", "versioned"])
def any_store(request: pytest.FixtureRequest, s3_server: S3Server, open_store: Callable[..., S3Store]) -> S3Store:
    if request.param == "https":
        if s3_server.https_url is None:
            pytest.skip("the server has no TLS (radosgw with openssl has)")
        return open_store(endpoint_url=s3_server.https_url)
    if request.param == "versioned":
        return open_store(f"s3://{s3_server.new_bucket(versioned=True)}/p")
    return open_store()


def test_what_goes_in_comes_out(any_store: S3Store) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for size in (0, 1, 65_536, 65_537, 3_000_000):
        data = rng.randbytes(size)
        any_store.put(f"d/{size}", memoryview(data))
        assert any_store.get(f"d/{size}") == data
        assert any_store.head(f"d/{size}").n_bytes == size
        for _ in range(5):
            start = rng.randint(0, size)
            out = bytearray(rng.randint(0, size - start))
            any_store.get_into(f"d/{size}", start, out)
            assert out == data[start : start + len(out)]
        with pytest.raises(EOFError):
            any_store.get_into(f"d/{size}", size // 2, bytearray(size - size // 2 + 1))
        with pytest.raises(EOFError):
            any_store.get_into(f"d/{size}", size + 7, bytearray(1))
    whole = np.arange(1000, dtype=np.float32).reshape(10, 100)
    any_store.put("array", whole)
    found = np.empty((10, 100), dtype=np.float32)
    any_store.get_into("array", 0, found)
    assert (found == whole).all()


def test_head_and_list_say_the_same(any_store: S3Store) -> None:
    any_store.put("d/a", b"12")
    (listed,) = any_store.list("d/")
    assert listed == any_store.head("d/a")
    assert listed.modified_s == int(listed.modified_s) > 1.7e9


def test_a_pruned_commit_stays_pruned(any_store: S3Store, s3_server: S3Server) -> None:
    """The order of retention: a tombstone over a record, a late create, then the tombstone goes. Versions change nothing of it."""
    any_store.put_if_absent("commits/1.json", b"record")
    any_store.put("commits/1.json", b"tombstone")
    if s3_server.creates_in(any_store.connection.bucket):
        with pytest.raises(ObjectExistsError):
            any_store.put_if_absent("commits/1.json", b"record")
    assert any_store.get("commits/1.json") == b"tombstone"
    any_store.delete("commits/1.json")
    any_store.delete("commits/1.json")
    with pytest.raises(ObjectNotFoundError):
        any_store.get("commits/1.json")
    with pytest.raises(ObjectNotFoundError):
        any_store.head("commits/1.json")
    assert list(any_store.list("")) == []
    any_store.put_if_absent("commits/1.json", b"again")  # a delete marker is no object
    assert any_store.get("commits/1.json") == b"again"


def test_ceph_16_does_not_know_create_in_a_versioned_bucket(
    s3_server: S3Server, open_store: Callable[..., S3Store]
) -> None:
    """Documented in docs/stores.md, and why `check_bucket` warns. If this fails, Ceph has learnt it: change both and `creates_in`."""
    if s3_server.kind != "radosgw":
        pytest.skip("about Ceph")
    store = open_store(f"s3://{s3_server.new_bucket(versioned=True)}/p")
    store.put_if_absent("a", b"1")
    store.put_if_absent("a", b"2")
    assert store.get("a") == b"2"


def test_a_versioned_bucket_keeps_what_was_deleted(s3_server: S3Server, open_store: Callable[..., S3Store]) -> None:
    bucket = s3_server.new_bucket(versioned=True)
    store = open_store(f"s3://{bucket}/p")
    store.put("a", b"1")
    store.put("a", b"22")
    store.delete("a")
    found = s3_server.owner_client().list_object_versions(Bucket=bucket)
    assert sorted(version["Size"] for version in found["Versions"]) == [1, 2]
    assert len(found["DeleteMarkers"]) == 1


def test_a_list_of_several_pages_is_complete_and_sorted(store: S3Store) -> None:
    """1,050 objects, one page is 1,000. Takes 3 s: as many requests."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    keys = {f"d/{rng.choice('AZaz._-')}{rng.randrange(10**9)}" for _ in range(1050)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), sorted(keys, key=lambda key: rng.random())))
    store.put("e", b"")
    assert [info.key for info in store.list("d/")] == sorted(keys)
    assert [info.key for info in store.list("")] == [*sorted(keys), "e"]


def test_other_peoples_objects_are_left_out_of_lists(s3_server: S3Server, bucket: str, store: S3Store) -> None:
    client = s3_server.owner_client()
    for name in ("p/my file.txt", "p/d/", "p/d/ü"):
        client.put_object(Bucket=bucket, Key=name, Body=b"")
    store.put("d/a", b"1")
    assert [info.key for info in store.list("d/")] == ["d/a"]


def test_buffers_that_are_no_buffers_are_refused_before_anything_is_sent(store: S3Store) -> None:
    with pytest.raises(TypeError):
        store.put("a", "text")
    with pytest.raises(TypeError):
        store.put("a", np.arange(10)[::2])
    for call in (store.get, store.head, store.delete):
        with pytest.raises(StoreError, match="no key"):
            call("../a")
    assert list(store.list("")) == []


def test_a_closed_store_says_so(store: S3Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get("a")
