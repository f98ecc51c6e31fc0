"""Transactions of a stranger's server, properly signed, with events and units in them that are wrong in every way we know."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.signing import SigningKey
from relay.web import MAX_FEDERATION_BODY
from tests.fuzz.oddities import NOBODY, NUMBERS, ROOT, as_json, bounded, deep, values, words_of
from tests.fuzz.scene import Scene, refusal
from tests.fuzz.stranger import ENCRYPTED, resigned
from tests.people import ciphertext

EVENT_WORDS = tuple(
    sorted(
        {
            *words_of(ROOT / "relay/protocol/event.py"),
            "prev_events",
            "auth_events",
            "hashes",
            "signatures",
            "unsigned",
            "depth",
        }
    )
)


async def test_a_good_event_of_the_stranger_is_heard(scene: Scene) -> None:
    assert not await scene.sends_with_a_good_one([])
    assert await scene.bob.sees(scene.good[0]), "the hand-made server speaks the standard"
    await scene.sends_with_a_good_one(
        [scene.room.event(type="m.room.message", content={"body": "clear"}, prev_events=["$unknown"]).pdu]
    )
    assert any(level == "info" for level, _, _ in scene.ears.lines), "whoever listens to the relay hears it"


@bounded(150)
@given(data=st.data())
async def test_a_mutated_event_harms_nobody(scene: Scene, data: st.DataObject) -> None:
    types = (
        "m.room.encrypted",
        "m.room.member",
        "m.room.power_levels",
        "m.room.redaction",
        "m.room.server_acl",
        "m.room.create",
    )
    kind = data.draw(st.sampled_from(types), "type")
    state_key = {"m.room.encrypted": {}, "m.room.redaction": {}, "m.room.member": {"state_key": scene.stranger.user}}
    event = scene.room.event(kind, CONTENTS[kind], **state_key.get(kind, {"state_key": ""}))
    pdu: dict[str, Any] = copy.deepcopy(event.pdu)
    odd = values(EVENT_WORDS, scene.known)
    for _ in range(data.draw(st.integers(1, 3), "how many")):
        where = data.draw(st.sampled_from((pdu, pdu, pdu.get("content"), pdu.get("hashes"), pdu.get("signatures"))))
        where = where if isinstance(where, dict) else pdu
        name = data.draw(st.sampled_from((*where, *EVENT_WORDS)), "key")
        if data.draw(st.booleans(), "taken out"):
            where.pop(name, None)
        else:
            where[name] = _sendable(data.draw(odd, "value"))
    if data.draw(st.booleans(), "signed anew"):
        pdu = resigned(pdu, scene.stranger)
    # What leaves the room, or shuts the stranger out, would make all that follows wrong.
    if pdu.get("type") in ("m.room.member", "m.room.server_acl", "m.room.power_levels", "m.room.create"):
        pdu["sender"] = scene.stranger.user if pdu.get("sender") != scene.stranger.user else f"@nobody:{NOBODY}"
    await scene.sends_with_a_good_one([pdu])


CONTENTS: dict[str, dict[str, Any]] = {
    "m.room.encrypted": ENCRYPTED,
    "m.room.member": {"membership": "join"},
    "m.room.power_levels": {"users": {}, "events": {}},
    "m.room.redaction": {"redacts": "$nothing"},
    "m.room.server_acl": {"allow": ["*"]},
    "m.room.create": {"room_version": "12"},
}


def _sendable(value: Any) -> Any:
    """As another JSON library would read what was sent; orjson, which sends it here, has no integers beyond 64 bits."""
    try:
        return orjson.loads(as_json(value))
    except orjson.JSONDecodeError:
        return None


async def test_an_event_is_taken_from_nobody_but_its_sender(scene: Scene) -> None:
    room, mallory, other = scene.room, scene.stranger, SigningKey.generate("ed25519:other")
    signed = room.event().pdu
    cases: dict[str, dict[str, Any]] = {
        "signed with a key that the server does not publish": room.event(key=other, content=ciphertext()).pdu,
        "signed under the name of a published key, but not with it": room.event(
            key=_named_like(mallory.key, other), content=ciphertext()
        ).pdu,
        "with no signature": {**signed, "signatures": {}},
        "with a signature of somebody else only": {
            **signed,
            "signatures": {scene.house.name: signed["signatures"][mallory.name]},
        },
        "with a signature that is no base64": {**signed, "signatures": {mallory.name: {mallory.key.key_id: "%%%"}}},
        "with a signature of another length": {**signed, "signatures": {mallory.name: {mallory.key.key_id: "AAAA"}}},
        "with a thousand signatures of nobody": {
            **signed,
            "signatures": {mallory.name: {f"ed25519:{n}": "AAAA" for n in range(1000)}},
        },
        "in the name of a person here": room.event(sender=scene.alice.id).pdu,
        "in the name of a person of a server that does not answer": room.event(sender=f"@nobody:{NOBODY}").pdu,
        "in the name of a person of the stranger's who is not in the room": room.event(
            sender=f"@ghost:{mallory.name}"
        ).pdu,
    }
    for what, pdu in cases.items():
        results = await scene.sends_with_a_good_one([pdu])
        assert all(scene.refused(results, event_id) for event_id in results), (
            f"an event {what} is refused, with a reason: {results}"
        )
        for event_id in results:
            assert await scene.is_nowhere(event_id), f"and an event {what} is shown to nobody"
    history = await scene.bob.history(scene.room_id)
    assert {
        event["event_id"]
        for event in history
        if event["sender"] == mallory.user and event["type"] == "m.room.encrypted"
    } == set(scene.good)
    await scene.nothing_is_lost()


def _named_like(key: SigningKey, other: SigningKey) -> SigningKey:
    return SigningKey.load(f"ed25519 {key.key_id.partition(':')[2]} {other.dump().split()[2]}")


async def test_an_event_whose_content_was_changed_on_the_way_loses_its_content(scene: Scene) -> None:
    pdu = copy.deepcopy(scene.room.event(content=ciphertext()).pdu)
    pdu["content"]["ciphertext"] = "FORGED" * 10
    results = await scene.sends_with_a_good_one([pdu])
    for event_id in results:
        shown = await scene.bob.event(scene.room_id, event_id)
        assert "FORGED" not in str(shown), "what the hash does not cover is not shown"
    await scene.nothing_is_lost()


async def test_what_is_no_event_is_dropped_beside_those_that_are(scene: Scene) -> None:
    pdu = scene.room.event().pdu
    bad: list[Any] = [
        None, 1, "text", [], {}, {"room_id": scene.room_id}, {**pdu, "depth": 0.5}, {**pdu, "depth": -1}, {**pdu, "depth": 2**63},
        {**pdu, "origin_server_ts": 2**53}, {**pdu, "origin_server_ts": "now"}, {**pdu, "prev_events": ["$x"] * 21}, {**pdu, "prev_events": []},
        {**pdu, "auth_events": ["$x"] * 11}, {**pdu, "auth_events": [scene.room.last.id] * 2}, {**pdu, "prev_events": [[scene.room.last.id, {}]]},
        {**pdu, "type": "a" * 256}, {**pdu, "state_key": "a" * 256}, {**pdu, "sender": "mallory"}, {**pdu, "room_id": "!" + "a" * 300},
        {**pdu, "content": []}, {**pdu, "content": {"n": 1.5}}, {**pdu, "content": {"n": 2**53}}, {**pdu, "hashes": []}, {**pdu, "signatures": "x"},
        resigned({**pdu, "content": {**ENCRYPTED, "ciphertext": "a" * 66_000}}, scene.stranger),
        resigned({**pdu, "content": {**ENCRYPTED, **{f"k{n}": "" for n in range(9_000)}}}, scene.stranger),
    ]  # fmt: skip
    for start in range(0, len(bad), 9):
        results = await scene.sends_with_a_good_one(bad[start : start + 9])
        assert all(scene.refused(results, one) for one in results), f"none of them is taken: {results}"
    await scene.nothing_is_lost()


@pytest.mark.parametrize("number", [*map(str, NUMBERS), "1e999", "-1e999", "NaN", "1" * 5000])
async def test_no_number_breaks_a_transaction(scene: Scene, number: str) -> None:
    body = orjson.dumps(
        {"origin": scene.stranger.name, "pdus": [scene.room.event(content={**ENCRYPTED, "n": "HERE"}).pdu], "edus": []}
    )
    for raw in (
        body.replace(b'"HERE"', number.encode()),
        b'{"origin_server_ts":' + number.encode() + b',"pdus":[],"edus":[]}',
    ):
        answer = await scene.stranger.sends_raw(scene.house, raw)
        assert answer.status in (200, 400, 401), f"{number}: {answer.status} {answer.body!r}"
    scene.ears.nothing_broke()
    await scene.sends_with_a_good_one([])


async def test_what_is_no_transaction_is_refused_as_a_whole(scene: Scene) -> None:
    pdu, name = scene.room.event().pdu, scene.stranger.name
    some = orjson.dumps(pdu)
    cases: dict[str, tuple[bytes, str]] = {
        "no JSON": (b"{", "M_NOT_JSON"),
        "no object": (b"[]", "M_BAD_JSON"),
        "no UTF-8": (b'{"pdus":["\xff"]}', "M_NOT_JSON"),
        "a lone surrogate": (b'{"pdus":["\\ud800"]}', "M_NOT_JSON"),
        "NaN": (b'{"pdus":[NaN]}', "M_NOT_JSON"),
        "units that are no list": (b'{"pdus":{}}', "M_BAD_JSON"),
        "EDUs that are no list": (b'{"pdus":[],"edus":"x"}', "M_BAD_JSON"),
        "nested too deep": (b'{"pdus":[' + deep(101) + b"]}", "M_BAD_JSON"),
        "nested ten thousand levels deep": (b'{"pdus":[' + deep(10_000) + b"]}", "M_NOT_JSON"),
        "51 events": (b'{"pdus":[' + b",".join([some] * 51) + b"]}", "M_BAD_JSON"),
        "101 EDUs": (b'{"pdus":[],"edus":[' + b",".join([b"{}"] * 101) + b"]}", "M_BAD_JSON"),
        "of another origin": (b'{"pdus":[],"origin":"elsewhere.example"}', "M_FORBIDDEN"),
    }
    for what, (body, errcode) in cases.items():
        answer = await scene.stranger.sends_raw(scene.house, body)
        assert refusal(answer, what) == errcode, f"a transaction with {what} is refused for that: {answer.json}"
    large = b'{"pdus":[],"origin":"' + name.encode() + b'","x":"' + b"a" * MAX_FEDERATION_BODY + b'"}'
    answer = await scene.stranger.sends_raw(scene.house, large)
    assert answer.status == 413 and refusal(answer, "a body that is too large") == "M_TOO_LARGE"
    await scene.sends_with_a_good_one([])
    await scene.nothing_is_lost()


async def test_of_a_key_that_stands_twice_everybody_reads_the_same(scene: Scene) -> None:
    """Whichever of the two counts, it has to be the one that was signed and hashed."""
    event = scene.room.event(content=ciphertext())
    raw = event.raw.replace(b'"content":{', b'"content":{"ciphertext":"FORGED"},"content":{', 1)
    twice = b'{"pdus":[],"pdus":[' + raw + b'],"edus":[]}'
    answer = await scene.stranger.sends_raw(scene.house, twice)
    assert answer.status in (200, 400, 401), "keys that stand twice are refused, or read in one way"
    assert "FORGED" not in str(await scene.bob.history(scene.room_id)), "what was not signed is not shown"
    scene.ears.nothing_broke()
    await scene.sends_with_a_good_one([])


async def test_a_transaction_that_is_played_again_changes_nothing(scene: Scene) -> None:
    event = scene.room.event(content=ciphertext())
    first = await scene.stranger.sends(scene.house, [event.pdu], txn="once")
    again = await scene.stranger.sends(scene.house, [event.pdu], txn="once")
    other_txn = await scene.stranger.sends(scene.house, [event.pdu, event.pdu], txn="again")
    assert first.json == again.json == other_txn.json == {"pdus": {event.id: {}}}, "each time the same answer"
    stranger = scene.stranger
    copied = await stranger.asks(
        scene.house, "PUT", "/_matrix/federation/v1/send/once", header=_header_of(scene, b"{}")
    )
    refusal(copied, "the header of one request on another")
    await scene.house.restart()
    late = await scene.stranger.sends(scene.house, [event.pdu], txn="once")
    assert late.json == {"pdus": {event.id: {}}}, "also after a restart"
    ids = [one["event_id"] for one in await scene.bob.history(scene.room_id)]
    assert ids.count(event.id) == 1, "the room has it once"


def _header_of(scene: Scene, body: bytes) -> str:
    from federation.xmatrix import authorization

    where = "/_matrix/federation/v1/send/another"
    return authorization("PUT", where, scene.stranger.name, scene.house.name, body, scene.stranger.key)


EDU_WORDS = tuple(
    sorted(
        {
            word
            for path in ("relay/ephemeral/receipts.py", "relay/keys/to_device.py", "federation/inbound.py")
            for word in words_of(ROOT / path)
        }
    )
)
EDUS = (
    "m.typing", "m.receipt", "m.presence", "m.device_list_update", "m.signing_key_update", "m.direct_to_device", "org.matrix.signing_key_update",
)  # fmt: skip


@bounded(120)
@given(data=st.data())
async def test_no_unit_breaks_anything(scene: Scene, data: st.DataObject) -> None:
    odd = values(EDU_WORDS, scene.known)
    contents = st.dictionaries(st.sampled_from((*EDU_WORDS, *scene.known)), odd, max_size=8)
    kind = data.draw(st.sampled_from(EDUS), "type")
    near = st.sampled_from(list(_decent_units(scene)[kind])) if kind in _decent_units(scene) else st.just("content")
    content: Any = data.draw(st.one_of(contents, odd))
    if data.draw(st.booleans(), "nearly decent"):
        content = {**_decent_units(scene).get(kind, {}), data.draw(near): data.draw(odd)}
    await scene.sends_with_a_good_one(
        [], [_sendable({"edu_type": kind, "content": content}), None, 1, {"edu_type": 1}, {"edu_type": kind}]
    )


def _decent_units(scene: Scene) -> dict[str, dict[str, Any]]:
    mallory, alice = scene.stranger.user, scene.alice
    return {
        "m.typing": {"room_id": scene.room_id, "user_id": mallory, "typing": True},
        "m.receipt": {scene.room_id: {"m.read": {mallory: {"event_ids": [scene.room.last.id], "data": {"ts": 1}}}}},
        "m.presence": {"push": [{"user_id": mallory, "presence": "online", "last_active_ago": 1}]},
        "m.device_list_update": {"user_id": mallory, "device_id": "D", "stream_id": 2, "prev_id": [1], "deleted": False},
        "m.signing_key_update": {"user_id": mallory, "master_key": {"user_id": mallory, "usage": ["master"], "keys": {"ed25519:a": "a"}}},
        "m.direct_to_device": {
            "sender": mallory, "type": "m.room.encrypted", "message_id": "1",
            "messages": {alice.id: {alice.device: {"algorithm": "m.olm.v1.curve25519-aes-sha2", "sender_key": "k", "ciphertext": {}}}},
        },
    }  # fmt: skip


async def test_units_of_the_wrong_kind_reach_nobody_and_the_others_do(scene: Scene) -> None:
    mallory, alice = scene.stranger.user, scene.alice
    forged = [
        {"edu_type": "m.typing", "content": {"room_id": scene.room_id, "user_id": alice.id, "typing": True}},
        {"edu_type": "m.typing", "content": {"room_id": scene.room_id, "user_id": f"@ghost:{scene.stranger.name}", "typing": True}},
        {"edu_type": "m.receipt", "content": {scene.room_id: {"m.read": {alice.id: {"event_ids": [scene.room.last.id], "data": {"ts": 1}}}}}},
        {"edu_type": "m.direct_to_device", "content": {
            "sender": alice.id, "type": "m.room.encrypted", "message_id": "f1", "messages": {scene.bob.id: {"*": ENCRYPTED}}}},
        {"edu_type": "m.signing_key_update", "content": {"user_id": alice.id, "master_key": {}}},
        {"edu_type": "m.device_list_update", "content": {"user_id": alice.id, "device_id": "X", "stream_id": 1}},
    ]  # fmt: skip
    typing = {"edu_type": "m.typing", "content": {"room_id": scene.room_id, "user_id": mallory, "typing": True}}
    await scene.bob.syncs()
    await scene.sends_with_a_good_one([], [*forged, {"edu_type": "m.unheard.of", "content": {}}, typing])
    assert await scene.bob.notices(lambda: scene.bob.typing.get(scene.room_id) == [mallory]), (
        "the decent unit behind the forged ones is heard"
    )
    assert (alice.id, "m.read") not in scene.bob.receipts[scene.room_id], (
        "nobody's server speaks for the people of another"
    )
    assert not scene.bob.to_device, "nor sends messages in their name"
    assert not scene.bob.devices_changed - {mallory}, "nor has news of their devices"
