"""Our relay and a real Synapse: history that one side has to ask the other for, gaps, and forks that both resolve alike."""

from __future__ import annotations

import pytest

from tests.interop.neighbour import encrypted
from tests.interop.street import (
    OURS,
    THEIRS,
    Silence,
    Street,
    becomes,
    both_sides,
    hears_at_last,
    other,
    state_of,
    they_talk,
)
from tests.people import Person, until


async def _said(person: Person, room: str, direction: str = "b") -> list[str]:
    found = [e["event_id"] for e in await person.history(room, direction, step=40) if e["type"] == "m.room.encrypted"]
    return found if direction == "f" else found[::-1]


@both_sides
@pytest.mark.parametrize(("version", "count"), [("12", 120), ("10", 30)])
async def test_who_comes_late_reads_what_was_said_before(street: Street, host: str, version: str, count: int) -> None:
    alice, bob = await street.two(host)
    room = await alice.creates_room(**encrypted(room_version=version))
    before = [await alice.sends(room) for _ in range(count)]
    taken_back = before[10]
    await alice.redacts(room, taken_back)
    await street.welcomes(alice, bob, room)
    after = [await alice.sends(room) for _ in range(3)]
    assert await bob.sees(after[-1])
    assert await _said(bob, room) == before + after, "page by page she gets everything, in order, each once"
    history = await bob.history(room)
    assert history[-1]["type"] == "m.room.create", "back to the very beginning"
    assert next(e for e in history if e["event_id"] == taken_back)["content"] == {}, "what was taken back comes empty"
    # Synapse (1.163) reads forward only from where it came in.
    if host == THEIRS:
        assert await _said(bob, room, "f") == before + after, "and from the beginning on, too"


@both_sides
async def test_who_may_not_read_the_past_does_not_get_it(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    joined = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
    room = await street.room(alice, initial_state=[joined])
    secret = [await alice.sends(room) for _ in range(5)]
    await street.welcomes(alice, bob, room)
    open_to_her = await alice.sends(room)
    assert await bob.sees(open_to_her)
    said = await _said(bob, room)
    assert open_to_her in said
    assert not set(secret) & set(said), "what was said before her time stays where it is"
    assert [(await bob.is_refused(bob.event(room, e))).status for e in secret] == [404] * 5


async def test_state_changes_on_both_sides_at_once_resolve_alike(street: Street) -> None:
    alice, bob = await street.two(OURS)
    carol, dora = await street.user("carol", OURS), await street.user("dora", other(OURS))
    levels = {"users": {alice.id: 100, bob.id: 100, carol.id: 50, dora.id: 50}}
    for version in ("10", "11"):
        room = await street.room(alice, bob, carol, dora, room_version=version, power_level_content_override=levels)
        await they_talk(room, alice, bob)
        await _part_and_meet_again(street, room, alice, bob, carol, dora)


async def test_state_changes_on_both_sides_at_once_resolve_alike_in_version_12(street: Street) -> None:
    alice, bob = await street.two(other(OURS))
    carol, dora = await street.user("carol", other(OURS)), await street.user("dora", OURS)
    levels = {"users": {bob.id: 100, carol.id: 50, dora.id: 50}}
    room = await street.room(alice, bob, carol, dora, room_version="12", power_level_content_override=levels)
    await they_talk(room, alice, bob)
    await _part_and_meet_again(street, room, bob, alice, dora, carol)


async def _part_and_meet_again(
    street: Street, room: str, mine: Person, theirs: Person, my_mod: Person, their_mod: Person
) -> None:
    """`mine` and `my_mod` are with us. While the wire is cut both sides change the same things, and each other's rights."""
    silence = Silence(street, await street.relay())
    heard_by_them = [await mine.sends(room) for _ in range(3)]
    await mine.sets(room, "m.room.name", {"name": "Ours"})
    await mine.sets(room, "m.room.join_rules", {"join_rule": "public"})
    await mine.kicks(room, their_mod)
    heard_by_us = [await theirs.sends(room) for _ in range(3)]
    await theirs.sets(room, "m.room.name", {"name": "Theirs"})
    await theirs.sets(room, "m.room.topic", {"topic": "Theirs"})
    await theirs.bans(room, my_mod)
    was = await theirs.reads(room, "m.room.power_levels")
    await theirs.sets(room, "m.room.power_levels", {**was, "invite": 50})
    await their_mod.sets(room, "m.room.avatar", {"url": "mxc://example.org/one"})
    await my_mod.sets(room, "m.room.avatar", {"url": "mxc://example.org/two"})
    silence.ends()
    last, back = await mine.sends(room), await theirs.sends(room)
    for event_id in (*heard_by_them, last):
        assert await theirs.sees(event_id), "everything that was said with us is heard there"
    for event_id in (*heard_by_us, back):
        assert await mine.sees(event_id), "and the other way round"
    # One more from each, so that both have met what the other had last.
    await they_talk(room, mine, theirs)

    async def alike() -> bool:
        return await state_of(mine, room) == await state_of(theirs, room)

    if not await until(alike, within=3):
        ours, other_state = await state_of(mine, room), await state_of(theirs, room)
        differ = {key for key in ours.keys() | other_state.keys() if ours.get(key) != other_state.get(key)}
        raise AssertionError(f"both sides hold the same state, but they differ in {differ}")
    assert await mine.reads(room, "m.room.topic") == {"topic": "Theirs"}, "what only one side changed holds on both"


async def test_a_gap_is_filled(street: Street) -> None:
    """Our relay is deaf for a while, and Synapse then sends it the newest event only, as it does after a long absence."""
    alice, bob = await street.two(other(OURS))
    room = await street.room(alice, bob)
    first = [await alice.sends(room) for _ in range(5)]
    assert await bob.sees(first[-1])
    relay = await street.relay()
    await relay.stop()
    middle = [await alice.sends(room) for _ in range(70)]
    await alice.sets(room, "m.room.name", {"name": "Meanwhile"})
    await relay.start()
    await hears_at_last(bob, room, middle[-1])
    last = await alice.sends(room)
    assert await bob.sees(last), "what is said now arrives"
    assert await until(lambda: _has_all(bob, room, first + middle + [last]), within=20), (
        "and everything that was missed"
    )
    heard = await _said(bob, room)
    assert [e for e in heard if e in middle] == middle, "in order, each once"
    assert await bob.reads(room, "m.room.name") == {"name": "Meanwhile"}


async def _has_all(person: Person, room: str, wanted: list[str]) -> bool:
    return set(wanted) <= set(await _said(person, room))


async def test_synapse_asks_us_for_what_it_missed(street: Street) -> None:
    """After a long silence our outbox sends the newest event only, and Synapse finds the way back from there."""
    alice, bob = await street.two(OURS)
    room = await street.room(alice, bob)
    silence = Silence(street, await street.relay())
    missed = [await alice.sends(room)]
    street.town.clock.forward(hours=2)
    missed += [await alice.sends(room) for _ in range(70)]
    street.town.clock.forward(hours=2)
    silence.ends()
    last = await alice.sends(room)
    assert await bob.sees(last, within=20), "what is said now arrives"
    assert await until(lambda: _has_all(bob, room, [*missed, last]), within=20), "and everything that was missed"
    heard = await _said(bob, room)
    assert heard == [*missed, last], "in order, each once"
    await bob.leaves(room)
    assert await becomes(alice, room, bob, "leave"), "and the conversation can end as any other"
