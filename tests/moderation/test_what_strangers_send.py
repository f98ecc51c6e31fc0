"""Whatever a stranger, another server or a program sends to moderation is either taken or refused in words; nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import ApiError
from relay.moderation import case_rules as rules
from relay.moderation import notice_words, statements
from relay.moderation.acts import MEASURES
from relay.moderation.peer_routes import _told as told_by_peer
from relay.moderation.peers import envelope_of
from relay.moderation.reports import _targets
from relay.moderation.reports import _told as told_by_client

LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=30)
    | st.sampled_from([*MEASURES, *rules.CATEGORIES])
)
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def bodies(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), JSON, max_size=8)


@settings(max_examples=50, deadline=None)
@given(bodies("reason", "score", "org.relay.category", "org.relay.disclosure"))
def test_a_report(body: dict[str, Any]) -> None:
    try:
        told = told_by_client(body, "user", reason_required=True)
    except ApiError as no:
        assert no.text.endswith((".", "!")), "it says what to do"
        return
    assert told.category in rules.CATEGORIES and len(told.words) <= 10_000


@settings(max_examples=50, deadline=None)
@given(
    bodies(
        "measures",
        "action",
        "target",
        "room_id",
        "lasts_ms",
        "erase",
        "reason_code",
        "tos_clause",
        "law_ref",
        "ground",
        "facts",
    )
)
def test_a_decision(body: dict[str, Any]) -> None:
    try:
        statement = statements.require_complete(statements.parse(body, about="@bob:x.example"), "@mod:x.example", "c")
    except ApiError:
        return
    assert statement.ground.startswith(("terms:", "law:")) and len(statement.facts) >= statements.MIN_FACTS
    assert all(one.measure in MEASURES for one in statement.measures)


@settings(max_examples=50, deadline=None)
@given(bodies("measures", "reason_code", "automated", "verdict", "decided", "user_id"))
def test_what_another_server_says_it_decided(body: dict[str, Any]) -> None:
    try:
        told = told_by_peer(body)
    except ApiError:
        return
    assert set(told) == {"measures", "reason_code", "automated", "verdict"} and set(told["measures"]) <= set(MEASURES)
    assert statements.is_reason_code(told["reason_code"]), "a word, and no words"


@settings(max_examples=50, deadline=None)
@given(bodies("v", "case_id", "version", "iv", "body", "wraps"))
def test_an_envelope(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        envelope_of(body)


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["@a:b", "!r:b", "$" + "x" * 43, "<b>", "@<script>:b"]), max_size=5).map(" ".join)
)
def test_identifiers_in_what_a_stranger_writes(where: str) -> None:
    found = _targets(where)
    assert all(value in where.replace(",", " ").split() for value in found.values())


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(list(notice_words.SENTENCES)),
    st.dictionaries(
        st.sampled_from(["number", "link", "category", "state", "day", "count", "hash", "key_id", "signature"]),
        st.text(max_size=40),
    ),
)
def test_no_word_of_anybody_slips_into_a_notice(name: str, fields: dict[str, str]) -> None:
    good = {
        "number": 7, "link": "https://one.example/_relay/report/abc", "category": "spam", "state": "verified",
        "day": "2026-11-25 17:00 UTC", "count": 60, "hash": "A" * 43, "key_id": "ed25519:a1", "signature": "B" * 86,
    }  # fmt: skip
    assert notice_words.is_own(notice_words.say(name, good)), "what belongs there passes"
    wrong = {
        **good,
        **{key: f"{value} <b>" for key, value in fields.items() if "{" + key + "}" in notice_words.SENTENCES[name]},
    }
    if wrong != good:
        with pytest.raises(ValueError, match="no number and no link"):
            notice_words.say(name, wrong)
    assert not notice_words.is_own({**notice_words.say(name, good), "formatted_body": "x"})


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(rules.STATES), st.sampled_from(rules.STATES))
def test_a_case_moves_forward_and_is_decided_only_with_a_decision(state: str, becomes: str) -> None:
    try:
        rules.require_step(state, becomes)
    except ApiError:
        return
    assert becomes != rules.NEW, "nothing becomes new again"
    if state in (rules.DECIDED, rules.CLOSED):
        assert becomes in (rules.APPEALED, rules.CLOSED)
