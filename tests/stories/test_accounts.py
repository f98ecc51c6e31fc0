"""One relay, one person: making an account, signing in on devices, refreshing, and signing out."""

from __future__ import annotations

from tests.people import Refused
from tests.town import Town


async def test_a_newcomer_makes_an_account_and_signs_in_again(town: Town) -> None:
    alice = await town.user("alice@one")
    who = await alice.calls("GET", "account/whoami")
    assert who["user_id"] == alice.id, "whoever registers is signed in"
    first_device = alice.device
    phone = await alice.on_another_device(initial_device_display_name="phone")
    assert phone.device != first_device, "each sign-in is a device of its own"
    devices = await alice.calls("GET", "devices")
    assert {d["device_id"] for d in devices["devices"]} == {first_device, phone.device}, "she sees both of her devices"
    await phone.signs_out()
    refused = await phone.is_refused(phone.calls("GET", "account/whoami"))
    assert (refused.status, refused.errcode) == (401, "M_UNKNOWN_TOKEN"), "a token is worth nothing after signing out"
    assert (await alice.calls("GET", "account/whoami"))["device_id"] == first_device, "the other device stays signed in"


async def test_a_client_that_refreshes_gets_new_tokens_and_the_old_one_ends(town: Town) -> None:
    alice = await town.user("alice@one")
    phone = await alice.on_another_device(refresh_token=True)
    assert phone.refresh_token, "a client that asks for one gets a refresh token"
    old = phone.token
    got = await phone.calls("POST", "refresh", {"refresh_token": phone.refresh_token}, token="")
    phone.token = got["access_token"]
    assert phone.token != old, "refreshing gives a new access token"
    assert (await phone.calls("GET", "account/whoami"))["device_id"] == phone.device, (
        "the new token speaks for the same device"
    )
    refused = await phone.is_refused(phone.calls("GET", "account/whoami", token=old))
    assert refused.errcode == "M_UNKNOWN_TOKEN", "the old access token ends when the new one is used"
    town.clock.forward(hours=2)
    refused = await phone.is_refused(phone.calls("GET", "account/whoami"))
    assert refused.body.get("soft_logout") is True, "a token that ran out says that it can be refreshed"
    got = await phone.calls("POST", "refresh", {"refresh_token": got["refresh_token"]}, token="")
    assert (await phone.calls("GET", "account/whoami", token=got["access_token"]))["user_id"] == alice.id


async def test_signing_in_fails_as_the_standard_says(town: Town) -> None:
    alice = await town.user("alice@one")
    wrong = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "alice"}, "password": "guess"}
    refused = await alice.is_refused(alice.calls("POST", "login", wrong, token=""))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN"), "a wrong password is refused"
    refused = await alice.is_refused(alice.calls("GET", "account/whoami", token="nonsense"))
    assert (refused.status, refused.errcode) == (401, "M_UNKNOWN_TOKEN")
    try:
        await alice.calls("GET", "sync", token="")
    except Refused as refused:
        assert (refused.status, refused.errcode) == (401, "M_MISSING_TOKEN"), "without a token nobody is anybody"
    refused = await alice.is_refused(alice.registers())
    assert (refused.status, refused.errcode) == (400, "M_USER_IN_USE"), "a name is given once"
    flows = {f["type"] for f in (await alice.calls("GET", "login", token=""))["flows"]}
    assert "m.login.password" in flows, "a client learns how to sign in"


async def test_registration_is_closed_unless_the_operator_opens_it(town: Town) -> None:
    from tests.people import Person
    from tests.town import PASSWORD, Within

    house = Within(town, "closed", "")
    config = house.folder / "relay.yaml"
    config.write_text(config.read_text().replace("registration: {mode: open_to_everyone}\n", ""))
    town.houses["closed"] = house
    await house.start()
    mallory = Person(town.http, house.url, house.name, "mallory", PASSWORD)
    refused = await mallory.is_refused(mallory.registers())
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN"), "the door is closed by default"
    assert "operator" in refused.text, "she is told whom to ask"
    await house.command("user.add", localpart="mallory", password=PASSWORD)
    await mallory.signs_in()
    assert (await mallory.calls("GET", "account/whoami"))["user_id"] == mallory.id, "whom the operator adds can sign in"
