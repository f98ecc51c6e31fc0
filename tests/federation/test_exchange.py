"""One HTTP exchange over a kept connection: what is done twice, what never, and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from yarl import URL

from federation.addresses import AddressRule, SystemLookups
from federation.outward import Outward, read_at_most, tls_context

HELLO = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 5\r\n\r\nhello"


class Peer:
    """Answers the requests of each connection with what it was told, then hangs up or keeps silent."""

    def __init__(self, *answers: list[bytes], silent: bool = False) -> None:
        self._answers = list(answers)
        self._silent = silent
        self.heard: list[list[bytes]] = []
        self.meeting: set[asyncio.Task[None]] = set()

    def meets(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.meeting.add(asyncio.create_task(self._meet(reader, writer)))

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard: list[bytes] = []
        self.heard.append(heard)
        for answer in self._answers[len(self.heard) - 1] if len(self.heard) <= len(self._answers) else []:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
            heard.append(head + await reader.readexactly(length))
            writer.write(answer)
        if self._silent:
            await reader.read()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def _asking(peer: Peer) -> AsyncIterator[tuple[Outward, URL]]:
    server = await asyncio.start_server(peer.meets, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    outward = Outward(SystemLookups(), AddressRule(private=True), tls_context(), plain=True)
    try:
        yield outward, URL(f"http://127.0.0.1:{port}/there?and=back")
    finally:
        await outward.close()
        server.close()
        await asyncio.gather(*peer.meeting, return_exceptions=True)


async def _body(outward: Outward, method: str, url: URL, body: bytes | None = None, timeout: float = 60.0) -> bytes:
    answer = await outward.request(method, url, body=body, timeout=timeout)
    try:
        assert (answer.status, answer.content_type, answer.content_length) == (200, "application/json", 5)
        return await read_at_most(answer, 5)
    finally:
        answer.release()


async def test_a_connection_is_kept_and_what_it_carries_is_http() -> None:
    peer = Peer([HELLO, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + HELLO])
    async with _asking(peer) as (outward, url):
        assert await _body(outward, "PUT", url, b"x" * 100_000) == b"hello"
        assert await _body(outward, "GET", url) == b"hello", "what comes before an answer is passed over"
    assert len(peer.heard) == 1, "both went over one connection"
    put, got = peer.heard[0]
    assert put.startswith(b"PUT /there?and=back HTTP/1.1\r\n") and put.endswith(b"\r\n\r\n" + b"x" * 100_000)
    assert b"Content-Length: 100000\r\n" in put and b"Content-Length" not in got
    assert put.count(b"\r\nHost: 127.0.0.1:") == 1 and b"\r\nUser-Agent: Sealed-Relay\r\n" in got


@pytest.mark.parametrize(("method", "again"), [("PUT", True), ("GET", True), ("POST", False)])
async def test_a_kept_connection_may_be_closed_when_it_is_needed(method: str, again: bool) -> None:
    # The second request of the first connection meets a peer that hangs up.
    peer = Peer([HELLO, b""], [HELLO])
    async with _asking(peer) as (outward, url):
        assert await _body(outward, "PUT", url, b"{}") == b"hello"
        if again:
            assert await _body(outward, method, url, b"{}") == b"hello", "it is tried once more on another connection"
        else:
            with pytest.raises(aiohttp.ClientError):
                await _body(outward, method, url, b"{}")
    assert len(peer.heard) == (2 if again else 1), "a POST is never sent twice"


async def test_nobody_waits_for_ever() -> None:
    for begun in (b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\nhel"):
        async with _asking(Peer([begun], silent=True)) as (outward, url):
            with pytest.raises(TimeoutError):
                await _body(outward, "GET", url, timeout=0.2)


async def test_what_is_no_http_and_what_is_no_header() -> None:
    peer = Peer([b"220 mail.example ESMTP\r\n\r\n"])
    async with _asking(peer) as (outward, url):
        with pytest.raises(aiohttp.ClientError):
            await _body(outward, "GET", url)
        with pytest.raises(ValueError, match="line's end"):
            await outward.request("GET", url, headers={"X": "a\r\nY: b"}, timeout=60.0)
