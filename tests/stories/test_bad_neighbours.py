"""A malicious server: whatever it sends, it is told what was wrong, and nobody else loses anything."""

from __future__ import annotations

from typing import Any

import pytest

from relay.errors import RemoteError
from tests.forger import Forger
from tests.people import Person, ciphertext
from tests.town import Town


async def meet(town: Town) -> tuple[Person, Person, Forger, str]:
    """Alice, and Mallory of a forging server, in a room of Alice's."""
    alice, mallory = await town.users("alice@one", "mallory@two")
    room = await alice.creates_room(with_=mallory)
    await alice.syncs()
    two = town.houses["two"]
    return alice, mallory, Forger(two, alice.server), room  # type: ignore[arg-type]


def refused(answer: dict[str, Any], event_id: str) -> bool:
    return bool(answer["pdus"].get(event_id, {}).get("error"))


async def test_nobody_speaks_in_another_servers_name(town: Town) -> None:
    alice, _, forger, room = await meet(town)
    event = await forger.builds(room, alice.id, "m.room.encrypted", ciphertext())
    answer = await forger.transaction([event.pdu])
    assert event.id not in answer["pdus"] or refused(answer, event.id), "the signature is not Alice's server's"
    assert await alice.does_not_see(event.id)
    assert event.id not in [e["event_id"] for e in await alice.history(room)]


async def test_nobody_takes_power_she_was_not_given(town: Town) -> None:
    alice, mallory, forger, room = await meet(town)
    levels = {"users": {mallory.id: 100}}
    for type, state_key, content in (
        ("m.room.power_levels", "", levels),
        ("m.room.member", alice.id, {"membership": "ban"}),
        ("m.room.join_rules", "", {"join_rule": "public"}),
        ("m.room.create", "", {"room_version": "12"}),
        ("m.room.member", "@ghost:" + mallory.server, {"membership": "join"}),
    ):
        event = await forger.builds(room, mallory.id, type, content, state_key=state_key)
        answer = await forger.transaction([event.pdu])
        assert event.id not in answer["pdus"] or refused(answer, event.id), f"{type} is not hers to set"
        assert await alice.does_not_see(event.id)
    assert (await alice.members(room))[alice.id] == "join"
    assert (await alice.reads(room, "m.room.join_rules"))["join_rule"] == "invite"
    sent = await alice.sends(room)
    assert await mallory.sees(sent), "the honest part of the conversation goes on"


async def test_a_good_event_among_bad_ones_is_taken(town: Town) -> None:
    alice, mallory, forger, room = await meet(town)
    good = await forger.builds(room, mallory.id, "m.room.encrypted", ciphertext())
    spoilt = {**good.pdu, "signatures": {mallory.server: {"ed25519:x": "A" * 86}}, "depth": good.pdu["depth"] + 7}
    bad: list[Any] = [
        {}, "not an event", 17, None, {"type": "m.room.encrypted"}, spoilt,
        {**good.pdu, "room_id": "!elsewhere"}, {**good.pdu, "depth": -1}, {**good.pdu, "depth": 2**70},
        {**good.pdu, "depth": 1.5}, {**good.pdu, "prev_events": ["x"] * 5000}, {**good.pdu, "auth_events": "no"},
        {**good.pdu, "content": {"a": "b" * 70_000}}, {**good.pdu, "sender": "nobody"}, {**good.pdu, "type": None},
        {**good.pdu, "hashes": {"sha256": "AAAA"}},
    ]  # fmt: skip
    answer = await forger.transaction([*bad, good.pdu])
    assert not refused(answer, good.id)
    assert await alice.sees(good.id), "the good one is taken in spite of its company"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"pdus": "no"},
        {"pdus": [], "edus": [], "origin": "another.example", "origin_server_ts": 1},
        {"pdus": [{}] * 51, "edus": []},
        {"pdus": [], "edus": [{}] * 101},
    ],
    ids=["empty", "wrong type", "another origin", "too many events", "too many EDUs"],
)
async def test_a_malformed_transaction_is_refused_as_a_whole(town: Town, body: dict[str, Any]) -> None:
    alice, mallory, forger, room = await meet(town)
    try:
        await forger.asks("PUT", "/_matrix/federation/v1/send/odd", body)
    except RemoteError as error:
        assert 400 <= error.status < 500, f"it is their fault, and they are told: {error}"
    sent = await mallory.sends(room)
    assert await alice.sees(sent), "the next one is taken"


async def test_a_replayed_transaction_does_nothing_twice(town: Town) -> None:
    alice, mallory, forger, room = await meet(town)
    event = await forger.builds(room, mallory.id, "m.room.encrypted", ciphertext())
    note = {
        "sender": mallory.id, "type": "m.room.encrypted", "message_id": "once",
        "messages": {alice.id: {"*": {"algorithm": "m.olm.v1.curve25519-aes-sha2", "sender_key": "k" * 43,
                                      "ciphertext": {"k" * 43: {"type": 0, "body": "QUJD" * 8}}}}},
    }  # fmt: skip
    edus = [{"edu_type": "m.direct_to_device", "content": note}]
    for txn in ("same", "same", "another"):
        await forger.transaction([event.pdu], edus, txn=txn)
    assert await alice.sees(event.id)
    await alice.syncs()
    assert alice.ids(room).count(event.id) == 1, "the event stands there once"
    assert len(alice.to_device) == 1, "the message to the device came once"
    await town.houses["one"].restart()
    await forger.transaction([event.pdu], edus, txn="same")
    await alice.syncs()
    assert alice.ids(room).count(event.id) == 1 and len(alice.to_device) == 1, "also after a restart"


async def test_an_event_with_invented_ancestors_harms_nobody(town: Town) -> None:
    alice, mallory, forger, room = await meet(town)
    invented = ["$" + letter * 43 for letter in "abc"]
    event = await forger.builds(room, mallory.id, "m.room.encrypted", ciphertext(), prev_events=invented, depth=2**40)
    await forger.transaction([event.pdu])
    for _ in range(3):
        sent = await alice.sends(room)
        assert await mallory.sees(sent), "the room goes on"
        assert await alice.sees(await mallory.sends(room))
    await alice.history(room)


async def test_rooms_are_told_of_to_nobody_outside(town: Town) -> None:
    alice, mallory, forger, _ = await meet(town)
    secret = await alice.creates_room()
    sent = await alice.sends(secret)
    quoted = secret.replace("!", "%21").replace(":", "%3A")
    for where in (
        f"/_matrix/federation/v1/state/{quoted}?event_id={sent.replace('$', '%24')}",
        f"/_matrix/federation/v1/state_ids/{quoted}?event_id={sent.replace('$', '%24')}",
        f"/_matrix/federation/v1/backfill/{quoted}?v={sent.replace('$', '%24')}&limit=10",
        f"/_matrix/federation/v1/event/{sent.replace('$', '%24')}",
        f"/_matrix/federation/v1/event_auth/{quoted}/{sent.replace('$', '%24')}",
        f"/_matrix/federation/v1/make_join/{quoted}/{mallory.id.replace('@', '%40')}?ver=12",
    ):
        with pytest.raises(RemoteError) as refusal:
            await forger.asks("GET", where)
        assert refusal.value.status in (403, 404), where
