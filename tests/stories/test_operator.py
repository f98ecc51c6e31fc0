"""The operator's command line, while people are connected."""

from __future__ import annotations

import asyncio
import json

from tests.people import Refused
from tests.town import PASSWORD, Town


async def test_an_account_is_closed_from_the_command_line_while_she_syncs(town: Town) -> None:
    one = await town.relay_apart("one")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    await alice.syncs()
    waiting = asyncio.create_task(bob.is_refused(bob.syncs(timeout=60000)))
    await asyncio.sleep(0.3)
    status, said = await one.command("user", "deactivate", "bob")
    assert status == 0, said
    refused = await asyncio.wait_for(waiting, 10)
    assert (refused.status, refused.errcode) == (401, "M_UNKNOWN_TOKEN"), (
        "she is told at once, in the middle of her sync"
    )
    refused = await bob.is_refused(bob.sends(room))
    assert refused.status == 401, "and can do nothing more"
    refused = await bob.is_refused(bob.signs_in())
    assert refused.status == 403, "nor sign in again"
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave"), "she left her rooms"


async def test_a_second_relay_on_the_same_folder_is_refused(town: Town) -> None:
    one = await town.relay_apart("one")
    alice = await town.user("alice@one")
    status, said = await asyncio.wait_for(one.command("serve"), 30)
    assert status != 0 and "in use" in said, f"the second says why it does not start: {said}"
    assert (await alice.calls("GET", "account/whoami"))["user_id"] == alice.id, "the first goes on"


async def test_the_operator_adds_and_lists_people_while_the_relay_runs_and_after(town: Town) -> None:
    one = await town.relay_apart("one")
    status, said = await one.command("user", "add", "carol", "--password-stdin", given=PASSWORD + "\n")
    assert status == 0, said
    status, said = await one.command("user", "list", "--json")
    assert status == 0 and "carol" in json.dumps(json.loads(said)), said
    await one.stop()
    status, said = await one.command("user", "list", "--json")
    assert status == 0 and "carol" in said, "without a running relay the command opens the folder itself"
    status, said = await one.command("check")
    assert status == 0, said


async def test_a_registration_token_opens_the_door_once(town: Town) -> None:
    from tests.people import Person
    from tests.town import Apart

    house = town.houses["one"] = Apart(town, "one", "")
    config = house.folder / "relay.yaml"
    config.write_text(config.read_text().replace("{mode: open_to_everyone}", "{mode: token}"))
    await house.start()
    status, said = await house.command("token", "create", "--uses", "1", "--json")
    assert status == 0, said
    token = json.loads(said)["token"]
    alice = Person(town.http, house.url, house.name, "alice", PASSWORD)
    body = {"username": "alice", "password": PASSWORD}
    try:
        await alice.calls("POST", "register", body, token="")
        raise AssertionError("without a token the door is closed")
    except Refused as refused:
        assert refused.status == 401 and {"stages": ["m.login.registration_token"]} in refused.body["flows"]
        auth = {"type": "m.login.registration_token", "token": token, "session": refused.body["session"]}
    made = await alice.calls("POST", "register", {**body, "auth": auth}, token="")
    assert made["user_id"] == alice.id, "with it, it opens"
    bob = Person(town.http, house.url, house.name, "bob", PASSWORD)
    refused = await bob.is_refused(bob.registers(auth=auth))
    assert refused.status in (401, 403), "once"
