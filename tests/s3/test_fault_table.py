"""The table of faults in docs/stores.md: each row at the verbs of a store with its retries, and in a job that restores and saves.

Either the call succeeds, after another try, or a typed error says what to do. What is on the server is judged without faults: everything
that was acknowledged is there, whole, and the job can go on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fastckpt
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    ObjectExistsError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
)
from fastckpt.store import cloud_requests
from fastckpt.store.cloud import S3Store
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import Fault, FaultProxy
from tests.s3.fault_scene import STALL_S, Scene
from tests.s3server import REGION, S3Server

pytestmark = pytest.mark.s3
OpenStore = Callable[..., S3Store]

OLD, NEW = b"old" * 1000, bytes(range(256)) * 256
VERBS: dict[str, Callable[[Any], Any]] = {
    "put": lambda store: store.put("a/x", NEW),
    "put_if_absent": lambda store: store.put_if_absent("a/y", NEW),
    "get": lambda store: store.get("a/x"),
    "get_into": lambda store: store.get_into("a/x", 10, bytearray(2000)),
    "head": lambda store: store.head("a/x"),
    "list": lambda store: [info.key for info in store.list("a/")],
    "delete": lambda store: store.delete("a/x"),
}
ALL, WRITES, ANSWERED = tuple(VERBS), ("put", "put_if_absent"), ("get", "get_into", "list")
# Requests of a job (`Scene.run`): method, and what matches the path and query of the first such request.
PUTS = [("PUT", kind) for kind in ("/data/", "/votes/", "/commits/", "/epochs/", "/probe/")]
LISTS = [("GET", rf"prefix=p%2F{kind}") for kind in ("probe", "epochs", "commits", "votes", "data")]
GETS = [("GET", rf"/p/{kind}") for kind in ("fastckpt.json", "commits/", "votes/", "data/", "epochs/")]
OTHERS = [("HEAD", "/commits/"), ("HEAD", "fastckpt.json"), ("DELETE", "/votes/")]
EVERYWHERE = [*PUTS, *LISTS, *GETS, *OTHERS]


@dataclass(frozen=True)
class Row:
    """A fault of a proxy: where it can strike, and what becomes of it. No error: another try succeeds."""

    fault: Fault
    verbs: tuple[str, ...] = ALL
    places: tuple[tuple[str, str], ...] = tuple(EVERYWHERE)
    error: type[StoreError] | None = None
    words: str = ""
    answer: dict[str, Any] = field(default_factory=dict)


def refused(status: int, code: str, words: str, error: type[StoreError] = StoreAccessError, **more: Any) -> Row:
    places = (("PUT", "/data/"), ("PUT", "/commits/"), ("GET", "/p/commits/"), ("GET", "prefix=p%2Fepochs"))
    if code != "AccessDenied":  # the way of the error is the same
        places = places[1:3]
    return Row(Fault.ANSWER, places=places, error=error, words=words, answer={"status": status, "code": code, **more})


def again(status: int, code: str, verbs: tuple[str, ...] = ALL) -> Row:
    places = EVERYWHERE if verbs == ALL else [("PUT", "/commits/"), ("PUT", "/epochs/")]
    return Row(Fault.ANSWER, verbs, tuple(places), answer={"status": status, "code": code})


ROWS = {
    "SlowDown": Row(Fault.SLOW_DOWN),
    "500 in the middle of the request": Row(Fault.INTERNAL_ERROR),
    "reset in the middle of the request": Row(Fault.RESET),
    "lost acknowledgement": Row(Fault.LOST_ACK),
    "lost acknowledgement of a create": Row(
        Fault.LOST_ACK, ("put_if_absent",), (("PUT", "/commits/"), ("PUT", "/epochs/"), ("PUT", "/probe/"))
    ),
    "bit flipped in a request": Row(Fault.FLIP_REQUEST, WRITES, tuple(PUTS)),
    "answer cut short": Row(Fault.TRUNCATE, ANSWERED, (*LISTS, *GETS)),
    "stall before the answer": Row(Fault.STALL),
    "stall in the middle of the answer": Row(Fault.STALL_RESPONSE, ANSWERED, (*LISTS, *GETS)),
    "200 with an error in it": Row(Fault.ERROR_IN_200),
    "conflict of two creates": again(409, "ConditionalRequestConflict", ("put_if_absent",)),
    "too many requests": again(429, "TooManyRequests"),
    "gateway without a server": again(502, ""),
    "clock skew, as told": refused(403, "RequestTimeTooSkewed", "Set this machine's clock"),
    "expired credentials": refused(400, "ExpiredToken", "expired: log in anew, or put new keys"),
    "wrong region": refused(
        301, "", r"it is in eu-west-1.*Set AWS_REGION", headers={"x-amz-bucket-region": "eu-west-1"}
    ),
    "access denied": refused(403, "AccessDenied", "policies of user, bucket and KMS key"),
    "not implemented": refused(501, "NotImplemented", "NotImplemented", StoreError),
}


def skip_unless_verified(row: Row, server: S3Server) -> None:
    if row.fault is Fault.FLIP_REQUEST and not server.checks_signatures:
        pytest.skip(f"{server.kind} does not verify what it is sent")


@pytest.fixture
def scene(open_store: OpenStore, proxy: FaultProxy) -> Scene:
    """With one step acknowledged."""
    made = Scene(open_store, proxy)
    assert made.run() is None
    proxy.clear()
    return made


@pytest.mark.parametrize("name", ROWS)
def test_a_verb_with_its_retries(name: str, s3_server: S3Server, open_store: OpenStore, proxy: FaultProxy) -> None:
    row = ROWS[name]
    skip_unless_verified(row, s3_server)
    direct = open_store()
    store = Retrying(open_store(endpoint_url=proxy.url, stall_timeout_s=STALL_S), sleep=lambda pause_s: None)
    for verb in row.verbs:
        direct.put("a/x", OLD)
        direct.delete("a/y")
        rule = proxy.add(row.fault, **row.answer)
        if row.error is None:
            found = VERBS[verb](store)
            assert verb == "delete" or direct.get("a/x") == (NEW if verb == "put" else OLD)
            assert verb != "get" or found == OLD
            assert verb != "list" or found == ["a/x"]
            assert verb != "put_if_absent" or direct.get("a/y") == NEW
            assert verb != "delete" or [info.key for info in direct.list("a/")] == []
        else:
            if verb == "head":
                rule.count = 2  # asked again as a GET
            with pytest.raises(row.error, match=re.compile(row.words, re.DOTALL)) as caught:
                VERBS[verb](store)
            assert store.url in str(caught.value)
        assert rule.reached.is_set(), (
            verb
        )  # what a stall holds back is held until the end: it would land on later verbs


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.error is None])
def test_a_job_gets_over_it_wherever_it_strikes(name: str, s3_server: S3Server, scene: Scene) -> None:
    """Once at each kind of request of one job: all of them strike in one run."""
    row = ROWS[name]
    skip_unless_verified(row, s3_server)
    rules = {place: scene.proxy.add(row.fault, method=place[0], match=place[1], **row.answer) for place in row.places}
    assert scene.run() is None
    missed = [place for place, rule in rules.items() if not rule.reached.is_set()]
    assert not missed
    assert scene.acknowledged == 2
    scene.judge()


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.error is not None])
def test_a_job_is_told_what_to_do(name: str, scene: Scene) -> None:
    """At each of some requests: the error is typed, says the next step, and nothing that was acknowledged is lost."""
    row = ROWS[name]
    assert row.error is not None
    for method, match in row.places:
        rule = scene.proxy.add(row.fault, method=method, match=match, **row.answer)
        error = scene.run()
        assert rule.reached.is_set()
        assert isinstance(error, row.error), (method, match)
        assert re.search(row.words, str(error), re.DOTALL)
        scene.judge()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ROWS)
def test_at_each_single_request_of_a_job(name: str, s3_server: S3Server, scene: Scene) -> None:
    """Some 50 requests, each in a run of its own: minutes."""
    row = ROWS[name]
    skip_unless_verified(row, s3_server)
    scene.run()
    n_requests = len(scene.proxy.requests())
    assert n_requests > 40
    for number in range(n_requests):
        scene.proxy.clear()
        scene.proxy.add(row.fault, skip=number, **row.answer)
        error = scene.run()
        assert error is None or row.error is not None, (number, error)
        assert error is None or isinstance(error, CheckpointError)
        scene.judge()


@pytest.mark.parametrize("place", GETS, ids=[match for _, match in GETS])
def test_a_bit_flipped_in_an_answer(place: tuple[str, str], scene: Scene) -> None:
    """Stores do not see it (test_faults.py); the format does. A record is read again; of data it may be an error, never another value."""
    rule = scene.proxy.add(Fault.FLIP_RESPONSE, method=place[0], match=place[1])
    error = scene.run()
    assert rule.reached.is_set()
    assert error is None or ("data/" in place[1] and isinstance(error, CorruptCheckpointError))
    scene.judge()
    scene.proxy.add(Fault.FLIP_RESPONSE, method=place[0], match=place[1], count=100)
    error = scene.run()  # on every answer: no retry helps
    assert isinstance(error, CheckpointError)
    scene.judge()


def test_a_create_that_was_lost_and_anothers(open_store: OpenStore, proxy: FaultProxy) -> None:
    """If-None-Match after a lost acknowledgement: 412 although the own write has won."""
    direct = open_store()
    store = Retrying(open_store(endpoint_url=proxy.url), sleep=lambda pause_s: None)
    proxy.add(Fault.LOST_ACK, method="PUT")
    store.put_if_absent("mine", b"mine")
    assert [exchange.status for exchange in proxy.requests("PUT")] == [200, 412]
    assert direct.get("mine") == b"mine"
    direct.put("theirs", b"theirs")
    proxy.add(Fault.RESET, method="PUT")
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("theirs", b"mine")
    assert direct.get("theirs") == b"theirs"


def test_an_outage_that_lasts(scene: Scene) -> None:
    """A typed error that says how long it was tried; then the job goes on."""
    now = [0.0]
    store = Retrying(
        scene.open_store(endpoint_url=scene.proxy.url),
        give_up_s=5.0,
        sleep=lambda pause_s: now.__setitem__(0, now[0] + pause_s),
        clock=lambda: now[0],
    )
    scene.proxy.add(Fault.SLOW_DOWN, method="PUT", match="/commits/", count=1 << 20)
    error = scene.run(store)
    assert isinstance(error, StoreUnavailableError)
    assert re.search(r"SlowDown.*given up after \d+ tries", str(error), re.DOTALL)
    scene.judge()


def test_a_clock_that_is_wrong(s3_server: S3Server, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the server itself, not by the proxy: one hour."""
    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.kind} checks no signatures")

    class Late(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Late:
            return cls.fromtimestamp(datetime.datetime.now(tz).timestamp() - 3600, tz)

    with monkeypatch.context() as wrong:
        wrong.setattr(cloud_requests, "datetime", types.SimpleNamespace(datetime=Late, timezone=datetime.timezone))
        error = scene.run()
    assert type(error) is StoreAccessError
    assert "Set this machine's clock" in str(error)
    scene.judge()


def test_credentials_that_expire_in_the_middle_of_a_save(
    s3_server: S3Server, scene: Scene, aws: pytest.MonkeyPatch, bucket: str, tmp_path: Path
) -> None:
    """The place that they came from has new ones by then: the save goes on with them. Without new ones, see the table."""
    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.kind} checks no signatures")
    file = tmp_path / "credentials"
    aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    second = f"SECOND{s3_server.access_key}", f"second{s3_server.secret_key}"
    named = (f"--access-key={second[0]}", f"--secret={second[1]}")
    s3_server._run("radosgw-admin", "-c", "ceph.conf", "key", "create", "--uid=owner", "--key-type=s3", *named)

    def write(access_key: str, secret_key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n")

    write(s3_server.access_key, s3_server.secret_key)
    scene.settings["session"] = None  # boto3's own chain
    for match in ("/data/", "/votes/", "/commits/"):
        write(s3_server.access_key, s3_server.secret_key)
        store = scene.store()
        write(*second)
        rule = scene.proxy.add(Fault.ANSWER, method="PUT", match=match, status=400, code="ExpiredToken")
        assert scene.run(store) is None
        assert rule.reached.is_set()
        used = [exchange.headers["authorization"] for exchange in scene.proxy.requests("PUT")]
        assert s3_server.access_key in used[0]
        assert second[0] in used[-1]
        scene.judge()


def test_there_is_no_such_bucket(scene: Scene, open_store: OpenStore) -> None:
    store = Retrying(open_store("s3://no-such-bucket-here/p"), sleep=lambda pause_s: None)
    for verb, call in VERBS.items():
        with pytest.raises(StoreError, match=r"the bucket does not exist\. Create it, or check") as caught:
            call(store)
        assert type(caught.value) is StoreError, verb
    for error in (scene.run(store), scene.read(store)):
        assert type(error) is StoreError
        assert "the bucket does not exist" in str(error)
    scene.judge()


DENIED = {"PUT": "s3:PutObject", "GET": "s3:GetObject", "LIST": "s3:ListBucket", "DELETE": "s3:DeleteObject"}


@pytest.mark.parametrize("verb", DENIED)
def test_access_is_denied_to_one_verb(
    verb: str, s3_server: S3Server, scene: Scene, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By a policy of the server. Without the right to delete, saves go on and retention says so once."""
    if s3_server.kind != "radosgw":
        pytest.skip(f"{s3_server.kind} does not enforce policies")
    user = s3_server.new_user(f"denied-{verb.lower()}-{bucket}")
    who = {"Principal": {"AWS": [f"arn:aws:iam:::user/denied-{verb.lower()}-{bucket}"]}}
    where = {"Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]}
    allowed = [action for other, action in DENIED.items() if other != verb]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": allowed, **who, **where}]}
    s3_server.owner_client().put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    scene.settings["session"] = s3_server.session(*user)
    error = scene.run()
    if verb == "DELETE":
        assert error is None
        assert len([record for record in caplog.records if "could not be removed" in record.getMessage()]) == 1
    else:
        assert type(error) is StoreAccessError
        assert "Check the policies of user, bucket" in str(error)
        assert bucket in str(error)
    if verb in ("GET", "LIST"):
        assert type(scene.read()) is StoreAccessError
    if verb == "DELETE":  # what this user has written is its own, and not the owner's to read
        scene.judged_by["session"] = scene.settings["session"]
    scene.judge()


@contextlib.contextmanager
def refused_connection() -> Iterator[str]:
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_the_connection_is_refused(scene: Scene) -> None:
    with refused_connection() as url:
        _is_not_reached(scene, url, "refused")


@pytest.mark.parametrize("problem", [socket.EAI_NONAME, socket.EAI_AGAIN])
def test_the_name_is_not_known(problem: int, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a name server: the resolver's answer is played."""
    known = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **more: Any) -> Any:
        if host == "store.invalid":
            raise socket.gaierror(problem, "Name or service not known")
        return known(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    _is_not_reached(scene, "http://store.invalid:9000", "store.invalid")


@contextlib.contextmanager
def closes_at_once() -> Iterator[int]:
    """A port where connections are accepted and closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def test_tls_breaks_off(scene: Scene) -> None:
    """Worth another try, unlike a certificate that is not trusted."""
    with closes_at_once() as port:
        _is_not_reached(scene, f"https://127.0.0.1:{port}", "127.0.0.1")


def _is_not_reached(scene: Scene, url: str, words: str) -> None:
    """Nothing was sent, so nothing was written: an error for every verb, a job and a reader, that names the place."""
    inner = scene.open_store(endpoint_url=url, connect_timeout_s=2.0)
    now = [0.0]

    def patient() -> Retrying:
        now[0] = 0.0
        return Retrying(
            inner, give_up_s=3.0, sleep=lambda pause_s: now.__setitem__(0, now[0] + pause_s), clock=lambda: now[0]
        )

    for verb, call in VERBS.items():
        with pytest.raises(StoreUnavailableError, match=words) as caught:
            call(inner)
        assert caught.value.refused, verb
    for error in (scene.run(patient()), scene.read(patient())):
        assert type(error) is StoreUnavailableError
        assert "given up after" in str(error)
        assert words in str(error)
    scene.judge()


def test_a_certificate_that_nobody_vouches_for(s3_server: S3Server, scene: Scene, aws: pytest.MonkeyPatch) -> None:
    if s3_server.https_url is None:
        pytest.skip("the server has no TLS (radosgw with openssl has)")
    aws.delenv("AWS_CA_BUNDLE")
    scene.settings["endpoint_url"] = s3_server.https_url
    for error in (scene.run(), scene.read()):
        assert type(error) is StoreError
        assert "AWS_CA_BUNDLE" in str(error)
    scene.settings.clear()
    scene.judge()


def test_https_where_http_is_spoken(s3_server: S3Server, scene: Scene) -> None:
    url = s3_server.url.replace("http", "https")
    error = scene.run(Retrying(scene.open_store(endpoint_url=url), give_up_s=0.0))
    assert isinstance(error, StoreError)
    assert re.search(r"https|TLS|SSL", str(error)), str(error)
    scene.judge()


def test_http_where_https_is_spoken(s3_server: S3Server, scene: Scene) -> None:
    if s3_server.https_url is None:
        pytest.skip("the server has no TLS (radosgw with openssl has)")
    url = s3_server.https_url.replace("https", "http")
    error = scene.run(Retrying(scene.open_store(endpoint_url=url), give_up_s=0.0))
    assert type(error) is StoreUnavailableError  # the server closes the connection: no word says why
    assert "closed before the answer" in str(error)
    scene.judge()


def test_a_repository_that_cannot_be_asked_for_is_not_missing(
    scene: Scene, aws: pytest.MonkeyPatch, bucket: str
) -> None:
    """`load` of a prefix: there is no object of that name, and whether there is a repository could not be found out."""
    aws.setenv("AWS_ENDPOINT_URL_S3", scene.proxy.url)
    url = f"s3://{bucket}/p"
    assert fastckpt.load(url)["s"]["step"] == 1
    scene.proxy.add(Fault.ANSWER, match="fastckpt.json", status=403, code="AccessDenied", count=2)
    with pytest.raises(StoreAccessError, match="Check the policies"):
        fastckpt.load(url)
    scene.judge()


def test_a_region_that_is_not_the_servers(s3_server: S3Server, scene: Scene, aws: pytest.MonkeyPatch) -> None:
    """radosgw does not look at the region, so only the signature changes; a server that does look is in the table."""
    assert REGION != "eu-central-1"
    aws.setenv("AWS_REGION", "eu-central-1")
    assert scene.run() is None
    scene.judge()
