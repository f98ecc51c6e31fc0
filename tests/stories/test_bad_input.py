"""Bad input by people and servers: a clear error for the one at fault, nothing lost for anybody else, bounds on what is kept.

What else can be wrong inside a body is met by the many examples of tests/fuzz, broken connections in test_bad_connections.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

from relay.people import filters
from tests.fuzz.answers import ask, require_proper
from tests.fuzz.oddities import deep
from tests.fuzz.overheard import Ears, overhearing
from tests.fuzz.scene import Scene
from tests.people import CLIENT, Person, Refused, ciphertext, path
from tests.town import Town


@pytest.fixture
async def ears(town: Town, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ears]:
    with overhearing(monkeypatch) as ears:
        yield ears


async def _talks(alice: Person, bob: Person, room: str) -> None:
    sent = await alice.sends(room)
    assert await bob.sees(sent), "two others talk as if nothing had been"


REFUSED_CONTENTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "M_NOT_JSON"),
    "no object": (b"[]", "M_BAD_JSON"),
    "nothing": (b"", "M_NOT_JSON"),
    "NaN": (b'{"a":NaN}', "M_NOT_JSON"),
    "no UTF-8": (b'{"a":"\xff"}', "M_NOT_JSON"),
    "half a character": (b'{"a":"\\ud800"}', "M_NOT_JSON"),
    "a fraction": (b'{"m.relates_to":{"rel_type":"m.thread","event_id":"$a","x":0.5}}', "M_BAD_JSON"),
    "nested too deep": (deep(101), "M_BAD_JSON"),
    "nested ten thousand levels deep": (deep(10_000), "M_NOT_JSON"),
    "a ciphertext that is a number": (json.dumps({**ciphertext(), "ciphertext": 7}).encode(), "M_BAD_JSON"),
}


async def test_a_message_that_is_none_is_refused_and_the_next_one_is_sent(town: Town, ears: Ears) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    for what, (body, errcode) in REFUSED_CONTENTS.items():
        where = f"{alice.url}{CLIENT}/{path('rooms', room, 'send', 'm.room.encrypted', what)}"
        refused = await ask(town.http, "PUT", where, body, Authorization=f"Bearer {alice.token}")
        require_proper(refused, what)
        assert refused.status in (400, 403), f"{what}: {refused.status} {refused.body!r}"
        assert refused.errcode in (errcode, "M_FORBIDDEN"), f"{what}: {refused.body!r}"
    big = {**ciphertext(), "m.relates_to": {"rel_type": "m.thread", "event_id": "$a", "is_falling_back": 2**60}}
    refused = await ask(
        town.http,
        "PUT",
        f"{alice.url}{CLIENT}/{path('rooms', room, 'send', 'm.room.encrypted', 'big')}",
        json.dumps(big).encode(),
        Authorization=f"Bearer {alice.token}",
    )
    assert refused.status in (200, 400), "an integer beyond what JSON can carry everywhere is refused, or left out"
    await _talks(alice, bob, room)
    numbers = [event["content"] for event in await bob.history(room) if str(2**60) in json.dumps(event)]
    assert not numbers, "and never reaches the room"
    ears.nothing_broke()


INVALID = (
    "",
    " ",
    "x",
    "@",
    "@x",
    "!x",
    "!",
    "#",
    "#x",
    "$",
    "$" + "a" * 400,
    "@x:" + "y" * 300,
    "!a:b c",
    "\x00",
    "!\x00:",
    "é",
    "../..",
    "%",
    "@a:b:c:d",
)


async def test_ids_that_are_none_are_refused_everywhere_they_stand(town: Town, ears: Ears) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    bearer = {"Authorization": f"Bearer {alice.token}"}
    for odd in INVALID:
        asked: list[tuple[str, str, Any]] = [
            ("POST", f"rooms/{quote(room)}/invite", {"user_id": odd}),
            ("POST", f"rooms/{quote(room)}/kick", {"user_id": odd}),
            ("POST", f"rooms/{quote(room)}/ban", {"user_id": odd}),
            ("POST", "createRoom", {"invite": [odd]}),
            ("POST", f"{path('join', odd)}", {}),
            ("GET", f"{path('rooms', odd, 'messages')}?dir=b", None),
            ("GET", path("rooms", room, "event", odd), None),
            ("GET", path("rooms", room, "context", odd), None),
            ("GET", path("directory", "room", odd), None),
            ("GET", path("profile", odd), None),
            ("PUT", path("rooms", room, "redact", odd, "t"), {}),
            ("PUT", path("rooms", room, "state", "m.room.member", odd), {"membership": "invite"}),
            ("POST", path("rooms", room, "receipt", "m.read", odd), {}),
            ("GET", f"sync?since={quote(odd, safe='')}", None) if odd else ("GET", "sync?since=-", None),
            ("GET", f"rooms/{quote(room)}/messages?dir=b&from={quote(odd or '-', safe='')}", None),
            ("GET", f"sync?filter={quote(odd or '-', safe='')}", None),
        ]
        for method, where, body in asked:
            got = await ask(
                town.http,
                method,
                f"{alice.url}{CLIENT}/{where}",
                None if body is None else json.dumps(body).encode(),
                **bearer,
            )
            require_proper(got, f"{method} {where} {body}")
            assert 400 <= got.status < 500, (
                f"{method} {where} {body}: {odd!r} is no ID, got {got.status} {got.body[:200]!r}"
            )
    await _talks(alice, bob, room)
    ears.nothing_broke()


async def test_nobody_can_fill_the_disk_with_settings(town: Town, ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MAX_FILTERS_PER_USER", 5)
    monkeypatch.setattr("relay.people.account_data.MAX_ROWS_PER_USER", 5)
    monkeypatch.setattr("relay.accounts.devices.MAX_DEVICES_PER_USER", 5)
    alice, bob = await town.users("alice@one", "bob@one")
    house = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    answers = []
    for number in range(12):
        kept = f"{house.url}{CLIENT}/{path('user', alice.id, 'account_data', f'x.{number}')}"
        filter_ = f"{house.url}{CLIENT}/{path('user', alice.id, 'filter')}"
        new = f"{house.url}/_matrix/media/v1/create"
        for method, where, body in (
            ("PUT", kept, {"n": number}),
            ("POST", filter_, {"room": {"timeline": {"limit": number + 1}}}),
            ("POST", new, {}),
        ):
            answer = await ask(
                town.http, method, where, json.dumps(body).encode(), Authorization=f"Bearer {alice.token}"
            )
            require_proper(answer, where)
            answers.append(answer.status)
        try:
            await alice.on_another_device()
        except Refused as refused:
            assert refused.status == 403 and "Sign out" in refused.text, "it is said what to do about it"
    assert {200} < set(answers), "some are kept, the others refused"
    assert house.server is not None

    def count(query: Any) -> dict[str, int]:
        return {
            table: query.value(f"SELECT count(*) FROM {table} WHERE user_id = $1", alice.id)
            for table in ("account_data", "filters", "devices")
        }

    rows = await house.server.db.read(count)
    assert all(number <= 6 for number in rows.values()), f"each kind of setting has its bound: {rows}"
    ears.nothing_broke()
    await _talks(bob, bob, room)


async def test_a_stranger_who_breaks_off_and_floods_is_no_burden(
    town: Town, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation.inbound.MAX_ANSWERS_KEPT", 10)
    scene = await Scene(town, ears).opens()
    try:
        stop = asyncio.Event()

        async def chat() -> int:
            said = 0
            while not stop.is_set():
                await _talks(scene.alice, scene.bob, scene.room_id)
                said += 1
            return said

        chatting = asyncio.create_task(chat())
        forged = scene.room.event(sender=scene.alice.id).pdu
        unheard = scene.room.event(prev_events=["$" + "a" * 43]).pdu
        for _ in range(30):
            answers = await asyncio.gather(
                *(scene.stranger.sends(scene.house, [forged, unheard, {}] * 10) for _ in range(6))
            )
            assert {answer.status for answer in answers} <= {200, 429}, "a flood is taken, or told to wait"
            await scene.sends_with_a_good_one([forged])
        stop.set()
        assert await chatting, "two people of the relay went on talking"
        kept = next(part for part in scene.house.server._parts if type(part).__name__ == "Inbound")  # type: ignore[union-attr]
        assert len(kept._answers) <= 10, "answers are remembered up to a bound"  # type: ignore[attr-defined]
        assert not kept._busy, "and nothing is left under way"  # type: ignore[attr-defined]
        await scene.nothing_is_lost()
    finally:
        await scene.stranger.leaves_town()
