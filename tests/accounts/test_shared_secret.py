"""Accounts made with the operator's secret, as tools for Synapse make them."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from tests.accounts.front_door import PASSWORD, SERVER, House, Reply

PATH = "/_synapse/admin/v1/register"
SECRET = "a secret of the operator"


async def register(house: House, username: str, secret: str = SECRET, **more: Any) -> Reply:
    visitor = house.visitor()
    body = {
        "nonce": (await visitor.says("GET", PATH)).body["nonce"],
        "username": username,
        "password": PASSWORD,
        **more,
    }
    parts = [body["nonce"], username, body["password"], "admin" if more.get("admin") else "notadmin"]
    mac = hmac.digest(secret.encode(), "\0".join(parts).encode(), "sha1").hex()
    return await visitor.says("POST", PATH, {"mac": mac, **body})


@pytest_asyncio.fixture
async def closed_house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path, mode="closed", shared_secret=SECRET).opened() as opened:
        yield opened


async def test_who_knows_the_secret_makes_accounts(closed_house: House) -> None:
    house = closed_house
    made = await register(house, "alice", admin=True, device_id="PHONE")
    assert made.status == 200 and made.body["user_id"] == f"@alice:{SERVER}", f"though the door is closed: {made.body}"
    assert made.body["device_id"] == "PHONE" and made.body["access_token"], "and is signed in"
    assert (await house.users.get(f"@alice:{SERVER}")).admin, "as an administrator, since she asked for it"
    assert not (await house.users.get((await register(house, "bob")).body["user_id"])).admin, "others are none"
    taken = await register(house, "alice")
    assert (taken.status, taken.errcode) == (400, "M_USER_IN_USE"), "a name is given once"
    assert (await register(house, "carol", "another secret")).status == 403, "without the secret there is no account"
    assert (await register(house, "carol", mac="é")).status == 403, "whatever stands there"
    assert (await register(house, "carol", password="short")).errcode == "M_WEAK_PASSWORD", "passwords are as elsewhere"


async def test_a_nonce_serves_once_and_not_for_long(closed_house: House) -> None:
    house = closed_house
    made = await register(house, "alice", nonce="made up")
    assert (made.status, made.errcode) == (400, "M_INVALID_PARAM"), "a nonce is one that was given"
    visitor = house.visitor()
    nonce = (await visitor.says("GET", PATH)).body["nonce"]
    wrong = {"nonce": nonce, "username": "alice", "password": PASSWORD, "mac": "00"}
    assert (await visitor.says("POST", PATH, wrong)).status == 403
    assert (await visitor.says("POST", PATH, wrong)).status == 400, "nobody tries twice with one nonce"
    late = (await visitor.says("GET", PATH)).body["nonce"]
    house.clock.forward(minutes=2)
    assert (await visitor.says("POST", PATH, {**wrong, "nonce": late})).status == 400, "nor after a minute"


async def test_without_a_secret_there_is_no_such_way(house: House) -> None:
    for method in ("GET", "POST"):
        reply = await house.visitor().says(method, PATH, {})
        assert (reply.status, reply.errcode) == (404, "M_UNRECOGNIZED")
