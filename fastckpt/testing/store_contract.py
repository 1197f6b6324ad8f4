"""The contract of a store as tests. Use it for a store of your own:

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self):
            with MyStore(...) as store:      # empty
                yield store

Each test is one clause of fastckpt/store/base.py. `many` may be lowered if requests are slow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastckpt.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    UnsupportedVerbError,
)
from fastckpt.store.base import Store

HOSTILE_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../a",
    "a/./b",
    "a\\b",
    "a\0b",
    "ä",
    "a b",
    "a\n",
    "x" * 1025,
]
HOSTILE_KEYS += ["~/a", "a?b", "a#b", "%2e%2e/a"]
KINDS: list[Callable[[bytes], Any]] = [bytes, bytearray, memoryview]
KINDS += [lambda data: np.frombuffer(data, np.uint8), lambda data: np.frombuffer(data, "<u4")]


class StoreContract:
    """Base class of tests; needs a fixture `store` that gives an empty store."""

    many = 1100
    """Number of objects in the test of long listings: more than one page of S3."""
    rounds = 50
    """Number of races of creates."""

    @pytest.mark.parametrize("n_bytes", [0, 1, 1000, (5 << 20) + 1])
    def test_bytes_come_back(self, store: Store, n_bytes: int) -> None:
        data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8).tobytes()
        store.put("a/b.bin", data)
        assert store.get("a/b.bin") == data
        assert store.head("a/b.bin").n_bytes == n_bytes
        store.put_if_absent("a/c.bin", data)
        assert store.get("a/c.bin") == data

    @pytest.mark.parametrize("kind", KINDS)
    def test_any_buffer_will_do(self, store: Store, kind: Callable[[bytes], Any]) -> None:
        store.put("k", kind(b"12345678"))
        assert store.get("k") == b"12345678"

    def test_the_buffer_belongs_to_the_caller_again(self, store: Store) -> None:
        data = bytearray(b"before")
        store.put("k", data)
        data[:] = b"after!"
        assert store.get("k") == b"before"

    def test_put_replaces(self, store: Store) -> None:
        store.put("k", b"a long first value")
        store.put("k", b"short")
        assert store.get("k") == b"short"
        assert [info.n_bytes for info in store.list("")] == [5]

    def test_put_if_absent_does_not(self, store: Store) -> None:
        store.put_if_absent("k", b"first")
        with pytest.raises(ObjectExistsError, match="k"):
            store.put_if_absent("k", b"second")
        assert store.get("k") == b"first"
        store.delete("k")
        store.put_if_absent("k", b"third")
        assert store.get("k") == b"third"

    def test_one_of_many_creates_wins(self, store: Store) -> None:
        for number in range(self.rounds):
            key = f"race/{number}"
            won: list[int] = []
            start = threading.Barrier(4)

            def create(i: int, key: str = key, won: list[int] = won, start: threading.Barrier = start) -> None:
                start.wait()
                try:
                    store.put_if_absent(key, b"%d" % i * 1000)
                except ObjectExistsError:
                    return
                won.append(i)

            threads = [threading.Thread(target=create, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            assert store.get(key) == b"%d" % won[0] * 1000

    def test_versions(self, store: Store) -> None:
        """Of the optional verbs. A store without them must say so: in both, or in the replacement alone."""
        store.put("k", b"1")
        try:
            data, first = store.get_version("k")
        except UnsupportedVerbError:
            with pytest.raises(UnsupportedVerbError):
                store.replace_if_match("k", b"2", "")
            assert store.get("k") == b"1"
            return
        assert data == b"1"
        try:
            store.replace_if_match("k", bytearray(b"2"), first)
        except UnsupportedVerbError:  # Ceph 16 in a versioned bucket
            assert store.get("k") == b"1"
            return
        with pytest.raises(ObjectChangedError, match="k"):
            store.replace_if_match("k", b"3", first)
        data, second = store.get_version("k")
        assert (data, first != second) == (b"2", True)
        for number in range(self.rounds // 5):
            self._race_of_replacements(store, number)
        store.delete("k")
        for call in (lambda: store.get_version("k"), lambda: store.replace_if_match("k", b"4", second)):
            with pytest.raises((ObjectNotFoundError, ObjectChangedError)):
                call()

    def _race_of_replacements(self, store: Store, number: int) -> None:
        _, version = store.get_version("k")
        won: list[bytes] = []
        start = threading.Barrier(4)

        def replace(data: bytes) -> None:
            start.wait()
            try:
                store.replace_if_match("k", data, version)
            except (ObjectChangedError, StoreUnavailableError):  # Ceph 16 answers 500 to some of those that lose
                return
            won.append(data)

        threads = [threading.Thread(target=replace, args=(b"%d %d" % (number, i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) <= 1
        assert not won or store.get("k") == won[0]

    def test_a_reader_sees_old_or_new(self, store: Store) -> None:
        values = [b"a" * 300_000, b"b" * 200_000]
        store.put("k", values[0])
        stop = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            try:
                while not stop.is_set():
                    for value in values:
                        store.put("k", value)
            except BaseException as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(self.rounds):
                assert store.get("k") in values
        finally:
            stop.set()
            writer.join()
        assert not failures

    def test_ranges(self, store: Store) -> None:
        data = bytes(range(256)) * 40
        store.put("k", data)
        for offset, n_bytes in [(0, 1), (0, len(data)), (1000, 77), (len(data) - 1, 1), (5, 0)]:
            out = bytearray(n_bytes)
            store.get_into("k", offset, out)
            assert bytes(out) == data[offset : offset + n_bytes]
        array = np.zeros(10, np.uint8)
        store.get_into("k", 3, array)
        assert array.tobytes() == data[3:13]

    @pytest.mark.parametrize(("offset", "n_bytes"), [(0, 11), (9, 2), (10, 1), (1000, 5)])
    def test_beyond_the_end(self, store: Store, offset: int, n_bytes: int) -> None:
        store.put("k", b"0123456789")
        with pytest.raises(EOFError):
            store.get_into("k", offset, bytearray(n_bytes))

    def test_what_is_not_there(self, store: Store) -> None:
        store.put("a/b", b"x")
        for missing in ("a", "b", "a/b/c", "a/bb"):
            with pytest.raises(ObjectNotFoundError):
                store.get(missing)
            with pytest.raises(ObjectNotFoundError):
                store.head(missing)
            with pytest.raises(ObjectNotFoundError):
                store.get_into(missing, 0, bytearray(1))
            store.delete(missing)
        assert store.get("a/b") == b"x"

    def test_delete(self, store: Store) -> None:
        store.put("a/b", b"x")
        store.put("a/c", b"y")
        store.delete("a/b")
        store.delete("a/b")
        with pytest.raises(ObjectNotFoundError):
            store.get("a/b")
        assert [info.key for info in store.list("")] == ["a/c"]

    def test_listings_are_in_the_order_of_keys(self, store: Store) -> None:
        names = ["b", "a/c", "a-b/c", "a.b/c", "a/b/c", "a/a", "A/z", "aa", "a0/1", "c/d/e/f"]
        for name in names:
            store.put(name, name.encode())
        assert [info.key for info in store.list("")] == sorted(names)
        assert [info.key for info in store.list("a/")] == sorted(n for n in names if n.startswith("a/"))
        assert [info.n_bytes for info in store.list("a/")] == [3, 5, 3]
        assert list(store.list("nothing/")) == []
        with pytest.raises(StoreError, match="prefix"):
            list(store.list("a"))

    def test_long_listings(self, store: Store) -> None:
        names = [f"many/{i:05}" for i in range(self.many)]
        for name in names:
            store.put(name, b"")
        assert [info.key for info in store.list("many/")] == names

    def test_times_are_the_stores_and_do_not_go_back(self, store: Store) -> None:
        store.put("a", b"1")
        store.put("b", b"2")
        first, second = store.head("a"), store.head("b")
        assert first.modified_s <= second.modified_s
        assert [info.modified_s for info in store.list("")] == [first.modified_s, second.modified_s]

    @pytest.mark.parametrize("key", HOSTILE_KEYS, ids=ascii)
    def test_hostile_keys(self, store: Store, key: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: store.put(key, b"x"),
            lambda: store.put_if_absent(key, b"x"),
            lambda: store.get(key),
            lambda: store.get_into(key, 0, bytearray(1)),
            lambda: store.head(key),
            lambda: store.delete(key),
        ]
        for call in calls:
            with pytest.raises(StoreError, match="no key"):
                call()
        assert list(store.list("")) == []

    def test_threads(self, store: Store) -> None:
        failures: list[BaseException] = []

        def work(i: int) -> None:
            try:
                for j in range(5):
                    store.put(f"t{i}/{j}", b"%d" % (i * j))
                    assert store.get(f"t{i}/{j}") == b"%d" % (i * j)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(list(store.list(""))) == 30

    def test_close_twice(self, store: Store) -> None:
        store.close()
        store.close()
