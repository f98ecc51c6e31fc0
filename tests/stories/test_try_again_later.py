"""The last word of a conversation arrives although nothing could be asked back when it came: it waits, and is tried again."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import pytest

from relay.rooms import gaps, later
from tests.forger import Forger
from tests.people import Person, ciphertext, until
from tests.town import Town, Within

T = TypeVar("T")


async def waiting(house: Within) -> int:
    assert house.server is not None
    return int(await house.server.db.read(lambda query: query.value("SELECT count(*) FROM waiting_events")))


async def comes_alone(town: Town, alice: Person, room: str, last: Awaitable[T]) -> T:
    """Of much that two missed one sends what Alice did `last`, and two can't ask it for the rest."""
    town.cut("one", "two")
    for _ in range(55):
        await alice.sends(room)
    done = await last
    await town.houses["one"].restart()  # what is more than it sends one by one is caught up with by the latest alone
    # Now one reaches two, and two does not reach one.
    town.mend("one", "two")
    town.cut_one_way("two", "one")
    town.clock.forward(hours=1)
    return done


async def test_a_kick_is_heard_of_although_what_led_to_it_could_not_be_fetched(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    two = await town.relay("two")
    room = await alice.creates_room(with_=bob)
    assert await bob.sees(await alice.sends(room))
    await comes_alone(town, alice, room, alice.kicks(room, bob))
    assert await until(lambda: _is(waiting(two), 1)), "the kick, which comes alone, has to wait"
    await two.restart()
    assert await waiting(two) == 1, "on disk"
    assert two.server is not None
    audited = await two.command("audit")
    assert not audited["findings"] and any("waiting_events" in rule for rule in audited["counts"])
    town.mend("one", "two")

    async def bob_is_out() -> bool:
        # A clock that jumps while somebody lies down to sleep does not shorten that sleep, so it goes on jumping.
        town.clock.forward(minutes=10)
        await bob.syncs()
        return room in bob.left

    assert await until(bob_is_out, within=40), "Bob learns that he is out"
    assert await until(lambda: _is(waiting(two), 0)), "and nothing waits any longer"


async def test_a_message_that_met_a_broken_wire_is_there_as_soon_as_the_wire_holds(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    two = await town.relay("two")
    room = await alice.creates_room(with_=bob)
    assert await bob.sees(await alice.sends(room))
    last = await comes_alone(town, alice, room, alice.sends(room))
    assert await until(lambda: _is(waiting(two), 1)), "it comes alone, and nothing can be asked"
    assert two.server is not None
    wait = await two.server.db.read(lambda query: query.value("SELECT wait_ms FROM waiting_events"))
    assert 0 < wait < later.FIRST_WAIT, "it is tried as soon as the other relay is asked anything again"
    town.mend("one", "two")

    async def bob_has_it() -> bool:
        town.clock.forward(seconds=1)
        await bob.syncs()
        return bob.has(last) is not None

    # A minute is how long nobody is asked again for what a server that answered did not give.
    assert await until(bob_has_it, within=45)
    assert await until(lambda: _is(waiting(two), 0))


async def test_what_builds_on_inventions_waits_within_bounds(town: Town) -> None:
    alice, mallory = await town.users("alice@one", "mallory@two")
    one, two = await town.relay("one"), await town.relay("two")
    room = await alice.creates_room(with_=mallory)
    await alice.syncs()
    forger = Forger(two, alice.server)
    invented = [
        (await forger.builds(room, mallory.id, "m.room.encrypted", ciphertext(), prev_events=["$" + f"{n:043d}"])).pdu
        for n in range(later.MAX_PER_SERVER + 20)
    ]
    town.cut_one_way("one", "two")
    for start in range(0, len(invented), 50):
        answer = await forger.transaction(invented[start : start + 50])
    assert any(result.get("error") for result in answer["pdus"].values()), "what is too much is refused"
    assert await waiting(one) == later.MAX_PER_SERVER
    town.mend("one", "two")

    async def nothing_waits_any_longer() -> bool:
        town.clock.forward(hours=24)
        return await waiting(one) == 0

    assert await until(nothing_waits_any_longer, within=60), "and nothing waits for ever"
    assert await mallory.sees(await alice.sends(room)), "the room goes on"


async def test_a_server_that_is_shut_out_while_its_events_wait_holds_up_nobody_elses(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "UNFILLED_SECONDS", 0.0)  # each time it would be asked again
    alice, mallory = await town.users("alice@one", "mallory@two")
    one, two = await town.relay("one"), await town.relay("two")
    room = await alice.creates_room(with_=mallory)
    await alice.syncs()
    forger = Forger(two, alice.server)
    invented = await forger.builds(room, mallory.id, "m.room.encrypted", ciphertext(), prev_events=["$" + "0" * 43])
    town.cut_one_way("one", "two")
    await forger.transaction([invented.pdu])
    assert await waiting(one) == 1
    await one.command("user.admin", user=alice.name, admin=True)
    block = {"measure": "block_server", "target": mallory.server, "reason_code": "spam"}
    await alice.calls("POST", "/_relay/safety/v1/acts", block)

    async def was_tried() -> bool:
        assert one.server is not None
        town.clock.forward(minutes=2)
        longest = await one.server.db.read(lambda query: query.value("SELECT max(wait_ms) FROM waiting_events"))
        return int(longest or 0) > later.FIRST_WAIT

    assert await until(was_tried), "it is put back into the line, and not begun again for ever"


async def _is(number: object, expected: int) -> bool:
    return await number == expected  # type: ignore[misc]
