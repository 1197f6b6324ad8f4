"""Threads under a clock that stands still while one of them works: hours of many ranks in seconds, the same way for the same seed."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable


class VirtualTime:
    """One thread runs at a time; time goes on only when all of them sleep."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.errors: list[BaseException] = []
        self._asleep: list[tuple[float, int]] = []
        self._gates: list[threading.Semaphore] = []
        self._mine = threading.local()
        self._threads: list[threading.Thread] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Of a thread that `spawn` has made."""
        number: int = self._mine.number
        heapq.heappush(self._asleep, (self.now_s + max(0.0, seconds), number))
        if self._next() != number:
            self._gates[number].acquire()

    def spawn(self, run: Callable[[], None]) -> None:
        """A thread that begins when `run` is called."""
        number = len(self._gates)
        self._gates.append(threading.Semaphore(0))

        def body() -> None:
            self._mine.number = number
            self._gates[number].acquire()
            try:
                run()
            except BaseException as error:
                self.errors.append(error)
            self._next()

        heapq.heappush(self._asleep, (0.0, number))
        thread = threading.Thread(target=body, daemon=True)
        self._threads.append(thread)
        thread.start()

    def run(self, limit_s: float) -> None:
        """Until all threads have ended. limit_s: of real time."""
        self._next()
        for thread in self._threads:
            thread.join(limit_s)
            assert not thread.is_alive(), f"not over at {self.now_s:.1f} s of virtual time"
        if self.errors:
            raise self.errors[0]

    def _next(self) -> int | None:
        """Let the one go on that wakes first. If that is the caller, nobody need be told."""
        if not self._asleep:
            return None
        self.now_s, number = heapq.heappop(self._asleep)
        if getattr(self._mine, "number", None) != number:
            self._gates[number].release()
        return number
