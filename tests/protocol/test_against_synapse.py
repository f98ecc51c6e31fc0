"""Our rules against Synapse's own functions: IDs, hashes, signatures, redactions, and verdicts on generated rooms.

Where the two differ on purpose, the generators stay away, and `DIFFERENCES` says why.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import signedjson.key
import signedjson.sign
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import NotAllowed
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.auth import auth_keys, check, check_auth_events
from relay.protocol.canonical import from_base64
from relay.protocol.event import Event
from relay.protocol.redaction import redact
from relay.protocol.signing import SigningKey, sign_json
from relay.protocol.versions import VERSIONS
from tests.protocol.drawn_room import ALICE, BOB, CAROL, DAVE, Draft, DrawnRoom, key_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    reason = "the cross-check needs matrix-synapse (pip install matrix-synapse), which is not installed"
    synapse_auth = pytest.importorskip("synapse.event_auth", reason=reason)
    synapse_events = pytest.importorskip("synapse.events", reason=reason)
    synapse_utils = pytest.importorskip("synapse.events.utils", reason=reason)
    synapse_signing = pytest.importorskip("synapse.crypto.event_signing", reason=reason)
    SYNAPSE_VERSIONS = pytest.importorskip("synapse.api.room_versions", reason=reason).KNOWN_ROOM_VERSIONS

ALL = list(VERSIONS)

DIFFERENCES = """
- m.federate: Synapse also keeps members of other servers from being invited or kicked; the standard looks at the sender.
- Room versions 3 to 9: levels that are no numbers at all make Synapse fail (they count as absent here), and it reads
  true and false as 1 and 0.
