"""From a server name to where it lives: host, port, Host header and the name its certificate must bear.

The steps bear the standard's numbers. Addresses are looked up later, when a connection is made (`addresses.py`).
Spec: server-server-api/#resolving-server-names.
"""

from __future__ import annotations

import asyncio
import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import orjson
from yarl import URL

from federation.addresses import LookupFailed, Lookups, in_order, is_literal
from federation.joined import Joined
from federation.outward import AnswerTooLarge, Outward, read_at_most
from relay.clock import HOUR, MINUTE, SECOND, Clock
from relay.errors import RemoteError
from relay.ids import is_loopback_name, is_server_name, split_server_name

DEFAULT_PORT = 8448
# The second is deprecated, and asked for beside the first.
SERVICES = ("_matrix-fed._tcp", "_matrix._tcp")
WELL_KNOWN_PATH = "/.well-known/matrix/server"
WELL_KNOWN_SECONDS = 10.0
MAX_WELL_KNOWN_BYTES = 50 * 1024
MAX_REDIRECTS = 5
MAX_CACHED = 10_000

# Spec: 24 h where the answer says nothing, 48 h at most, errors up to an hour.
WELL_KNOWN_LIFETIME = 24 * HOUR
WELL_KNOWN_LIFETIME_MIN = 5 * MINUTE
WELL_KNOWN_LIFETIME_MAX = 48 * HOUR
ERROR_LIFETIME_MIN = MINUTE
ERROR_LIFETIME_MAX = HOUR
ROUTE_LIFETIME = 10 * MINUTE
UNSURE_ROUTE_LIFETIME = MINUTE

_MAX_AGE = re.compile(r"(?:^|,)\s*max-age\s*=\s*\"?(\d{1,12})")
_NOT_KEPT = re.compile(r"(?:^|,)\s*no-(?:store|cache)\b")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Route:
    """`targets` are tried in order. `step` is the standard's number, for people who look for a mistake."""

    targets: tuple[tuple[str, int], ...]
    host_header: str
    tls_name: str
    step: str


@dataclass(slots=True)
class _WellKnown:
    """`delegated` is None where there is no valid file; `good_until` bounds how long an old one stands in for a failure."""

    delegated: str | None
    expires: int
    asked_at: int
    good_until: int
    error_wait: int = 0


class _NoAnswer(Exception):
    """The file could not be had just now; that says nothing about whether there is one."""


