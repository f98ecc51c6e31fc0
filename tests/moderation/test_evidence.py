"""Checks V2 to V5 over what is held of an event, and the form in which a proof may come: pure rules."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ApiError
from relay.moderation import disclosure_form as form
from relay.moderation import evidence
from relay.moderation.disclosure_form import Item
from relay.moderation.evidence import Held
from relay.moderation.megolm import ALGORITHM, Unproven
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS

KEY = SigningKey.generate("ed25519:a")
CONTENT = {"algorithm": ALGORITHM, "ciphertext": "AAAA", "session_id": "s"}
# An own copy of a purged event keeps these, whichever of them a room version's redaction would drop.
ODD_KEYS = {"x": {"any": "thing"}, "origin": "one", "membership": "join"}


def sent(
    version: str = "11", content: dict[str, Any] | None = None, type: str = "m.room.encrypted", **more: Any
) -> Event:
    pdu = {
        "room_id": "!room:one", "type": type, "sender": "@alice:one", "content": content or CONTENT, "depth": 5,
        "prev_events": ["$" + "a" * 43], "auth_events": ["$" + "b" * 43], "origin_server_ts": 1, **more,
    }  # fmt: skip
    return events.sign(pdu, VERSIONS[version], "one", KEY)


def held(event: Event, *, gone: bool = False, whole: bool = True) -> Held:
    return Held(events.emptied(event) if gone else event, gone, whole, True)


def judged(held: Held, event_id: str, content: dict[str, Any] | None = None, signature: bool | None = True) -> Event:
    evidence.require_encrypted(held)
    return evidence.judge_origin(held, event_id, evidence.rebuilt(held, content), signature)


def fails(*args: Any, **more: Any) -> Unproven:
    with pytest.raises(Unproven) as caught:
        judged(*args, **more)
    return caught.value


def test_v2_wants_an_encrypted_message() -> None:
    event = sent()
    assert judged(held(event), event.id) is not None
    for other in (
        sent(type="m.room.message"),
        sent(content={"algorithm": "x", "ciphertext": "AAAA"}),
        sent(state_key=""),
    ):
        assert fails(held(other), other.id).step == "V2"


@pytest.mark.parametrize("version", ["3", "6", "10", "11", "12"])
@pytest.mark.parametrize("odd", [{}, *({key: value} for key, value in ODD_KEYS.items()), ODD_KEYS], ids=str)
def test_v3_a_purged_event_is_proved_by_the_content_that_was_sent(version: str, odd: dict[str, Any]) -> None:
    event = sent(version, **odd)
    stub = held(event, gone=True)
    assert stub.event.content == {} and all(key in stub.event.pdu for key in odd), (
        "our copy lost its content and nothing else"
    )
    assert judged(stub, event.id, CONTENT).content == CONTENT
    for other in ({**CONTENT, "ciphertext": "AAAB"}, {**CONTENT, "more": 1}, {}):
        assert (fails(stub, event.id, other).step, fails(stub, event.id, other).result) == ("V3", "invalid")
    lacking = fails(stub, event.id)
    assert (lacking.result, lacking.flag) == ("undisclosed", "content_needed"), (
        "without content there is nothing to judge"
    )


def test_v3_a_stub_that_lost_more_than_its_content_is_for_a_person() -> None:
    event = sent(x="a key of the sender's server")
    bare = Held(events.redacted(event), True, False, False)
    found = fails(bare, event.id, CONTENT)
    assert (found.step, found.result, found.flag) == ("V3", "needs_human", "keys_missing")
    assert fails(bare, event.id, CONTENT, signature=False).result == "invalid", "but only while the signature holds"
    assert fails(replace(bare, kept_whole=True), event.id, CONTENT).result == "invalid"


def test_content_that_is_held_counts_and_not_what_the_reporter_says() -> None:
    event = sent()
    assert judged(held(event), event.id, {"algorithm": ALGORITHM, "ciphertext": "forged"}).content == CONTENT


def test_v3_notices_a_row_that_was_changed() -> None:
    event = sent()
    changed = replace(
        held(event), event=Event({**event.pdu, "content": {**CONTENT, "ciphertext": "B"}}, event.id, event.version)
    )
    assert fails(changed, event.id).step == "V3"


def test_v4_wants_the_event_of_that_id() -> None:
    event, other = sent(), sent(depth=6)
    assert judged(held(event), event.id).id == event.id
    assert fails(held(other), event.id).step == "V4", "another event in its place"
    someone_else = Event({**event.pdu, "sender": "@bob:one"}, event.id, event.version)
    # The content hash covers the sender too; with a purged event and a new hash only the ID is left to tell.
    forged = events.sign(
        {k: v for k, v in someone_else.pdu.items() if k not in ("hashes", "signatures")}, event.version, "one", KEY
    )
    assert fails(replace(held(event), event=Event(forged.pdu, event.id, event.version)), event.id).step == "V4"


def test_v5_wants_the_signature_of_the_senders_server() -> None:
    event = sent()
    assert judged(held(event), event.id, signature=True) is not None
    assert (
        fails(held(event), event.id, signature=False).step,
        fails(held(event), event.id, signature=False).result,
    ) == ("V5", "invalid")
    unknown = fails(held(event), event.id, signature=None)
    assert (unknown.step, unknown.result) == ("V5", "needs_human"), "nobody is asked for a key"


# --- what the reporter hands over ----------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "v": 1, "alg": ALGORITHM, "category": "threat", "good_faith": True,
    "items": [{"event_id": "$" + "e" * 43, "index": 37, "prk": "A" * 43}],
}  # fmt: skip


def test_a_code_is_read_back_as_it_was_made() -> None:
    items = (Item("$" + "e" * 43, 37, bytes(range(32))), Item("$" + "f" * 43, 0, bytes(32), {"ciphertext": "ü"}))
    code = form.code_of(items)
    wrapped = "\n".join(code[at : at + 40] for at in range(0, len(code), 40))
    assert form.parse_code(f"  {wrapped}\n", category="spam", good_faith=True).items == items
    assert form.parse_disclosure({**GOOD, "items": [form.item_json(one) for one in items]}).items == items
    assert "\\x00" not in repr(items[1]), "a key does not show itself by accident"


BAD: dict[str, Any] = {
    "a list": [],
    "another version": {**GOOD, "v": 2},
    "another algorithm": {**GOOD, "alg": "x"},
    "an unknown category": {**GOOD, "category": "x"},
    "a category that is a list": {**GOOD, "category": ["spam"]},
    "no good faith": {**GOOD, "good_faith": "true"},
    "a key too many": {**GOOD, "more": 1},
    "no messages": {**GOOD, "items": []},
    "too many messages": {**GOOD, "items": [{**GOOD["items"][0], "event_id": f"${n:043d}"} for n in range(21)]},
    "a message twice": {**GOOD, "items": GOOD["items"] * 2},
    "a short key": {**GOOD, "items": [{**GOOD["items"][0], "prk": "AAAA"}]},
    "a key that is none": {**GOOD, "items": [{**GOOD["items"][0], "prk": 5}]},
    "an index below zero": {**GOOD, "items": [{**GOOD["items"][0], "index": -1}]},
    "an index that is true": {**GOOD, "items": [{**GOOD["items"][0], "index": True}]},
    "no event": {**GOOD, "items": [{**GOOD["items"][0], "event_id": "!room"}]},
    "content that is a string": {**GOOD, "items": [{**GOOD["items"][0], "content": "x"}]},
    "too large": {**GOOD, "items": [{**GOOD["items"][0], "content": {"x": "y" * 300_000}}]},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_proof_is_refused_with_a_sentence(name: str) -> None:
    assert form.parse_disclosure(GOOD).category == "threat"
    with pytest.raises(ApiError) as refused:
        form.parse_disclosure(BAD[name])
    assert refused.value.text.endswith("."), "the refusal is a sentence"


def test_a_ratchet_is_refused_unread() -> None:
    """It would open every later message too."""
    for bad in (
        {**GOOD, "ratchet": "A" * 171},
        {**GOOD, "items": [{**GOOD["items"][0], "ratchet": "A"}]},
        {"items": [{"session_key": "A"}]},
    ):
        with pytest.raises(ApiError, match="later messages too"):
            form.parse_disclosure(bad)


@given(st.text(max_size=200))
def test_whatever_is_pasted_as_a_code_is_answered(pasted: str) -> None:
    for text in (pasted, form.CODE_MARK + pasted, form.CODE_MARK + json.dumps(pasted)):
        with pytest.raises(ApiError):
            form.parse_code(text, category="other", good_faith=True)
