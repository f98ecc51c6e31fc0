"""Several relays' rooms in one process, joined by a wire in memory: no HTTP, no sockets, no outbox that runs by itself.

What one home has to say to another waits until the story `delivers` it, in whatever order, or `loses` it; what is asked
over federation is answered at once by the other's own routes, unless the wire between the two is cut.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import orjson
from yarl import URL

from federation.answers import Answers
from federation.asking import Asking
from federation.chains import Chains
from federation.client import Client
from federation.inbound import Inbound
from federation.invites import Invites
from federation.joins import Joins
from relay.bell import Bell
from relay.clock import SystemClock
from relay.db import Database, Query
from relay.doors import OpenDoors
from relay.errors import ApiError, NotAllowed, RemoteError
from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event, required_signers
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey, signature_of, verify_bytes
from relay.rooms.afar import Afar
from relay.rooms.append import Appender
from relay.rooms.completion import PartialJoins
from relay.rooms.create import Creator
from relay.rooms.gaps import Gaps
from relay.rooms.history import History
from relay.rooms.intake import Intake
from relay.rooms.later import MAX_AT_ONCE, Later
from relay.rooms.members import Members
from relay.rooms.receive import Receiver
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import HIDDEN, HISTORY, SCHEMA, Stored
from relay.web import Request, Router

SECRET = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "AwgAEpAB", "session_id": "c2Vzc2lvbg"}
MAX_PDUS = 50


class Names:
    async def member_content(self, user_id: str) -> dict[str, Any]:
        return {}


class Wire:
    """What a home's federation client has for connections and for a keyring."""

    def __init__(self, village: Village, home: str) -> None:
        self.village = village
        self.home = home
        self.asked: list[str] = []
        self.timeout = 10.0

    def left_alone(self, server: str) -> int:
        return 0

    async def get(self, server: str, target: str, **_: Any) -> dict[str, Any]:
        return await self.send(server, "GET", target, None)

    async def send(self, server: str, method: str, target: str, content: Any, **_: Any) -> dict[str, Any]:
        self.asked.append(f"{server} {target.split('?')[0].split('/')[4]}")
        other = self.village.homes.get(server)
        if other is None or frozenset((self.home, server)) in self.village.cuts:
            raise RemoteError(server, 0, "the wire is cut")
        instead = self.village.instead.get((server, self.asked[-1].split()[1]))
        if instead is not None:
            answer = await instead(target, content)
            return dict(answer)
        body = content if isinstance(content, bytes) else orjson.dumps(content)
        try:
            return await other.answers(self.home, method, target, body)
        except ApiError as no:
            raise RemoteError(server, no.status, no.text, no.errcode, no.body()) from no
        except NotAllowed as no:
            raise RemoteError(server, 403, no.reason, "M_FORBIDDEN") from no

    async def fragments(self, kind: Any, server: str, method: str, target: str, content: bytes | None, **_: Any) -> Any:
        answer = orjson.dumps(await self.send(server, method, target, content))
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.MsgspecError as error:
            raise RemoteError(server, 200, "its answer is not of the form that was asked for") from error

    async def verified(self, given: Sequence[Event]) -> list[bool]:
        return await asyncio.to_thread(lambda: [self._good(event) for event in given])

    def _good(self, event: Event) -> bool:
        return all(self._signed(event, server) for server in required_signers(event))

    def _signed(self, event: Event, server: str) -> bool:
        key = self.village.keys.get(server)
        signature = signature_of(event.pdu, server, key.key_id) if key is not None else None
        return bool(key and signature and verify_bytes(events.signing_bytes(event), signature, key.verify_key))


