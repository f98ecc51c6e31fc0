"""What was answered with 200 is there after SIGKILL and on a full disk, here and, after reconnection, on the other relay."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import aiohttp
import pytest

from tests.cramped import LEFT_BYTES, Disk, file_limit, small_disk
from tests.people import Person, Refused, ciphertext, path, until
from tests.town import Apart, Town

KILLS = 8
SENDERS = 4


async def sends_until_cut(person: Person, room: str, answered: dict[str, str], stop: asyncio.Event) -> None:
    """One message after the other, each tried again under its transaction ID until it is answered."""
    number = 0
    while not stop.is_set():
        txn = f"{person.name}-{person.device}-{len(answered)}-{number}"
        content = ciphertext()
        while not stop.is_set():
            try:
                event_id = await person.sends(room, content, txn=txn)
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.02)
                continue
            assert txn not in answered
            answered[txn] = event_id
            break
        number += 1


async def test_nothing_that_was_answered_is_lost_by_many_kills(town: Town) -> None:
    one = await town.relay_apart("one")
    await town.relay("two")
    people = await town.users("alice@one", "anna@one", "berta@one", "carla@one")
    dora = await town.user("dora@two")
    alice = people[0]
    room = await alice.creates_room(with_=[*people[1:], dora])
    answered: dict[str, str] = {}
    for _ in range(KILLS):
        stop = asyncio.Event()
        senders = [asyncio.create_task(sends_until_cut(person, room, answered, stop)) for person in people[:SENDERS]]
        await asyncio.sleep(0.25)
        await one.kill()
        await one.start()
        await asyncio.sleep(0.15)  # retries of what was under way
        stop.set()
        await asyncio.gather(*senders)
    assert len(answered) > 20 * KILLS / 8, "there was a load to speak of"
    assert len(set(answered.values())) == len(answered), "no event ID was given to two messages"
    history = [e for e in await alice.history(room, most=20_000, step=100) if e["type"] == "m.room.encrypted"]
    ids = [e["event_id"] for e in history]
    assert len(ids) == len(set(ids))
    missing = set(answered.values()) - set(ids)
    assert not missing, f"{len(missing)} of {len(answered)} answered messages are gone after the kills"
    texts = [e["content"]["ciphertext"] for e in history]
    assert len(texts) == len(set(texts)), "no transaction ID was sent twice"
    last = await alice.sends(room)
    town.clock.forward(minutes=10)
    wanted = {last, *answered.values()}
    theirs: set[str] = set()

    async def told() -> bool:
        # What had to wait for its predecessors when a kill broke a wire is tried again, also while she pages back.
        theirs.clear()
        theirs.update(e["event_id"] for e in await dora.history(room, most=20_000, step=100))
        return wanted <= theirs

    await until(told, within=60)
    assert last in theirs, "the other relay is told, after all"
    assert wanted <= theirs, f"{len(wanted - theirs)} of {len(wanted)} answered messages never reached the other relay"


async def test_type_sync_kill_send_sync(town: Town) -> None:
    one = await town.relay_apart("one")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    for _ in range(3):
        await bob.syncs()
        await alice.is_typing(room)
        await bob.syncs()
        await one.kill()
        await one.start()
        sent = await alice.sends(room)
        answer = await bob.syncs()
        shown = [e["event_id"] for e in answer["rooms"]["join"][room]["timeline"]["events"]]
        assert shown == [sent], "the message is there with the token from before the kill"


async def test_media_and_keys_that_were_answered_survive_a_kill(town: Town) -> None:
    one = await town.relay_apart("one")
    alice, bob = await town.users("alice@one", "bob@one")
    blob = os.urandom(200_000)
    uri = await alice.uploads(blob)
    await alice.calls("PUT", path("user", alice.id, "account_data", "com.example.x"), {"kept": True})
    await bob.tells_devices(
        "m.room_key_request",
        {alice.id: {alice.device: {"action": "request_cancellation", "request_id": "1", "requesting_device_id": "A"}}},
    )
    await one.kill()
    await one.start()
    _, got = await alice.downloads(uri)
    assert got == blob, "an upload that was answered is there"
    assert await alice.calls("GET", path("user", alice.id, "account_data", "com.example.x")) == {"kept": True}
    await alice.syncs()
    assert [m["type"] for m in alice.to_device] == ["m.room_key_request"], "and a message to a device is there, once"
    stood = alice.since
    await one.kill()
    await one.start()
    again = await alice.calls("GET", "sync", since=stood)
    assert not again.get("to_device", {}).get("events"), "what was taken does not come again"


@pytest.mark.parametrize("cramped", [small_disk, file_limit])
async def test_a_full_disk_refuses_writes_and_loses_nothing(
    town: Town, cramped: Callable[[Path], AbstractContextManager[Disk]]
) -> None:
    with cramped(town.folder / "one") as disk:
        one = await town.relay_apart("one")
        try:
            await lives_through_a_full_disk(town, one, disk)
        finally:
            await one.stop()


async def lives_through_a_full_disk(town: Town, one: Apart, disk: Disk) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = [await alice.sends(room) for _ in range(5)]
    disk.fills_up(one)
    refusals: list[Refused] = []
    for _ in range(400):
        try:
            sent.append(await alice.sends(room, ciphertext(30_000)))
        except Refused as refused:
            refusals.append(refused)
            if len(refusals) == 3:
                break
    assert refusals, "at some point nothing more fits"
    for refusal in refusals:
        assert 500 <= refusal.status < 600, f"a full disk is the server's fault: {refusal}"
        assert "disk" in refusal.text or "storage" in refusal.text, f"and she is told so: {refusal}"
    refused = await alice.is_refused(alice.uploads(os.urandom(2 * LEFT_BYTES)))
    assert 500 <= refused.status < 600, "an upload that does not fit is not answered as if it did"
    await bob.syncs()
    assert bob.has(sent[-1]), "reading and syncing go on"
    disk.has_room_again(one)
    again = await alice.sends(room)
    assert await bob.sees(again), "with room on the disk the relay recovers by itself"
    ids = {e["event_id"] for e in await bob.history(room, most=5000, step=100)}
    assert set(sent) <= ids, "nothing that was answered is lost"
    await one.kill()
    await one.start()
    ids = {e["event_id"] for e in await bob.history(room, most=5000, step=100)}
    assert {*sent, again} <= ids, "also after a kill"
    blob = os.urandom(1000)
    _, got = await bob.downloads(await alice.uploads(blob))
    assert got == blob, "files find room again as well"
