"""Pictures from addresses of the internet, and from nowhere else: not from the network that the service stands in.

An address is judged by the numbers that its host resolves to. All of them have to be public, and the connection is
opened to one of these numbers, so that a name which resolves to something else a moment later gains nothing. Each
redirect goes through the same door. Proxies of the environment are not used, because they would resolve names anew.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any

import httpcore2
import httpx2

from .limits import Limits, RequestError

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
# Public IPv6 addresses are those of 2000::/3. Some of them stand for IPv4 addresses: Teredo and 6to4. Mapped addresses
# and those of NAT64 are outside of it.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_TUNNELS = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))
_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")  # of 6to4
_FAILURES = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)")


class AddressError(RequestError):
    """An address that is not opened, with the status 422."""

    def __init__(self, message: str):
        super().__init__(422, message)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a machine of the internet.

    It does not if it is private, of this machine, of this link, for several machines, reserved, or an IPv6 address that
    stands for an IPv4 address.
    """
    try:
        number = ipaddress.ip_address(address)
    except ValueError:  # also one with a zone, such as fe80::1%eth0
        return False
    if isinstance(number, ipaddress.IPv6Address):
        inside = number in _GLOBAL_UNICAST and not any(number in tunnel for tunnel in _TUNNELS)
        return inside and number.is_global and not number.is_multicast
    return number.is_global and not number.is_multicast and not number.is_reserved and number not in _RELAYS


def check_host(host: str) -> None:
    """Refuse a host that is a number in another form than four decimals with dots, or an IPv6 address in brackets.

    The system's resolver reads 2130706433, 0x7f.1 and 0177.0.0.1 as 127.0.0.1, but not every program does.

    Raises:
        AddressError: if it is one.
    """
    last = host.rstrip(".").rsplit(".", 1)[-1]
    if not host or (":" not in host and _NUMBER.fullmatch(last) and not _is_dotted(host)):
        raise AddressError(f"{host!r} is not the name of a host; write an address as https://name/picture.jpg.")


def _is_dotted(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)  # refuses leading zeros, which some programs read as octal
    except ValueError:
        return False
    return True


async def public_addresses(host: str, port: int) -> list[str]:
    """The IP addresses of a host, all of which are public.

    Raises:
        AddressError: if the host is unknown, or one of its addresses is not public.
    """
    check_host(host)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"The host {host!r} cannot be found; check the address.") from error
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise AddressError(f"The host {host!r} is not one of the internet; send the picture itself.")
    return addresses


class PublicBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections to public addresses only. The name of the host is resolved here and nowhere else."""

    def __init__(self, backend: httpcore2.AsyncNetworkBackend | None = None):
        self.backend = backend or httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to one of the host's addresses; TLS is still checked against the name.

        See `httpcore2.AsyncNetworkBackend` for the arguments.

        Raises:
            AddressError: see `public_addresses`.
            httpcore2.ConnectError: if none of the addresses answers.
        """
        error: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in await public_addresses(host, port):
            try:
                return await self.backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failed:
                error = failed
        raise error


def checked_url(text: str) -> httpx2.URL:
    """The address as a URL of http or https, without a user in it.

    Raises:
        AddressError: if it is not one.
    """
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        raise AddressError(f"{text[:100]!r} is not an address; write it as https://name/picture.jpg.") from error
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise AddressError(f"{text[:100]!r} is not opened; write an address as https://name/picture.jpg.")
    check_host(url.host)
    return url


async def fetch(address: str, limits: Limits, backend: httpcore2.AsyncNetworkBackend | None = None) -> bytes:
    """The content of an address of the internet, after at most `MAX_REDIRECTS` redirects.

    Args:
        backend: opens the connections once their addresses are checked; that of the system if None.

    Raises:
        AddressError: if the address, or one that it redirects to, is not of the internet, or nothing is found there.
        RequestError: with the status 413, if the content is larger than a picture may be.
    """
    url = checked_url(address)
    try:
        async with (
            asyncio.timeout(limits.seconds),
            httpcore2.AsyncConnectionPool(network_backend=PublicBackend(backend)) as pool,
        ):
            for _ in range(MAX_REDIRECTS + 1):
                target, content = await _get(pool, url, limits)
                if target is None:
                    return content
                url = checked_url(str(url.join(target)))
    except (*_FAILURES, OSError) as error:  # TimeoutError is one of the latter
        raise AddressError(f"{address[:100]!r} does not answer; check it, or send the picture itself.") from error
    raise AddressError(f"{address[:100]!r} redirects more than {MAX_REDIRECTS} times; send where it leads to.")


async def _get(pool: httpcore2.AsyncConnectionPool, url: httpx2.URL, limits: Limits) -> tuple[str | None, bytes]:
    """The address that an answer redirects to, or None, and its content."""
    host = url.netloc  # the name as it stands in the address, because one machine serves several names
    headers = [(b"Host", host), (b"User-Agent", b"tcl_hf"), (b"Accept", b"image/*"), (b"Accept-Encoding", b"identity")]
    async with pool.stream("GET", str(url), headers=headers) as response:
        named = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS and b"location" in named:
            return named[b"location"], b""
        if response.status != 200:
            raise AddressError(
                f"{str(url)[:100]!r} answers with the status {response.status}; send the picture itself."
            )
        content = bytearray()
        async for chunk in response.aiter_stream():
            content += chunk
            if len(content) > limits.image_bytes:
                raise RequestError(
                    413, f"The file at {str(url)[:100]!r} is larger than {limits.image_bytes / 1e6:.1f} MB."
                )
        return None, bytes(content)
