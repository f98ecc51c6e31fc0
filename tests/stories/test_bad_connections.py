"""Bad connections: no HTTP, broken off, never finished, too large. A clear error, nothing lost for anybody else, and an end."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay import web, wire
from tests.fuzz.answers import ask, require_proper
from tests.fuzz.overheard import Ears, overhearing
from tests.people import CLIENT, Person, ciphertext, path
from tests.town import Town, Within

PATIENCE_SECONDS = 20.0


@pytest.fixture
async def ears(town: Town, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ears]:
    with overhearing(monkeypatch) as ears:
        yield ears


class Wire:
    """A connection on which anything can be said."""

    def __init__(self, house: Within) -> None:
        self.house = house

    async def opens(self) -> Wire:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.house.client_port)
        return self

    async def says(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def hears_to_the_end(self) -> bytes:
        """Everything until the relay ends the connection, which it must."""
        heard = b""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while piece := await self.reader.read(65536):
                    heard += piece
        except ConnectionError:
            pass
        except TimeoutError:
            raise AssertionError(
                f"the relay keeps a connection open that should be over; it said {heard[:200]!r}"
            ) from None
        self.writer.close()
        return heard

    def hangs_up(self) -> None:
        self.writer.transport.abort()


def head(method: str, where: str, *headers: str) -> bytes:
    return "\r\n".join((f"{method} {where} HTTP/1.1", "Host: relay", *headers, "", "")).encode()


async def _talks(alice: Person, bob: Person, room: str) -> None:
    sent = await alice.sends(room)
    assert await bob.sees(sent), "two others talk as if nothing had been"


NO_HTTP: dict[str, bytes] = {
    "no HTTP": b"\x16\x03\x01\x02\x00 hello\r\n\r\n",
    "an unknown method": b"FETCH / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a path without end": b"GET /" + b"a" * 100_000,
    "a header without end": b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000,
    "too many headers": b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % number for number in range(1000)) + b"\r\n",
    "a length that is no number": head("POST", f"{CLIENT}/login", "Content-Length: much"),
    "a negative length": head("POST", f"{CLIENT}/login", "Content-Length: -1"),
    "two lengths": head("POST", f"{CLIENT}/login", "Content-Length: 2", "Content-Length: 3") + b"{}",
    "a length and chunks": head("POST", f"{CLIENT}/login", "Content-Length: 2", "Transfer-Encoding: chunked") + b"{}",
    "a chunk without a size": head("POST", f"{CLIENT}/login", "Transfer-Encoding: chunked") + b"size\r\n",
    "a byte 0 in the path": b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a body that is not compressed as it says": head(
        "POST", f"{CLIENT}/login", "Content-Encoding: gzip", "Content-Length: 4"
    )
    + b"abcd",
}


async def test_what_is_no_http_is_refused_and_the_connection_ended(town: Town, ears: Ears) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    house = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    for what, said in NO_HTTP.items():
        wire_ = await Wire(house).opens()
        await wire_.says(said)
        heard = await wire_.hears_to_the_end()
        first, _, body = heard.partition(b"\r\n\r\n")
        assert first.split()[1] in (b"400", b"413", b"431"), f"{what} is the sender's fault: {heard[:200]!r}"
        assert b"Access-Control-Allow-Origin: *" in first, f"{what}: a web client can read the refusal"
        told = json.loads(body)
        assert told["errcode"].startswith("M_") and told["error"], f"{what}: the standard's error form"
    ears.nothing_broke()
    assert not [line for line in ears.lines if line[0] == "error"], "nobody can fill the log by talking nonsense"
    await _talks(alice, bob, room)


async def test_a_token_of_strange_bytes_is_no_token(town: Town, ears: Ears) -> None:
    house = await town.relay("one")
    for token in (b"\xff\xfe", "é".encode(), b"a b", b"a" * 5000, b"\x80"):
        wire_ = await Wire(house).opens()
        await wire_.says(
            b"GET /_matrix/client/v3/account/whoami HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
            + token
            + b"\r\n\r\n"
        )
        heard = await wire_.hears_to_the_end()
        assert heard.split()[1] == b"401" and b"M_UNKNOWN_TOKEN" in heard, (
            f"{token[:20]!r} is refused as a token: {heard[:200]!r}"
        )
    ears.nothing_broke()


async def test_head_and_options_are_answered_everywhere_and_a_wrong_method_is_named(town: Town, ears: Ears) -> None:
    house = await town.relay("one")
    alice = await town.user("alice@one")
    assert house.server is not None
    methods: dict[str, set[str]] = {}
    for route in house.server.web.routers["client"].routes:
        methods.setdefault(route.path, set()).add(route.method)
    for pattern, known in methods.items():
        where = house.url + "/".join("x" if segment.startswith("{") else segment for segment in pattern.split("/"))
        options = await ask(town.http, "OPTIONS", where)
        require_proper(options, where)
        assert options.status == 204 and "Authorization" in options.headers["Access-Control-Allow-Headers"], (
            f"{where}: a browser may ask first"
        )
        looked = await ask(town.http, "HEAD", where, Authorization=f"Bearer {alice.token}")
        assert not looked.body, f"{where}: HEAD has no body"
        assert (looked.status == 405) is ("GET" not in known), (
            f"{where}: HEAD stands where GET does, got {looked.status}"
        )
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - known:
            wrong = await ask(town.http, method, where)
            require_proper(wrong, where)
            assert wrong.status == 405 and wrong.errcode == "M_UNRECOGNIZED", (
                f"{method} {where}: known, but not with this method: {wrong}"
            )
    for where in (
        "/",
        "/_matrix",
        "/_matrix/client/v3/nothing",
        "/_matrix/client/v9/sync",
        "/_matrix/client/v3/sync/x",
        "//",
        "/%2f",
        "/_matrix/federation/v1/version",
    ):
        for method in ("GET", "POST", "HEAD"):
            unknown = await ask(town.http, method, house.url + where)
            assert unknown.status == 404, f"{method} {where}: unknown here, got {unknown.status}"
            assert method == "HEAD" or unknown.errcode == "M_UNRECOGNIZED", f"{method} {where}"
    ears.nothing_broke()


async def test_a_connection_that_breaks_in_mid_body_leaves_nothing_behind(town: Town, ears: Ears) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    house = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    before = _media_files(house)
    bearer = f"Authorization: Bearer {alice.token}"
    half = json.dumps(ciphertext()).encode()[:40]
    broken = [
        (
            head(
                "PUT",
                f"{CLIENT}/{path('rooms', room, 'send', 'm.room.encrypted', 'half')}",
                bearer,
                "Content-Length: 400",
            ),
            half,
        ),
        (
            head(
                "PUT",
                f"{CLIENT}/{path('rooms', room, 'send', 'm.room.encrypted', 'half')}",
                bearer,
                "Transfer-Encoding: chunked",
            ),
            b"28\r\n" + half,
        ),
        (head("POST", "/_matrix/media/v3/upload", bearer, "Content-Length: 4000000"), b"\x01\x9c" * 500_000),
        (
            head("POST", "/_matrix/media/v3/upload", bearer, "Transfer-Encoding: chunked"),
            b"186A0\r\n" + b"\x01\x9c" * 50_000,
        ),
        (head("GET", f"{CLIENT}/sync?timeout=30000", bearer), b""),
    ]
    for first, rest in broken * 3:
        wire_ = await Wire(house).opens()
        await wire_.says(first, rest)
        await asyncio.sleep(0.02)
        wire_.hangs_up()
        await _talks(alice, bob, room)
    sent = await alice.sends(room, txn="half")
    assert await bob.sees(sent), "what was sent by halves can be sent again"
    assert _media_files(house) == before, "half an upload leaves no file"
    encrypted = [event for event in await bob.history(room) if event["type"] == "m.room.encrypted"]
    assert len(encrypted) == len(broken) * 3 + 1, "half a message is no message"
    ears.nothing_broke()


def _media_files(house: Within) -> list[Path]:
    return [file for file in house.files() if "media" in file.relative_to(house.folder).parts]


async def test_whoever_never_finishes_is_not_waited_for(
    town: Town, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("BODY_SECONDS", "PAUSE_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(wire, bound, 0.5)
    # Longer than a loaded machine may take between a connection and its first byte: it is not the one under test.
    monkeypatch.setattr(wire, "IDLE_SECONDS", 3.0)
    alice, bob = await town.users("alice@one", "bob@one")
    house = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    bearer = f"Authorization: Bearer {alice.token}"
    slow = {
        "nothing at all": b"",
        "half a head": b"GET /_matrix/client/versions HTTP/1.1\r\nX: ",
        "half a body": head("POST", f"{CLIENT}/login", "Content-Length: 400") + b'{"type":',
        "half a chunk": head("POST", f"{CLIENT}/login", "Transfer-Encoding: chunked") + b'100\r\n{"type":',
        "half an upload": head("POST", "/_matrix/media/v3/upload", bearer, "Content-Length: 4000") + b"\x01\x9c",
        "a request, and then half a head": head("GET", "/_matrix/client/versions")
        + b"GET /_matrix/client/versions HTTP/1.1\r\nX: ",
    }
    wires: list[tuple[str, Wire]] = []
    for what, said in list(slow.items()) * 20:
        wire_ = await Wire(house).opens()
        await wire_.says(said)
        wires.append((what, wire_))
    await _talks(alice, bob, room)
    for what, wire_ in wires:
        heard = await wire_.hears_to_the_end()
        if "body" in what or "upload" in what or "chunk" in what:
            assert heard.split()[1] == b"408", f"{what}: it is said why the connection ends: {heard[:200]!r}"
    await _talks(alice, bob, room)
    ears.nothing_broke()


async def test_a_head_that_drips_gains_no_time_by_it(town: Town, ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "IDLE_SECONDS", 0.5)
    house = await town.relay("one")
    wire_ = await Wire(house).opens()
    await wire_.says(b"GET / HTTP/1.1\r\nX: ")
    dripped = 0
    while not wire_.reader.at_eof() and dripped < 400:
        try:
            await wire_.says(b"a")
            await asyncio.wait_for(wire_.reader.read(100), 0.05)
        except TimeoutError:
            dripped += 1
        except ConnectionError:
            break
    wire_.hangs_up()
    assert dripped < 400, "a byte now and then does not keep a connection"
    ears.nothing_broke()


async def test_requests_in_a_row_are_answered_in_their_order_and_nonsense_behind_them_ends_it(
    town: Town, ears: Ears
) -> None:
    house = await town.relay("one")
    wire_ = await Wire(house).opens()
    number = 200
    for _ in range(number // 2):
        await wire_.says(head("GET", "/_matrix/client/versions") + head("GET", "/nothing"))
    heard = b""
    while heard.count(b"M_UNRECOGNIZED") < number // 2:
        heard += await asyncio.wait_for(wire_.reader.read(65536), PATIENCE_SECONDS)
    await wire_.says(b"NONSENSE\r\n\r\n" + head("GET", "/_matrix/client/versions") * 50)
    rest = await wire_.hears_to_the_end()
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", heard)
    assert statuses == [b"200", b"404"] * (number // 2), "each its answer, in order"
    assert rest.count(b"HTTP/1.") == 1 and rest.split()[1] == b"400", "behind nonsense nothing can be told apart"
    ears.nothing_broke()


async def test_a_strangers_long_names_are_not_kept(town: Town, ears: Ears) -> None:
    alice = await town.user("alice@one")
    await alice.is_refused(alice.calls("GET", f"directory/room/{path('#ab:c.example')}"))
    before = web._unquoted.cache_info().currsize
    assert before, "what is named again and again is"
    for number in range(3):
        where = f"directory/room/{path('🐚')}{'a' * 7_000}{number}"
        assert (await alice.is_refused(alice.calls("GET", where))).status == 400
    assert web._unquoted.cache_info().currsize == before


async def test_what_is_too_large_is_refused_before_it_is_taken_in(town: Town, ears: Ears) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    house = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    bearer = f"Authorization: Bearer {alice.token}"
    where = f"{CLIENT}/{path('rooms', room, 'send', 'm.room.encrypted', 'large')}"
    wire_ = await Wire(house).opens()
    await wire_.says(head("PUT", where, bearer, f"Content-Length: {10**12}"))
    heard = await asyncio.wait_for(wire_.reader.readuntil(b"}"), PATIENCE_SECONDS)
    assert heard.split()[1] == b"413" and b"M_TOO_LARGE" in heard, "a terabyte is refused by its announcement"
    wire_.hangs_up()
    wire_ = await Wire(house).opens()
    await wire_.says(
        head("PUT", where, bearer, "Transfer-Encoding: chunked"),
        *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * (web.MAX_BODY // 65536 + 2),
    )
    heard = await asyncio.wait_for(wire_.reader.readuntil(b"}"), PATIENCE_SECONDS)
    assert heard.split()[1] == b"413", "one that is not announced, as soon as it is too large"
    wire_.hangs_up()
    bomb = gzip.compress(b" " * 200_000_000, 9)
    packed = await ask(
        town.http, "PUT", house.url + where, bomb, Authorization=f"Bearer {alice.token}", Content_Encoding="gzip"
    )
    assert packed.status == 413, "a body that becomes too large when it is unpacked is not unpacked further"
    for size, answer in ((64_000, 200), (66_000, 413), (900_000, 413)):
        got = await ask(
            town.http, "PUT", f"{house.url}{CLIENT}/{path('rooms', room, 'send', 'm.room.encrypted', str(size))}",
            json.dumps({**ciphertext(), "ciphertext": "A" * size}).encode(), Authorization=f"Bearer {alice.token}",
        )  # fmt: skip
        assert got.status == answer, f"an event of {size} bytes: {got.status} {got.body[:200]!r}"
    await _talks(alice, bob, room)
    ears.nothing_broke()
