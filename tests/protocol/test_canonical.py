"""Canonical JSON: the published examples, and the fast encoder against the reference one."""

from __future__ import annotations

from typing import Any

import canonicaljson
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import BadJson
from relay.protocol.canonical import (
    MAX_DEPTH,
    MAX_INTEGER,
    check_strict,
    encode,
    encode_checked,
    encode_strict,
    from_base64,
    to_base64,
    to_urlsafe_base64,
)

TEXT = st.text(st.characters(codec="utf-8"))
INTEGERS = st.integers(-MAX_INTEGER, MAX_INTEGER)


def json_of(numbers: st.SearchStrategy[Any], text: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | numbers | text,
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=5),
        max_leaves=25,
    )


# Spec: appendices/#canonical-json, Examples
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{}", "{}"),
        ('{"one": 1, "two": "Two"}', '{"one":1,"two":"Two"}'),
        ('{"b": "2", "a": "1"}', '{"a":"1","b":"2"}'),
        ('{"a": "日本語"}', '{"a":"日本語"}'),
        ('{"本": 2, "日": 1}', '{"日":1,"本":2}'),
        ('{"a": "\\u65E5"}', '{"a":"日"}'),
        ('{"a": null}', '{"a":null}'),
        (
            '{"auth": {"success": true, "mxid": "@john.doe:example.com", "profile": {"display_name": "John Doe",'
            '"three_pids": [{"medium": "email", "address": "john.doe@example.org"},'
            '{"medium": "msisdn", "address": "123456789"}]}}}',
            '{"auth":{"mxid":"@john.doe:example.com","profile":{"display_name":"John Doe","three_pids":'
            '[{"address":"john.doe@example.org","medium":"email"},{"address":"123456789","medium":"msisdn"}]},'
            '"success":true}}',
        ),
    ],
)
def test_the_published_examples(source: str, expected: str) -> None:
    assert encode_strict(orjson.loads(source)).decode() == expected, "an example of the standard comes out differently"


@given(json_of(INTEGERS))
def test_the_fast_encoder_equals_the_reference_for_all_that_matrix_allows(value: Any) -> None:
    reference = canonicaljson.encode_canonical_json(value)
    assert encode(value) == reference, "orjson and canonicaljson disagree"
    assert encode_strict(value) == reference, "the strict encoder disagrees"
    assert encode_checked(value) == reference, "the encoder for checked values disagrees"


@given(json_of(st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_old_room_versions_get_floats_and_huge_integers_as_the_reference_writes_them(value: Any) -> None:
    assert encode(value) == canonicaljson.encode_canonical_json(value), "a float or huge integer is written differently"


@given(json_of(st.integers() | st.floats(), st.text(st.characters())))
def test_whatever_comes_the_only_error_is_bad_json(value: Any) -> None:
    for encoder in (encode, encode_strict):
        try:
            assert isinstance(encoder(value), bytes), "an encoder gives bytes"
        except BadJson:
            pass


@pytest.mark.parametrize(
    "value",
    [
        1.0,
        {"a": [1, {"b": 0.5}]},
        MAX_INTEGER + 1,
        -MAX_INTEGER - 1,
        {"a": 2**70},
        "\ud800",
        {"\udfff": 1},
        {1: "a"},
        {"a": b"bytes"},
        {"a": {1, 2}},
        float("nan"),
    ],
)
def test_strictness_refuses(value: Any) -> None:
    with pytest.raises(BadJson):
        check_strict(value)
    with pytest.raises(BadJson):
        encode_strict(value)


@pytest.mark.parametrize(
    "value", [MAX_INTEGER, -MAX_INTEGER, True, None, "", [], {}, {"": [[]]}, "\x00\x1f\x7f\u2028😀"]
)
def test_strictness_lets_pass(value: Any) -> None:
    assert encode_strict(value) == canonicaljson.encode_canonical_json(value), "a good value comes out differently"


@pytest.mark.parametrize("depth", [10, 254, 255, 300])
def test_deep_nesting_is_written_like_the_reference(depth: int) -> None:
    value: Any = []
    for _ in range(depth):
        value = [value]
    assert encode(value) == canonicaljson.encode_canonical_json(value), "nesting changes the result"


def test_nesting_without_end_is_refused_and_does_not_crash() -> None:
    value: Any = []
    for _ in range(max(MAX_DEPTH, 100_000)):
        value = [value]
    with pytest.raises(BadJson):
        check_strict(value)
    with pytest.raises(BadJson):
        encode(value)


@given(st.binary(max_size=80))
def test_base64_there_and_back(raw: bytes) -> None:
    text = to_base64(raw)
    assert "=" not in text, "the standard's base64 is unpadded"
    assert from_base64(text) == raw, "it can be read again"
    assert from_base64(text + "=" * (-len(text) % 4)) == raw, "padding is tolerated"
    assert from_base64(to_urlsafe_base64(raw)) == raw, "the URL-safe letters are tolerated"


@pytest.mark.parametrize("text", ["a", "abc$", "ab cd", "ab=cd", "日", None, 5, b"YQ", "YQ\n"])
def test_what_is_not_base64(text: Any) -> None:
    with pytest.raises(BadJson):
        from_base64(text)
