"""Patterns with `*` and `?`, and the server access control lists made of them.

A pattern comes from strangers, so matching never backtracks: each piece between two stars is taken where it first fits,
which is always the best place, and what was passed is not tried again. Not regular expressions, not shell globs: there
are no brackets and no escapes. Spec: appendices/#glob-style-matching, client-server-api/#mroomserver_acl.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from relay.errors import InvalidParam
from relay.ids import split_server_name

# Identifiers have at most 255 characters, so that no longer pattern can match one: it matches nothing.
MAX_PATTERN = 1_024
COMPILED_PATTERNS_KEPT = 4_096

_STARS = re.compile(r"\*{2,}")
# A word boundary lies wherever the characters on both sides are not both of this class.
_WORD = "[A-Za-z0-9_]"
_BOUNDARY = f"(?:(?<!{_WORD})|(?!{_WORD}))"


def _piece(text: str) -> str:
    return "".join("." if character == "?" else re.escape(character) for character in text)


def _expression(pattern: str) -> str:
    """The pattern as an expression for a whole string. `(?>…)` forbids going back."""
    pieces = pattern.split("*")
    if len(pieces) == 1:
        return _piece(pattern)
    between = "".join(f"(?>.*?{_piece(piece)})" for piece in pieces[1:-1] if piece)
    return f"{_piece(pieces[0])}{between}.*{_piece(pieces[-1])}"


def _word_expression(pattern: str) -> str:
    """The same for a part of the text that begins and ends at a word boundary, to be matched from the text's start."""
    pieces = pattern.split("*")
    first, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return f".*?{_BOUNDARY}{_piece(pattern)}{_BOUNDARY}"
    expression = f"(?>.*?{_BOUNDARY}{_piece(first)})" if first else ""
    expression += "".join(f"(?>.*?{_piece(piece)})" for piece in pieces[1:-1] if piece)
    return expression + (f"(?>.*?{_piece(last)}{_BOUNDARY})" if last else "")


class Glob:
    """One compiled pattern. `matches` asks about the whole text, `in_words` about a part of it between word boundaries."""

    __slots__ = ("_ignore_case", "_never", "_pattern", "_whole", "_words")

    def __init__(self, pattern: str, *, ignore_case: bool = True) -> None:
        pattern = _STARS.sub("*", pattern.lower() if ignore_case else pattern)
        self._pattern = pattern
        self._ignore_case = ignore_case
        self._never = len(pattern) > MAX_PATTERN
        self._whole: re.Pattern[str] | None = None
        self._words: re.Pattern[str] | None = None

    @property
    def literal(self) -> str | None:
        """The one text that matches, where the pattern has no wildcard (in lower case where case is ignored)."""
        return None if "*" in self._pattern or "?" in self._pattern or self._never else self._pattern

    def matches(self, text: str) -> bool:
        if self._never:
            return False
        if self._ignore_case:
            text = text.lower()
        pattern = self._pattern
        if "?" not in pattern:
            stars = pattern.count("*")
            if stars == 0:
                return text == pattern
            if stars == 1:
                start, _, end = pattern.partition("*")
                return len(text) >= len(pattern) - 1 and text.startswith(start) and text.endswith(end)
        if self._whole is None:
            self._whole = re.compile(_expression(pattern), re.DOTALL)
        return self._whole.fullmatch(text) is not None

    def in_words(self, text: str) -> bool:
        if self._never:
            return False
        if self._words is None:
            self._words = re.compile(_word_expression(self._pattern), re.DOTALL)
        return self._words.match(text.lower() if self._ignore_case else text) is not None


@lru_cache(COMPILED_PATTERNS_KEPT)
def compile_glob(pattern: str, *, ignore_case: bool = True) -> Glob:
    return Glob(pattern, ignore_case=ignore_case)


def _is_ip_literal(host: str) -> bool:
    if host.startswith("["):
        return True
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


class _Names:
    """A list of patterns for server names: those without wildcards in a set, the others as one expression."""

    __slots__ = ("_all", "_exact", "_expression", "_patterns")

    def __init__(self, patterns: object) -> None:
        listed = (
            {_STARS.sub("*", p.lower()) for p in patterns if isinstance(p, str)}
            if isinstance(patterns, list)
            else set()
        )
        self._all = "*" in listed
        wild = sorted(p for p in listed if ("*" in p or "?" in p) and len(p) <= MAX_PATTERN)
        self._exact = frozenset(listed.difference(wild))
        self._patterns = [] if self._all else wild
        self._expression: re.Pattern[str] | None = None

    def match(self, host: str) -> bool:
        if self._all or host in self._exact:
            return True
        if not self._patterns:
            return False
        if self._expression is None:
            # Compiled when it is first needed: one expression is a tenth of the work of thousands.
            self._expression = re.compile("|".join(f"(?:{_expression(p)})" for p in self._patterns), re.DOTALL)
        return self._expression.fullmatch(host) is not None


class ServerAcl:
    """Which servers may take part in a room. The steps are those of m.room.server_acl."""

    __slots__ = ("_allow", "_deny", "_exists", "_ip_literals")

    def __init__(self, content: Mapping[str, Any] | None) -> None:
        self._exists = content is not None
        self._ip_literals = content is None or content.get("allow_ip_literals") is not False
        self._allow = _Names(content.get("allow") if content is not None else None)
        self._deny = _Names(content.get("deny") if content is not None else None)

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> ServerAcl:
        """From the content of the room's m.room.server_acl, None where it has none."""
        return _OPEN_TO_ALL if content is None else cls(content)

    def allows(self, server_name: str) -> bool:
        if not self._exists:  # Step 1.
            return True
        try:
            host = split_server_name(server_name)[0].lower()
        except InvalidParam:
            return False
        if not self._ip_literals and _is_ip_literal(host):  # Step 2.
            return False
        if self._deny.match(host):  # Step 3.
            return False
        return self._allow.match(host)  # Steps 4 and 5.


# Most rooms have none, and share this one.
_OPEN_TO_ALL = ServerAcl(None)
