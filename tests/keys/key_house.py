"""A relay with accounts, real rooms and everything about encryption keys, spoken to over HTTP; other servers are told
what to answer. `Person.syncs` gathers what the parts of `relay/keys` would put into an answer of /sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from relay.departures import Departures
from relay.errors import RemoteError
from relay.keys.backup import KeyBackup
from relay.keys.cross_signing import CrossSigning
from relay.keys.device_keys import DeviceKeys
from relay.keys.device_lists import DeviceLists
from relay.keys.one_time_keys import OneTimeKeys
from relay.keys.published import Published
from relay.keys.remote_lists import RemoteLists
from relay.keys.to_device import ToDevice
from relay.keys.user_signatures import UserSignatures
from relay.limits import Limits
from relay.part import SyncAsk, SyncShare
from relay.protocol.canonical import encode
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.rooms.append import Appender
from relay.rooms.create import Creator
from relay.rooms.room import CREATE
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.web import Web
from tests.accounts.front_door import PASSWORD, SERVER, House, Person

ELSEWHERE = "two.example"
BOB = f"@bob:{ELSEWHERE}"
OLM = "m.olm.v1.curve25519-aes-sha2"


class Elsewhere:
    """Another server, as `relay/remote.py` sees it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.down = False
        self.devices: dict[str, dict[str, Any]] = {}
        self.one_time_keys: dict[str, Any] = {}
        self.on_asked: Any = None

    async def _answers(self, server: str, question: str) -> None:
        self.asked.append(question)
        if self.down:
            raise RemoteError(server, 0, "no connection")
        if self.on_asked is not None:
            await self.on_asked()

    async def user_devices(self, server: str, user_id: str) -> dict[str, Any]:
        answer = orjson.loads(
            orjson.dumps(self.devices.get(user_id, {"user_id": user_id, "stream_id": 1, "devices": []}))
        )
        await self._answers(server, f"devices {user_id}")
        return answer

    async def query_keys(self, server: str, device_keys: dict[str, list[str]]) -> dict[str, Any]:
        await self._answers(server, f"query {len(device_keys)}")
        known = {user_id: self.devices[user_id] for user_id in device_keys if user_id in self.devices}
        return {
            "device_keys": {u: {d["device_id"]: d["keys"] for d in one["devices"]} for u, one in known.items()},
            "master_keys": {u: one["master_key"] for u, one in known.items() if "master_key" in one},
        }

    async def claim_keys(self, server: str, one_time_keys: dict[str, dict[str, str]]) -> dict[str, Any]:
        await self._answers(server, f"claim {len(one_time_keys)}")
        return {"one_time_keys": self.one_time_keys}


class _NoNames:
    async def member_content(self, user_id: str) -> dict[str, Any]:
        return {}


class _NoInvites:
    async def invite(self, *_: Any) -> None:
        raise AssertionError("nobody is invited here")


@dataclass
class Heard:
    """What one answer of /sync says."""

    share: SyncShare
    token: int

    @property
    def changed(self) -> set[str]:
        return self.share.device_lists_changed

    @property
    def left(self) -> set[str]:
        return self.share.device_lists_left

    @property
    def messages(self) -> list[dict[str, Any]]:
        return list(orjson.loads(orjson.dumps(self.share.to_device)))

    @property
    def bodies(self) -> list[int]:
        return [message["content"]["ciphertext"]["c2VuZGVy"]["type"] for message in self.messages]


