"""One pool of TLS connections to the rest of the world: every request that leaves for another server goes through here.

It knows addresses, certificates, redirects and time; not server names or signatures (`connections.py`). Connections are
kept and used again per target, port and name on the certificate, never for another name.
"""

from __future__ import annotations

import resource
import ssl
from collections.abc import Mapping
from pathlib import Path

import aiohttp
from yarl import URL

from federation.addresses import AddressRule, CheckedResolver, Lookups, is_literal
from federation.exchange import Exchanges, Reply
from relay.errors import RemoteError

# In use at once; fewer where the process may not have so many files open.
MAX_CONNECTIONS = 1_000
MAX_CONNECTIONS_PER_TARGET = 16
KEEP_IDLE_SECONDS = 90.0
CONNECT_SECONDS = 10.0
DNS_CACHE_SECONDS = 300

# Compressed answers are not asked for: a small one can unfold to any size.
_HEADERS = {"User-Agent": "Sealed-Relay", "Accept-Encoding": "identity"}


def tls_context(extra_ca_file: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if extra_ca_file is not None:
        context.load_verify_locations(cafile=extra_ca_file)
    return context


class Outward:
    """Made anywhere, opened by the first request, closed by the server."""

    def __init__(self, lookups: Lookups, rule: AddressRule, tls: ssl.SSLContext, *, plain: bool = False) -> None:
        """`plain` allows http beside https, for services on the operator's own machine."""
        self._lookups = lookups
        self._rule = rule
        self._tls = tls
        self._schemes = ("http", "https") if plain else ("https",)
        self._exchanges: Exchanges | None = None

    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        tls_name: str | None = None,
        timeout: float,
    ) -> Reply:
        """The answer with its body still to be read; the caller releases it. Redirects are the caller's to follow.

        Raises aiohttp.ClientError, OSError and TimeoutError. `timeout` bounds everything up to the body's last byte.
        """
        if url.scheme not in self._schemes or url.host is None:
            raise OSError("only https is spoken")
        # aiohttp asks no resolver about a literal, so it is checked here.
        if is_literal(url.host) and not self._rule.allows(url.host):
            raise OSError("this address may not be connected to")
        every = _HEADERS if headers is None else {**_HEADERS, **headers}
        return await self._opened().request(method, url, every, body, tls_name, timeout)

    def _opened(self) -> Exchanges:
        if self._exchanges is None:
            pool = aiohttp.TCPConnector(
                ssl=self._tls,
                resolver=CheckedResolver(self._lookups, self._rule),
                ttl_dns_cache=DNS_CACHE_SECONDS,
                limit=_most_connections(),
                limit_per_host=MAX_CONNECTIONS_PER_TARGET,
                keepalive_timeout=KEEP_IDLE_SECONDS,
            )
            self._exchanges = Exchanges(pool, connect_seconds=CONNECT_SECONDS)
        return self._exchanges

    async def close(self) -> None:
        if self._exchanges is not None:
            await self._exchanges.close()
            self._exchanges = None


def _most_connections() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if allowed == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, allowed // 4))


class Posting:
    """Implements `relay.remote.Posts`."""

    def __init__(self, outward: Outward) -> None:
        self._outward = outward

    async def post(
        self, url: str, body: bytes, *, timeout: float, most_bytes: int, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        host = ""
        try:
            target = URL(url)
            host = target.host or ""
            answer = await self._outward.request(
                "POST",
                target,
                headers={"Content-Type": "application/json", **(headers or {})},
                body=body,
                timeout=timeout,
            )
            try:
                return answer.status, await read_at_most(answer, most_bytes)
            finally:
                answer.release()
        except (AnswerTooLarge, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise RemoteError(host, 0, "it could not be reached, or broke off") from error


class ToServices:
    """Implements `relay.remote.SpeaksToServices`."""

    def __init__(self, outward: Outward) -> None:
        self._outward = outward

    async def request(
        self, method: str, url: str, *, token: str, body: bytes | None, timeout: float, most_bytes: int
    ) -> tuple[int, bytes]:
        target = URL(url, encoded=True)
        host = target.host or ""
        headers = {"Authorization": f"Bearer {token}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            answer = await self._outward.request(method, target, headers=headers, body=body, timeout=timeout)
            try:
                return answer.status, await read_at_most(answer, most_bytes)
            finally:
                answer.release()
        except TimeoutError as error:
            raise RemoteError(host, 504, "it did not answer in time") from error
        except (AnswerTooLarge, aiohttp.ClientError, OSError, ValueError) as error:
            raise RemoteError(host, 0, "it could not be reached, or broke off") from error


class AnswerTooLarge(Exception):
    """The body is larger than the caller takes."""


async def read_at_most(answer: Reply, most_bytes: int) -> bytes:
    """The whole body. Raises AnswerTooLarge before it reads more."""
    if answer.content_length is not None and answer.content_length > most_bytes:
        raise AnswerTooLarge
    if answer.content.is_eof():
        # Mostly it came in one piece with the head.
        body = answer.content.read_nowait()
        if len(body) > most_bytes:
            raise AnswerTooLarge
        return body
    chunks: list[bytes] = []
    size = 0
    async for chunk in answer.content.iter_any():
        size += len(chunk)
        if size > most_bytes:
            raise AnswerTooLarge
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
