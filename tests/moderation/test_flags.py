"""Stories of flags: what looks odd is shown to a person; in the mode `on` it slows down, and the log says so."""

from __future__ import annotations

import random

import pytest

from relay.clock import DAY, HOUR, MINUTE, SECOND
from relay.config import CONFIG_NAME
from relay.moderation.flags import (
    ACCOUNTS_OF_TOKEN_PER_HOUR,
    INVITES_PER_10_MIN,
    OF_LAST_INVITES,
    ROOMS_PER_HOUR,
    WRONG_ACCOUNTS,
)
from relay.moderation.signs import Kept, Names, Share, Usual, Window
from relay.moderation.transparency import _of_flags
from tests.moderation.test_actions import SAFETY, moderators, takes
from tests.people import Person, path, until
from tests.town import PASSWORD, Town


async def flagged(mod: Person) -> set[tuple[str, str]]:
    return {(one["rule"], one["subject"]) for one in (await mod.calls("GET", f"{SAFETY}/flags"))["flags"]}


async def test_a_new_account_that_invites_many_strangers_is_shown_and_not_hindered(town: Town) -> None:
    _, [mod] = await moderators(town, "mod")
    mallory, bob = await town.users("mallory@one", "bob@one")
    for _ in range(INVITES_PER_10_MIN):
        await mallory.invites_to(await mallory.creates_room(), bob)
    assert await flagged(mod) == set(), "a few are nothing odd"
    for _ in range(2):
        await mallory.invites_to(await mallory.creates_room(), bob)
    assert ("invite-wave", mallory.id) in await flagged(mod), "many are shown, and nobody was hindered"
    for room in list((await bob.syncs())["rooms"]["invite"])[:12]:
        await bob.leaves(room)
    await mallory.invites_to(await mallory.creates_room(), bob)
    for _ in range(OF_LAST_INVITES - 12):
        room = await mallory.creates_room()
        await mallory.invites_to(room, bob)
        await bob.leaves(room)

    async def unwanted() -> bool:
        return ("refused-invites", mallory.id) in await flagged(mod)

    assert await until(unwanted), "so is somebody whose invites nobody wants"
    town.clock.forward(hours=25)
    assert await flagged(mod) == set(), "after a day it is forgotten"


async def test_where_flags_count_they_slow_down_for_a_day_and_the_log_says_so(town: Town) -> None:
    # Counters stand under keys that change every day, so what is counted here must not lie on both sides of midnight.
    town.clock.to_the_next_day()
    await town.relay("one", "hooks: {flags: {mode: 'on', slows_for: 2h}}")
    house, [mod] = await moderators(town, "mod")
    mallory, bob, carol = await town.users("mallory@one", "bob@one", "carol@one")
    rooms = [await mallory.creates_room() for _ in range(ROOMS_PER_HOUR + 1)]
    for room in rooms:
        town.clock.forward(seconds=90)
        await mallory.invites_to(room, bob)
        await mallory.sends(room)
    assert await flagged(mod) == {("fan-out", mallory.id)}, "writing to many who never answer"
    await mallory.invites_to(rooms[0], carol)
    refused = await mallory.is_refused(mallory.invites_to(rooms[1], carol))
    assert refused.status == 429 and refused.body["retry_after_ms"] <= 10 * MINUTE, "slower, not never"
    await carol.creates_room(with_=bob)
    await mallory.sends(rooms[0])
    assert house.server is not None
    [step] = [one for one in await house.server.moderation.audit_log.page() if one.action == "slowed"]
    assert (step.actor, step.automated, step.target) == ("rule:fan-out", True, mallory.id)
    assert house.server._keeping.flags.weight(mallory.id) > house.server._keeping.flags.weight(carol.id) == 0
    town.clock.forward(hours=3)
    for room in rooms[1:3]:
        await mallory.invites_to(room, carol)


async def test_switched_off_nothing_is_counted(town: Town) -> None:
    await town.relay("one", "hooks: {flags: {mode: 'off'}}")
    _, [mod] = await moderators(town, "mod")
    mallory, bob = await town.users("mallory@one", "bob@one")
    for _ in range(INVITES_PER_10_MIN + 2):
        await mallory.invites_to(await mallory.creates_room(), bob)
    assert await flagged(mod) == set()


