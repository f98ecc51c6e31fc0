"""HTTP manners: errors as the standard names them, CORS, limits, malformed requests; and media."""

from __future__ import annotations

import asyncio
import os

import aiohttp
import pytest

from tests.people import Refused, ciphertext, path
from tests.town import Town


async def test_unknown_endpoints_and_methods_are_named(town: Town) -> None:
    alice = await town.user("alice@one")
    refused = await alice.is_refused(alice.calls("GET", "/_matrix/client/v3/nosuchthing"))
    assert (refused.status, refused.errcode) == (404, "M_UNRECOGNIZED")
    refused = await alice.is_refused(alice.calls("DELETE", "sync"))
    assert (refused.status, refused.errcode) == (405, "M_UNRECOGNIZED")
    answer, _ = await alice.asks("OPTIONS", "sync", token="")
    assert answer.headers["Access-Control-Allow-Origin"] == "*", "browsers may ask before they ask"
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
    answer, _ = await alice.asks("GET", "account/whoami")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    versions = await alice.calls("GET", "/_matrix/client/versions", token="")
    assert "v1.1" in versions["versions"]
    assert (await alice.calls("GET", "capabilities"))["capabilities"]["m.room_versions"]["default"] == "12"


@pytest.mark.parametrize(
    ("body", "status", "errcode"),
    [
        (b"{", 400, "M_NOT_JSON"),
        (b"[]", 400, "M_BAD_JSON"),
        (b'{"algorithm": 1}', None, None),
        (b'{"a":' * 200 + b"1" + b"}" * 200, 400, "M_BAD_JSON"),
        (b'{"x": 1.5}', None, None),
        (b'{"x": 99999999999999999999999999}', None, None),
        (b'\xff\xfe{"x": 1}', 400, "M_NOT_JSON"),
        (b'{"x": "' + b"a" * 70_000 + b'"}', None, None),
        (b'{"x": "' + b"a" * 2_000_000 + b'"}', 413, "M_TOO_LARGE"),
    ],
    ids=["cut off", "a list", "wrong type", "nested", "float", "huge number", "not UTF-8", "large event", "large body"],
)
async def test_a_malformed_body_is_the_senders_fault(
    town: Town, body: bytes, status: int | None, errcode: str | None
) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    refused = await alice.is_refused(alice.calls("PUT", path("rooms", room, "send", "m.room.encrypted", "t"), body))
    assert 400 <= refused.status < 500, f"the client is told, and the relay does not break: {refused}"
    if status is not None:
        assert (refused.status, refused.errcode) == (status, errcode)
    assert "Traceback" not in str(refused.body)
    await alice.sends(room)


async def test_an_event_that_is_too_large_is_refused(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    refused = await alice.is_refused(alice.sends(room, ciphertext(60_000)))
    assert (refused.status, refused.errcode) == (413, "M_TOO_LARGE")
    assert await alice.sends(room, ciphertext(40_000)), "a large one that fits is taken"


async def test_invalid_ids_are_refused(town: Town) -> None:
    alice = await town.user("alice@one")
    for where in ("rooms/nonsense/send/m.room.encrypted/t", "rooms/%21nowhere%3Aone/send/m.room.encrypted/t"):
        refused = await alice.is_refused(alice.calls("PUT", where, ciphertext()))
        assert refused.status in (400, 403, 404), where
    room = await alice.creates_room()
    refused = await alice.is_refused(alice.invites_to(room, "not a user"))
    assert refused.status == 400
    refused = await alice.is_refused(alice.joins("#nosuchalias:" + alice.server))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")
    refused = await alice.is_refused(alice.calls("POST", "createRoom", {"room_version": "99"}))
    assert (refused.status, refused.errcode) == (400, "M_UNSUPPORTED_ROOM_VERSION")
    refused = await alice.is_refused(alice.calls("GET", "sync", since="nonsense"))
    assert refused.status == 400
    refused = await alice.is_refused(alice.calls("GET", path("rooms", room, "state", "m.room.nosuch")))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")


async def test_whoever_is_too_fast_is_told_when_to_come_back(town: Town) -> None:
    await town.relay("one", "limits: {messages: {per_second: 1, burst: 5}}\n")
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    refused = None
    for _ in range(8):
        try:
            await alice.sends(room)
        except Refused as no:
            refused = no
    assert refused is not None, "a burst has an end"
    assert (refused.status, refused.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert int(refused.headers["Retry-After"]) >= 1 and refused.body["retry_after_ms"] > 0
    town.clock.forward(seconds=10)
    await alice.sends(room)


async def test_media_goes_up_and_down_in_whole_and_in_parts(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    blob = os.urandom(700_000)
    uri = await alice.uploads(blob, "image/png", filename="holiday.png")
    answer, got = await bob.downloads(uri)
    assert got == blob, "what went up comes down"
    assert answer.headers["Content-Type"] == "application/octet-stream", "the claimed type is not kept"
    assert "holiday" not in answer.headers.get("Content-Disposition", ""), "nor is the claimed name"
    answer, got = await bob.downloads(uri, headers={"Range": "bytes=100-199"})
    assert answer.status == 206 and got == blob[100:200], "a part can be asked for"
    assert answer.headers["Content-Range"] == f"bytes 100-199/{len(blob)}"
    server, media_id = uri.removeprefix("mxc://").split("/")
    refused = await bob.is_refused(
        bob.calls("GET", f"/_matrix/client/v1/media/download/{path(server, media_id)}", token="")
    )
    assert refused.status == 401, "without signing in there is nothing"
    refused = await bob.is_refused(bob.calls("GET", f"/_matrix/media/v3/download/{path(server, media_id)}"))
    assert refused.status == 404, "nor by the old way"


async def test_a_client_that_hangs_up_does_no_harm(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    for _ in range(5):
        waiting = asyncio.create_task(bob.syncs(timeout=30000))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", town.houses["one"].client_port)
    writer.write(b"PUT /_matrix/client/v3/rooms/x/send/y/z HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", town.houses["one"].client_port)
    writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    await reader.read(100)
    writer.close()
    sent = await alice.sends(room)
    assert await bob.sees(sent), "everybody else goes on"


async def test_federation_does_not_answer_strangers(town: Town) -> None:
    one = await town.relay("one")
    async with town.http.get(
        f"https://localhost:{one.federation_port}/_matrix/federation/v1/version", ssl=False
    ) as answer:
        assert answer.status == 200, "the version is for everybody"
    async with town.http.put(
        f"https://localhost:{one.federation_port}/_matrix/federation/v1/send/1", json={"pdus": []}, ssl=False
    ) as answer:
        assert answer.status == 401, "without a signature nobody sends anything"
    signature = "A" * 86
    header = f'X-Matrix origin="forged.example",destination="{one.name}",key="ed25519:a",sig="{signature}"'
    async with town.http.put(
        f"https://localhost:{one.federation_port}/_matrix/federation/v1/send/1", json={"pdus": []}, ssl=False,
        headers={"Authorization": header}, timeout=aiohttp.ClientTimeout(total=20),
    ) as answer:  # fmt: skip
        assert answer.status in (401, 403), "a forged origin is refused"
    async with town.http.get(f"{one.url}/_matrix/federation/v1/version") as answer:
        assert answer.status == 404, "the listener for clients serves no federation"