- m.room.power_levels with a state key: Synapse compares it with the last of that key, the standard with the room's.
- A create event whose room_version is known, but not the one it is read by, is refused here.
- Fields that only old Synapses sent at the top (age_ts, outlier, destinations) are left out of its content hash.
"""


def to_synapse(event: Event, rejected: bool = False) -> Any:
    why = {"rejected_reason": "it was rejected"} if rejected else {}
    return synapse_events.make_event_from_dict(event.pdu, SYNAPSE_VERSIONS[event.version.name], **why)


# IDs, hashes, signatures, redactions

TYPES = (
    "m.room.member",
    "m.room.create",
    "m.room.join_rules",
    "m.room.power_levels",
    "m.room.history_visibility",
    "m.room.aliases",
    "m.room.redaction",
    "m.room.encrypted",
    "m.room.third_party_invite",
    "m.room.message",
)
KEYS = (
    *("membership", "join_authorised_via_users_server", "third_party_invite", "signed", "creator", "room_version"),
    *("join_rule", "allow", "users", "users_default", "events", "events_default", "state_default", "ban", "kick"),
    *("redact", "invite", "notifications", "aliases", "history_visibility", "redacts", "reason", "body", "displayname"),
    *("additional_creators", "m.federate", "predecessor", "algorithm", "ciphertext"),
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=3),
    max_leaves=8,
)
CONTENTS = st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUES, max_size=6)
TOP = st.dictionaries(st.sampled_from(("origin", "membership", "prev_state", "redacts", "unknown")), TEXT, max_size=3)


@pytest.mark.parametrize("version", ALL)
@given(st.sampled_from(TYPES), CONTENTS, st.none() | TEXT, TOP)
@settings(max_examples=60, deadline=None)
def test_the_same_id_hash_signature_and_redaction(
    version: str, type: str, content: dict[str, Any], state_key: str | None, top: dict[str, Any]
) -> None:
    our_version, their_version = VERSIONS[version], SYNAPSE_VERSIONS[version]
    template = events.template(
        our_version,
        room_id="!room:one.example",
        type=type,
        sender=ALICE,
        content=content,
        state_key="" if type == "m.room.create" else state_key,
        prev_events=["$" + "p" * 43],
        auth_events=["$" + "a" * 43],
        depth=5,
        origin_server_ts=1_700_000_000_000,
    )
    key = key_of("one.example")
    ours = events.sign({**template, **top}, our_version, "one.example", key)
    theirs = to_synapse(ours)
    assert theirs.event_id == ours.id, "the same event ID"
    assert theirs.room_id == ours.room_id, "the same room"

    _, digest = synapse_signing.compute_content_hash(theirs.get_pdu_json(), hashlib.sha256)
    assert digest == from_base64(events.content_hash(ours.pdu)), "the same content hash"
    assert events.hash_matches(ours), "which we find right"

    bare = synapse_utils.prune_event(theirs)
    left = {name: value for name, value in bare.get_pdu_json().items() if name != "unsigned"}
    assert left == redact(ours.pdu, our_version), "the same redaction"
    assert bare.event_id == events.redacted(ours).id == ours.id, "which keeps the ID"

    unsigned_yet = {name: value for name, value in ours.pdu.items() if name != "signatures"}
    their_key = signedjson.key.decode_signing_key_base64("ed25519", "test", key.dump().split()[2])
    signatures = synapse_signing.compute_event_signature(their_version, unsigned_yet, "one.example", their_key)
    assert signatures == ours.pdu["signatures"], "the same signature"


@pytest.mark.parametrize("version", ["3", "4", "5"])
@given(
    st.dictionaries(TEXT, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | VALUES, max_size=4),
    st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_old_rooms_with_any_numbers_have_the_same_content_hash(
    version: str, content: dict[str, Any], depth: int
) -> None:
    message = DrawnRoom(version).draw("m.room.message", ALICE, content)
    pdu = {**message.pdu, "depth": depth}
    _, digest = synapse_signing.compute_content_hash(pdu, hashlib.sha256)
    assert digest == from_base64(events.content_hash(pdu)), "the same content hash"


@given(st.dictionaries(TEXT, VALUES, max_size=4))
@settings(max_examples=50, deadline=None)
def test_signed_json_crosses_to_signedjson_and_back(obj: dict[str, Any]) -> None:
    key = key_of("one.example")
    ours = sign_json(obj, "one.example", key)
    verify_key = signedjson.key.decode_verify_key_base64("ed25519", "test", key.verify_key_base64)
    signedjson.sign.verify_signed_json(ours, "one.example", verify_key)
    their_key = signedjson.key.decode_signing_key_base64("ed25519", "test", key.dump().split()[2])
    assert signedjson.sign.sign_json(dict(obj), "one.example", their_key) == ours, "both sign alike"


# Verdicts


class Store:
    """The one question that Synapse's rule 3 asks of its database."""

    def __init__(self, known: Iterable[Any]) -> None:
        self.known = {event.event_id: event for event in known}

    async def get_events(self, event_ids: Iterable[str], **how: Any) -> dict[str, Any]:
        return {name: self.known[name] for name in event_ids}


def ours_on_state(event: Event, state: dict[tuple[str, str], Event], create: Event) -> str | None:
    try:
        check(event, state, create)
    except NotAllowed as no:
        return str(no)
    return None


def theirs_on_state(event: Event, state: dict[tuple[str, str], Event]) -> str | None:
    """Synapse's verdict on the state; that is where it asks for the voucher's signature too (in the format check)."""
    try:
        theirs = to_synapse(event)
        if event.type == "m.room.create":
            synapse_auth._check_create(theirs)
        synapse_auth.validate_event_for_room_version(theirs)
        synapse_auth.check_state_dependent_auth_rules(theirs, [to_synapse(known) for known in state.values()])
    except Exception as no:  # its refusals have several classes, and nonsense makes it stumble
        return repr(no)
    return None


IDENTITY = SigningKey("ed25519:identity", b"i" * 32)
USERS = (ALICE, BOB, CAROL, DAVE)
NUMBERS = (-1, 0, 1, 49, 50, 51, 99, 100, 101)


