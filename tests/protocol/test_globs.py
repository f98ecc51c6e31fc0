"""Patterns of `*` and `?`, on whole texts, between word boundaries and in server access control lists."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.globs import MAX_PATTERN, Glob, ServerAcl, compile_glob


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("example.org", "example.org", True),
        ("example.org", "EXAMPLE.org", True),
        ("example.org", "example.org.evil.com", False),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("ex*ple", "exple", True),
        ("ex*ple", "expl", False),
        ("a*a", "a", False),
        ("lunc?*", "Lunch plans", True),
        ("lunc?*", " lunch", False),
        ("lunc?*", "lunc", False),
        ("*a*b*a*", "xaybza", True),
        ("*a*b*a*", "xayza", False),
        ("a.c", "abc", False),
        ("[ab]", "a", False),
        ("?", "\n", True),
        ("*", "", True),
        ("", "", True),
        ("", "x", False),
        ("a**b", "ab", True),
    ],
)
def test_a_pattern_asks_about_the_whole_text(pattern: str, text: str, expected: bool) -> None:
    assert compile_glob(pattern).matches(text) is expected, f"{pattern!r} and {text!r}"


def test_case_counts_where_it_is_asked_for() -> None:
    assert not compile_glob("@Alice:*", ignore_case=False).matches("@alice:x"), "a user ID has its case"
    assert compile_glob("@Alice:*", ignore_case=False).matches("@Alice:x"), "the same case matches"


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("ex*ple", "An example event.", True),
        ("ex*ple", "exple", True),
        ("ex*ple", "An exciting triple-whammy", True),
        ("ex*ple", "examples", False),
        ("cake", "I like CAKE!", True),
        ("cake", "cakes", False),
        ("cake", "cupcake", False),
        ("cake", "cupcake cake", True),
        ("cake", "my_cake", False),
        ("tea*", "time for teabags", True),
        ("*room", "thebedroom", True),
        ("@room", "hey @room", True),
        ("b?d", "a bad day", True),
        ("b?d", "a bald day", False),
        ("*", "", True),
    ],
)
def test_a_keyword_stands_between_word_boundaries(pattern: str, text: str, expected: bool) -> None:
    assert compile_glob(pattern).in_words(text) is expected, f"{pattern!r} in {text!r}"


@given(st.text("ab*?.", max_size=12), st.text("ab.", max_size=12))
def test_matching_agrees_with_the_plain_definition(pattern: str, text: str) -> None:
    plain = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    assert Glob(pattern).matches(text) == bool(re.fullmatch(plain, text)), "no backtracking, but the same answer"


@given(st.text("ab*? .", max_size=8), st.text("ab. ", max_size=10))
def test_words_agree_with_the_plain_definition(pattern: str, text: str) -> None:
    edge = "(?:(?<![a-z])|(?![a-z]))"
    plain = (
        edge + "(?:" + "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern) + ")" + edge
    )
    assert Glob(pattern).in_words(text) == bool(re.search(plain, text)), "the first fitting piece is always the best"


def test_a_hostile_pattern_costs_little() -> None:
    text = "a" * 20_000
    assert not Glob("*a" * 200 + "b").matches(text), "a pattern made to backtrack is answered"
    assert not Glob("*a" * 200 + "b").in_words(text), "and so it is between words"


def test_an_endless_pattern_matches_nothing() -> None:
    assert not Glob("a" * (MAX_PATTERN + 1)).matches("a" * (MAX_PATTERN + 1)), "no identifier is that long"
    assert Glob("*" * 10_000).matches("anything"), "a run of stars is one star"


@pytest.mark.parametrize(
    ("content", "server", "expected"),
    [
        (None, "anyone.example", True),
        ({}, "anyone.example", False),
        ({"allow": ["*"]}, "anyone.example", True),
        ({"allow": ["*"], "deny": ["evil.com"]}, "evil.com", False),
        ({"allow": ["*"], "deny": ["evil.com"]}, "EVIL.com:8448", False),
        ({"allow": ["*"], "deny": ["EVIL.com"]}, "evil.com:1234", False),
        ({"allow": ["*"], "deny": ["*.evil.com"]}, "evil.com", True),
        ({"allow": ["*"], "deny": ["*.evil.com"]}, "a.evil.com", False),
        ({"allow": ["*.example.org", "example.or?"]}, "example.org", True),
        ({"allow": ["*.example.org"]}, "example.org", False),
        ({"allow": ["*"], "allow_ip_literals": False}, "1.2.3.4", False),
        ({"allow": ["*"], "allow_ip_literals": False}, "1.2.3.4:8448", False),
        ({"allow": ["*"], "allow_ip_literals": False}, "[::1]:8448", False),
        ({"allow": ["*"], "allow_ip_literals": "no"}, "1.2.3.4", True),
        ({"allow": ["*"]}, "[::1]", True),
        ({"allow": ["*"], "deny": ["[::1]"]}, "[::1]:80", False),
        ({"allow": ["*"]}, "not a server", False),
        ({"allow": "*"}, "example.org", False),
        ({"allow": [None, 3, "*"], "deny": 7}, "example.org", True),
    ],
)
def test_an_access_list_follows_its_five_steps(content: dict[str, object] | None, server: str, expected: bool) -> None:
    assert ServerAcl.of(content).allows(server) is expected, f"{server} under {content}"


def test_a_long_list_is_answered() -> None:
    acl = ServerAcl.of({"allow": ["*"], "deny": [f"*.{n}.exampl?" for n in range(3_000)]})
    assert not acl.allows("a.2999.example"), "the last entry counts"
    assert acl.allows("a.3000.example"), "a server that is not listed may come in"
