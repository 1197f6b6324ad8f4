"""A small S3-like server whose manners can be changed: what stores, gateways and networks were reported to do, each in one function.

    with MannersServer() as server:
        server.manners.append(no_checksum_headers_501)
        open_s3("s3://lab/run", endpoint_url=server.url)

It holds objects in memory, speaks http or https on loopback, checks no signatures, and keeps a log. A manner is a function of the request;
it answers, and returns True, or returns False and lets the next one see it. Where Ceph's radosgw can show something, tests/s3 uses that.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import fnmatch
import hashlib
import itertools
import json
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.sax.saxutils import escape

import torch

from fastckpt.kernels.checksums import crc64nvme

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
Manner = Callable[["Request"], bool]


@dataclass
class Logged:
    method: str
    path: str
    headers: dict[str, str]
    body_bytes: int


class Request(BaseHTTPRequestHandler):
    """One request, as a manner sees it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms of waiting for an acknowledgement
    server: MannersServer
    body: bytes
    bucket: str
    key: str
    query: dict[str, str]
    more_headers: dict[str, str]
    """Of the answer."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | str = b"", headers: dict[str, str] | None = None) -> bool:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {**(headers or {}), **self.more_headers}.items():
            self.send_header(name, value)
        self.send_header("x-amz-request-id", f"REQ{next(self.server.ids):06d}")
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return True

    def refuse(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None) -> bool:
        """As S3 does: the answer to a HEAD has no body."""
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
        return self.answer(status, text, headers)

    def _work(self) -> None:
        self.more_headers = {}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        self.bucket, _, self.key = urllib.parse.unquote(parts.path)[1:].partition("/")
        with self.server.lock:
            self.server.log.append(Logged(self.command, self.path, dict(self.headers.items()), len(self.body)))
        if any(manner(self) for manner in list(self.server.manners)):
            return
        if self.bucket != "lab":
            self.refuse(404, "NoSuchBucket", "The specified bucket does not exist")
        elif self.command == "PUT":
            self._put()
        elif self.command == "DELETE":
            with self.server.lock:
                self.server.objects.pop(self.key, None)
            self.answer(204)
        elif "lifecycle" in self.query:
            self.refuse(404, "NoSuchLifecycleConfiguration", "The lifecycle configuration does not exist")
        elif not self.key:
            self._list()
        else:
            self._get()

    do_GET = do_PUT = do_HEAD = do_DELETE = _work

    def _put(self) -> None:
        with self.server.lock:
            if self.headers.get("If-None-Match") == "*" and self.key in self.server.objects:
                self.refuse(412, "PreconditionFailed")
                return
            wanted = self.headers.get("If-Match")
            if wanted is not None and self.key not in self.server.objects:
                self.refuse(404, "NoSuchKey")
                return
            if wanted is not None and wanted != _etag(self.server.objects[self.key]):
                self.refuse(412, "PreconditionFailed")
                return
            self.server.objects[self.key] = self.body
        self.answer(200, b"", {"ETag": _etag(self.body)})

    def _get(self) -> None:
        with self.server.lock:
            data = self.server.objects.get(self.key)
        if data is None:
            self.refuse(404, "NoSuchKey", "The specified key does not exist.")
            return
        headers = {"ETag": _etag(data), "Last-Modified": email.utils.formatdate(self.server.at_s, usegmt=True)}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found:
            self.answer(200, data, headers)
            return
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            self.refuse(416, "InvalidRange")
            return
        self.answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _list(self) -> None:
        prefix, after = self.query.get("prefix", ""), self.query.get("continuation-token", "")
        n = int(self.query.get("max-keys", 1000))
        with self.server.lock:
            keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
            sizes = {key: len(self.server.objects[key]) for key in keys}
        quote = urllib.parse.quote_plus if self.query.get("encoding-type") == "url" else escape
        at = datetime.datetime.fromtimestamp(self.server.at_s, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        rows = "".join(
            f"<Contents><Key>{quote(key)}</Key><LastModified>{at}</LastModified><Size>{sizes[key]}</Size></Contents>"
            for key in keys[:n]
        )
        more = "<IsTruncated>false</IsTruncated>"
        if len(keys) > n:
            more = (
                f"<IsTruncated>true</IsTruncated><NextContinuationToken>{escape(keys[n - 1])}</NextContinuationToken>"
            )
        coded = "<EncodingType>url</EncodingType>" if self.query.get("encoding-type") == "url" else ""
        self.answer(
            200,
            f"<?xml version='1.0'?><ListBucketResult xmlns='{NAMESPACE}'>{coded}{rows}{more}</ListBucketResult>",
        )

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class MannersServer(ThreadingHTTPServer):
    """One bucket, "lab". `tls`: certificate and key, as PEM files."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *, tls: tuple[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.objects: dict[str, bytes] = {}
        self.manners: list[Manner] = []
        self.log: list[Logged] = []
        self.lock = threading.RLock()
        self.ids = itertools.count(1)
        self.n_connections = 0
        self.at_s = time.time()
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self.server_address[1]
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def requests(self, method: str) -> list[Logged]:
        with self.lock:
            return [one for one in self.log if one.method == method]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Called once for each connection."""
        self.n_connections += 1
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""

    def __enter__(self) -> MannersServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()


def self_signed(folder: Path) -> tuple[str, str]:
    """Certificate and key as MinIO's documents have them made: `openssl req -x509`, which says CA:TRUE."""
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            "-days",
            "3",
            "-subj",
            "/CN=minio",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


