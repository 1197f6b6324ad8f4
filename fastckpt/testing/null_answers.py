"""What a null server answers to a request that has arrived whole: the part of S3's protocol that fastckpt, boto3 and obstore use."""

from __future__ import annotations

import datetime
import email.utils
import re
import urllib.parse
import xml.etree.ElementTree as Xml
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from fastckpt.testing.null_objects import Conditions, Held, Objects, Piece, RefusedError

_XML = '<?xml version="1.0" encoding="UTF-8"?>'
_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# Questions about a bucket that a store without such settings refuses.
_UNSET = {
    "lifecycle": "NoSuchLifecycleConfiguration",
    "policy": "NoSuchBucketPolicy",
    "policyStatus": "NoSuchBucketPolicy",
    "publicAccessBlock": "NoSuchPublicAccessBlockConfiguration",
    "tagging": "NoSuchTagSet",
}


@dataclass
class Request:
    """A request without its body."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""

    @classmethod
    def parse(cls, head: bytes, headers: dict[str, str]) -> Request:
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        parts = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        return cls(method, urllib.parse.unquote(parts.path), query, headers)

    @property
    def bucket(self) -> str:
        return self.path[1:].partition("/")[0]

    @property
    def name(self) -> str:
        return self.path[1:].partition("/")[2]

    @property
    def is_aws_chunked(self) -> bool:
        return "aws-chunked" in self.headers.get("content-encoding", "") or self.headers.get(
            "x-amz-content-sha256", ""
        ).startswith("STREAMING-")

    @property
    def verb(self) -> str:
        """For counts: the method, or LIST."""
        return "LIST" if self.method == "GET" and not self.name else self.method


@dataclass
class Answer:
    """An answer, before its bytes go out. `headers` may state a length that a HEAD does not send."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterator[memoryview] | None = None
    n_bytes: int = 0


def answer(objects: Objects, request: Request, body: Piece) -> Answer:
    """Carry a request out."""
    try:
        if not request.name:
            return _of_bucket(objects, request, body)
        if request.method == "POST" or "uploadId" in request.query:
            return _of_upload(objects, request, body)
        if request.method == "PUT":
            held = objects.put(request.bucket, request.name, (body,), _conditions(request))
            return Answer(headers={"ETag": f'"{held.etag}"'})
        if request.method == "DELETE":
            objects.delete(request.bucket, request.name)
            return Answer(204)
        if request.method in ("GET", "HEAD"):
            return _read(objects, request)
        raise RefusedError(405, "MethodNotAllowed")
    except RefusedError as error:
        return _text(f"<Error><Code>{error.code}</Code><Message>of the null server</Message></Error>", error.status)


def _conditions(request: Request) -> Conditions:
    return Conditions(request.headers.get("if-none-match") == "*", request.headers.get("if-match", ""))


def _text(xml: str, status: int = 200) -> Answer:
    data = (_XML + xml).encode()
    return Answer(status, {"Content-Type": "application/xml"}, iter([memoryview(data)]), len(data))


def _read(objects: Objects, request: Request) -> Answer:
    held = objects.get(request.bucket, request.name)
    size = held.n_bytes
    headers = {
        "ETag": f'"{held.etag}"',
        "Last-Modified": email.utils.formatdate(held.modified_s, usegmt=True),
        "Accept-Ranges": "bytes",
        "Content-Type": "binary/octet-stream",
    }
    start, stop, status = 0, size, 200
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    if found and (found[1] or found[2]):
        start = int(found[1]) if found[1] else max(0, size - int(found[2]))
        stop = min(size, int(found[2]) + 1) if found[1] and found[2] else size
        if start >= size:
            raise RefusedError(416, "InvalidRange")
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(status, headers, objects.read(held, start, stop), stop - start)


