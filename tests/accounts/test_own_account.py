"""Devices, another password, and closing an account; each with the password once more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.db import Tx
from relay.errors import ApiError
from tests.accounts.front_door import PASSWORD, SERVER, House, Person

NEW_PASSWORD = "another good password"


async def test_devices_are_listed_named_and_deleted(house: House) -> None:
    alice = await house.person("alice", initial_device_display_name="Phone")
    laptop = await alice.another_device(initial_device_display_name="x" * 500)
    deleted: list[str] = []
    house.devices.on_device_deleted.append(lambda tx, user_id, device_id: deleted.append(device_id))
    path = f"/devices/{laptop.device_id}"
    assert len((await alice.says("GET", path)).body["display_name"]) == 100, "a long name is cut"
    assert (await alice.says("PUT", path, {"display_name": "Laptop"})).status == 200
    assert (await alice.says("GET", path)).body["display_name"] == "Laptop"
    assert (await alice.says("PUT", path, {"display_name": "x" * 101})).errcode == "M_INVALID_PARAM"
    assert (await alice.says("PUT", path, {})).status == 200, "nothing to change is no error"
    assert (await alice.says("GET", "/devices/NOWHERE")).status == 404
    assert (await alice.says("PUT", "/devices/NOWHERE", {"display_name": "x"})).status == 404

    wrong = await alice.confirms("DELETE", path, password="a wrong password")
    assert wrong.status == 401 and wrong.errcode == "M_FORBIDDEN", f"the password counts: {wrong.body}"
    assert wrong.body["completed"] == [], "what failed says what is done so far"
    assert await laptop.is_signed_in() and not deleted, "nothing happened so far"
    assert (await alice.confirms("DELETE", path)).status == 200
    assert not await laptop.is_signed_in() and deleted == [laptop.device_id], "the laptop is out, and keys were told"
    assert (await alice.confirms("DELETE", path)).status == 200, "to delete it once more is no error"


async def test_several_devices_are_deleted_at_once_and_what_was_confirmed_can_not_be_swapped(house: House) -> None:
    alice = await house.person("alice")
    one, two = await alice.another_device(), await alice.another_device()
    asked = await alice.says("POST", "/delete_devices", {"devices": [one.device_id]})
    session = asked.body["session"]
    only_session = await alice.says(
        "POST", "/delete_devices", {"devices": [two.device_id], "auth": {"session": session}}
    )
    assert only_session.status == 401 and only_session.body["session"] != session, "another list begins anew"
    reply = await alice.says("POST", "/delete_devices", {"devices": [one.device_id, "UNKNOWN"], "auth": alice.proof()})
    assert reply.status == 200, f"a proof without a session does as well: {reply.body}"
    assert not await one.is_signed_in() and await two.is_signed_in()
    assert (await alice.says("POST", "/delete_devices", {"auth": alice.proof()})).errcode == "M_MISSING_PARAM"


async def test_nobody_confirms_with_the_password_of_another(house: House) -> None:
    alice, mallory = await house.person("alice"), await house.person("mallory")
    asked = await alice.says("DELETE", f"/devices/{alice.device_id}", {})
    stolen = await mallory.says("DELETE", f"/devices/{alice.device_id}", {"auth": mallory.proof(asked.body["session"])})
    assert stolen.status == 200, "mallory confirms for herself, and has no such device"
    borrowed = await alice.says("DELETE", f"/devices/{alice.device_id}", {"auth": mallory.proof(asked.body["session"])})
    assert borrowed.status == 403 and borrowed.errcode == "M_FORBIDDEN", "another account's password is no proof"
    assert await alice.is_signed_in()


async def test_a_new_password_signs_out_the_other_devices_unless_asked_not_to(house: House) -> None:
    alice = await house.person("alice")
    other = await alice.another_device()
    weak = await alice.says("POST", "/account/password", {"new_password": "short"})
    assert weak.errcode == "M_WEAK_PASSWORD", "said before the password is asked for"
    reply = await alice.confirms("POST", "/account/password", {"new_password": NEW_PASSWORD, "logout_devices": False})
    assert reply.status == 200 and await other.is_signed_in(), "they stay where she says so"
    assert (await alice.tries_to_sign_in(PASSWORD)).status == 403, "the old password is worth nothing"
    body = {"new_password": PASSWORD}
    reply = await alice.confirms("POST", "/account/password", body, password=NEW_PASSWORD)
    assert reply.status == 200 and await alice.is_signed_in() and not await other.is_signed_in()
    assert (await alice.tries_to_sign_in(PASSWORD)).status == 200


async def test_a_closed_account_is_gone_for_good(house: House) -> None:
    left: list[str] = []
    erased: list[bool] = []
    failing = [RuntimeError("the other server is away")]

    async def leave_rooms(user_id: str) -> None:
        if failing:
            raise failing.pop()
        left.append(user_id)

    def note(tx: Tx, user_id: str, erase: bool) -> None:
        erased.append(erase)

    house.account.leave_rooms = leave_rooms
    house.account.on_deactivated.append(note)
    alice = await house.person("alice")
    phone = await alice.another_device()
    reply = await alice.confirms("POST", "/account/deactivate", {"erase": True})
    assert reply.status == 200 and reply.body == {"id_server_unbind_result": "success"}
    assert not await alice.is_signed_in() and not await phone.is_signed_in(), "all sessions ended"
    assert (await alice.tries_to_sign_in()).errcode == "M_FORBIDDEN", "and no new one begins"
    assert erased == [True] and await house.rows("SELECT 1 FROM devices") == []
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert left == [] and list(await house.users.leaving()) == [alice.user_id], "the rooms are tried again later"
    house.account._somebody_leaves.set()
    for _ in range(2_000):
        if left and not await house.users.leaving():
            break
        await asyncio.sleep(0.01)
    assert left == [alice.user_id] and not await house.users.leaving(), "then she has left them"
    taken = await house.visitor().says("GET", "/register/available?username=alice")
    assert taken.errcode == "M_USER_IN_USE", "her name is given to nobody else"
    (row,) = await house.rows("SELECT password_hash, admin FROM users")
    assert row == (None, 0), "no hash is kept"


async def test_the_operators_commands(house: House) -> None:
    commands = house.commands
    assert await commands["user.add"](localpart="Olga", password=PASSWORD, admin=True) == {
        "user_id": f"@olga:{SERVER}",
        "admin": True,
    }
    with pytest.raises(ApiError):
        await commands["user.add"](localpart="olga", password=PASSWORD)
    with pytest.raises(ApiError):
        await commands["user.add"](localpart="pia", password="short")
    olga = await Person(house, f"@olga:{SERVER}").signs_in()
    assert (await house.sessions.caller(olga.token or "")).admin, "she runs the server"
    await commands["user.admin"](user=olga.user_id, admin=False)
    assert house.sessions.known(olga.token or "") is None, "memory is asked to look again"
    assert not (await house.sessions.caller(olga.token or "")).admin, "now she does not"
    await commands["user.password"](user="olga", password=NEW_PASSWORD)
    assert not await olga.is_signed_in(), "a password from the operator ends every session"
    await olga.signs_in(NEW_PASSWORD)
    await commands["user.deactivate"](user="olga")
    (listed,) = await commands["user.list"]()
    assert listed["user_id"] == olga.user_id and listed["deactivated"] and not listed["admin"]
    for command, args in (
        ("user.password", {"password": PASSWORD}),
        ("user.admin", {"admin": True}),
        ("user.deactivate", {}),
    ):
        for name in ("olga", "nobody"):
            arguments: dict[str, Any] = {"user": name, **args}
            with pytest.raises(ApiError):
                await commands[command](**arguments)


async def test_there_are_no_addresses_to_an_account(house: House) -> None:
    alice = await house.person("alice")
    assert (await alice.says("GET", "/account/3pid")).body == {"threepids": []}
    asked = await house.visitor().says("POST", "/register/email/requestToken", {"email": "a@b.example"})
    assert asked.status == 400 and asked.errcode == "M_THREEPID_MEDIUM_NOT_SUPPORTED"
