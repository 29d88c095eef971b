"""Which addresses an image may be fetched from: a task file of somebody else's must not make us ask our own network."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

from aiohttp.abc import AbstractResolver
from aiohttp.resolver import ThreadedResolver

if TYPE_CHECKING:
    from aiohttp.abc import ResolveResult

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are an IPv4 address."""


class PrivateAddressError(OSError):
    """The address is not a public one. `host` is what was asked for."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(f"{host} is {address}, which is not a public address")
        self.host = host
        self.address = address


def is_public(address: str) -> bool:
    """Whether anybody on the internet may have this address: neither private, nor loopback, nor link-local (where
    clouds keep their credentials), nor multicast; also not wrapped into IPv6."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def check_literal(host: str) -> None:
    """Raise `PrivateAddressError` where `host` is an address itself, in any of the ways of writing it, and no public
    one. Names are checked by `PublicResolver`, which is not asked about addresses."""
    address = host.strip("[]")
    if ":" not in address:
        try:
            address = socket.inet_ntoa(socket.inet_aton(address))  # 127.1, 0x7f000001 and 2130706433, too
        except (OSError, UnicodeError):
            return
    try:
        public = is_public(address)
    except ValueError:
        return
    if not public:
        raise PrivateAddressError(host, address)


def check_name(host: str) -> None:
    """Raise `PrivateAddressError` where `host`, a name or an address, is no public one now; `OSError` where nobody
    knows the name."""
    check_literal(host)
    for *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
        if not is_public(str(place[0]).partition("%")[0]):
            raise PrivateAddressError(host, str(place[0]))


class PublicResolver(AbstractResolver):
    """Finds the addresses of a name, and lets none through that is not public. The connection goes to one of those that
    it returns: a name that answers differently the next time gains nothing."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for one in found:
            if not is_public(one["host"]):
                raise PrivateAddressError(host, one["host"])
        return found

    async def close(self) -> None:
        await self._resolver.close()
