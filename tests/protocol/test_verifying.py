"""Verifying each other in a room: apps send these events readable, and nothing that a person wrote comes along."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import Refused
from relay.protocol.seal import VERIFYING, Seal
from relay.protocol.verifying import ASKED, CANCEL, IN_ROOMS, MAX_BASE64, MAX_NAMED, MESSAGE, REQUEST
from tests.protocol.test_seal import ALICE, CANARY, arrives

SEALS = (Seal("standard"), Seal("strict"))
BOB = "@bob:two.example"
KEY = "c29tZSBrZXk"
OF_REQUEST: dict[str, Any] = {"m.relates_to": {"rel_type": "m.reference", "event_id": "$" + "r" * 43}}
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
        for more in (
            {**content, "note": CANARY},
            {**content, "m.relates_to": {**OF_REQUEST["m.relates_to"], "rel_type": CANARY}},
        ):
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


# Without a blank, so that a shape that only looks for blanks lets them in.
SMUGGLED = (
    # Looks like a device's ID.
    "komm-heute-um-acht-hinter-die-Kirche",
    "今晚八点在教堂后面见",
    "https://evil.example/?q=1",
    "@komm\theute\nnacht:one.example",
    "$https://evil.example",
    f"@a\u00a0b:x.example {ELEMENT_SAYS.partition(' ')[2]}",
    ELEMENT_SAYS.replace(" ", "\t"),
    ELEMENT_SAYS.replace(" ", " " * 9),
    "A" * (MAX_BASE64 + 1),
)
# What may stand there: IDs, names and numbers without words, and the known texts.
HARMLESS = re.compile(
    r"[A-Za-z0-9._~+/=\-]{1,64}|[A-Za-z0-9+/=_\-]{1,128}|[a-z0-9_]{1,20}:[A-Za-z0-9._~+/=\-]{1,64}|@[\x21-\x7e]{1,254}"
)
KNOWN_TEXTS = {ASKED, ELEMENT_SAYS, "The user cancelled the verification.", "$" + "r" * 43}


def texts_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        assert len(value) <= MAX_NAMED
        return [text for pair in value.items() for part in pair for text in texts_in(part)]
    if isinstance(value, list):
        assert len(value) <= MAX_NAMED
        return [text for part in value for text in texts_in(part)]
    return [value] if isinstance(value, str) else []


GOOD: dict[str, dict[str, Any]] = {type: {**content, **OF_REQUEST} for type, content in STEPS.items()} | {
    MESSAGE: {**ASKING, "body": ELEMENT_SAYS}
}
KEYS = sorted({key for content in GOOD.values() for key in content} | {"secret", "next_method", "timestamp", "note"})
STRANGE = st.sampled_from(SMUGGLED) | st.text(max_size=80) | st.integers() | st.none()
WORDS = STRANGE | st.sampled_from(["DEV", "m.sas.v1", KEY, "The user cancelled the verification.", ELEMENT_SAYS, ASKED])
VALUES = (
    WORDS
    | st.lists(WORDS, max_size=3)
    | st.dictionaries(st.sampled_from(SMUGGLED) | st.sampled_from(["ed25519:DEV", "rel_type", "event_id"]), WORDS)
    | st.just(["a"] * (MAX_NAMED + 1))
    | st.just({f"ed25519:{n}": KEY for n in range(MAX_NAMED + 1)})
)


@given(st.sampled_from(sorted(GOOD)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_nothing_that_somebody_wrote_comes_along(type: str, changed: dict[str, Any]) -> None:
    content = {**GOOD[type], **changed}
    if type == MESSAGE:
        content["msgtype"] = REQUEST
    for seal in SEALS:
        passed = []
        if arrives(seal, type, content).decision == "keep":
            passed.append(content)
            assert seal.rule(type, None, content) == VERIFYING
        else:
            assert seal.rule(type, None, content) is None, "what is not kept is a finding"
        try:
            passed.append(seal.outgoing(type, None, content))
        except Refused:
            pass
        for kept in passed:
            for text in texts_in(kept):
                assert text in KNOWN_TEXTS or HARMLESS.fullmatch(text), text


@pytest.mark.parametrize("type", GOOD)
def test_no_key_lets_words_in(type: str) -> None:
    for key in KEYS:
        for smuggled in SMUGGLED[1:]:
            for value in (smuggled, ["m.sas.v1", smuggled], {smuggled: KEY}, {"ed25519:DEV": smuggled}):
                content = {**GOOD[type], key: value}
                assert arrives(SEALS[0], type, content).decision == "stub", f"{key}: {value}"
