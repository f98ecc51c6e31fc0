"""A server that wants to wear the relay out: each way of doing it has a bound, and here is what it comes to.

Counted is what it costs: requests to others, rows on disk, bytes taken in. The two people of the scene go on talking.
"""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from federation import connections
from relay.ephemeral import receipts, typing_notices
from relay.keys import device_queues
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey, sign_json
from relay.rooms import gaps, history, timeline
from tests.fuzz.scene import Scene
from tests.fuzz.stranger import DAY_MS, Room, Stranger
from tests.people import ciphertext, path, until

FEDERATION = "/_matrix/federation/v1"
INVENTED = "$" + "i" * 43


async def rows(scene: Scene, *tables: str) -> list[int]:
    assert scene.house.server is not None
    await scene.house.server.db.settled()
    return [
        int(await scene.house.server.db.read(lambda query, table=table: query.value(f"SELECT count(*) FROM {table}")))
        for table in tables
    ]


async def test_an_outsider_leaves_no_trace_and_has_nobody_asked(scene: Scene) -> None:
    outsider = await Stranger(scene.town).opens()
    try:
        room = Room(outsider, scene.house, scene.room_id, [*scene.room.state.values(), scene.room.last])
        before = await rows(scene, "events", "waiting_events", "gaps")
        scene.stranger.asked.clear()
        on_top = [room.event(content=ciphertext()) for _ in range(25)]
        made_up = [room.event(content=ciphertext(), prev_events=["$" + f"{n:043d}"]) for n in range(25)]
        answer = await outsider.sends(scene.house, [one.pdu for one in (*on_top, *made_up)])
        assert all(result.get("error") for result in answer.json["pdus"].values()) and len(answer.json["pdus"]) == 50
        assert await rows(scene, "events", "waiting_events", "gaps") == before, "nothing of it lies on the disk"
        assert scene.stranger.asked == [], "and nobody in the room was asked about what an outsider made up"
    finally:
        await outsider.leaves_town()
    await scene.nothing_is_lost()


def chain(scene: Scene, length: int) -> Iterator[Event]:
    """Mallory comes and goes, again and again, as an auth chain would tell it."""
    room, user = scene.room, scene.stranger.user
    by_type = {key: event.id for key, event in room.state.items() if key is not None}
    base = [by_type[("m.room.power_levels", "")]]
    last = by_type[("m.room.member", user)]
    for number in range(length):
        membership = "leave" if number % 2 == 0 else "join"
        rules = [by_type[("m.room.join_rules", "")]] if membership == "join" else []
        event = room.event(
            "m.room.member", {"membership": membership}, state_key=user, auth_events=[*base, *rules, last]
        )
        last = event.id
        yield event


async def test_a_made_up_auth_chain_is_cut(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "MAX_CITED", 100)
    made_up = list(chain(scene, 200))
    cited = [event_id for key, event_id in _auth(scene) if key[0] == "m.room.power_levels"]
    event = scene.room.event(content=ciphertext(), auth_events=[*cited, made_up[-1].id])
    scene.stranger.holds[f"{FEDERATION}/event_auth/"] = {"auth_chain": [one.pdu for one in made_up]}
    before = await rows(scene, "events")
    results = await scene.sends_with_a_good_one([event.pdu])
    assert (await rows(scene, "events"))[0] == before[0] + 1, "of the chain nothing is kept; one is the good event"
    assert event.id not in [one["event_id"] for one in await scene.bob.history(scene.room_id)]
    assert results is not None
    assert sum("/event_auth/" in where for where in scene.stranger.asked) <= gaps.MAX_SERVERS_ASKED

    # One that is too long to be sent at all: it is not even listened to.
    begun: list[web.BaseRequest] = []

    async def endless(http: web.BaseRequest, _: bytes) -> web.StreamResponse:
        begun.append(http)
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(http)
        await answer.write(b'{"auth_chain":[')
        piece = b",".join([made_up[0].raw] * 1_000) + b","
        for _number in range(100):  # 100,000 events
            try:
                await answer.write(piece)
            except (ConnectionError, aiohttp.ClientConnectionError):  # the second where it waits for room to write
                break
        return answer

    def broken_off(http: web.BaseRequest) -> bool:
        # What is written to somebody who is gone may also vanish without an error; a connection that was read to its end stays open.
        return http.transport is None or http.transport.is_closing()

    scene.stranger.holds[f"{FEDERATION}/event_auth/"] = endless
    another = scene.room.event(content=ciphertext(), auth_events=[*cited, made_up[-2].id])
    tracemalloc.start()
    try:
        await scene.sends_with_a_good_one([another.pdu])
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3 * connections.MAX_ANSWER_BYTES, "no more of it is held than what an answer may have"
    assert await until(lambda: all(broken_off(one) for one in begun)), "it is broken off where it becomes too much"
    assert 0 < len(begun) <= gaps.MAX_SERVERS_ASKED
    await scene.nothing_is_lost()