class KeyHouse(House):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        db, clock, seal = self.db, self.clock, Seal("standard")
        self.elsewhere: Any = Elsewhere()
        self.real_rooms = rooms = Rooms(db, SERVER)
        key = SigningKey.generate("ed25519:one")
        self._appender = Appender(rooms)
        self._sender = Sender(db, rooms, self._appender, seal, self.doors, clock, key)
        self._creator = Creator(db, rooms, self._appender, self._sender, seal, self.doors, _NoNames(), key, "12")
        self.departures = Departures(SERVER)
        self.published = Published(db, SERVER)
        self.signatures = UserSignatures(db)
        self.lists = DeviceLists(db, clock, self.published, rooms, self.departures, SERVER)
        self.remote_lists = RemoteLists(db, self.published, self.lists, rooms, self.elsewhere, SERVER)
        self.one_time_keys = OneTimeKeys(db, clock, self.devices, self.elsewhere, SERVER)
        self.cross_signing = CrossSigning(
            db, self.published, self.lists, self.remote_lists, self.signatures, self.devices, self.reauth, SERVER
        )
        self.to_device = ToDevice(db, clock, self.departures, self.devices, seal, self.doors, SERVER)
        self.device_keys = DeviceKeys(
            db, self.published, self.lists, self.remote_lists, self.one_time_keys, self.cross_signing, self.signatures,
            self.to_device, self.devices, SERVER,
        )  # fmt: skip
        self.backup = KeyBackup(db, seal)
        self.devices.on_device_deleted.append(self.device_keys.device_deleted)
        self.devices.is_signing_key = self.cross_signing.is_signing_key
        self.key_parts: list[Any] = [
            self.departures, self.published, self.signatures, self.lists, self.remote_lists, self.one_time_keys,
            self.cross_signing, self.device_keys, self.to_device, self.backup,
        ]  # fmt: skip
        self.parts += self.key_parts
        routes = [route for part in self.parts for route in part.routes()]
        self.web = Web(routes, self.sessions, None, Limits({}, clock, enabled=False))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[KeyHouse]:
        async with super().opened():
            await self.real_rooms.open()
            announcing = asyncio.create_task(self.lists.run())
            try:
                yield self
            finally:
                announcing.cancel()

    async def friend(self, name: str) -> Friend:
        """Somebody with an account, who has just signed in."""
        await self.commands["user.add"](localpart=name, password=PASSWORD)
        friend = Friend(self, f"@{name}:{SERVER}")
        await friend.signs_in()
        return friend

    async def settled(self) -> None:
        """Writes that nobody waited for are done."""
        with self.db.write() as tx:
            tx.call(lambda query: None)
        await tx

    async def edus(self, edu_type: str | None = None) -> list[dict[str, Any]]:
        """What waits to leave for other servers."""
        rows = await self.rows("SELECT destination, type, content FROM departing_edus ORDER BY pos")
        return [{"to": to, **orjson.loads(content)} for to, kind, content in rows if edu_type in (None, kind)]

    async def receives(self, edu_type: str, content: dict[str, Any], origin: str = ELSEWHERE) -> None:
        for part in self.key_parts:
            if edu_type in part.edus():
                await part.edus()[edu_type](origin, content)

    async def room_of(self, creator: Person, **more: Any) -> str:
        return await self._creator.create(creator.user_id, {"preset": "public_chat", **more}, _NoInvites())

    async def moves(self, room_id: str, user_id: str, membership: str) -> None:
        """Somebody, here or elsewhere, joins or leaves."""
        room = await self.real_rooms.get(room_id)
        assert room is not None, "the room exists"
        async with room.lock:
            keys = [("m.room.member", user_id), ("m.room.join_rules", ""), ("m.room.power_levels", ""), CREATE]
            state = await room.state_events(keys)
            event = self._sender.build(
                room, state, sender=user_id, type="m.room.member", content={"membership": membership}, state_key=user_id
            )
            with self.db.write(chain=room_id) as tx:
                self._appender.append(tx, room, event)
        await tx


