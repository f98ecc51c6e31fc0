"""Stories of hidden messages: nobody of ours reads them anywhere, other servers do, and they can be shown again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.clock import HOUR
from relay.errors import NotFound
from relay.rooms.withholding import Withholding
from tests.moderation.test_actions import SAFETY, logged, moderators, takes
from tests.people import Json, Person, ciphertext, path, until
from tests.sync.connection import Connection, a_list
from tests.town import Town


async def readings(who: Person, room: str, event_id: str, root: str) -> dict[str, list[Json]]:
    """Every way to read an event, and what comes of it: each event of this ID, wherever it stands in the answer."""
    at = path("rooms", room)
    fresh = await who.on_another_device()
    sliding = Connection(fresh, "list")
    sliding.lists = {"all": a_list(0, 9, limit=20)}
    answers: dict[str, Any] = {
        "first /sync": await fresh.syncs(),
        "sliding sync": await sliding.syncs(),
        "/messages": await who.history(room),
        "/messages forwards": await who.history(room, "f"),
        "/event": await who.event(room, event_id),
        "/context": await who.calls("GET", f"{at}/context/{path(event_id)}", limit=20),
        "/context beside": await who.calls("GET", f"{at}/context/{path(root)}", limit=20),
        "/relations": await who.calls("GET", f"/_matrix/client/v1/{at}/relations/{path(root)}", recurse="true"),
        "/threads": await who.calls("GET", f"/_matrix/client/v1/{at}/threads"),
        "/notifications": await who.calls("GET", "notifications", limit=100),
        "of its root": await who.event(room, root),
    }
    return {name: list(_named(answer, event_id)) for name, answer in answers.items()}


def _named(answer: Any, event_id: str) -> Any:
    if isinstance(answer, list):
        for one in answer:
            yield from _named(one, event_id)
    elif isinstance(answer, dict):
        if answer.get("event_id") == event_id and "type" in answer:
            yield answer
        for one in answer.values():
            yield from _named(one, event_id)


ALWAYS = {"first /sync", "sliding sync", "/messages", "/messages forwards", "/event", "/context", "/context beside"}


def told_of(answer: Json, room: str, event_id: str) -> list[Json]:
    events = answer.get("rooms", {}).get("join", {}).get(room, {}).get("timeline", {}).get("events", [])
    return [one for one in events if one.get("redacts") == event_id]


async def test_a_message_from_elsewhere_is_hidden_on_every_way_to_read_it(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    root = await alice.sends(room)
    thread = {"rel_type": "m.thread", "event_id": root}
    said = await bob.sends(room, ciphertext(**{"m.relates_to": thread}))
    edited = await bob.sends(room, ciphertext(**{"m.relates_to": {"rel_type": "m.replace", "event_id": said}}))
    assert await alice.sees(edited)
    before = await readings(alice, room, said, root)
    assert all(found and all(one["content"] for one in found) for found in before.values()), (
        "each of these ways shows it, else the rest proves nothing"
    )
    sliding = Connection(alice, "open")
    sliding.lists = {"all": a_list(0, 9, limit=20)}
    await sliding.syncs()
    await alice.syncs()

    refused = await mod.is_refused(takes(mod, "redact", said, room_id=room))
    assert "hide" in refused.text, "nobody here may take it back; what can be done is said"
    await takes(mod, "hide", said)
    for hidden in (said, edited):
        after = await readings(alice, room, hidden, root)
        assert {name for name, found in after.items() if found} == ALWAYS, (
            "it is no answer, no thread's latest, no news"
        )
        for name, found in after.items():
            assert not any(one["content"] for one in found), f"{name} shows nothing of it"
            assert all(one["unsigned"]["redacted_because"]["redacts"] == hidden for one in found), (
                "apps say: taken back"
            )
    shown = await alice.event(room, root)
    assert "m.thread" not in shown.get("unsigned", {}).get("m.relations", {}), "nor is it counted"
    [because] = told_of(await alice.syncs(), room, said)
    assert because["type"] == "m.room.redaction" and because["sender"] == f"@_server:{house.name}"
    told = (await sliding.syncs())["rooms"][room]["timeline"]
    assert {one["redacts"] for one in told} == {said, edited}, "what is on a screen goes from it"
    assert not told_of(await alice.syncs(), room, said), "once"
    await alice.has_read(room, because["event_id"])
    assert await alice.notices(lambda: alice.receipts[room].get((alice.id, "m.read")) == edited), (
        "for apps it is the last event: whoever has read it has read what came before"
    )
    assert (await alice.is_refused(alice.has_read(room, f"{said}x"))).status == 400, "others are no events"

    assert house.server is not None
    cards = await house.server.moderation.proving.disclosures.taken_back(alice.id, room)
    assert {one["event_id"]: bool(one["content"]) for one in cards} == {said: True, edited: True}, (
        "and can still be proved"
    )

    assert (await bob.event(room, said))["content"], "on its own server nothing changed"
    dave = await town.user("dave@three")
    await alice.calls("POST", f"{path('rooms', room)}/invite", {"user_id": dave.id})
    await dave.joins(room, house.name)
    town.cut("two", "three")
    [elsewhere] = [one for one in await dave.history(room) if one["event_id"] == said]
    assert elsewhere["content"]["ciphertext"], "a server that asks us for it gets it whole"
    town.mend("two", "three")

    replaces = ciphertext(**{"m.relates_to": {"rel_type": "m.replace", "event_id": said}})
    later = [await bob.sends(room, replaces)]
    not_hers = await alice.sends(room, replaces)
    await house.restart()
    assert not (await alice.event(room, said))["content"], "it stays so over a restart"
    later.append(await bob.sends(room, replaces))
    assert await alice.sees(later[-1])
    for edit in later:
        came = [one for one in alice.timeline[room] if one["event_id"] == edit]
        assert [one["content"] for one in came] == [{}], "what is made of a hidden message later comes hidden"
        assert not any(one["content"] for found in (await readings(alice, room, edit, root)).values() for one in found)
        assert (await bob.event(room, edit))["content"], "and elsewhere nothing changes"
    assert (await alice.event(room, not_hers))["content"], "only its own sender edits a message"
    [listed] = (await mod.calls("GET", f"{SAFETY}/restrictions", kind="hidden"))["restrictions"]
    assert listed["subject"] == said
    await takes(mod, "hide", said, undo=True)
    again = await readings(alice, room, said, root)
    assert all(found and all(one["content"] for one in found) for found in again.values()), "as if nothing had been"
    for edit in later:
        assert (await alice.event(room, edit))["content"], "its later edits are shown again with it"
    assert "not hidden" in (await mod.is_refused(takes(mod, "hide", said, undo=True))).text
    assert await logged(house) == ["hide", "undo.hide"]


async def test_what_is_hidden_for_a_time_or_by_itself_and_what_can_not_be_hidden(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    read = await bob.sends(room)
    assert await alice.sees(read)
    await alice.has_read(room, read)
    said = await bob.sends(room)
    edited = await bob.sends(room, ciphertext(**{"m.relates_to": {"rel_type": "m.replace", "event_id": said}}))
    other = await bob.sends(room)
    assert await alice.sees(other)

    async def unread() -> int:
        answer = await (await alice.on_another_device()).syncs()
        return int(answer["rooms"]["join"][room]["unread_notifications"]["notification_count"])

    waiting = await unread()
    await takes(mod, "hide", other, lasts_ms=HOUR)
    assert await unread() == waiting - 1, "what is hidden waits for nobody"
    town.clock.forward(minutes=61)

    async def is_shown() -> bool:
        return bool((await alice.event(room, other))["content"])

    assert await until(is_shown), "a time that was set ends by itself"
    await takes(mod, "hide", edited)
    await takes(mod, "hide", said)
    await takes(mod, "hide", said, undo=True)
    assert (await alice.event(room, said))["content"] and not (await alice.event(room, edited))["content"], (
        "what was hidden by itself is shown by itself"
    )
    await bob.redacts(room, said)
    assert await until(lambda: _is_empty(alice, room, said))
    await takes(mod, "hide", said)
    await takes(mod, "hide", said, undo=True)
    assert await _is_empty(alice, room, said), "what its sender took back stays taken back"
    many = [await bob.sends(room) for _ in range(3)]
    edits = [ciphertext(**{"m.relates_to": {"rel_type": "m.replace", "event_id": one}}) for one in many]
    beside = await asyncio.gather(
        *[bob.sends(room, edit) for edit in edits for _ in range(3)], *[takes(mod, "hide", one) for one in many]
    )
    for edit in [one for one in beside if isinstance(one, str)]:
        assert await _is_empty(alice, room, edit), "nor does one slip through that comes at the same moment"
    topic = await alice.sets(room, "m.room.topic", {"topic": "rules"})
    assert "Only a message" in (await mod.is_refused(takes(mod, "hide", topic))).text
    assert (await mod.is_refused(takes(mod, "hide", "$" + 43 * "a"))).status == 404
    assert (await alice.is_refused(takes(alice, "hide", read))).status == 403, "only moderators hide"
    assert house.server is not None
    with pytest.raises(NotFound):
        await Withholding(house.server.rooms).show(read, lambda edit: False, lambda tx: None)


async def _is_empty(who: Person, room: str, event_id: str) -> bool:
    return not (await who.event(room, event_id))["content"]
