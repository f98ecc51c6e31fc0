"""One relay: limited timelines and paging. A hundred events, each once, both ways."""

from __future__ import annotations

from tests.town import Town


async def test_a_hundred_messages_are_paged_each_once_both_ways(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = [await alice.sends(room) for _ in range(100)]
    answer = await bob.syncs()
    timeline = answer["rooms"]["join"][room]["timeline"]
    assert timeline["limited"] is True, "a long room is cut for a first sync"
    newest = [e["event_id"] for e in timeline["events"]]
    assert newest == sent[-len(newest) :], "what is shown is the newest"
    older = [e["event_id"] for e in await bob.history(room, "b", timeline["prev_batch"], step=7)]
    back = list(reversed(older)) + newest
    assert [e for e in back if e in set(sent)] == sent, (
        "what the sync left out is paged, without a gap and without a repetition"
    )
    assert len(back) == len(set(back)), "each event comes once"
    forth = [e["event_id"] for e in await bob.history(room, "f", step=13)]
    assert forth == back, "from the other end it is the same"


async def test_a_gap_in_the_sync_is_closed_by_paging_back_to_where_she_was(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    stood = bob.since
    sent = [await alice.sends(room) for _ in range(30)]
    answer = await bob.syncs()
    timeline = answer["rooms"]["join"][room]["timeline"]
    assert timeline["limited"] is True
    shown = [e["event_id"] for e in timeline["events"]]
    missing = await bob.calls(
        "GET",
        f"rooms/{room.replace('!', '%21').replace(':', '%3A')}/messages",
        dir="b",
        limit=100,
        to=stood,
        **{"from": timeline["prev_batch"]},
    )
    paged = [e["event_id"] for e in reversed(missing["chunk"])]
    assert paged + shown == sent, "from the gap's edge to where she stood, nothing is lost and nothing is doubled"


async def test_state_that_changed_inside_the_gap_comes_with_the_sync(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    await alice.sets(room, "m.room.name", {"name": "New name"})
    for _ in range(20):
        await alice.sends(room)
    answer = await bob.syncs()
    state = {(e["type"], e["state_key"]): e["content"] for e in answer["rooms"]["join"][room]["state"]["events"]}
    assert state == {("m.room.name", ""): {"name": "New name"}}, (
        "the name changed where she could not see it, so it is told"
    )


async def test_context_shows_what_stood_around_a_message(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    sent = [await alice.sends(room) for _ in range(11)]
    around = await alice.calls(
        "GET", f"rooms/{room.replace('!', '%21')}/context/{sent[5].replace('$', '%24')}", limit=4
    )
    assert around["event"]["event_id"] == sent[5]
    assert [e["event_id"] for e in around["events_before"]] == [sent[4], sent[3]], "before: newest first"
    assert [e["event_id"] for e in around["events_after"]] == [sent[6], sent[7]], "after: oldest first"
    more = await alice.history(room, "b", around["start"], step=50)
    assert [e["event_id"] for e in more][:3] == [sent[2], sent[1], sent[0]], "paging goes on from there"
    later = await alice.history(room, "f", around["end"], step=50)
    assert [e["event_id"] for e in later] == sent[8:], "and forth"


async def test_lazy_members_come_when_they_speak(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    # Without a name the room is called after its people, and those come along.
    room = await alice.creates_room(with_=[bob, carol], name="Studio")
    for _ in range(12):
        await alice.sends(room)
    lazy = '{"room":{"state":{"lazy_load_members":true},"timeline":{"limit":5}}}'
    answer = await bob.syncs(filter=lazy)
    told = {e["state_key"] for e in answer["rooms"]["join"][room]["state"]["events"] if e["type"] == "m.room.member"}
    assert alice.id in told and carol.id not in told, "who speaks is introduced, who is silent is not"
    assert answer["rooms"]["join"][room]["summary"]["m.joined_member_count"] == 3, "but counted"
    await carol.sends(room)
    answer = await bob.syncs(filter=lazy)
    told = {e["state_key"] for e in answer["rooms"]["join"][room]["state"]["events"] if e["type"] == "m.room.member"}
    assert carol.id in told, "who begins to speak is introduced then"


async def test_a_client_may_ask_for_events_as_servers_send_them(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room(room_version="11")
    sent = await alice.sends(room)
    answer = await alice.syncs(filter='{"event_format":"federation","room":{"timeline":{"limit":1}}}')
    told = answer["rooms"]["join"][room]
    for event in (*told["timeline"]["events"], *told["state"]["events"]):
        assert event["room_id"] == room and event["event_id"]
        assert {"auth_events", "prev_events", "depth", "hashes", "signatures"} <= event.keys(), "nothing is left out"
    assert told["timeline"]["events"][0]["event_id"] == sent
    await alice.redacts(room, sent)
    answer = await alice.syncs(filter='{"event_format":"federation"}')
    assert all("signatures" in event for event in answer["rooms"]["join"][room]["timeline"]["events"])
    alice.forget_everything()
    answer = await alice.syncs(filter='{"event_format":"federation"}')
    found = {event["event_id"]: event for event in answer["rooms"]["join"][room]["timeline"]["events"]}
    assert found[sent]["content"] == {}, "what was taken back is gone in this form too"


async def test_state_after_is_the_state_at_the_end(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room(name="First")
    await alice.syncs()
    await alice.sets(room, "m.room.name", {"name": "Second"})
    answer = await alice.calls("GET", "sync", since=alice.since, use_state_after="true")
    shown = answer["rooms"]["join"][room]
    assert "state" not in shown, "one of the two ways is taken"
    after = {(e["type"], e["state_key"]): e["content"] for e in shown["state_after"]["events"]}
    assert after["m.room.name", ""] == {"name": "Second"}


async def test_a_redaction_takes_the_ciphertext_out_of_every_answer(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = await alice.sends(room)
    assert await bob.sees(sent)
    refused = await bob.is_refused(bob.redacts(room, sent))
    assert refused.status == 403, "others' messages are not hers to take back"
    redaction = await alice.redacts(room, sent, reason="a private remark")
    seen = await bob.sees(redaction)
    assert seen is not None and "reason" not in seen["content"], "the redaction arrives, its reason does not"
    event = await bob.event(room, sent)
    assert event["content"] == {}, "the ciphertext is gone"
    assert event["unsigned"]["redacted_because"]["event_id"] == redaction, "and it is said why"
    page = {e["event_id"]: e for e in await bob.history(room)}
    assert page[sent]["content"] == {}, "also from the history"
    bob.forget_everything()
    await bob.syncs()
    found = bob.has(sent)
    assert found is not None and found["content"] == {}, "also from a first sync"
    again = await alice.sends(room)
    await alice.redacts(room, again)
    assert (await alice.event(room, again))["content"] == {}


async def test_relations_are_bundled(town: Town) -> None:
    from tests.people import ciphertext

    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    root = await alice.sends(room)
    replies = [
        await bob.sends(room, ciphertext(**{"m.relates_to": {"rel_type": "m.thread", "event_id": root}}))
        for _ in range(3)
    ]
    where = f"/_matrix/client/v1/rooms/{room.replace('!', '%21')}/relations/{root.replace('$', '%24')}"
    listed = await alice.calls("GET", where + "/m.thread")
    assert [e["event_id"] for e in listed["chunk"]] == list(reversed(replies)), "the thread is listed, newest first"
    thread = (await alice.event(room, root))["unsigned"]["m.relations"]["m.thread"]
    assert thread["count"] == 3 and thread["latest_event"]["event_id"] == replies[-1], "its root says how long it is"
    hers = (await carol.event(room, root))["unsigned"]["m.relations"]["m.thread"]
    assert hers["current_user_participated"] is False, "she only reads"
    mine = (await bob.event(room, root))["unsigned"]["m.relations"]["m.thread"]
    assert mine["current_user_participated"] is True, "each person's own part in it is hers"


async def test_state_that_was_set_before_she_was_invited_is_state_for_her(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room()
    await alice.sets(room, "m.room.history_visibility", {"history_visibility": "invited"})
    await alice.sets(room, "m.room.name", {"name": "the green room"})
    await alice.invites_to(room, bob)
    await bob.joins(room)
    await bob.syncs()
    named = bob.state[room].get(("m.room.name", ""))
    assert named is not None and named["content"]["name"] == "the green room"
    assert not [event for event in bob.timeline[room] if event["type"] == "m.room.name"], (
        "though not as something she heard"
    )
