"""Signed JSON: the standard's test vectors, and what a peer may send in place of a signature."""

from __future__ import annotations

from typing import Any

import nacl.signing
import pytest

from relay.errors import BadJson
from relay.protocol.canonical import from_base64, to_base64
from relay.protocol.signing import SigningKey, sign_json, signature_of, verify_bytes, verify_json

# Spec: appendices/#cryptographic-test-vectors
SEED = "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1"
KEY = SigningKey("ed25519:1", from_base64(SEED))


@pytest.mark.parametrize(
    ("obj", "signature"),
    [
        ({}, "K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ"),
        (
            {"one": 1, "two": "Two"},
            "KqmLSbO39/Bzb0QIYE82zqLwsA+PDzYIpIRA2sRQ4sL53+sN6/fpNSoqE7BP7vBZhG6kYdD13EIMJpvhJI+6Bw",
        ),
    ],
)
def test_the_published_vectors(obj: dict[str, Any], signature: str) -> None:
    signed = sign_json(obj, "domain", KEY)
    assert signed == {**obj, "signatures": {"domain": {"ed25519:1": signature}}}, "the standard's vector differs"
    assert verify_json(signed, "domain", "ed25519:1", KEY.verify_key), "the signature can be verified"


def test_unsigned_is_neither_signed_nor_lost() -> None:
    signed = sign_json({"a": 1, "unsigned": {"age": 5}}, "domain", KEY)
    assert signed["unsigned"] == {"age": 5}, "unsigned stays as it was"
    assert verify_json({**signed, "unsigned": {"age": 6}}, "domain", "ed25519:1", KEY.verify_key), (
        "unsigned may change without breaking the signature"
    )


def test_a_second_signature_keeps_the_first() -> None:
    other = SigningKey.generate("second")
    once = sign_json({"a": 1}, "domain", KEY)
    twice = sign_json(sign_json(once, "elsewhere", other), "domain", other)
    assert verify_json(twice, "domain", "ed25519:1", KEY.verify_key), "the first signature is still there"
    assert verify_json(twice, "elsewhere", other.key_id, other.verify_key), "the second holds"
    assert verify_json(twice, "domain", other.key_id, other.verify_key), "one server may sign with two keys"
    assert "signatures" in once and "elsewhere" not in once["signatures"], "the signed object is a new one"


def test_a_changed_object_does_not_verify() -> None:
    signed = sign_json({"a": 1}, "domain", KEY)
    assert not verify_json({**signed, "a": 2}, "domain", "ed25519:1", KEY.verify_key), "the content was changed"
    assert not verify_json(signed, "domain", "ed25519:1", SigningKey.generate("1").verify_key), "another key"
    assert not verify_json(signed, "elsewhere", "ed25519:1", KEY.verify_key), "another server"


@pytest.mark.parametrize(
    "signatures",
    [
        None,
        [],
        {},
        {"domain": None},
        {"domain": []},
        {"domain": {"ed25519:1": None}},
        {"domain": {"ed25519:1": 7}},
        {"domain": {"ed25519:1": "$$$"}},
        {"domain": {"ed25519:1": ""}},
        {"domain": {"ed25519:1": "AAAA"}},
        {"domain": {"ed25519:1": "é"}},
    ],
)
def test_a_broken_signature_is_false_and_nothing_worse(signatures: Any) -> None:
    assert not verify_json({"signatures": signatures}, "domain", "ed25519:1", KEY.verify_key), "it is no signature"


def test_an_object_without_canonical_form_does_not_verify() -> None:
    signed = sign_json({"a": 1}, "domain", KEY)
    assert not verify_json({**signed, "a": "\ud800"}, "domain", "ed25519:1", KEY.verify_key), "no canonical form"


def test_keys_of_the_wrong_length_do_not_verify() -> None:
    signature = signature_of(sign_json({}, "domain", KEY), "domain", "ed25519:1")
    assert signature is not None
    assert verify_bytes(b"{}", signature, KEY.verify_key), "the signature is over the canonical form"
    assert not verify_bytes(b"{}", signature, KEY.verify_key[:31]), "a key that is too short"
    assert not verify_bytes(b"{}", signature[:63], KEY.verify_key), "a signature that is too short"
    assert not verify_bytes(b"{}", b"", b""), "nothing at all"


def test_a_key_survives_its_file() -> None:
    key = SigningKey.generate("a_Q1")
    again = SigningKey.load(key.dump() + "\n")
    assert (again.key_id, again.verify_key) == ("ed25519:a_Q1", key.verify_key), "the same key comes back"
    assert again.sign(b"x") == key.sign(b"x"), "and signs alike"
    assert to_base64(nacl.signing.SigningKey(from_base64(SEED)).verify_key.encode()) == KEY.verify_key_base64, (
        "PyNaCl derives the same public key"
    )
    assert SEED not in repr(KEY), "a key does not tell its secret in a log"


@pytest.mark.parametrize(
    "text", ["", "ed25519 a", "ed25519 a b c", "rsa a " + SEED, "ed25519 a AAAA", "ed25519 a:b " + SEED, "ed25519 a $"]
)
def test_a_broken_key_file_is_refused(text: str) -> None:
    with pytest.raises(BadJson):
        SigningKey.load(text)
