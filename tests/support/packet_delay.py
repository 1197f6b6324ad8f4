"""Delays packets that netfilter queues, as `tc netem` would, which not every kernel has. A program: packet_delay.py SECONDS QUEUE…

It speaks nfnetlink_queue (linux/netfilter/nfnetlink_queue.h) over a netlink socket for each queue, accepts every packet SECONDS after it
came, and ends with its stdin. "ready" on stdout: the queues are bound. Only the standard library, so that it starts at once.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections import deque

_NETLINK_NETFILTER, _SUBSYSTEM = 12, 3
_PACKET, _CONFIG, _VERDICT_BATCH = 0, 2, 3
_ACCEPT = 1
_SO_RCVBUFFORCE, _SOL_NETLINK, _NO_ENOBUFS = 33, 270, 5
_QUEUE_PACKETS = 200_000


def _attribute(kind: int, data: bytes) -> bytes:
    n = 4 + len(data)
    return struct.pack("=HH", n, kind) + data + b"\0" * (-n % 4)


class Queue:
    """One queue of the kernel, and the packets of it that wait."""

    def __init__(self, number: int, delay_s: float) -> None:
        self._number, self._delay_s = number, delay_s
        self._waiting: deque[tuple[float, int]] = deque()
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self.socket.setsockopt(_SOL_NETLINK, _NO_ENOBUFS, 1)
        self._configure(_attribute(1, struct.pack(">BBH", 1, 0, 0)))  # bind
        self._configure(_attribute(2, struct.pack(">IB", 0, 1)))  # of a packet send the head of the message only
        self._configure(_attribute(3, struct.pack(">I", _QUEUE_PACKETS)))
        self._configure(
            _attribute(4, struct.pack(">I", 4)) + _attribute(5, struct.pack(">I", 4))
        )  # GSO: large packets stay whole
        self.socket.setblocking(False)

    def _message(self, kind: int, attributes: bytes, flags: int) -> bytes:
        body = struct.pack(">BBH", 0, 0, self._number) + attributes
        return struct.pack("=IHHII", 16 + len(body), (_SUBSYSTEM << 8) | kind, flags, 0, 0) + body

    def _configure(self, attributes: bytes) -> None:
        self.socket.send(self._message(_CONFIG, attributes, 5))
        answer = self.socket.recv(4096)
        problem = -struct.unpack_from("=i", answer, 16)[0]
        if problem:
            raise OSError(problem, f"queue {self._number} of nfnetlink_queue cannot be set up")

    def let_go(self) -> float | None:
        """Accept what has waited long enough. Returns the seconds until the next packet may go."""
        last = None
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            last = self._waiting.popleft()[1]
        if last is not None:  # a verdict for it and all before it
            self.socket.send(self._message(_VERDICT_BATCH, _attribute(2, struct.pack(">II", _ACCEPT, last)), 1))
        return max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None

    def take(self) -> None:
        """Read what has arrived."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return
        due, at = time.monotonic() + self._delay_s, 0
        while at + 16 <= len(data):
            n, kind = struct.unpack_from("=IH", data, at)
            if kind == (_SUBSYSTEM << 8) | _PACKET:
                self._waiting.append((due, struct.unpack_from(">I", data, at + 24)[0]))
            at += (n + 3) & ~3


def main() -> None:
    queues = {}
    for number in sys.argv[2:]:
        queue = Queue(int(number), float(sys.argv[1]))
        queues[queue.socket.fileno()] = queue
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    for fileno in queues:
        poll.register(fileno, select.POLLIN)
    print("ready", flush=True)
    while True:
        waits_s = [wait_s for queue in queues.values() if (wait_s := queue.let_go()) is not None]
        for fileno, _ in poll.poll(min(waits_s) * 1000 if waits_s else None):
            if fileno not in queues:
                return
            queues[fileno].take()


if __name__ == "__main__":
    main()
