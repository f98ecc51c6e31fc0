"""The authorization rules 1 to 5: creating a room, what an event cites, who may come from where, aliases."""

from __future__ import annotations

from typing import Any

import pytest

from relay.errors import NotAllowed
from relay.protocol import event as events
from relay.protocol.auth import auth_keys, check, check_auth_events
from relay.protocol.event import Event
from relay.protocol.versions import VERSIONS
from tests.protocol.drawn_room import (
    ALICE,
    BOB,
    CAROL,
    DAVE,
    IN,
    DrawnRoom,
    levels,
    member,
    room_of,
    rule,
    say,
    state,
    verdict,
)

ALL = range(3, 13)
OLD = range(3, 12)

# 1. m.room.create


def drawn_create(version: int, sender: str = ALICE, without: str = "", **content: Any) -> Event:
    room = DrawnRoom(str(version))
    whole: dict[str, Any] = {"room_version": str(version), **content}
    if version <= 10:
        whole.setdefault("creator", sender)
    whole.pop(without, None)
    return room.draw("m.room.create", sender, whole, "", prev=[], auth=[])


@pytest.mark.parametrize("version", ALL)
def test_creating_a_room(version: int) -> None:
    room = DrawnRoom(str(version))
    assert verdict(room, room.create) is None, "a room can be created"
    follows = room.draw("m.room.create", ALICE, room.create.content, "", auth=[])
    assert verdict(room, follows) == "1.1", "nothing comes before it"
    for wrong in ("1", "999", None, 5):
        assert verdict(room, drawn_create(version, room_version=wrong)) == "1.3", "it is read by its own version"
    assert verdict(room, events.redacted(room.create)) is None, "redaction may have taken the version away"
    without_creator = verdict(room, drawn_create(version, without="creator"))
    assert without_creator == ("1.4" if version <= 10 else None), "up to version 10 it names its creator"


@pytest.mark.parametrize("version", OLD)
def test_a_room_lies_on_its_creators_server(version: int) -> None:
    assert verdict(DrawnRoom(str(version)), drawn_create(version, BOB)) == "1.2", "the room ID is of another server"


def test_the_create_event_of_version_12_has_no_room_id() -> None:
    room = DrawnRoom("12")
    named = events.parse({**room.create.pdu, "room_id": "!x:one.example"}, room.version)
    assert verdict(room, named) == "1.2", "its ID is its room's ID"


@pytest.mark.parametrize("more", ["@a:b", {}, [5], ["bob"], ["@bob"], [BOB, None], ["@b:" + "c" * 255], None])
def test_additional_creators_are_users(more: Any) -> None:
    assert verdict(DrawnRoom("12"), drawn_create(12, additional_creators=more)) == "1.4", "it is no list of user IDs"
    assert verdict(DrawnRoom("11"), drawn_create(11, additional_creators=more)) is None, "before 12 it has no meaning"


def test_additional_creators_may_be_several_or_none() -> None:
    for more in ([], [BOB], [BOB, CAROL]):
        assert verdict(DrawnRoom("12"), drawn_create(12, additional_creators=more)) is None, "a list of user IDs"


def test_an_additional_creator_has_the_powers_of_one() -> None:
    room = room_of(12, [IN, levels(state_default=2**53 - 1)], additional_creators=[BOB])
    assert verdict(room, room.draw(*state(BOB))) is None, "no level stops a creator"
    assert verdict(room, room.draw(*levels(BOB, users={BOB: 5}))) == "11.4", "no creator is given a level"
    assert verdict(room, room.draw(*member(BOB, "ban", by=ALICE))) == "6.6.3", "no creator bans another"


# 2. The room ID


def test_the_room_id_of_version_12_names_an_accepted_create_event() -> None:
    room, other = DrawnRoom("12"), DrawnRoom("12", else_="x")
    message = room.draw(*say(ALICE))
    assert verdict(room, message) is None, "the room ID is that of the create event"
    with pytest.raises(NotAllowed) as no:
        check(message, room.state, other.create)
    assert no.value.rule == "2", "another room's create event does not do"
    check(message, room.state)  # the create event is found in the state too
    stateless = {key: known for key, known in room.state.items() if key[0] != "m.room.create"}
    check(message, stateless, room.create)
    with pytest.raises(NotAllowed) as no:
        check(message, stateless)
    assert no.value.rule == "2", "without a create event there is no room"
    cited = room.cited(message)
    check_auth_events(message, cited, (), room.create)
    for create, rejected in ((None, set()), (other.create, set()), (room.create, {room.create.id})):
        with pytest.raises(NotAllowed) as no:
            check_auth_events(message, cited, rejected, create)
        assert no.value.rule == "2", "the create event has to be known and accepted"


# 3. auth_events


