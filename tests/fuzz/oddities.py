"""What strangers send: values of the wrong type, size and shape under keys that the program knows.

The keys are not listed by hand: every short text in a part's source may be a key, a parameter or an event type, so a
new endpoint is met with its own words from the first day. Nothing here names a server that would really be asked.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent.parent
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.]{1,40}\Z")
# The server of these does not answer: nothing listens on port 1.
NOBODY = "localhost:1"

TEXTS: tuple[str, ...] = (
    "", " ", "x", "0", "-1", "true", "null", "\x00", "a\x00b", "é" * 200, "a" * 300, "a" * 70_000, "../../etc/passwd",
    "@", "@:", "!", "$", "#", "mxc://", "mxc://a", "m.room.encrypted", "m.room.create", "m.login.password", "ed25519:1",
    "signed_curve25519:AAAA", f"@nobody:{NOBODY}", f"!room:{NOBODY}", f"#room:{NOBODY}", f"mxc://{NOBODY}/abc",
    "%00", "1e9", "99999999999999999999", "'; DROP TABLE users; --", "\u202e\u0000\uffff", "*" * 200,
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2**31, 2**53, -(2**53), 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
)  # fmt: skip


@cache
def words_of(path: Path) -> tuple[str, ...]:
    """What may be a key in a part's source, and in the files of its folder."""
    found = {"type", "content", "user_id", "room_id", "event_id", "auth", "limit", "from", "session"}
    files = path.parent.glob("*.py") if path.parent.name not in ("relay", "federation") else [path]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _WORD.match(node.value):
                found.add(node.value)
    return tuple(sorted(found))


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def values(words: tuple[str, ...], known: tuple[str, ...] = ()) -> st.SearchStrategy[Any]:
    """Anything that JSON can say. `known` are IDs that exist."""
    texts = [st.sampled_from(TEXTS), st.sampled_from(words)]
    if known:
        texts.append(st.sampled_from(known))
    text = st.one_of(texts)
    leaf = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), text, text)
    return st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
        max_leaves=8,
    )


def bodies(words: tuple[str, ...], known: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """Bodies of requests: mostly objects with known keys, some that are no object, some that are no JSON."""
    value = values(words, known)
    objects = st.dictionaries(st.sampled_from(words), value, max_size=8).map(as_json)
    return st.one_of(
        objects, objects, objects, objects, value.map(as_json), st.binary(max_size=60), st.sampled_from(NO_BODIES)
    )


def as_json(value: Any) -> bytes:
    """By Python's own encoder, which knows integers of any size."""
    return json.dumps(value, ensure_ascii=True).encode()


NO_BODIES: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"null", b'"text"', b"{}{}", b'{"a":1,}', b"\xff\xfe{\x00}\x00", b'{"a":"\xc3"}', b"\xef\xbb\xbf{}", b'{"a":NaN}',
    b'{"type":"a","type":"b"}', deep(99), deep(101), deep(10_000), b"[" * 10_000, b'{"a":1e999}', b'{"a":-0}', b"{\x00}", b'{"type":"\\ud800"}', b'{"\\ud800":1}',
)  # fmt: skip


def bounded(examples: int) -> settings:
    """The same examples on every machine; how long one takes is no finding. The relay is shared by all of them."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
