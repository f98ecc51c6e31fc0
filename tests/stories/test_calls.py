"""Stories of calls: clients find the TURN server and the LiveKit service that the operator runs, and nothing where there is none."""

from __future__ import annotations

import base64
import hmac

from tests.town import Town

TRANSPORTS = ("/_matrix/client/v1/rtc/transports", "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports")

SETTINGS = """
public_base_url: https://matrix.example.org
turn: {uris: ["turn:turn.example.org?transport=udp", "turns:turn.example.org"], shared_secret: not so secret, ttl: 30m}
calls: {livekit_service_urls: ["https://calls.example.org/livekit/jwt"]}
"""


async def test_callers_get_a_password_that_the_turn_server_can_check(town: Town) -> None:
    await town.relay("one", SETTINGS)
    alice = await town.user("alice@one")
    given = await alice.calls("GET", "voip/turnServer")
    proof = hmac.digest(b"not so secret", given["username"].encode(), "sha1")
    assert given["password"] == base64.b64encode(proof).decode(), "the TURN server computes the same"
    ends, _, name = given["username"].partition(":")
    assert int(ends) >= town.clock.now() / 1000 + 1700 and given["ttl"] == 1800, "it is good for half an hour"
    assert name and alice.name not in name, "the TURN server is not told who calls"
    assert given["uris"] == ["turn:turn.example.org?transport=udp", "turns:turn.example.org"]


async def test_clients_find_where_calls_of_many_meet(town: Town) -> None:
    await town.relay("one", SETTINGS)
    alice = await town.user("alice@one")
    livekit = [{"type": "livekit", "livekit_service_url": "https://calls.example.org/livekit/jwt"}]
    for where in TRANSPORTS:
        assert await alice.calls("GET", where) == {"rtc_transports": livekit}
    known = await alice.calls("GET", "/.well-known/matrix/client", token="")
    assert known["org.matrix.msc4143.rtc_foci"] == livekit, "older clients look there"


async def test_without_a_server_for_calls_there_is_nothing_to_find(town: Town) -> None:
    alice = await town.user("alice@one")
    assert await alice.calls("GET", "voip/turnServer") == {}
    for where in TRANSPORTS:
        assert await alice.calls("GET", where) == {"rtc_transports": []}
