"""A real S3 server for the tests: Ceph's radosgw on loopback, in memory, up in about a second.

FASTCKPT_TEST_S3 = radosgw | moto | none chooses; unset: radosgw if its programs are installed (`make system` does that on Debian), else the
`moto` emulator if it can be imported, else the tests that need a server are skipped and say why. FASTCKPT_TEST_S3_PORT: port of its http
side (in a shaped link's network); unset: any free one.

Differences that tests ask about are attributes of `S3Server`. Nothing here leaves 127.0.0.1. The daemons are children of this process,
outlive a Ctrl-C long enough for the fixture to end them, and die with this process if it is killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CEPH_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
REGION = "us-east-1"
_START_S = 60.0


class S3ServerError(RuntimeError):
    """The server could not be started."""


@dataclass(frozen=True)
class Choice:
    """Which server the tests get, and in words why."""

    kind: str | None
    why: str


def choose() -> Choice:
    """Reads FASTCKPT_TEST_S3. Cheap: nothing is started or imported."""
    wanted = os.environ.get("FASTCKPT_TEST_S3", "")
    missing = [program for program in CEPH_PROGRAMS if shutil.which(program) is None]
    has_moto = importlib.util.find_spec("moto") is not None
    if wanted not in ("", "radosgw", "moto", "none"):
        raise S3ServerError(f"FASTCKPT_TEST_S3 is {wanted!r}: expected radosgw, moto or none")
    if wanted == "none":
        return Choice(None, "FASTCKPT_TEST_S3=none")
    if wanted in ("", "radosgw") and not missing:
        return Choice("radosgw", "a real server")
    install = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"
    if wanted == "radosgw":
        return Choice(None, f"not installed: {', '.join(missing)} ({install})")
    if has_moto:
        why = "an emulator: it checks neither signatures nor policies, so the tests of those are skipped"
        return Choice("moto", why if wanted else f"{why}; {install} gives the real one")
    if wanted == "moto":
        return Choice(None, "moto cannot be imported (pip install 'moto[server,s3]')")
    return Choice(None, f"no S3 server installed: {install}, or pip install 'moto[server,s3]'")


@dataclass
class S3Server:
    """A running server. Made by `start`; `stop` ends it."""

    kind: str
    url: str
    https_url: str | None
    ca_file: Path | None
    access_key: str
    secret_key: str
    version: str
    directory: Path
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    tls_files: tuple[Path, Path] | None = None
    """Certificate and key of the https side, as PEM files."""
    _buckets: int = 0
    _session: Any = None
    _client: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def checks_signatures(self) -> bool:
        return self.kind == "radosgw"

    def environment(self, access_key: str | None = None, secret_key: str | None = None) -> dict[str, str]:
        """AWS_* variables for boto3: these keys (by default the owner's), this endpoint, no other source of credentials."""
        found = {
            "AWS_ACCESS_KEY_ID": access_key or self.access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key or self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        if self.ca_file is not None:
            found["AWS_CA_BUNDLE"] = str(self.ca_file)
        return found

    def owner_session(self) -> Any:
        """The owner's boto3 session; one for all, as its first client takes 0.2 s and the others little."""
        if self._session is None:
            self._session = self.session()
        return self._session

    def owner_client(self) -> Any:
        """The owner's boto3 client; one for all threads."""
        with self._lock:
            if self._client is None:
                self._client = self.client()
            return self._client

    def session(self, access_key: str | None = None, secret_key: str | None = None) -> Any:
        """A boto3 session with keys of its own, whatever the environment says."""
        import boto3

        return boto3.session.Session(
            aws_access_key_id=access_key or self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            region_name=REGION,
        )

    def client(self, access_key: str | None = None, secret_key: str | None = None) -> Any:
        """A boto3 client, to look at the server by other means than the code under test."""
        from botocore.config import Config

        return self.session(access_key, secret_key).client(
            "s3",
            endpoint_url=self.url,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def new_bucket(self, *, versioned: bool = False) -> str:
        """An empty bucket of the owner's, with a name of its own."""
        with self._lock:
            self._buckets += 1
            name = f"test-{self._buckets}-{secrets.token_hex(4)}"
        client = self.owner_client()
        client.create_bucket(Bucket=name)
        if versioned:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def creates_in(self, bucket: str) -> bool:
        """Does create-if-absent work there? Ceph 16 ignores If-None-Match in versioned buckets: 8 of 8 racing creates won."""
        if self.kind != "radosgw":
            return True
        return self.owner_client().get_bucket_versioning(Bucket=bucket).get("Status") != "Enabled"

    def new_user(self, name: str) -> tuple[str, str]:
        """Another user, without any rights: (access key, secret key). radosgw only."""
        if self.kind != "radosgw":
            raise S3ServerError(f"{self.kind} has no users")
        text = self._run(
            "radosgw-admin", "-c", "ceph.conf", "user", "create", f"--uid={name}", f"--display-name={name}"
        )
        key = json.loads(text)["keys"][0]
        return key["access_key"], key["secret_key"]

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.directory, capture_output=True, text=True, check=False, timeout=_START_S
        )
        if done.returncode:
            raise S3ServerError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _spawn(self, *command: str) -> None:
        name = Path(command[0]).name
        with (self.directory / f"{name}.out").open("ab") as out:
            # A session of its own: Ctrl-C goes to the tests, which then end the daemons.
            child = subprocess.Popen(
                [*_die_with_parent(), *command],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)

    def _wait_for(self, port: int) -> None:
        """Until somebody listens. Other processes' start can only be polled."""
        deadline = time.monotonic() + _START_S
        while True:
            for child in self._children:
                if child.poll() is not None:
                    raise S3ServerError(f"{child.args!r} ended with {child.returncode}; {self._tails()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if time.monotonic() > deadline:
                raise S3ServerError(f"nobody listens on port {port} after {_START_S:.0f} s; {self._tails()}")
            time.sleep(0.02)

    def _tails(self) -> str:
        files = sorted([*self.directory.glob("*.out"), *self.directory.glob("*.log")])
        return "\n".join(f"{file}: {file.read_text(errors='replace')[-1000:]}" for file in files)

    def stop(self, *, keep_logs: bool = False) -> None:
        """Ends the daemons by their process ids; their data goes. SIGKILL: at SIGTERM an OSD in memory would write itself to disk."""
        for child in reversed(self._children):
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            child.wait()
        self._children.clear()
        if keep_logs:
            print(f"\nlogs of the S3 server: {self.directory}", file=sys.stderr)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)


def _die_with_parent() -> list[str]:
    """In front of a command: it is killed when this process ends without having stopped it. Linux only."""
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "KILL", "--"] if found else []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on. Below the range that outgoing connections take theirs from, so that only a server could take them."""
    found: list[int] = []
    held = []
    rng = random.SystemRandom()
    try:
        while len(found) < count:
            port = rng.randrange(10_000, 32_000)
            holder = socket.socket()
            held.append(holder)
            try:
                holder.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    finally:
        for holder in held:
            holder.close()
    return found


def make_certificate(directory: Path) -> tuple[Path, Path, Path] | None:
    """(authority, certificate, key) as PEM files for 127.0.0.1 and localhost, valid for 2 days; None without openssl."""
    if shutil.which("openssl") is None:
        return None
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    cert, key, request, extensions = (directory / name for name in ("tls.pem", "tls.key", "tls.csr", "tls.ext"))
    # rustls refuses an authority's certificate as a server's, hence two.
    extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=critical,CA:FALSE\n")
    signed_by = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for command in (
        ("req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=fastckpt tests"),
        ("req", "-new", *curve, "-keyout", key, "-out", request, "-subj", "/CN=localhost"),
        ("x509", "-req", "-in", request, "-out", cert, "-days", "2", "-extfile", extensions, *signed_by),
    ):
        done = subprocess.run(["openssl", *map(str, command)], capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise S3ServerError(f"openssl {command[0]} failed: {done.stderr}")
    return ca, cert, key


def start(kind: str) -> S3Server:
    """Starts the chosen server. Somebody may take a port between our look and the server's: tried three times."""
    problem: S3ServerError | None = None
    for _ in range(3):
        directory = Path(tempfile.mkdtemp(prefix="fastckpt-s3-"))
        server = S3Server(kind, "", None, None, secrets.token_hex(10).upper(), secrets.token_hex(20), "", directory)
        try:
            (_start_radosgw if kind == "radosgw" else _start_moto)(server)
            return server
        except S3ServerError as error:
            problem = error
            server.stop()
        except BaseException:
            server.stop()
            raise
    assert problem is not None
    raise problem


_CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = {monitors}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {directory}
log file = {directory}/$name.log
admin socket = {directory}/$name.asok
pid file = {directory}/$name.pid
keyring = {directory}/keyring
mon data = {directory}/mon.$id
osd data = {directory}/osd.$id
auth allow insecure global id reclaim = false
mon allow pool size one = true
# a full disk of the machine is no concern of a store in memory
mon data avail crit = 1
paxos propose interval = 0.02
paxos min wait = 0.01
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 8589934592
memstore page set = false
ms type = async+posix
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
ms crc data = false
# Overwritten and deleted data is freed after a minute instead of two hours; much earlier would break a GET that is still reading it.
rgw gc obj min wait = 60
rgw gc processor period = 30
rgw gc processor max time = 30
rgw thread pool size = 64
debug ms = 0/0
debug osd = 0/0
debug rgw = 0/0
debug mon = 0/0
debug objecter = 0/0
debug memstore = 0/0
"""


def _start_radosgw(server: S3Server) -> None:
    directory = server.directory
    mon_v2, mon_v1, http, https = free_ports(4)
    http = int(os.environ.get("FASTCKPT_TEST_S3_PORT") or http)
    fsid, osd = (Path("/proc/sys/kernel/random/uuid").read_text().strip() for _ in range(2))
    monitors = f"[v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]"
    (directory / "ceph.conf").write_text(_CEPH_CONF.format(fsid=fsid, monitors=monitors, directory=directory))
    (directory / "mon.a").mkdir()
    (directory / "osd.0").mkdir()
    run = server._run
    conf = ("-c", "ceph.conf")
    run("ceph-authtool", "-C", "keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    everything = ("--cap", "osd", "allow *", "--cap", "mgr", "allow *")
    run("ceph-authtool", "keyring", "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *", *everything)
    run(
        "ceph-authtool",
        "keyring",
        "--gen-key",
        "-n",
        "osd.0",
        "--cap",
        "mon",
        "allow profile osd",
        "--cap",
        "osd",
        "allow *",
    )
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitors, "monmap")
    run("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
    server._spawn("ceph-mon", *conf, "-i", "a", "-f")
    server._wait_for(mon_v2)
    run("ceph", *conf, "osd", "new", osd, "0")
    run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
    server._spawn("ceph-osd", *conf, "-i", "0", "-f")
    owner = (
        "--uid=owner",
        "--display-name=owner",
        f"--access-key={server.access_key}",
        f"--secret={server.secret_key}",
    )
    run("radosgw-admin", *conf, "user", "create", *owner)
    frontend = f"beast endpoint=127.0.0.1:{http} tcp_nodelay=1"
    certificate = make_certificate(directory)
    if certificate is not None:
        server.ca_file, cert, key = certificate
        server.tls_files = cert, key
        frontend += f" ssl_endpoint=127.0.0.1:{https} ssl_certificate={cert} ssl_private_key={key}"
        server.https_url = f"https://127.0.0.1:{https}"
    server._spawn(
        "radosgw",
        *conf,
        "-n",
        "client.admin",
        "-f",
        "--rgw-frontends",
        frontend,
        "--log-file",
        str(directory / "rgw.log"),
    )
    server._wait_for(http)
    server.url = f"http://127.0.0.1:{http}"
    server.version = run("radosgw", "--version").split("(")[0].strip()


def _start_moto(server: S3Server) -> None:
    import importlib.metadata

    (port,) = free_ports(1)
    server._spawn(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    server._wait_for(port)
    server.url = f"http://127.0.0.1:{port}"
    server.version = f"moto {importlib.metadata.version('moto')}"


def main() -> int:
    """`python -m tests.s3server COMMAND …`: run it with a server's keys and endpoint, and FASTCKPT_URL naming an empty bucket."""
    choice = choose()
    if choice.kind is None or len(sys.argv) < 2:
        print(f"no S3 server: {choice.why}" if choice.kind is None else str(main.__doc__), file=sys.stderr)
        return 2
    server = start(choice.kind)
    try:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= server.environment() | {"FASTCKPT_URL": f"s3://{server.new_bucket()}"}
        print(f"{choice.kind} ({choice.why}) at {server.url}", file=sys.stderr)
        return subprocess.run(sys.argv[1:], env=environment, check=False).returncode
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
