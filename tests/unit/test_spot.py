"""Notices: the metadata client against a real server on loopback, sources, watcher, decision."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.events import NoticeReceived, subscribe
from fastckpt.spot import Ec2Source, FileSource, Notice, SignalSource, Watcher, machine, open_sources
from fastckpt.spot import select as spot_open
from fastckpt.spot.ladder import GUARD_S, Rung, rung_of
from fastckpt.spot.sources.imds import ImdsClient, MetadataUnavailable
from fastckpt.testing.metadata_server import FAULTS, MetadataServer

SHORT_S = 20.0  # no wait of these tests comes near it


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as running:
        yield running


def test_absent_items_are_none_and_one_token_serves_many_requests(server: MetadataServer) -> None:
    client = ImdsClient(server.url)
    assert client.get("latest/meta-data/spot/instance-action") is None
    assert client.get("latest/meta-data/instance-type").text == "g5.xlarge"  # type: ignore[union-attr]
    assert [method for method, _ in server.requests] == ["PUT", "GET", "GET"]


def test_a_stale_token_is_replaced(server: MetadataServer) -> None:
    client = ImdsClient(server.url)
    client.get("latest/meta-data/instance-id")
    server.expire_tokens()
    assert client.get("latest/meta-data/instance-id") is not None
    assert [method for method, _ in server.requests] == ["PUT", "GET", "GET", "PUT", "GET"]


def test_a_token_is_renewed_before_it_expires(server: MetadataServer) -> None:
    now = [0.0]
    client = ImdsClient(server.url, clock=lambda: now[0])
    client.get("latest/meta-data/instance-id")
    now[0] = 21600 - 59
    client.get("latest/meta-data/instance-id")
    assert [method for method, _ in server.requests] == ["PUT", "GET", "PUT", "GET"]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "truncated"])
def test_every_fault_is_one_error_within_the_time_out(server: MetadataServer, fault: str) -> None:
    server.fault = fault
    client = ImdsClient(server.url, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(MetadataUnavailable) as caught:
        client.get("latest/meta-data/spot/instance-action")
    assert time.monotonic() - started < 5
    assert server.url in str(caught.value)
    assert not any(path.startswith("http") for _, path in server.requests)


def test_a_truncated_notice_is_still_a_notice(server: MetadataServer) -> None:
    source = Ec2Source(ImdsClient(server.url))
    source.poll(0.0)
    server.items["spot/instance-action"] = '{"action":"term'
    (notice,) = source.poll(100.0)
    assert (notice.kind, notice.deadline_s) == ("terminate", 220.0)


def test_proxies_are_not_asked(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert ImdsClient(server.url).get("latest/meta-data/instance-id") is not None


def test_the_environment_is_botocores() -> None:
    assert ImdsClient.from_env({"AWS_EC2_METADATA_DISABLED": "True"}) is None
    assert ImdsClient.from_env({}).endpoint == "http://169.254.169.254"  # type: ignore[union-attr]
    assert "fd00" in ImdsClient.from_env({"AWS_IMDS_USE_IPV6": "true"}).endpoint  # type: ignore[union-attr]
    both = {"AWS_IMDS_USE_IPV6": "true", "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "ipv4"}
    assert "169" in ImdsClient.from_env(both).endpoint  # type: ignore[union-attr]
    for wrong in ("https://x", "http://u:p@x", "http://x/y", "ftp://x", "http://x:99999"):
        with pytest.raises(ValueError, match="metadata service"):
            ImdsClient.from_env({"AWS_EC2_METADATA_SERVICE_ENDPOINT": wrong})
    with pytest.raises(ValueError, match="TIMEOUT"):
        ImdsClient.from_env({"AWS_METADATA_SERVICE_TIMEOUT": "soon"})


def test_the_deadline_goes_by_the_services_clock(server: MetadataServer) -> None:
    server.skew_s = 300  # this machine's clock is five minutes behind
    server.post_notice(in_s=100)
    (notice,) = Ec2Source(ImdsClient(server.url)).poll(1000.0)
    assert notice.deadline_s == pytest.approx(1100, abs=2)


@pytest.mark.parametrize(
    ("action", "in_s", "kind", "left"),
    [
        ("terminate", 100, "terminate", 100),
        ("stop", 9999, "stop", 120),
        ("hibernate", 100, "hibernate", 0),
        ("melt", -5, "terminate", 0),
    ],
)
def test_actions(server: MetadataServer, action: str, in_s: float, kind: str, left: float) -> None:
    server.post_notice(action, in_s)
    source = Ec2Source(ImdsClient(server.url))
    (notice,) = source.poll(50.0)
    assert notice.kind == kind
    assert notice.final
    assert notice.deadline_s == pytest.approx(50 + left, abs=2)
    assert source.poll(52.0) == [], "one notice is reported once"


def test_early_warning_lifecycle_and_stale_times(server: MetadataServer) -> None:
    source = Ec2Source(ImdsClient(server.url))
    server.items["spot/termination-time"] = "2015-01-05T18:02:00Z"
    assert source.poll(0.0) == []
    server.post_rebalance()
    (early,) = source.poll(0.0)
    assert (early.kind, early.final) == ("rebalance", False)
    server.post_lifecycle_end()
    assert [notice.kind for notice in source.poll(0.0)] == ["lifecycle"]


def test_a_file_is_a_notice(tmp_path: Path) -> None:
    source = FileSource(tmp_path / "notice")
    assert source.poll(0.0) == []
    (tmp_path / "notice").write_text("90\nreclaim")
    assert source.poll(10.0)[0].deadline_s == 100
    assert source.poll(12.0) == []
    with pytest.raises(OSError, match="directory"):
        FileSource(tmp_path).poll(0.0)


class Broken:
    name = "broken"

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.working = False

    def poll(self, now_s: float) -> list[Notice]:
        self.asked.release()
        if self.working:
            return [Notice("terminate", self.name, now_s + 5)]
        raise RuntimeError("no")


def test_the_watcher_survives_its_sources_and_says_that_it_is_blind() -> None:
    source = Broken()
    watcher = Watcher([source], poll_s=0.01)
    watcher.start()
    try:
        for _ in range(3):
            assert source.asked.acquire(timeout=SHORT_S)
        assert "broken" in watcher.blind
        assert watcher.final is None
        source.working = True
        deadline = time.monotonic() + SHORT_S
        while watcher.final is None:
            assert time.monotonic() < deadline
        assert watcher.blind == {}
    finally:
        watcher.close()
        watcher.close()


def test_times_are_those_of_the_given_clock() -> None:
    now_s, source, received = 100.0, Broken(), list[NoticeReceived]()
    watcher = Watcher([source], clock=lambda: now_s)
    watcher.poll()
    now_s = 700.0
    watcher.poll()
    assert watcher.blind == {"broken": 100.0}
    source.working = True
    with subscribe(lambda event: received.append(event) if isinstance(event, NoticeReceived) else None):
        watcher.poll()
    assert watcher.blind == {}
    assert watcher.final is not None
    assert watcher.final.deadline_s == 705.0
    assert [event.seconds_left for event in received] == [5.0]


def test_garbage_from_a_source_is_told_and_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    class Strange(Broken):
        def poll(self, now_s: float) -> list[Notice]:
            self.asked.release()
            notice = [Notice("rebalance", self.name, None)] if self.working else []
            return [None, *notice, "soon"]  # type: ignore[list-item]

    source = Strange()
    watcher = Watcher([source])
    watcher.poll()
    assert watcher.early is None
    source.working = True
    watcher.poll()
    assert watcher.early is not None
    assert "poll returned NoneType, str: expected fastckpt.spot.Notice" in caplog.text


@pytest.mark.parametrize("fault", [*FAULTS])
def test_a_service_that_recovers_is_heard(server: MetadataServer, fault: str) -> None:
    server.fault = fault
    source = Ec2Source(ImdsClient(server.url, timeout_s=0.3))
    watcher = Watcher([source])
    for _ in range(2):
        watcher.poll()
    assert source.name in watcher.blind
    server.fault = None
    server.released.set()
    server.post_notice(in_s=100)
    watcher.poll()
    assert watcher.blind == {}
    assert watcher.final is not None


def test_the_earliest_deadline_counts() -> None:
    watcher = Watcher([])
    for deadline in (None, 50.0, 90.0, 20.0):
        watcher._take(Notice("terminate", "x", deadline))
    assert watcher.final is not None
    assert watcher.final.deadline_s == 20.0


def test_hostile_replies_never_leave_the_watcher(server: MetadataServer) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    source = Ec2Source(ImdsClient(server.url))
    watcher = Watcher([source])
    strange = '{"action":"stop","time":"9999-99-99T99:99:99Z"}'
    samples = ['{"action":[],"time":{}}', "[" * 60000, "null", "\x00" * 50, strange, "-1e999", "ü" * 999]
    for _ in range(300):
        text = (
            rng.choice(samples)
            if rng.random() < 0.5
            else bytes(rng.choices(range(1, 128), k=rng.randrange(200))).decode()
        )
        for path in ("spot/instance-action", "spot/termination-time", "events/recommendations/rebalance"):
            server.items.pop(path, None)
            if rng.random() < 0.6:
                server.items[path] = text
        watcher._ask(source)
    assert watcher.final is not None
    assert watcher.final.seconds_left(time.monotonic()) <= 120


@pytest.mark.parametrize("text", ["abc", "-1", "nan", ""])
def test_a_grace_that_is_no_time_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_SIGTERM_GRACE_S", text)
    with pytest.raises(ValueError, match=f"FASTCKPT_SIGTERM_GRACE_S is '{text}': expected seconds, a number ≥ 0"):
        SignalSource()
    SignalSource(grace_s=5.0)


def test_a_handler_set_after_ours_stays() -> None:
    source = SignalSource((signal.SIGUSR2,))
    before = signal.getsignal(signal.SIGUSR2)
    source.install()

    def mine(number: int, frame: object) -> None:
        pass

    signal.signal(signal.SIGUSR2, mine)
    try:
        source.close()
        assert signal.getsignal(signal.SIGUSR2) is mine
    finally:
        signal.signal(signal.SIGUSR2, before)


GOOGLE = {"sys_vendor": "Google\n", "product_name": "Google Compute Engine\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"sys_vendor": "Amazon EC2\n"}, "Amazon EC2"),
        ({"sys_vendor": "Xen\n", "bios_version": "4.11.amazon\n"}, "Amazon EC2"),
        (GOOGLE, "Google Cloud"),
        ({"sys_vendor": "Microsoft Corporation\n"}, None),
        ({"chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n"}, "Azure"),
        ({"chassis_asset_tag": "OracleCloud.com\n"}, "Oracle Cloud"),
        ({"sys_vendor": "\x00\udcff" * 5000, "product_name": ""}, None),
    ],
)
def test_the_firmware_tells_the_cloud(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "bios_vendor").mkdir()  # whatever it is
    assert machine.cloud(str(tmp_path)) == expected
    assert machine.cloud(str(tmp_path / "nowhere")) is None


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Pretends to be on a cloud, with no variable that says anything else."""
    for name in ("AWS_EC2_METADATA_DISABLED", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "FASTCKPT_NOTICE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(spot_open, "_said", set())
    return lambda cloud: monkeypatch.setattr(spot_open, "cloud", lambda: cloud)


def test_on_another_cloud_it_is_said_once_that_only_signals_are_watched(
    on: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on("Azure")
    monkeypatch.setenv("FASTCKPT_NOTICE_FILE", "/x")
    for _ in range(2):
        assert [source.name for source in open_sources("auto")] == ["SIGTERM", "file /x"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "on Azure, whose notices are not read: only SIGTERM and file /x" in record.getMessage()
    caplog.clear()
    open_sources("signal")
    assert caplog.records == []
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")  # somebody wants it asked
    assert open_sources("auto")[0].name == "ec2"


@pytest.mark.parametrize(
    ("cloud", "told", "level"), [("Amazon EC2", False, "WARNING"), (None, True, "WARNING"), (None, False, "INFO")]
)
def test_on_ec2_it_is_said_that_no_notice_can_come(
    server: MetadataServer,
    on: Callable[[str | None], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cloud: str | None,
    told: bool,
    level: str,
) -> None:
    caplog.set_level("INFO")
    on(cloud)
    server.fault = "hop-limit"
    if told:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "0.2")
    monkeypatch.setattr("fastckpt.spot.sources.imds._IPV4", server.url)
    watcher = Watcher(open_sources("auto"), poll_s=0.01)
    watcher.start()
    try:
        deadline = time.monotonic() + SHORT_S
        while not watcher.blind:
            assert time.monotonic() < deadline
    finally:
        watcher.close()
        assert watcher._thread is not None
        watcher._thread.join(SHORT_S)
    said = [record for record in caplog.records if "no notice can come from ec2" in record.getMessage()]
    assert {record.levelname for record in said} == {level}
    assert "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2" in said[0].getMessage()
    assert len([record for record in caplog.records if "watched for notices: ec2, SIGTERM" in record.getMessage()]) == 1


def test_what_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(spot_open, "cloud", lambda: None)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("FASTCKPT_NOTICE_FILE", raising=False)
    assert [s.name for s in open_sources("auto")] == ["SIGTERM"]
    monkeypatch.setenv("FASTCKPT_NOTICE_FILE", "/x")
    assert [s.name for s in open_sources("auto")] == ["SIGTERM", "file /x"]
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    assert [s.name for s in open_sources("ec2, signal,file:/y")] == ["ec2", "SIGTERM", "file /y"]
    assert open_sources(None) == open_sources("off") == []
    for wrong in ("gcp", "file:", 3, [object()]):
        with pytest.raises(ValueError, match="spot"):
            open_sources(wrong)


times = st.one_of(st.none(), st.floats(0, 1000))


@given(left=times, fresh=times, in_flight=times)
def test_what_does_not_fit_is_not_begun_if_something_else_does(
    left: float | None, fresh: float | None, in_flight: float | None
) -> None:
    choice = rung_of(left, fresh, in_flight)
    if in_flight == 0:
        assert choice is Rung.FRESH
    elif None not in (left, fresh, in_flight):
        room = left - GUARD_S
        if choice is Rung.FINISH_THEN_FRESH:
            assert fresh + in_flight <= room
        if choice is Rung.FRESH:
            assert fresh <= room < fresh + in_flight
        if choice is Rung.FINISH:
            assert fresh > room
