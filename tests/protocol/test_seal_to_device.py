"""To-device messages under the seal: each type keeps its listed keys; keys, secrets and texts in clear are refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import Refused
from relay.protocol.seal import TO_DEVICE, Seal

CANARY = "the quick brown canary"
STANDARD = Seal("standard")
OPEN = Seal("open")
TEXT = base64.b64encode(bytes(range(200))).decode().rstrip("=")

OLM = {
    "algorithm": "m.olm.v1.curve25519-aes-sha2",
    "sender_key": "YWJj",
    "ciphertext": {"YWJj": {"type": 0, "body": TEXT}},
}


@pytest.mark.parametrize(
    ("type", "sent", "built"),
    [
        ("m.room.encrypted", {**OLM, "org.matrix.msgid": CANARY}, OLM),
        ("m.dummy", {"note": CANARY}, {}),
        (
            "m.room_key_request",
            {
                "action": "request",
                "requesting_device_id": "D",
                "request_id": "1",
                "body": {"algorithm": "m.megolm.v1.aes-sha2", "room_id": "!a:b", "session_id": "s", "x": CANARY},
            },
            {
                "action": "request",
                "requesting_device_id": "D",
                "request_id": "1",
                "body": {"algorithm": "m.megolm.v1.aes-sha2", "room_id": "!a:b", "session_id": "s"},
            },
        ),
        (
            "m.secret.request",
            {"action": "request", "name": "m.cross_signing.master", "requesting_device_id": "D", "request_id": "1"},
            {"action": "request", "name": "m.cross_signing.master", "requesting_device_id": "D", "request_id": "1"},
        ),
        (
            "m.room_key.withheld",
            {"algorithm": "a", "code": "m.unverified", "sender_key": "YWJj", "reason": CANARY},
            {"algorithm": "a", "code": "m.unverified", "sender_key": "YWJj", "reason": "m.unverified"},
        ),
        (
            "m.key.verification.cancel",
            {"transaction_id": "t", "code": "m.user", "reason": CANARY},
            {"transaction_id": "t", "code": "m.user", "reason": "m.user"},
        ),
        ("m.key.verification.done", {"transaction_id": "t"}, {"transaction_id": "t"}),
        (
            "m.key.verification.start",
            {"from_device": "D", "transaction_id": "t", "method": "m.sas.v1", "hashes": ["sha256"], "x": CANARY},
            {"from_device": "D", "transaction_id": "t", "method": "m.sas.v1", "hashes": ["sha256"]},
        ),
        (
            "m.key.verification.mac",
            {"mac": {"ed25519:D": "YWJj"}, "keys": "YWJj"},
            {"mac": {"ed25519:D": "YWJj"}, "keys": "YWJj"},
        ),
    ],
)
def test_a_device_gets_what_is_listed(type: str, sent: dict[str, Any], built: dict[str, Any]) -> None:
    assert STANDARD.to_device(type, sent) == built, f"{type} keeps its listed keys"
    assert OPEN.to_device(type, sent) == sent, "an open seal changes nothing"


@pytest.mark.parametrize(
    ("type", "content"),
    [
        ("m.room_key", {"session_key": CANARY}),
        ("m.forwarded_room_key", {"session_key": CANARY}),
        ("m.secret.send", {"secret": CANARY}),
        ("com.example.chat", {"body": CANARY}),
        ("m.room.encrypted", {"algorithm": "a", "ciphertext": {"YWJj": {"type": 0, "body": CANARY}}}),
        ("m.room.encrypted", {"algorithm": "a", "ciphertext": {CANARY: {"type": 0, "body": TEXT}}}),
        ("m.room.encrypted", {"ciphertext": TEXT}),
        ("m.room_key_request", {"action": CANARY}),
        ("m.key.verification.key", {"key": CANARY}),
        ("m.key.verification.cancel", {"code": CANARY}),
    ],
)
def test_a_key_or_a_text_in_clear_reaches_no_device(type: str, content: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        STANDARD.to_device(type, content)
    assert CANARY not in refused.value.text, "a refusal does not repeat the message"


WORDS = [
    "algorithm",
    "ciphertext",
    "sender_key",
    "code",
    "reason",
    "action",
    "body",
    "transaction_id",
    "methods",
    "key",
]
JSON = st.recursive(
    st.just(CANARY) | st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*TO_DEVICE, "m.room_key", "x"]), st.dictionaries(st.sampled_from(WORDS) | st.text(), JSON))
def test_any_to_device_message_gets_an_answer(type: str, content: dict[str, Any]) -> None:
    try:
        built = STANDARD.to_device(type, content)
    except Refused as refused:
        assert CANARY not in refused.text, "a refusal does not repeat the message"
    else:
        assert CANARY not in json.dumps(built, ensure_ascii=False), "no text reaches a device in clear"
