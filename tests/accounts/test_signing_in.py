"""Signing in, being known, refreshing, and being signed out."""

from __future__ import annotations

import asyncio

import pytest

from relay.errors import UnknownToken
from relay.web import Caller
from tests.accounts.front_door import PASSWORD, SERVER, House, Person


async def test_somebody_signs_in_with_her_name_in_any_way_it_is_written(house: House) -> None:
    alice = await house.person("alice", initial_device_display_name="Phone")
    whoami = await alice.says("GET", "/account/whoami")
    assert whoami.body == {"user_id": f"@alice:{SERVER}", "device_id": alice.device_id, "is_guest": False}
    assert (await house.visitor().says("GET", "/login")).body == {"flows": [{"type": "m.login.password"}]}
    for name in ("alice", "Alice", f"@alice:{SERVER}", f"@Alice:{SERVER}"):
        identified = {
            "type": "m.login.password",
            "password": PASSWORD,
            "identifier": {"type": "m.id.user", "user": name},
        }
        reply = await house.visitor().says("POST", "/login", identified)
        assert reply.status == 200 and reply.body["user_id"] == alice.user_id, f"{name} means alice: {reply.body}"
        older = {"type": "m.login.password", "password": PASSWORD, "user": name}
        assert (await house.visitor().says("POST", "/login", older)).status == 200, (
            f"the older way of saying {name} works"
        )
    assert reply.body["well_known"] == {"m.homeserver": {"base_url": "https://matrix.one.example"}}
    assert "expires_in_ms" not in reply.body, "a client that can't refresh gets a token that lasts"


async def test_a_stranger_learns_nothing_from_a_failed_login(house: House) -> None:
    alice = await house.person("alice")
    wrong = await alice.tries_to_sign_in("wrong password")
    unknown = await Person(house, f"@nobody:{SERVER}").tries_to_sign_in()
    elsewhere = await Person(house, "@alice:two.example").tries_to_sign_in()
    assert wrong.status == 403 and wrong.errcode == "M_FORBIDDEN", "a wrong password is refused"
    assert wrong.body == unknown.body == elsewhere.body, "an unknown name looks the same"


@pytest.mark.parametrize(
    ("body", "errcode"),
    [
        ({}, "M_MISSING_PARAM"),
        ({"type": "m.login.sso"}, "M_UNKNOWN"),
        ({"type": 5}, "M_BAD_JSON"),
        ({"type": "m.login.password", "password": "x"}, "M_MISSING_PARAM"),
        ({"type": "m.login.password", "user": "alice"}, "M_MISSING_PARAM"),
        ({"type": "m.login.password", "user": "alice", "password": ["x"]}, "M_BAD_JSON"),
        ({"type": "m.login.password", "identifier": "alice", "password": "x"}, "M_BAD_JSON"),
        ({"type": "m.login.password", "identifier": {"type": "m.id.thirdparty"}, "password": "x"}, "M_FORBIDDEN"),
        ({"type": "m.login.password", "identifier": {"type": "m.id.user", "user": 1}, "password": "x"}, "M_BAD_JSON"),
        ({"type": "m.login.password", "user": "\u0000", "password": "x" * 5000}, "M_FORBIDDEN"),
        (b"{", "M_NOT_JSON"),
        (b"[]", "M_BAD_JSON"),
    ],
)
async def test_a_malformed_login_gets_a_clear_error(house: House, body: object, errcode: str) -> None:
    reply = await house.visitor().says("POST", "/login", body)
    assert 400 <= reply.status < 500 and reply.errcode == errcode, f"{body!r:.80} gives {errcode}: {reply.body}"


async def test_a_device_that_signs_in_again_keeps_its_name_and_loses_its_old_token(house: House) -> None:
    alice = await house.person("alice", device_id="TABLET", initial_device_display_name="Tablet")
    again = await alice.another_device(device_id="TABLET", initial_device_display_name="Another name")
    assert again.device_id == "TABLET", "the client chooses the device ID"
    assert not await alice.is_signed_in(), "the device has one session at a time"
    devices = (await again.says("GET", "/devices")).body["devices"]
    assert [device["display_name"] for device in devices] == ["Tablet"], "a known device keeps its name"


async def test_signing_out_ends_this_device_only_and_signing_out_everywhere_ends_all(house: House) -> None:
    alice = await house.person("alice")
    phone, tablet = await alice.another_device(), await alice.another_device()
    assert (await phone.says("POST", "/logout")).status == 200
    assert not await phone.is_signed_in() and await tablet.is_signed_in(), "only the phone is signed out"
    assert len((await tablet.says("GET", "/devices")).body["devices"]) == 2, "the phone is gone from the list"
    assert (await tablet.says("POST", "/logout/all", {})).status == 200
    assert not await tablet.is_signed_in() and not await alice.is_signed_in(), "everybody is signed out"
    refused = await alice.says("GET", "/account/whoami")
    assert refused.errcode == "M_UNKNOWN_TOKEN" and not refused.body.get("soft_logout"), "the client has to begin anew"


async def test_an_access_token_expires_and_is_refreshed(house: House) -> None:
    alice = await house.person("alice", refresh_token=True)
    old = alice.token
    assert await alice.is_signed_in(), "the token works at first"
    house.clock.forward(minutes=61)
    expired = await alice.says("GET", "/account/whoami")
    assert expired.status == 401 and expired.body["soft_logout"] is True, f"the session is still there: {expired.body}"
    reply = await house.visitor().says("POST", "/refresh", {"refresh_token": alice.refresh_token})
    assert reply.status == 200 and reply.body["expires_in_ms"] == 3_600_000, f"a new pair: {reply.body}"
    alice.takes(reply)
    assert await alice.is_signed_in() and alice.token != old, "the new token works"


