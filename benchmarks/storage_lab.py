"""What all groups of benchmarks/storage.py share: states, the rivals' environment, servers, and workers in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.processes import in_process
from benchmarks.runner import ensure_state
from benchmarks.storage_contenders import EVERYWHERE, OURS

RIVALS = ROOT / ".venv-rivals" / "bin" / "python"
NO_RIVALS = "no environment for rivals: `make bench-rivals`"
# For rivals, which use boto3: without it they compute a SHA-256 and a CRC of each body. fastckpt takes its defaults.
AWS_CONFIG = """\
[default]
region = us-east-1
request_checksum_calculation = when_required
response_checksum_validation = when_required
s3 =
    payload_signing_enabled = false
    addressing_style = path
"""
ANY_KEYS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@dataclass(frozen=True)
class Endpoint:
    """A server of S3 that runs now."""

    url: str
    bucket: str
    variables: dict[str, str]
    before: tuple[str, ...] = ()
    """Words in front of a client's command, such as `ip netns exec NAME`."""


@dataclass
class Lab:
    """Settings of one run, and what is gathered beside the rows."""

    size: str
    rounds: int
    quick: bool
    work: Path
    rivals: str | None
    show: Callable[[str], None]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    load_averages: list[float] = field(default_factory=list)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    """What was done → contender → answers of all rounds."""
    broken: list[str] = field(default_factory=list)
    """Groups that ended with an error."""

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.tiny = ensure_state("tiny")
        self.aws_config = self.work / "aws-config"
        self.aws_config.write_text(AWS_CONFIG)

    def state(self, size: str = "") -> Path:
        return ensure_state(size or self.size)

    def can(self, name: str) -> bool:
        return name in OURS + EVERYWHERE or self.rivals is not None

    def run(self, name: str, action: str, root: str, *, into: str = "", **more: Any) -> dict[str, Any]:
        """As `worker`, and keeps the answer under `into`, by default the action's name."""
        found = self.worker(name, action, root, **more)
        self.keep(into or action, name, found)
        return found

    def worker(
        self,
        name: str,
        action: str,
        root: str,
        *,
        at: Endpoint | None = None,
        source: str = "",
        size: str = "",
        device: str = "cpu",
        variables: Mapping[str, str] | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """One measurement of one contender (storage_worker.py). given: what else its worker is asked."""
        if not self.can(name):
            return {"error": NO_RIVALS}
        size = size or self.size
        place = {"root": root, "size": size, "endpoint": at.url if at else "", "source": source, "device": device}
        asked = {"contender": name, "action": action, "place": place, **given}
        asked |= {"state": str(self.state(size)), "tiny": str(self.tiny)}
        return self.process(
            "benchmarks.storage_worker",
            f"{name}, {action}",
            asked,
            at=at,
            rival=name not in OURS and self.rivals is not None,
            variables=variables,
        )

    def process(
        self,
        module: str,
        about: str,
        asked: Mapping[str, Any],
        *,
        at: Endpoint | None = None,
        rival: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The answer of a module's worker. about: for messages."""
        given = {"AWS_CONFIG_FILE": str(self.aws_config) if rival else os.devnull, **(variables or {})}
        if at is not None:
            given = {**at.variables, **given}
        found = in_process(
            module,
            [about, json.dumps(asked)],
            self.work / "answer.json",
            python=str(self.rivals) if rival else sys.executable,
            before=at.before if at else (),
            variables=given,
        )
        self.load_averages += [found["load_average"]] if "load_average" in found else []
        return found

    def keep(self, what: str, name: str, found: dict[str, Any], *, described: bool = True) -> None:
        """Keep an answer, and tell of it. described: `name` is that of a contender, whose settings the report is to show."""
        settings = found.pop("settings", {})
        if described and "version" in found:
            self.contenders[name] = {"version": found["version"], "settings": settings}
        self.samples.setdefault(what, {}).setdefault(name, []).append(found)
        words = found.get("error") or ", ".join(
            f"{key} {found[key]:.3f}" for key in ("seconds", "cpu") if isinstance(found.get(key), float)
        )
        self.show(f"{what}: {name}: {words}")

    def of(self, what: str, name: str) -> list[dict[str, Any]]:
        """Answers of all rounds."""
        return self.samples.get(what, {}).get(name, [])


def find_rivals(asked: str | None) -> str | None:
    """The Python of the rivals' environment; None if it is not there."""
    path = Path(asked) if asked else RIVALS
    return str(path) if path.exists() else None


@contextlib.contextmanager
def radosgw() -> Iterator[Endpoint | str]:
    """A real server on loopback, fresh; or why there is none."""
    from tests import s3server

    choice = s3server.choose()
    if choice.kind is None:
        yield f"no S3 server: {choice.why}"
        return
    server = s3server.start(choice.kind)
    try:
        variables = server.environment()
        variables.pop("AWS_CA_BUNDLE", None)
        yield Endpoint(server.url, server.new_bucket(), variables)
    finally:
        server.stop()


@contextlib.contextmanager
def moto(python: str | None) -> Iterator[Endpoint | str]:
    """The emulator, from the rivals' environment; or why there is none."""
    from tests.s3server import free_ports

    if python is None:
        yield NO_RIVALS
        return
    (port,) = free_ports(1)
    command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    variables = {**ANY_KEYS, "AWS_ENDPOINT_URL_S3": url}
    try:
        make_bucket(url, variables)
        yield Endpoint(url, "bench", variables)
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def null(tls: bool = False, link: Any = None, **settings: Any) -> Iterator[tuple[Endpoint, Any]]:
    """This project's null server in a process of its own, and its handle. link: the shaped link that it is at the far end of."""
    from fastckpt.testing.null_server import null_server
    from tests.s3server import make_certificate

    with contextlib.ExitStack() as made:
        more = {"port": link.port, "prefix": link.prefix} if link is not None else {}
        variables = {**ANY_KEYS}
        if tls:
            certificate = make_certificate(Path(made.enter_context(tempfile.TemporaryDirectory())))
            if certificate is None:
                raise RuntimeError("no certificate without openssl")
            more["tls"] = certificate[1:]
            variables["AWS_CA_BUNDLE"] = str(certificate[0])
        server = made.enter_context(null_server(**more, **settings))
        variables["AWS_ENDPOINT_URL_S3"] = server.url
        yield Endpoint(server.url, "bench", variables, tuple(link.prefix) if link is not None else ()), server


def make_bucket(url: str, variables: Mapping[str, str], within_s: float = 60.0) -> None:
    """Create the bucket "bench", as soon as the server answers."""
    import boto3
    from botocore.exceptions import EndpointConnectionError

    session = boto3.session.Session(variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"])
    client = session.client("s3", endpoint_url=url, region_name="us-east-1")
    end_s = time.monotonic() + within_s
    while True:
        try:
            client.create_bucket(Bucket="bench")
            return
        except EndpointConnectionError:
            if time.monotonic() > end_s:
                raise


def together(names: Sequence[Sequence[str]], number: int) -> list[str]:
    """The order of a round: each begins with another block of names; a block stays together."""
    first = number % len(names)
    return [name for block in (*names[first:], *names[:first]) for name in block]
