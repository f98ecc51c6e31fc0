"""What a report holds, for how long, and that it changes what nobody sees: messages, files of other servers, a flood of uploads."""

from __future__ import annotations

import hashlib
import os

from relay.clock import HOUR
from relay.moderation.disclosure_form import Item
from relay.moderation.freeze import MAX_MEDIA_HELD
from relay.rooms.store import GONE
from tests.moderation.casehouse import Desk, casework, desk, hears, reports, token_in
from tests.moderation.sessions import Session, b64, disclosure
from tests.moderation.test_disclosure import file_message
from tests.people import Person, Refused, until
from tests.town import Town

WEEKS = 7 * 24


async def link_proves(mod: Desk, who: Person, *items: Item) -> str:
    """Over the link of her newest report."""
    work = casework(mod.house)
    link = await work.links.look(token_in(await hears(who, "Your report has the number")))
    return (await work.reports.attach_proof(link, who.id, disclosure(*items))).result


async def held_events(mod: Desk) -> list[str]:
    rows = await casework(mod.house).cases._db.read(lambda query: query.all("SELECT event_id FROM frozen_events"))
    return [event_id for (event_id,) in rows]


async def comes(who: Person, picture: str) -> bool:
    try:
        return bool((await who.downloads(picture))[1])
    except Refused:
        return False


async def test_a_report_changes_what_nobody_sees_and_holds_until_all_is_over(town: Town) -> None:
    mod = await desk(town)
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@two")
    room = await alice.creates_room(with_=[bob, carol])
    session = Session()
    said, taken_back = [await bob.sends(room, session.says(room, word)) for word in ("one", "two")]
    assert await carol.sees(taken_back), "it comes to the other relay"
    await bob.redacts(room, taken_back)
    for event_id in (said, taken_back):
        await reports(alice, room, event_id)

    async def shown(to: Person) -> list[bool]:
        return [bool((await to.event(room, one))["content"]) for one in (said, taken_back)]

    for person in (alice, bob, carol):
        assert await until(lambda person=person: _is(shown, person, [True, False])), (
            "what was visible stays so, and what was not"
        )
        assert said in [one["event_id"] for one in await person.history(room) if one["content"]]
    newcomer = await bob.on_another_device()
    assert (await newcomer.sees(said) or {}).get("content"), "on a new device of the sender's as well"

    async def is_gone(event_id: str) -> bool:
        assert mod.house.server is not None
        town.clock.forward(minutes=6)
        stored = await mod.house.server.rooms.event(event_id)
        return stored is not None and bool(stored.marks & GONE)

    for case in await mod.queue():
        await mod.decides(case["id"])
    town.clock.forward(hours=100)
    assert not await is_gone(taken_back), "also when it is decided: both sides may still object"
    town.clock.forward(hours=184 * 24)
    await casework(mod.house).keeping.look()
    assert not await held_events(mod)
    assert await until(lambda: is_gone(taken_back)), "then what was taken back goes, as it would have"
    assert not await is_gone(said), "and what was not, stays"


async def _is(shown, person: Person, expected: list[bool]) -> bool:  # type: ignore[no-untyped-def]
    return bool(await shown(person) == expected)


async def test_whoever_left_and_forgot_the_room_can_still_prove_what_she_reported(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@two")
    room = await bob.creates_room(with_=alice)
    session = Session()
    said, beside = [await bob.sends(room, session.says(room, word)) for word in ("an ugly word", "another")]
    assert await alice.sees(said) and await alice.sees(beside)
    await reports(alice, room, said)
    await alice.leaves(room)
    await alice.forgets(room)
    assert await link_proves(mod, alice, Item(said, 0, session.prk(0))) == "verified_remote", (
        "what she reported she can prove, though nobody of this server is in the room any more"
    )
    [case] = await mod.queue()
    assert case["disclosure"] == "verified_remote"


async def test_files_of_another_server_that_a_proof_names_are_kept(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    blobs = [os.urandom(600) for _ in range(3)]
    picture, thumbnail, other = [await bob.uploads(blob) for blob in blobs]
    right, small = (hashlib.sha256(blob).digest() for blob in blobs[:2])
    session = Session()
    said = await bob.sends(room, session.encrypts(file_message(room, picture, right, (thumbnail, small))))
    assert await alice.sees(said)
    for one in (picture, thumbnail, other):
        assert await comes(alice, one)
    await reports(alice, room, said)
    assert await link_proves(mod, alice, Item(said, 0, session.prk(0))) == "verified_remote"
    copies = _copies(mod)
    town.cut("one", "two")

    async def trimmed() -> list[bool]:
        town.clock.forward(hours=2 * WEEKS)
        while await copies.trim():
            pass
        return [await comes(alice, one) for one in (picture, thumbnail, other)]

    assert await trimmed() == [True, True, False], "while its case lasts, and of the rest nothing longer than always"
    [case] = await mod.queue()
    await mod.decides(case["id"])
    assert await trimmed() == [True, True, False]
    town.clock.forward(hours=184 * 24)
    await casework(mod.house).keeping.look()
    assert await trimmed() == [False, False, False], "afterwards they go like every copy"


def _copies(mod: Desk):  # type: ignore[no-untyped-def]
    from relay.media.remote_copies import RemoteCopies

    assert mod.house.server is not None
    return next(part for part in mod.house.server._parts if isinstance(part, RemoteCopies))


async def test_a_flood_of_uploads_holds_little_and_nobody_holds_her_own(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await alice.uploads(os.urandom(300))
    early = await bob.uploads(os.urandom(300))
    town.clock.forward(seconds=3 * HOUR / 1000)
    for _ in range(MAX_MEDIA_HELD + 3):
        latest = await bob.uploads(os.urandom(300))
    session = Session()
    file = {"url": latest, "hashes": {"sha256": b64(hashlib.sha256(b"x").digest())}, "v": "v2"}
    said = await bob.sends(room, session.says(room, "", content={"msgtype": "m.image", "body": "look", "file": file}))
    await reports(bob, room, said)
    assert await link_proves(mod, bob, Item(said, 0, session.prk(0))) == "needs_human"
    work = casework(mod.house)

    async def held() -> set[str]:
        return {f"mxc://{server}/{media}" for server, media in await work.cases._db.read(work.freeze.media)}

    assert not await held() and not await held_events(mod), "reporting herself keeps nothing, with a proof neither"
    await reports(alice, room, said)
    assert len(await held()) == MAX_MEDIA_HELD and early not in await held(), "of the hour before, and so many at most"
    assert await held_events(mod) == [said]
