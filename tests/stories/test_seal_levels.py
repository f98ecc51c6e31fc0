"""A stricter seal than the one that wrote the database: the relay lists what is readable and stops, `relay seal` redacts it."""

from __future__ import annotations

from relay import config
from tests.people import Person, ciphertext
from tests.town import Town

CANARY = "a canary that nobody may read"


async def told(person: Person) -> dict[str, bool]:
    features: dict[str, bool] = (await person.calls("GET", "/_matrix/client/versions"))["unstable_features"]
    return features


async def test_a_stricter_seal_is_kept_for_what_lies_there_already(town: Town) -> None:
    relay = await town.relay_apart("one", "privacy: {seal: open}\n")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    readable = await alice.sends(room, {"msgtype": "m.text", "body": CANARY}, type="m.room.message")
    sealed = await alice.sends(room, ciphertext())
    file = await alice.uploads(CANARY.encode() * 10)
    assert not (await told(alice))["io.element.e2ee_forced.private"], "apps may offer rooms without encryption"
    await relay.stop()

    file_of_settings = relay.folder / config.CONFIG_NAME
    file_of_settings.write_text(file_of_settings.read_text().replace("{seal: open}", "{seal: standard}"))
    status, said = await relay.command("serve")
    assert status == 1, "at the stricter level it does not start"
    assert readable in said and "relay seal" in said, f"it names the row and says what to do:\n{said}"
    assert CANARY not in said, "but not what stands in it"

    status, said = await relay.command("seal")
    assert status == 0 and "redacted" in said, said
    await relay.start()
    assert (await told(alice))["io.element.e2ee_forced.private"], "and now know that every room is encrypted"
    assert await bob.sees(sealed), "ciphertext is as it was"
    history = [event["event_id"] for event in await bob.history(room)]
    assert sealed in history and readable not in history, "what was readable is shown to nobody"
    refused = await bob.is_refused(bob.downloads(file))
    assert refused.status == 404, "nor is the file"
    assert await alice.sends(room), "the room goes on"
    status, said = await relay.command("audit")
    assert status == 0, f"every row has its rule again:\n{said}"
    await relay.stop()
    left = [str(path) for path in relay.files() if CANARY.encode() in path.read_bytes()]
    assert not left, "no byte of it is left on disk"


async def test_a_looser_seal_asks_nothing(town: Town) -> None:
    relay = await town.relay("one")
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    await relay.stop()
    file_of_settings = relay.folder / config.CONFIG_NAME
    file_of_settings.write_text(file_of_settings.read_text() + "privacy: {seal: open}\n")
    await relay.start()
    assert await alice.sends(room), "what was allowed stays allowed"
