"""Signed requests: who may speak for whom, and what of the header is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from federation import xmatrix
from federation.exchange import Reply
from federation.xmatrix import authorization, parse, signed_message
from relay.config import Rate
from relay.errors import Unauthorized
from relay.limits import Limits
from relay.protocol.canonical import encode, to_base64
from relay.protocol.signing import SigningKey, sign_json
from tests.federation.neighbours import Names, Neighbour, two_servers

ECHO = "/_matrix/federation/v1/echo"
SIGNATURE = to_base64(b"x" * 64)


def test_the_signed_text_is_the_standards_json() -> None:
    key = SigningKey.generate("k")
    content = {"b": 'quote " and \n line', "a": [1, None, "ü"]}
    ours = signed_message("PUT", '/x?y=%22"', "one", "two", encode(content))
    whole = {"method": "PUT", "uri": '/x?y=%22"', "origin": "one", "destination": "two", "content": content}
    assert ours == encode(whole), "the spliced text is the canonical JSON of the five keys"
    signature = sign_json(whole, "one", key)["signatures"]["one"][key.key_id]
    header = authorization("PUT", '/x?y=%22"', "one", "two", encode(content), key)
    assert f'sig="{signature}"' in header, "and its signature is that of the standard's sign_json"
    without = {name: value for name, value in whole.items() if name != "content"}
    assert signed_message("PUT", '/x?y=%22"', "one", "two", None) == encode(without), (
        "a request without a body has four"
    )


@pytest.mark.parametrize(
    "header",
    [
        f'X-Matrix origin="a.b:1",destination="c",key="ed25519:k",sig="{SIGNATURE}"',
        f"x-matrix   Origin=a.b:1 , DESTINATION=c,\tkey=ed25519:k, sig={SIGNATURE}",
        f'X-MATRIX sig="{SIGNATURE}",key="ed25519:k",new="thing, with \\" in it",origin="a.b:1",destination="c"',
        f'X-Matrix origin="a\\.b:1",destination="c",key="ed25519:k",signature="{SIGNATURE}",',
    ],
)
def test_headers_that_are_read(header: str) -> None:
    found = parse(header)
    assert (found.origin, found.destination, found.key_id) == ("a.b:1", "c", "ed25519:k"), "names in any case and order"
    assert found.signature == b"x" * 64, "the signature is decoded"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer abc",
        "X-Matrix",
        "X-Matrix origin",
        f'X-Matrix origin="a",origin="b",key="ed25519:k",sig="{SIGNATURE}"',
        f'X-Matrix origin="not a name",key="ed25519:k",sig="{SIGNATURE}"',
        f'X-Matrix origin="a",key="rsa:k",sig="{SIGNATURE}"',
        'X-Matrix origin="a",key="ed25519:k",sig="!!!"',
        f'X-Matrix origin="a,key="ed25519:k",sig="{SIGNATURE}"',
        "X-Matrix " + "a=b," * 2_000,
    ],
)
def test_headers_that_are_refused(header: str) -> None:
    with pytest.raises(Unauthorized):
        parse(header)


@given(st.text(max_size=200))
def test_no_header_breaks_the_parser(text: str) -> None:
    try:
        parse("X-Matrix " + text)
    except Unauthorized:
        pass


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@given(st.permutations(["origin", "destination", "key", "sig", "more"]), VALUES, st.booleans())
def test_what_is_quoted_is_read_back(order: list[str], extra: str, quoted: bool) -> None:
    values = {"origin": "h.x:8448", "destination": "[::1]:1", "key": "ed25519:a_1", "sig": SIGNATURE, "more": extra}

    def written(name: str) -> str:
        value = values[name]
        if quoted or name in ("more", "destination"):
            value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return f"{name}={value}"

    found = parse("X-Matrix " + ",".join(written(name) for name in order))
    assert (found.origin, found.destination) == ("h.x:8448", "[::1]:1"), "whatever else stands in the header"


PIECES = st.sampled_from(
    ['origin="a"', "origin=a", 'key="ed25519:k"', 'destination="b"', f'sig="{SIGNATURE}"', f",sig={SIGNATURE}",
     f'signature="{SIGNATURE}"', f',sig="{SIGNATURE}"', 'more="x', '"', "\\", ",", " ", SIGNATURE]
)  # fmt: skip


@given(st.lists(PIECES, max_size=9).map("".join) | st.lists(PIECES, max_size=6).map(",".join))
def test_the_short_way_reads_what_the_long_way_reads(text: str) -> None:
    def read(way: Callable[[str], object]) -> object:
        try:
            return way(text)
        except Unauthorized:
            return "refused"

    short = read(xmatrix._ending_in_signature)
    assert short in (None, read(xmatrix._claimed)), "a header whose beginning is remembered"


def test_the_short_way_is_taken() -> None:
    header = authorization("GET", "/", "a.b:1", "c", None, SigningKey.generate("k"))
    assert xmatrix._ending_in_signature(header.partition(" ")[2]) is not None, "by what we write ourselves"


async def _ask(one: Neighbour, two: Neighbour, body: bytes, header: str) -> tuple[int, dict[str, object]]:
    url = URL(f"https://127.0.0.1:{two.listening.port}{ECHO}")
    answer: Reply = await one.outward.request(
        "POST",
        url,
        headers={"Authorization": header, "Content-Type": "application/json"},
        body=body,
        tls_name="two.test",
        timeout=5.0,
    )
    text = orjson.loads(await answer.read())
    answer.release()
    return answer.status, text


async def test_who_is_believed(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        answer = await one.connections.send(two.name, "POST", ECHO, {"hello": "ü", "n": 1})
        assert answer == {"origin": one.name, "body": {"hello": "ü", "n": 1}}, "a signed request names its origin"
        assert two.hosts == [two.name], "the Host header is the server's name"
        assert two.heard == [one.name], "and shows that the origin lives"

        loose = b'{ "z": 1,  "a": "\\u00fc" }'
        header = authorization("POST", ECHO, one.name, two.name, encode(orjson.loads(loose)), one.key)
        status, _ = await _ask(one, two, loose, header)
        assert status == 200, "what counts is the canonical form of a body, not how it was written"

        status, text = await _ask(one, two, b'{"z":2}', header)
        assert (status, text["errcode"]) == (401, "M_UNAUTHORIZED"), "another body is not covered by the signature"

        header = authorization("POST", ECHO, one.name, "elsewhere.test", b"{}", one.key)
        status, _ = await _ask(one, two, b"{}", header)
        assert status == 401, "a request that is meant for another server is not taken"

        forged = authorization("POST", ECHO, one.name, two.name, b"{}", SigningKey.generate("one"))
        status, _ = await _ask(one, two, b"{}", forged)
        assert status == 401, "another key of the same name is no proof"

        own = authorization("POST", ECHO, two.name, two.name, b"{}", two.key)
        status, _ = await _ask(one, two, b"{}", own)
        assert status == 401, "nobody else speaks in our name"

        message = xmatrix._without_destination("POST", ECHO, one.name, b"{}")
        old = f'X-Matrix origin={one.name},key="{one.key.key_id}",sig="{one.key.sign(message)}"'
        status, _ = await _ask(one, two, b"{}", old)
        assert status == 200, "an older server that names no destination is believed"

        status, text = await _ask(one, two, b"[1]", header)
        assert status in (400, 401), "a body that is no object is refused"
        status, text = await _ask(one, two, b"{}", "Bearer abc")
        assert status == 401 and "X-Matrix" in str(text["error"]), "an unsigned request is told what is missing"


async def test_nobody_has_us_ask_the_whole_world(tmp_path: Path) -> None:
    async with two_servers(tmp_path, names := Names()) as (one, two):
        two.strangers = Limits({"strangers": Rate(per_second=0.001, burst=5)}, two.clock)
        names.hosts |= {f"made-up{number}.test": () for number in range(40)}

        def asked() -> int:
            return len({name for name in names.asked if name.startswith("made-up")})

        statuses = []
        for number in range(20):
            header = authorization("POST", ECHO, f"made-up{number}.test:9", two.name, b"{}", one.key)
            statuses.append((await _ask(one, two, b"{}", header))[0])
        assert statuses[:5] == [401] * 5 and set(statuses[5:]) == {429}, "one address names only so many strangers"
        assert asked() <= 5, "and only these are asked for their keys"
        wanted = {"server_keys": {f"made-up{number}.test:9": {} for number in range(20, 40)}}
        url = URL(f"https://127.0.0.1:{two.listening.port}/_matrix/key/v2/query")
        answer = await one.outward.request("POST", url, body=encode(wanted), tls_name="two.test", timeout=5.0)
        assert answer.status == 429 and asked() <= 5, "nor by way of the notary"
        answer.release()
        two.strangers = Limits({"strangers": Rate(per_second=0.001, burst=1)}, two.clock)
        for _ in range(3):
            await one.connections.send(two.name, "POST", ECHO, {"a": 1})
        assert two.heard == [one.name] * 3, "who is known costs nothing"
