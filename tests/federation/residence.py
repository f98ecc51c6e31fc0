"""A relay whose rooms are real, and other servers that speak to it: everything between HTTP and the disk is the product's.

Only the rim is told: who sent a request stands in a header instead of a signature, and keys are known without asking.
A `Peer` is another server with a key of its own; it builds whatever events a story needs, good and bad ones.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from aiohttp import ClientSession, web

from federation.answers import Answers
from federation.asking import Asking
from federation.chains import Chains
from federation.inbound import Inbound
from federation.invites import Invites
from federation.joins import Joins
from relay.bell import Bell
from relay.clock import SystemClock
from relay.db import Database
from relay.doors import OpenDoors
from relay.errors import ApiError, Forbidden, RemoteError, Unauthorized
from relay.limits import Limits
from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event, required_signers
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey, signature_of, verify_bytes
from relay.protocol.versions import VERSIONS
from relay.rooms.afar import Afar
from relay.rooms.append import Appender
from relay.rooms.create import Creator
from relay.rooms.gaps import Gaps
from relay.rooms.intake import Intake
from relay.rooms.members import Members
from relay.rooms.receive import Receiver
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import SCHEMA
from relay.web import Request, Web

US = "one.example"
ALICE = f"@alice:{US}"
BOB = f"@bob:{US}"
V1 = "/_matrix/federation/v1"
V2 = "/_matrix/federation/v2"
SECRET = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "AwgAEpAB", "session_id": "c2Vzc2lvbg"}

_transactions = itertools.count(1)


def at(prefix: str, *segments: str, query: str = "") -> str:
    return "/".join([prefix, *(quote(segment, safe="") for segment in segments)]) + (f"?{query}" if query else "")


class Doors(OpenDoors):
    """Refuses whom a story names."""

    def __init__(self) -> None:
        self.unwelcome: set[str] = set()

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        if sender in self.unwelcome:
            raise ApiError("This person takes no invites.", status=403, errcode="M_INVITE_BLOCKED")

    async def receive(self, origin: str, event: Event) -> None:
        if event.sender in self.unwelcome:
            raise Forbidden("Not from this person.")


class Wire:
    """What the relay may ask of others: nothing but their keys."""

    def __init__(self) -> None:
        self.keys: dict[str, SigningKey] = {}

    async def verified(self, given: Sequence[Event]) -> list[bool]:
        return [all(self._signed(event, server) for server in required_signers(event)) for event in given]

    def _signed(self, event: Event, server: str) -> bool:
        key = self.keys.get(server)
        signature = signature_of(event.pdu, server, key.key_id) if key is not None else None
        return bool(key and signature and verify_bytes(events.signing_bytes(event), signature, key.verify_key))

    def left_alone(self, server: str) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        async def unreachable(*args: Any, **more: Any) -> Any:
            raise RemoteError("nowhere.example", 0, "nobody can be asked in this story")

        return unreachable


class NamedServers:
    async def origin(self, request: Request) -> str:
        origin = request.http.headers.get("X-From")
        if origin is None:
            raise Unauthorized("Sign the request.")
        return origin


class NoProfiles:
    async def member_content(self, user_id: str) -> dict[str, Any]:
        return {}


class Residence:
    def __init__(self, folder: Path) -> None:
        self.clock = SystemClock()
        self.key = SigningKey.generate("one")
        self.wire = Wire()
        self.wire.keys[US] = self.key
        self.doors = Doors()
        self.accounts = {ALICE, BOB}
        self.db = db = Database(folder / "relay.db", Bell())
        self.rooms = rooms = Rooms(db, US)
        remote: Any = self.wire
        seal = Seal("standard")
        self.appender = Appender(rooms)
        intake = Intake(remote, seal)
        gaps = Gaps(db, rooms, self.appender, intake, remote)
        self.receiver = Receiver(db, rooms, self.appender, intake, gaps, self.doors)
        self.sender = Sender(db, rooms, self.appender, seal, self.doors, self.clock, self.key)
        self.creator = Creator(
            db, rooms, self.appender, self.sender, seal, self.doors, NoProfiles(), self.key, default_version="12"
        )
        afar = Afar(db, rooms, self.appender, intake, remote, self.key)
        self.members = Members(
            db, rooms, self.appender, self.sender, seal, self.doors, NoProfiles(), afar, self.receiver,
            local_user_exists=self._exists,
        )  # fmt: skip
        self.edus: list[tuple[str, str, dict[str, Any]]] = []
        self.breaks: BaseException | None = None
        takers = {kind: self._taker(kind) for kind in ("m.typing", "m.receipt", "m.direct_to_device")}
        asking, chains = Asking(rooms), Chains(db)
        invites = Invites(
            db, rooms, self.appender, intake, remote, seal, self.doors, self.key, local_user_exists=self._exists
        )
        self.parts = [
            Inbound(rooms, self.receiver, invites, takers, OpenDoors()),
            Answers(US, db, self.clock, rooms, asking, chains),
            Joins(db, rooms, self.sender, self.members, self.receiver, remote, asking, chains, self.key),
            invites,
        ]

    async def _exists(self, user_id: str) -> bool:
        return user_id in self.accounts

    def _taker(self, kind: str) -> Any:
        async def take(origin: str, content: dict[str, Any]) -> None:
            if self.breaks is not None:
                raise self.breaks
            self.edus.append((kind, origin, content))

        return take

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Residence]:
        await self.db.open([SCHEMA], US)
        await self.rooms.open()
        routes = [route for part in self.parts for route in part.routes()]
        nobody: Any = None
        listener = Web(routes, nobody, NamedServers(), Limits({}, self.clock, enabled=False)).listener(
            frozenset({"federation"})
        )
        runner = web.ServerRunner(listener)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as self.http:
                yield self
        finally:
            await runner.cleanup()
            await self.db.close()

    async def asked(self, origin: str, method: str, path: str, body: Any = None) -> SimpleNamespace:
        async with self.http.request(method, path, json=body, headers={"X-From": origin}) as answer:
            json = await answer.json()
            return SimpleNamespace(status=answer.status, json=json, errcode=json.get("errcode"))

    # --- what people here do

    async def room(self, *, version: str = "12", who: str = ALICE, **body: Any) -> Room:
        room_id = await self.creator.create(who, {"room_version": version, **body}, self.members)
        room = await self.rooms.get(room_id)
        assert room is not None
        return room

    async def says(self, room: Room, *, who: str = ALICE) -> Event:
        sent = await self.sender.send(room.room_id, sender=who, type="m.room.encrypted", content=dict(SECRET))
        return sent.event

    async def sets(self, room: Room, type: str, content: dict[str, Any], *, who: str = ALICE) -> Event:
        sent = await self.sender.send(room.room_id, sender=who, type=type, content=content, state_key="", sealed=False)
        return sent.event

    def peer(self, name: str) -> Peer:
        return Peer(self, name)


class Peer:
    """Another server."""

    def __init__(self, house: Residence, name: str) -> None:
        self.house = house
        self.name = name
        self.key = house.wire.keys[name] = SigningKey.generate("far")

    def user(self, localpart: str) -> str:
        return f"@{localpart}:{self.name}"

    async def asks(self, method: str, path: str, body: Any = None) -> SimpleNamespace:
        return await self.house.asked(self.name, method, path, body)

    def signs(self, template: Mapping[str, Any], version: str = "12") -> Event:
        return events.sign(dict(template), VERSIONS[version], self.name, self.key)

    # --- coming and going

    async def template(self, kind: str, room: Room, user_id: str) -> SimpleNamespace:
        query = "&".join(f"ver={version}" for version in VERSIONS)
        return await self.asks("GET", at(f"{V1}/make_{kind}", room.room_id, user_id, query=query))

    async def sends(self, kind: str, event: Event, query: str = "") -> SimpleNamespace:
        prefix = V1 if kind == "knock" else V2
        return await self.asks("PUT", at(f"{prefix}/send_{kind}", event.room_id, event.id, query=query), event.pdu)

    async def joins(self, room: Room, localpart: str, query: str = "") -> SimpleNamespace:
        """The answer to send_join; the event as it was sent is `.sent`."""
        made = await self.template("join", room, self.user(localpart))
        assert made.status == 200, f"a template is handed out: {made.json}"
        event = self.signs(made.json["event"], room.version.name)
        answer = await self.sends("join", event, query)
        answer.sent = event
        return answer

    async def lives_in(self, room: Room, localpart: str) -> str:
        answer = await self.joins(room, localpart)
        assert answer.status == 200, f"{localpart} can join: {answer.json}"
        return self.user(localpart)

    # --- events

    async def writes(
        self,
        room: Room,
        localpart: str,
        *,
        type: str = "m.room.encrypted",
        content: dict[str, Any] | None = None,
        state_key: str | None = None,
        after: Sequence[Event] | None = None,
    ) -> Event:
        """An event on the room's latest ones (or on `after`), citing the state that the relay has now."""
        sender = self.user(localpart)
        content = dict(SECRET) if content is None else content
        keys = auth_keys(type, sender, state_key, content, room.version)
        state = await room.state_events([CREATE, *keys])
        prev = list(room.extremities) if after is None else [event.id for event in after]
        depth = room.depth if after is None else max(event.depth for event in after)
        return events.build(
            room.version,
            room_id=room.room_id,
            type=type,
            sender=sender,
            content=content,
            state_key=state_key,
            prev_events=prev,
            auth_events=[state[key].id for key in keys if key in state],
            depth=depth + 1,
            origin_server_ts=self.house.clock.now(),
            server_name=self.name,
            key=self.key,
        )

    async def transmits(
        self, *given: Event, edus: Sequence[Any] = (), txn: str | None = None, **more: Any
    ) -> SimpleNamespace:
        body = {
            "origin": self.name,
            "origin_server_ts": 1,
            "pdus": [one.pdu for one in given],
            "edus": list(edus),
            **more,
        }
        return await self.asks("PUT", at(f"{V1}/send", txn or f"t{next(_transactions)}"), body)

    def room(self, version: str = "12") -> FarRoom:
        return FarRoom(self, version)