def _checksum_header(request: Request) -> str:
    return next((name for name in request.headers if name.lower().startswith("x-amz-checksum-")), "")


def no_checksum_headers_501(request: Request) -> bool:
    """Cloudflare R2: aws/aws-sdk-js-v3#6810, boto/boto3#4392."""
    name = _checksum_header(request)
    return bool(name) and request.refuse(501, "NotImplemented", f"Header '{name}' with value 'x' not implemented")


def no_checksum_headers_400(request: Request) -> bool:
    """Backblaze B2: iterate-ch/cyberduck#16107, home-assistant/core#143995."""
    name = _checksum_header(request)
    return bool(name) and request.refuse(
        400, "InvalidArgument", f"Unsupported header '{name}' received for this API call."
    )


def object_lock(request: Request) -> bool:
    """A bucket with Object Lock wants a checksum with each PUT: S3's PutObject manual, "Content-MD5 or x-amz-sdk-checksum-algorithm"."""
    if request.command != "PUT" or request.headers.get("Content-MD5") or _checksum_header(request):
        return False
    return request.refuse(
        400,
        "InvalidRequest",
        "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters",
    )


def no_if_none_match(request: Request) -> bool:
    """Backblaze B2, by its documents, and S3-like servers of before 2024: the header is ignored, and the object overwritten."""
    if "If-None-Match" in request.headers:
        del request.headers["If-None-Match"]
    return False


def no_if_match(request: Request) -> bool:
    """As `no_if_none_match`, for the other condition."""
    if "If-Match" in request.headers:
        del request.headers["If-Match"]
    return False


def bare_if_match(request: Request) -> bool:
    """Ceph 16 compares If-Match with the ETag as it keeps it, without quotes: ceph/ceph, rgw_op.cc, RGWPutObj."""
    wanted = request.headers.get("If-Match")
    if wanted is not None:
        request.headers.replace_header("If-Match", f'"{wanted}"')
    return False


def if_match_is_never_met(request: Request) -> bool:
    return "If-Match" in request.headers and request.refuse(412, "PreconditionFailed")


def no_ranges(request: Request) -> bool:
    """A gateway or cache that sends the whole object with status 200, as RFC 9110, section 14.2, allows."""
    if "Range" in request.headers:
        del request.headers["Range"]
    return False


