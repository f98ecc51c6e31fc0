"""Two relays: people meet by invitation and by address, and everything they do crosses over."""

from __future__ import annotations

from tests.people import path
from tests.town import Town


async def test_a_message_crosses_both_ways(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room()
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites), "the invitation crosses"
    stripped = {e["type"]: e["content"] for e in bob.invites[room]}
    assert stripped["m.room.encryption"]["algorithm"], "it says that the room is encrypted"
    await bob.joins(room)
    await bob.syncs()
    assert room in bob.rooms and ("m.room.create", "") in bob.state[room], "joining brings the room's state"
    sent = await alice.sends(room)
    seen = await bob.sees(sent)
    assert seen is not None and seen["sender"] == alice.id, "a message crosses to the other server"
    answer = await bob.sends(room)
    assert await alice.sees(answer), "and back"
    assert (await alice.members(room)) == (await bob.members(room)), "both sides know the same members"


async def test_an_address_leads_into_a_room_elsewhere(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    for version in ("12", "10"):
        alias = f"studio{version}"
        room = await alice.creates_room(preset="public_chat", room_alias_name=alias, room_version=version)
        assert await bob.joins(f"#{alias}:{alice.server}") == room, (
            f"the address of another server is looked up there (version {version})"
        )
        sent = await bob.sends(room)
        assert await alice.sees(sent), "whoever came by the address can speak"
        back = await alice.sends(room)
        assert await bob.sees(back)


async def test_a_directory_elsewhere_can_be_looked_through(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(preset="public_chat", visibility="public", name="Studio")
    listed = await bob.calls("GET", "publicRooms", server=alice.server)
    assert [r["room_id"] for r in listed["chunk"]] == [room]
    await bob.joins(room, alice.server)
    assert room in (await bob.calls("GET", "joined_rooms"))["joined_rooms"], "a room ID with a server to ask is enough"


async def test_an_invitation_is_turned_down_across_servers(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room()
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await bob.leaves(room)
    await bob.syncs()
    assert room not in bob.invites, "her list of invitations is empty again"
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave")


async def test_an_invitation_is_taken_back_across_servers(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room()
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await alice.kicks(room, bob)
    assert await bob.notices(lambda: room not in bob.invites), "an invitation that was taken back disappears"


async def test_a_redaction_crosses_and_takes_the_ciphertext_with_it(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    sent = await alice.sends(room)
    assert await bob.sees(sent)
    redaction = await alice.redacts(room, sent)
    assert await bob.sees(redaction)
    event = await bob.event(room, sent)
    assert event["content"] == {} and event["unsigned"]["redacted_because"]["event_id"] == redaction


async def test_leaving_and_being_kicked_cross(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@two")
    room = await alice.creates_room(with_=[bob, carol])
    await bob.leaves(room)
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave")
    await carol.syncs()
    await alice.kicks(room, carol)
    assert await carol.notices(lambda: room in carol.left), "who is kicked from afar learns it"
    after = await alice.sends(room)
    assert await carol.does_not_see(after)
    await alice.invites_to(room, carol)
    assert await carol.notices(lambda: room in carol.invites)
    await carol.joins(room)
    again = await alice.sends(room)
    assert await carol.sees(again), "who is invited again and comes is back in the conversation"


async def test_typing_and_receipts_cross(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    await alice.is_typing(room)
    assert await bob.notices(lambda: bob.typing.get(room) == [alice.id]), "that someone types is seen elsewhere"
    sent = await alice.sends(room)
    assert await bob.sees(sent)
    await bob.has_read(room, sent)
    assert await alice.notices(lambda: alice.receipts[room].get((bob.id, "m.read")) == sent), (
        "that someone read it, too"
    )


async def test_media_and_profiles_cross(town: Town) -> None:
    import os

    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    blob = os.urandom(300_000)
    uri = await alice.uploads(blob)
    answer, got = await bob.downloads(uri)
    assert got == blob, "an encrypted attachment arrives as it was sent"
    assert answer.content_type == "application/octet-stream"
    _, again = await bob.downloads(uri)
    assert again == blob
    await alice.calls("PUT", path("profile", alice.id, "displayname"), {"displayname": "Alice A."})
    assert await bob.notices(lambda: bob.name_of(room, alice) == "Alice A.")
    assert (await bob.calls("GET", path("profile", alice.id)))["displayname"] == "Alice A.", (
        "a profile is asked for where it is"
    )
    refused = await bob.is_refused(bob.downloads(f"mxc://{alice.server}/nosuchthing"))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")


async def test_a_knock_crosses(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}])
    await bob.knocks_on(room, alice.server)
    await bob.syncs()
    assert room in bob.knocks
    assert await alice.notices(lambda: ("m.room.member", bob.id) in alice.state[room])
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await bob.joins(room)
    sent = await bob.sends(room)
    assert await alice.sees(sent)


async def test_a_restricted_room_admits_whoever_is_in_the_other_room(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@two")
    space = await alice.creates_room(with_=bob)
    rule = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}
    room = await alice.creates_room(initial_state=[{"type": "m.room.join_rules", "content": rule}])
    await bob.joins(room, alice.server)
    sent = await bob.sends(room)
    assert await alice.sees(sent), "who is in the one room may come into the other"
    refused = await carol.is_refused(carol.joins(room, alice.server))
    assert refused.status == 403, "who is not may not"


async def test_state_changes_from_both_sides_at_once_resolve_alike(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    # In this version a creator stands in the power levels, so that two people can be equals.
    room = await alice.creates_room(
        with_=bob, room_version="11", power_level_content_override={"users": {alice.id: 100, bob.id: 100}}
    )
    await alice.syncs()
    await bob.syncs()
    town.cut("one", "two")
    mine = [await alice.sends(room) for _ in range(3)]
    await alice.sets(room, "m.room.name", {"name": "Alice's"})
    await alice.sets(room, "m.room.topic", {"topic": "Alice's"})
    theirs = [await bob.sends(room) for _ in range(3)]
    await bob.sets(room, "m.room.name", {"name": "Bob's"})
    town.mend("one", "two")
    town.clock.forward(minutes=5)
    last = await alice.sends(room)
    back = await bob.sends(room)
    for event_id in (*mine, last):
        assert await bob.sees(event_id), "everything said on the one side is heard on the other"
    for event_id in (*theirs, back):
        assert await alice.sees(event_id), "and the other way round"
    # One more from each, so that both have met what the other had last.
    for person, other in ((alice, bob), (bob, alice)):
        assert await other.sees(await person.sends(room))
    names = [await person.reads(room, "m.room.name") for person in (alice, bob)]
    assert names[0] == names[1], "both sides call the room the same"
    topics = [await person.reads(room, "m.room.topic") for person in (alice, bob)]
    assert topics == [{"topic": "Alice's"}, {"topic": "Alice's"}], "what only one side changed holds on both"


async def test_a_request_to_verify_crosses_without_words(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    request = {"msgtype": "m.key.verification.request", "from_device": "A", "methods": ["m.sas.v1"], "to": bob.id}
    asked = await alice.sends(room, {**request, "body": "Bob, is it you?"}, type="m.room.message")
    seen = await bob.sees(asked)
    assert seen is not None and {**seen["content"], "body": ""} == {**request, "body": ""}, "he is asked"
    assert seen["content"]["body"] and "Bob" not in seen["content"]["body"], "in fixed words"
    answer = {
        "from_device": "B",
        "methods": ["m.sas.v1"],
        "m.relates_to": {"rel_type": "m.reference", "event_id": asked},
    }
    ready = await bob.sends(room, answer, type="m.key.verification.ready")
    came = await alice.sees(ready)
    assert came is not None and came["content"] == answer, "and answers"
