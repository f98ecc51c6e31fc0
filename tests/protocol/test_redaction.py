"""What redaction leaves, type by type and version by version."""

from __future__ import annotations

from typing import Any

import pytest

from relay.protocol.redaction import redact, redact_content
from relay.protocol.versions import VERSIONS

ALL = [int(name) for name in VERSIONS]
LEVELS = {"users": {"@a:b": 1}, "users_default": 1, "events": {"x": 1}, "events_default": 1, "state_default": 1}
MODERATION = {"ban": 1, "kick": 1, "redact": 1}
SIGNED = {"mxid": "@a:b", "token": "t", "signatures": {}}

# type, content, {what is kept: the versions that keep it}
TABLE: list[tuple[str, dict[str, Any], list[tuple[dict[str, Any], list[int]]]]] = [
    ("m.room.message", {"body": "x", "membership": "join", "users": {}}, []),
    ("m.room.encrypted", {"ciphertext": "x", "algorithm": "y"}, []),
    ("m.room.name", {"name": "x"}, []),
    (
        "m.room.member",
        {
            "membership": "join",
            "displayname": "x",
            "reason": "x",
            "join_authorised_via_users_server": "@a:b",
            "third_party_invite": {"signed": SIGNED, "display_name": "x"},
        },
        [
            ({"membership": "join"}, ALL),
            ({"join_authorised_via_users_server": "@a:b"}, [9, 10, 11, 12]),
            ({"third_party_invite": {"signed": SIGNED}}, [11, 12]),
        ],
    ),
    ("m.room.create", {"creator": "@a:b"}, [({"creator": "@a:b"}, ALL)]),
    ("m.room.create", {"room_version": "x", "m.federate": False, "else": 1}, [({"room_version": "x", "m.federate": False, "else": 1}, [11, 12])]),
    (
        "m.room.join_rules",
        {"join_rule": "restricted", "allow": [1], "else": 1},
        [({"join_rule": "restricted"}, ALL), ({"allow": [1]}, [8, 9, 10, 11, 12])],
    ),
    (
        "m.room.power_levels",
        {**LEVELS, **MODERATION, "invite": 1, "notifications": {"room": 1}, "else": 1},
        [({**LEVELS, **MODERATION}, ALL), ({"invite": 1}, [11, 12])],
    ),
    ("m.room.history_visibility", {"history_visibility": "joined", "else": 1}, [({"history_visibility": "joined"}, ALL)]),
    ("m.room.aliases", {"aliases": ["#a:b"], "else": 1}, [({"aliases": ["#a:b"]}, [3, 4, 5])]),
    ("m.room.redaction", {"redacts": "$a", "reason": "x"}, [({"redacts": "$a"}, [11, 12])]),
]  # fmt: skip


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize(("type", "content", "kept"), TABLE)
def test_what_is_left_of_a_content(
    version: int, type: str, content: dict[str, Any], kept: list[tuple[dict[str, Any], list[int]]]
) -> None:
    expected: dict[str, Any] = {}
    for part, versions in kept:
        if version in versions:
            expected |= part
    before = repr(content)
    assert redact_content(type, content, VERSIONS[str(version)]) == expected, f"redacting {type} in version {version}"
    assert repr(content) == before, "the event that is redacted is not changed"


@pytest.mark.parametrize("version", ALL)
def test_what_is_left_at_the_top(version: int) -> None:
    always = {
        "event_id": "$x",
        "type": "m.room.message",
        "room_id": "!a:b",
        "sender": "@a:b",
        "state_key": "",
        "hashes": {"sha256": ""},
        "signatures": {"b": {}},
        "depth": 1,
        "prev_events": ["$a"],
        "auth_events": ["$b"],
        "origin_server_ts": 5,
    }
    old = {"origin": "b", "prev_state": [], "membership": "join"}
    never = {"unsigned": {"age": 5}, "redacts": "$x", "age_ts": 4, "else": 1}
    left = redact({**always, **old, **never, "content": {"body": "x"}}, VERSIONS[str(version)])
    assert left == {**always, **(old if version <= 10 else {}), "content": {}}, "the wrong keys are left"


@pytest.mark.parametrize("third_party", ["text", [], None, 7])
def test_a_third_party_invite_without_form_goes(third_party: Any) -> None:
    content = {"membership": "invite", "third_party_invite": third_party}
    assert redact_content("m.room.member", content, VERSIONS["11"]) == {"membership": "invite"}, "nothing signed in it"
