"""Two machines: two agents of torchrun with networks, /tmp and /dev/shm of their own. One of them dies; one directory is not shared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nodes import Node, two_nodes, why_not
from tests.support.torchrun import EXAMPLES, Agent, run, torchrun

EXAMPLE = EXAMPLES / "train_ddp.py"
SETTINGS = ("--steps", 40, "--every", 5, "--digest")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"two machines on one: {reason}")
    with two_nodes(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of both ranks after a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder / "log", EXAMPLE, folder / "run", *SETTINGS).digests


@contextlib.contextmanager
def job(nodes: tuple[Node, Node], logs: Path, url: object, **environment: str) -> Iterator[list[Agent]]:
    """One agent and one worker on each node."""
    with contextlib.ExitStack() as started:
        yield [
            started.enter_context(
                torchrun(
                    logs / f"log-{number}",
                    EXAMPLE,
                    url,
                    *SETTINGS,
                    n=1,
                    flags=node.flags(number, nodes[0], len(nodes)),
                    inside=node.inside,
                    **node.environment,
                    **environment,
                )
            )
            for number, node in enumerate(nodes)
        ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_dies_and_the_job_goes_on(
    nodes: tuple[Node, Node], undisturbed: list[str], tmp_path: Path, victim: int
) -> None:
    """The first one has the agent's store. Takes some 25 s: two jobs."""
    url = nodes[0].shared / f"run-{victim}"
    with job(nodes, tmp_path, url, PAUSE_S="0.1") as agents:
        agents[1 - victim].wait_for(r"durable (5|10)\n")
        agents[victim].kill()  # with it go its /tmp and /dev/shm
        assert agents[1 - victim].wait() != 0
        durable = max(int(step) for step in agents[1 - victim].found(r"durable (\d+)\n"))
    with job(nodes, tmp_path, url) as agents:
        assert [agent.wait() for agent in agents] == [0, 0], agents[0].log + agents[1].log
        digests = [digest for agent in agents for digest in agent.digests]
        started_at = {int(step) for agent in agents for step in agent.found(r"restored (\d+)")}
    assert len(started_at) == 1
    assert durable <= started_at.pop() < 40
    assert digests == undisturbed


def test_a_directory_of_each_machine_is_no_place_to_save_to(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """Takes some 12 s: one job."""
    with job(nodes, tmp_path, "/tmp/of-this-node/run") as agents:
        assert all(agent.wait() != 0 for agent in agents)
        for agent in agents:
            assert (
                "RanksError: 1 of 2 ranks do not share the repository of rank 0, file:///tmp/of-this-node/run; rank 1: "
                "file:///tmp/of-this-node/run is no repository as this rank sees it. All ranks save to one place: a directory that all "
                "nodes mount, or an object store"
            ) in agent.log, agent.log
