"""Finds the proxy for a server in the environment, and the Host header for the server."""

from __future__ import annotations

import base64
import ipaddress
import urllib.parse
import urllib.request

from fastckpt.errors import StoreError


def proxy_of(endpoint: str) -> tuple[str, int, dict[str, str]] | None:
    """Host, port and headers of the proxy that the environment names for an endpoint; None: no proxy. StoreError.

    Follows the same variables as boto3, and also accepts networks in NO_PROXY ("10.0.0.0/8"), as many other programs do.
    """
    parts = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    host = parts.hostname or ""
    if not url or urllib.request.proxy_bypass(parts.netloc) or _in_network(host, proxies.get("no", "")):
        return None
    unusable = (
        f"the environment's proxy for {parts.scheme}:// is none that can be used{{}}: expected http://host:port. Name the store's host in "
        "NO_PROXY if it is reached without one"
    )
    try:
        found = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    except ValueError as error:  # its text may contain the password
        raise StoreError(unusable.format("")) from (None if "@" in url else error)
    try:
        port = found.port or 80
    except ValueError:
        port = 0
    if found.scheme != "http" or not found.hostname or not port:
        raise StoreError(unusable.format(f" ({found.scheme}://{found.hostname})"))
    headers = {}
    if found.username is not None:
        words = f"{urllib.parse.unquote(found.username)}:{urllib.parse.unquote(found.password or '')}"
        headers["proxy-authorization"] = "Basic " + base64.b64encode(words.encode()).decode()
    return found.hostname, port, headers


def _in_network(host: str, no_proxy: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for word in no_proxy.split(","):
        try:
            if "/" in word and address in ipaddress.ip_network(word.strip(), strict=False):
                return True
        except (ValueError, TypeError):
            continue
    return False


def host_header(endpoint: str) -> str:
    """The Host header of requests to the endpoint."""
    parts = urllib.parse.urlsplit(endpoint)
    host = parts.netloc.rpartition("@")[2]
    return host.removesuffix(":443" if parts.scheme == "https" else ":80")
