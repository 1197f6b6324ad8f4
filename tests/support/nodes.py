"""Machines of a cluster on one: each with a network of its own, /tmp and /dev/shm of its own, and one directory that both mount."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.torchrun import ROOT

_TMP = Path("/tmp")


@dataclass(frozen=True)
class Node:
    """One machine. What is written to /tmp and /dev/shm on it is lost when the last of its processes ends."""

    namespace: str
    address: str
    interface: str
    shared: Path

    @property
    def inside(self) -> list[str]:
        """A command that runs the one after it on this machine, with disks that are empty."""
        # What both machines have alike, and what lies in the /tmp that is about to be hidden.
        alike = {ROOT, self.shared, Path(sys.prefix), Path(sys.base_prefix)}
        seen = [path for path in sorted(alike) if path.is_relative_to(_TMP)]
        place = shlex.quote(str(self.shared / ".tmp"))  # a mount of this machine covers it
        lines = ["set -e", f"new={place}", 'mkdir -p "$new"', 'mount -t tmpfs tmpfs "$new"']
        for path in seen:
            at = f'"$new"/{shlex.quote(str(path.relative_to(_TMP)))}'
            lines += [f"mkdir -p {at}", f"mount --bind {shlex.quote(str(path))} {at}"]
        lines += ['mount --move "$new" /tmp', "mount -t tmpfs tmpfs /dev/shm", 'exec "$@"']
        script = "\n".join(lines)
        return ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "sh", "-c", script, "sh"]

    @property
    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": self.interface, "TMPDIR": "/tmp"}

    def flags(self, number: int, first: Node, n: int) -> list[str]:
        """torchrun's, for this machine as one of n."""
        place = ["--master-addr", first.address, "--master-port", "29400"]
        return ["--nnodes", str(n), "--node-rank", str(number), "--local-addr", self.address, *place]


@contextlib.contextmanager
def two_nodes(shared: Path) -> Iterator[tuple[Node, Node]]:
    """Two machines, connected by a cable. shared: the directory that both see."""
    remove_left()
    tag = f"{os.getpid()}"
    nodes = tuple(
        Node(f"fastckpt-{end}-{tag}", f"10.213.7.{n}", f"fc{end}{tag}", shared) for n, end in ((1, "a"), (2, "b"))
    )
    with contextlib.ExitStack() as made:
        for node in nodes:
            ip("netns", "add", node.namespace)
            made.callback(ip, "netns", "delete", node.namespace)  # its end of the cable goes with it
        ip("link", "add", nodes[0].interface, "type", "veth", "peer", "name", nodes[1].interface)
        for node in nodes:
            ip("link", "set", node.interface, "netns", node.namespace)
            ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.interface)
            ip("-n", node.namespace, "link", "set", node.interface, "up")
            ip("-n", node.namespace, "link", "set", "lo", "up")
        yield nodes[0], nodes[1]


def why_not() -> str | None:
    """Why machines cannot be made here, in words; None: they can."""
    if os.getuid() != 0:
        return "only root can make namespaces of networks and mounts"
    try:
        with tempfile.TemporaryDirectory() as name, two_nodes(Path(name)) as nodes:
            done = subprocess.run([*nodes[0].inside, "true"], capture_output=True, text=True, check=False)
            return f"no mounts of its own for a process: {done.stderr.strip()}" if done.returncode else None
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"no namespaces of networks: {error}"


def remove_left() -> None:
    """Remove namespaces of tests that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(r"(?m)^(fastckpt-[a-z0-9]+-(\d+))\b", listed):
        if not Path(f"/proc/{pid}").exists():
            ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    """Run `ip`. RuntimeError."""
    command: Sequence[str] = ["ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