@pytest.mark.parametrize("version", ALL)
def test_what_an_event_cites(version: int) -> None:
    room = room_of(version, [rule("public"), IN, levels()])
    message = room.draw(*say(BOB))
    cited = room.cited(message)

    def refused(cites: list[Event], rejected: set[str] | None = None) -> str | None:
        try:
            check_auth_events(message, cites, rejected or set(), room.create)
        except NotAllowed as no:
            return no.rule
        return None

    assert refused(cited) is None, "what selection names is right"
    assert refused([*cited, cited[-1]]) == "3.1", "two of a kind"
    assert refused([*cited, room.state["m.room.join_rules", ""]]) == "3.2", "a message does not cite the join rule"
    assert refused([*cited, room.state["m.room.member", ALICE]]) == "3.2", "nor the membership of others"
    assert refused([*cited, room.draw(*say(ALICE))]) == "3.2", "nor a message"
    assert refused(cited, {cited[-1].id}) == "3.3", "a rejected event supports nothing"
    without_create = [known for known in cited if known.type != "m.room.create"]
    assert refused(without_create) == (None if version == 12 else "3.4"), "before 12 the create event is cited"
    if version == 12:
        assert refused([*cited, room.create]) == "3.2", "in version 12 it never is"
    elsewhere = DrawnRoom(str(version), creator=BOB)
    foreign = elsewhere.state["m.room.member", BOB]
    swapped = [foreign if known.key == foreign.key else known for known in cited]
    assert refused(swapped) == "3.5", "an event of another room has no say here"
    check_auth_events(room.create, [], ())


JOIN_BY_VOUCHER = {"membership": "join", "join_authorised_via_users_server": CAROL}


@pytest.mark.parametrize(
    ("type", "state_key", "content", "versions", "more"),
    [
        ("m.room.message", None, {}, ALL, []),
        ("m.room.topic", "", {}, ALL, []),
        ("m.room.member", ALICE, {"membership": "join"}, ALL, ["rules"]),
        ("m.room.member", ALICE, {"membership": "leave"}, ALL, []),
        ("m.room.member", BOB, {"membership": "leave"}, ALL, [BOB]),
        ("m.room.member", BOB, {"membership": "ban"}, ALL, [BOB]),
        ("m.room.member", BOB, {"membership": "invite"}, ALL, [BOB, "rules"]),
        ("m.room.member", ALICE, {"membership": "knock"}, ALL, ["rules"]),
        ("m.room.member", ALICE, JOIN_BY_VOUCHER, range(3, 8), ["rules"]),
        ("m.room.member", ALICE, JOIN_BY_VOUCHER, range(8, 13), ["rules", CAROL]),
        ("m.room.member", ALICE, {**JOIN_BY_VOUCHER, "membership": "leave"}, ALL, []),
        ("m.room.member", ALICE, {**JOIN_BY_VOUCHER, "join_authorised_via_users_server": ALICE}, ALL, ["rules"]),
        ("m.room.member", ALICE, {**JOIN_BY_VOUCHER, "join_authorised_via_users_server": 5}, ALL, ["rules"]),
        ("m.room.member", BOB, {"membership": "invite", "third_party_invite": {"signed": {"token": "t"}}}, ALL, [BOB, "rules", "token"]),
        ("m.room.member", BOB, {"membership": "invite", "third_party_invite": {"signed": {"token": []}}}, ALL, [BOB, "rules"]),
        ("m.room.member", BOB, {"membership": "invite", "third_party_invite": 5}, ALL, [BOB, "rules"]),
        ("m.room.member", None, {"membership": []}, ALL, []),
    ],
)  # fmt: skip
def test_the_selection_of_auth_events(
    type: str, state_key: str | None, content: dict[str, Any], versions: range, more: list[str]
) -> None:
    named = {"rules": ("m.room.join_rules", ""), "token": ("m.room.third_party_invite", "t")}
    for version in versions:
        expected = [("m.room.power_levels", ""), ("m.room.member", ALICE)]
        expected += [named.get(name, ("m.room.member", name)) for name in more]
        if version < 12:
            expected.append(("m.room.create", ""))
        found = auth_keys(type, ALICE, state_key, content, VERSIONS[str(version)])
        assert sorted(found) == sorted(expected), f"the selection in version {version}"


def test_a_create_event_cites_nothing() -> None:
    assert all(auth_keys("m.room.create", ALICE, "", {}, version) == [] for version in VERSIONS.values()), "it is first"


@pytest.mark.parametrize("version", OLD)
def test_without_a_create_event_there_is_no_room(version: int) -> None:
    room = DrawnRoom(str(version))
    message = room.draw(*say(ALICE))
    with pytest.raises(NotAllowed) as no:
        check(message, {"m.room.member": room.state["m.room.member", ALICE]})  # type: ignore[dict-item]
    assert no.value.rule == "3.4", "the create event is missing"


# 4. m.federate, 5. m.room.aliases


@pytest.mark.parametrize("version", ALL)
def test_a_room_may_be_closed_to_other_servers(version: int) -> None:
    closed = room_of(version, [rule("public")], **{"m.federate": False})
    assert verdict(closed, closed.draw(*IN)) == "4", "other servers stay out"
    assert verdict(closed, closed.draw(*member(DAVE, "join"))) is None, "the creator's server may come in"
    for harmless in (True, None, "false", 0):
        opened = room_of(version, [rule("public")], **{"m.federate": harmless})
        assert verdict(opened, opened.draw(*IN)) is None, "only false closes a room"


@pytest.mark.parametrize("version", ALL)
def test_aliases_belong_to_their_server_up_to_version_5(version: int) -> None:
    room = room_of(version, [])
    expected = None if version <= 5 else "7"
    own = room.draw("m.room.aliases", BOB, {"aliases": []}, "two.example")
    assert verdict(room, own) == expected, "a server lists its own aliases, even from outside"
    for state_key in ("one.example", "", None):
        foreign = room.draw("m.room.aliases", BOB, {"aliases": []}, state_key)
        assert verdict(room, foreign) == ("5" if version <= 5 else "7"), "but no others"
