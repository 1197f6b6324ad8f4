"""The soak, and that its judge sees what it must see."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.s3.soak import soak
from tests.s3.soak_judge import MOST_GROWTH_BYTES, chain, leaks_of, problems_of
from tests.s3server import S3Server

RESULT = Path(__file__).parent / "results" / "soak.json"


def one_run(server: S3Server, folder: Path, seconds: float, pause_s: float) -> dict[str, Any]:
    if not server.checks_signatures:
        pytest.skip(f"{server.kind} does not verify what it is sent, so a flipped bit of a request would be stored")
    result = soak(server, random.SystemRandom().randrange(1 << 32), seconds, pause_s, folder)
    print(json.dumps(result, indent=1))
    assert not result["problems"]
    assert result["saves acknowledged"] > 1
    assert result["restores"] > 1
    assert result["reads"] > 0
    return result


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_half_a_minute(s3_server: S3Server, tmp_path: Path) -> None:
    """Faults, kills, two racing incarnations, readers: no acknowledged step is lost, no mixture is read. 30 s of time, little of CPU."""
    one_run(s3_server, tmp_path, 30.0, 0.3)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_half_an_hour(s3_server: S3Server, tmp_path: Path) -> None:
    """The same for 30 minutes; writes the result."""
    RESULT.write_text(json.dumps(one_run(s3_server, tmp_path, 1800.0, 0.5), indent=1) + "\n")


def event(t: float, what: str, **facts: Any) -> dict[str, Any]:
    return {"t": t, "what": what, **facts}


# Writer 1 saves steps 1 to 3; 3 is not acknowledged. Writer 2 goes on from step 2.
GOOD = [
    event(1, "restored", writer=1, t0=0.5, parent=None, exact=True),
    event(2, "begun", writer=1, step=1),
    event(3, "acked", writer=1, step=1),
    event(4, "begun", writer=1, step=2),
    event(5, "acked", writer=1, step=2),
    event(6, "begun", writer=1, step=3),
    event(8, "restored", writer=2, t0=7, parent=[1, 2], exact=True),
    event(9, "begun", writer=2, step=3),
    event(10, "acked", writer=2, step=3),
    event(12, "read", t0=11, found=[2, 3], exact=True, newest=True),
]


def test_a_good_history_has_no_problem() -> None:
    assert problems_of(GOOD) == []
    assert chain((2, 3), {1: None, 2: (1, 2)}) == {2: 3, 1: 2}
    # An older step was asked for; and one may be read while its successor is being acknowledged.
    assert problems_of([*GOOD, event(13, "read", t0=0.0, found=[1, 1], exact=True, newest=False)]) == []
    assert problems_of([*GOOD, event(11, "read", t0=9.5, found=[1, 2], exact=True, newest=True)]) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (event(14, "read", t0=13, found=[1, 2], exact=True, newest=True), "acknowledged and is not in what was found"),
        (event(14, "read", t0=13, found=[1, 3], exact=True, newest=True), "acknowledged and is not in what was found"),
        (event(14, "restored", writer=3, t0=13, parent=None, exact=True), "acknowledged and is not in what was found"),
        (event(14, "none", t0=13), "acknowledged and is not in what was found"),
        (event(14, "read", t0=13, found=[2, 3], exact=False, newest=True), "mixture"),
        (event(14, "read", t0=13, found=[2, 4], exact=True, newest=True), "nobody saved"),
        (event(14, "crashed", error="KeyError"), "KeyError"),
    ],
)
def test_what_must_not_be_is_seen(more: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in problems_of([*GOOD, more]))


@pytest.mark.parametrize("name", ["rss", "fds", "threads"])
def test_a_leak_is_seen(name: str) -> None:
    healthy = {"rss": 300 << 20, "fds": 12, "threads": 2}
    step = {"rss": MOST_GROWTH_BYTES // 10, "fds": 1, "threads": 1}[name]
    still = [event(t, "health", who="a", **healthy) for t in range(40)]
    grows = [event(t, "health", who="b", **{**healthy, name: healthy[name] + t * step}) for t in range(40)]
    assert leaks_of(still)[0] == []
    problems, figures = leaks_of([*still, *grows])
    assert len(problems) == 1
    assert problems[0].startswith(f"b leaks {name}")
    assert set(figures) == {"a", "b"}
