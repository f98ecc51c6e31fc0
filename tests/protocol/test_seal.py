"""What a local client may send in clear, and what becomes of clear text from other servers. Media: test_readable."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import Refused
from relay.protocol.seal import OPTIONAL_EVENTS, ROOM_EVENTS, Incoming, Seal, is_emoji
from relay.protocol.shapes import REPLACED

CANARY = "the quick brown canary"
STANDARD = Seal("standard")
STRICT = Seal("strict")
OPEN = Seal("open")
REACTING = Seal("standard", ["m.reaction"])

ALICE = "@alice:example.org"
TEXT = base64.b64encode(bytes(range(200))).decode().rstrip("=")
ENCRYPTED = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": TEXT, "session_id": "abc", "device_id": "DEV"}
RELATION = {
    "rel_type": "m.thread",
    "event_id": "$root",
    "is_falling_back": True,
    "m.in_reply_to": {"event_id": "$before"},
}


@dataclass
class Foreign:
    """As much of an event as `incoming` looks at."""

    type: str
    content: dict[str, Any]
    state_key: str | None = None
    version: Any = field(default=None)

    @property
    def is_state(self) -> bool:
        return self.state_key is not None


def arrives(seal: Seal, type: str, content: dict[str, Any], state_key: str | None = None) -> Incoming:
    return seal.incoming(Foreign(type, content, state_key))  # type: ignore[arg-type]


# Each row: type, state key, what the client sends, what the relay builds.
PASSES: list[tuple[str, str | None, dict[str, Any], dict[str, Any]]] = [
    (
        "m.room.create",
        "",
        {"type": "m.space", "m.federate": False, "topic": CANARY},
        {"type": "m.space", "m.federate": False},
    ),
    (
        "m.room.create",
        "",
        {
            "room_version": "12",
            "additional_creators": [ALICE],
            "predecessor": {"room_id": "!old", "event_id": "$last", "note": CANARY},
        },
        {"room_version": "12", "additional_creators": [ALICE], "predecessor": {"room_id": "!old", "event_id": "$last"}},
    ),
    ("m.room.create", "", {"creator": ALICE, "room_version": "10"}, {"creator": ALICE, "room_version": "10"}),
    (
        "m.room.member",
        ALICE,
        {"membership": "join", "displayname": "Alice", "avatar_url": "mxc://a.org/b", "bio": CANARY},
        {"membership": "join", "displayname": "Alice", "avatar_url": "mxc://a.org/b"},
    ),
    ("m.room.member", ALICE, {"membership": "ban", "reason": CANARY}, {"membership": "ban"}),
    ("m.room.member", ALICE, {"membership": "invite", "is_direct": True}, {"membership": "invite", "is_direct": True}),
    (
        "m.room.member",
        ALICE,
        {
            "membership": "invite",
            "third_party_invite": {
                "display_name": CANARY,
                "signed": {"mxid": ALICE, "token": "t", "signatures": {"id.org": {"ed25519:0": "YWJj"}}, "x": CANARY},
            },
        },
        {
            "membership": "invite",
            "third_party_invite": {
                "signed": {"mxid": ALICE, "token": "t", "signatures": {"id.org": {"ed25519:0": "YWJj"}}}
            },
        },
    ),
    (
        "m.room.join_rules",
        "",
        {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": "!a:b", "why": CANARY}]},
        {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": "!a:b"}]},
    ),
    (
        "m.room.power_levels",
        "",
        {
            "ban": 50,
            "users": {ALICE: 100},
            "events": {"m.room.name": 50},
            "notifications": {"room": 20},
            "note": CANARY,
        },
        {"ban": 50, "users": {ALICE: 100}, "events": {"m.room.name": 50}, "notifications": {"room": 20}},
    ),
    ("m.room.power_levels", "", {"ban": "50"}, {"ban": "50"}),
    (
        "m.room.third_party_invite",
        "token",
        {"display_name": CANARY, "public_key": "YWJj", "key_validity_url": "https://id.org/x"},
        {"public_key": "YWJj", "key_validity_url": "https://id.org/x"},
    ),
    ("m.room.history_visibility", "", {"history_visibility": "joined", "x": CANARY}, {"history_visibility": "joined"}),
    ("m.room.guest_access", "", {"guest_access": "forbidden"}, {"guest_access": "forbidden"}),
    (
        "m.room.encryption",
        "",
        {"algorithm": "m.megolm.v1.aes-sha2", "io.element.msc4362.encrypt_state_events": True, "x": CANARY},
        {"algorithm": "m.megolm.v1.aes-sha2", "io.element.msc4362.encrypt_state_events": True},
    ),
    ("m.room.server_acl", "", {"allow": ["*"], "deny": ["*.evil.org"]}, {"allow": ["*"], "deny": ["*.evil.org"]}),
    (
        "m.room.tombstone",
        "",
        {"replacement_room": "!new", "body": CANARY},
        {"replacement_room": "!new", "body": REPLACED},
    ),
    (
        "m.room.policy",
        "",
        {"via": "p.org", "public_keys": {"ed25519": "YWJj"}},
        {"via": "p.org", "public_keys": {"ed25519": "YWJj"}},
    ),
    ("m.room.pinned_events", "", {"pinned": ["$a", "$b"]}, {"pinned": ["$a", "$b"]}),
    (
        "m.room.canonical_alias",
        "",
        {"alias": "#a:b", "alt_aliases": ["#c:d"]},
        {"alias": "#a:b", "alt_aliases": ["#c:d"]},
    ),
    (
        "m.space.child",
        "!room:a",
        {"via": ["a.org"], "order": "01 x", "note": CANARY},
        {"via": ["a.org"], "order": "01 x"},
    ),
    ("m.space.parent", "!room:a", {"via": ["a.org"], "canonical": True}, {"via": ["a.org"], "canonical": True}),
    (
        "m.policy.rule.user",
        "rule:1",
        {"entity": "@*:evil.org", "recommendation": "m.ban", "reason": CANARY},
        {"entity": "@*:evil.org", "recommendation": "m.ban"},
    ),
    (
        "org.matrix.mjolnir.rule.server",
        "rule:2",
        {"entity": "evil.org", "recommendation": "org.matrix.mjolnir.ban", "reason": CANARY},
        {"entity": "evil.org", "recommendation": "org.matrix.mjolnir.ban"},
    ),
    ("m.room.rule.room", "x", {"entity": "!a:b", "reason": CANARY}, {"entity": "!a:b"}),
    (
        "org.matrix.msc3401.call.member",
        "_@alice:example.org_DEV_m.call",
        {
            "application": "m.call",
            "call_id": "",
            "scope": "m.room",
            "device_id": "DEV",
            "expires": 14400000,
            "focus_active": {"type": "livekit", "focus_selection": "oldest_membership"},
            "foci_preferred": [
                {"type": "livekit", "livekit_service_url": "https://sfu.org/x", "livekit_alias": "!a:b"}
            ],
            "title": CANARY,
        },
        {
            "application": "m.call",
            "call_id": "",
            "scope": "m.room",
            "device_id": "DEV",
            "expires": 14400000,
            "focus_active": {"type": "livekit", "focus_selection": "oldest_membership"},
            "foci_preferred": [
                {"type": "livekit", "livekit_service_url": "https://sfu.org/x", "livekit_alias": "!a:b"}
            ],
        },
    ),
    ("m.room.redaction", None, {"redacts": "$target", "reason": CANARY}, {"redacts": "$target"}),
    ("m.room.name", "", {"name": "Studio", "x": CANARY}, {"name": "Studio"}),
    ("m.room.topic", "", {"topic": "Today"}, {"topic": "Today"}),
    (
        "m.room.avatar",
        "",
        {"url": "mxc://a.org/b", "info": {"w": 1, "body": CANARY}},
        {"url": "mxc://a.org/b", "info": {"w": 1}},
    ),
    ("m.room.encrypted", None, {**ENCRYPTED, "body": CANARY, "m.mentions": {"user_ids": [ALICE]}}, ENCRYPTED),
    ("m.room.encrypted", "m.room.name:", ENCRYPTED, ENCRYPTED),
    (
        "m.room.encrypted",
        None,
        {**ENCRYPTED, "m.relates_to": {**RELATION, "key": CANARY}},
        {**ENCRYPTED, "m.relates_to": RELATION},
    ),
]


@pytest.mark.parametrize(("type", "state_key", "sent", "built"), PASSES)
def test_only_listed_keys_reach_the_event(
    type: str, state_key: str | None, sent: dict[str, Any], built: dict[str, Any]
) -> None:
    assert STANDARD.outgoing(type, state_key, sent) == built, f"{type} keeps its listed keys and nothing else"
    assert STANDARD.rule(type, state_key, built) is not None, f"relay audit knows why {type} is on the disk"
    assert STANDARD.unlisted(type, built) == 0, "nothing stands beside the listed keys"
    assert (STANDARD.unlisted(type, sent) > 0) == (sent != built), "and what was left out is counted where it is kept"
    assert OPEN.outgoing(type, state_key, sent) == sent, "an open seal changes nothing"


REFUSED: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("m.room.message", None, {"msgtype": "m.text", "body": CANARY}, "Turn on encryption"),
    ("m.sticker", None, {"body": CANARY}, "Turn on encryption"),
    (
        "m.reaction",
        None,
        {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$a", "key": "👍"}},
        "privacy.allow",
    ),
    ("com.example.notes", "", {"text": CANARY}, "Send it encrypted"),
    ("im.vector.modular.widgets", "x", {"url": CANARY}, "Send it encrypted"),
    ("m.room.name", None, {"name": "x"}, "can only be sent as state"),
    ("m.room.name", "second", {"name": "x"}, "its state key must be empty"),
    ("m.room.redaction", "", {"redacts": "$a"}, "can only be sent as a message"),
    ("m.room.member", "not a user", {"membership": "join"}, "its state key must be a user ID"),
    ("m.room.member", ALICE, {"membership": CANARY}, "membership must be one of"),
    ("m.room.member", ALICE, {"membership": "join", "avatar_url": CANARY}, "avatar_url must be"),
    ("m.room.power_levels", "", {"users": {CANARY: 3}}, "users.* must be a user ID"),
    ("m.room.power_levels", "", {"events": {"m.room.name": 1.5}}, "whole number"),
    ("m.room.tombstone", "", {"replacement_room": CANARY}, "must be a room ID"),
    ("m.room.pinned_events", "", {"pinned": [CANARY]}, "must be an event ID"),
    ("m.room.encryption", "", {}, "known algorithm"),
    ("m.room.encryption", "", {"algorithm": "none"}, "known algorithm"),
    (
        "m.room.encrypted",
        None,
        {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": CANARY},
        "does not look like ciphertext",
    ),
    (
        "m.room.encrypted",
        None,
        {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": ""},
        "does not look like ciphertext",
    ),
    (
        "m.room.encrypted",
        None,
        {"algorithm": "x", "ciphertext": {"key": {"body": CANARY}}},
        "does not look like ciphertext",
    ),
    ("m.room.encrypted", None, {"ciphertext": TEXT}, "does not look like ciphertext"),
    ("m.room.encrypted", None, {**ENCRYPTED, "device_id": CANARY}, "device_id must be"),
    ("m.room.encrypted", None, {**ENCRYPTED, "m.relates_to": {"event_id": CANARY}}, "m.relates_to.event_id must be"),
    ("m.room.encrypted", CANARY, ENCRYPTED, "its state key must be"),
]


@pytest.mark.parametrize(("type", "state_key", "sent", "says"), REFUSED)
def test_a_refusal_says_what_to_do(type: str, state_key: str | None, sent: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused) as refused:
        STANDARD.outgoing(type, state_key, sent)
    assert says in refused.value.text, f"{type}: {refused.value.text}"
    assert CANARY not in refused.value.text, "a refusal does not repeat the message"
    assert refused.value.status in (400, 403), "malformed or forbidden, nothing else"
    assert OPEN.outgoing(type, state_key, sent) == sent, "an open seal lets it pass"


def test_strict_has_no_readable_room_profile() -> None:
    for type in ("m.room.name", "m.room.topic", "m.room.avatar"):
        assert STRICT.leaves_out(type), f"createRoom leaves {type} out at strict"
        assert not STANDARD.leaves_out(type) and not OPEN.leaves_out(type), f"and keeps {type} elsewhere"
        with pytest.raises(Refused, match="must not be readable"):
            STRICT.outgoing(type, "", {})
    assert not STRICT.leaves_out("m.room.member"), "routing state is no room profile"
    assert not STRICT.leaves_out("m.room.message"), "a message is refused, not left out"
    member = {"membership": "join", "displayname": "Alice"}
    assert STRICT.outgoing("m.room.member", ALICE, member) == member, "people still have names"


@pytest.mark.parametrize("emoji", ["👍", "❤️", "👩‍❤️‍💋‍👨", "👋🏽", "🇩🇪", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "✅", "🏳️‍🌈", "😂"])
def test_a_reaction_is_one_emoji_and_its_target(emoji: str) -> None:
    assert is_emoji(emoji), f"{emoji} is one emoji"
    relation = {"rel_type": "m.annotation", "event_id": "$a", "key": emoji}
    sent = {"m.relates_to": {**relation, "x": CANARY}, "shortcode": CANARY}
    assert REACTING.outgoing("m.reaction", None, sent) == {"m.relates_to": relation}, "nothing else comes along"


@pytest.mark.parametrize("text", ["", "yes", "a", "1", "👍👍", "👍 ok", ":smile:", "mxc://a.org/b", "x" * 999, "‍"])
def test_a_reaction_is_no_text(text: str) -> None:
    assert not is_emoji(text), f"{text!r} is not one emoji"
    relation = {"rel_type": "m.annotation", "event_id": "$a", "key": text}
    with pytest.raises(Refused):
        REACTING.outgoing("m.reaction", None, {"m.relates_to": relation})
    assert arrives(REACTING, "m.reaction", {"m.relates_to": relation}).decision == "stub", "nor from elsewhere"


def test_a_reaction_without_a_target_is_refused() -> None:
    for content in ({}, {"m.relates_to": {"rel_type": "m.annotation", "key": "👍"}}):
        with pytest.raises(Refused):
            REACTING.outgoing("m.reaction", None, content)


def test_the_config_cannot_allow_what_has_no_shape() -> None:
    with pytest.raises(ValueError, match=r"m\.room\.message"):
        Seal("standard", ["m.room.message"])
    with pytest.raises(ValueError, match="strict, standard and open"):
        Seal("loose")  # type: ignore[arg-type]


# ---- From other servers


@pytest.mark.parametrize(
    ("type", "state_key", "content", "standard", "strict"),
    [
        ("m.room.member", ALICE, {"membership": "leave", "reason": CANARY}, "keep", "keep"),
        ("m.room.tombstone", "", {"body": CANARY}, "keep", "keep"),
        ("m.policy.rule.user", "a b", {"reason": CANARY}, "keep", "keep"),
        ("m.room.name", "", {"name": CANARY}, "keep", "redact"),
        ("m.room.topic", "", {"topic": CANARY}, "keep", "redact"),
        ("com.example.notes", "", {"text": CANARY}, "redact", "redact"),
        ("com.example.notes", "", {}, "keep", "keep"),
        ("m.room.message", None, {"body": CANARY}, "stub", "stub"),
        ("m.room.message", None, {}, "stub", "stub"),
        ("m.room.name", None, {"name": CANARY}, "stub", "stub"),
        ("m.room.encrypted", None, ENCRYPTED, "keep", "keep"),
        ("m.room.encrypted", None, {**ENCRYPTED, "extra": CANARY}, "keep", "keep"),
        ("m.room.encrypted", None, {}, "keep", "keep"),
        ("m.room.encrypted", None, {"algorithm": "a", "ciphertext": CANARY}, "stub", "stub"),
        ("m.room.encrypted", None, {"body": CANARY}, "stub", "stub"),
        ("m.room.encrypted", "m.room.name:", {"body": CANARY}, "redact", "redact"),
        ("m.room.encrypted", "m.room.name:", ENCRYPTED, "keep", "keep"),
        ("m.room.redaction", None, {"redacts": "$a"}, "keep", "keep"),
        ("m.room.redaction", None, {}, "keep", "keep"),
        ("m.room.redaction", None, {"redacts": "$a", "reason": CANARY}, "redact", "redact"),
        (
            "m.reaction",
            None,
            {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$a", "key": "👍"}},
            "stub",
            "stub",
        ),
    ],
)
def test_foreign_clear_text_is_kept_only_redacted(
    type: str, state_key: str | None, content: dict[str, Any], standard: str, strict: str
) -> None:
    assert arrives(STANDARD, type, content, state_key).decision == standard, f"{type} at standard"
    assert arrives(STRICT, type, content, state_key).decision == strict, f"{type} at strict"
    assert arrives(OPEN, type, content, state_key).decision == "keep", "an open seal keeps all"
    if standard == "keep":
        assert STANDARD.rule(type, state_key, content) is not None, "what is kept has a rule for the audit"
    elif content:
        assert STANDARD.rule(type, state_key, content) is None, "on the disk in clear it would be a finding"


def test_an_allowed_reaction_from_elsewhere_is_kept() -> None:
    content = {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$a", "key": "👍"}}
    assert arrives(REACTING, "m.reaction", content).decision == "keep", "one emoji and its target"
    assert arrives(REACTING, "m.reaction", {**content, "shortcode": CANARY}).decision == "stub", "nothing beside it"


def test_the_audit_accepts_redacted_forms() -> None:
    assert STANDARD.rule("m.room.message", None, {}) == "redacted form", "an empty content says nothing"
    assert STANDARD.rule("m.room.power_levels", None, {"ban": 50}) == "redacted form", "what a redaction keeps"
    assert STANDARD.rule("m.room.aliases", "a.org", {"aliases": ["#a:a.org"]}) == "redacted form", "in old versions"
    assert STANDARD.rule("m.room.message", None, {"body": CANARY}) is None, "clear text is a finding"
    assert OPEN.rule("m.room.message", None, {"body": CANARY}) == "the seal is open", "unless the seal is open"
    assert OPEN.rule("m.room.encrypted", None, ENCRYPTED) == "ciphertext", "the best rule is named first"
    assert STANDARD.unlisted("m.room.encrypted", {**ENCRYPTED, "a": 1, "m.relates_to": {**RELATION, "b": 2}}) == 2


# ---- Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
WORDS = [key for _, _, sent, _ in PASSES for key in sent] + ["x", "body"]
CONTENT = st.dictionaries(st.sampled_from(WORDS), JSON | st.just(CANARY), max_size=6)
TYPES = st.sampled_from([*ROOM_EVENTS, *OPTIONAL_EVENTS, "m.room.encrypted", "m.room.message"])
STATE_KEYS = st.sampled_from([None, "", ALICE, "!a:b", CANARY])
# The only places where a person's words may stand: the room's and the people's profiles.
FREE_TEXT = {"name", "topic", "displayname", "m.topic"}


@given(st.sampled_from(PASSES), st.text(min_size=1, max_size=10), st.lists(st.integers(0, 5), max_size=4))
def test_a_canary_under_an_unlisted_key_never_comes_out(
    case: tuple[str, str | None, dict[str, Any], dict[str, Any]], key: str, path: list[int]
) -> None:
    type, state_key, sent, _ = case
    planted = json.loads(json.dumps(sent))
    at = planted
    for step in path:
        inner = [v for v in (at.values() if isinstance(at, dict) else at) if isinstance(v, dict | list)]
        if not inner:
            break
        at = inner[step % len(inner)]
    if isinstance(at, dict):
        at.setdefault("sealed." + key, CANARY)
    else:
        at.append(CANARY)
    for seal in (STRICT, STANDARD, REACTING):
        try:
            built = seal.outgoing(type, state_key, planted)
        except Refused as refused:
            assert CANARY not in refused.text, "a refusal does not repeat the message"
        else:
            assert CANARY not in json.dumps(built, ensure_ascii=False), f"{type} carries the canary"


@given(TYPES, STATE_KEYS, CONTENT)
def test_whatever_is_sent_a_canary_stays_out(type: str, state_key: str | None, content: dict[str, Any]) -> None:
    for seal in (STRICT, STANDARD, REACTING):
        try:
            built = seal.outgoing(type, state_key, content)
        except Refused as refused:
            assert CANARY not in refused.text, "a refusal does not repeat the message"
            continue
        readable_text = {key: value for key, value in built.items() if key not in FREE_TEXT}
        assert CANARY not in json.dumps(readable_text, ensure_ascii=False), f"{type} carries the canary"
        assert seal.outgoing(type, state_key, built) == built, "what was built once is built the same again"
        assert seal.rule(type, state_key, built) is not None, "and the audit knows its rule"


@given(TYPES | st.text(max_size=10), STATE_KEYS, CONTENT | st.dictionaries(st.text(), JSON))
def test_any_foreign_event_gets_an_answer(type: str, state_key: str | None, content: dict[str, Any]) -> None:
    for seal in (STRICT, STANDARD, REACTING, OPEN):
        incoming = arrives(seal, type, content, state_key)
        assert incoming.decision in ("keep", "redact", "stub"), "a decision"
        if incoming.decision == "keep":
            assert seal.rule(type, state_key, content) is not None, "what is kept has a rule"
        assert seal.unlisted(type, content) >= 0, "the audit can count it"
