"""People whom a room that was known in part took for members, or for gone, until the whole room said otherwise: whoever
listens for comings and goings hears of them, as of any other. Spec: MSC3902."""

from __future__ import annotations

from typing import Any

import pytest

from relay.errors import ApiError
from relay.rooms import afar
from relay.rooms.room import Room
from tests.rooms.village import Village


async def test_who_was_mistaken_for_a_member_goes_and_who_was_mistaken_for_gone_comes(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mallory is banned; by an old join that two.example can't know to be over, she comes back, puts gail out, and lets hugo in."""
    monkeypatch.setattr(afar, "WHOLE_SECONDS", 0.02)
    monkeypatch.setattr(afar, "MANY_MEMBERS", 1)
    one, two, three = [await village.home(f"{name}.example") for name in ("one", "two", "three")]
    mallory, hugo, gail = three.user("mallory"), three.user("hugo"), one.user("gail")
    room_id = await one.creates("anna", name="a large hall")
    await one.joins("gail", room_id)
    await three.joins("mallory", room_id, "one.example")
    await village.delivers_all()
    levels = await (await one.room(room_id)).content("m.room.power_levels")
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {mallory: 50}})
    await village.delivers_all()
    before = await (await one.room(room_id)).state_events([("m.room.member", mallory), ("m.room.member", gail)])
    await one.members.ban(one.user("anna"), room_id, mallory)
    await village.delivers_all()
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    rules = await one.sets("anna", room_id, "m.room.join_rules", {"join_rule": "invite"})
    await village.delivers_all([one, two])
    chains = [
        await one.answers("two.example", "GET", f"/_matrix/federation/v1/event_auth/{room_id}/{cited.id}", b"")
        for cited in before.values()
    ]

    async def authorises(target: str, content: Any) -> dict[str, Any]:
        chain = {event["origin_server_ts"]: event for answer in chains for event in answer["auth_chain"]}
        return {"auth_chain": [*chain.values(), *(cited.pdu for cited in before.values())]}

    village.instead["three.example", "event_auth"] = authorises
    cites = {**before, ("m.room.join_rules", ""): rules}
    after = list((await two.room(room_id)).extremities)

    async def membership(who: str, target: str, now: str) -> None:
        event = await three.forges(
            who, room_id, type="m.room.member", content={"membership": now}, state_key=target, after=after, cites=cites
        )
        assert await two.receives("three.example", room_id, event) == {event.id: None}
        after[:] = [event.id]
        cites["m.room.member", target] = event

    await membership(mallory, mallory, "join")
    await membership(mallory, gail, "leave")
    await membership(mallory, hugo, "invite")
    await membership(hugo, hugo, "join")
    room = await two.room(room_id)
    taken_for = {user: room.members.get(user) for user in (mallory, gail, hugo)}
    assert taken_for == {mallory: "join", gail: "leave", hugo: "join"}, "so it looks, from what is known"

    heard: dict[str, tuple[str | None, str]] = {}

    def hear(room: Room, user: str, was: str | None, now: str, pos: int) -> None:
        heard[user] = (was, now)

    two.rooms.on_membership.append(hear)
    since = two.db.stable_pos()
    assert await two.completes(room_id)
    room = await two.room(room_id)
    assert room.members == (await one.room(room_id)).members, "the whole room knows better"
    assert heard == {mallory: ("join", "ban"), gail: ("leave", "join"), hugo: ("join", "leave")}
    await two.db.settled()
    log = await two.db.read(two.rooms.membership_changes, [room_id], since, two.db.stable_pos())
    assert {user: (was, now) for _, user, was, now, _ in log} == heard, "and clients can be told of them later"
    assert await two.rooms.servers_sharing(two.user("ben")) == {"one.example"}, "theirs is not in the room"
    await two.agrees_with_its_disk(room_id)


async def test_a_ban_that_is_known_here_holds_though_a_server_forgets_to_tell_of_it(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ben is banned before the members of the room are known; a careless server takes his join, which cites the ban."""
    monkeypatch.setattr(afar, "WHOLE_SECONDS", 0.02)
    monkeypatch.setattr(afar, "MANY_MEMBERS", 1)
    one, two = [await village.home(f"{name}.example") for name in ("one", "two")]
    ben = two.user("ben")
    room_id = await one.creates("anna", name="a large hall")
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    await one.members.ban(one.user("anna"), room_id, ben)
    await village.delivers_all()
    assert (await two.room(room_id)).partial is not None and two.rooms.membership(room_id, ben) == "ban"
    with pytest.raises(ApiError):
        await two.joins("ben", room_id, "one.example")

    room = await one.room(room_id)
    ban = await room.event("m.room.member", ben)
    assert ban is not None
    template = await one.answers(
        "two.example", "GET", f"/_matrix/federation/v1/make_join/{room_id}/@cleo:two.example?ver=12", b""
    )
    state = [one_of.pdu for key, one_of in (await room.state_events(list(room.state))).items() if key[1] != ben]
    taken: list[Any] = []

    async def lets_in(target: str, content: Any) -> dict[str, Any]:
        event = {**template["event"], "sender": ben, "state_key": ben}
        return {**template, "event": {**event, "auth_events": [*event["auth_events"], ban.id]}}

    async def takes(target: str, content: Any) -> dict[str, Any]:
        taken.append(content)
        members = [event for event in state if event["type"] == "m.room.member"]
        others = [event for event in state if event["type"] != "m.room.member"]
        return {"state": others, "auth_chain": members, "members_omitted": True, "servers_in_room": ["one.example"]}

    village.instead["one.example", "make_join"] = lets_in
    village.instead["one.example", "send_join"] = takes
    with pytest.raises(ApiError) as refused:
        await two.joins("ben", room_id, "one.example")
    assert taken and refused.value.status == 403
    assert two.rooms.membership(room_id, ben) == "ban"
