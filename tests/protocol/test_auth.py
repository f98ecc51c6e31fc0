"""The authorization rules, one by one: for each an event that passes and one that fails, in each version that has it.

A row says: in rooms of these versions, after this setup, this event is refused by this rule, or passes (None).
"""

from __future__ import annotations

from typing import Any

import pytest

from relay.protocol import event as events
from relay.protocol.signing import SigningKey, sign_json
from tests.protocol.drawn_room import (
    ALICE,
    BANNED,
    BOB,
    CAROL,
    CAROL_IN,
    IN,
    INVITED,
    KNOCKED,
    MODERATOR,
    Draft,
    DrawnRoom,
    key_of,
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
STRINGY = range(3, 10)
INTEGERS = range(10, 13)


IDENTITY = SigningKey.generate("identity")
OTHER_IDENTITY = SigningKey.generate("other")


def third_party(sender: str = ALICE, **content: Any) -> Draft:
    content = content or {"public_key": IDENTITY.verify_key_base64}
    return Draft("m.room.third_party_invite", sender, content, "token")


def redeem(by: str = ALICE, key: SigningKey = IDENTITY, user: str = BOB, **signed: Any) -> Draft:
    claim = {"mxid": BOB, "token": "token", **signed}
    return member(user, "invite", by=by, third_party_invite={"signed": sign_json(claim, "id.example", key)})


# title, versions, setup, event, the rule that refuses it
TABLE: list[tuple[str, range, list[Draft], Draft, str | None]] = [
    # 6. m.room.member
    ("a membership has a state key", ALL, [], Draft("m.room.member", ALICE, {"membership": "join"}), "6.1"),
    ("a membership is named", ALL, [], Draft("m.room.member", ALICE, {}, ALICE), "6.1"),
    ("a membership is a text", ALL, [], member(ALICE, 5), "6.1"),
    ("a membership is a known one", ALL, [], member(ALICE, "lurk"), "6.8"),
    ("knocking is unknown before 7", range(3, 7), [rule("knock")], member(BOB, "knock"), "6.8"),
    # 6.3 join
    ("anybody joins a public room", ALL, [rule("public")], IN, None),
    ("nobody joins for another", ALL, [rule("public")], member(BOB, "join", by=ALICE), "6.3.2"),
    ("a banned user can't join", ALL, [rule("public"), BANNED], IN, "6.3.3"),
    ("an invited user joins", ALL, [rule("invite"), INVITED], IN, None),
    ("a member changes her name", ALL, [rule("invite")], member(ALICE, "join", displayname="Al"), None),
    ("a stranger can't join", ALL, [rule("invite")], IN, "6.3.4"),
    ("without a rule, invites are needed", ALL, [], IN, "6.3.4"),
    ("without a rule, invites do", ALL, [INVITED], IN, None),
    ("who left can't come back uninvited", ALL, [INVITED, IN, member(BOB, "leave")], IN, "6.3.4"),
    ("where one knocks, one can't just join", range(7, 13), [rule("knock"), KNOCKED], IN, "6.3.4"),
    ("a knock may be answered by an invite", range(7, 13), [rule("knock"), KNOCKED, INVITED], IN, None),
    ("the knock rule is unknown before 7", range(3, 7), [rule("knock"), INVITED], IN, "6.3.7"),
    ("a private room lets nobody join", ALL, [rule("private"), INVITED], IN, "6.3.7"),
    ("an unknown rule lets nobody join", ALL, [rule("magic"), INVITED], IN, "6.3.7"),
    ("a rule that is no text lets nobody join", ALL, [rule(["public"])], IN, "6.3.7"),
    ("the restricted rule is unknown before 8", range(3, 8), [rule("restricted"), INVITED], IN, "6.3.7"),
    ("an invite opens a restricted room", range(8, 13), [rule("restricted"), INVITED], IN, None),
    ("a restricted join needs a voucher", range(8, 13), [rule("restricted")], IN, "6.3.5.2"),
    ("knock_restricted is unknown before 10", range(3, 10), [rule("knock_restricted"), INVITED], IN, "6.3.7"),
    ("knock_restricted since 10", INTEGERS, [rule("knock_restricted"), INVITED], IN, None),
    ("knock_restricted needs a voucher too", INTEGERS, [rule("knock_restricted"), KNOCKED], IN, "6.3.5.2"),
    # 6.4 invite
    ("a member invites", ALL, [], INVITED, None),
    ("a stranger can't invite", ALL, [], member(CAROL, "invite", by=BOB), "6.4.2"),
    ("who is invited can't invite", ALL, [INVITED], member(CAROL, "invite", by=BOB), "6.4.2"),
    ("a member is not invited again", ALL, [IN], INVITED, "6.4.3"),
    ("a banned user is not invited", ALL, [BANNED], INVITED, "6.4.3"),
    ("an invited user may be invited again", ALL, [INVITED], INVITED, None),
    ("inviting may take power", ALL, [IN, levels(invite=10)], member(CAROL, "invite", by=BOB), "6.4.5"),
    ("who has that power invites", ALL, [IN, levels(invite=10, users={BOB: 10})], member(CAROL, "invite", by=BOB), None),
    # 6.4.1 third-party invites
    ("a third-party invite is redeemed", ALL, [third_party()], redeem(), None),
    (
        "one of several keys",
        ALL,
        [third_party(public_keys=[5, {}, {"public_key": "$"}, {"public_key": IDENTITY.verify_key_base64}])],
        redeem(),
        None,
    ),
    ("its target is banned", ALL, [third_party(), BANNED], redeem(), "6.4.1.1"),
    ("it has no signed part", ALL, [third_party()], member(BOB, "invite", by=ALICE, third_party_invite={}), "6.4.1.2"),
    ("it is no object", ALL, [third_party()], member(BOB, "invite", by=ALICE, third_party_invite=[]), "6.4.1.2"),
    ("it names no user", ALL, [third_party()], redeem(mxid=None), "6.4.1.3"),
    ("it names no token", ALL, [third_party()], redeem(token=7), "6.4.1.3"),
    ("it is for another user", ALL, [third_party()], redeem(mxid=CAROL), "6.4.1.4"),
    ("it is for another target", ALL, [third_party()], redeem(user=CAROL), "6.4.1.4"),
    ("the room does not know the token", ALL, [third_party()], redeem(token="another"), "6.4.1.5"),
    ("it is another member's", ALL, [IN, third_party()], redeem(by=BOB), "6.4.1.6"),
    ("it is signed with another key", ALL, [third_party()], redeem(key=OTHER_IDENTITY), "6.4.1.8"),
    ("the room names no key", ALL, [third_party(display_name="x")], redeem(), "6.4.1.8"),
    (
        "it is not signed at all",
        ALL,
        [third_party()],
        member(BOB, "invite", by=ALICE, third_party_invite={"signed": {"mxid": BOB, "token": "token"}}),
        "6.4.1.8",
    ),
    (
        "its inviter may have left",
        ALL,
        [IN, third_party(BOB), member(BOB, "leave")],
        member(
            CAROL,
            "invite",
            by=BOB,
            third_party_invite={"signed": sign_json({"mxid": CAROL, "token": "token"}, "id.example", IDENTITY)},
        ),
        None,
    ),
    # 6.5 leave
    ("a member leaves", ALL, [IN], member(BOB, "leave"), None),
    ("an invite is turned down", ALL, [INVITED], member(BOB, "leave"), None),
    ("a knock is taken back", range(7, 13), [KNOCKED], member(BOB, "leave"), None),
    ("a stranger has nothing to leave", ALL, [], member(BOB, "leave"), "6.5.1"),
    ("a banned user can't leave", ALL, [BANNED], member(BOB, "leave"), "6.5.1"),
    ("who left can't leave again", ALL, [IN, member(BOB, "leave")], member(BOB, "leave"), "6.5.1"),
    ("a stranger can't kick", ALL, [CAROL_IN], member(CAROL, "leave", by=BOB), "6.5.2"),
    ("a creator kicks", ALL, [IN], member(BOB, "leave", by=ALICE), None),
    ("an invite is withdrawn", ALL, [INVITED], member(BOB, "leave", by=ALICE), None),
    ("a ban is lifted", ALL, [BANNED], member(BOB, "leave", by=ALICE), None),
    (
        "lifting a ban takes the ban level",
        ALL,
        [IN, levels(users={BOB: 50}, ban=60), member(CAROL, "ban", by=ALICE)],
        member(CAROL, "leave", by=BOB),
        "6.5.3",
    ),
    (
        "lifting a ban takes the kick level too",
        ALL,
        [IN, levels(users={BOB: 50}, ban=50, kick=60), member(CAROL, "ban", by=ALICE)],
        member(CAROL, "leave", by=BOB),
        "6.5.5",
    ),
    (
        "who has both lifts it",
        ALL,
        [IN, MODERATOR, member(CAROL, "ban", by=ALICE)],
        member(CAROL, "leave", by=BOB),
        None,
    ),
    ("kicking takes power", ALL, [IN, CAROL_IN], member(CAROL, "leave", by=BOB), "6.5.5"),
    ("a moderator kicks", ALL, [IN, CAROL_IN, MODERATOR], member(CAROL, "leave", by=BOB), None),
    ("an equal can't be kicked", ALL, [IN, CAROL_IN, levels(users={BOB: 50, CAROL: 50})], member(CAROL, "leave", by=BOB), "6.5.5"),
    # 6.6 ban
    ("a moderator bans", ALL, [IN, CAROL_IN, MODERATOR], member(CAROL, "ban", by=BOB), None),
    ("somebody who is not there is banned", ALL, [], member(CAROL, "ban", by=ALICE), None),
    ("a stranger can't ban", ALL, [MODERATOR], member(CAROL, "ban", by=BOB), "6.6.1"),
    ("banning takes power", ALL, [IN], member(CAROL, "ban", by=BOB), "6.6.3"),
    ("an equal can't be banned", ALL, [IN, levels(users={BOB: 50, CAROL: 50})], member(CAROL, "ban", by=BOB), "6.6.3"),
    ("nobody bans herself", ALL, [], member(ALICE, "ban"), "6.6.3"),
    ("a creator can't be banned", range(12, 13), [IN, levels(users={BOB: 2**53 - 1})], member(ALICE, "ban", by=BOB), "6.6.3"),
    ("before 12 a creator can be banned", OLD, [IN, levels(users={BOB: 100, ALICE: 99})], member(ALICE, "ban", by=BOB), None),
    # 6.7 knock
    ("one knocks", range(7, 13), [rule("knock")], KNOCKED, None),
    ("one knocks again", range(7, 13), [rule("knock"), KNOCKED], KNOCKED, None),
    ("one knocks where one was", range(7, 13), [rule("knock"), IN, member(BOB, "leave")], KNOCKED, None),
    ("knocking has a rule of its own", range(7, 13), [rule("invite")], KNOCKED, "6.7.1"),
    ("without a rule nobody knocks", range(7, 13), [], KNOCKED, "6.7.1"),
    ("knock_restricted lets knock", INTEGERS, [rule("knock_restricted")], KNOCKED, None),
    ("but not before 10", range(7, 10), [rule("knock_restricted")], KNOCKED, "6.7.1"),
    ("nobody knocks for another", range(7, 13), [rule("knock")], member(BOB, "knock", by=ALICE), "6.7.2"),
    ("a banned user can't knock", range(7, 13), [rule("knock"), BANNED], KNOCKED, "6.7.4"),
    ("an invited user need not knock", range(7, 13), [rule("knock"), INVITED], KNOCKED, "6.7.4"),
    ("a member need not knock", range(7, 13), [rule("knock"), IN], KNOCKED, "6.7.4"),
    # 7 to 10
    ("a member speaks", ALL, [IN], say(BOB), None),
    ("a stranger can't speak", ALL, [], say(BOB), "7"),
    ("who is invited can't speak", ALL, [INVITED], say(BOB), "7"),
    ("a banned user can't speak", ALL, [IN, BANNED], say(BOB), "7"),
    ("a member sends a third-party invite", ALL, [IN], third_party(BOB), None),
    ("which takes the invite level", ALL, [IN, levels(invite=1)], third_party(BOB), "8"),
    ("and no other", ALL, [IN, levels(state_default=100, events={"m.room.third_party_invite": 100})], third_party(BOB), None),
    ("state takes power", ALL, [IN], state(BOB), "9"),
    ("a moderator sets state", ALL, [IN, MODERATOR], state(BOB), None),
    ("a message may take power", ALL, [IN, levels(events_default=1)], say(BOB), "9"),
    ("a type may take power", ALL, [IN, levels(events={"m.room.message": 1})], say(BOB), "9"),
    ("another type does not", ALL, [IN, levels(events={"m.room.message": 1})], say(BOB, "m.sticker"), None),
    ("power may be given to all", ALL, [IN, levels(events_default=5, users_default=5)], say(BOB), None),
    ("power is compared as a number", STRINGY, [IN, levels(events_default="9", users={BOB: "10"})], say(BOB), None),
    ("creators may do everything", range(12, 13), [levels(events_default=2**53 - 1)], say(ALICE), None),
    ("a state key with a user ID is hers", ALL, [], state(ALICE, BOB), "10"),
    ("she may use it", ALL, [], state(ALICE, ALICE), None),
    ("any text with @ counts", ALL, [], state(ALICE, "@"), "10"),
    ("a redaction is an event as others", ALL, [IN, levels(redact=100)], say(BOB, "m.room.redaction"), None),
    ("which may take power", ALL, [IN, levels(events={"m.room.redaction": 1})], say(BOB, "m.room.redaction"), "9"),
    # 11. m.room.power_levels: the form
    ("levels may be empty", ALL, [], levels(), None),
    ("scalars are integers", INTEGERS, [], levels(ban="50"), "11.1"),
    ("scalars are there or not", INTEGERS, [], levels(users_default=None), "11.1"),
    ("before 10 they may be texts", STRINGY, [], levels(ban="50"), None),
    ("events holds integers", INTEGERS, [], levels(events={"a": "1"}), "11.2"),
    ("events is an object", INTEGERS, [], levels(events=[]), "11.2"),
    ("notifications holds integers", INTEGERS, [], levels(notifications={"room": True}), "11.2"),
    ("before 10 it may hold texts", STRINGY, [], levels(notifications={"room": "1"}, events={"a": "2"}), None),
    ("users is an object", ALL, [], levels(users=[]), "11.3"),
    ("users names users", ALL, [], levels(users={"bob": 1}), "11.3"),
    ("users names users of servers", ALL, [], levels(users={"@bob": 1}), "11.3"),
    ("users holds numbers", ALL, [], levels(users={BOB: "many"}), "11.3"),
    ("users holds integers", INTEGERS, [], levels(users={BOB: "5"}), "11.3"),
    ("before 10 it may hold texts", STRINGY, [], levels(users={BOB: " 5"}), None),
    ("creators have no level", range(12, 13), [], levels(users={ALICE: 100}), "11.4"),
    ("before 12 they have", OLD, [], levels(users={ALICE: 100}), None),
    # 11.6 to 11.10: the change. Bob is a moderator (50) who may send levels.
    *(
        row
        for name in ("users_default", "events_default", "state_default", "ban", "redact", "kick", "invite")
        for row in (
            (f"{name} is taken from above", ALL, [IN, levels(users={BOB: 50}, **{name: 51})], levels(BOB, users={BOB: 50}), "9" if name == "state_default" else "11.6.1"),
            (f"{name} is put above", ALL, [IN, MODERATOR], levels(BOB, users={BOB: 50}, **{name: 51}), "11.6.2"),
            (f"{name} is changed below", ALL, [IN, levels(users={BOB: 50}, **{name: 50})], levels(BOB, users={BOB: 50}, **{name: 40}), None),
            (f"{name} above stays", ALL, [IN, levels(users={BOB: 50}, events={"m.room.power_levels": 0}, **{name: 90})], levels(BOB, users={BOB: 50}, events={"m.room.power_levels": 0}, **{name: 90}), None),
        )
    ),
    ("an entry of events is taken from above", ALL, [IN, levels(users={BOB: 50}, events={"a": 51})], levels(BOB, users={BOB: 50}), "11.7.1"),
    ("an entry of events is put above", ALL, [IN, MODERATOR], levels(BOB, users={BOB: 50}, events={"a": 51}), "11.8.1"),
    ("an entry of events is changed below", ALL, [IN, levels(users={BOB: 50}, events={"a": 50, "b": 90})], levels(BOB, users={BOB: 50}, events={"a": 1, "b": 90}), None),
    ("notifications are guarded since 6", range(6, 13), [IN, MODERATOR], levels(BOB, users={BOB: 50}, notifications={"room": 51}), "11.8.1"),
    ("also when they are removed", range(6, 13), [IN, levels(users={BOB: 50}, notifications={"room": 51})], levels(BOB, users={BOB: 50}), "11.7.1"),
    ("not before", range(3, 6), [IN, MODERATOR], levels(BOB, users={BOB: 50}, notifications={"room": 51}), None),
    ("a user is lifted above", ALL, [IN, MODERATOR], levels(BOB, users={BOB: 50, CAROL: 51}), "11.10.1"),
    ("a user is lifted to one's own height", ALL, [IN, MODERATOR], levels(BOB, users={BOB: 50, CAROL: 50}), None),
    ("nobody lifts herself", ALL, [IN, MODERATOR], levels(BOB, users={BOB: 51}), "11.10.1"),
    ("one may step down", ALL, [IN, MODERATOR], levels(BOB, users={BOB: 10}), None),
    ("one may leave the list", ALL, [IN, MODERATOR], levels(BOB, users={}), None),
    ("an equal can't be put down", ALL, [IN, levels(users={BOB: 50, CAROL: 50})], levels(BOB, users={BOB: 50, CAROL: 40}), "11.9.1"),
    ("nor taken off the list", ALL, [IN, levels(users={BOB: 50, CAROL: 50})], levels(BOB, users={BOB: 50}), "11.9.1"),
    ("who stands lower can", ALL, [IN, levels(users={BOB: 50, CAROL: 49})], levels(BOB, users={BOB: 50}), None),
    ("who stands higher can't", ALL, [IN, levels(users={BOB: 50, CAROL: 51})], levels(BOB, users={BOB: 50, CAROL: 50}), "11.9.1"),
    ("another spelling is no change", STRINGY, [IN, levels(users={BOB: 50, CAROL: 90}, ban=60)], levels(BOB, users={BOB: "50", CAROL: "90"}, ban="60"), None),
    ("a creator may put levels anywhere", range(12, 13), [IN, levels(users={BOB: 2**53 - 1})], levels(users={BOB: 1}, ban=2**53 - 1), None),
    ("before 12 a creator is bound too", OLD, [levels(users={ALICE: 100})], levels(users={ALICE: 101}), "11.10.1"),
]  # fmt: skip


@pytest.mark.parametrize(("title", "versions", "setup", "draft", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_a_rule(title: str, versions: range, setup: list[Draft], draft: Draft, expected: str | None) -> None:
    for version in versions:
        room = room_of(version, setup)
        assert verdict(room, room.draw(*draft)) == expected, f"{title}, in version {version}"


def test_every_rule_has_an_event_that_passes_and_one_that_fails() -> None:
    refused = {row[4] for row in TABLE if row[4]}
    groups = {name.split(".")[0] for name in refused}
    assert groups == {"6", "7", "8", "9", "10", "11"}, "rules 1 to 5 are in test_auth_first_rules.py"
    passing = {row[3].type for row in TABLE if row[4] is None}
    assert {row[3].type for row in TABLE} <= passing | {"m.room.create"}, "each type of event passes somewhere"


# 6.2 and 6.3.1, 6.3.5: who comes first, and restricted joins


@pytest.mark.parametrize("version", ALL)
def test_the_creator_joins_first(version: int) -> None:
    room = DrawnRoom(str(version))
    room.state = {("m.room.create", ""): room.create}
    first = room.draw(*member(ALICE, "join"), prev=[room.create.id])
    assert verdict(room, first) is None, "right after the create event, the creator joins"
    assert verdict(room, room.draw(*member(BOB, "join"), prev=[room.create.id])) == "6.3.4", "nobody else does"
    later = room.draw(*member(ALICE, "join"), prev=["$" + "a" * 43])
    assert verdict(room, later) == "6.3.4", "nor does she later"
    both = room.draw(*member(ALICE, "join"), prev=[room.create.id, "$" + "a" * 43])
    assert verdict(room, both) == "6.3.4", "nothing else may come before"


@pytest.mark.parametrize(("version", "first"), [(10, BOB), (11, ALICE), (12, ALICE)])
def test_up_to_version_10_the_creator_is_who_is_named(version: int, first: str) -> None:
    room = DrawnRoom(str(version))
    content = {"room_version": str(version), "creator": BOB}
    room.create = room.draw("m.room.create", ALICE, content, "", prev=[], auth=[])
    room.room_id = room.create.room_id
    room.state = {("m.room.create", ""): room.create}
    for user in (ALICE, BOB):
        join = room.draw(*member(user, "join"), prev=[room.create.id])
        assert verdict(room, join) == (None if user == first else "6.3.4"), "one of them is the creator"


@pytest.mark.parametrize(
    ("version", "join_rule"),
    [(version, "restricted") for version in range(8, 13)] + [(version, "knock_restricted") for version in INTEGERS],
)
@pytest.mark.parametrize(
    ("setup", "voucher", "signed", "expected"),
    [
        ([CAROL_IN], CAROL, True, None),
        ([CAROL_IN], CAROL, False, "6.2.1"),
        ([CAROL_IN], 5, True, "6.2.1"),
        ([CAROL_IN], "carol", True, "6.2.1"),
        ([], CAROL, True, "6.3.5.2"),
        ([CAROL_IN, member(CAROL, "leave")], CAROL, True, "6.3.5.2"),
        ([CAROL_IN, levels(invite=1)], CAROL, True, "6.3.5.2"),
        ([CAROL_IN, levels(invite=1, users={CAROL: 1})], CAROL, True, None),
        ([CAROL_IN, INVITED], CAROL, False, "6.2.1"),
        ([CAROL_IN, BANNED], CAROL, True, "6.3.3"),
    ],
)
def test_a_restricted_join(
    version: int, join_rule: str, setup: list[Draft], voucher: Any, signed: bool, expected: str | None
) -> None:
    room = room_of(version, [rule(join_rule), *setup])
    join = room.draw(*member(BOB, "join", join_authorised_via_users_server=voucher))
    if signed:
        join = events.co_sign(join, "three.example", key_of("three.example"))
    assert verdict(room, join) == expected, f"a {join_rule} join"


def test_a_creator_may_vouch_whatever_inviting_takes() -> None:
    room = room_of(12, [rule("restricted"), levels(invite=100)])
    join = room.draw(*member(BOB, "join", join_authorised_via_users_server=ALICE))
    join = events.co_sign(join, "one.example", key_of("one.example"))
    assert verdict(room, join) is None, "creators stand above every level"


def test_a_leave_may_carry_an_old_voucher() -> None:
    room = room_of(12, [IN])
    assert verdict(room, room.draw(*member(BOB, "leave", join_authorised_via_users_server=CAROL))) is None, (
        "the signature is asked for where it means something"
    )


def test_a_flood_of_third_party_signatures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*what: Any) -> bool:
        asked.append(what)
        return False

    monkeypatch.setattr("relay.protocol.membership.verify_json", refuse)
    keys = [{"public_key": IDENTITY.verify_key_base64}] * 50
    signatures = {f"s{number}": {"ed25519:1": "AAAA"} for number in range(50)}
    room = room_of(12, [third_party(public_keys=keys)])
    claim = {"signed": {"mxid": BOB, "token": "token", "signatures": signatures}}
    assert verdict(room, room.draw(*member(BOB, "invite", by=ALICE, third_party_invite=claim))) == "6.4.1.8", "refused"
    assert len(asked) == 64, "no event costs more than a named number of verifications"
