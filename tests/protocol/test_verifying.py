"""Verifying each other in a room: apps send these events readable, and nothing that a person wrote comes along."""

from __future__ import annotations

from typing import Any

import pytest

from relay.errors import Refused
from relay.protocol.seal import VERIFYING, Seal
from relay.protocol.verifying import ASKED, CANCEL, IN_ROOMS, MESSAGE, REQUEST
from tests.protocol.test_seal import ALICE, CANARY, arrives

SEALS = (Seal("standard"), Seal("strict"))
BOB = "@bob:two.example"
KEY = "c29tZSBrZXk"
OF_REQUEST = {"m.relates_to": {"rel_type": "m.reference", "event_id": "$request"}}
ASKING = {"msgtype": REQUEST, "from_device": "DEV", "methods": ["m.sas.v1"], "to": BOB}
# As matrix-rust-sdk writes it, which Element uses.
ELEMENT_SAYS = (
    f"{ALICE} is requesting to verify your key, but your client does not support in-chat key verification. "
    "You will need to use legacy key verification to verify keys."
)
STEPS: dict[str, dict[str, Any]] = {
    "m.key.verification.ready": {"from_device": "DEV", "methods": ["m.sas.v1", "m.reciprocate.v1"]},
    "m.key.verification.start": {
        "from_device": "DEV",
        "method": "m.sas.v1",
        "key_agreement_protocols": ["curve25519-hkdf-sha256"],
        "hashes": ["sha256"],
        "message_authentication_codes": ["hkdf-hmac-sha256.v2"],
        "short_authentication_string": ["decimal", "emoji"],
    },
    "m.key.verification.accept": {
        "method": "m.sas.v1",
        "key_agreement_protocol": "curve25519-hkdf-sha256",
        "hash": "sha256",
        "message_authentication_code": "hkdf-hmac-sha256.v2",
        "short_authentication_string": ["emoji"],
        "commitment": KEY,
    },
    "m.key.verification.key": {"key": KEY},
    "m.key.verification.mac": {"mac": {"ed25519:DEV": KEY}, "keys": KEY},
    CANCEL: {"code": "m.user", "reason": "m.user"},
    "m.key.verification.done": {},
}


def test_each_step_has_its_example() -> None:
    assert set(STEPS) | {MESSAGE} == set(IN_ROOMS)


@pytest.mark.parametrize("type", STEPS)
def test_a_step_passes_as_it_is(type: str) -> None:
    content = {**STEPS[type], **OF_REQUEST}
    for seal in SEALS:
        assert seal.outgoing(type, None, {**content, "note": CANARY}) == content, (
            "what is beside it does not come along"
        )
        assert arrives(seal, type, content).decision == "keep"
        assert seal.rule(type, None, content) == VERIFYING and not seal.unlisted(type, content)
        for more in ({**content, "note": CANARY}, {**content, "m.relates_to": {"rel_type": CANARY, "event_id": "$a"}}):
            assert arrives(seal, type, more).decision == "stub", "other servers send it exactly so, or it is not shown"
            assert seal.rule(type, None, more) is None
        with pytest.raises(Refused):
            seal.outgoing(type, "", content)


def test_a_request_is_in_our_words() -> None:
    for seal in SEALS:
        asked = {**ASKING, "body": ASKED}
        assert seal.outgoing(MESSAGE, None, {**ASKING, "body": CANARY, "formatted_body": CANARY}) == asked
        assert arrives(seal, MESSAGE, asked).decision == "keep" and seal.rule(MESSAGE, None, asked) == VERIFYING


def test_of_requests_from_elsewhere_only_known_texts_are_kept() -> None:
    for seal in SEALS:
        for known in (ELEMENT_SAYS, ELEMENT_SAYS.replace(". You", ".  You")):
            assert arrives(seal, MESSAGE, {**ASKING, "body": known}).decision == "keep", "older apps set two spaces"
        for other in (CANARY, f"{CANARY} {ELEMENT_SAYS}", f"{ELEMENT_SAYS} {CANARY}", "", None, {"a": CANARY}):
            assert arrives(seal, MESSAGE, {**ASKING, "body": other}).decision == "stub", repr(other)


def test_the_reason_of_a_cancellation_is_its_code() -> None:
    for seal in SEALS:
        told = seal.outgoing(CANCEL, None, {**OF_REQUEST, "code": "m.timeout", "reason": CANARY})
        assert told == {**OF_REQUEST, "code": "m.timeout", "reason": "m.timeout"}
        known = {**OF_REQUEST, "code": "m.user", "reason": "The user cancelled the verification."}
        assert arrives(seal, CANCEL, known).decision == "keep"
        assert arrives(seal, CANCEL, {**known, "reason": CANARY}).decision == "stub"
        with pytest.raises(Refused, match="reason"):
            seal.outgoing(CANCEL, None, {**OF_REQUEST, "reason": CANARY})


@pytest.mark.parametrize("msgtype", ["m.text", None, 7, [REQUEST], f"{REQUEST}s"])
def test_other_messages_stay_refused(msgtype: Any) -> None:
    content = {**ASKING, "msgtype": msgtype, "body": ASKED}
    for seal in SEALS:
        with pytest.raises(Refused, match="carries only encrypted messages"):
            seal.outgoing(MESSAGE, None, content)
        assert arrives(seal, MESSAGE, content).decision == "stub" and seal.rule(MESSAGE, None, content) is None
