"""Addresses of pictures: none leads into this network, nothing hostile hangs a reader or ends as another error."""

import ipaddress
import socket
import threading
import time

import pytest

from siq_vl.data import remote
from siq_vl.data.remote import checked_address, download_image, is_public

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"]
INSIDE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "0.0.0.0",
    "0.1.2.3",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.0.9",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.9",
    "192.88.99.1",
    "168.63.129.16",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2002:a00:1::",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "ff0e::1",
    "100::1",
    "3fff::1",
    "5f00::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_that_lead_inside(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:7f00:1]", "localhost", "0"],
)
def test_every_way_to_write_this_machine(host):
    with pytest.raises(ValueError, match="points into a private network"):
        download_image(f"http://{host}:8000/a.png")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.com/a.png", "not an http"),
        ("file:///etc/passwd", "not an http"),
        ("gopher://example.com/", "not an http"),
        ("http:///a.png", "not an http"),
        ("http://user@example.com/a.png", "a user or a password"),
        ("http://example.com:80@127.0.0.1/a.png", "a user or a password"),
        ("http://@127.0.0.1/", "a user or a password"),
        ("http://example.com\\@127.0.0.1/", "backslash"),
        ("http://example.com/\r\nHost: a", "control character"),
        ("http://example.com/\x00", "control character"),
        ("http://exam\nple.com/", "control character"),
        ("http://example.com:99999/", "not a valid address"),
        ("http://example.com:a/", "not a valid address"),
        ("http://[::1/", "not a valid address"),
        ("http://exam ple.com/", "a space in its host"),
        ("http://" + "\u00fc" * 70 + ".com/", "not a valid address"),
        ("http://example.com/" + "a" * 9000, "at most 8192"),
    ],
)
def test_addresses_that_are_refused_unresolved(url, message, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(ValueError, match=message):
        download_image(url)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTP://Example.com/a b.png", "http://example.com/a%20b.png"),
        (
            "http://example.com/caf\u00e9%20.png?q=\u00fc&r=%2F#part",
            "http://example.com/caf%C3%A9%20.png?q=%C3%BC&r=%2F",
        ),
        ("http://b\u00fccher.example:8080/", "http://xn--bcher-kva.example:8080/"),
        ("http://[2606:4700::1111]:8080/a", "http://[2606:4700::1111]:8080/a"),
    ],
)
def test_addresses_are_quoted(url, asked):
    assert checked_address(url) == asked
    assert checked_address(asked) == asked


class Server:
    """Answers every connection with what it is given: bytes, or a function of the connection."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/a.png"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        for answer in self.answers:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(65536))
                try:
                    answer(connection) if callable(answer) else connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    continue  # the reader has gone


@pytest.fixture
def serve(monkeypatch):
    """Starts a server, and lets this machine pass for a public one."""
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    servers = []

    def start(*answers):
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.listening.close()


OK = b"HTTP/1.1 200 OK\r\n"


def test_a_picture_is_read(serve):
    server = serve(
        OK + b"Content-Length: 4\r\n\r\nabcd",
        OK + b"\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    )
    assert [download_image(server.url) for _ in range(3)] == [b"abcd", b"abc", b"ab"]
    assert b"Accept-Encoding: identity" in server.asked[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "RemoteDisconnected"),
        (b"nonsense\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "BadStatusLine"),
        (OK + b"X: " + b"a" * 70000 + b"\r\n\r\n", "LineTooLong"),
        (OK + b"X: a\r\n" * 200 + b"\r\n", "HTTPException"),
        (OK + b"Content-Length: 9\r\n\r\nabcd", "it ends 5 bytes early"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab", "IncompleteRead"),
        (OK + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b", r"is compressed \(gzip\)"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP Error 404"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n", "points into a private network"),
        (b"HTTP/1.1 301 Found\r\nLocation: http://[64:ff9b::7f00:1]/\r\n\r\n", "points into a private network"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "not allowed|not an http"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://example.com/\r\n\r\n", "not an http"),
        (b"HTTP/1.1 307 Found\r\nLocation: http://a@10.0.0.1/\r\n\r\n", "a user or a password"),
    ],
)
def test_hostile_answers(serve, answer, message):
    with pytest.raises(ValueError, match=message):
        download_image(serve(answer).url)


def test_endless_redirects_end(serve):
    again = b"HTTP/1.1 302 Found\r\nLocation: /a%d.png\r\n\r\n"
    with pytest.raises(ValueError, match="infinite loop|redirect"):
        download_image(serve(*(again % place for place in range(30))).url)


def test_no_more_than_allowed_is_read(serve, monkeypatch):
    monkeypatch.setattr(remote, "MAX_BYTES", 1 << 20)

    def endless(connection):
        while True:
            connection.sendall(bytes(1 << 16))

    with pytest.raises(ValueError, match="larger than 1 MiB"):
        download_image(serve(lambda connection: (connection.sendall(OK + b"\r\n"), endless(connection))).url)


@pytest.mark.parametrize("start", [OK + b"\r\n", OK + b"X: ", b"HTTP/1.1 302 Found\r\nLocation: /b.png\r\n\r\n"])
def test_a_trickle_is_cut_off(serve, monkeypatch, start):
    """Each byte comes long before a time-out of the socket; only the whole takes too long."""
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.4)

    def trickle(connection):
        connection.sendall(start)
        for _ in range(300):
            connection.sendall(b"a")
            time.sleep(0.02)

    server = serve(trickle, trickle)
    with pytest.raises(ValueError, match="longer than 0.4 seconds"):
        download_image(server.url)


def test_a_name_that_changes_its_mind_gains_nothing(serve, monkeypatch):
    """The check and the connection use one answer of the resolver: a second one, which would lead inside, is never asked."""
    server = serve(OK + b"Content-Length: 2\r\n\r\nab")
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    answers = iter(["127.0.0.1", "10.0.0.1"])

    def resolve(host, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert download_image(f"http://rebinding.example:{port}/a.png") == b"ab"
    assert b"Host: rebinding.example" in server.asked[0]
    with pytest.raises(ValueError, match="points into a private network"):
        download_image(f"http://rebinding.example:{port}/a.png")


def test_one_address_inside_is_one_too_many(monkeypatch):
    def resolve(*_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ValueError, match="points into a private network"):
        download_image("http://both.example/a.png")


@pytest.mark.parametrize("port", [0, 22, 25, 1023])
def test_ports_of_other_services(port):
    with pytest.raises(ValueError, match="a port of other services"):
        download_image(f"http://8.8.8.8:{port}/a.png")


def test_proxies_are_not_asked(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:3128")
    assert download_image(serve(OK + b"Content-Length: 1\r\n\r\na").url) == b"a"


def test_every_private_block_of_python_is_refused():
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "64:ff9b::/96", "64:ff9b:1::/48"):
        block = ipaddress.ip_network(text)
        assert not is_public(str(block[0])) and not is_public(str(block[-1]))
