"""One relay, two people: a room, messages, and what a sync brings of them."""

from __future__ import annotations

import asyncio

from tests.people import ciphertext
from tests.town import Town


async def test_two_people_talk_in_a_room_that_is_encrypted_by_itself(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    encryption = await bob.reads(room, "m.room.encryption")
    assert encryption["algorithm"] == "m.megolm.v1.aes-sha2", "nobody had to ask for encryption"
    sent = await alice.sends(room)
    seen = await bob.sees(sent)
    assert seen is not None, "a message reaches the other person's sync"
    assert seen["sender"] == alice.id and seen["type"] == "m.room.encrypted"
    answer = await bob.sends(room)
    assert await alice.sees(answer), "and back"


async def test_a_message_that_is_sent_twice_under_one_transaction_id_is_sent_once(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    content = ciphertext()
    ids = await asyncio.gather(*(alice.sends(room, content, txn="same") for _ in range(5)))
    assert len(set(ids)) == 1, "impatient retries all get the first one's event ID"
    assert await alice.sends(room, content, txn="same") == ids[0], "a late retry too"
    await town.houses["one"].restart()
    assert await alice.sends(room, content, txn="same") == ids[0], "and one after a restart"
    encrypted = [e for e in await alice.history(room) if e["type"] == "m.room.encrypted"]
    assert len(encrypted) == 1, "the room holds it once"
    phone = await alice.on_another_device()
    assert await phone.sends(room, content, txn="same") != ids[0], "another device counts for itself"


async def test_the_sender_recognises_her_own_message_by_its_transaction_id(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    phone = await alice.on_another_device()
    sent = await alice.sends(room, txn="mine")
    for person, expected in ((alice, "mine"), (bob, None), (phone, None)):
        seen = await person.sees(sent)
        assert seen is not None
        told = seen.get("unsigned", {}).get("transaction_id")
        assert told == expected, (
            f"the transaction ID is told to the device that sent it and to no other ({person.name})"
        )


async def test_an_initial_sync_shows_the_room_and_an_incremental_one_what_is_new(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = await alice.sends(room)
    answer = await bob.syncs()
    shown = answer["rooms"]["join"][room]
    types = {e["type"] for e in shown["state"]["events"] + shown["timeline"]["events"]}
    assert {"m.room.create", "m.room.member", "m.room.power_levels", "m.room.encryption"} <= types, "the state is whole"
    assert shown["timeline"]["events"][-1]["event_id"] == sent, "the latest message comes last"
    assert shown["summary"]["m.joined_member_count"] == 2
    quiet = await bob.syncs()
    assert "rooms" not in quiet or not quiet["rooms"].get("join"), "nothing happened, so nothing is told"
    more = [await alice.sends(room) for _ in range(3)]
    answer = await bob.syncs()
    new = answer["rooms"]["join"][room]
    assert [e["event_id"] for e in new["timeline"]["events"]] == more, "what is new, in order, each once"
    assert new["timeline"]["limited"] is False and not new["state"]["events"], "nothing is missing, nothing is repeated"


async def test_a_long_poll_wakes_as_soon_as_something_happens(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    waiting = asyncio.create_task(bob.syncs(timeout=30000))
    await asyncio.sleep(0.2)
    assert not waiting.done(), "with nothing to tell the relay waits"
    sent = await alice.sends(room)
    answer = await asyncio.wait_for(waiting, 5)
    events = answer["rooms"]["join"][room]["timeline"]["events"]
    assert [e["event_id"] for e in events] == [sent], "the message ends the wait"


async def test_a_new_room_and_an_invitation_end_a_long_poll_too(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    await bob.syncs()
    waiting = asyncio.create_task(bob.syncs(timeout=30000))
    await asyncio.sleep(0.1)
    room = await alice.creates_room(name="Studio")
    await alice.invites_to(room, bob)
    await asyncio.wait_for(waiting, 5)
    assert room in bob.invites, "an invitation arrives by itself"
    stripped = {(e["type"], e["state_key"]): e["content"] for e in bob.invites[room]}
    assert stripped["m.room.name", ""] == {"name": "Studio"}, "she sees what the room is called before she joins"
    assert stripped["m.room.encryption", ""]["algorithm"], "and that it is encrypted"
    assert stripped["m.room.member", bob.id]["membership"] == "invite"
    await bob.joins(room)
    answer = await bob.syncs()
    assert room in answer["rooms"]["join"], "after joining the room is in the sync"
    assert ("m.room.create", "") in bob.state[room], "with its whole state"


async def test_a_message_typed_while_the_relay_restarts_is_there_with_the_old_token(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    await alice.is_typing(room)
    await bob.syncs()
    await town.houses["one"].restart()
    sent = await alice.sends(room)
    answer = await bob.syncs()
    assert [e["event_id"] for e in answer["rooms"]["join"][room]["timeline"]["events"]] == [sent], (
        "the token outlives the restart"
    )