def verifies_checksums(request: Request) -> bool:
    """S3's manual, "Checking object integrity": a body that differs from its checksum is refused."""
    md5 = request.headers.get("Content-MD5")
    crc = request.headers.get("x-amz-checksum-crc64nvme")
    if md5 and md5 != base64.b64encode(hashlib.md5(request.body).digest()).decode():
        return request.refuse(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")
    if crc and crc != base64.b64encode(crc64nvme(request.body).to_bytes(8, "big")).decode():
        return request.refuse(400, "BadDigest", "The CRC64NVME you specified did not match what we received.")
    return False


def denies(policy: str) -> Manner:
    """A bucket's policy as S3's manual describes it, "Enforce conditional writes": its Deny statements with the condition Null."""
    statements = [one for one in json.loads(policy)["Statement"] if one["Effect"] == "Deny"]
    asked = {"s3:if-match": "If-Match", "s3:if-none-match": "If-None-Match"}

    def denied(request: Request, statement: Any) -> bool:
        name = f"arn:aws:s3:::{request.bucket}/{request.key}"
        return (
            request.command == "PUT"
            and "s3:PutObject" in statement["Action"]
            and any(fnmatch.fnmatchcase(name, resource) for resource in statement["Resource"])
            and all(
                (asked[condition] not in request.headers) == (null == "true")
                for condition, null in statement["Condition"]["Null"].items()
            )
        )

    return lambda request: any(denied(request, one) for one in statements) and request.refuse(403, "AccessDenied", "no")


def lifecycle(rules: str) -> Manner:
    """A bucket with rules: S3's API reference, "GetBucketLifecycleConfiguration"."""

    def manner(request: Request) -> bool:
        text = f"<LifecycleConfiguration xmlns='{NAMESPACE}'>{rules}</LifecycleConfiguration>"
        return "lifecycle" in request.query and request.answer(200, text)

    return manner


def about_rules(manner: Manner) -> Manner:
    """The same manner, to the question for lifecycle rules alone."""
    return lambda request: "lifecycle" in request.query and manner(request)


def requester_pays(request: Request) -> bool:
    """S3's manual, "Using Requester Pays buckets"; awslabs/s3-connector-for-pytorch#430."""
    return request.headers.get("x-amz-request-payer") != "requester" and request.refuse(403, "AccessDenied", "no")


def public_only(request: Request) -> bool:
    """A public bucket takes requests without a signature, not those with a key that it does not know: S3's manual, "Anonymous requests"."""
    return "Authorization" in request.headers and request.refuse(403, "InvalidAccessKeyId", "no such key")


def in_another_region(request: Request) -> bool:
    """S3's manual, "Request redirection": 301 without a Location, the region in a header; a HEAD has no body."""
    if "/eu-central-1/" in request.headers.get("Authorization", ""):
        return False
    return request.refuse(301, "PermanentRedirect", "wrong endpoint", {"x-amz-bucket-region": "eu-central-1"})


def redirects(status: int, to: str) -> Manner:
    """A load balancer before the store sends from http to https: demarche-numerique/ds_proxy#170, microsoft/pai#4685."""
    return lambda request: request.answer(status, b"", {"Location": to + request.path})


def refuses(status: int, code: str, message: str = "because", *, method: str = "") -> Manner:
    """One of S3's "Error responses", to every request or to those of one method."""
    return lambda request: method in ("", request.command) and request.refuse(status, code, message)


def login_page(methods: tuple[str, ...] = (), *, listings_only: bool = False) -> Manner:
    """A captive portal or a proxy answers everything with status 200 and HTML: RFC 6585, section 6, on captive portals."""

    def manner(request: Request) -> bool:
        if (methods and request.command not in methods) or (listings_only and "list-type" not in request.query):
            return False
        return request.answer(200, "<html><body>Please log in</body></html>", {"Content-Type": "text/html"})

    return manner


def no_encoding_type(request: Request) -> bool:
    """Gateways that do not know encoding-type=url, and send names as they are: minio/minio#2265."""
    request.query.pop("encoding-type", None)
    return False


def takes_all_answers_nothing(release: threading.Event) -> Manner:
    """A gateway whose disks hang: it reads the body and says nothing."""

    def manner(request: Request) -> bool:
        if request.command == "PUT":
            release.wait()
        return False

    return manner


class SilentServer:
    """Connections are accepted by the system and never answered: a process that hangs, a firewall that swallows."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> SilentServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


OBJECT = {"a": torch.arange(3)}


def is_object(found: Any) -> bool:
    return bool(torch.equal(found["a"], OBJECT["a"]))
