"""What /sync makes once for many: people whose tokens differ share an answer, and nobody gets what is not hers any more."""

from __future__ import annotations

import json
from typing import Any

from tests.people import Person
from tests.town import Town

ONLY_MESSAGES = json.dumps({"room": {"timeline": {"types": ["m.room.encrypted"]}, "state": {"types": []}}})


async def _room_since(person: Person, room: str, since: str, **query: str) -> dict[str, Any]:
    answer = await person.calls("GET", "sync", since=since, **query)
    found: dict[str, Any] = answer["rooms"]["join"][room]
    return found


async def test_what_was_taken_back_is_in_nobodys_answer(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    begun = (await bob.syncs())["next_batch"]
    await carol.syncs()
    sent = await alice.sends(room)
    first = await _room_since(bob, room, begun, filter=ONLY_MESSAGES)
    assert first["timeline"]["events"][-1]["content"]["ciphertext"], (
        "bob gets the ciphertext, and his answer is kept for others"
    )
    await alice.redacts(room, sent)
    later = await _room_since(carol, room, begun, filter=ONLY_MESSAGES)
    event = later["timeline"]["events"][-1]
    assert event["event_id"] == sent, "carol's filter leaves the redaction itself out"
    assert "ciphertext" not in event["content"], "and what was taken back is gone from the answer that she would share"


async def test_tokens_from_before_and_after_a_change_of_state_do_not_share(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    before = (await bob.syncs())["next_batch"]
    await alice.sets(room, "m.room.pinned_events", {"pinned": []})
    after = (await carol.syncs())["next_batch"]
    await alice.sends(room)
    fresh = await _room_since(carol, room, after, filter='{"room": {"timeline": {"limit": 1}}}')
    stale = await _room_since(bob, room, before, filter='{"room": {"timeline": {"limit": 1}}}')
    assert not fresh["state"]["events"], "carol knows the state as it is"
    assert [event["type"] for event in stale["state"]["events"]] == ["m.room.pinned_events"], "bob hears what he missed"
    assert stale["timeline"]["limited"] and not fresh["timeline"]["limited"], "and that his timeline has a gap"
