"""New accounts: closed, with a token, or open; and what a name and a password have to look like."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relay.accounts import reauth
from relay.accounts.register import MAX_REQUEST_BYTES
from relay.errors import ApiError
from tests.accounts.front_door import PASSWORD, SERVER, House, Reply

TOKEN_STAGE = "m.login.registration_token"


async def registers(house: House, stage: dict[str, object], **body: object) -> Reply:
    """Goes through the two steps."""
    visitor = house.visitor()
    asked = await visitor.says("POST", "/register", body)
    if asked.status != 401:
        return asked
    return await visitor.says("POST", "/register", {**body, "auth": {**stage, "session": asked.body["session"]}})


async def test_an_open_relay_takes_anybody(house: House) -> None:
    visitor = house.visitor()
    assert (await visitor.says("GET", "/register/available?username=bob")).body == {"available": True}
    asked = await visitor.says("POST", "/register", {"username": "bob", "password": PASSWORD})
    assert asked.status == 401 and asked.body["flows"] == [{"stages": ["m.login.dummy"]}], f"a step first: {asked.body}"
    assert "errcode" not in asked.body, "nothing went wrong yet"
    body = {
        "username": "bob",
        "password": PASSWORD,
        "auth": {"type": "m.login.dummy", "session": asked.body["session"]},
    }
    reply = await visitor.says("POST", "/register", body)
    assert reply.status == 200 and reply.body["user_id"] == f"@bob:{SERVER}", f"bob is in: {reply.body}"
    visitor.takes(reply)
    assert await visitor.is_signed_in(), "and signed in at once"
    taken = await visitor.says("GET", "/register/available?username=Bob")
    assert taken.status == 400 and taken.errcode == "M_USER_IN_USE", "the name is taken now"


async def test_a_client_may_repeat_only_its_proof(house: House) -> None:
    visitor = house.visitor()
    asked = await visitor.says("POST", "/register", {"username": "carol", "password": PASSWORD, "auth": None})
    reply = await visitor.says(
        "POST", "/register", {"auth": {"type": "m.login.dummy", "session": asked.body["session"]}}
    )
    assert reply.body["user_id"] == f"@carol:{SERVER}", "the first request is remembered"


async def test_details_of_registering(house: House) -> None:
    dummy: dict[str, object] = {"type": "m.login.dummy"}
    silent = await registers(house, dummy, username="dave", password=PASSWORD, inhibit_login=True)
    assert silent.status == 200 and "access_token" not in silent.body and "device_id" not in silent.body
    chosen = await registers(house, dummy, username="Erin", password=PASSWORD, device_id="PHONE", refresh_token=True)
    assert chosen.body["user_id"] == f"@erin:{SERVER}" and chosen.body["device_id"] == "PHONE"
    assert chosen.body["expires_in_ms"] == 3_600_000 and chosen.body["refresh_token"]
    nameless = await registers(house, dummy, password=PASSWORD)
    assert nameless.status == 200 and nameless.body["user_id"].endswith(f":{SERVER}"), "the server finds a name"
    guest = await house.visitor().says("POST", "/register?kind=guest", {})
    assert guest.status == 403 and guest.errcode == "M_GUEST_ACCESS_FORBIDDEN", "there are no guests"
    house.doors.closed.add("register")
    refused = await registers(house, dummy, username="frank", password=PASSWORD)
    assert refused.status == 403 and refused.body["error"] == "Not today.", "the door is asked"


@pytest.mark.parametrize(
    ("body", "errcode"),
    [
        ({"username": "with space", "password": PASSWORD}, "M_INVALID_USERNAME"),
        ({"username": "", "password": PASSWORD}, "M_INVALID_USERNAME"),
        ({"username": "_bridge", "password": PASSWORD}, "M_INVALID_USERNAME"),
        ({"username": "x" * 300, "password": PASSWORD}, "M_INVALID_USERNAME"),
        ({"username": "émile", "password": PASSWORD}, "M_INVALID_USERNAME"),
        ({"username": "@eve:two.example", "password": PASSWORD}, "M_INVALID_USERNAME"),
        ({"username": "zoe", "password": "short"}, "M_WEAK_PASSWORD"),
        ({"username": "zoe", "password": "x" * 2000}, "M_INVALID_PARAM"),
        ({"username": "zoe"}, "M_MISSING_PARAM"),
        ({"username": 7, "password": PASSWORD}, "M_BAD_JSON"),
        ({"username": "zoe", "password": PASSWORD, "device_id": ""}, "M_INVALID_PARAM"),
    ],
)
async def test_what_is_wrong_with_a_new_account_is_said(house: House, body: dict[str, object], errcode: str) -> None:
    reply = await registers(house, {"type": "m.login.dummy"}, **body)
    assert reply.status == 400 and reply.errcode == errcode, f"{body!r:.60} gives {errcode}: {reply.body}"
    assert await house.rows("SELECT 1 FROM users") == [], "and no account came about"


async def test_two_people_want_the_same_name_at_the_same_time(house: House) -> None:
    dummy: dict[str, object] = {"type": "m.login.dummy"}
    replies = await asyncio.gather(*(registers(house, dummy, username="sam", password=PASSWORD) for _ in range(3)))
    assert sorted(reply.status for reply in replies) == [200, 400, 400], "one of them gets it"
    assert len(await house.rows("SELECT 1 FROM devices")) == 1, "the others left nothing behind"


async def test_a_closed_relay_says_who_makes_accounts(tmp_path: Path) -> None:
    async with House(tmp_path, "closed").opened() as house:
        reply = await house.visitor().says("POST", "/register", {"username": "bob", "password": PASSWORD})
        assert reply.status == 403 and reply.errcode == "M_FORBIDDEN" and "operator" in reply.body["error"]
        available = await house.visitor().says("GET", "/register/available?username=bob")
        assert available.status == 403, "and nobody tries out names there"


async def test_an_account_with_a_token(tmp_path: Path) -> None:
    async with House(tmp_path, "token").opened() as house:
        made = await house.commands["token.create"](uses=1, expires_ms=3_600_000)
        token = made["token"]
        validity = "/_matrix/client/v1/register/m.login.registration_token/validity?token="
        assert (await house.visitor().says("GET", validity + token)).body == {"valid": True}
        assert (await house.visitor().says("GET", validity + "nonsense")).body == {"valid": False}
        wrong = await registers(house, {"type": TOKEN_STAGE, "token": "nonsense"}, username="bob", password=PASSWORD)
        assert wrong.status == 401 and wrong.errcode == "M_FORBIDDEN" and wrong.body["session"], "she may try again"
        skipped = await registers(house, {"type": "m.login.dummy"}, username="bob", password=PASSWORD)
        assert skipped.status == 401, "another step does not do"
        right = await registers(house, {"type": TOKEN_STAGE, "token": token}, username="bob", password=PASSWORD)
        assert right.status == 200, f"with the token she gets in: {right.body}"
        again = await registers(house, {"type": TOKEN_STAGE, "token": token}, username="carol", password=PASSWORD)
        assert again.status == 401, "it was good for one account"
        assert await house.commands["token.list"]() == [{**made, "used": 1}], "the list says so"
        assert len(await house.rows("SELECT 1 FROM users")) == 1


async def test_who_looks_for_her_token_may_ask_what_is_left_for_as_long_as_she_likes(tmp_path: Path) -> None:
    """Element asks every two seconds; the clock of this house stands still, so that no attempt comes back."""
    async with House(tmp_path, "token", limited=True).opened() as house:
        token = (await house.commands["token.create"]())["token"]
        visitor = house.visitor()
        wanted = {"username": "grace", "password": PASSWORD}
        session = (await visitor.says("POST", "/register", wanted)).body["session"]
        asking = {**wanted, "auth": {"session": session}}
        for _ in range(12):
            assert (await visitor.says("POST", "/register", asking)).status == 401, "this tries nothing"
        for name in ("heidi", "ivan"):
            assert (await visitor.says("POST", "/register", {**asking, "username": name})).status == 401
        wrong = {"type": TOKEN_STAGE, "token": "a-guess", "session": session}
        assert (await visitor.says("POST", "/register", {**wanted, "auth": wrong})).errcode == "M_FORBIDDEN"
        again = await visitor.says("POST", "/register", asking)
        assert again.errcode == "M_FORBIDDEN" and "not valid" in again.body["error"], (
            "the next question does not wipe it out"
        )
        made = await visitor.says("POST", "/register", {**wanted, "auth": {**wrong, "token": token}})
        assert made.status == 200, f"the fifth attempt passes: {made.body}"
        for attempt in ({**asking, "username": "judy"}, {**wanted, "auth": wrong}, {}, asking):
            assert (await visitor.says("POST", "/register", attempt)).status == 429, (
                "names and tokens are not tried out"
            )


async def test_asking_what_is_left_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reauth, "MAX_ASKED", 3)
    async with House(tmp_path, "token", limited=True).opened() as house:
        visitor = house.visitor()
        session = (await visitor.says("POST", "/register", {})).body["session"]
        asking = {"auth": {"session": session}}
        answers = [(await visitor.says("POST", "/register", asking)).status for _ in range(15)]
        assert set(answers[:3]) == {401} and answers[-1] == 429, "then each counts as an attempt"
        large = await visitor.says("POST", "/register", {"username": "g" * MAX_REQUEST_BYTES})
        assert large.status == 413, "what waits in memory is small"


async def test_one_use_of_a_token_makes_one_account_however_many_try_at_once(tmp_path: Path) -> None:
    async with House(tmp_path, "token").opened() as house:
        token = (await house.commands["token.create"](token="once", uses=1))["token"]
        stage: dict[str, object] = {"type": TOKEN_STAGE, "token": token}
        tries = (registers(house, stage, username=f"user{number}", password=PASSWORD) for number in range(3))
        assert sorted(reply.status for reply in await asyncio.gather(*tries)) == [200, 401, 401]


async def test_tokens_end_and_are_revoked(tmp_path: Path) -> None:
    async with House(tmp_path, "token").opened() as house:
        await house.commands["token.create"](token="brief", expires_ms=60_000)
        await house.commands["token.create"](token="forever")
        house.clock.forward(minutes=2)
        assert not await house.tokens.valid("brief") and await house.tokens.valid("forever")
        await house.commands["token.revoke"](token="forever")
        assert not await house.tokens.valid("forever"), "revoked"
        with pytest.raises(ApiError):
            await house.commands["token.revoke"](token="forever")
        with pytest.raises(ApiError):
            await house.commands["token.create"](token="brief")
        with pytest.raises(ApiError):
            await house.commands["token.create"](token="not a token")