class Discovery:
    def __init__(self, lookups: Lookups, outward: Outward, clock: Clock, *, well_known_port: int = 443) -> None:
        self._lookups = lookups
        self._outward = outward
        self._clock = clock
        self._well_known_port = well_known_port
        self._routes: dict[str, tuple[Route, int]] = {}
        self._well_knowns: dict[str, _WellKnown] = {}
        self._joined: Joined[Route] = Joined()

    async def route(self, server: str) -> Route:
        """Raises RemoteError where the name is none."""
        known = self._routes.get(server)
        if known is not None and known[1] > self._clock.now():
            return known[0]
        if not is_server_name(server):
            raise RemoteError(server, 0, "this is not a server name")
        return await self._joined.get(server, lambda: self._find(server))

    def forget(self, server: str) -> None:
        """Nothing answered there: next time it is looked up again, and an older well-known file asked for again."""
        self._routes.pop(server, None)
        entry = self._well_knowns.get(server)
        now = self._clock.now()
        if entry is not None and entry.delegated is not None and entry.asked_at + WELL_KNOWN_LIFETIME_MIN <= now:
            entry.expires = now

    async def _find(self, server: str) -> Route:
        host, port = split_server_name(server)
        sure = True
        until = self._clock.now() + ROUTE_LIFETIME
        if is_literal(host):
            route = Route(((host.strip("[]"), port or DEFAULT_PORT),), server, host.strip("[]"), "1")
        elif port is not None:
            route = Route(((host, port),), server, host, "2")
        else:
            well_known = await self._well_known(host)
            until = min(until, well_known.expires)
            if well_known.delegated is not None:
                route, sure = await self._delegated(well_known.delegated)
            else:
                route, sure = await self._by_name(host, ("4", "5", "6"))
        if not sure:
            until = min(until, self._clock.now() + UNSURE_ROUTE_LIFETIME)
        _bounded(self._routes)
        self._routes[server] = (route, until)
        return route

    async def _delegated(self, name: str) -> tuple[Route, bool]:
        host, port = split_server_name(name)
        if is_literal(host):
            return Route(((host.strip("[]"), port or DEFAULT_PORT),), name, host.strip("[]"), "3.1"), True
        if port is not None:
            return Route(((host, port),), name, host, "3.2"), True
        return await self._by_name(host, ("3.3", "3.4", "3.5"))

    async def _by_name(self, host: str, steps: tuple[str, str, str]) -> tuple[Route, bool]:
        """SRV records under the service's two names, then port 8448. The certificate is always for `host`, since DNS
        proves nothing."""
        if is_loopback_name(host):  # no name server knows it. RFC 6761, section 6.3
            return Route(((host, DEFAULT_PORT),), host, host, steps[2]), True
        found = await asyncio.gather(*(self._targets(f"{service}.{host}") for service in SERVICES))
        sure = all(targets is not None for targets in found)
        for targets, step in zip(found, steps, strict=False):
            if targets:
                return Route(tuple(targets), host, host, step), sure
        return Route(((host, DEFAULT_PORT),), host, host, steps[2]), sure

    async def _targets(self, name: str) -> list[tuple[str, int]] | None:
        """None where the name servers gave no answer."""
        try:
            return in_order(await self._lookups.srv(name))
        except LookupFailed:
            return None

    async def _well_known(self, host: str) -> _WellKnown:
        now = self._clock.now()
        old = self._well_knowns.get(host)
        if old is not None and old.expires > now:
            return old
        try:
            delegated, lifetime = await self._fetch(host)
        except _NoAnswer:
            delegated, lifetime = None, 0
            if old is not None and old.delegated is not None and old.good_until > now:
                delegated = old.delegated
        if lifetime:
            entry = _WellKnown(delegated, now + lifetime, now, now + WELL_KNOWN_LIFETIME_MAX)
        else:
            before = old.error_wait if old is not None else 0
            wait = min(ERROR_LIFETIME_MAX, max(ERROR_LIFETIME_MIN, 2 * before))
            entry = _WellKnown(delegated, now + wait, now, old.good_until if old is not None else now, wait)
        _bounded(self._well_knowns)
        self._well_knowns[host] = entry
        return entry

    async def _fetch(self, host: str) -> tuple[str | None, int]:
        """(delegated name or None, lifetime in ms; 0 where it is an error's). Raises _NoAnswer."""
        url = URL.build(scheme="https", host=host, port=self._well_known_port, path=WELL_KNOWN_PATH)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                answer = await self._outward.request("GET", url, timeout=WELL_KNOWN_SECONDS)
                try:
                    if answer.status in _REDIRECTS and "Location" in answer.headers:
                        url = url.join(URL(answer.headers["Location"]))
                        continue
                    if answer.status != 200:
                        if answer.status >= 500 or answer.status == 429:
                            raise _NoAnswer
                        return None, 0
                    delegated = _parsed(await read_at_most(answer, MAX_WELL_KNOWN_BYTES))
                    return delegated, _lifetime(answer.headers, self._clock.now()) if delegated is not None else 0
                finally:
                    answer.release()
        except AnswerTooLarge:
            return None, 0
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise _NoAnswer from error
        return None, 0


def _parsed(body: bytes) -> str | None:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    name = value.get("m.server") if isinstance(value, dict) else None
    return name if is_server_name(name) else None


def _lifetime(headers: Mapping[str, str], now: int) -> int:
    control = headers.get("Cache-Control", "").lower()
    given = WELL_KNOWN_LIFETIME
    if _NOT_KEPT.search(control):
        given = 0
    elif found := _MAX_AGE.search(control):
        given = int(found[1]) * SECOND
    elif "Expires" in headers:
        try:
            given = int(email.utils.parsedate_to_datetime(headers["Expires"]).timestamp() * SECOND) - now
        except (ValueError, OverflowError):
            given = 0
    return max(WELL_KNOWN_LIFETIME_MIN, min(WELL_KNOWN_LIFETIME_MAX, given))


def _bounded(cache: dict[str, T]) -> None:
    while len(cache) >= MAX_CACHED:
        del cache[next(iter(cache))]