@dataclass
class Friend(Person):
    house: KeyHouse
    user_id: str = ""
    token: str | None = None
    refresh_token: str | None = None
    device_id: str = ""
    keys: dict[str, Any] = field(default_factory=dict)
    heard: int | None = None

    async def on_another_device(self) -> Friend:
        other = Friend(self.house, self.user_id)
        await other.signs_in()
        return other

    async def syncs(self, since: int | None = -1) -> Heard:
        """From where the last answer ended; None begins afresh."""
        since = self.heard if since == -1 else since
        rooms, upto = self.house.real_rooms, self.house.db.stable_pos()
        began = {r for r, m in rooms.memberships(self.user_id).items() if m.since_pos > (since or 0)}
        joined = rooms.joined(self.user_id)
        topics = self.house.bell.topics(self.user_id, since) if since is not None else None
        ask = SyncAsk(
            self.user_id, self.device_id, since, upto, 0, topics, joined,
            frozenset(joined & began), frozenset(began - joined if since else ()),
        )  # fmt: skip
        share = SyncShare()
        for part in self.house.key_parts:
            await part.changes(ask, share)
        self.heard = upto
        return Heard(share, upto)

    async def publishes(self, **more: Any) -> dict[str, Any]:
        """The keys of this device, signed by itself."""
        secret = SigningKey.generate("ed25519:device")
        value: dict[str, Any] = {
            "user_id": self.user_id,
            "device_id": self.device_id,
            "algorithms": [OLM, "m.megolm.v1.aes-sha2"],
            "keys": {
                f"curve25519:{self.device_id}": "A" * 43,
                f"ed25519:{self.device_id}": secret.verify_key_base64,
            },
            **more,
        }
        self.keys = signed(value, self.user_id, f"ed25519:{self.device_id}", secret)
        self.device_secret = secret
        reply = await self.says("POST", "/keys/upload", {"device_keys": self.keys})
        assert reply.status == 200, f"a device can publish its keys: {reply.body}"
        return self.keys

    async def supplies(self, *names: str, fallback: str | None = None) -> Any:
        """One-time keys."""
        body: dict[str, Any] = {
            "one_time_keys": {f"signed_curve25519:{name}": {"key": f"key {name}"} for name in names}
        }
        if fallback is not None:
            body["fallback_keys"] = {f"signed_curve25519:{fallback}": {"key": f"key {fallback}", "fallback": True}}
        return await self.says("POST", "/keys/upload", body)

    async def claims(self, of: Person, algorithm: str = "signed_curve25519") -> str | None:
        """The name of the key that was handed out."""
        reply = await self.says("POST", "/keys/claim", {"one_time_keys": {of.user_id: {of.device_id: algorithm}}})
        assert reply.status == 200, f"anybody signed in may claim: {reply.body}"
        given = reply.body["one_time_keys"].get(of.user_id, {}).get(of.device_id, {})
        return next(iter(given), None)

    async def queries(self, *user_ids: str) -> dict[str, Any]:
        reply = await self.says("POST", "/keys/query", {"device_keys": {user_id: [] for user_id in user_ids}})
        assert reply.status == 200, f"a query is answered: {reply.body}"
        return dict(reply.body)

    async def sends(self, messages: dict[str, dict[str, Any]], txn: str, event_type: str = "m.room.encrypted") -> Any:
        return await self.says("PUT", f"/sendToDevice/{event_type}/{txn}", {"messages": messages})

    def signing_key(self, usage: str) -> tuple[dict[str, Any], SigningKey]:
        secret = SigningKey.generate("ed25519:cross")
        public = secret.verify_key_base64
        return {"user_id": self.user_id, "usage": [usage], "keys": {f"ed25519:{public}": public}}, secret

    async def sets_up_cross_signing(self) -> dict[str, Any]:
        master, self.master_secret = self.signing_key("master")
        own, self.own_secret = self.signing_key("self_signing")
        other, self.other_secret = self.signing_key("user_signing")
        by = key_id(master)
        body = {
            "master_key": master,
            "self_signing_key": signed(own, self.user_id, by, self.master_secret),
            "user_signing_key": signed(other, self.user_id, by, self.master_secret),
        }
        reply = await self.says("POST", "/keys/device_signing/upload", body)
        assert reply.status == 200, f"the first keys need no password: {reply.body}"
        return body


def olm(number: int = 0) -> dict[str, Any]:
    """An encrypted to-device message, which carries a number where it may."""
    return {"algorithm": OLM, "sender_key": "B" * 43, "ciphertext": {"c2VuZGVy": {"type": number, "body": "AwogZm9v"}}}


def key_id(value: dict[str, Any]) -> str:
    return next(iter(value["keys"]))


def signed(value: dict[str, Any], signer: str, by: str, secret: SigningKey) -> dict[str, Any]:
    """With one more signature."""
    signature = secret.sign(encode({k: v for k, v in value.items() if k not in ("signatures", "unsigned")}))
    signatures = {**value.get("signatures", {})}
    signatures[signer] = {**signatures.get(signer, {}), by: signature}
    return {**value, "signatures": signatures}


def device_of(user_id: str, device_id: str, key: str = "C") -> dict[str, Any]:
    """A device as another server describes it."""
    keys = {f"curve25519:{device_id}": key * 43, f"ed25519:{device_id}": key * 43}
    value = {"user_id": user_id, "device_id": device_id, "algorithms": [OLM], "keys": keys}
    return {"device_id": device_id, "keys": value, "device_display_name": "Bob's secret phone"}
