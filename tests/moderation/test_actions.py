"""Stories of moderators' measures: what they do, how they end, who has to agree, and that the log has each of them."""

from __future__ import annotations

from typing import Any

import pytest

from relay.clock import DAY, HOUR
from relay.errors import Forbidden, InvalidParam, MissingParam
from relay.moderation.acts import MEASURES, Act, checked
from relay.moderation.moderator_keys import Moderator
from tests.people import Person, Refused, path, until
from tests.town import Town, Within

SAFETY = "/_relay/safety/v1"


async def moderators(town: Town, *names: str) -> tuple[Within, list[Person]]:
    house = await town.relay("one")
    people = [await town.user(f"{name}@one") for name in names]
    for name in names:
        await house.command("user.admin", user=name, admin=True)
    return house, people


async def takes(mod: Person, measure: str, target: str, **more: Any) -> dict[str, Any]:
    reasons = {} if more.get("undo") else {"ground": "terms:1", "facts": "What happened, in the moderator's own words."}
    body = {"measure": measure, "target": target, "reason_code": "harassment", **reasons, **more}
    return await mod.calls("POST", f"{SAFETY}/acts", body)


async def logged(house: Within) -> list[str]:
    assert house.server is not None
    page = await house.server.moderation.audit_log.page(limit=200)
    return [entry.action for entry in reversed(page) if not entry.action.startswith(("signer.", "admin"))]


async def is_suspended(person: Person, room: str) -> bool:
    try:
        await person.sends(room)
    except Refused as no:
        return no.errcode == "M_USER_SUSPENDED"
    return False


