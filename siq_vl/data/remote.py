"""Pictures at web addresses: only where the user allowed it, and never from inside this machine's own network.

The one rule for addresses of the whole project: training rows, questions for teachers and the server all read through
`download_image`. What is checked is what is connected to: a name is resolved once, every address it has must be public,
and the connection goes to these addresses, on every redirect anew. So a name that changes its mind gains nothing.
"""

import ipaddress
import socket
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import BaseHandler, HTTPHandler, HTTPRedirectHandler, HTTPSHandler, ProxyHandler, build_opener

MAX_BYTES = 64 << 20
TIMEOUT_SECONDS = 30.0  # from the first connection to the last byte, redirects included
MAX_ADDRESS = 8192
_CHUNK = 1 << 16

# Addresses that Python calls global and that still lead inside, or to everybody.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # the metadata service of one large cloud, on a public address
        "2001::/23",  # Teredo and other protocol assignments
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
    )
)
_UNICAST_6 = ipaddress.ip_network("2000::/3")  # NAT64, mapped, site-local and multicast addresses lie outside


def is_remote(name: str) -> bool:
    """Return whether a picture's name is an address rather than a file."""
    return "://" in name


def is_public(address: str) -> bool:
    """Return whether a numeric address is one of the open internet.

    Private, loopback, link-local, shared (100.64/10), reserved, multicast and unspecified addresses are not, nor are those
    that stand for an IPv4 address: mapped, NAT64, 6to4, Teredo.
    """
    if "%" in address:  # the scope of a link-local address
        return False
    number = ipaddress.ip_address(address)
    if not number.is_global or number.is_multicast or number.is_reserved:
        return False
    if number.version == 6 and number not in _UNICAST_6:
        return False
    return not any(number in block for block in _NOT_PUBLIC)


def checked_address(url: str) -> str:
    """Return an `http` or `https` address as it is asked for: what is not ASCII is quoted.

    Nothing is resolved or sent here.

    Raises:
        ValueError: another scheme, user and password, control characters, no host, too long.
    """
    shown = repr(url if len(url) <= 120 else f"{url[:117]}...")
    if len(url) > MAX_ADDRESS:
        raise ValueError(f"{shown} has {len(url)} characters: addresses of pictures have at most {MAX_ADDRESS}")
    if any(ord(character) < 32 or ord(character) == 127 or character == "\\" for character in url):
        raise ValueError(f"{shown} holds a control character or a backslash: correct the address")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host and not host.isascii():
            host = host.encode("idna").decode("ascii")
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
        query = quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]|")
    except UnicodeError as error:
        raise ValueError(
            f"{shown} is not a valid address, since no host's name has such characters: correct it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{shown} is not a valid address ({error}): correct it") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{shown} is not an http(s) address: pictures are read from nothing else")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{shown} holds a user or a password: leave them out, or save the picture")
    if any(character.isspace() for character in host):
        raise ValueError(f"{shown} holds a space in its host: correct the address")
    named = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, named if port is None else f"{named}:{port}", path or "/", query, ""))


def download_image(url: str) -> bytes:
    """Return what lies at an `http` or `https` address, at most `MAX_BYTES` of it, within `TIMEOUT_SECONDS` in all.

    Proxies of the environment are not used: a proxy would resolve the name by itself.

    Raises:
        ValueError: an address that `checked_address` or `is_public` refuses, here or after a redirect; a port of other services; no answer in time;
            a broken, compressed or over-long one.
    """
    address = checked_address(url)
    deadline = _Deadline(TIMEOUT_SECONDS)
    opener = build_opener(ProxyHandler({}), _Http(deadline), _Https(deadline), _CheckedRedirect, _Uncompressed)
    data = bytearray()
    try:
        with opener.open(address, timeout=TIMEOUT_SECONDS) as reply:
            while len(data) <= MAX_BYTES and (piece := reply.read1(_CHUNK)):
                data += piece
            missing = getattr(reply, "length", None)  # what the header promised and nobody sent
    except (OSError, HTTPException, UnicodeError) as error:
        reason = _too_slow() if deadline.over() else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{url} cannot be downloaded ({reason}): check the address, or save the picture") from error
    finally:
        deadline.cancel()
    if len(data) > MAX_BYTES:
        raise ValueError(f"{url} is larger than {MAX_BYTES >> 20} MiB: make it smaller first")
    if deadline.passed or missing:
        reason = _too_slow() if deadline.passed else f"it ends {missing} bytes early"
        raise ValueError(f"{url} cannot be downloaded ({reason}): check the address, or save the picture")
    return bytes(data)


def _too_slow() -> str:
    return f"it took longer than {TIMEOUT_SECONDS:g} seconds"


class _Deadline:
    """Ends whatever connection is open when the time is over: a time-out of a socket begins anew with every byte."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self.passed = False
        self._timer = threading.Timer(seconds, self._over)
        self._timer.daemon = True
        self._timer.start()

    def left(self) -> float:
        if self.over():
            raise TimeoutError(_too_slow())
        return max(0.01, self._end - time.monotonic())

    def over(self) -> bool:
        return self.passed or time.monotonic() >= self._end

    def watch(self, connection: socket.socket) -> None:
        with self._lock:
            self._socket = connection
        self.left()

    def cancel(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._socket = None

    def _over(self) -> None:
        with self._lock:
            self.passed = True
            if self._socket is not None:
                try:
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # the TCP one, of a TLS socket too
                except OSError:  # it is closed already
                    return


def _connect(host: str, port: int, deadline: _Deadline) -> socket.socket:
    """Return a connection to a host all of whose addresses are public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    for *_, address in found:
        if not is_public(str(address[0])):
            raise ValueError(f"{host} points into a private network: give its picture as a file below the image root")
    if port not in (80, 443) and port < 1024:
        raise ValueError(
            f"{host}:{port} is a port of other services: pictures are read from ports 80, 443 and from 1024 on"
        )
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(deadline.left())
            connection.connect(address)
            deadline.watch(connection)  # which ends it from now on
            connection.settimeout(TIMEOUT_SECONDS + 1)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


class _Http(HTTPHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def http_open(self, req):
        deadline = self._deadline

        class Connection(HTTPConnection):
            def connect(self):
                self.sock = _connect(self.host, self.port, deadline)

        return self.do_open(Connection, req)


class _Https(HTTPSHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def https_open(self, req):
        deadline, context = self._deadline, ssl.create_default_context()

        class Connection(HTTPSConnection):
            def connect(self):
                plain = _connect(self.host, self.port, deadline)
                # The handshake comes after the deadline knows the socket: it can be slow too.
                self.sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
                deadline.watch(self.sock)
                self.sock.do_handshake()

        return self.do_open(Connection, req)


class _CheckedRedirect(HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return super().redirect_request(req, fp, code, msg, headers, checked_address(newurl))


class _Uncompressed(BaseHandler):
    def http_response(self, request, response):
        if 300 <= response.status < 400:
            response.close()  # what a redirect says beside its address would be read whole
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise ValueError(f"{request.full_url} is compressed ({coding}), which nobody asked for: save the picture")
        return response

    https_response = http_response
