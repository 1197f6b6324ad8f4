"""A server that plays Google Cloud Storage's XML interface, as far as obstore uses it: that of S3, with generations as conditions.

Google's manual, "XML API: request preconditions": x-goog-if-generation-match: 0 creates, a number replaces that generation.
"""

from __future__ import annotations

from tests.s3.manners import MannersServer, Request


class GoogleServer(MannersServer):
    """One bucket, "lab"."""

    def __init__(self) -> None:
        super().__init__()
        self.generations: dict[str, int] = {}
        self.manners.append(_knows_generations)


def _knows_generations(request: Request) -> bool:
    server = request.server
    assert isinstance(server, GoogleServer)
    wanted = request.headers.get("x-goog-if-generation-match")
    if request.command == "PUT" and request.bucket == "lab":
        with server.lock:
            present = server.generations.get(request.key, 0) if request.key in server.objects else 0
            if wanted is not None and int(wanted) != present:
                return request.refuse(412, "PreconditionFailed")
            server.generations[request.key] = next(server.ids)
            server.objects[request.key] = request.body
            headers = {"ETag": '"etag"', "x-goog-generation": str(server.generations[request.key])}
        return request.answer(200, b"", headers)
    if request.command in ("GET", "HEAD") and request.key:
        request.more_headers = {"x-goog-generation": str(server.generations.get(request.key, 0))}
    return False
