"""One relay: invitations, leaving, being kicked and banned, knocking, forgetting; and who may do what."""

from __future__ import annotations

from tests.town import Town


async def test_an_invitation_can_be_turned_down_and_the_room_forgotten(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room()
    await alice.invites_to(room, bob)
    await bob.syncs()
    assert room in bob.invites
    await bob.leaves(room)
    answer = await bob.syncs()
    assert room in answer["rooms"]["leave"], "turning an invitation down is told to her other devices"
    assert (await alice.members(room))[bob.id] == "leave"
    await bob.forgets(room)
    bob.forget_everything()
    answer = await bob.syncs(filter='{"room":{"include_leave":true}}')
    assert room not in answer.get("rooms", {}).get("leave", {}), "what is forgotten is not spoken of again"


async def test_whoever_leaves_sees_nothing_more_of_the_room(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    before = await alice.sends(room)
    assert await bob.sees(before)
    await bob.leaves(room)
    after = await alice.sends(room)
    answer = await bob.syncs()
    left = answer["rooms"]["leave"][room]
    assert left["timeline"]["events"][-1]["content"]["membership"] == "leave", (
        "the last thing she sees is that she left"
    )
    assert await bob.does_not_see(after), "what comes later is not hers to see"
    await bob.leaves(room)
    await alice.syncs()
    leaves = [e for e in alice.timeline[room] if e.get("state_key") == bob.id and e["content"]["membership"] == "leave"]
    assert len(leaves) == 1, "a client that lost the answer asks again: that is well, and nobody hears of it twice"
    refused = await bob.is_refused(bob.sends(room))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN")
    refused = await bob.is_refused(bob.event(room, after))
    assert refused.status in (403, 404), "nor can she ask for it"
    assert (await bob.event(room, before))["event_id"] == before, "what she could see then she still can"
    refused = await bob.is_refused(bob.joins(room))
    assert refused.status == 403, "the room is by invitation only"
    refused = await alice.is_refused(alice.forgets(room))
    assert refused.status == 400, "a room is left before it is forgotten"


async def test_whoever_came_and_left_between_two_looks_is_told_of_the_whole_room(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(name="The den", preset="public_chat")
    await alice.invites_to(room, bob)
    await bob.syncs()
    await bob.joins(room)
    await bob.leaves(room)
    left = (await bob.syncs())["rooms"]["leave"][room]
    told = {event["type"] for event in [*left["state"]["events"], *left["timeline"]["events"]]}
    assert {"m.room.create", "m.room.name", "m.room.member"} <= told, "her client knew nothing of it before"
    later = await bob.syncs()
    assert room not in later.get("rooms", {}).get("leave", {}), "and is told once"
    await alice.invites_to(room, bob)
    await bob.syncs()
    await bob.leaves(room)
    left = (await bob.syncs())["rooms"]["leave"][room]
    told = {event["type"] for event in [*left["state"]["events"], *left["timeline"]["events"]]}
    assert told <= {"m.room.member"}, "whoever turns an invitation down learns nothing of the room by it"


async def test_a_kick_and_a_ban_take_somebody_out_without_their_reason(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    refused = await bob.is_refused(bob.kicks(room, carol))
    assert refused.status == 403, "a member without power kicks nobody"
    await bob.syncs()
    await alice.kicks(room, bob, reason="a private remark")
    await bob.syncs()
    assert room in bob.left, "who is kicked learns it"
    kick = bob.state[room]["m.room.member", bob.id]
    assert kick["content"] == {"membership": "leave"} and kick["sender"] == alice.id, (
        "the reason is free text, so it was left out"
    )
    await alice.invites_to(room, bob)
    await bob.joins(room)
    await alice.bans(room, bob, reason="another remark")
    assert (await alice.members(room))[bob.id] == "ban"
    refused = await alice.is_refused(alice.invites_to(room, bob))
    assert refused.status == 403, "who is banned can't be invited"
    refused = await bob.is_refused(bob.joins(room))
    assert refused.status == 403
    refused = await bob.is_refused(bob.leaves(room))
    assert refused.status == 403, "a ban is not left by leaving"
    await alice.unbans(room, bob)
    await alice.invites_to(room, bob)
    await bob.joins(room)
    assert (await alice.members(room))[bob.id] == "join", "after the ban is lifted she can come again"


async def test_a_knock_is_heard_and_answered_with_an_invitation(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}])
    refused = await bob.is_refused(bob.joins(room))
    assert refused.status == 403, "one knocks first"
    await bob.knocks_on(room)
    await bob.syncs()
    assert room in bob.knocks, "her own devices know that she knocked"
    assert ("m.room.create", "") in {(e["type"], e["state_key"]) for e in bob.knocks[room]}, "and at which door"
    assert await alice.notices(lambda: ("m.room.member", bob.id) in alice.state[room])
    assert alice.membership(room, bob) == "knock", "whoever is inside hears it"
    await alice.invites_to(room, bob)
    await bob.joins(room)
    assert (await alice.members(room))[bob.id] == "join"


async def test_a_public_room_is_found_by_its_address_and_in_the_directory(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(preset="public_chat", visibility="public", room_alias_name="studio", name="Studio")
    found = await bob.calls("GET", f"directory/room/%23studio%3A{bob.server}")
    assert found["room_id"] == room and bob.server in found["servers"]
    listed = await bob.calls("GET", "publicRooms")
    assert [r["room_id"] for r in listed["chunk"]] == [room], "a published room is in the directory"
    assert listed["chunk"][0]["num_joined_members"] == 1 and listed["chunk"][0]["name"] == "Studio"
    assert await bob.joins(f"#studio:{bob.server}") == room, "an address leads to the room"
    refused = await bob.is_refused(bob.calls("DELETE", f"directory/room/%23studio%3A{bob.server}"))
    assert refused.status == 403, "an address is taken away by who may"
    await alice.calls("DELETE", f"directory/room/%23studio%3A{bob.server}")
    refused = await bob.is_refused(bob.calls("GET", f"directory/room/%23studio%3A{bob.server}"))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")


async def test_two_people_who_may_see_different_things_wait_for_the_same_event(town: Town) -> None:
    import asyncio

    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(
        with_=bob, initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}]
    )
    await alice.invites_to(room, carol)
    await bob.syncs()
    await carol.syncs()
    waiting = [asyncio.create_task(person.syncs(timeout=1500)) for person in (bob, carol)]
    await asyncio.sleep(0.1)
    sent = await alice.sends(room)
    await asyncio.gather(*waiting)
    assert bob.has(sent), "the member has it"
    await carol.joins(room)
    await carol.syncs()
    assert not carol.has(sent), "who only joined later does not, not even after joining"
    assert sent not in [e["event_id"] for e in await carol.history(room)], "nor by paging back"
    refused = await carol.is_refused(carol.event(room, sent))
    assert refused.status == 404
    new = await alice.sends(room)
    waiting = [asyncio.create_task(person.sees(new)) for person in (bob, carol)]
    assert all(await asyncio.gather(*waiting)), "from then on both see the same"
