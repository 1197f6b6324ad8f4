"""The rules of a FaultProxy, and the log of its requests."""

from __future__ import annotations

import enum
import re
import threading
from dataclasses import dataclass, field


class Fault(enum.Enum):
    """The effect of a rule on a request."""

    SLOW_DOWN = "503 SlowDown; the server sees nothing"
    INTERNAL_ERROR = (
        "500 after half of the request's body, then the connection is closed; the server sees half of it, or nothing"
    )
    RESET = "the connection is reset after half of the request's body; the server sees half of it, or nothing"
    LOST_ACK = "the server carries it out; the client's connection is reset instead of an answer"
    TRUNCATE = "half of the answer's body, then the connection is closed"
    FLIP_RESPONSE = "one bit of the answer's body is flipped"
    FLIP_REQUEST = "one bit of the request's body is flipped"
    STALL = "nothing until `Rule.release` is set, then as if nothing had been"
    STALL_RESPONSE = "half of the answer's body, then nothing until `Rule.release` is set, then the rest"
    ERROR_IN_200 = "status 200 with an <Error> in the body; the server sees nothing"
    ANSWER = "the answer given in the rule; the server sees nothing"


@dataclass
class Rule:
    """A rule, made by `FaultProxy.add`."""

    fault: Fault
    method: str
    match: str
    count: int
    skip: int
    status: int = 0
    code: str = ""
    detail: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when the rule has met its first request: wait for this instead of sleeping."""
    release: threading.Event = field(default_factory=threading.Event)
    """Set it to end a stall. Closing the proxy sets it too."""


@dataclass
class Exchange:
    """One request, in the order of arrival."""

    method: str
    target: str
    """Path and query."""
    headers: dict[str, str]
    """Headers of the request; names in lower case."""
    fault: Fault | None
    status: int = 0
    """Status of the server's answer, or of the fault's; 0: none was sent."""


class Script:
    """The rules, and all requests so far. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._log: list[Exchange] = []

    def add(self, rule: Rule) -> None:
        with self._lock:
            self._rules.append(rule)

    def pick(self, exchange: Exchange) -> Rule | None:
        """Log the request and use up a rule for it."""
        with self._lock:
            self._log.append(exchange)
            for rule in self._rules:
                if rule.count > 0 and rule.method in ("", exchange.method) and re.search(rule.match, exchange.target):
                    if rule.skip > 0:
                        rule.skip -= 1
                        continue
                    rule.count -= 1
                    exchange.fault = rule.fault
                    return rule
        return None

    def exchanges(self, method: str) -> list[Exchange]:
        with self._lock:
            return [exchange for exchange in self._log if method in ("", exchange.method)]

    def release(self) -> None:
        """Let stalled requests continue."""
        with self._lock:
            rules = list(self._rules)
        for rule in rules:
            rule.release.set()

    def clear(self) -> None:
        """Forget rules and log; let stalled requests continue."""
        self.release()
        with self._lock:
            self._rules, self._log = [], []
