"""Boards: on real stores of torch.distributed, on stores that hang, die and answer late, and on two boards at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, TCPStore  # type: ignore[attr-defined]

from fastckpt.ranks.board import Board, BoardLostError, FallbackBoard, MemoryBoard, StoreBoard, missing_members
from fastckpt.repository.object_board import ObjectBoard
from fastckpt.store.memory import MemoryStore

LIMIT_S = 20.0
KINDS = ("TCPStore", "HashStore", "FileStore", "memory", "objects", "two boards", "two boards, the first lost")


def lost_board() -> Any:
    class Lost(MemoryBoard):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("_") or name in ("requests", "close"):
                return super().__getattribute__(name)

            def fail(*_: Any) -> Any:
                raise BoardLostError("lost")

            return fail

    return Lost()


def made(kind: str, folder: Path) -> Any:
    objects = ObjectBoard(MemoryStore(), lambda: 1)
    if kind == "memory":
        return MemoryBoard()
    if kind == "objects":
        return objects
    if kind == "two boards":
        return FallbackBoard(MemoryBoard(), objects, lambda: 0.0)
    if kind == "two boards, the first lost":
        return FallbackBoard(lost_board(), objects, lambda: 0.0, slow_s=0.0)
    limit = timedelta(seconds=LIMIT_S)
    if kind == "TCPStore":
        store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    else:
        store = HashStore() if kind == "HashStore" else FileStore(str(folder / "store"), 1)
        store.set_timeout(limit)
    return StoreBoard(store, "job/", answer_s=LIMIT_S)


@pytest.fixture(params=KINDS)
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Board]:
    found = made(request.param, tmp_path)
    yield found
    if hasattr(found, "close"):
        found.close()


def test_a_key_is_not_there_and_then_is(board: Board) -> None:
    assert board.get("wish/1") is None
    board.put("wish/1", b"\x00\xff one")
    assert board.get("wish/1") == b"\x00\xff one"
    board.put("wish/1", b"two")
    assert board.get("wish/1") == b"two"


def test_who_is_first_stands(board: Board) -> None:
    assert board.put_once("fate/1", b"commit") == b"commit"
    assert board.put_once("fate/1", b"why not") == b"commit"
    assert board.get("fate/1") == b"commit"


def test_all_or_none(board: Board) -> None:
    board.put("a/0", b"x")
    assert board.get_all(["a/0", "a/1"]) is None
    assert not board.has_all(["a/0", "a/1"])
    board.put("a/1", b"y")
    assert board.get_all(["a/1", "a/0"]) == [b"y", b"x"]
    assert board.has_all(["a/0", "a/1"])
    assert board.has_all([])


def test_members_are_counted_and_missed(board: Board) -> None:
    assert board.n_joined("votes/1") == 0
    for member in (0, 2, 3):
        board.join("votes/1", member, b"vote")
    assert board.n_joined("votes/1") == 3
    assert missing_members(board, "votes/1", 6, 10) == [1, 4, 5]
    assert missing_members(board, "votes/1", 6, 2) == [1, 4]


def test_deleted_keys_may_be_written_again(board: Board) -> None:
    board.put("a/0", b"x")
    board.delete(["a/0", "a/never"])
    assert board.get("a/0") is None
    assert board.put_once("a/0", b"y") == b"y"


def test_many_keys_in_several_requests(tmp_path: Path) -> None:
    """More than one request takes: 1,024 keys."""
    board = made("TCPStore", tmp_path)
    keys = [f"a/{number}" for number in range(1500)]
    for number, key in enumerate(keys):
        board.put(key, b"%d" % number)
    assert board.get_all(keys) == [b"%d" % number for number in range(1500)]
    assert board.has_all(keys)
    board.delete(keys[700:])
    assert board.get_all(keys) is None
    assert missing_members(board, "a", 1500, 3) == [700, 701, 702]
    board.close()


@pytest.mark.parametrize("absent", [[], [0], [16_383], [1, 2, 3, 9000], list(range(64))])
def test_missing_members_of_many_take_few_requests(absent: list[int]) -> None:
    board = MemoryBoard()
    for member in set(range(16_384)) - set(absent):
        board.put(f"votes/{member}", b"v")
    board.requests = 0
    assert missing_members(board, "votes", 16_384, 64) == absent
    assert board.requests <= 16 + 22 * len(absent)


def test_of_ranks_that_are_all_missing_the_first_are_found() -> None:
    board = MemoryBoard()
    assert missing_members(board, "votes", 16_384, 20) == list(range(20))
    assert board.requests <= 60


# -- stores that do not answer -----------------------------------------------------------------------------------------


class Slow:
    """A store whose `check` waits until it may answer."""

    def __init__(self) -> None:
        self.may_answer, self.asked, self.calls = threading.Event(), threading.Event(), 0

    def check(self, keys: list[str]) -> bool:
        self.calls += 1
        self.asked.set()
        assert self.may_answer.wait(LIMIT_S)
        return False


def test_a_store_that_hangs_is_left_alone_until_it_answers() -> None:
    store = Slow()
    board = StoreBoard(store, "", answer_s=0.02)
    with pytest.raises(BoardLostError, match="has not answered within"):
        board.get("a")
    for _ in range(3):
        with pytest.raises(BoardLostError, match="an earlier request"):
            board.get("a")
    assert store.calls == 1  # nothing is heaped up behind the request that hangs
    store.may_answer.set()
    board = StoreBoard(store, "", answer_s=LIMIT_S)
    assert board.get("a") is None


def test_a_late_answer_brings_the_board_back() -> None:
    store = Slow()
    board = StoreBoard(store, "", answer_s=0.02)
    with pytest.raises(BoardLostError):
        board.get("a")
    store.may_answer.set()
    board._requests.put(store.asked.clear)
    end = threading.Event()
    board._requests.put(end.set)
    assert end.wait(LIMIT_S)  # the thread is past the late request
    board._answer_s = LIMIT_S
    assert board.get("a") is None


def test_an_error_of_the_store_is_told_with_its_cause() -> None:
    class Dead:
        def set(self, key: str, value: bytes) -> None:
            raise RuntimeError("Connection reset by peer")

    board = StoreBoard(Dead(), "")
    with pytest.raises(BoardLostError, match="RuntimeError: Connection reset by peer") as raised:
        board.put("a", b"1")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_real_store_dies() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=LIMIT_S))
    board = StoreBoard(client, "", answer_s=LIMIT_S)
    board.put("a", b"1")
    assert board.get("a") == b"1"
    del server
    with pytest.raises(BoardLostError):
        board.get("a")
    with pytest.raises(BoardLostError):
        board.join("votes", 0, b"1")
    board.close()


def test_several_threads_share_one_connection(tmp_path: Path) -> None:
    board = made("TCPStore", tmp_path)
    found: list[bytes | None] = []

    def work(number: int) -> None:
        board.put(f"a/{number}", b"%d" % number)
        found.append(board.get(f"a/{number}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(one for one in found if one is not None) == [b"%d" % number for number in range(8)]
    board.close()


def test_a_board_that_is_closed_twice(tmp_path: Path) -> None:
    board = made("HashStore", tmp_path)
    board.close()
    board.close()


# -- two boards --------------------------------------------------------------------------------------------------------


class Cut(MemoryBoard):
    """A board that may be lost for a while."""

    lost = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("put", "put_once", "get", "get_all", "has_all", "join", "n_joined", "delete") and self.lost:
            return _fail
        return super().__getattribute__(name)


def _fail(*_: Any) -> Any:
    raise BoardLostError("cut off")


@pytest.fixture
def pair() -> tuple[FallbackBoard, Cut, MemoryBoard, Callable[[float], None]]:
    first, second, now = Cut(), MemoryBoard(), [0.0]

    def goes_on(seconds: float) -> None:
        now[0] += seconds

    return FallbackBoard(first, second, lambda: now[0]), first, second, goes_on


def test_the_second_board_costs_nothing_while_the_first_answers(pair: Any) -> None:
    board, _, second, _ = pair
    board.put("a", b"1")
    board.put_once("b", b"1")
    board.join("c", 0, b"1")
    board.get("nothing")
    board.get_all(["a", "nothing"])
    board.n_joined("c")
    assert second.requests == 0


def test_what_was_written_elsewhere_is_written_again_when_the_first_is_back(pair: Any) -> None:
    """Rounds are counted, and whoever was not cut off has to count them too."""
    board, first, second, _ = pair
    first.lost = True
    board.put_once("wish/0", b"w")
    board.join("answer/0", 3, b"a")
    assert second.get("wish/0") == b"w"
    first.lost = False
    assert board.get("wish/0") == b"w"
    assert first.get("wish/0") == b"w"
    assert first.get("answer/0/3") == b"a"
    assert first.n_joined("answer/0") == 1


def test_a_key_that_is_on_neither_is_looked_for_once_a_second(pair: Any) -> None:
    board, first, second, goes_on = pair
    first.lost = True
    for _ in range(10):
        assert board.get("wish/0") is None
    assert second.requests == 1
    goes_on(1.5)
    second.put("wish/0", b"w")
    assert board.get("wish/0") == b"w"


def test_in_doubt_both_are_read_and_written(pair: Any) -> None:
    board, first, second, _ = pair
    second.put("answer/0/1", b"from the one that is cut off")
    assert board.get("answer/0/1") is None
    board.doubts = True
    board.put("answer/0/0", b"mine")
    assert first.get("answer/0/0") == second.get("answer/0/0") == b"mine"
    assert board.get_all(["answer/0/0", "answer/0/1"]) == [b"mine", b"from the one that is cut off"]


def test_a_job_without_an_epoch_has_no_objects_to_agree_by() -> None:
    with pytest.raises(BoardLostError, match="has not begun to save"):
        ObjectBoard(MemoryStore(), lambda: None).put("wish/0", b"w")