class FarRoom:
    """A room on a peer, that nobody here is in."""

    def __init__(self, peer: Peer, version: str) -> None:
        self.peer = peer
        self.version = VERSIONS[version]
        self.host = peer.user("host")
        self.room_id = "" if self.version.room_id_is_create else f"!far:{peer.name}"
        self.latest: Event | None = None
        # Two rooms made in one millisecond would be one: the room ID is the hash of this event.
        content = {"room_version": version, "creator": self.host, "nonce": next(_transactions)}
        self.create = self.event("m.room.create", content)
        self.room_id = self.create.room_id
        self.state = [
            self.create,
            self.event("m.room.join_rules", {"join_rule": "invite"}),
            self.event("m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"}),
            self.event("m.room.name", {"name": "Far away"}),
        ]

    def event(
        self, type: str, content: dict[str, Any], state_key: str = "", sender: str = "", cites: Sequence[Event] = ()
    ) -> Event:
        before = self.latest
        self.latest = events.build(
            self.version,
            room_id=self.room_id,
            type=type,
            sender=sender or self.host,
            content=content,
            state_key=state_key,
            prev_events=[before.id] if before is not None else [],
            auth_events=[event.id for event in cites],
            depth=before.depth + 1 if before is not None else 1,
            origin_server_ts=self.peer.house.clock.now(),
            server_name=self.peer.name,
            key=self.peer.key,
        )
        return self.latest

    def member(self, target: str, membership: str, sender: str = "", cites: Sequence[Event] = (), **more: Any) -> Event:
        return self.event("m.room.member", {"membership": membership, **more}, target, sender, cites)

    async def invites(self, invite: Event, told: Sequence[Any] | None = None, **changed: Any) -> SimpleNamespace:
        given = [event.pdu for event in self.state] if told is None else list(told)
        body = {"room_version": self.version.name, "event": invite.pdu, "invite_room_state": given, **changed}
        return await self.peer.asks("PUT", at(f"{V2}/invite", self.room_id, invite.id), body)