class Home:
    def __init__(self, village: Village, name: str, folder: Path) -> None:
        self.village = village
        self.name = name
        self.clock = SystemClock()
        self.key = village.keys[name] = SigningKey.generate("one")
        self.wire = Wire(village, name)
        wire: Any = self.wire
        self.remote = Client(wire, wire)
        self.seal = Seal("standard")
        self.doors = OpenDoors()
        folder.mkdir(exist_ok=True)
        self.db = db = Database(folder / "relay.db", Bell())
        self.rooms = rooms = Rooms(db, name)
        self.appender = appender = Appender(rooms)
        intake = Intake(self.remote, self.seal)
        self.gaps = Gaps(db, rooms, appender, intake, self.remote)
        self.receiver = Receiver(db, rooms, appender, intake, self.gaps, self.doors)
        self.history = History(db, rooms, appender, intake, self.gaps, self.remote)
        self.sender = Sender(db, rooms, appender, self.seal, self.doors, self.clock, self.key)
        self.afar = Afar(db, rooms, appender, intake, self.remote, self.key)
        self.completing = PartialJoins(db, self.clock, rooms, appender, intake, self.remote)
        self.later = Later(db, self.clock, rooms, self.receiver, self.seal, self.remote)
        self.completing.keep_for_later = self.later.keep_all
        self.afar.on_partial = self._completes
        # Whether the members of rooms that were joined without them are fetched at once.
        self.patient = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.members = Members(
            db, rooms, appender, self.sender, self.seal, self.doors, Names(), self.afar, self.receiver,
            local_user_exists=self._exists,
        )  # fmt: skip
        self.creator = Creator(
            db, rooms, appender, self.sender, self.seal, self.doors, Names(), self.key, default_version="12"
        )
        asking, chains = Asking(rooms), Chains(db)
        invites = Invites(
            db, rooms, appender, intake, self.remote, self.seal, self.doors, self.key, local_user_exists=self._exists
        )
        parts = (
            Inbound(rooms, self.receiver, invites, {}, OpenDoors()),
            Answers(name, db, self.clock, rooms, asking, chains),
            Joins(db, rooms, self.sender, self.members, self.receiver, self.remote, asking, chains, self.key),
            invites,
        )
        self._router = Router(route for part in parts for route in part.routes())

    async def _exists(self, user_id: str) -> bool:
        return True

    def _completes(self, room_id: str) -> None:
        if not self.patient:
            task = asyncio.create_task(self.completing._complete(room_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def completes(self, room_id: str) -> bool:
        """One attempt to fetch the members of a room that was joined without them."""
        return await self.completing._attempt(room_id)

    async def gives_places(self) -> None:
        """To events that wait for theirs."""
        while await self.later._try_some() == MAX_AT_ONCE:
            pass

    async def rests(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def answers(self, origin: str, method: str, target: str, body: bytes) -> dict[str, Any]:
        url = URL(target, encoded=True)
        route, params = self._router.find(method, url.raw_path)
        http: Any = SimpleNamespace(rel_url=url, headers={}, remote="")
        request = Request(http, route, params)
        request.body, request.origin = body, origin
        answer = await route.function(request)
        found: dict[str, Any] = orjson.loads(answer if isinstance(answer, bytes) else orjson.dumps(answer))
        return found

    def user(self, localpart: str) -> str:
        return f"@{localpart}:{self.name}"

    # --- what its people do

    async def room(self, room_id: str) -> Room:
        room = await self.rooms.get(room_id)
        assert room is not None, "the room is known"
        return room

    async def creates(self, who: str, **body: Any) -> str:
        return await self.creator.create(self.user(who), {"preset": "public_chat", **body}, self.members)

    async def says(self, who: str, room_id: str) -> Event:
        sent = await self.sender.send(
            room_id, sender=self.user(who), type="m.room.encrypted", content=dict(SECRET)
        )  # fmt: skip
        return sent.event

    async def sets(self, who: str, room_id: str, type: str, content: dict[str, Any], key: str = "") -> Event:
        sent = await self.sender.send(
            room_id, sender=self.user(who), type=type, content=content, state_key=key, sealed=False
        )
        return sent.event

    async def takes_back(self, who: str, room_id: str, event_id: str) -> Event:
        sent = await self.sender.send(
            room_id, sender=self.user(who), type="m.room.redaction", content={}, redacts=event_id
        )
        return sent.event

    async def joins(self, who: str, room_id: str, *via: str) -> None:
        await self.members.join(self.user(who), room_id, via=via)

    async def receives(self, origin: str, room_id: str, *given: Event) -> dict[str, str | None]:
        return await self.receiver.receive(origin, room_id, [one.pdu for one in given])

    async def forges(
        self,
        who: str,
        room_id: str,
        *,
        after: Sequence[Event] | Sequence[str] | None = None,
        type: str = "m.room.encrypted",
        content: dict[str, Any] | None = None,
        state_key: str | None = None,
        cites: Mapping[tuple[str, str], Event] | None = None,
        depth: int | None = None,
        redacts: str | None = None,
    ) -> Event:
        """An event with good hashes and signatures that this home does not record: whatever a story needs."""
        room = await self.room(room_id)
        content = dict(SECRET) if content is None else content
        sender = who if who.startswith("@") else self.user(who)
        keys = auth_keys(type, sender, state_key, content, room.version)
        state = {**await room.state_events([CREATE, *keys]), **(cites or {})}
        prev = list(room.extremities) if after is None else [one if isinstance(one, str) else one.id for one in after]
        return events.build(
            room.version,
            room_id=room_id,
            type=type,
            sender=sender,
            content=content,
            state_key=state_key,
            prev_events=prev,
            auth_events=[state[key].id for key in keys if key in state],
            depth=room.depth + 1 if depth is None else depth,
            origin_server_ts=self.clock.now() + next(self.village.ticks),
            redacts=redacts,
            server_name=self.name,
            key=self.key,
        )

    # --- what it knows

    async def row(self, event_id: str) -> Stored:
        one = await self.rooms.event(event_id)
        assert one is not None, "the event is in the database"
        return one

    async def count(self, sql: str, *params: Any) -> int:
        return int(await self.db.read(lambda query: query.value(sql, *params)))

    async def timeline(self, room_id: str, *, history: bool = True) -> list[str]:
        """What its people are shown of the room, in order of arrival."""
        room = await self.room(room_id)
        hidden = HIDDEN if history else HIDDEN | HISTORY

        def read(query: Query) -> list[str]:
            rows = query.all(
                f"SELECT event_id FROM events WHERE room_nid = $1 AND pos IS NOT NULL AND (marks & {hidden}) = 0 ORDER BY pos",
                room.nid,
            )
            return [row[0] for row in rows]

        return await self.db.read(read)

    async def state(self, room_id: str) -> dict[tuple[str, str], str]:
        return dict((await self.room(room_id)).state)

    async def agrees_with_its_disk(self, room_id: str) -> None:
        """What memory says of the room is what a start from the disk would say."""
        await self.db.settled()
        room = await self.room(room_id)
        held = _summary(room)
        self.rooms.drop(room)
        assert _summary(await self.room(room_id)) == held, f"{self.name} remembers what is on its disk"


def _summary(room: Room) -> dict[str, Any]:
    return {
        "state": dict(room.entries),
        "state_nid": room.state_nid,
        "steps": room.steps,
        "latest": dict(room.extremities),
        "members": dict(room.members),
        "here": set(room.local_joined),
        "servers": room.servers,
    }


class Village:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.homes: dict[str, Home] = {}
        self.keys: dict[str, SigningKey] = {}
        self.cuts: set[frozenset[str]] = set()
        # (server, endpoint) -> what answers in place of its own routes
        self.instead: dict[tuple[str, str], Any] = {}
        self.ticks = itertools.count(1)
        self._told: dict[tuple[str, str], int] = {}

    async def home(self, name: str) -> Home:
        home = self.homes[name] = Home(self, name, self.folder / name)
        await home.db.open([SCHEMA, Later.schema], name)
        await home.rooms.open()
        return home

    async def restarts(self, home: Home) -> Home:
        await home.rests()
        await home.db.close()
        key = home.key
        again = await self.home(home.name)
        again.key = again.sender._key = again.afar._key = again.creator._key = self.keys[home.name] = key
        return again

    def cut(self, one: Home, two: Home) -> None:
        self.cuts.add(frozenset((one.name, two.name)))

    def mend(self, one: Home, two: Home) -> None:
        self.cuts.discard(frozenset((one.name, two.name)))

    async def waiting(self, sender: Home, receiver: Home) -> list[Stored]:
        after = self._told.get((sender.name, receiver.name), 0)
        upto = sender.db.stable_pos()
        found = await sender.db.read(lambda query: sender.rooms.new_events(query, after, upto, 10_000))
        return [one for one in found if (one.local or one.fan_out) and one.event.server != receiver.name]

    async def delivers(self, sender: Home, receiver: Home, most: int = 10_000) -> None:
        """What `sender` has to say to `receiver`, in transactions, as its outbox would."""
        found = (await self.waiting(sender, receiver))[:most]
        for room_id, its in itertools.groupby(found, key=lambda one: one.event.room_id):
            given = list(its)
            for start in range(0, len(given), MAX_PDUS):
                pdus = [one.event.pdu for one in given[start : start + MAX_PDUS]]
                await receiver.receiver.receive(sender.name, room_id, pdus)
        if found:
            self._told[(sender.name, receiver.name)] = found[-1].pos or 0

    async def loses(self, sender: Home, receiver: Home) -> None:
        self._told[(sender.name, receiver.name)] = sender.db.stable_pos()

    async def delivers_all(self, homes: Iterable[Home] | None = None) -> None:
        everybody = list(homes or self.homes.values())
        for _ in range(3):
            for sender, receiver in itertools.permutations(everybody, 2):
                await self.delivers(sender, receiver)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Village]:
        try:
            yield self
        finally:
            for home in self.homes.values():
                await home.rests()
                await home.db.close()
