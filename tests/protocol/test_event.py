"""Events: what is one and what is not, that an ID depends on nothing but what it should, building and co-signing."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import ids as identifiers
from relay.errors import BadEvent, BadJson, TooLarge
from relay.protocol import event as events
from relay.protocol.canonical import encode, from_base64
from relay.protocol.event import Event
from relay.protocol.redaction import redact
from relay.protocol.signing import SigningKey, sign_json, signature_of, verify_bytes
from relay.protocol.versions import VERSIONS
from tests.protocol.drawn_room import ALICE, BOB, DrawnRoom, key_of

ALL = list(VERSIONS)
ANY_TEXT = st.text(st.characters(), max_size=20)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)
GOOD_JSON = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.integers(-5, 5) | st.text(st.characters(codec="utf-8"), max_size=8),
    max_size=4,
)
FIELDS = (
    "type",
    "room_id",
    "sender",
    "state_key",
    "content",
    "depth",
    "origin_server_ts",
    "prev_events",
    "auth_events",
    "hashes",
    "signatures",
    "redacts",
    "unsigned",
)


def message(version: str = "12", **content: Any) -> Event:
    return DrawnRoom(version).draw("m.room.message", ALICE, content or {"body": "hello"})


def verified(event: Event, server: str) -> bool:
    key = key_of(server)
    signature = signature_of(event.pdu, server, key.key_id)
    return signature is not None and verify_bytes(events.signing_bytes(event), signature, key.verify_key)


@pytest.mark.parametrize("version", ALL)
def test_what_we_build_can_be_read_by_others(version: str) -> None:
    built = message(version)
    read = events.parse(built.pdu, VERSIONS[version])
    loaded = events.load(built.raw, built.id, VERSIONS[version])
    for other in (read, loaded):
        for field in Event.__slots__:
            if field != "_raw":
                assert getattr(other, field) == getattr(built, field), f"{field} is the same on the other side"
        assert other.raw == built.raw, "so is the stored form"
    assert events.hash_matches(read), "the content hash is right"
    assert verified(read, "one.example"), "the signature is right"
    assert (read.server, read.is_state, read.key, read.membership) == ("one.example", False, None, None), (
        "it is a message"
    )


@pytest.mark.parametrize("version", ALL)
def test_an_event_that_stays_in_memory_is_the_same_event(version: str) -> None:
    for event in (message(version), DrawnRoom(version).create, DrawnRoom(version).state["m.room.member", ALICE]):
        settled = events.parse(event.pdu, event.version).settle()
        for field in Event.__slots__:
            if field != "_pdu":
                assert getattr(settled, field) == getattr(event, field), f"{field} is the same"
        assert settled.pdu == event.pdu and events.hash_matches(settled) and verified(settled, "one.example")
        assert settled.settle().raw == event.raw, "settled twice it changes no more"
        assert events.redacted(settled).pdu == events.redacted(event).pdu
        other = events.load(event.raw, "".join(event.id), event.version).settle()
        assert other.room_id is settled.room_id and other.auth_events == settled.auth_events
        assert all(one is same for one, same in zip(other.auth_events, settled.auth_events, strict=True)), "one copy"


def test_of_shared_identifiers_only_so_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifiers, "_shared", {})
    monkeypatch.setattr(identifiers, "MAX_SHARED", 10)
    for number in range(95):
        assert identifiers.shared(f"@user{number}:one.example") == f"@user{number}:one.example"
    assert len(identifiers._shared) <= 10


@pytest.mark.parametrize("version", ALL)
def test_an_id_is_the_hash_in_the_letters_of_its_version(version: str) -> None:
    ids = [message(version, body=str(number)).id for number in range(40)]
    letters = string.ascii_letters + string.digits + ("+/" if version == "3" else "-_")
    assert all(len(name) == 44 and name[0] == "$" and set(name[1:]) <= set(letters) for name in ids), "not an event ID"
    assert len(set(ids)) == 40, "two events have one ID"


@pytest.mark.parametrize("version", ALL)
@given(unsigned=ANY_JSON, signatures=st.dictionaries(st.text(max_size=5), st.just({"ed25519:x": "AAAA"}), max_size=3))
@settings(max_examples=15)
def test_the_id_is_stable_under_redaction_unsigned_and_signatures(
    version: str, unsigned: Any, signatures: dict[str, Any]
) -> None:
    for event in (message(version), DrawnRoom(version).create, DrawnRoom(version).state["m.room.member", ALICE]):
        assert events.parse({**event.pdu, "unsigned": unsigned}, event.version).id == event.id, "unsigned is not in it"
        assert events.parse({**event.pdu, "signatures": signatures}, event.version).id == event.id, "nor are signatures"
        bare = events.redacted(event)
        assert bare.id == event.id, "a redacted event keeps its ID"
        assert events.parse(bare.pdu, event.version).id == event.id, "also when it is read afresh"
        assert verified(bare, "one.example"), "its signature still holds"
        assert events.redacted(bare).pdu == bare.pdu, "redacting twice changes nothing more"


@pytest.mark.parametrize("version", ALL)
@given(GOOD_JSON, GOOD_JSON)
@settings(max_examples=15)
def test_another_content_has_another_id(version: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    room = DrawnRoom(version)
    first, second = (room.draw("m.room.message", ALICE, content) for content in (one, two))
    assert (first.id == second.id) == (one == two), "the ID names the content"


def test_unsigned_is_never_kept() -> None:
    event = message()
    read = events.parse({**event.pdu, "unsigned": {"age": 1}}, event.version)
    assert "unsigned" not in read.pdu and read.raw == event.raw, "what peers put into unsigned is dropped"


@given(ANY_JSON, st.sampled_from(ALL))
def test_any_json_is_an_event_or_a_bad_event(value: Any, version: str) -> None:
    try:
        events.parse(value, VERSIONS[version])
    except BadEvent:
        pass


@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=4), st.sampled_from(ALL), st.booleans())
def test_an_event_with_any_json_in_any_field_is_an_event_or_a_bad_event(
    changes: dict[str, Any], version: str, member: bool
) -> None:
    room = DrawnRoom(version)
    event = room.state["m.room.member", ALICE] if member else room.create
    try:
        read = events.parse({**event.pdu, **changes}, VERSIONS[version])
    except BadEvent:
        return
    events.hash_matches(read)
    events.required_signers(read)
    events.redacted(read)
    assert isinstance(read.raw, bytes), "what was read can be stored"


def without(name: str) -> dict[str, Any]:
    return {field: value for field, value in message().pdu.items() if field != name}


@pytest.mark.parametrize(
    "name",
    [
        "type",
        "room_id",
        "sender",
        "content",
        "depth",
        "origin_server_ts",
        "prev_events",
        "auth_events",
        "hashes",
        "signatures",
    ],
)
def test_every_field_is_needed(name: str) -> None:
    with pytest.raises(BadEvent) as refusal:
        events.parse(without(name), VERSIONS["12"])
    assert refusal.value.rule == name, "the refusal names the field"


ID = "$" + "a" * 43


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"type": 1}, "type"),
        ({"type": "x" * 256}, "type"),
        ({"type": "é" * 128}, "type"),
        ({"sender": "alice"}, "sender"),
        ({"sender": "@alice"}, "sender"),
        ({"sender": "@alice:"}, "sender"),
        ({"sender": "@alice:one example"}, "sender"),
        ({"sender": "@" + "a" * 250 + ":one.example"}, "sender"),
        ({"room_id": "#room:one.example"}, "room_id"),
        ({"room_id": "!" + "r" * 255}, "room_id"),
        ({"state_key": None}, "state_key"),
        ({"state_key": 5}, "state_key"),
        ({"state_key": "s" * 256}, "state_key"),
        ({"content": []}, "content"),
        ({"content": None}, "content"),
        ({"depth": -1}, "depth"),
        ({"depth": 2**53}, "depth"),
        ({"depth": "1"}, "depth"),
        ({"depth": True}, "depth"),
        ({"depth": 1.0}, "depth"),
        ({"origin_server_ts": 2**63}, "origin_server_ts"),
        ({"origin_server_ts": "now"}, "origin_server_ts"),
        ({"prev_events": [ID] * 21}, "prev_events"),
        ({"prev_events": ["a"]}, "prev_events"),
        ({"prev_events": [[ID, {"sha256": ""}]]}, "prev_events"),
        ({"prev_events": {}}, "prev_events"),
        ({"auth_events": [ID] * 11}, "auth_events"),
        ({"auth_events": [None]}, "auth_events"),
        ({"hashes": {}}, "hashes"),
        ({"hashes": {"sha256": 1}}, "hashes"),
        ({"signatures": []}, "signatures"),
        ({"signatures": {"one.example": "abc"}}, "signatures"),
        ({"content": {"body": "x" * 65536}}, "size"),
        ({"content": {"a": 1.5}}, "canonical JSON"),
        ({"content": {"a": 2**53}}, "canonical JSON"),
        ({"content": {"a": "\ud800"}}, "canonical JSON"),
    ],
)
def test_what_is_no_event(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(BadEvent) as refusal:
        events.parse({**message().pdu, **change}, VERSIONS["12"])
    assert refusal.value.rule == rule, "the refusal names what is wrong"


@pytest.mark.parametrize(
    "change",
    [
        {"type": "é" * 127},
        {"state_key": "s" * 255},
        {"state_key": ""},
        {"sender": "@Ünusual name!:one.example:8448"},
        {"sender": "@a:[::1]"},
        {"depth": 2**53 - 1},
        {"depth": 0},
        {"prev_events": [ID] * 20, "auth_events": [ID] * 10},
        {"extra": {"key": 1}},
        {"content": {"body": "x" * 64000}},
    ],
)
def test_what_is_an_event(change: dict[str, Any]) -> None:
    assert events.parse({**message().pdu, **change}, VERSIONS["12"]), "it keeps to every limit"


def test_history_may_cite_more_events() -> None:
    pdu = {**message().pdu, "prev_events": [ID] * 100, "auth_events": [ID] * 100}
    read = events.parse(pdu, VERSIONS["12"], limits=False)
    assert len(read.prev_events) == len(read.auth_events) == 100, "backfill does not count them"


def test_the_size_limit_is_exact() -> None:
    room = DrawnRoom()
    spare = events.MAX_EVENT_BYTES - len(room.draw("m.room.message", ALICE, {"body": ""}).raw)
    largest = room.draw("m.room.message", ALICE, {"body": "x" * spare})
    assert len(largest.raw) == events.MAX_EVENT_BYTES, "an event may have 65536 bytes"
    assert events.parse({**largest.pdu, "unsigned": {"age": "x" * 500}}, largest.version), "without what is unsigned"
    with pytest.raises(TooLarge):
        room.draw("m.room.message", ALICE, {"body": "x" * (spare + 1)})


@pytest.mark.parametrize("version", ["3", "4", "5"])
def test_old_rooms_hold_numbers_that_new_ones_refuse(version: str) -> None:
    odd = {"half": 0.5, "large": 1e16, "huge": 2**70, "depths": [-(2**63)]}
    event = message(version, **odd)
    assert events.parse(event.pdu, event.version).id == event.id, "floats are hashed as everybody hashes them"
    assert events.parse({**event.pdu, "depth": 2**63 - 1}, event.version).depth == 2**63 - 1, "depth has 63 bits there"
    with pytest.raises(BadEvent):
        events.parse({**event.pdu, "depth": 2**63}, event.version)


@pytest.mark.parametrize("version", ["6", "10", "12"])
def test_we_do_not_build_what_others_would_drop(version: str) -> None:
    room = DrawnRoom(version)
    for content in ({"a": 0.5}, {"a": 2**53}, {"a": {"b": ["\ud800"]}}):
        with pytest.raises(BadJson):
            room.draw("m.room.message", ALICE, content)
    for type, state_key in (("x" * 256, None), ("x", "ü" * 128)):
        with pytest.raises(TooLarge):
            room.draw(type, ALICE, {}, state_key)


def test_the_room_of_version_12_is_named_after_its_create_event() -> None:
    create = DrawnRoom("12").create
    assert "room_id" not in create.pdu, "the create event can't contain its own hash"
    assert create.room_id == "!" + create.id[1:], "it gives the room its name"
    assert DrawnRoom("11").create.pdu["room_id"] == "!room:one.example", "older rooms have a name with a server"


@pytest.mark.parametrize("change", [{"state_key": "x"}, {"state_key": None}, {"type": "m.room.topic"}])
def test_only_the_create_event_proper_may_lack_a_room_id(change: dict[str, Any]) -> None:
    pdu = {name: value for name, value in {**DrawnRoom("12").create.pdu, **change}.items() if value is not None}
    with pytest.raises(BadEvent) as refusal:
        events.parse(pdu, VERSIONS["12"])
    assert refusal.value.rule == "room_id", "such an event belongs to no room"


@pytest.mark.parametrize("version", ALL)
def test_where_a_redaction_names_its_target(version: str) -> None:
    redaction = DrawnRoom(version).draw("m.room.redaction", ALICE, {"reason": "spam"}, redacts=ID)
    inside = int(version) >= 11
    assert redaction.redacts == ID, "the event knows its target"
    assert ("redacts" in redaction.content, "redacts" in redaction.pdu) == (inside, not inside), "by version"
    assert events.parse(redaction.pdu, redaction.version).id == redaction.id, "and its ID is right"
    assert events.redacted(redaction).redacts == (ID if inside else None), "redaction keeps only what is in content"


def test_a_tampered_content_is_noticed() -> None:
    event = message()
    tampered = events.parse({**event.pdu, "content": {"body": "bye"}}, event.version)
    assert tampered.id == event.id and verified(tampered, "one.example"), "ID and signature can't notice it"
    assert not events.hash_matches(tampered), "the content hash does"
    for claim in ("", "AAAA", "$$$"):
        odd = events.parse({**event.pdu, "hashes": {"sha256": claim}}, event.version)
        assert not events.hash_matches(odd), "no hash is no match"


def test_a_peers_template_becomes_our_event() -> None:
    version = VERSIONS["11"]
    how: dict[str, Any] = {
        "room_id": "!room:one.example",
        "type": "m.room.member",
        "sender": BOB,
        "content": {"membership": "join"},
        "state_key": BOB,
        "prev_events": [ID],
        "auth_events": [ID],
        "depth": 7,
        "origin_server_ts": 5,
    }
    template = events.template(version, **how)
    signed = events.sign({**template, "unsigned": {"x": 1}, "hashes": 5}, version, "two.example", key_of("two.example"))
    built = events.build(version, **how, server_name="two.example", key=key_of("two.example"))
    assert signed.pdu == built.pdu and signed.id == built.id, "signing a template is building the event"
    assert signed.membership == "join", "it is a join"


@pytest.mark.parametrize(
    "change", [{"content": 5}, {"type": None}, {"depth": "x"}, {"content": {"a": 0.5}}, {"x": "\ud800"}]
)
def test_a_bad_template_is_the_peers_fault(change: dict[str, Any]) -> None:
    good = {name: value for name, value in message().pdu.items() if name not in ("hashes", "signatures")}
    with pytest.raises(BadEvent):
        events.sign({**good, **change}, VERSIONS["12"], "one.example", key_of("one.example"))


def test_a_depth_without_end_is_capped() -> None:
    room = DrawnRoom()
    pdu = events.template(
        room.version,
        room_id=room.room_id,
        type="x",
        sender=ALICE,
        content={},
        prev_events=[],
        auth_events=[],
        depth=2**60,
        origin_server_ts=0,
    )
    assert pdu["depth"] == room.version.max_depth, "depth never overflows"


def test_an_invite_gets_a_second_signature() -> None:
    room = DrawnRoom()
    invite = room.draw("m.room.member", ALICE, {"membership": "invite"}, BOB)
    both = events.co_sign(invite, "two.example", key_of("two.example"))
    assert verified(both, "one.example") and verified(both, "two.example"), "both servers have signed"
    assert "two.example" not in invite.pdu["signatures"], "the event before is as it was"
    assert both.id == invite.id and events.hash_matches(both), "it is the same event"
    again = events.co_sign(both, "two.example", SigningKey.generate("other"))
    assert len(again.pdu["signatures"]["two.example"]) == 2, "a server keeps its other signatures"


@pytest.mark.parametrize(
    ("version", "type", "content", "signers"),
    [
        ("12", "m.room.message", {}, {"two.example"}),
        ("12", "m.room.member", {"membership": "invite"}, {"two.example"}),
        ("12", "m.room.member", {"membership": "invite", "third_party_invite": {"signed": {}}}, set()),
        ("12", "m.room.message", {"membership": "invite", "third_party_invite": {}}, {"two.example"}),
        ("12", "m.room.member", {"membership": "leave", "third_party_invite": {}}, {"two.example"}),
        (
            "8",
            "m.room.member",
            {"membership": "join", "join_authorised_via_users_server": ALICE},
            {"two.example", "one.example"},
        ),
        ("7", "m.room.member", {"membership": "join", "join_authorised_via_users_server": ALICE}, {"two.example"}),
        ("12", "m.room.member", {"membership": "join", "join_authorised_via_users_server": 5}, {"two.example"}),
    ],
)
def test_who_has_to_sign(version: str, type: str, content: dict[str, Any], signers: set[str]) -> None:
    event = DrawnRoom(version).draw(type, BOB, content, BOB)
    assert events.required_signers(event) == signers, "the wrong servers have to sign"


# Spec: appendices/#event-signing
@pytest.mark.parametrize(
    ("pdu", "content_hash", "signature"),
    [
        (
            {
                "room_id": "!x:domain",
                "sender": "@a:domain",
                "origin": "domain",
                "origin_server_ts": 1000000,
                "signatures": {},
                "hashes": {},
                "type": "X",
                "content": {},
                "prev_events": [],
                "auth_events": [],
                "depth": 3,
                "unsigned": {"age_ts": 1000000},
            },
            "5jM4wQpv6lnBo7CLIghJuHdW+s2CMBJPUOGOC89ncos",
            "KxwGjPSDEtvnFgU00fwFz+l6d2pJM6XBIaMEn81SXPTRl16AqLAYqfIReFGZlHi5KLjAWbOoMszkwsQma+lYAg",
        ),
        (
            {
                "content": {"body": "Here is the message content"},
                "event_id": "$0:domain",
                "origin": "domain",
                "origin_server_ts": 1000000,
                "type": "m.room.message",
                "room_id": "!r:domain",
                "sender": "@u:domain",
                "signatures": {},
                "unsigned": {"age_ts": 1000000},
            },
            "onLKD1bGljeBWQhWZ1kaP9SorVmRQNdN5aM2JYU2n/g",
            "Wm+VzmOUOz08Ds+0NTWb1d4CZrVsJSikkeRxh6aCcUwu6pNC78FunoD7KNWzqFn241eYHYMGCA5McEiVPdhzBA",
        ),
    ],
)
def test_the_published_vectors(pdu: dict[str, Any], content_hash: str, signature: str) -> None:
    key = SigningKey("ed25519:1", from_base64("YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1"))
    assert events.content_hash(pdu) == content_hash, "the standard's content hash differs"
    covered = redact({**pdu, "hashes": {"sha256": content_hash}}, VERSIONS["3"])
    signed = sign_json(covered, "domain", key)
    assert signed["signatures"]["domain"]["ed25519:1"] == signature, "the standard's signature differs"
    if "depth" in pdu:
        complete = {**pdu, "hashes": {"sha256": content_hash}, "signatures": signed["signatures"]}
        event = events.parse(complete, VERSIONS["3"])
        assert verify_bytes(events.signing_bytes(event), from_base64(signature), key.verify_key), "it verifies"
        assert encode(event.pdu) == event.raw, "and is stored canonically"
