"""A room of many: joined in a moment, its members come later; and what clients see meanwhile."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from federation.client import Client
from federation.exchange import Reply
from relay import folder
from relay.errors import RemoteError
from relay.remote import JoinAnswer
from relay.rooms import afar, completion, whole_state
from tests import crowds
from tests.people import Person, until
from tests.town import Town, Within

GUESTS = 600
LAZY = '{"room":{"state":{"lazy_load_members":true}}}'
SLIDING = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"


async def crowded(town: Town, host: Person, house: Within) -> str:
    room = await host.creates_room(name="a large hall", preset="public_chat")
    assert house.server is not None
    key = folder.load_key(house.folder, house.server.settings)
    guests = [f"@guest{number}:{house.name}" for number in range(GUESTS)]
    await crowds.fill(house.server.rooms, key, room, guests, town.clock.now())
    return room


class Busy:
    """Requests of this relay for the whole state of a room are turned down by whoever is asked, until that is over."""

    def __init__(self, house: Within) -> None:
        assert house.server is not None
        connections = house.server.outbox._connections
        usual = connections.open
        self.refused = 0
        self.over = False

        async def busy(server: str, method: str, target: str, **rest: Any) -> Reply:
            if "/federation/v1/state/" in target and not self.over:
                self.refused += 1
                raise RemoteError(server, 503, "it is too busy")
            return await usual(server, method, target, **rest)

        connections.open = busy  # type: ignore[method-assign]


async def slides(person: Person, pos: str | None) -> Any:
    asked = {"timeline_limit": 5, "required_state": [["m.room.member", "*"]]}
    body = {"conn_id": "main", "lists": {"all": {"ranges": [[0, 9]], **asked}}}
    return await person.calls("POST", SLIDING, body, **({"pos": pos} if pos else {}))


async def test_a_large_room_is_joined_in_a_moment_and_known_later(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_state, "TOLD_EVERY", 200)
    told: list[str] = []
    log = SimpleNamespace(
        info=lambda said, **_: told.append(said), warning=lambda said, **_: None, error=lambda said, **_: None
    )
    for module in (completion, whole_state):
        monkeypatch.setattr(module, "log", log)
    one, two = await town.relay("one"), await town.relay("two")
    anna, ben = await town.users("anna@one", "ben@two")
    eager = await ben.on_another_device()
    room = await crowded(town, anna, one)
    busy = Busy(two)
    await ben.syncs(filter=LAZY)
    await eager.syncs()
    await ben.joins(room, one.name)
    assert busy.refused, "the members are fetched, but that fails for now"

    # In the room, without its members.
    answer = await ben.syncs(filter=LAZY)
    assert room in ben.rooms, "he is in it"
    assert ben.membership(room, ben) == "join"
    assert ben.state[room]["m.room.name", ""]["content"]["name"] == "a large hall", (
        "all of the room but its members is there"
    )
    assert "m.joined_member_count" not in answer["rooms"]["join"][room]["summary"], (
        "how many there are is not known yet"
    )
    await eager.syncs()
    assert room not in eager.rooms, "whoever wants all members is told of the room when they are known"
    slid = await slides(ben, None)
    assert slid["rooms"][room]["initial"] and "joined_count" not in slid["rooms"][room]
    said = await anna.sends(room)
    assert await until(lambda: sees_lazily(ben, said)), "what is said in it arrives"
    assert ben.membership(room, anna) == "join", "with the name of the one who speaks"
    reply = await ben.sends(room)
    assert await anna.sees(reply), "and he is heard"
    await anna.has_read(room, reply)
    assert await until(lambda: read_lazily(ben, room, anna, reply)), "that she read it is told too"
    assert (await ben.reads(room, "m.room.name"))["name"] == "a large hall"
    ben.devices_changed.clear()

    # Another attempt is made later, and then everybody is known.
    busy.over = True
    town.clock.forward(minutes=1)
    assert await eager.notices(lambda: room in eager.rooms, within=30), "now the others hear of it"
    assert len(eager.state[room]) > GUESTS, "with everybody in it"
    for words in ("members are being fetched", "state is coming in", "members are known"):
        assert words in " ".join(told), "the operator reads how far it has come"
    members = await ben.members(room)
    assert len(members) == GUESTS + 2 and set(members.values()) == {"join"}
    answer = await ben.syncs(filter=LAZY)
    summary = answer["rooms"]["join"][room]["summary"]
    assert summary["m.joined_member_count"] == GUESTS + 2, "the count is told"
    assert anna.id in ben.devices_changed, "and whose keys there are to be asked for"
    assert len(answer["rooms"]["join"][room]["state"]["events"]) < 5, (
        "but nobody gets six hundred names he did not ask for"
    )
    slid = await slides(ben, slid["pos"])
    assert slid["rooms"][room]["initial"], "who asked for all of them gets them"
    assert len(slid["rooms"][room]["required_state"]) > GUESTS
    assert slid["rooms"][room]["joined_count"] == GUESTS + 2
    for speaker, hearer in ((anna, ben), (ben, anna)):
        event = await speaker.sends(room)
        assert await hearer.sees(event), "they go on talking"
    assert {e["event_id"] for e in await ben.history(room)} >= {said, reply}, "and nothing of the first moments is lost"


async def sees_lazily(person: Person, event_id: str) -> bool:
    await person.syncs(filter=LAZY)
    return person.has(event_id) is not None


async def read_lazily(person: Person, room: str, reader: Person, event_id: str) -> bool:
    await person.syncs(filter=LAZY)
    return person.receipts[room].get((reader.id, "m.read")) == event_id


def unnamed(monkeypatch: pytest.MonkeyPatch, server: str, *, besides: str) -> None:
    """Small rooms are joined in part, too, and whoever lets somebody in names only itself."""
    monkeypatch.setattr(afar, "MANY_MEMBERS", 2)
    send_join = Client.send_join

    async def forgetful(*ask: Any, **how: Any) -> JoinAnswer:
        answer = await send_join(*ask, **how)
        if not answer.members_omitted:
            return answer
        assert server in answer.servers
        return dataclasses.replace(answer, servers=[besides])

    monkeypatch.setattr(Client, "send_join", forgetful)


async def test_servers_that_come_to_light_get_what_was_said_before(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lets us in may leave a server out of those that it names: until the members are known, nobody here tells it
    anything."""
    one, two, three = [await town.relay(name) for name in ("one", "two", "three")]
    anna, ben, carl = await town.users("anna@one", "ben@two", "carl@three")
    room = await anna.creates_room(name="a large hall", preset="public_chat")
    await carl.joins(room, one.name)
    assert await anna.notices(lambda: anna.membership(room, carl) == "join")
    unnamed(monkeypatch, three.name, besides=one.name)
    busy = Busy(two)
    await ben.syncs(filter=LAZY)
    await ben.joins(room, one.name)
    assert await carl.notices(lambda: carl.membership(room, ben) == "join"), "carl's relay hears of him by the other"
    phone = await ben.on_another_device()
    await phone.calls("POST", "/_matrix/client/v3/keys/upload", {"device_keys": device_keys(phone)})
    said = [await ben.sends(room), await phone.sends(room)]
    assert await anna.sees(said[-1])
    await carl.syncs()
    assert busy.refused and not carl.has(said[0]), "of a server that nobody named nothing is known yet"
    carl.devices_changed.clear()
    busy.over = True
    town.clock.forward(minutes=1)
    assert await carl.sees(said[0], within=30) and await carl.sees(said[1]), "then it gets what was said meanwhile"
    assert await carl.notices(lambda: ben.id in carl.devices_changed), "and that somebody has another device"
    queried = await carl.calls("POST", "/_matrix/client/v3/keys/query", {"device_keys": {ben.id: []}})
    assert phone.device in queried["device_keys"][ben.id], "whose keys are to be had"


