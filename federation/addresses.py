"""Which network addresses may be connected to, and how a name becomes addresses.

The check stands where a connection is made, on the resolved address, so that a name which changes its address between two
look-ups (DNS rebinding) passes nothing. Not here: which name to look up (`discovery.py`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import aiodns
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult

DNS_TIMEOUT_SECONDS = 3.0
DNS_TRIES = 2
MAX_ADDRESSES = 8
MAX_SRV_RECORDS = 8
MAX_REMEMBERED = 2_000

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# c-ares: the name has no such record (1), or does not exist (4).
_NO_SUCH_RECORD = frozenset({1, 4})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class SrvRecord:
    priority: int
    weight: int
    host: str
    port: int


class LookupFailed(Exception):
    """The name servers gave no answer; they may the next time."""


class Lookups(Protocol):
    """The network's rim: what is asked of the name system."""

    async def addresses(self, host: str) -> Sequence[str]:
        """Raises OSError where there are none."""
        ...

    async def srv(self, name: str) -> Sequence[SrvRecord]:
        """Empty where there are none. Raises LookupFailed."""
        ...


class SystemLookups:
    """Addresses as the operating system knows them (its hosts file included), SRV records from its name servers."""

    def __init__(self) -> None:
        self._resolver: aiodns.DNSResolver | None = None

    async def addresses(self, host: str) -> Sequence[str]:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))[:MAX_ADDRESSES]

    async def srv(self, name: str) -> Sequence[SrvRecord]:
        if self._resolver is None:
            self._resolver = aiodns.DNSResolver(timeout=DNS_TIMEOUT_SECONDS, tries=DNS_TRIES)
        try:
            answer = await self._resolver.query_dns(name, "SRV")
        except aiodns.error.DNSError as error:
            if error.args and error.args[0] in _NO_SUCH_RECORD:
                return []
            raise LookupFailed(name) from error
        except (ValueError, UnicodeError):
            return []
        return [
            SrvRecord(data.priority, data.weight, data.target.rstrip("."), data.port)
            for data in (record.data for record in answer.answer)
            if isinstance(data, pycares.SRVRecordData)
        ]

    async def close(self) -> None:
        if self._resolver is not None:
            await self._resolver.close()


def in_order(records: Sequence[SrvRecord]) -> list[tuple[str, int]]:
    """Where to try first: by priority, and within one by chance, in proportion to the weights (RFC 2782)."""
    usable = [record for record in records if record.host and 0 < record.port < 65536]
    usable.sort(key=lambda record: (record.priority, random.expovariate(max(record.weight, 0.01))))
    return [(record.host, record.port) for record in usable[:MAX_SRV_RECORDS]]


@dataclass(frozen=True, slots=True)
class AddressRule:
    """`here`: our own name means this machine, so that we speak with this machine only."""

    private: bool = False
    here: bool = False

    def allows(self, text: str) -> bool:
        try:
            address = _innermost(ipaddress.ip_address(text.partition("%")[0]))
        except ValueError:
            return False
        if address.is_loopback:
            return self.here or self.private
        if address.is_multicast or address.is_unspecified or address.is_reserved:
            return False
        if not address.is_global:
            return self.private
        return not self.here


def _innermost(address: Address) -> Address:
    """An IPv4 address may hide in an IPv6 one; what counts is where the packets go."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


@lru_cache(MAX_REMEMBERED)
def is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class CheckedResolver(AbstractResolver):
    """What aiohttp connects to: only addresses that the rule allows."""

    def __init__(self, lookups: Lookups, rule: AddressRule) -> None:
        self._lookups = lookups
        self._rule = rule

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._lookups.addresses(host)
        allowed = [address for address in found if self._rule.allows(address)]
        if not allowed:
            raise OSError(f"no address of {host} may be connected to")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in allowed
        ]

    async def close(self) -> None:
        return None