class Generator:
    """Events that could be, and some that could not, for a room that grows with those that are allowed."""

    def __init__(self, seed: int, version: str) -> None:
        self.dice = random.Random(f"{seed}/{version}")
        self.number = int(version)
        more: dict[str, Any] = {"additional_creators": [BOB]} if self.dice.random() < 0.3 else {}
        self.room = DrawnRoom(version, **more)
        self.room.add("m.room.join_rules", ALICE, {"join_rule": self.dice.choice(("public", "restricted"))}, "")
        for user in (BOB, CAROL):
            self.room.member(user, "invite", by=ALICE)
            self.room.member(user, "join")
        if self.dice.random() < 0.8:
            users = {CAROL: 100, DAVE: 50} if self.number == 12 else {ALICE: 100, BOB: 50, CAROL: 100}
            self.room.add("m.room.power_levels", ALICE, {"users": users}, "")

    def level(self) -> Any:
        number = self.dice.choice(NUMBERS)
        if self.dice.random() < 0.1:
            if self.number < 10:
                return self.dice.choice(
                    (str(number), f" +{abs(number)} ", *((number + 0.5,) if self.number < 6 else ()))
                )
            return self.dice.choice((str(number), None, {}, True))
        return number

    def levels(self) -> dict[str, Any]:
        dice = self.dice
        current = self.room.state.get(("m.room.power_levels", ""))
        content: dict[str, Any] = dict(current.content) if current and dice.random() < 0.8 else {}
        names = ("users_default", "events_default", "state_default", "ban", "redact", "kick", "invite")
        for _ in range(dice.randint(0, 2)):
            content[dice.choice(names)] = self.level()
        for group, entries in (
            ("users", (*USERS, "@nobody", "@x:a b")),
            ("events", ("m.room.message", "m.room.topic", "m.room.power_levels")),
            ("notifications", ("room", "else")),
        ):
            if dice.random() < 0.4:
                content[group] = dict(content.get(group, {}))
                content[group][dice.choice(entries)] = self.level()
            if dice.random() < 0.1 and content.get(group):
                content[group] = dict(content[group])
                content[group].pop(dice.choice(list(content[group])))
        if dice.random() < 0.1:
            content.pop(dice.choice(list(content) or ["x"]), None)
        return content

    def member(self) -> Draft:
        dice = self.dice
        sender = dice.choice(USERS)
        target = sender if dice.random() < 0.5 else dice.choice(USERS)
        membership = dice.choice(("join", "join", "join", "invite", "invite", "leave", "ban", "knock", "lurk"))
        content: dict[str, Any] = {"membership": membership}
        if membership == "join" and dice.random() < 0.3:
            content["join_authorised_via_users_server"] = dice.choice(USERS)
        if membership == "invite" and dice.random() < 0.4:
            claim = {"mxid": dice.choice((target, target, BOB)), "token": dice.choice(("token", "token", "other"))}
            key = IDENTITY if dice.random() < 0.8 else key_of("one.example")
            content["third_party_invite"] = {"signed": sign_json(claim, "id.example", key)}
        return Draft("m.room.member", sender, content, target)

    def draft(self) -> Draft:
        dice = self.dice
        sender = dice.choice(USERS)
        kind = dice.random()
        if kind < 0.45:
            return self.member()
        if kind < 0.65:
            return Draft("m.room.power_levels", sender, self.levels(), "")
        if kind < 0.75:
            rules = ("public", "public", "invite", "knock", "restricted", "knock_restricted", "private", "odd")
            return Draft("m.room.join_rules", sender, {"join_rule": dice.choice(rules)}, "")
        if kind < 0.79:
            offer, wrong = {"public_key": IDENTITY.verify_key_base64}, key_of("one.example").verify_key_base64
            content = dice.choice(
                (offer, {"public_keys": [offer]}, {**offer, "public_key": wrong, "public_keys": [offer]})
            )
            return Draft("m.room.third_party_invite", sender, content, "token")
        if kind < 0.82:
            return Draft("m.room.aliases", sender, {}, dice.choice((None, "one.example", "two.example", "")))
        if kind < 0.9:
            return Draft("m.room.topic", sender, {}, dice.choice(("", "", sender, *USERS, "@", "x")))
        return Draft(dice.choice(("m.room.message", "m.room.redaction")), sender, {})

    def event(self) -> Event:
        room, dice = self.room, self.dice
        prev = [room.create.id] if dice.random() < 0.05 else None
        event = room.draw(*self.draft(), prev=prev)
        authoriser = event.content.get("join_authorised_via_users_server")
        if authoriser is not None and dice.random() < 0.8:
            server = server_of(authoriser)
            event = events.co_sign(event, server, key_of(server))
        return event


