"""Whose key is whose: fetched once, kept, judged by time, and never believed without a signature."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from yarl import URL

from federation.kept_keys import KeptKeys
from federation.server_keys import BadKeys, OldKey, own_answer, read
from relay.clock import DAY, HOUR, MINUTE, SECOND
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey, sign_json
from relay.protocol.versions import VERSIONS
from tests.federation.neighbours import Neighbour, two_servers

NOW = 1_700_000_000_000
KEY = SigningKey.generate("a")


def made(
    server: Neighbour, *, version: str = "11", when: int | None = None, key: SigningKey | None = None, **more: Any
) -> Event:
    return events.build(
        VERSIONS[version],
        room_id="!r:one.test",
        type=more.pop("type", "m.room.encrypted"),
        sender=f"@bob:{server.name}",
        content=more.pop("content", {}),
        prev_events=[],
        auth_events=[],
        depth=1,
        origin_server_ts=server.clock.now() if when is None else when,
        server_name=server.name,
        key=key or server.key,
        **more,
    )


def test_an_answer_is_read_and_judged() -> None:
    old = OldKey("ed25519:old", SigningKey.generate("old").verify_key_base64, NOW - DAY)
    answer = own_answer("s.test", KEY, [old], NOW)
    keys = read("s.test", answer, NOW)
    assert keys[KEY.key_id].valid_until == NOW + DAY, "what we publish is valid for a day"
    assert keys["ed25519:old"].expired and not keys["ed25519:old"].valid_at(NOW, strict=False), (
        "an old key is known as old"
    )
    assert keys["ed25519:old"].valid_at(NOW - 2 * DAY, strict=True), "and good for what it signed in its time"
    long = sign_json({**answer, "signatures": {}, "valid_until_ts": NOW + 365 * DAY}, "s.test", KEY)
    assert read("s.test", long, NOW)[KEY.key_id].valid_until == NOW + 7 * DAY, "no key is valid for more than a week"
    unsigned_form = {**long, "unsigned": {"x": 1}}
    assert read("s.test", unsigned_form, NOW), "what is unsigned does not matter"


@pytest.mark.parametrize(
    "change",
    [
        {"server_name": "t.test"},
        {"valid_until_ts": "soon"},
        {"valid_until_ts": True},
        {"verify_keys": []},
        {"verify_keys": {}},
        {"verify_keys": {"ed25519:a": {"key": "short"}}},
        {"verify_keys": {f"ed25519:{n}": {"key": KEY.verify_key_base64} for n in range(100)}},
        {"old_verify_keys": 3},
        {"signatures": {}},
        {"more": "than was signed"},
    ],
)
def test_answers_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadKeys):
        read("s.test", {**own_answer("s.test", KEY, (), NOW), **change}, NOW)


async def test_keys_are_fetched_once_and_kept(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        count = 0
        fetch = one.keyring._fetch_keys

        async def counted(server: str) -> dict[str, Any]:
            nonlocal count
            count += 1
            await asyncio.sleep(0.02)
            return await fetch(server)

        one.keyring._fetch_keys = counted
        several = [made(two) for _ in range(5)]
        answers = await asyncio.gather(
            *(one.keyring.verified([event]) for event in several), one.keyring.verified(several)
        )
        assert all(all(answer) for answer in answers), "all are signed"
        assert count == 1, "and one fetch was enough for all who asked"

        await two.listening.stop()
        await one.stop()
        await one.start()
        assert await one.keyring.verified([made(two)]) == [True], (
            "the keys outlive a restart, and their server's absence"
        )


async def test_what_is_verified(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        good = made(two)
        other_key = made(two, key=SigningKey.generate("unknown"))
        forged = made(two, key=SigningKey.generate("one"))
        pdu = {**made(two).pdu, "depth": 7}
        tampered = events.parse(pdu, VERSIONS["11"])
        bare = events.parse({**good.pdu, "signatures": {}}, VERSIONS["11"])
        policy = events.co_sign(made(two), two.name, SigningKey.generate("policy_server"))
        mine = one.ledger.build("!r:one.test", "ours")
        asked = [good, other_key, forged, tampered, bare, policy, mine]
        expected = [True, False, False, False, False, True, True]
        assert await one.keyring.verified(asked) == expected, "each event by itself"
        assert await one.keyring.verified(asked[:2]) == expected[:2], "few are verified at once"
        many = asked * 40
        assert await one.keyring.verified(many) == expected * 40, "many in threads, in the same order"

        join = {"membership": "join", "join_authorised_via_users_server": f"@alice:{one.name}"}
        restricted = made(two, type="m.room.member", state_key=f"@bob:{two.name}", content=join)
        both = events.co_sign(restricted, one.name, one.key)
        assert await one.keyring.verified([restricted, both]) == [False, True], "a restricted join needs both servers"


async def test_the_validity_of_keys_counts_from_version_5_on(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        far = two.clock.now() + 30 * DAY
        assert await one.keyring.verified([made(two, when=far)]) == [False], (
            "signed for a time in which the key is not valid"
        )
        assert await one.keyring.verified([made(two, when=far, version="4")]) == [True], "older versions don't ask"

        one.clock.forward(10 * DAY)
        two.clock.forward(10 * DAY)
        assert await one.keyring.verified([made(two)]) == [True], "a key that is still in use is asked for again"

        old_key = two.key
        event = made(two)
        two.keyring._key = SigningKey.generate("two")
        two.keyring._old_keys = (OldKey(old_key.key_id, old_key.verify_key_base64, two.clock.now() + SECOND),)
        one.clock.forward(2 * DAY)
        two.clock.forward(2 * DAY)
        assert await one.keyring.current_key(two.name, old_key.key_id) is None, (
            "a key that was put away signs no requests"
        )
        later = made(two, key=old_key)
        assert await one.keyring.verified([event, later]) == [True, False], (
            "nor events after its time, only those before"
        )
        oldest = made(two, key=old_key, version="3")
        assert await one.keyring.verified([oldest]) == [False], "not even in old room versions"


async def test_a_server_without_keys_is_not_asked_over_and_over(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        await two.listening.stop()
        count = 0
        fetch = one.keyring._fetch_keys

        async def counted(server: str) -> dict[str, Any]:
            nonlocal count
            count += 1
            return await fetch(server)

        one.keyring._fetch_keys = counted
        for _ in range(5):
            assert await one.keyring.verified([made(two)]) == [False], "without keys nothing is believed"
        assert count == 1, "one attempt was made"
        await two.stop()
        await two.start()
        one.clock.forward(HOUR)
        assert await one.keyring.verified([made(two)]) == [True], "and another after a while"

        before = count
        for _ in range(5):
            await one.keyring.verified([made(two, key=SigningKey.generate("made_up"))])
        one.clock.forward(2 * MINUTE)
        await one.keyring.verified([made(two, key=SigningKey.generate("made_up"))])
        assert count <= before + 1, "a made-up key ID is no reason to ask every time"


async def test_a_clock_that_was_set_back_keeps_nobody_from_asking(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.clock.forward(5 * HOUR)
        await two.listening.stop()
        assert await one.keyring.verified([made(two)]) == [False]
        one.clock.forward(-5 * HOUR)
        await two.stop()
        await two.start()
        assert await one.keyring.verified([made(two)]) == [True], "a failure that lies ahead says nothing"
        one.keyring._servers[two.name].fetched_at += 5 * HOUR
        assert one.keyring._may_fetch(two.name), "nor does a time at which they were fetched"


async def test_objects_are_verified_too(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        signed = sign_json({"a": 1}, two.name, two.key)
        assert await one.client.verified_json(two.name, signed), "it is signed"
        assert not await one.client.verified_json(two.name, {**signed, "a": 2}), "it was changed"
        assert not await one.client.verified_json(one.name, signed), "another server did not sign it"
        assert not await one.client.verified_json(two.name, {"signatures": 5}), "nobody did"


async def test_the_notary_speaks_for_servers_that_are_gone(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        await one.keyring.current_key(two.name, two.key.key_id)
        await two.listening.stop()
        one.clock.forward(3 * DAY)
        path = f"/_matrix/key/v2/query/{two.name}"
        url = f"https://one.test:{one.listening.port}{path}"

        answer = await two.outward.request("GET", URL(url), timeout=5.0)
        body = orjson.loads(await answer.read())
        answer.release()
        assert len(body["server_keys"]) == 1, "what is kept is given on"
        keys = body["server_keys"][0]
        assert set(keys["signatures"]) == {one.name, two.name}, "signed by the server itself and by the notary"
        assert read(two.name, keys, NOW), "and still what the server had said"
        asked = {"server_keys": {two.name: {}, one.name: {}, "nobody.test:1": {}}}

        answer = await two.outward.request(
            "POST",
            URL(f"https://one.test:{one.listening.port}/_matrix/key/v2/query"),
            body=orjson.dumps(asked),
            timeout=5.0,
        )
        names = {entry["server_name"] for entry in orjson.loads(await answer.read())["server_keys"]}
        answer.release()
        assert names == {one.name, two.name}, "who never answered is left out"
        many = {"server_keys": {f"s{n}.test": {} for n in range(100)}}
        answer = await two.outward.request(
            "POST",
            URL(f"https://one.test:{one.listening.port}/_matrix/key/v2/query"),
            body=orjson.dumps(many),
            timeout=5.0,
        )
        assert answer.status == 413, "a notary does not ask half the world for one stranger"
        answer.release()


async def test_the_notary_remembers_what_a_server_said_of_a_key_that_it_names_no_longer(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.keyring._kept = KeptKeys(one.name, one.key, one.db)
        gone, first, second = "gone.test:1", SigningKey.generate("first"), SigningKey.generate("second")
        said = first

        async def says(server: str) -> dict[str, Any]:
            return own_answer(server, said, [], one.clock.now())

        one.keyring._fetch_keys = says

        async def asked_for(*key_ids: str) -> list[dict[str, Any]]:
            answer = await two.outward.request(
                "POST",
                URL(f"https://one.test:{one.listening.port}/_matrix/key/v2/query"),
                body=orjson.dumps({"server_keys": {gone: {key_id: {} for key_id in key_ids}}}),
                timeout=5.0,
            )
            given: list[dict[str, Any]] = orjson.loads(await answer.read())["server_keys"]
            answer.release()
            return given

        assert [set(one["verify_keys"]) for one in await asked_for(first.key_id)] == [{first.key_id}]
        said = second
        one.clock.forward(3 * DAY)
        given = await asked_for(first.key_id, second.key_id)
        assert [set(one["verify_keys"]) for one in given] == [{second.key_id}, {first.key_id}], "both are given on"
        for answer in given:
            assert set(answer["signatures"]) == {gone, one.name}, "each as the server signed it, and signed by us"
            assert read(gone, answer, one.clock.now())
        assert [set(one["verify_keys"]) for one in await asked_for()] == [{second.key_id}], (
            "who asks for none gets what holds"
        )


async def test_a_notary_is_believed_only_under_its_own_signature(tmp_path: Path) -> None:
    """Whatever a list of keys says, it is signed with a key of the list itself: anybody could have made it."""
    async with two_servers(tmp_path) as (one, two):
        gone, key = "gone.test:1", SigningKey.generate("ed25519:gone")
        made: dict[str, Any] = {
            "server_name": gone,
            "valid_until_ts": one.clock.now() + DAY,
            "verify_keys": {key.key_id: {"key": key.verify_key_base64}},
            "old_verify_keys": {},
        }
        made = sign_json(made, gone, key)
        told: list[dict[str, Any]] = []

        async def asks(notary: str, server: str) -> dict[str, Any]:
            assert (notary, server) == (two.name, gone)
            return {"server_keys": told}

        one.keyring._notaries, one.keyring._ask_notary = (two.name,), asks
        stranger = SigningKey.generate(two.key.key_id)
        for wrong in (
            [],
            [made],
            [sign_json(made, two.name, stranger)],
            [sign_json({**made, "server_name": "x.test"}, two.name, two.key)],
        ):
            told[:] = wrong
            one.clock.forward(HOUR)
            assert await one.keyring.current_key(gone, key.key_id) is None
        told[:] = [sign_json(made, two.name, two.key)]
        one.clock.forward(HOUR)
        assert await one.keyring.current_key(gone, key.key_id) == key.verify_key

        after, put_away = SigningKey.generate("ed25519:after"), one.clock.now()
        later = own_answer(gone, after, [OldKey(key.key_id, key.verify_key_base64, put_away)], put_away + 4 * DAY)
        former, latest = told[0], sign_json(later, two.name, two.key)
        for lists in ([former, latest], [former]):
            told[:] = lists
            one.clock.forward(2 * HOUR)
            assert await one.keyring.current_key(gone, after.key_id) == after.verify_key
            assert await one.keyring.current_key(gone, key.key_id) is None, "an older list does not bring a key back"