def _auth(scene: Scene) -> list[tuple[tuple[str, str], str]]:
    return [(key, event.id) for key, event in scene.room.state.items() if key is not None]


async def test_a_past_without_a_beginning_costs_as_much_as_is_read_of_it(scene: Scene) -> None:
    room, asked = scene.room, 0
    past: list[Event] = []
    for number in range(600):
        far = past[-1].id if past else INVENTED
        past.append(room.event(content=ciphertext(), prev_events=[far], depth=10**9 + number))
    place = {event.id: number for number, event in enumerate(past)}
    latest = room.event(content=ciphertext(), prev_events=[past[-1].id], depth=10**9 + 600)

    async def backfill(http: web.BaseRequest, _: bytes) -> Any:
        nonlocal asked
        asked += 1
        upto = max((place[one] for one in http.query.getall("v") if one in place), default=-1) + 1
        pdus = [one.pdu for one in reversed(past[max(0, upto - 50) : upto])]
        return {"origin": scene.stranger.name, "origin_server_ts": 1, "pdus": pdus}

    scene.stranger.holds |= {
        f"{FEDERATION}/get_missing_events/": {"events": []},
        f"{FEDERATION}/state_ids/": {"pdu_ids": [one.id for one in room.state.values()], "auth_chain_ids": []},
        f"{FEDERATION}/backfill/": backfill,
    }
    answer = await scene.stranger.sends(scene.house, [latest.pdu])
    assert answer.json["pdus"] == {latest.id: {}}
    before = (await rows(scene, "events"))[0]
    pages, token = 0, None
    while pages < 5:
        page = await scene.bob.calls(
            "GET", path("rooms", scene.room_id, "messages"), dir="b", limit=20, **({"from": token} if token else {})
        )
        pages, token = pages + 1, page.get("end")
        if token is None:
            break
    assert 0 < asked <= pages * timeline.MAX_FILLS, "one page, a few questions at most"
    kept = (await rows(scene, "events"))[0] - before
    assert 50 <= kept <= asked * history.MAX_BACKFILL and kept < len(past), "the rest of it is left where it is"
    assert await scene.bob.sees(await scene.alice.sends(scene.room_id))


async def test_floods_of_ephemeral_units_end_in_bounded_places(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_queues, "MAX_WAITING", 60)
    monkeypatch.setattr(device_queues, "TRIM_EVERY", 20)
    olm = {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": "k" * 43,
        "ciphertext": {"k" * 43: {"type": 0, "body": "QUJD" * 8}},
    }
    await scene.alice.tells_devices("m.room.encrypted", {scene.bob.id: {"*": olm}})
    mallory, latest = scene.stranger.user, scene.room.last.id
    scene.stranger.asked.clear()

    def units() -> Iterator[tuple[str, Any]]:
        for number in range(200):
            note = {
                "sender": mallory,
                "type": "m.room.encrypted",
                "message_id": f"flood{number}",
                "messages": {scene.bob.id: {"*": olm}},
            }
            yield "m.direct_to_device", note
        for number in range(120):
            user = f"@m{number}:{scene.stranger.name}"
            yield "m.typing", {"room_id": scene.room_id, "user_id": user, "typing": True}
        for number in range(400):
            data = {"ts": number, "thread_id": "$" + f"{number:043d}"}
            yield "m.receipt", {scene.room_id: {"m.read": {mallory: {"event_ids": [latest], "data": data}}}}
        for number in range(150):
            yield (
                "m.device_list_update",
                {"user_id": mallory, "device_id": f"D{number}", "stream_id": number, "prev_id": []},
            )

    flood = [{"edu_type": kind, "content": content} for kind, content in units()]
    for start in range(0, len(flood), 100):
        assert (await scene.stranger.sends(scene.house, edus=flood[start : start + 100])).status == 200
    queued, read = await rows(scene, "to_device_messages", "receipts")
    devices = 2  # Bob's queue, and Alice has none of it
    assert queued <= devices * (60 + 20), "a queue is cut"
    assert read <= receipts.MAX_THREADS + 10, "receipts of threads that nobody opened are not kept without end"
    assert [where for where in scene.stranger.asked if "key/v2" not in where] == [], (
        "announced devices are fetched when somebody needs them"
    )
    await scene.bob.syncs()
    for _ in range(3):
        await scene.bob.syncs()
    senders = [message["sender"] for message in scene.bob.to_device]
    assert scene.alice.id in senders, "the flood sweeps away itself, not what others sent"
    assert len(scene.bob.typing.get(scene.room_id, [])) <= typing_notices.MAX_TYPING
    await scene.nothing_is_lost()


