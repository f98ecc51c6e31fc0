"""What other servers may read of a room: all that its history shows them, nothing that it does not, and never without end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from relay.protocol.event import Event, parse
from relay.rooms.room import Room
from relay.rooms.store import SOFT_FAILED
from tests.federation.residence import ALICE, SECRET, US, V1, Peer, Residence, at


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[Residence]:
    async with Residence(tmp_path).open() as opened:
        yield opened


def ids(room: Room, pdus: list[dict[str, Any]]) -> list[str]:
    return [parse(pdu, room.version, limits=False).id for pdu in pdus]


async def event_of(peer: Peer, event: Event) -> Any:
    return await peer.asks("GET", at(f"{V1}/event", event.id))


async def test_an_event_is_given_to_servers_in_the_room(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    said = await house.says(room)
    answer = await event_of(two, said)
    assert answer.status == 200, answer.json
    assert answer.json["origin"] == US and answer.json["pdus"] == [said.pdu], "the event as it was signed"
    answer = await event_of(three, said)
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "a server outside the room gets nothing"
    answer = await two.asks("GET", at(f"{V1}/event", "$unheard"))
    assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), "what is not known is not found"


async def test_every_question_is_for_residents_whom_the_room_admits(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    said = await house.says(room)
    missing = {"earliest_events": [], "latest_events": [said.id]}

    async def answers(peer: Peer, room_id: str = room.room_id) -> set[tuple[int, str | None]]:
        got = [
            await peer.asks("GET", at(f"{V1}/state", room_id, query=f"event_id={said.id}")),
            await peer.asks("GET", at(f"{V1}/state_ids", room_id, query=f"event_id={said.id}")),
            await peer.asks("GET", at(f"{V1}/event_auth", room_id, said.id)),
            await peer.asks("GET", at(f"{V1}/backfill", room_id, query=f"v={said.id}&limit=5")),
            await peer.asks("POST", at(f"{V1}/get_missing_events", room_id), missing),
        ]
        return {(one.status, one.errcode) for one in got}

    assert await answers(two) == {(200, None)}, "whoever is in the room gets answers"
    assert await answers(three) == {(403, "M_FORBIDDEN")}, "whoever is not does not"
    assert await answers(two, "!unheard") == {(404, "M_NOT_FOUND")}, "a room that nobody here is in is not found"
    await house.sets(room, "m.room.server_acl", {"allow": ["*"], "deny": ["two.example"]})
    assert await answers(two) == {(403, "M_FORBIDDEN")}, "nor does a server that the room denies"
    assert (await event_of(two, said)).status == 403, "not even a single event"


# --- history


async def test_the_last_words_of_people_who_left_can_be_asked_for(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    said = await house.says(room)
    await house.members.leave(ALICE, room.room_id)
    assert not room.local_joined
    left = room.state["m.room.member", ALICE]
    missing = {"earliest_events": [], "latest_events": [left]}
    answer = await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), missing)
    assert answer.status == 200 and said.id in ids(room, answer.json["events"]), "nobody else may have them"
    answer = await two.asks("GET", at(f"{V1}/event_auth", room.room_id, left))
    assert answer.status == 200 and answer.json["auth_chain"], "nor what lets one believe that she left"
    answer = await two.asks("GET", at(f"{V1}/state_ids", room.room_id, query=f"event_id={left}"))
    assert answer.status == 200
    answer = await three.asks("POST", at(f"{V1}/get_missing_events", room.room_id), missing)
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "they are for those who were there"
    answer = await three.template("join", room, three.user("dave"))
    assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), "and nobody is let into a room by those who left it"
    house.rooms.is_closed = lambda room_id: room_id == room.room_id
    for answer in (
        await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), missing),
        await two.asks("GET", at(f"{V1}/backfill", room.room_id, query=f"v={said.id}")),
        await event_of(two, said),
    ):
        assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), (
            "from a room that was shut nothing is read any more"
        )
    answer = await two.asks("GET", at(f"{V1}/event_auth", room.room_id, left))
    assert answer.status == 200, "that they left it can be believed all the same"


async def test_whoever_was_put_out_goes_back_from_there_and_from_nowhere_else(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    carol = await two.lives_in(room, "carol")
    before = await house.says(room)
    await house.members.kick(ALICE, room.room_id, carol)
    out = room.state["m.room.member", carol]
    said = [await house.says(room) for _ in range(2)]

    async def asked(*latest: str) -> tuple[int, list[str]]:
        missing = {"earliest_events": [], "latest_events": list(latest)}
        answer = await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), missing)
        return answer.status, ids(room, answer.json.get("events", []))

    status, given = await asked(out)
    assert status == 200 and before.id in given, "what came before it was put out, it may judge"
    status, given = await asked(out, said[1].id)
    assert status == 200 and before.id in given and said[0].id not in given, "what came after is not for it"
    assert (await asked(said[1].id))[0] == 403


async def test_a_refused_join_opens_no_history(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    old = await house.says(room)
    join = await two.writes(room, "mallory", type="m.room.member", content={"membership": "join"},
                            state_key=two.user("mallory"), after=[old])  # fmt: skip
    await house.sets(room, "m.room.join_rules", {"join_rule": "invite"})
    await two.transmits(join)
    one = await house.rooms.event(join.id)
    assert one is not None and one.marks & SOFT_FAILED, "there it was allowed, and is no more"
    missing = {"earliest_events": [], "latest_events": [join.id]}
    for answer in (
        await two.asks("GET", at(f"{V1}/state_ids", room.room_id, query=f"event_id={join.id}")),
        await two.asks("GET", at(f"{V1}/event", join.id)),
        await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), missing),
    ):
        assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "it was never there"


async def test_history_goes_back_from_where_it_is_asked(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = [await house.says(room) for _ in range(6)]
    answer = await two.asks("GET", at(f"{V1}/backfill", room.room_id, query=f"v={said[4].id}&limit=3"))
    assert ids(room, answer.json["pdus"]) == [said[4].id, said[3].id, said[2].id], "the named event and those before it"
    answer = await two.asks("GET", at(f"{V1}/backfill", room.room_id, query=f"v={said[5].id}&limit=1000"))
    whole = ids(room, answer.json["pdus"])
    assert len(whole) == len(set(whole)) and len(whole) <= 100, "each once, and not without end"
    assert answer.json["pdus"][-1]["type"] == "m.room.create", "back to the beginning"
    answer = await two.asks("GET", at(f"{V1}/backfill", room.room_id, query="limit=5"))
    assert (answer.status, answer.errcode) == (400, "M_MISSING_PARAM"), "it has to be said where to begin"
    answer = await two.asks("GET", at(f"{V1}/backfill", room.room_id, query="v=$unheard&limit=5"))
    assert answer.json["pdus"] == [], "from what is not known nothing follows"


async def test_a_long_history_is_cut(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = [await house.says(room) for _ in range(105)]
    answer = await two.asks("GET", at(f"{V1}/backfill", room.room_id, query=f"v={said[-1].id}&limit=500"))
    assert ids(room, answer.json["pdus"]) == [one.id for one in said[:4:-1]], "a hundred, the newest first"


async def test_what_lies_in_a_gap_is_given_oldest_first(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = [await house.says(room) for _ in range(30)]

    async def between(earliest: Event, latest: Event, **more: Any) -> list[str]:
        body = {"earliest_events": [earliest.id], "latest_events": [latest.id], **more}
        answer = await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), body)
        assert answer.status == 200, answer.json
        return ids(room, answer.json["events"])

    assert await between(said[0], said[5]) == [one.id for one in said[1:5]], "neither end is given"
    assert await between(said[0], said[29]) == [one.id for one in said[19:29]], "ten, where no number is said"
    assert await between(said[0], said[29], limit=1000) == [one.id for one in said[9:29]], "twenty at most"
    assert await between(said[0], said[5], min_depth=said[3].depth) == [said[3].id, said[4].id], "nothing from before"
    for bad in ({"limit": "many"}, {"min_depth": -1}, {"earliest_events": "x"}, {"latest_events": [7]}):
        body = {"earliest_events": [], "latest_events": [], **bad}
        answer = await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), body)
        assert (answer.status, answer.errcode) == (400, "M_BAD_JSON"), f"{bad} is refused"


async def test_both_sides_of_a_fork_are_found(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    root = await house.says(room)
    left, right = await two.writes(room, "carol", after=[root]), await two.writes(room, "carol", after=[root])
    await two.transmits(left, right)
    top = await house.says(room)
    body = {"earliest_events": [root.id], "latest_events": [top.id]}
    answer = await two.asks("POST", at(f"{V1}/get_missing_events", room.room_id), body)
    assert set(ids(room, answer.json["events"])) == {left.id, right.id}, "one event has two before it"


async def test_a_rejected_event_is_not_handed_on(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    bad = await two.writes(room, "carol", type="m.room.name", content={"name": "Mine"}, state_key="")
    answer = await two.transmits(bad)
    assert answer.json["pdus"][bad.id]["error"], "Carol may not name the room"
    assert (await event_of(two, bad)).status == 404, "whoever asks us for it gets nothing"


# --- what may be seen


async def visibility(house: Residence, room: Room, setting: str) -> Event:
    return await house.sets(room, "m.room.history_visibility", {"history_visibility": setting})


async def test_what_happened_before_a_server_came_is_redacted_for_it(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await visibility(house, room, "joined")
    secret = await house.says(room)
    await two.lives_in(room, "carol")
    heard = await house.says(room)
    answer = await two.asks("GET", at(f"{V1}/backfill", room.room_id, query=f"v={heard.id}&limit=10"))
    given = {parse(pdu, room.version).id: pdu for pdu in answer.json["pdus"]}
    assert given[heard.id]["content"] == SECRET, "what it was there for it gets whole"
    assert given[secret.id]["content"] == {}, "what came before is redacted, and keeps its ID"
    assert (await event_of(two, secret)).json["pdus"][0]["content"] == {}, "asked for by name as well"


async def test_what_happened_after_its_people_left_is_redacted(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await visibility(house, room, "joined")
    carol = await two.lives_in(room, "carol")
    await two.sends("leave", two.signs((await two.template("leave", room, carol)).json["event"]))
    secret = await house.says(room)
    await two.lives_in(room, "dora")
    answer = await event_of(two, secret)
    assert answer.json["pdus"][0]["content"] == {}, "nobody of theirs was there"


async def test_invited_history_begins_with_the_invite(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await visibility(house, room, "invited")
    secret = await house.says(room)
    await house.members._change(room.room_id, sender=ALICE, target=two.user("carol"), content={"membership": "invite"})
    heard = await house.says(room)
    await two.lives_in(room, "carol")
    assert (await event_of(two, secret)).json["pdus"][0]["content"] == {}, "before the invite it was not meant for them"
    assert (await event_of(two, heard)).json["pdus"][0]["content"] == SECRET, "from the invite on it was"


async def test_shared_history_is_open_to_every_server_in_the_room(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    old = await house.says(room)
    await two.lives_in(room, "carol")
    await visibility(house, room, "joined")
    assert (await event_of(two, old)).json["pdus"][0]["content"] == SECRET, "it was shared when it was said"


async def test_what_was_taken_back_is_redacted_for_everybody(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = await house.says(room)
    await house.sender.send(room.room_id, sender=ALICE, type="m.room.redaction", content={}, redacts=said.id)
    answer = await event_of(two, said)
    assert answer.json["pdus"][0]["content"] == {}, "the ciphertext is out of every answer at once"


async def test_a_readable_message_is_given_on_as_it_is_kept(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    await three.lives_in(room, "dave")
    clear = await two.writes(room, "carol", type="m.room.message", content={"msgtype": "m.text", "body": "in clear"})
    assert (await two.transmits(clear)).json["pdus"] == {clear.id: {}}, "it has its place in the graph"
    answer = await event_of(three, clear)
    assert answer.json["pdus"][0]["content"] == {}, "but its text is not here to be given on"
    assert ids(room, answer.json["pdus"]) == [clear.id], "under the ID that it always had"


# --- states


async def state_at(peer: Peer, room: Room, event: Event) -> tuple[list[str], list[str]]:
    asked = f"event_id={event.id}"
    answer = await peer.asks("GET", at(f"{V1}/state_ids", room.room_id, query=asked))
    assert answer.status == 200, answer.json
    whole = await peer.asks("GET", at(f"{V1}/state", room.room_id, query=asked))
    assert ids(room, whole.json["pdus"]) == answer.json["pdu_ids"], "both endpoints say the same"
    assert ids(room, whole.json["auth_chain"]) == answer.json["auth_chain_ids"], "of the auth chain too"
    return answer.json["pdu_ids"], answer.json["auth_chain_ids"]


async def test_the_state_is_the_one_before_the_event(house: Residence) -> None:
    room, two = await house.room(preset="public_chat", name="First"), house.peer("two.example")
    await two.lives_in(room, "carol")
    first = await room.event("m.room.name")
    assert first is not None
    second = await house.sets(room, "m.room.name", {"name": "Second"})
    said = await house.says(room)
    topic = await house.sets(room, "m.room.topic", {"topic": "New"})
    before_second, chain = await state_at(two, room, second)
    assert first.id in before_second and second.id not in before_second, "the name that it replaced still held"
    before_said, _ = await state_at(two, room, said)
    assert second.id in before_said and first.id not in before_said, "a message sees what was set before it"
    before_topic, _ = await state_at(two, room, topic)
    assert topic.id not in before_topic and len(before_topic) == len(before_said), "what is new replaces nothing"
    create = await room.event("m.room.create")
    power = await room.event("m.room.power_levels")
    assert create is not None and power is not None
    assert await state_at(two, room, create) == ([], []), "before the first event there is nothing"
    assert power.id in chain, "the chain names what authorises the state"


async def test_the_state_before_a_refused_event_is_known_too(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    carol = await two.lives_in(room, "carol")
    late = await two.writes(room, "carol", type="m.room.member", content={"membership": "join"}, state_key=carol)
    before = set(room.state.values())
    await house.members.ban(ALICE, room.room_id, carol)
    house.doors.unwelcome.add(carol)
    await two.lives_in(room, "dora")
    assert (await two.transmits(late)).status == 200, "an event that came too late is soft-failed"
    assert set((await state_at(two, room, late))[0]) == before, "and still has a state before it"


async def test_a_state_that_is_not_known_is_not_made_up(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    outlier = await two.writes(room, "carol")
    with house.db.write() as tx:
        house.appender.outlier(tx, room, outlier)
    await tx
    for query, errcode in (
        (f"event_id={outlier.id}", "M_NOT_FOUND"),
        ("event_id=$x", "M_NOT_FOUND"),
        ("", "M_MISSING_PARAM"),
    ):
        answer = await two.asks("GET", at(f"{V1}/state_ids", room.room_id, query=query))
        assert answer.errcode == errcode, answer.json


async def test_who_authorised_an_event_is_told_to_the_root(house: Residence) -> None:
    room, two = await house.room(preset="public_chat", version="11"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = await house.says(room)
    answer = await two.asks("GET", at(f"{V1}/event_auth", room.room_id, said.id))
    chain = answer.json["auth_chain"]
    found = set(ids(room, chain))
    assert {cited for pdu in [said.pdu, *chain] for cited in pdu["auth_events"]} == found, (
        "nothing lacks, nothing is too much"
    )
    assert "m.room.create" in {pdu["type"] for pdu in chain}, "it ends at the root"
    answer = await two.asks("GET", at(f"{V1}/event_auth", room.room_id, "$unheard"))
    assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), "of an unknown event nothing is known"
