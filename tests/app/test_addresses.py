"""The service opens addresses of the internet, and none of the network that it stands in, however they are written."""

import asyncio
import ipaddress
import socket

import pytest

pytest.importorskip("httpcore2", reason="httpcore2 is not installed (tcl_hf[serve])")
import httpcore2
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcl_hf.app.addresses import AddressError, PublicBackend, check_host, fetch, is_public
from tcl_hf.app.limits import Limits, RequestError

# Special addresses by the registries of IANA: this host, private, shared, loopback, link, protocol assignments,
# documentation, relays, benchmarks, multicast, reserved, broadcast.
SPECIAL_IPV4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/29"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
]
# Unspecified, loopback, mapped, compatible, NAT64, discard, Teredo, benchmarks, ORCHID, documentation, 6to4, unique
# local, link, site, multicast.
SPECIAL_IPV6 = [
    *("::/128", "::1/128", "::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32"),
    *("2001:2::/48", "2001:10::/28", "2001:db8::/32", "2002::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
]


def addresses_in(networks: list[str]) -> st.SearchStrategy:
    return st.sampled_from(networks).flatmap(lambda network: st.ip_addresses(network=network))


class Recorder(httpcore2.AsyncNetworkBackend):
    """Notes the addresses that connections are opened to, and answers each with the next of some answers."""

    def __init__(self, *answers: bytes):
        self.answers, self.opened = list(answers), []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.opened.append((host, port))
        return httpcore2.AsyncMockStream([self.answers.pop(0)])


def ok(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)


def redirect(target: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


def assert_refused(url: str) -> None:
    recorder = Recorder()
    with pytest.raises(AddressError):
        asyncio.run(fetch(url, Limits(seconds=5), recorder))
    assert not recorder.opened, url


def spellings(address: ipaddress.IPv4Address) -> list[str]:
    """An IPv4 address as resolvers of different systems read it."""
    number, parts = int(address), str(address).split(".")
    b = [int(part) for part in parts]
    return [
        str(address),
        f"{address}.",
        str(number),
        hex(number),
        f"0{number:o}",
        ".".join(f"0{part:o}" for part in b),
        ".".join(hex(part) for part in b),
        f"{b[0]}.{number & 0xFFFFFF}",
        f"{b[0]}.{b[1]}.{number & 0xFFFF}",
        f"[::ffff:{address}]",
        f"[::{address}]",
        f"[64:ff9b::{address}]",
        f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::]",
        f"[::ffff:0:{address}]",
        "".join(chr(ord(letter) + 0xFEE0) if letter.isdigit() else letter for letter in str(address)),  # full width
        f"user:password@{address}",
        f"example.org@{address}",
    ]


@settings(max_examples=60, deadline=None)
@given(addresses_in(SPECIAL_IPV4), st.integers(0, 16), st.sampled_from(["", ":80", ":8080"]))
@example(ipaddress.IPv4Address("127.0.0.1"), 2, "")
@example(ipaddress.IPv4Address("169.254.169.254"), 9, "")
def test_no_spelling_of_a_special_address_is_opened(address, number, port):
    assert_refused(f"http://{spellings(address)[number]}{port}/picture.png")


@settings(max_examples=40, deadline=None)
@given(addresses_in(SPECIAL_IPV6), st.sampled_from(["", "%25lo"]))
def test_no_special_ipv6_address_is_opened(address, zone):
    assert not is_public(f"{address}{zone}") and not is_public(str(address))
    assert_refused(f"http://[{address}{zone}]/picture.png")


@settings(max_examples=60, deadline=None)
@given(st.ip_addresses(v=4) | st.ip_addresses(v=6) | st.ip_addresses(network="2000::/3"))
def test_an_address_is_public_exactly_if_no_registry_reserves_it(address):
    special = SPECIAL_IPV4 if address.version == 4 else [*SPECIAL_IPV6, "2001::/23"]
    inside = any(address in ipaddress.ip_network(network) for network in special)
    unassigned = address.version == 6 and (
        address not in ipaddress.ip_network("2000::/3") or address in ipaddress.ip_network("3fff::/20")
    )
    # Anycast services that are outside of the reserved blocks although inside of protocol assignments.
    in_between = address in ipaddress.ip_network("192.0.0.0/24") if address.version == 4 else False
    if not in_between:
        assert is_public(str(address)) == (not inside and not unassigned)


@settings(max_examples=40, deadline=None)
@given(addresses_in(SPECIAL_IPV4) | addresses_in(SPECIAL_IPV6), st.booleans())
def test_a_name_that_resolves_to_a_special_address_is_not_opened(address, has_public_one_too):
    def resolve(host, port, *args, **kwargs):
        found = [str(address), *["8.8.8.8"] * has_public_one_too]
        families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in found]
        return [(family, socket.SOCK_STREAM, 6, "", (one, port)) for family, one in zip(families, found, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        assert_refused("https://pictures.example/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://127.0.0.1/",
        "http:///a.png",
        "http://",
        "//example.org/a.png",
        "http://localhost/a.png",
        "http://LOCALHOST:6379/",
        "http://ip6-localhost/",
        "http://127.1/",
        "http://0/",
        "http://0x7f000001/",
        "http://017700000001/",
        "http://①②⑦.⓪.⓪.①/",
        "http://1.1.1.1.1/",
        "http://134744072/",
        "http://0x08.8.8.8/",
        "http://008.8.8.8/",
        "http://[::1]:80/",
        "http://[::]/",
        "http://exa mple.org/",
        "http://user@8.8.8.8/",
        "http://" + "a" * 300 + ".example/",
        "http://\x00/",
    ],
)
def test_an_address_that_is_not_one_of_the_internet_is_refused(url):
    assert_refused(url)


@pytest.mark.parametrize("host", ["8.8.8.8", "example.org", "1.example", "2606:4700::1111", "0x.example", "a1"])
def test_names_and_plain_numbers_are_hosts(host):
    check_host(host)


def names(table: dict[str, list[str]], calls: list[str] | None = None):
    """A resolver that gives a name its addresses one after another, as an attacker's does."""

    def resolve(host, port, *args, **kwargs):
        if calls is not None:
            calls.append(host)
        answers = table.get(host, [host])
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    return resolve


def test_a_picture_is_fetched_from_the_address_that_was_checked(monkeypatch):
    """The name is resolved once, and the connection is opened to that number: a second answer would be 127.0.0.1."""
    calls: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", names({"rebinding.example": ["93.184.215.14", "127.0.0.1"]}, calls))
    recorder = Recorder(ok(b"content"))
    assert asyncio.run(fetch("http://rebinding.example:8080/a.png", Limits(), recorder)) == b"content"
    assert recorder.opened == [("93.184.215.14", 8080)] and calls == ["rebinding.example"]


def test_each_redirect_is_checked(monkeypatch):
    table = {"a.example": ["93.184.215.14"], "b.example": ["93.184.215.15"], "inside.example": ["10.0.0.5"]}
    monkeypatch.setattr(socket, "getaddrinfo", names(table))
    recorder = Recorder(redirect("http://b.example/b.png"), ok(b"b"))
    assert asyncio.run(fetch("http://a.example/a.png", Limits(), recorder)) == b"b"
    assert [host for host, _ in recorder.opened] == ["93.184.215.14", "93.184.215.15"]
    for target in (
        "http://inside.example/",
        "http://2130706433/",
        "file:///etc/passwd",
        "http://[::1]/",
        "//10.0.0.5/",
    ):
        recorder = Recorder(redirect(target))
        with pytest.raises(AddressError):
            asyncio.run(fetch("http://a.example/a.png", Limits(), recorder))
        assert [host for host, _ in recorder.opened] == ["93.184.215.14"]
    with pytest.raises(AddressError, match="redirects more than 3 times"):
        asyncio.run(fetch("http://a.example/", Limits(), Recorder(*[redirect("/again")] * 9)))


def test_an_answer_is_read_up_to_the_limit_only(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", names({"a.example": ["93.184.215.14"]}))
    with pytest.raises(RequestError, match="larger than") as error:
        asyncio.run(fetch("http://a.example/", Limits(image_bytes=10), Recorder(ok(b"a" * 11))))
    assert error.value.status == 413
    with pytest.raises(AddressError, match="status 404"):
        asyncio.run(fetch("http://a.example/", Limits(), Recorder(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")))
    with pytest.raises(AddressError, match="does not answer"):
        asyncio.run(fetch("http://a.example/", Limits(), Recorder(b"no answer of HTTP\r\n\r\n")))


def test_a_host_that_does_not_answer_ends_in_time(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", names({"a.example": ["93.184.215.14"]}))

    class Silent(Recorder):
        async def connect_tcp(self, *args, **kwargs):
            await asyncio.sleep(60)

    with pytest.raises(AddressError, match="does not answer"):
        asyncio.run(fetch("http://a.example/", Limits(seconds=0.05), Silent()))


def test_the_next_address_of_a_host_is_tried(monkeypatch):
    class FirstIsDown(Recorder):
        async def connect_tcp(self, host, *args, **kwargs):
            if host == "93.184.215.14":
                raise httpcore2.ConnectError("refused")
            return await super().connect_tcp(host, *args, **kwargs)

    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in ("93.184.215.14", "93.184.215.15")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    backend = FirstIsDown(ok(b""))
    asyncio.run(PublicBackend(backend).connect_tcp("a.example", 80))
    assert backend.opened == [("93.184.215.15", 80)]
