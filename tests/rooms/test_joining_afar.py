"""Coming to rooms of other servers and leaving them, also when several do it at once or a server is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from relay.errors import ApiError, RemoteError
from relay.rooms import afar
from relay.rooms.store import REJECTED
from tests.rooms.village import Home, Village

PATIENCE_SECONDS = 120.0


async def two_homes(village: Village) -> tuple[Home, Home]:
    return await village.home("one.example"), await village.home("two.example")


async def silence(target: str, content: object) -> dict[str, Any]:
    raise RemoteError("one.example", 0, "no answer")


async def same_members(room_id: str, *homes: Home) -> None:
    # Those of a large one may still be on their way.
    rooms = [await home.rooms.whole(room_id, PATIENCE_SECONDS) or await home.room(room_id) for home in homes]
    assert all(room.members == rooms[0].members for room in rooms), "they know the same people"
    assert all(dict(room.state) == dict(rooms[0].state) for room in rooms), "and the same state"


async def test_two_people_of_one_server_come_at_once(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna")
    await asyncio.gather(two.joins("ben", room_id, "one.example"), two.joins("cleo", room_id, "one.example"))
    await village.delivers_all()
    await one.says("anna", room_id)
    await village.delivers_all()
    await same_members(room_id, one, two)
    room = await two.room(room_id)
    assert room.local_joined == {two.user("ben"), two.user("cleo")}, "both are in it"
    for who in ("ben", "cleo"):
        assert two.rooms.membership(room_id, two.user(who)) == "join"
    assert len(room.extremities) == 1, "and nothing is left loose"
    await two.agrees_with_its_disk(room_id)


async def test_a_version_that_is_not_spoken_here_is_named(village: Village) -> None:
    _, two = await two_homes(village)

    async def refuses(kind: str, server: str, room_id: str, user_id: str) -> Any:
        body = {"errcode": "M_INCOMPATIBLE_ROOM_VERSION", "error": "no", "room_version": "org.example.new"}
        raise RemoteError(server, 400, "no", "M_INCOMPATIBLE_ROOM_VERSION", body)

    two.remote.make = refuses  # type: ignore[method-assign]
    with pytest.raises(ApiError) as refused:
        await two.joins("ben", "!new:one.example", "one.example")
    assert (refused.value.status, refused.value.errcode) == (400, "M_INCOMPATIBLE_ROOM_VERSION")
    assert refused.value.body()["room_version"] == "org.example.new", "clients look there for it"


async def test_a_message_that_overtakes_the_join_is_not_lost(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna")
    verified, held = two.remote.verified, asyncio.Event()

    async def slow(given: Any) -> list[bool]:
        await held.wait()
        return await verified(given)

    two.remote.verified = slow  # type: ignore[method-assign]
    joining = asyncio.create_task(two.joins("ben", room_id, "one.example"))
    for _ in range(1_000):
        if two.user("ben") in (await one.room(room_id)).members:
            break
        await asyncio.sleep(0.005)
    said = await one.says("anna", room_id)
    delivering = asyncio.create_task(village.delivers(one, two))
    await asyncio.sleep(0)
    two.remote.verified = verified  # type: ignore[method-assign]
    held.set()
    await asyncio.gather(joining, delivering)
    assert said.id in await two.timeline(room_id), "what was said while he came in waits for him"
    await two.agrees_with_its_disk(room_id)


async def test_an_invite_to_a_room_that_is_joined_in_part(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afar, "MANY_MEMBERS", 1)
    monkeypatch.setattr(afar, "WHOLE_SECONDS", 0.02)
    one, two = await two_homes(village)
    room_id = await one.creates("anna", preset="private_chat", name="a large hall")
    await one.members.invite(one.user("anna"), room_id, two.user("ben"))
    invite = two.rooms.memberships(two.user("ben"))[room_id].event_id
    heard: list[tuple[str, str | None, str]] = []
    two.rooms.on_membership.append(lambda room, user, before, now, pos: heard.append((user, before, now)))
    two.patient = True
    await two.joins("ben", room_id)
    room = await two.room(room_id)
    assert room.partial is not None and room.members[two.user("ben")] == "join", "who else is in it is not known yet"
    assert heard == [(two.user("ben"), "invite", "join")], "but that he was invited is"
    assert (await two.row(room.state["m.room.member", two.user("ben")])).replaces == invite
    await two.agrees_with_its_disk(room_id)
    assert await two.completes(room_id)
    await same_members(room_id, one, two)
    await two.agrees_with_its_disk(room_id)


async def test_a_room_with_few_members_and_many_who_were_banned(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afar, "MANY_MEMBERS", 12)
    monkeypatch.setattr(afar, "MANY_EVENTS", 20)
    monkeypatch.setattr(afar, "WHOLE_SECONDS", 0.02)
    one, two = await two_homes(village)
    small, large = await one.creates("anna"), await one.creates("anna")
    for number in range(20):
        await one.members.ban(one.user("anna"), large, f"@nobody{number}:one.example")
    two.patient = True

    async def summary(server: str, room_id: str, *_: object) -> dict[str, Any]:
        return {"room": {"room_id": room_id, "room_version": "12", "encryption": "m.x", "num_joined_members": 1}}

    two.remote.hierarchy = summary  # type: ignore[method-assign]
    await two.joins("ben", small, "one.example")
    assert (await two.room(small)).partial is None, "it has few members, and few who left"
    await two.joins("ben", large, "one.example")
    room = await two.room(large)
    assert room.partial is not None and len(room.members) < 20, "she is in before it is known who is not"
    assert await two.completes(large)
    await same_members(large, one, two)
    await two.agrees_with_its_disk(large)


async def test_all_leave_and_one_comes_back(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna")
    await two.joins("ben", room_id, "one.example")
    await two.joins("cleo", room_id)
    await village.delivers_all()
    await two.members.leave(two.user("ben"), room_id)
    await two.members.forget(two.user("ben"), room_id)
    await two.members.leave(two.user("cleo"), room_id)
    await village.delivers_all()
    left = two.rooms.memberships(two.user("ben"))[room_id]
    unheard = [await one.says("anna", room_id) for _ in range(3)]
    name = await one.sets("anna", room_id, "m.room.name", {"name": "later"})
    assert await two.receives("one.example", room_id, *unheard) == {}, "nobody is there to hear it"
    before = set(await two.timeline(room_id))
    assert not before & {event.id for event in unheard}
    await village.loses(one, two)
    await two.joins("cleo", room_id, "one.example")
    await same_members(room_id, one, two)
    assert (await two.state(room_id))[("m.room.name", "")] == name.id, "she finds the room as it is now"
    still = two.rooms.memberships(two.user("ben"))[room_id]
    assert still.forgotten and still.pos == left.pos, "he who forgot the room hears nothing of it"
    room = await two.room(room_id)
    assert [shown.id for shown in room.recent] == list(room.extremities), "her timeline begins with her coming"
    assert room.recent_floor > max(left.pos, 0), "and says that something lies before it"
    await two.agrees_with_its_disk(room_id)
    await village.delivers_all()
    said = await one.says("anna", room_id)
    await village.delivers_all()
    assert said.id in await two.timeline(room_id), "and what is said now is heard"


async def test_an_invite_then_a_join(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna", preset="private_chat")
    await one.members.invite(one.user("anna"), room_id, two.user("ben"))
    assert two.rooms.membership(room_id, two.user("ben")) == "invite"
    assert await two.count("SELECT count(*) FROM memberships WHERE stripped IS NOT NULL") == 1
    heard: list[tuple[str, str | None, str]] = []
    two.rooms.on_membership.append(lambda room, user, before, now, pos: heard.append((user, before, now)))
    await two.joins("ben", room_id)
    assert heard == [(two.user("ben"), "invite", "join")], "the parts hear of his coming, once"
    assert await two.count("SELECT count(*) FROM memberships WHERE stripped IS NOT NULL") == 0, (
        "what he was told is gone"
    )
    await village.delivers_all()
    await same_members(room_id, one, two)
    await two.agrees_with_its_disk(room_id)


async def test_an_invite_is_turned_down_though_its_server_is_gone(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna", preset="private_chat")
    await one.members.invite(one.user("anna"), room_id, two.user("ben"))
    village.cut(one, two)
    two.wire.asked.clear()
    await two.members.leave(two.user("ben"), room_id)
    assert two.rooms.membership(room_id, two.user("ben")) == "leave", "it is gone for him"
    assert len(two.wire.asked) <= 3, "nobody waits long for servers that are down"
    village.mend(one, two)
    await one.members.invite(one.user("anna"), room_id, two.user("ben"))
    assert two.rooms.membership(room_id, two.user("ben")) == "invite", "he can be invited again"
    await two.joins("ben", room_id)
    await village.delivers_all()
    await same_members(room_id, one, two)


async def test_banned_and_forgiven(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna")
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    await one.members.ban(one.user("anna"), room_id, two.user("ben"))
    await village.delivers_all()
    assert two.rooms.membership(room_id, two.user("ben")) == "ban"
    with pytest.raises(ApiError):
        await two.joins("ben", room_id, "one.example")
    assert two.rooms.membership(room_id, two.user("ben")) == "ban", "he stays outside"
    await one.members.unban(one.user("anna"), room_id, two.user("ben"))
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    await same_members(room_id, one, two)
    await two.agrees_with_its_disk(room_id)


async def test_a_room_without_encryption_is_left_at_once(village: Village) -> None:
    one, two = await two_homes(village)
    one.seal.__init__("open")  # type: ignore[misc]
    room_id = await one.creates("anna")
    village.instead[("one.example", "make_leave")] = silence
    with pytest.raises(ApiError) as refusal:
        await two.joins("ben", room_id, "one.example")
    assert refusal.value.status == 403, "he is told why, also where the leave does not get through"
    assert two.rooms.membership(room_id, two.user("ben")) is None
    village.instead.clear()
    with pytest.raises(ApiError):
        await two.joins("ben", room_id, "one.example")
    assert (await one.room(room_id)).members[two.user("ben")] == "leave", "nobody of ours stays in it"


async def test_a_state_with_bad_parts(village: Village) -> None:
    """What a resident server gives is checked one by one; the bad is left out, and the good does not suffer."""
    one, two = await two_homes(village)
    three = await village.home("three.example")
    room_id = await one.creates("anna")
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    grab = await three.forges(
        "carl", room_id, type="m.room.name", content={"name": "mine"}, state_key="", depth=9
    )  # fmt: skip
    rootless = await three.forges(
        "carl", room_id, type="m.room.member", content={"membership": "join", "displayname": "x"},
        state_key=three.user("carl"), cites={("m.room.member", three.user("carl")): grab},
    )  # fmt: skip
    unsigned = await three.forges("carl", room_id, type="m.room.topic", content={"topic": "x"}, state_key="")
    forged = {**unsigned.pdu, "signatures": {"three.example": {"ed25519:one": "AA"}}}

    async def answers(target: str, content: Any) -> dict[str, Any]:
        answer = await one.answers("two.example", "PUT", target, content)
        answer["state"] += [grab.pdu, forged]
        answer["auth_chain"] += [rootless.pdu]
        return answer

    village.instead[("one.example", "send_join")] = answers
    await two.joins("ben", room_id, "one.example")
    village.instead.clear()
    await same_members(room_id, one, two)
    assert ("m.room.name", "") not in await two.state(room_id), "what he may not set is not the room's name"
    assert ("m.room.topic", "") not in await two.state(room_id), "what nobody signed is not there"
    assert (await two.row(grab.id)).marks & REJECTED, "the refused is remembered as refused"
    await two.agrees_with_its_disk(room_id)


async def test_another_rooms_state_does_not_let_us_in(village: Village) -> None:
    one, two = await two_homes(village)
    room_id, other = await one.creates("anna"), await one.creates("anna")
    foreign = [
        event.pdu for event in (await (await one.room(other)).events((await one.state(other)).values())).values()
    ]

    async def answers(target: str, content: Any) -> dict[str, Any]:
        await one.answers("two.example", "PUT", target, content)
        return {"state": foreign, "auth_chain": foreign, "members_omitted": False}

    village.instead[("one.example", "send_join")] = answers
    with pytest.raises(ApiError):
        await two.joins("ben", room_id, "one.example")
    assert two.rooms.membership(room_id, two.user("ben")) is None, "he is not in a room of which we know nothing"


async def test_a_large_room_does_not_hold_up_the_others(village: Village) -> None:
    one, two = await two_homes(village)
    room_id = await one.creates("anna")
    room = await one.room(room_id)
    state = await room.state_events(list(room.entries))
    count = 1_500
    with one.db.write(chain=room_id) as tx:
        for number in range(count):
            member = one.sender.build(
                room, state, sender=one.user(f"m{number}"), type="m.room.member", content={"membership": "join"},
                state_key=one.user(f"m{number}"),
            )  # fmt: skip
            one.appender.append(tx, room, member)
    await tx
    turns = 0

    async def somebody_else() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    other = asyncio.create_task(somebody_else())
    await two.joins("ben", room_id, "one.example")
    other.cancel()
    assert turns > 20, "everybody else got a turn again and again while it was checked and written"
    await same_members(room_id, one, two)
    rows = await two.count("SELECT count(*) FROM memberships WHERE membership = 'join'")
    assert rows == count + 2, "all its members are known"
    await two.agrees_with_its_disk(room_id)


async def test_a_restricted_join_must_bear_its_vouchers_signature(village: Village) -> None:
    one, two = await two_homes(village)
    space = await one.creates("anna")
    await two.joins("ben", space, "one.example")
    await village.delivers_all()
    allow = [{"type": "m.room_membership", "room_id": space}]
    room_id = await one.creates("anna")
    await one.sets("anna", room_id, "m.room.join_rules", {"join_rule": "restricted", "allow": allow})

    async def unsigned(target: str, content: Any) -> dict[str, Any]:
        answer = await one.answers("two.example", "PUT", target, content)
        answer["event"] = {
            **answer["event"],
            "signatures": {"two.example": answer["event"]["signatures"]["two.example"]},
        }
        return answer

    village.instead[("one.example", "send_join")] = unsigned
    with pytest.raises(ApiError):
        await two.joins("ben", room_id, "one.example")
    assert two.rooms.membership(room_id, two.user("ben")) is None, "a join that others would refuse is none"
    village.instead.clear()
    await two.joins("ben", room_id, "one.example")
    assert two.rooms.membership(room_id, two.user("ben")) == "join"
    await village.delivers_all()
    await same_members(room_id, one, two)


async def test_an_invite_that_the_room_no_longer_allows_is_refused(village: Village) -> None:
    one, two = await two_homes(village)
    three = await village.home("three.example")
    room_id = await one.creates("anna", power_level_content_override={"invite": 50, "users": {}})
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    levels = dict(await (await one.room(room_id)).content("m.room.power_levels"))
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {three.user("carl"): 50}})
    await village.delivers_all()

    async def meanwhile(target: str, content: Any) -> dict[str, Any]:
        await one.sets("anna", room_id, "m.room.power_levels", levels)
        await village.delivers(one, three)
        return await two.answers("three.example", "PUT", target, orjson.dumps(content))

    village.instead[("two.example", "invite")] = meanwhile
    with pytest.raises(ApiError):
        await three.members.invite(three.user("carl"), room_id, two.user("ben"))
    assert two.user("ben") not in (await three.room(room_id)).members, "he is told, and nobody is shown an invite"
