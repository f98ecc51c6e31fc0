"""Checks V6 to V10 over single messages: each with one that passes and one that fails, and every odd encoding that clients
accept (the clients' library is asked, so that "what she could read can be proved" is no claim of ours)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import vodozemac
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.moderation import megolm
from relay.moderation.megolm import Unproven, open_message
from tests.moderation.sessions import Forged, Session, b64, inner, varint

ROOM = "!room:one"


def fails(content: dict[str, Any], prk: bytes, index: int = 0, room: str = ROOM) -> Unproven:
    with pytest.raises(Unproven) as caught:
        open_message(content, prk, index, room)
    return caught.value


@pytest.mark.parametrize("index", [0, 1, 5, 255, 256, 257, 513])
def test_one_value_opens_one_message_and_no_other(index: int) -> None:
    session = Session()
    sent = [session.says(ROOM, f"message {n}") for n in range(index + 2)]
    opened = open_message(sent[index], session.prk(index), index, ROOM)
    assert opened.inner["content"]["body"] == f"message {index}"
    assert fails(sent[index + 1], session.prk(index), index + 1).step == "V8", "it does not open the next one"
    assert fails(sent[index], session.prk(index + 1), index).step == "V8", "nor is it the next one's"


def test_v6_reads_what_the_library_reads_and_nothing_else() -> None:
    session = Session()
    content = session.says(ROOM, "hello")
    assert open_message(content, session.prk(0), 0, ROOM).index == 0
    wrong = {
        "another algorithm": {**content, "algorithm": "m.olm.v1.curve25519-aes-sha2"},
        "no algorithm": {key: value for key, value in content.items() if key != "algorithm"},
        "a session ID that is too short": {**content, "session_id": session.id[:-1]},
        "a session ID with padding": {**content, "session_id": session.id + "="},
        "a session ID that is none": {**content, "session_id": None},
        "no ciphertext": {**content, "ciphertext": {}},
        "not base64": {**content, "ciphertext": "!" * 200},
        "too short": {**content, "ciphertext": content["ciphertext"][:40]},
        "too long": {**content, "ciphertext": "A" * 70_000},
        "another version": {**content, "ciphertext": "B" + content["ciphertext"][1:]},
    }
    for name, one in wrong.items():
        assert fails(one, session.prk(0)).step == "V6", name
    assert fails(content, session.prk(0), 1).step == "V6", "another index than the message's"


def test_v7_wants_the_signature_of_the_session() -> None:
    session, other = Session(), Session()
    content = session.says(ROOM, "hello")
    assert open_message(content, session.prk(0), 0, ROOM)
    raw = bytearray(base64.b64decode(content["ciphertext"] + "=="))
    raw[10] ^= 1
    assert fails({**content, "ciphertext": b64(bytes(raw))}, session.prk(0)).step == "V7", "an altered ciphertext"
    assert fails({**content, "ciphertext": b64(bytes(raw))}, session.prk(0)).result == "invalid"
    another = fails({**content, "session_id": other.id}, session.prk(0))
    assert (another.step, another.result) == ("V7", "needs_human"), "the MAC holds, so a person has to look"


def test_a_bad_signature_with_a_good_mac_is_for_a_person_and_never_a_false_report() -> None:
    sender = Forged()
    found = fails(sender.builds(inner(ROOM, "you read this"), sign=False), sender.prk(0))
    assert (found.step, found.result, found.flag) == ("V7", "needs_human", "signature_bad")
    assert found.plaintext is not None and b"you read this" in found.plaintext, "with the bytes, to be judged"


def test_v8_wants_the_key_of_this_message() -> None:
    session = Session()
    content = session.says(ROOM, "hello")
    for name, key in {"a random key": b"k" * 32, "the ratchet's own first part": session.ratchet(0)[:32]}.items():
        found = fails(content, key)
        assert (found.step, found.result) == ("V8", "invalid"), name


def test_no_other_iv_can_be_slipped_in() -> None:
    """Were the derived keys disclosed instead of the one value, the IV could be exchanged, and with it the first 16 bytes."""
    session = Session()
    plain = inner(ROOM, "hello")
    content, keys = session.encrypts(plain), session.keys(0)
    wanted = b'{"x":"forged!", '
    forged_iv = bytes(iv ^ was ^ now for iv, was, now in zip(keys.iv, plain[:16], wanted, strict=True))
    message = megolm.parse(content, 0)
    rewritten = megolm.decrypt(message, megolm.Keys(keys.aes, keys.mac, forged_iv))
    assert rewritten.startswith(wanted), "so it is with raw keys"
    for forged in (keys.aes, keys.mac, keys.aes[:16] + forged_iv):
        assert fails(content, forged).step == "V8", "but a proof has no field for them, and they open nothing"


def test_v9_wants_whole_blocks_and_padding() -> None:
    sender = Forged()
    good = sender.builds(inner(ROOM, "hello"))
    assert open_message(good, sender.prk(0), 0, ROOM).inner["content"]["body"] == "hello"
    for plain in (b"x" * 15 + b"\x00", b"x" * 15 + b"\x11", b"x" * 14 + b"\x05\x02"):
        found = fails(sender.builds(plain, pad=False), sender.prk(0))
        assert (found.step, found.result) == ("V9", "invalid"), "no client could read it either"


# --- what clients read leniently -----------------------------------------------------------------------------------


ODD: dict[str, Callable[[int, bytes], bytes]] = {
    "an index in too many bytes": lambda i, c: b"\x03\x08" + bytes([i | 0x80, 0]) + b"\x12" + varint(len(c)) + c,
    "an unknown field": lambda i, c: b"\x03\x08" + varint(i) + b"\x12" + varint(len(c)) + c + b"\x1a\x03odd",
    "the other order": lambda i, c: b"\x03\x12" + varint(len(c)) + c + b"\x08" + varint(i),
    "no index": lambda i, c: b"\x03\x12" + varint(len(c)) + c,
    "the index twice": lambda i, c: b"\x03\x08\x07\x08" + varint(i) + b"\x12" + varint(len(c)) + c,
    "an index of 2^32": lambda i, c: b"\x03\x08\x80\x80\x80\x80\x10\x12" + varint(len(c)) + c,
    "the ciphertext twice": lambda i, c: b"\x03\x08" + varint(i) + b"\x12\x01x\x12" + varint(len(c)) + c,
}


@pytest.mark.parametrize("name", ODD)
def test_what_the_clients_library_decrypts_verifies_here(name: str) -> None:
    sender = Forged()
    content = sender.builds(inner(ROOM, "oddly written"), payload=ODD[name])
    # What the library says of it, with a key as a client has it.
    exported = b"\x01" + bytes(4) + sender.ratchet(0) + base64.b64decode(sender.id + "=")
    client = vodozemac.InboundGroupSession.import_session(_exported(exported))
    message = vodozemac.MegolmMessage.from_base64(content["ciphertext"])
    assert b"oddly written" in bytes(client.decrypt(message).plaintext), "the victim's client reads it"
    assert open_message(content, sender.prk(0), 0, ROOM).inner["content"]["body"] == "oddly written", (
        "so it can be proved"
    )


def _exported(raw: bytes) -> Any:
    return vodozemac.ExportedSessionKey(b64(raw))


@pytest.mark.parametrize("name", ODD)
def test_one_form_has_to_pass_both(name: str) -> None:
    """MAC and signature over the bytes as they came: other libraries read it so, and it is no false report."""
    sender = Forged()
    content = sender.builds(inner(ROOM, "as it came"), payload=ODD[name], canonical=False)
    assert open_message(content, sender.prk(0), 0, ROOM).inner["content"]["body"] == "as it came"


def test_a_mac_of_one_form_and_a_signature_of_the_other_is_for_a_person() -> None:
    sender = Forged()
    canonical = base64.b64decode(sender.builds(inner(ROOM, "x"), payload=ODD["an unknown field"])["ciphertext"] + "==")
    as_sent = base64.b64decode(
        sender.builds(inner(ROOM, "x"), payload=ODD["an unknown field"], canonical=False)["ciphertext"] + "=="
    )
    mixed = as_sent[:-64] + canonical[-64:]
    assert fails(sender.content(b64(mixed)), sender.prk(0)).result == "needs_human"


# --- V10 -----------------------------------------------------------------------------------------------------------


BAD_INNER: dict[str, tuple[bytes, str]] = {
    "a wrong room": (inner("!other:one", "hello"), "room_mismatch"),
    "no room": (b'{"type":"m.room.message","content":{"body":"x"}}', "unreadable"),
    "no type": (json.dumps({"content": {}, "room_id": ROOM}).encode(), "unreadable"),
    "no content": (json.dumps({"type": "m.room.message", "room_id": ROOM}).encode(), "unreadable"),
    "content that is no object": (json.dumps({"type": "t", "content": [], "room_id": ROOM}).encode(), "unreadable"),
    "a key twice": (b'{"type":"t","content":{"body":"kind","body":"vile"},"room_id":"!room:one"}', "duplicate_keys"),
    "a room twice": (b'{"type":"t","content":{},"room_id":"!room:one","room_id":"!room:one"}', "duplicate_keys"),
    "not JSON": (b"just text", "unreadable"),
    "a list": (b"[]", "unreadable"),
    "nothing": (b"", "unreadable"),
    "not a number": (b'{"type":"t","content":{"n":NaN},"room_id":"!room:one"}', "unreadable"),
    "an integer of 5,000 digits": (
        b'{"type":"t","content":{"n":' + b"9" * 5000 + b'},"room_id":"!room:one"}',
        "unreadable",
    ),
    "deep nesting": (
        b'{"type":"t","room_id":"!room:one","content":' + b'{"a":' * 40_000 + b"0" + b"}" * 40_001,
        "unreadable",
    ),
}


@pytest.mark.parametrize("name", BAD_INNER)
def test_v10_what_cannot_be_read_is_for_a_person_with_the_raw_bytes(name: str) -> None:
    plain, flag = BAD_INNER[name]
    if len(plain) > 60_000:
        # Too long for an event, but the reader has to survive it.
        with pytest.raises(Unproven) as caught:
            megolm.read_inner(plain, ROOM)
        found = caught.value
    else:
        sender = Forged()
        found = fails(sender.builds(plain), sender.prk(0))
    assert (found.step, found.result, found.flag) == ("V10", "needs_human", flag)
    assert found.plaintext == plain, "the bytes, not somebody's reading of them"


def test_text_that_is_not_utf8_is_read_with_replacement() -> None:
    sender = Forged()
    plain = inner(ROOM, "hi").replace(b"hi", b"h\xffi")
    opened = open_message(sender.builds(plain), sender.prk(0), 0, ROOM)
    assert opened.inner["content"]["body"] == "h\ufffdi" and opened.plaintext == plain


@given(st.dictionaries(st.sampled_from(["algorithm", "session_id", "ciphertext", "x"]), st.one_of(st.none(), st.integers(), st.text(max_size=300), st.just(megolm.ALGORITHM), st.just("A" * 43))), st.binary(min_size=32, max_size=32))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_is_sent_ends_in_a_verdict(content: dict[str, Any], prk: bytes) -> None:
    fails(content, prk)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_whatever_stands_in_the_ciphertext_ends_in_a_verdict(raw: bytes) -> None:
    sender = Forged()
    for payload in (raw, b"\x03\x08\x00\x12" + raw):
        fails(sender.content(b64(payload + bytes(72))), sender.prk(0))
