"""Two relays as processes of their own, both killed again and again: what one answered reaches the other, once."""

from __future__ import annotations

import asyncio
import base64

import aiohttp

from tests.people import until
from tests.town import Town

ROUNDS = 4


async def test_messages_and_to_device_messages_cross_once_through_kills_on_both_sides(town: Town) -> None:
    town.log_level = "info"
    one = await town.relay_apart("one")
    two = await town.relay_apart("two")
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    sent: dict[str, str] = {}
    told: list[str] = []
    stop = asyncio.Event()

    async def talks() -> None:
        while not stop.is_set():
            number = len(sent)
            try:
                sent[f"k{number}"] = await alice.sends(room, txn=f"k{number}")
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.02)

    async def whispers() -> None:
        while not stop.is_set():
            mark = base64.b64encode(f"whisper number {len(told):08}".encode()).decode().rstrip("=")
            content = {
                "algorithm": "m.olm.v1.curve25519-aes-sha2",
                "sender_key": "k" * 43,
                "ciphertext": {"k" * 43: {"type": 0, "body": mark}},
            }
            try:
                await alice.tells_devices("m.room.encrypted", {bob.id: {bob.device: content}}, txn=f"w{len(told)}")
                told.append(mark)
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(talks()), asyncio.create_task(whispers())]
    for number in range(ROUNDS):
        await asyncio.sleep(0.3)
        house = (one, two)[number % 2]
        await house.kill()
        await house.start()
    await asyncio.sleep(0.3)
    stop.set()
    await asyncio.gather(*tasks)
    sent["last"] = await alice.sends(room)

    async def whispers_came() -> bool:
        try:
            await bob.syncs(timeout=500)
        except (aiohttp.ClientError, OSError):
            return False
        return len(bob.to_device) >= len(told)

    await until(whispers_came, within=25)
    marks = [next(iter(m["content"]["ciphertext"].values()))["body"] for m in bob.to_device]
    assert sorted(marks) == sorted(told), f"each of {len(told)} to-device messages arrives once, {len(marks)} came"
    assert marks == told, "and in order"
    theirs: list[str] = []

    async def all_came() -> bool:
        # What had to wait for its predecessors when a wire broke comes between newer messages, also while he pages back.
        history = await bob.history(room, most=20_000, step=100)
        theirs[:] = [event["event_id"] for event in history if event["type"] == "m.room.encrypted"]
        assert len(theirs) == len(set(theirs)), "each once"
        return set(sent.values()) <= set(theirs)

    await until(all_came, within=60)
    missing = set(sent.values()) - set(theirs)
    logs = "".join(f"\n{house.nickname}: …{house.log.read_text()[-4000:]}" for house in (one, two))
    assert not missing, f"of {len(sent)} messages {len(missing)} are missing{logs}"
