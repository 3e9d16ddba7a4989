"""Pictures at web addresses: only where the user allowed it, and never from inside this machine's own network."""

import ipaddress
import socket
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

MAX_BYTES = 64 << 20
TIMEOUT_SECONDS = 30


def is_remote(name: str) -> bool:
    """Return whether a picture's name is an address rather than a file."""
    return "://" in name


def download_image(url: str) -> bytes:
    """Return what lies at an `http` or `https` address, at most `MAX_BYTES` of it.

    Raises:
        ValueError: another kind of address, one inside this network, no answer in time, or an answer that is too long.
    """
    _refuse_local(url)
    try:
        with build_opener(_NoLocalRedirect).open(url, timeout=TIMEOUT_SECONDS) as reply:
            data = reply.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{url} cannot be downloaded ({error}): check the address, or save the picture") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{url} is larger than {MAX_BYTES >> 20} MiB: make it smaller first")
    return data


class _NoLocalRedirect(HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _refuse_local(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refuse_local(url: str) -> None:
    """Refuse addresses inside this network: a data set must not make this machine read its own services."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is not an http(s) address: pictures are read from nothing else")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise ValueError(f"{url} cannot be resolved ({error}): check the address") from error
    for *_, address in found:
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global:
            raise ValueError(f"{url} points into a private network: give its picture as a file below the image root")