@pytest.mark.parametrize("version", ALL)
def test_the_same_verdicts_on_growing_rooms(version: str) -> None:
    seen: Counter[tuple[str, bool]] = Counter()
    for seed in range(40):
        generator = Generator(seed, version)
        room = generator.room
        for _ in range(20):
            event = generator.event()
            ours = ours_on_state(event, room.state, room.create)
            theirs = theirs_on_state(event, room.state)
            assert (ours is None) == (theirs is None), (
                f"seed {seed}: {event} {event.content} to {event.state_key!r}: ours says {ours}, Synapse says {theirs}, "
                f"levels {room.state.get(('m.room.power_levels', '')) and room.state['m.room.power_levels', ''].content}"
            )
            seen[event.type, ours is None] += 1
            if ours is None:
                room.take(event)
    for type in ("m.room.member", "m.room.power_levels", "m.room.join_rules", "m.room.message", "m.room.topic"):
        assert seen[type, True] >= 5 and seen[type, False] >= 5, f"the rooms try {type} both ways: {seen}"


@pytest.mark.parametrize("version", ALL)
def test_the_same_verdicts_on_what_is_cited(version: str) -> None:
    seen: Counter[bool] = Counter()
    for seed in range(6):
        generator = Generator(1000 + seed, version)
        room, dice = generator.room, generator.dice
        elsewhere = DrawnRoom(version, creator=BOB)
        for _ in range(40):
            draft = generator.draft()
            wanted = auth_keys(draft.type, draft.sender, draft.state_key, draft.content, room.version)
            cited = [room.state[key] for key in wanted if key in room.state]
            fault = dice.random()
            if fault < 0.15 and cited:
                cited.append(dice.choice(cited))
            elif fault < 0.3:
                cited.append(dice.choice([known for known in room.all if known.is_state]))
            elif fault < 0.4 and cited:
                cited.remove(dice.choice(cited))
            elif fault < 0.5:
                cited.append(elsewhere.state["m.room.member", BOB])
            rejected = {dice.choice(cited).id} if cited and dice.random() < 0.1 else set()
            event = room.draw(*draft, auth=cited)
            ours = theirs = None
            try:
                check_auth_events(event, cited, rejected, room.create)
            except NotAllowed as no:
                ours = str(no)
            known = [to_synapse(old, old.id in rejected) for old in (*room.all, *elsewhere.all)]
            try:
                asyncio.run(synapse_auth.check_state_independent_auth_rules(Store(known), to_synapse(event)))
            except Exception as no:  # its refusals have several classes
                theirs = repr(no)
            assert (ours is None) == (theirs is None), f"seed {seed}: {event} ours says {ours}, Synapse says {theirs}"
            seen[ours is None] += 1
            if ours is None and ours_on_state(event, room.state, room.create) is None:
                room.take(event)
    assert seen[True] >= 30 and seen[False] >= 30, f"the rooms try it both ways: {seen}"


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"creator": None},
        {"creator": BOB},
        {"room_version": "unheard of"},
        {"additional_creators": [BOB]},
        {"additional_creators": ["bob"]},
        {"additional_creators": BOB},
        {"additional_creators": ["@" + "b" * 250 + ":two.example"]},
        {"m.federate": False},
    ],
)
def test_the_same_verdict_on_a_create_event(version: str, change: dict[str, Any]) -> None:
    room = DrawnRoom(version)
    content = {**room.create.content, **change}
    if change.get("creator", "") is None:
        del content["creator"]
    for sender in (ALICE, BOB):
        for prev in ([], [room.create.id]):
            create = room.draw("m.room.create", sender, content, "", prev=prev, auth=[])
            ours, theirs = ours_on_state(create, {}, create), theirs_on_state(create, {})
            assert (ours is None) == (theirs is None), f"{create.pdu}: ours says {ours}, Synapse says {theirs}"
