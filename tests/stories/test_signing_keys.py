"""Signing keys over a relay's life: changed on purpose, lost, swapped by mistake, and vouched for by others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from relay.__main__ import main
from relay.own_keys import WrongKey
from relay.protocol.signing import SigningKey
from tests.town import House, Town, Within


async def relay(house: Within, *words: str) -> int:
    """A command on the folder of a relay that is stopped."""
    return await asyncio.to_thread(main, [*words, "--data", str(house.folder)])


async def published(town: Town, house: House) -> dict[str, Any]:
    async with town.http.get(f"https://127.0.0.1:{house.federation_port}/_matrix/key/v2/server", ssl=False) as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def test_a_new_key_is_taken_up_and_the_old_one_stays_good(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    one = await town.relay("one")
    room = await alice.creates_room(with_=bob, preset="public_chat")
    sent = await alice.sends(room)
    assert await bob.sees(sent)
    before = (await published(town, one))["verify_keys"]

    await one.stop()
    assert await relay(one, "key", "rotate") == 0
    assert "stays published" in capsys.readouterr().out
    await one.start()
    now = await published(town, one)
    assert list(now["old_verify_keys"]) == list(before) and list(now["verify_keys"]) != list(before)
    town.clock.forward(minutes=2)  # keys are not asked for again within a minute
    assert await bob.sees(await alice.sends(room)), "what is signed with the new key is taken"
    assert await alice.sees(await bob.sends(room))

    # Somebody who never met the old key: the room's whole state is signed with it.
    carol = await town.user("carol@three")
    await carol.joins(room, alice.server)
    assert (await carol.members(room))[alice.id] == "join", "what the old key signed is good"
    assert await carol.sees(await alice.sends(room))
    assert await one.command("key.list") and await relay(one, "key", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [key["until"] is None for key in listed] == [True, False]


async def test_a_key_is_not_swapped_without_a_word(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    one = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    assert await bob.sees(await alice.sends(room))
    await one.stop()
    key_file = one.folder / "signing.key"
    mine = key_file.read_text()
    key_file.write_text(SigningKey.generate("ed25519:other").dump() + "\n")
    with pytest.raises(WrongKey, match="relay key rotate --lost"):
        await one.start()
    await one.stop()
    assert await relay(one, "key", "rotate") == 1 and "Put your copy" in capsys.readouterr().err
    key_file.write_text(mine)
    await one.start()
    assert await bob.sees(await alice.sends(room)), "with the copy put back all is well"

    # Lost for good.
    await one.stop()
    assert await relay(one, "key", "rotate", "--lost") == 1 and "is not lost" in capsys.readouterr().err
    key_file.unlink()
    assert await relay(one, "key", "rotate", "--lost") == 0
    await one.start()
    town.clock.forward(minutes=2)
    assert await bob.sees(await alice.sends(room)), "others learn the new key"
    assert await alice.sees(await bob.sends(room))
    old = (await published(town, one))["old_verify_keys"]
    assert [value["key"] for value in old.values()] == [SigningKey.load(mine).verify_key_base64], (
        "known from the database"
    )


async def test_a_notary_vouches_for_a_server_that_is_gone(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob, preset="public_chat")
    assert await alice.sees(await bob.sends(room))
    await town.houses["two"].stop()
    notaries = f"[localhost:9, {alice.server}]"
    more = f"federation: {{extra_ca_file: ca.crt, request_timeout: 5s, key_timeout: 3s, key_notaries: {notaries}}}"
    for nickname, settings, there in (("three", "", False), ("four", more, True)):
        await town.relay(nickname, settings)
        late = await town.user(f"late@{nickname}")
        await late.joins(room, alice.server)
        assert (bob.id in await late.members(room)) == there, "only who has a notary can tell that Bob is there"


async def test_a_key_changes_while_people_talk(town: Town) -> None:
    one = await town.relay_apart("one")
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob, preset="public_chat")
    before = list((await published(town, one))["verify_keys"])
    assert await bob.sees(await alice.sends(room)) and await alice.sees(await bob.sends(room))
    code, said = await one.command("key", "rotate", "--lost")
    assert code == 1 and "not lost" in said, "a relay that runs has its key"
    code, said = await one.command("key", "rotate", "--json")
    changed = json.loads(said)
    assert code == 0 and changed["before"] == before[0]
    under_the_new = await alice.sends(room)
    now = await published(town, one)
    assert list(now["verify_keys"]) == [changed["key_id"]] and list(now["old_verify_keys"]) == before
    town.clock.forward(minutes=2)  # two asks nobody for keys twice within a minute
    assert await bob.sees(under_the_new), "requests and events with the new key are taken"
    assert await alice.sees(await bob.sends(room))
    carol = await town.user("carol@three")
    await carol.joins(room, alice.server)
    assert (await carol.members(room))[alice.id] == "join", "and what the old one signed is good"

    # Whatever lies in the file is not written over, and a restart goes on with the new key.
    key_file = one.folder / "signing.key"
    mine = key_file.read_text()
    key_file.write_text(SigningKey.generate("ed25519:other").dump() + "\n")
    code, said = await one.command("key", "rotate")
    assert code == 1 and "Move it away" in said
    key_file.write_text(mine)
    await one.restart()
    assert list((await published(town, one))["verify_keys"]) == [changed["key_id"]]
    assert await bob.sees(await alice.sends(room)) and await carol.sees(await alice.sends(room))
