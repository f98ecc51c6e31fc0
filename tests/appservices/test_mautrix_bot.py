"""A mautrix-python bot as an application service talks encrypted with matrix-nio, at the default seal."""

from __future__ import annotations

from collections.abc import AsyncIterator

import nio
import pytest
import yaml

from tests.nio_people import Nio, good
from tests.people import until
from tests.town import Town

pytest.importorskip(
    "olm", reason="python-olm, which mautrix encrypts with, has no wheel for this Python: see pyproject.toml"
)
from tests.appservices.mautrix_bot import Bot

PATIENCE_SECONDS = 60.0


class Scene:
    def __init__(self, town: Town, *, signs_in: bool) -> None:
        self.town = town
        self.bot = Bot(signs_in=signs_in)
        self.everybody: list[Nio] = []

    async def begins(self) -> None:
        folder = self.town.folder / "one"
        folder.mkdir(mode=0o700)
        (folder / "echo.yaml").write_text(yaml.safe_dump(self.bot.registration()))
        self.house = await self.town.relay("one", "appservices: {registration_files: [echo.yaml]}\n")
        await self.bot.starts(self.house)

    async def device(self, address: str, name: str) -> Nio:
        person = await self.town.user(address)
        one = Nio(person, self.town.folder / "nio" / name, name)
        self.everybody.append(one)
        await one.signs_in()
        return one


@pytest.fixture(params=[False, True], ids=["with_a_device_of_its_own", "signed_in"])
async def scene(town: Town, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    scene = Scene(town, signs_in=request.param)
    await scene.begins()
    try:
        yield scene
    finally:
        for one in scene.everybody:
            await one.closes()
        await scene.bot.stops()


async def test_a_bot_talks_encrypted(scene: Scene) -> None:
    bot = scene.bot
    alice = await scene.device("alice@one", "ALICEPHONE")
    made = await alice.client.room_create(invite=[bot.id], preset=nio.RoomPreset.private_chat)
    room = good(made, nio.RoomCreateResponse).room_id
    assert await alice.notices(lambda: bot.id in getattr(alice.room(room), "users", {}), PATIENCE_SECONDS), (
        "the bot comes when invited"
    )
    assert await until(lambda: bot.rooms.is_encrypted(room), PATIENCE_SECONDS)
    before = await bot.counts()
    await alice.says(room, "good evening")
    assert await alice.hears("you said: good evening", PATIENCE_SECONDS), f"it reads and answers: {bot.failures}"
    assert bot.heard == [(alice.id, "good evening")]
    assert not alice.undecrypted, "everything could be read"
    assert any(who == bot.id for who, _ in alice.receipts), "it says that it has read"
    assert await bot.counts() >= before - 1

    # A ghost speaks with the bot's keys, as people of a bridged network do.
    ghost = await bot.brings(room, "tom", "Tom from elsewhere")
    await bot.says(room, "hello from another network", ghost)
    assert await alice.hears("hello from another network", PATIENCE_SECONDS)
    assert (ghost, "hello from another network") in alice.texts

    # Somebody of another server comes: the bot learns of her devices by transaction, and gives her its new keys.
    bob = await scene.device("bob@two", "BOBPHONE")
    good(await alice.client.room_invite(room, bob.id), nio.RoomInviteResponse)
    assert await bob.notices(lambda: room in bob.client.invited_rooms, PATIENCE_SECONDS)
    good(await bob.client.join(room), nio.JoinResponse)
    assert await until(lambda: bob.id in bot.rooms.members.get(room, {}), PATIENCE_SECONDS), (
        "the bot hears that he came"
    )
    await bob.notices(lambda: bot.id in getattr(bob.room(room), "users", {}), PATIENCE_SECONDS)
    await bob.says(room, "and who are you?")
    assert await bob.hears("you said: and who are you?", PATIENCE_SECONDS), f"across servers too: {bot.failures}"
    assert await alice.hears("you said: and who are you?", PATIENCE_SECONDS)
    await alice.client.room_typing(room, True)
    assert await until(lambda: any(e.type.t == "m.typing" for e in bot.ephemeral), PATIENCE_SECONDS), (
        "it sees who is typing"
    )
    assert not bot.failures

    written = b"".join(file.read_bytes() for file in scene.house.files())
    for text in (b"good evening", b"hello from another network", b"who are you"):
        assert text not in written, "nothing of it is readable on the relay's disk"