async def test_measures_against_a_person_hold_end_and_stand_in_the_log(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    assert (await takes(mod, "suspend", bob.id, lasts_ms=HOUR))["until"], "it says when it ends"
    assert await is_suspended(bob, room)
    town.clock.forward(minutes=61)
    assert await until(lambda: is_ended(bob, room)), "it ends by itself"
    await takes(mod, "lock", bob.id)
    assert (await bob.is_refused(bob.syncs())).errcode == "M_USER_LOCKED"
    await takes(mod, "lock", bob.id, undo=True)
    before = await bob.sends(room)
    await takes(mod, "shadow", bob.id)
    unseen = await bob.sends(room)
    assert await alice.does_not_see(unseen), "what she sends reaches nobody"
    await takes(mod, "redact", before, room_id=room)
    assert not (await alice.event(room, before))["content"], "what she said before can be taken back meanwhile"
    await takes(mod, "shadow", bob.id, undo=True)
    assert await alice.sees(await bob.sends(room)), "until it is taken back"
    await takes(mod, "warn", bob.id)
    strikes = await mod.calls("GET", f"{SAFETY}/users/{path(bob.id)}/strikes")
    assert [one["reason_code"] for one in strikes["strikes"]] == ["harassment"]
    town.clock.forward(hours=181 * 24)
    assert not (await mod.calls("GET", f"{SAFETY}/users/{path(bob.id)}/strikes"))["strikes"], "a strike expires"

    async def is_forgotten() -> bool:
        assert house.server is not None
        town.clock.forward(minutes=2)
        return await house.server.db.read(lambda query: query.value("SELECT count(*) FROM strikes")) == 0

    assert await until(is_forgotten), "and is nowhere any more"
    assert await logged(house) == [
        "suspend", "undo.suspend", "lock", "undo.lock", "shadow", "redact", "undo.shadow", "warn",
    ]  # fmt: skip
    refused = await mod.is_refused(takes(mod, "suspend", mod.id))
    assert refused.status == 403, "nobody restricts herself"
    assert (await alice.is_refused(takes(alice, "suspend", bob.id))).status == 403, "only moderators take measures"
    assert (await mod.is_refused(takes(mod, "suspend", "@nobody:else.example"))).errcode == "M_INVALID_PARAM"


async def is_ended(person: Person, room: str) -> bool:
    return not await is_suspended(person, room)


async def test_measures_in_a_room(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@two")
    room = await alice.creates_room(with_=[bob, carol], preset="private_chat")
    said = await bob.sends(room)
    await takes(mod, "redact", said, room_id=room)
    assert "content" in await alice.event(room, said) and not (await alice.event(room, said))["content"], "it is gone"
    refused = await mod.is_refused(takes(mod, "kick", carol.id, room_id=room))
    assert "no power" in refused.text, "people elsewhere need a moderator with power in the room"
    await takes(mod, "ban", bob.id, room_id=room)
    assert (await alice.members(room))[bob.id] == "leave", "a local person leaves"
    await alice.invites_to(room, bob)
    assert "keep you out" in (await bob.is_refused(bob.joins(room))).text, "and stays out"
    await takes(mod, "ban", bob.id, room_id=room, undo=True)
    await bob.joins(room)
    public = await alice.creates_room(preset="public_chat")
    await takes(mod, "block_room", public)
    assert "closed this room" in (await bob.is_refused(bob.joins(public))).text
    await takes(mod, "block_room", public, undo=True)
    await bob.joins(public)
    server = carol.id.partition(":")[2]
    await takes(mod, "block_server", server)
    unheard = await carol.sends(room)
    assert await alice.does_not_see(unheard), "nothing comes from a blocked server"
    listed = await mod.calls("GET", f"{SAFETY}/restrictions", kind="server_block")
    assert [one["subject"] for one in listed["restrictions"]] == [server]
    await house.restart()
    assert await alice.does_not_see(await carol.sends(room)), "also after a restart"
    await takes(mod, "block_server", server, undo=True)
    blob = b"\x00\xff" * 300
    uri = await bob.uploads(blob)
    await takes(mod, "quarantine", uri)
    assert (await alice.is_refused(alice.downloads(uri))).status == 404
    await takes(mod, "quarantine", uri, undo=True)
    assert (await alice.downloads(uri))[1] == blob


async def test_what_cannot_be_undone_needs_two_persons_or_a_day(town: Town) -> None:
    house, [mod, other] = await moderators(town, "mod", "other")
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=bob)
    said = [await bob.sends(room) for _ in range(3)]
    alone = await takes(mod, "redact_all", bob.id)
    assert alone["until"] - town.clock.now() > DAY - HOUR, "where nobody else counts yet, it waits a day"
    await takes(mod, "deactivate", carol.id)
    waiting = (await mod.calls("GET", f"{SAFETY}/acts"))["acts"]
    assert [one["measure"] for one in waiting] == ["redact_all", "deactivate"]
    await other.calls("POST", f"{SAFETY}/acts/{waiting[1]['id']}/cancel", {})
    again = await other.is_refused(other.calls("POST", f"{SAFETY}/acts/{waiting[1]['id']}/cancel", {}))
    assert again.status == 404, "it is gone"
    assert (await alice.event(room, said[0]))["content"], "until then nothing happens"
    await house.restart()
    town.clock.forward(hours=25)

    async def all_gone() -> bool:
        return not any([(await alice.event(room, one))["content"] for one in said])

    assert await until(all_gone), "then it is done"
    assert await carol.syncs(), "what was cancelled is not"

    # Now the other one has been a moderator for long enough.
    assert house.server is not None
    actions = house.server.moderation.acting.actions
    enrolled = town.clock.now() - 8 * DAY

    async def enrolled_ones() -> list[Moderator]:
        return [Moderator(mod.id, True, enrolled), Moderator(other.id, True, enrolled)]

    actions._persons._moderators = enrolled_ones
    await other.syncs()
    asked = await takes(mod, "deactivate", carol.id)
    assert "until" not in asked, "it waits for a person, not for a time"
    refused = await mod.is_refused(mod.calls("POST", f"{SAFETY}/acts/{asked['waits']}/confirm", {}))
    assert "yourself" in refused.text, "nobody is her own second person"
    await other.calls("POST", f"{SAFETY}/acts/{asked['waits']}/confirm", {})

    async def closed() -> bool:
        try:
            await carol.syncs()
        except Refused as no:
            return no.status == 401
        return False

    assert await until(closed), "two persons close an account"
    public = await alice.creates_room(preset="public_chat")
    await bob.joins(public)
    asked = await takes(mod, "shut_room", public)
    assert public not in alice.left and public not in bob.left, "nobody is taken out before the second person agrees"
    await other.calls("POST", f"{SAFETY}/acts/{asked['waits']}/confirm", {})
    assert await until(lambda: alice.notices(lambda: public in alice.left, 1)), "our people leave a room that is shut"
    assert (await bob.is_refused(bob.joins(public))).status == 403
    assert await logged(house) == [
        "asked.redact_all", "asked.deactivate", "cancelled.deactivate", "redact_all",
        "asked.deactivate", "confirmed.deactivate", "asked.shut_room", "block_room",
        "confirmed.shut_room",
    ]  # fmt: skip


GOOD = {
    "user": "@a:x.example", "event": "$" + "a" * 43, "media": "sha256:" + "0" * 64, "room": "!r:x.example", "server": "x.example",
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_a_machine_takes_only_what_can_be_taken_back_for_a_day(name: str) -> None:
    kind = MEASURES[name]
    act = Act(name, GOOD[kind.target], "integration:triage", "spam", "!r:x.example", lasts_ms=400 * DAY)
    if kind.by_machine:
        assert kind.reversible, "a machine does nothing that can't be taken back"
        taken = checked(act)
        assert taken.automated and taken.lasts_ms is not None and taken.lasts_ms <= DAY, "and for a day at most"
    else:
        with pytest.raises(Forbidden):
            checked(act)


@pytest.mark.parametrize("asked", [None, HOUR, 400 * DAY])
def test_nobody_is_answered_as_if_heard_for_longer_than_a_day(asked: int | None) -> None:
    taken = checked(Act("shadow", GOOD["user"], "@mod:x.example", "spam", lasts_ms=asked))
    assert taken.lasts_ms == min(asked or DAY, DAY) and not taken.automated, "not by a person's word either"


@pytest.mark.parametrize(
    ("act", "refusal"),
    [
        (Act("behead", GOOD["user"], "operator", "spam"), InvalidParam),
        (Act("suspend", "bob", "operator", "spam"), InvalidParam),
        (Act("kick", GOOD["user"], "operator", "spam"), MissingParam),
        (Act("suspend", GOOD["user"], "operator", "he said: you"), InvalidParam),
        (Act("suspend", GOOD["user"], "operator", "spam", lasts_ms=0), InvalidParam),
        (Act("deactivate", GOOD["user"], "operator", "spam", undo=True), InvalidParam),
        (Act("kick", GOOD["user"], "operator", "spam", GOOD["room"], undo=True), InvalidParam),
        (Act("block_server", "*", "operator", "spam"), InvalidParam),
        (Act("block_server", "a b", "operator", "spam"), InvalidParam),
        (Act("quarantine", "mxc://x.example/../y", "operator", "spam"), InvalidParam),
        (Act("quarantine", "sha256:abc", "operator", "spam"), InvalidParam),
        (Act("redact", "$x", "operator", "spam", GOOD["room"]), InvalidParam),
    ],
)
def test_what_makes_no_sense_is_refused(act: Act, refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        checked(act)


async def test_a_machine_ends_nothing_sooner_than_a_person_said(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    public = await alice.creates_room(preset="public_chat")
    await takes(mod, "suspend", bob.id)
    await takes(mod, "block_room", public)
    assert house.server is not None
    for measure, target in (("suspend", bob.id), ("suspend", carol.id), ("block_room", public)):
        await house.server.moderation.acting.actions.take(Act(measure, target, "integration:triage", "spam"))
    town.clock.forward(hours=25)
    assert await until(lambda: is_ended(carol, room)), "what the machine did alone ends after a day"
    assert await is_suspended(bob, room), "what a moderator did as well does not"
    assert (await carol.is_refused(carol.joins(public))).status == 403


async def test_a_suspended_moderator_does_not_help_herself(town: Town) -> None:
    house, [mod, other] = await moderators(town, "mod", "other")
    bob = await town.user("bob@one")
    await takes(mod, "warn", bob.id)
    refused = await mod.is_refused(takes(mod, "suspend", mod.id, undo=True))
    assert "yourself" in refused.text
    asked = await takes(mod, "redact_all", other.id)
    assert "until" in asked, "whoever it is about is no second person"
    for word in ("confirm", "cancel"):
        refused = await other.is_refused(other.calls("POST", f"{SAFETY}/acts/{asked['waits']}/{word}", {}))
        assert "about you" in refused.text
    await house.command("user.suspend", user="mod")
    for measure, target in (("suspend", mod.id), ("warn", bob.id)):
        assert (await mod.is_refused(takes(mod, measure, target, undo=True))).status == 403