async def test_a_key_that_was_put_away_signs_nothing_any_more(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger, old = scene.stranger, scene.stranger.key
    new = SigningKey.generate("ed25519:newer")
    put_away_at = scene.town.clock.now() - 1_000

    def answer() -> dict[str, Any]:
        content = {
            "server_name": stranger.name,
            "valid_until_ts": scene.town.clock.now() + DAY_MS,
            "verify_keys": {new.key_id: {"key": new.verify_key_base64}},
            "old_verify_keys": {old.key_id: {"key": old.verify_key_base64, "expired_ts": put_away_at}},
        }
        return sign_json(content, stranger.name, new)

    monkeypatch.setattr(stranger, "key_answer", answer)
    scene.town.clock.forward(minutes=2)
    stranger.key = new
    stale = scene.room.event(content=ciphertext(), key=old)
    in_time = scene.room.event(content=ciphertext(), key=old, origin_server_ts=put_away_at - 1)
    results = await scene.sends_with_a_good_one([stale.pdu, in_time.pdu])
    assert scene.refused(results, stale.id), "made after its key was put away"
    assert results[in_time.id] == {}, "made in its time"
    refused = await stranger.asks(scene.house, "GET", f"{FEDERATION}/query/profile?user_id=@a:b", key=old)
    assert refused.status == 401, "and it opens no door"
    await scene.nothing_is_lost()


@pytest.mark.parametrize(("name", "most"), [("ed25519:anew", 1), ("ed25519:stranger", 25)])
async def test_a_server_that_lost_its_key_is_heard_with_its_new_one(scene: Scene, name: str, most: int) -> None:
    """Nothing of the old one is published any more. Where the new one bears its name, what is kept of it has to run out first."""
    scene.stranger.key = SigningKey.generate(name)
    hours = 0

    async def is_heard() -> bool:
        nonlocal hours
        hours += 1
        scene.town.clock.forward(hours=1)
        said = scene.room.event(content=ciphertext())
        answer = await scene.stranger.sends(scene.house, [said.pdu])
        return answer.status == 200 and answer.json["pdus"] == {said.id: {}}

    while not await is_heard():
        assert hours < most, f"a key lasts for {DAY_MS // 3_600_000} hours here, and then the new one counts"
    await scene.nothing_is_lost()


async def test_an_event_from_the_end_of_time_is_followed_by_others(scene: Scene) -> None:
    deepest = 2**53 - 1
    too_deep = {**scene.room.event(content=ciphertext()).pdu, "depth": deepest + 1}
    await scene.sends_with_a_good_one([too_deep])
    last = scene.room.said(scene.room.event(content=ciphertext(), depth=deepest))
    assert (await scene.stranger.sends(scene.house, [last.pdu])).json["pdus"] == {last.id: {}}
    assert await scene.bob.sees(last.id)
    for _ in range(2):
        sent = await scene.alice.sends(scene.room_id)
        assert await until(lambda sent=sent: any(sent in _ids(one, scene) for one in scene.stranger.heard)), "it leaves"
    depths = [pdu["depth"] for body in scene.stranger.heard for pdu in body.get("pdus", [])]
    assert max(depths) == deepest, "no deeper than the standard has room for"
    shown = [one["event_id"] for one in await scene.bob.history(scene.room_id)]
    assert shown.index(sent) < shown.index(last.id), "and still in order"
    await scene.nothing_is_lost()


def _ids(body: dict[str, Any], scene: Scene) -> list[str]:
    return [events.parse(pdu, scene.room.version).id for pdu in body.get("pdus", [])]


async def test_answers_that_unfold_or_never_end_are_let_go(scene: Scene) -> None:
    ended = asyncio.Event()

    async def unfolds(http: web.BaseRequest, _: bytes) -> web.StreamResponse:
        bomb = gzip.compress(b'{"displayname":"' + b" " * 100_000_000 + b'"}')
        return web.Response(body=bomb, content_type="application/json", headers={"Content-Encoding": "gzip"})

    async def drips(http: web.BaseRequest, _: bytes) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(http)
        try:
            for _number in range(10_000):
                await answer.write(b" ")
                await asyncio.sleep(0.01)
        except (ConnectionError, aiohttp.ClientConnectionError, asyncio.CancelledError):
            pass
        finally:
            ended.set()
        return answer

    assert scene.house.server is not None
    scene.house.server.outbox._connections.timeout = 0.5
    for answer in (unfolds, drips):
        scene.stranger.holds[f"{FEDERATION}/query/profile"] = answer
        refused = await scene.alice.is_refused(scene.alice.calls("GET", path("profile", f"@any:{scene.stranger.name}")))
        assert refused.status in (404, 502, 504)
    assert await until(ended.is_set), "whoever drips is hung up on"
    await scene.nothing_is_lost()
