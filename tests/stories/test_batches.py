"""Many writes at once, one of which fails: what was built on it in the room is judged again, and nobody else notices."""

from __future__ import annotations

import asyncio

from tests.people import ciphertext
from tests.town import Town


async def test_the_middle_of_a_batch_fails_and_the_rest_is_judged_again(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    other = await carol.creates_room()
    before = {number: await alice.sends(room, txn=f"sent before {number}") for number in range(3)}
    # After a restart nothing in memory knows what was sent: its row is met in the middle of the write.
    await town.houses["one"].restart()
    await bob.syncs()

    async def retries(number: int) -> tuple[int, str]:
        return number, await alice.sends(room, ciphertext(), txn=f"sent before {number}")

    for _ in range(3):
        sending = []
        for number in range(3):
            sending += [bob.sends(room) for _ in range(5)]
            sending += [carol.sends(other) for _ in range(2)]
            sending.append(retries(number))
            sending += [carol.sends(room) for _ in range(5)]
        answers = await asyncio.gather(*sending)
        for answer in answers:
            if isinstance(answer, tuple):
                assert answer[1] == before[answer[0]], "a retry gets the event that was sent before the restart"
        await town.houses["one"].restart()
    history = [e["event_id"] for e in await alice.history(room, step=100) if e["type"] == "m.room.encrypted"]
    assert len(history) == len(set(history)) == 3 + 3 * 30, (
        "what was sent is there, each once, and the retries added nothing"
    )
    elsewhere = [e for e in await carol.history(other, step=100) if e["type"] == "m.room.encrypted"]
    assert len(elsewhere) == 18, "the other room went on"
    last = await bob.sends(room)
    assert await alice.sees(last)


async def test_many_senders_in_one_room_are_heard_in_one_order(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@two")
    room = await alice.creates_room(with_=[bob, carol])
    await carol.syncs()

    async def talks(person: object, count: int) -> list[str]:
        return [await person.sends(room) for _ in range(count)]  # type: ignore[attr-defined]

    sent = await asyncio.gather(*(talks(person, 25) for person in (alice, bob, carol) for _ in range(3)))
    everything = {event_id for ids in sent for event_id in ids}
    last = await alice.sends(room)
    back = await carol.sends(room)
    assert await carol.sees(last) and await alice.sees(back)
    orders = []
    for person in (alice, bob, carol):
        ids = [e["event_id"] for e in await person.history(room, step=100) if e["event_id"] in everything]
        assert len(ids) == len(everything), f"{person.name} has each message once"
        orders.append(ids)
    assert orders[0] == orders[1], "people on one relay see one order"
    for ids in sent:
        positions = [list(reversed(orders[2])).index(event_id) for event_id in ids]
        assert positions == sorted(positions), (
            "what one person said after the other stands so, on the other relay as well"
        )


async def test_a_client_that_was_away_for_many_changes_misses_nothing(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    rooms = [await alice.creates_room(with_=bob) for _ in range(5)]
    await bob.syncs()
    stood = bob.since
    latest = {room: [await alice.sends(room) for _ in range(80)][-1] for room in rooms}
    await bob.syncs()
    for room, event_id in latest.items():
        assert bob.ids(room)[-1] == event_id, "each room shows its latest message"
        assert room in bob.limited, "and says that there is more"
    answer = await bob.calls("GET", "sync", since=stood)
    assert set(answer["rooms"]["join"]) == set(rooms), "asked with the old token again the answer is the same"


async def test_what_an_ignored_person_says_is_not_shown(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await alice.syncs()
    await alice.calls(
        "PUT",
        f"user/{alice.id.replace('@', '%40')}/account_data/m.ignored_user_list",
        {"ignored_users": {bob.id: {}}},
    )
    said = await bob.sends(room)
    mine = await alice.sends(room)
    assert await alice.sees(mine) and await bob.sees(mine)
    assert await alice.does_not_see(said), "whom she ignores she does not hear"
    invited = await bob.creates_room()
    await bob.invites_to(invited, alice)
    assert not await alice.notices(lambda: invited in alice.invites, within=0.5), "nor is she invited by him"