async def test_a_refresh_whose_answer_got_lost_can_be_repeated(house: House) -> None:
    alice = await house.person("alice", refresh_token=True)
    first_refresh, first_token = alice.refresh_token, alice.token
    lost = await alice.says("POST", "/refresh", {"refresh_token": first_refresh})
    assert lost.status == 200
    assert await alice.is_signed_in(), "until the new token is used the old one lives"
    again = await alice.says("POST", "/refresh", {"refresh_token": first_refresh})
    assert again.status == 200, f"the old refresh token works until a new token is used: {again.body}"
    alice.takes(again)
    assert await alice.is_signed_in(), "the second pair works"
    used_before = await alice.says("POST", "/refresh", {"refresh_token": first_refresh})
    assert used_before.status == 401 and used_before.errcode == "M_UNKNOWN_TOKEN", "now the old refresh token is gone"
    assert (await alice.says("GET", "/account/whoami", token=first_token)).status == 401, (
        "and so is the old access token"
    )
    assert (await alice.says("GET", "/account/whoami", token=lost.body["access_token"])).status == 401, (
        "and the lost pair"
    )
    onward = await alice.says("POST", "/refresh", {"refresh_token": alice.refresh_token})
    follow = await alice.says("POST", "/refresh", {"refresh_token": onward.body["refresh_token"]})
    assert follow.status == 200, "using a new refresh token counts as a use of its pair"
    assert not await alice.is_signed_in(), "so the pair before it has ended"


async def test_a_client_that_refreshes_without_end_leaves_few_rows(house: House) -> None:
    alice = await house.person("alice", refresh_token=True)
    for _ in range(12):
        newest = await alice.says("POST", "/refresh", {"refresh_token": alice.refresh_token})
    assert len(await house.rows("SELECT 1 FROM session_tokens")) <= 10, "old pairs that were never used are dropped"
    alice.takes(newest)
    assert await alice.is_signed_in(), "the newest one works"
    assert len(await house.rows("SELECT 1 FROM session_tokens")) == 2, "and now it is the only one"


async def test_no_token_and_no_password_lies_on_disk(house: House) -> None:
    alice = await house.person("alice", refresh_token=True)
    await alice.is_signed_in()
    written = b"".join(file.read_bytes() for file in house.path.parent.iterdir())
    for secret in (alice.token, alice.refresh_token, PASSWORD):
        assert secret is not None and secret.encode() not in written, "only hashes are stored"
    assert b"127.0.0.1" not in written and b"aiohttp" not in written, "no address and no user agent is stored"
    ((stored,),) = await house.rows("SELECT password_hash FROM users")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$"), f"the hash costs what the design says: {stored[:32]}"


async def test_of_the_last_use_only_the_day_is_kept(house: House) -> None:
    alice = await house.person("alice")
    house.clock.forward(hours=49)
    await alice.is_signed_in()
    (device,) = (await alice.says("GET", "/devices")).body["devices"]
    day = 24 * 3_600_000
    assert device["last_seen_ts"] == house.clock.now() // day * day, f"the day of the last use: {device}"
    assert "last_seen_ip" not in device, "nobody knows from where"


async def test_a_session_that_ends_is_noticed_by_whoever_waits(house: House) -> None:
    alice = await house.person("alice")
    caller = await house.sessions.caller(alice.token or "")
    assert house.sessions.known(alice.token or "") == caller, "it is remembered"
    house.sessions.require_alive(caller)
    waiting = asyncio.create_task(house.bell.wait(alice.user_id, 30))
    await asyncio.sleep(0)
    await house.commands["user.deactivate"](user="alice")
    await asyncio.wait_for(waiting, 5)
    with pytest.raises(UnknownToken):
        house.sessions.require_alive(caller)
    assert house.sessions.known(alice.token or "") is None, "memory forgot it with the commit"
    assert not await alice.is_signed_in(), "and so did the database"


async def test_what_was_read_before_a_sign_out_is_not_remembered_after_it(house: House) -> None:
    alice = await house.person("alice")
    token = alice.token or ""
    asking = asyncio.create_task(house.sessions.caller(token))
    await asyncio.sleep(0)
    with house.db.write() as tx:
        house.sessions.end(tx, alice.user_id)
    await tx
    try:
        caller: Caller | None = await asking
    except UnknownToken:
        caller = None
    assert house.sessions.known(token) is None, f"whatever the reader saw ({caller}), it is not kept"


async def test_too_many_attempts_on_one_account_are_slowed_down(tmp_path) -> None:  # type: ignore[no-untyped-def]
    async with House(tmp_path, limited=True).opened() as house:
        await house.commands["user.add"](localpart="alice", password=PASSWORD)
        alice = Person(house, f"@alice:{SERVER}")
        replies = [await alice.tries_to_sign_in("guess number one") for _ in range(11)]
        assert [reply.status for reply in replies] == [403] * 10 + [429], "the eleventh guess has to wait"
        assert replies[-1].errcode == "M_LIMIT_EXCEEDED" and int(replies[-1].headers["Retry-After"]) >= 1
        house.clock.forward(minutes=2)
        assert (await alice.tries_to_sign_in()).status == 200, "after a while she gets in"