async def test_a_server_that_left_before_it_came_to_light_hears_of_new_devices(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares another room with him, and would go on with the devices that he had."""
    one, two, three = [await town.relay(name) for name in ("one", "two", "three")]
    anna, ben, carl = await town.users("anna@one", "ben@two", "carl@three")
    room = await anna.creates_room(name="a large hall", preset="public_chat")
    await carl.joins(room, one.name)
    assert await anna.notices(lambda: anna.membership(room, carl) == "join")
    busy = Busy(two)
    unnamed(monkeypatch, three.name, besides=one.name)
    await ben.joins(room, one.name)
    assert await carl.notices(lambda: carl.membership(room, ben) == "join")
    asked: dict[str, Any] = {"device_keys": {ben.id: []}}
    assert not (await carl.calls("POST", "/_matrix/client/v3/keys/query", asked))["device_keys"].get(ben.id)
    phone = await ben.on_another_device()
    await phone.calls("POST", "/_matrix/client/v3/keys/upload", {"device_keys": device_keys(phone)})
    other = await ben.creates_room(preset="public_chat")
    await carl.joins(other, two.name)
    await anna.kicks(room, carl)
    assert await until(lambda: left_lazily(ben, room, carl)), "it is heard, though nobody knew that he was there"
    await carl.syncs()
    carl.devices_changed.clear()
    busy.over = True
    town.clock.forward(minutes=1)
    assert await carl.notices(lambda: ben.id in carl.devices_changed, within=30)
    queried = await carl.calls("POST", "/_matrix/client/v3/keys/query", asked)
    assert phone.device in queried["device_keys"][ben.id]


async def left_lazily(person: Person, room: str, other: Person) -> bool:
    await person.syncs(filter=LAZY)
    return person.membership(room, other) == "leave"


def device_keys(person: Person) -> Any:
    keys = {f"{kind}:{person.device}": "A" * 43 for kind in ("curve25519", "ed25519")}
    return {
        "user_id": person.id,
        "device_id": person.device,
        "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
        "keys": keys,
        "signatures": {person.id: {f"ed25519:{person.device}": "A" * 86}},
    }
