"""Stories of delayed events: a call ends for whoever lost the network, and not for whoever says that she is still there."""

from __future__ import annotations

from typing import Any

from relay.rooms import delayed
from tests.people import Person, ciphertext, path, until
from tests.town import Town

UNSTABLE = delayed.UNSTABLE
CALL = "org.matrix.msc3401.call.member"
DELAY = {delayed.PARAMETER: 60_000}


async def waiting(person: Person) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await person.calls("GET", f"{UNSTABLE}/delayed_events"))["delayed_events"]
    return found


async def does(person: Person, delay_id: str, action: str, token: str | None = None) -> None:
    assert await person.calls("POST", f"{UNSTABLE}/delayed_events/{delay_id}/{action}", {}, token=token) == {}


async def leaves_call_later(person: Person, room: str) -> str:
    answer = await person.calls("PUT", path("rooms", room, "state", CALL, person.id), {}, **DELAY)
    assert set(answer) == {"delay_id"}, "there is no event yet"
    return str(answer["delay_id"])


async def test_a_message_is_sent_when_its_time_has_come(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    text = ciphertext()
    where = f"{UNSTABLE}/{path('rooms', room, 'delayed_event', 'm.room.encrypted', 'txn1')}"
    answer = await alice.calls("PUT", where, {"delay_ms": 60_000, "content": text})
    assert await alice.calls("PUT", where, {"delay_ms": 60_000, "content": text}) == answer, "a retry schedules nothing"
    [shown] = await waiting(alice)
    assert (shown["content"], shown["delay_ms"], shown["room_id"]) == (text, 60_000, room)
    assert await waiting(bob) == [], "it is nobody else's business"
    assert (await bob.is_refused(bob.calls("GET", f"{UNSTABLE}/delayed_events/{answer['delay_id']}"))).status == 404
    town.clock.forward(seconds=59)
    await bob.syncs()
    assert text not in [event["content"] for event in bob.timeline[room]], "not before its time"
    town.clock.forward(seconds=2)
    assert await bob.notices(lambda: text in [event["content"] for event in bob.timeline[room]])
    assert await waiting(alice) == []
    ended = await alice.calls("GET", f"{UNSTABLE}/delayed_events/{answer['delay_id']}")
    assert ended["event_id"] and ended["finalised_ts"], "for a while she can ask what became of it"


async def test_a_call_ends_for_whoever_lost_the_network(town: Town) -> None:
    one = await town.relay("one")
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    delay_id = await leaves_call_later(alice, room)
    await alice.sets(room, CALL, {"application": "m.call", "device_id": alice.device}, alice.id)
    assert len(await waiting(alice)) == 1, "that she joins the call after it changes nothing"
    town.clock.forward(seconds=50)
    await does(alice, delay_id, "restart", token="")
    town.clock.forward(seconds=50)
    assert (await alice.reads(room, CALL, alice.id))["device_id"], "whoever says that she is there stays"
    await one.stop()
    town.clock.forward(seconds=50)
    await one.start()
    assert await until(lambda: _is_empty(alice, room)), "what fell due while the relay was down is made up for"


async def _is_empty(alice: Person, room: str) -> bool:
    return await alice.reads(room, CALL, alice.id) == {}


async def test_it_can_be_sent_at_once_or_never(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    sent, cancelled = await leaves_call_later(alice, room), await leaves_call_later(alice, room)
    await does(alice, sent, "send", token="")
    assert await alice.reads(room, CALL, alice.id) == {}, "the call server said so"
    await does(alice, sent, "send")
    await does(alice, cancelled, "cancel", token="")
    await does(alice, cancelled, "cancel")
    for delay_id, action in ((sent, "cancel"), (sent, "restart"), (cancelled, "send")):
        assert (await alice.is_refused(does(alice, delay_id, action))).status == 409, "what is over is over"
    for delay_id, action in (("nothing", "send"), (sent, "dance")):
        assert (await alice.is_refused(does(alice, delay_id, action))).status == 404
    assert (await alice.is_refused(alice.calls("GET", f"{UNSTABLE}/delayed_events", token=""))).status == 401


async def test_what_others_set_meanwhile_stays(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(
        with_=bob, power_level_content_override={"events": {"m.room.topic": 0}}, initial_state=[]
    )
    where = path("rooms", room, "state", "m.room.topic", "")
    await alice.calls("PUT", where, {"topic": "hers"}, **DELAY)
    await bob.sets(room, "m.room.topic", {"topic": "his"})
    assert await waiting(alice) == [], "it would overwrite what bob said"
    town.clock.forward(seconds=61)
    await alice.sends(room)
    assert (await alice.reads(room, "m.room.topic"))["topic"] == "his"


async def test_the_seal_and_the_limits_hold_for_later_too(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    send = path("rooms", room, "send", "m.room.message", "t1")
    refused = await alice.is_refused(alice.calls("PUT", send, {"msgtype": "m.text", "body": "hello"}, **DELAY))
    assert refused.status == 403 and await waiting(alice) == [], "readable words are not even written down"
    state = path("rooms", room, "state", CALL, alice.id)
    too_late = {delayed.PARAMETER: delayed.MAX_DELAY_MS + 1}
    refused = await alice.is_refused(alice.calls("PUT", state, {}, **too_late))
    assert refused.body["org.matrix.msc4140.max_delay"] == delayed.MAX_DELAY_MS, "a client learns what goes"
    member = path("rooms", room, "state", "m.room.member", alice.id)
    assert (await alice.is_refused(alice.calls("PUT", member, {"membership": "leave"}, **DELAY))).status == 400
    capabilities = (await alice.calls("GET", "capabilities"))["capabilities"]
    assert capabilities["org.matrix.msc4140.delayed_events"]["max_scheduled"] == delayed.MAX_SCHEDULED
    assert (await (await town.relay("one")).command("audit"))["findings"] == []


async def test_rights_are_those_of_the_moment_of_sending(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    where = path("rooms", room, "send", "m.room.encrypted", "t1")
    delay_id = (await bob.calls("PUT", where, ciphertext(), **DELAY))["delay_id"]
    await alice.kicks(room, bob)
    town.clock.forward(seconds=61)

    async def is_over() -> bool:
        return "error" in await bob.calls("GET", f"{UNSTABLE}/delayed_events/{delay_id}")

    assert await until(is_over), "bob can ask why nothing came of it"
