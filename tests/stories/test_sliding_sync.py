"""One relay, spoken to as matrix-rust-sdk does: the windows of the room list, and what an answer tells of a room."""

from __future__ import annotations

import asyncio

from tests.people import path
from tests.sync.connection import ACCEPTED, Connection, a_list, a_subscription, encryption, notifications, room_list
from tests.town import Town


async def test_the_three_connections_of_element_x_stand_side_by_side(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    versions = await bob.calls("GET", "/_matrix/client/versions")
    assert versions["unstable_features"]["org.matrix.simplified_msc3575"] is True, (
        "without the flag Element X does not sign in"
    )
    room = await alice.creates_room(with_=bob, name="Studio")
    first = await alice.sends(room)
    rooms, keys, alerts = room_list(bob), encryption(bob), notifications(bob, room)
    await rooms.syncs()
    assert rooms.ids(room) == [first], "the room list begins with the latest event of each room"
    assert rooms.rooms[room]["name"] == "Studio" and rooms.counts == {"all_rooms": 1}
    assert ("m.room.encryption", "") in rooms.state[room], "with the state that it asked for"
    assert rooms.membership(room, bob.id) == "join" and rooms.membership(room, alice.id) == "join", (
        "her own member event and the sender's"
    )
    assert ("", "m.push_rules") in rooms.account_data
    answer = await keys.syncs()
    assert not answer["rooms"] and "device_one_time_keys_count" in answer["extensions"]["e2ee"]
    await alerts.syncs()
    assert alerts.ids(room)[-1] == first, "the process that shows notifications finds the message"
    second = await alice.sends(room)
    for connection in (rooms, alerts):
        answer = await connection.syncs()
        assert [e["event_id"] for e in answer["rooms"][room]["timeline"]] == [second], (
            "each connection goes on from where it stood"
        )
        assert answer["rooms"][room]["num_live"] == 1 and not answer["rooms"][room].get("initial")
        assert "required_state" not in answer["rooms"][room], "nothing that it has is told again"
    answer = await keys.syncs()
    assert not answer["rooms"], "who asked for no rooms hears of none"


async def test_the_rooms_stand_in_the_order_of_their_last_event(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    rooms = [await alice.creates_room(with_=bob) for _ in range(5)]
    await alice.sends(rooms[1])
    connection = room_list(bob, last=1)
    answer = await connection.syncs()
    assert list(answer["rooms"]) == [rooms[1], rooms[4]], "the window holds the two with the latest events"
    assert connection.counts["all_rooms"] == 5, "and says how many there are"
    connection.lists["all_rooms"] = a_list(0, 3)
    answer = await connection.syncs()
    assert set(answer["rooms"]) == {rooms[3], rooms[2]}, "a wider window brings only the rooms that are new in it"
    assert all(room["initial"] for room in answer["rooms"].values())
    sent = await alice.sends(rooms[0])
    answer = await connection.syncs(timeout=5000)
    assert set(answer["rooms"]) == {rooms[0]}, "a message lifts its room into the window"
    assert answer["rooms"][rooms[0]]["initial"] and connection.ids(rooms[0]) == [sent]
    assert answer["rooms"][rooms[0]]["num_live"] == 1, "it is new to the client, though the room is too"
    quiet = await connection.syncs()
    assert not quiet["rooms"], "nothing happened, so nothing is told"


async def test_what_happens_outside_the_window_is_told_when_the_room_comes_back(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    one, two = [await alice.creates_room(with_=bob, name=name) for name in ("One", "Two")]
    connection = Connection(bob, "small")
    connection.lists = {"top": a_list(0, 0, limit=10, required=[["m.room.topic", ""], ["m.room.name", ""]])}
    await connection.syncs()
    await alice.sends(one)
    await connection.syncs()
    assert set(connection.rooms) == {one, two}
    missed = [await alice.sends(two), await alice.sends(two)]
    topic = await alice.sets(two, "m.room.name", {"name": "Three"})
    await alice.sends(one)
    answer = await connection.syncs()
    assert set(answer["rooms"]) == {one}, "only what lies in the window is told"
    last = await alice.sends(two)
    answer = await connection.syncs()
    told = answer["rooms"][two]
    assert not told.get("initial"), "the client knows the room"
    assert [e["event_id"] for e in told["timeline"]] == [*missed, topic, last], "it gets all that it missed, in order"
    assert told["name"] == "Three" and [e["event_id"] for e in told["required_state"]] == [topic]
    assert told["num_live"] == 1, "of which one is news"


async def test_a_gap_is_said_and_can_be_paged_back(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    connection = room_list(bob)
    connection.lists["all_rooms"]["timeline_limit"] = 2
    await connection.syncs()
    sent = [await alice.sends(room) for _ in range(5)]
    told = (await connection.syncs())["rooms"][room]
    assert [e["event_id"] for e in told["timeline"]] == sent[-2:] and told["limited"] is True
    page = await bob.calls("GET", f"{path('rooms', room)}/messages", dir="b", limit=3, **{"from": told["prev_batch"]})
    assert [e["event_id"] for e in page["chunk"]] == sent[2::-1], "prev_batch leads to what was left out"
    page = await bob.calls("GET", f"{path('rooms', room)}/messages", dir="b", limit=1, **{"from": connection.pos})
    assert page["chunk"][0]["event_id"] == sent[-1], "a pos is a place in the history, too"


async def test_opening_a_room_brings_more_of_it(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = [await alice.sends(room) for _ in range(6)]
    connection = room_list(bob)
    await connection.syncs()
    assert connection.ids(room) == sent[-1:]
    connection.subscriptions = {
        room: a_subscription(5, [*connection.lists["all_rooms"]["required_state"], ["m.room.guest_access", ""]])
    }
    told = (await connection.syncs(timeout=5000))["rooms"][room]
    assert told["unstable_expanded_timeline"] is True, "the older events are marked as such"
    assert [e["event_id"] for e in told["timeline"]] == sent[-5:] and told["num_live"] == 0
    assert {e["type"] for e in told.get("required_state", [])} <= {"m.room.guest_access"}, (
        "of the state only what is asked for newly"
    )
    again = await connection.syncs()
    assert not again["rooms"], "it is told once"
    connection.subscriptions = {}
    new = await alice.sends(room)
    await connection.syncs()
    assert connection.ids(room)[-1] == new, "the list goes on when the room is closed"
    connection.subscriptions = {room: a_subscription(5)}
    assert not (await connection.syncs())["rooms"], "opened again it brings nothing that the client has"
    stranger = await alice.creates_room()
    connection.subscriptions = {stranger: a_subscription(5), "!nowhere:elsewhere": a_subscription(5)}
    assert not (await connection.syncs())["rooms"], "a room that is not hers to see is passed over"


async def test_a_lost_answer_is_given_again_and_another_question_gets_an_answer(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    connection = room_list(bob)
    await connection.syncs()
    sent = await alice.sends(room)
    lost = await connection.asks()
    assert [e["event_id"] for e in lost["rooms"][room]["timeline"]] == [sent]
    again = await connection.asks()
    assert again["rooms"] == lost["rooms"], "the same pos brings the same again: the first answer may never have come"
    connection.subscriptions = {room: a_subscription(3)}
    other = await connection.syncs()
    assert len(other["rooms"][room]["timeline"]) == 3, "the same pos with another body is answered as asked"
    assert not (await connection.syncs())["rooms"], "and from there it goes on"
    connection.pos = lost["pos"]
    refused = await bob.is_refused(connection.asks())
    assert (refused.status, refused.errcode) == (400, "M_UNKNOWN_POS"), "a pos that was passed over is gone"
    connection.forgets()
    await connection.syncs()
    assert connection.ids(room), "the client begins the connection anew"


async def test_a_position_belongs_to_its_connection_device_and_person(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    await alice.creates_room(with_=bob)
    phone = await bob.on_another_device()
    connection = room_list(bob)
    await connection.syncs()
    for person, conn_id in ((bob, "other"), (phone, "room-list"), (alice, "room-list")):
        thief = room_list(person)
        thief.conn_id, thief.pos = conn_id, connection.pos
        refused = await person.is_refused(thief.asks())
        assert (refused.status, refused.errcode) == (400, "M_UNKNOWN_POS"), "a pos is of use to nobody else"
    connection.pos = "nonsense"
    refused = await bob.is_refused(connection.asks())
    assert refused.errcode == "M_UNKNOWN_POS", (
        "what no server of ours wrote is unknown, too: the client can go on from that"
    )


async def test_a_restart_ends_the_room_list_but_not_the_keys(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    rooms, keys = room_list(bob), encryption(bob)
    await rooms.syncs()
    await keys.syncs()
    await town.houses["one"].restart()
    await alice.tells_devices(
        "m.room_key_request",
        {bob.id: {bob.device: {"action": "request_cancellation", "request_id": "r", "requesting_device_id": "D"}}},
    )
    refused = await bob.is_refused(rooms.asks())
    assert refused.errcode == "M_UNKNOWN_POS"
    await keys.syncs(timeout=5000)
    assert len(keys.messages) == 1, "a connection without rooms needs no memory: it goes on"
    rooms.forgets()
    await rooms.syncs()
    assert room in rooms.rooms


async def test_a_long_poll_wakes_for_what_it_asked_for_only(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    connection, keys = room_list(bob), encryption(bob)
    await connection.syncs()
    await keys.syncs()
    waiting, elsewhere = (
        asyncio.create_task(connection.syncs(timeout=30000)),
        asyncio.create_task(keys.syncs(timeout=1500)),
    )
    await asyncio.sleep(0.2)
    assert not waiting.done(), "with nothing to tell the relay waits"
    sent = await alice.sends(room)
    answer = await asyncio.wait_for(waiting, 5)
    assert [e["event_id"] for e in answer["rooms"][room]["timeline"]] == [sent], "the message ends the wait"
    assert not elsewhere.done(), "but not the wait for keys"
    await asyncio.wait_for(elsewhere, 10)


async def test_a_new_request_takes_the_place_of_one_that_waits(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await alice.sends(room)
    connection = room_list(bob)
    await connection.syncs()
    given_up = asyncio.create_task(connection.asks(timeout=30000))
    await asyncio.sleep(0.2)
    connection.subscriptions = {room: a_subscription(3)}
    answer = await connection.syncs()
    assert len(answer["rooms"][room]["timeline"]) == 3
    old = await asyncio.wait_for(given_up, 5)
    assert not old["rooms"], "the request that was given up ends, and has nothing to say"
    sent = await alice.sends(room)
    await connection.syncs()
    assert connection.ids(room)[-1] == sent, "the connection goes on undisturbed"


async def test_who_is_signed_out_while_she_waits_is_told(town: Town) -> None:
    bob = await town.user("bob@one")
    connection = room_list(bob)
    await connection.syncs()
    waiting = asyncio.create_task(bob.is_refused(connection.asks(timeout=30000)))
    await asyncio.sleep(0.2)
    await bob.signs_out()
    refused = await asyncio.wait_for(waiting, 5)
    assert (refused.status, refused.errcode) == (401, "M_UNKNOWN_TOKEN")


async def test_invitations_show_their_stripped_state_and_nothing_else(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    connection = room_list(bob)
    await connection.syncs()
    room = await alice.creates_room(name="Studio")
    await alice.sends(room)
    waiting = asyncio.create_task(connection.syncs(timeout=30000))
    await alice.invites_to(room, bob)
    told = (await asyncio.wait_for(waiting, 5))["rooms"][room]
    stripped = {(e["type"], e["state_key"]): e["content"] for e in told["invite_state"]}
    assert (
        stripped["m.room.name", ""] == {"name": "Studio"}
        and stripped["m.room.member", bob.id]["membership"] == "invite"
    )
    assert not told.get("timeline") and not told.get("required_state"), "what was said inside is not hers to see yet"
    assert not (await connection.syncs())["rooms"], "an invitation is told once"
    await bob.joins(room)
    told = (await connection.syncs())["rooms"][room]
    assert told["initial"] and connection.membership(room, bob.id) == "join", "when she joins the room is told whole"
    turned_down = await alice.creates_room()
    await alice.invites_to(turned_down, bob)
    await connection.syncs()
    await bob.leaves(turned_down)
    told = (await connection.syncs())["rooms"][turned_down]
    assert connection.membership(turned_down, bob.id) == "leave", (
        "an invitation that was turned down is over on all her devices"
    )
    assert len(told["required_state"]) == 1 and not told.get("timeline")
    assert connection.counts["all_rooms"] == 1


async def test_rooms_that_are_left_and_rooms_one_is_thrown_out_of(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    left, kicked, stays = [await alice.creates_room(with_=bob) for _ in range(3)]
    connection = room_list(bob)
    await connection.syncs()
    await bob.leaves(left)
    await alice.kicks(kicked, bob)
    after = [await alice.sends(room) for room in (left, kicked)]
    answer = await connection.syncs()
    for room, secret in zip((left, kicked), after, strict=True):
        assert connection.membership(room, bob.id) == "leave", "the client learns that she is out"
        assert answer["rooms"][room]["timeline"][-1]["content"]["membership"] == "leave"
        assert secret not in connection.ids(room), "and nothing of what came later"
    assert connection.counts["all_rooms"] == 2, "what she left is in no list; what she was thrown out of is"
    assert not (await connection.syncs())["rooms"]
    fresh = room_list(bob)
    fresh.conn_id = "second"
    await fresh.syncs()
    assert set(fresh.rooms) == {kicked, stays}, "a new connection hears of the kick, not of what she left herself"
    assert fresh.membership(kicked, bob.id) == "leave"
    await alice.invites_to(left, bob)
    await bob.joins(left)
    answer = await connection.syncs()
    assert answer["rooms"][left]["initial"], "who comes back gets the room whole"
    assert connection.membership(left, bob.id) == "join"


async def test_a_room_without_a_name_has_heroes_and_counts(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    await alice.calls("PUT", path("profile", alice.id, "displayname"), {"displayname": "Alice A."})
    room = await alice.creates_room(with_=bob)
    connection = room_list(bob)
    told = (await connection.syncs())["rooms"][room]
    assert "name" not in told and told["heroes"] == [{"user_id": alice.id, "displayname": "Alice A."}]
    assert (told["joined_count"], told["invited_count"]) == (2, 0)
    await alice.invites_to(room, carol)
    told = (await connection.syncs())["rooms"][room]
    assert (told["joined_count"], told["invited_count"]) == (2, 1), "the counts follow"
    await alice.sets(room, "m.room.name", {"name": "Studio"})
    told = (await connection.syncs())["rooms"][room]
    assert told["name"] == "Studio" and "joined_count" not in told, "only what changed is told"
    await alice.sets(room, "m.room.name", {})
    told = (await connection.syncs())["rooms"][room]
    assert told["name"] is None and told["heroes"], "a name that is taken away is null, and the heroes stand in"


async def test_members_come_as_the_timeline_speaks_of_them(town: Town) -> None:
    alice, bob, carol, dan = await town.users("alice@one", "bob@one", "carol@one", "dan@one")
    room = await alice.creates_room(with_=[bob, carol, dan])
    await alice.sends(room)
    connection = room_list(bob)
    await connection.syncs()

    def known() -> set[str]:
        return {key for kind, key in connection.state[room] if kind == "m.room.member"}

    assert known() == {alice.id, bob.id}, "herself and who spoke"
    await carol.sends(room)
    await connection.syncs()
    assert known() == {alice.id, bob.id, carol.id}, "whoever speaks next comes along"
    told = await carol.sends(room)
    answer = await connection.syncs()
    assert answer["rooms"][room]["timeline"][0]["event_id"] == told and "required_state" not in answer["rooms"][room], (
        "once"
    )
    await dan.leaves(room)
    await connection.syncs()
    assert connection.membership(room, dan.id) == "leave", "who comes and goes is told"


async def test_activity_is_what_people_say(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=bob)
    sent = await alice.sends(room)
    connection = room_list(bob)
    stamp = (await connection.syncs())["rooms"][room]["bump_stamp"]
    await alice.invites_to(room, carol)
    told = (await connection.syncs())["rooms"][room]
    assert told["bump_stamp"] == stamp, "an invitation is no activity"
    assert told["timeline"] and sent in connection.ids(room)
    await alice.sends(room)
    assert (await connection.syncs())["rooms"][room]["bump_stamp"] > stamp


async def test_reading_on_one_device_clears_the_count_on_the_other(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    phone = await bob.on_another_device()
    room = await alice.creates_room(with_=bob)
    sent = await alice.sends(room)
    connection = room_list(bob)
    told = (await connection.syncs())["rooms"][room]
    assert (told["notification_count"], told["highlight_count"]) == (1, 0)
    await phone.has_read(room, sent)
    answer = await connection.syncs()
    assert answer["rooms"][room]["notification_count"] == 0 and not answer["rooms"][room].get("timeline")
    assert connection.receipts[room][bob.id, "m.read"] == sent


async def test_the_accepted_form_has_another_shape_and_the_same_engine(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob, name="Studio")
    sent = [await alice.sends(room) for _ in range(4)]
    connection = Connection(bob, "main", path=ACCEPTED)
    everything = {"include": [{}], "exclude": [{"type": "m.room.create", "state_key": ""}], "lazy_members": True}
    connection.lists = {
        "all": {"range": [0, 9], "timeline_limit": 1, "required_state": everything, "filters": {"is_invited": False}}
    }
    told = (await connection.syncs())["rooms"][room]
    assert told["membership"] == "join" and told["lists"] == ["all"] and told["name"] == "Studio"
    assert [e["event_id"] for e in told["timeline_events"]] == sent[-1:]
    kinds = {e["type"] for e in told["required_state"]}
    assert {"m.room.power_levels", "m.room.encryption"} <= kinds and "m.room.create" not in kinds, (
        "all but what is excluded"
    )
    assert connection.membership(room, bob.id) is None and connection.membership(room, alice.id) == "join", (
        "members lazily"
    )
    connection.subscriptions = {room: {"timeline_limit": 3, "required_state": {"include": [{"type": "m.room.create"}]}}}
    told = (await connection.syncs(timeout=5000))["rooms"][room]
    assert told["expanded_timeline"] is True and len(told["timeline_events"]) == 3
    assert {e["type"] for e in told["required_state"]} == {"m.room.create"}, (
        "rules are joined: what one excludes another may want"
    )
    invited = await alice.creates_room()
    await alice.invites_to(invited, bob)
    connection.lists["invites"] = {"timeline_limit": 1, "required_state": {}, "filters": {"is_invited": True}}
    told = (await connection.syncs())["rooms"][invited]
    assert told["membership"] == "invite" and told["lists"] == ["invites"] and told["stripped_state"]
    assert set(told) == {"membership", "lists", "stripped_state", "bump_stamp"}, "nothing else of a room she is not in"
    connection.lists = {f"list-{n}": connection.lists["all"] for n in range(101)}
    refused = await bob.is_refused(connection.asks())
    assert (refused.status, refused.errcode) == (400, "M_INVALID_PARAM")
    body = {"lists": {}, "set_presence": "sleepy"}
    refused = await bob.is_refused(bob.calls("POST", ACCEPTED, body))
    assert (refused.status, refused.errcode) == (400, "M_INVALID_PARAM")
