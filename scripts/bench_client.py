"""The load generator: a lean HTTP/1.1 connection and people who speak the client-server API through it.

It shares the machine with the server it measures, so it does as little as it can for each request. Every message is an
`m.room.encrypted` event of a usual Megolm size, so that servers which refuse readable messages can be measured too.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import random
import string
from typing import Any, cast
from urllib.parse import quote, urlsplit

import orjson

REQUEST_TIMEOUT_S = 120.0
REGISTRATIONS_AT_ONCE = 8
JOINS_AT_ONCE = 4
MEGOLM = "m.megolm.v1.aes-sha2"
# A transaction ID that was used before is answered from memory: no two of a run are the same.
_transactions = itertools.count()


class BenchError(Exception):
    """The server did not do what was asked; the text says what it answered."""


class Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._received = bytearray()
        self._status = self._body_at = self._length = 0
        self._chunked = self._closes = False

    async def request(
        self, method: str, path: str, token: str | None, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
        if token is not None:
            head += f"Authorization: Bearer {token}\r\n"
        if body is not None:
            head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, self._host, self._port)
        assert self._transport is not None
        self._received.clear()
        self._body_at = 0
        self._answer = loop.create_future()
        self._transport.write(head.encode() + b"\r\n" + (body or b""))
        timer = loop.call_later(REQUEST_TIMEOUT_S, self._give_up, f"{method} {path}")
        try:
            return await self._answer
        finally:
            timer.cancel()
            if self._closes:
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class does not say so

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            if self._body_at and self._length < 0:
                self._done(bytes(self._received[self._body_at :]))
            else:
                self._answer.set_exception(BenchError(f"the server closed the connection ({exc or 'no reason given'})"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._body_at and not self._read_head():
            return
        if self._chunked:
            if self._received.endswith(b"0\r\n\r\n"):
                body = _unchunked(memoryview(self._received)[self._body_at :])
                if body is not None:
                    self._done(body)
        elif 0 <= self._length <= len(self._received) - self._body_at:
            self._done(bytes(self._received[self._body_at : self._body_at + self._length]))

    def _read_head(self) -> bool:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._received[:end]).lower()
        self._body_at = end + 4
        self._status = int(head[9:12])
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        self._closes = b"\r\nconnection: close" in head
        length = head.find(b"\r\ncontent-length:")
        self._length = -1 if length < 0 else int(head[length + 17 : (head + b"\r\n").find(b"\r\n", length + 2)])
        return True

    def _done(self, body: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._status, body))

    def _give_up(self, what: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BenchError(f"{what}: no answer in {REQUEST_TIMEOUT_S:.0f} s"))
            self.close()


def _unchunked(raw: memoryview) -> bytes | None:
    """The body, or None where its last chunk is still under way."""
    body, at = bytearray(), 0
    while True:
        line = bytes(raw[at : at + 20]).find(b"\r\n")
        if line < 0:
            return None
        size = int(bytes(raw[at : at + line]).split(b";")[0], 16)
        at += line + 2
        if size == 0:
            return bytes(body)
        body += raw[at : at + size]
        at += size + 2


class Person:
    """A user with one device, one connection for requests and one for the long poll."""

    def __init__(self, host: str, port: int, user_id: str, token: str, device_id: str) -> None:
        self.id, self.token, self.device_id = user_id, token, device_id
        self.requests = Connection(host, port)
        self.polls = Connection(host, port)
        self.since: str | None = None

    async def call(self, method: str, path: str, body: Any = None, connection: Connection | None = None) -> Any:
        """The answer. Raises BenchError where it is not 200."""
        raw = None if body is None else orjson.dumps(body)
        status, answer = await (connection or self.requests).request(method, f"/_matrix/client{path}", self.token, raw)
        if status == 429:
            raise BenchError(f"{path} was rate limited: switch the server's limits off for the bench")
        if status != 200:
            raise BenchError(f"{method} {path} was answered {status}: {answer[:300].decode(errors='replace')}")
        return orjson.loads(answer) if answer else {}

    async def sync(self, timeout_ms: int = 0, filtered: str | None = None) -> dict[str, Any]:
        path = f"/v3/sync?timeout={timeout_ms}"
        if self.since is not None:
            path += f"&since={quote(self.since)}"
        if filtered is not None:
            path += f"&filter={quote(filtered)}"
        answer: dict[str, Any] = await self.call("GET", path, connection=self.polls)
        self.since = answer["next_batch"]
        return answer

    async def creates_room(self, members: list[Person] | None = None) -> str:
        """An encrypted room that the members join by themselves, which is the cheapest way to fill one."""
        encryption = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": MEGOLM}}
        body = {"preset": "public_chat", "initial_state": [encryption]}
        room_id: str = (await self.call("POST", "/v3/createRoom", body))["room_id"]
        few = asyncio.Semaphore(JOINS_AT_ONCE)

        async def enter(member: Person) -> None:
            async with few:
                await member.joins(room_id)

        await asyncio.gather(*(enter(member) for member in members or ()))
        return room_id

    async def joins(self, room_id: str, via: str | None = None) -> None:
        at = f"?server_name={quote(via)}&via={quote(via)}" if via is not None else ""
        await self.call("POST", f"/v3/join/{quote(room_id)}{at}", {})

    async def sends(self, room_id: str) -> str:
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/send/m.room.encrypted/b{next(_transactions)}"
        status, answer = await self.requests.request("PUT", path, self.token, _message())
        if status != 200:
            raise BenchError(f"a send was answered {status}: {answer[:300].decode(errors='replace')}")
        event_id: str = orjson.loads(answer)["event_id"]
        return event_id

    def hangs_up(self) -> None:
        self.requests.close()
        self.polls.close()


class Homeserver:
    """Any homeserver, known by its address. `registration_token` where it asks for one."""

    def __init__(self, url: str, registration_token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise BenchError(f"{url} is no address to measure: give one such as http://127.0.0.1:8008")
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 80
        self._registration_token = registration_token
        self._prefix = "bench-" + "".join(random.choices(string.ascii_lowercase, k=5))
        self.people_made = 0

    async def people(self, number: int) -> list[Person]:
        few = asyncio.Semaphore(REGISTRATIONS_AT_ONCE)

        async def one() -> Person:
            async with few:
                return await self._register()

        return list(await asyncio.gather(*(one() for _ in range(number))))

    async def _register(self) -> Person:
        self.people_made += 1
        wish: dict[str, Any] = {
            "username": f"{self._prefix}{self.people_made}",
            "password": f"Correct-horse-9-{self._prefix}",
        }
        connection = Connection(self._host, self._port)
        try:
            status, raw = await self._asks(connection, wish)
            if status == 401:
                told = orjson.loads(raw)
                flows = [flow["stages"] for flow in told["flows"]]
                for stage in ["m.login.dummy"] if ["m.login.dummy"] in flows else flows[0]:
                    auth = {"session": told["session"], "type": stage}
                    if stage == "m.login.registration_token":
                        auth["token"] = self._registration_token
                    status, raw = await self._asks(connection, {**wish, "auth": auth})
        finally:
            connection.close()
        if status != 200:
            raise BenchError(
                f"{self.url} did not let somebody register ({status}: {raw[:300].decode(errors='replace')}). "
                "Open its registration, or give --registration-token, and switch its rate limits off."
            )
        made = orjson.loads(raw)
        return Person(self._host, self._port, made["user_id"], made["access_token"], made["device_id"])

    @staticmethod
    async def _asks(connection: Connection, body: dict[str, Any]) -> tuple[int, bytes]:
        return await connection.request("POST", "/_matrix/client/v3/register", None, orjson.dumps(body))


def random_base64(size: int) -> str:
    return base64.b64encode(os.urandom(size)).decode().rstrip("=")


def _message() -> bytes:
    return orjson.dumps(
        {
            "algorithm": MEGOLM,
            "device_id": "ABCDEFGHIJ",
            "sender_key": random_base64(32),
            "session_id": random_base64(32),
            "ciphertext": random_base64(300),
        }
    )