def _of_bucket(objects: Objects, request: Request, body: Piece) -> Answer:
    if request.method == "POST" and "delete" in request.query:
        keys = [element.text or "" for element in _elements(body) if element.tag == "Key"]
        for key in keys:
            objects.delete(request.bucket, key)
        rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return _text(f"<DeleteResult {_NAMESPACE}>{rows}</DeleteResult>")
    if request.method in ("PUT", "HEAD"):
        return Answer()
    if request.method == "DELETE":
        return Answer(204)
    unset = next((code for question, code in _UNSET.items() if question in request.query), None)
    if unset is not None:
        raise RefusedError(404, unset)
    if "versioning" in request.query:
        return _text(f"<VersioningConfiguration {_NAMESPACE}/>")
    if "location" in request.query:
        return _text(f"<LocationConstraint {_NAMESPACE}/>")
    return _list(objects, request)


def _list(objects: Objects, request: Request) -> Answer:
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after") or query.get("marker") or ""
    page = objects.page(request.bucket, prefix, after, min(1000, int(query.get("max-keys") or 1000)), delimiter)
    coded = query.get("encoding-type") == "url"

    def quote(name: str) -> str:
        return urllib.parse.quote(name) if coded else escape(name)

    rows = "".join(_row(quote(name), held) for name, held in page.objects)
    folders = "".join(f"<CommonPrefixes><Prefix>{quote(one)}</Prefix></CommonPrefixes>" for one in page.folders)
    token = f"<NextContinuationToken>{escape(page.last)}</NextContinuationToken>" if page.last else ""
    return _text(
        f"<ListBucketResult {_NAMESPACE}><Name>{escape(request.bucket)}</Name><Prefix>{quote(prefix)}</Prefix>"
        f"<KeyCount>{len(page.objects) + len(page.folders)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"{'<EncodingType>url</EncodingType>' if coded else ''}"
        f"<IsTruncated>{str(bool(page.last)).lower()}</IsTruncated>{token}{rows}{folders}</ListBucketResult>"
    )


def _row(name: str, held: Held) -> str:
    at = datetime.datetime.fromtimestamp(held.modified_s, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return (
        f'<Contents><Key>{name}</Key><LastModified>{at}</LastModified><ETag>"{held.etag}"</ETag>'
        f"<Size>{held.n_bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def _of_upload(objects: Objects, request: Request, body: Piece) -> Answer:
    upload = request.query.get("uploadId", "")
    where = f"<Bucket>{escape(request.bucket)}</Bucket><Key>{escape(request.name)}</Key>"
    if request.method == "POST" and "uploads" in request.query:
        begun = f"<UploadId>{objects.begin_upload()}</UploadId>"
        return _text(f"<InitiateMultipartUploadResult {_NAMESPACE}>{where}{begun}</InitiateMultipartUploadResult>")
    if request.method == "PUT":
        held = objects.put_part(upload, int(request.query.get("partNumber", "0")), body)
        return Answer(headers={"ETag": f'"{held.etag}"'})
    if request.method == "POST":
        held = objects.complete(upload, request.bucket, request.name, _conditions(request))
        etag = f'<ETag>"{held.etag}"</ETag>'
        return _text(f"<CompleteMultipartUploadResult {_NAMESPACE}>{where}{etag}</CompleteMultipartUploadResult>")
    if request.method == "DELETE":
        objects.abort(upload)
        return Answer(204)
    raise RefusedError(405, "MethodNotAllowed")


def _elements(body: Piece) -> Iterator[Xml.Element]:
    if isinstance(body, int):
        raise RefusedError(400, "MalformedXML")
    try:
        root = Xml.fromstring(bytes(body))
    except Xml.ParseError:
        raise RefusedError(400, "MalformedXML") from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        yield element


def aws_chunks(data: bytearray) -> bytearray:
    """The body inside the framing `aws-chunked`; checksums and signatures of it are not looked at."""
    out, at = bytearray(), 0
    while True:
        end = data.index(b"\r\n", at)
        n = int(bytes(data[at:end]).split(b";")[0], 16)
        if not n:
            return out
        out += data[end + 2 : end + 2 + n]
        at = end + 2 + n + 2