def test_a_window_forgets() -> None:
    window, now = Window(HOUR), 100 * HOUR
    for minute in range(90):
        total = window.add(now + minute * MINUTE)
        assert total <= 66, "never more than the hour and its last twelfth"
    assert window.sum(now + 90 * MINUTE) >= 50 and window.sum(now + 4 * HOUR) == 0


def test_a_share_needs_enough_outcomes() -> None:
    share = Share(4)
    assert [share.add(True) for _ in range(4)] == [None, None, None, 1.0]
    assert share.add(False) == 0.75


@pytest.mark.parametrize("seed", range(5))
def test_what_is_usual_is_not_odd_and_a_wave_is(seed: int) -> None:
    chance, usual, now = random.Random(seed), Usual(), 1000 * DAY
    highest = 0.0
    for _ in range(2000):
        now += chance.randrange(1, 240) * SECOND
        highest = max(highest, usual.add(now))
    assert highest < 6, "an even stream stays within a few deviations"
    wave = max(usual.add(now + step * SECOND) for step in range(120))
    assert wave > 4 and wave > highest, "a sudden crowd does not"


def test_how_good_flags_are_is_told_by_what_people_decided() -> None:
    """(flagged, a measure was taken, it was taken back)"""
    decided = [
        (True, True, False),
        (True, True, True),
        (True, False, False),
        (False, True, True),
        (False, False, False),
    ]
    assert _of_flags(decided) == {
        "flagged": 3, "flagged_acted_share": 0.667, "others_acted_share": 0.5, "acted_flagged_share": 0.667,
        "flagged_overturned_share": 0.5,
    }  # fmt: skip


def test_counters_are_bounded_and_hold_no_names() -> None:
    names = Names(random.Random(1).randbytes)
    one, again, tomorrow = (names.of("@a:x", at) for at in (0, 1, 2 * DAY))
    assert one == again != tomorrow and b"@a" not in one, "a new key every day"
    kept = Kept(list, most=10)
    for number in range(100):
        kept.of(names.of(f"@{number}:x", 0)).append(number)
    assert len(kept) == 10


async def test_a_registration_token_that_makes_trouble_is_shown_by_a_name_that_opens_nothing(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice = await town.user("alice@one")
    config = house.folder / CONFIG_NAME
    config.write_text(config.read_text().replace("mode: open_to_everyone", "mode: token"))
    await house.restart()
    made = [await house.command("token.create") for _ in range(2)]
    names = [f"registration token {one['name']}" for one in made]

    async def comes(name: str, token: str) -> Person:
        person = Person(town.http, house.url, house.name, name, PASSWORD)
        await person.registers(auth={"type": "m.login.registration_token", "token": token})
        return person

    few = [await comes(f"few{n}", made[0]["token"]) for n in range(WRONG_ACCOUNTS)]
    many = [await comes(f"many{n}", made[1]["token"]) for n in range(ACCOUNTS_OF_TOKEN_PER_HOUR)]
    assert await flagged(mod) == set(), "that many come with one token where people are invited"
    many.append(await comes("many5", made[1]["token"]))
    assert await flagged(mod) == {("token-wave", names[1])}
    assert not any(one["token"] in name for one in made for name in names), "who reads flags can't make accounts"
    assert house.server is not None
    flags = house.server._keeping.flags
    assert flags.weight(many[0].id) > flags.weight(few[0].id) == 0, "a case about who came with it belongs further up"

    for who in few[: WRONG_ACCOUNTS - 1]:
        await alice.calls("POST", f"users/{path(who.id)}/report", {"reason": "spam"})
        await alice.calls("POST", f"users/{path(who.id)}/report", {"reason": "once more"})
    assert ("token-misused", names[0]) not in await flagged(mod), "two who are reported are two, however often"
    await takes(mod, "suspend", few[-1].id)
    assert ("token-misused", names[0]) in await flagged(mod), "three are many of three"
    for who in many[:1]:
        await takes(mod, "suspend", who.id)
    assert ("token-misused", names[1]) not in await flagged(mod), "one of six is not"
    listed = await house.command("token.list")
    assert {one["name"] for one in listed} == {one["name"] for one in made}, "the operator finds the token by its name"
    town.clock.forward(hours=25)
    assert await flagged(mod) == set()
