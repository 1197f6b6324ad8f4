"""A network of its own whose loopback is as slow and as far as a link: limited bits per second, and a round-trip time.

    if reason := why_not(): pytest.skip(reason)
    with shaped_link(bits_per_s=200e6, round_trip_s=0.05) as link, null_server(port=link.port, prefix=link.prefix) as server:
        subprocess.run([*link.prefix, sys.executable, "client.py", server.url])

Packets to and from `link.port` are shaped, by real TCP's rules; other ports of the network are not, so a server's inner traffic stays free.
Linux and root only. HTB limits the rate; a queue of netfilter and `packet_delay.py` make the delay, because `tc netem` is often missing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.nodes import ip, remove_left

PROGRAMS = ("ip", "tc", "iptables-legacy")
_DELAY = Path(__file__).with_name("packet_delay.py")
_BURST = ("burst", "128k", "cburst", "128k", "quantum", "65536")
_counted = itertools.count(1)


@dataclass(frozen=True)
class ShapedLink:
    """Made by `shaped_link`."""

    namespace: str
    port: int
    """Whoever listens here is at the far end."""

    @property
    def prefix(self) -> list[str]:
        """A command that runs the one after it in this network, where only 127.0.0.1 can be reached."""
        return ["ip", "netns", "exec", self.namespace]

    def run(self, *command: str) -> None:
        """Run a program in this network. RuntimeError: it failed."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


@contextlib.contextmanager
def shaped_link(
    *, bits_per_s: float, round_trip_s: float, down_bits_per_s: float | None = None, port: int = 9000
) -> Iterator[ShapedLink]:
    """Make the network; at the end, also after a failure, its processes are killed and it is removed.

    Args:
        bits_per_s: towards the server.
        round_trip_s: half of it each way.
        down_bits_per_s: from the server. None: as `bits_per_s`.
        port: of the server.

    Raises:
        RuntimeError, OSError: it cannot be made here (`why_not`).
    """
    remove_left()
    link = ShapedLink(f"fastckpt-link{next(_counted)}-{os.getpid()}", port)
    with contextlib.ExitStack() as made:
        ip("netns", "add", link.namespace)
        made.callback(ip, "netns", "delete", link.namespace)
        made.callback(_kill_all, link.namespace)
        ip("-n", link.namespace, "link", "set", "lo", "up")
        _limit(link, bits_per_s, bits_per_s if down_bits_per_s is None else down_bits_per_s)
        if round_trip_s > 0:
            made.enter_context(_delayed(link, round_trip_s / 2))
        yield link


def _limit(link: ShapedLink, up: float, down: float) -> None:
    link.run("tc", "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb", "default", "99")
    add = ("add", "dev", "lo", "parent", "1:")
    for number, rate, direction in ((10, up, "dport"), (20, down, "sport")):
        link.run("tc", "class", *add, "classid", f"1:{number}", "htb", "rate", f"{rate:.0f}bit", *_BURST)
        match = ("match", "ip", direction, str(link.port), "0xffff", "flowid", f"1:{number}")
        link.run("tc", "filter", *add, "protocol", "ip", "u32", *match)
    link.run("tc", "class", *add, "classid", "1:99", "htb", "rate", "100gbit", "quantum", "65536")


@contextlib.contextmanager
def _delayed(link: ShapedLink, delay_s: float) -> Iterator[None]:
    command = [*link.prefix, sys.executable, "-I", str(_DELAY), str(delay_s), "1", "2"]
    # It ends when its stdin does, so it cannot outlive a test that was killed.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the kernel has no queues of packets (nfnetlink_queue): see the messages on stderr")
            # Packets wait where they arrive. Where they leave, those that wait would still be the sender's, and its TCP would hold back the
            # next small write (autocorking) and limit the bytes in flight (small queues): a delay that no real link has.
            for queue, direction in (("1", "--dport"), ("2", "--sport")):
                chosen = ("INPUT", "-i", "lo", "-p", "tcp", direction, str(link.port))
                link.run("iptables-legacy", "-A", *chosen, "-j", "NFQUEUE", "--queue-num", queue)
            yield
        finally:
            process.kill()


def _kill_all(namespace: str) -> None:
    """A namespace lives on as long as processes are in it; all of them are ours."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
    for pid in map(int, listed.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def why_not() -> str | None:
    """Why links cannot be shaped here, in words; None: they can."""
    if os.getuid() != 0:
        return "only root can make network namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install --no-install-recommends iproute2 iptables)"
    try:
        with shaped_link(bits_per_s=1e9, round_trip_s=0.001):
            return None
    except (OSError, RuntimeError) as error:
        return f"this kernel cannot shape a link: {error}"
