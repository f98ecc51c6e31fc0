"""Servers for the stories of this folder: each has a key, a database, TLS on loopback, a keyring, a client and an outbox.

The network is real, certificates come from a throw-away authority, only the name system is told what to answer. In place
of rooms stands a `Ledger`: events in a table of the same database, so that the outbox follows a real log.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from federation.addresses import AddressRule, LookupFailed, SrvRecord
from federation.backoff import Backoff
from federation.client import Client
from federation.connections import Connections
from federation.discovery import Discovery
from federation.kept_keys import KeptKeys
from federation.keyring import Keyring
from federation.notary import Notary
from federation.outbox import Outbox
from federation.outward import Outward, tls_context
from federation.xmatrix import XMatrix
from relay.bell import Bell
from relay.clock import SECOND, SystemClock
from relay.config import Rate
from relay.db import Database, Query
from relay.departures import Departures, Fresh
from relay.doors import OpenDoors
from relay.limits import Limits
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS
from relay.tables import Schema, Table
from relay.web import Caller, Request, Route, Web

V11 = VERSIONS["11"]


class TestClock(SystemClock):
    """The real time, which a story can move forward."""

    __test__ = False

    def __init__(self) -> None:
        self.ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead

    def forward(self, milliseconds: int) -> None:
        self.ahead += milliseconds


@dataclass
class Names:
    """The name system: every name lives on this machine, unless a story says otherwise."""

    hosts: dict[str, Sequence[str]] = field(default_factory=dict)
    services: dict[str, Sequence[SrvRecord]] = field(default_factory=dict)
    silent: bool = False
    asked: list[str] = field(default_factory=list)

    async def addresses(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        found = self.hosts.get(host, ("127.0.0.1",))
        if not found:
            raise OSError("no such host")
        return found

    async def srv(self, name: str) -> Sequence[SrvRecord]:
        self.asked.append(name)
        if self.silent:
            raise LookupFailed(name)
        return self.services.get(name, ())


class Authority:
    """A certificate authority that nobody else trusts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority for tests")])
        certificate = (
            self._begin(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = folder / "authority.pem"
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _begin(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int = 30) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    def issue(self, *names: str, days: int = 30) -> ssl.SSLContext:
        """What a server with a certificate for these names speaks with; it expires in so many days."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = []
        for name in names:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server for tests")])
        certificate = (
            self._begin(subject, key.public_key(), days)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self.folder / f"{names[0].replace(':', '_')}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


class Listening:
    """A TLS listener on a port of its own, which can go away and come back."""

    def __init__(self, answers: web.Server[web.BaseRequest] | None, tls: ssl.SSLContext) -> None:
        self.answers = answers
        self._tls = tls
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        assert self.answers is not None, "a listener needs something that answers"
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self.answers, "127.0.0.1", self.port, ssl=self._tls, reuse_address=True)

    async def stop(self) -> None:
        if self._server is not None and self.answers is not None:
            self._server.close()
            await self.answers.shutdown(0.05)
            self._server = None


@dataclass
class Written:
    event: Event
    pos: int | None
    local: bool = True
    fan_out: bool = False


@dataclass
class LedgerRoom:
    room_id: str
    servers: set[str]
    members: dict[str, str] = field(default_factory=dict)


class Ledger:
    """Rooms, as far as the outbox sees them."""

    schema = Schema(
        "ledger",
        (Table("ledger", "tests", {}),),
        (
            "CREATE TABLE ledger (pos BIGINT PRIMARY KEY, event_id TEXT NOT NULL, json BYTES NOT NULL, marks SMALLINT NOT NULL)",
        ),
    )

    def __init__(self, db: Database, server_name: str, key: SigningKey) -> None:
        self._db = db
        self._server_name = server_name
        self._key = key
        self._rooms: dict[str, LedgerRoom] = {}
        self.moves: list[tuple[str, str, str | None, str, int]] = []
        self.leaving: Fresh[Written] = Fresh()
        self.count = 0

    def room(self, room_id: str, *servers: str) -> LedgerRoom:
        room = self._rooms[room_id] = LedgerRoom(room_id, {self._server_name, *servers})
        return room

    def build(self, room_id: str, text: str, **more: Any) -> Event:
        self.count += 1
        return events.build(
            V11,
            room_id=room_id,
            type=more.pop("type", "m.room.encrypted"),
            sender=f"@alice:{self._server_name}",
            content=more.pop("content", {"ciphertext": text}),
            prev_events=[],
            auth_events=[],
            depth=self.count,
            origin_server_ts=1_700_000_000_000 + self.count,
            server_name=self._server_name,
            key=self._key,
            **more,
        )

    async def says(self, room_id: str, text: str, **more: Any) -> str:
        return await self.writes(self.build(room_id, text, **more))

    async def writes(self, event: Event, marks: int = 1) -> str:
        with self._db.write() as tx:
            pos = tx.pos()
            tx.run(
                "INSERT INTO ledger (pos, event_id, json, marks) VALUES ($1, $2, $3, $4)",
                pos,
                event.id,
                event.raw,
                marks,
            )
            if marks:
                tx.after(lambda: self.leaving.note(pos, Written(event, pos, marks == 1, marks == 2)))
        await tx
        return event.id

    def new_events(self, query: Query, after_pos: int, upto_pos: int, limit: int) -> list[Written]:
        rows = query.all(
            "SELECT event_id, pos, json, marks FROM ledger WHERE pos > $1 AND pos <= $2 ORDER BY pos LIMIT $3",
            after_pos,
            upto_pos,
            limit,
        )
        return [Written(events.load(raw, id_, V11), pos, marks == 1, marks == 2) for id_, pos, raw, marks in rows]

    def membership_changes(
        self, query: Query, room_ids: Iterable[str], since: int, upto: int
    ) -> list[tuple[str, str, str | None, str, int]]:
        return [move for move in self.moves if move[0] in set(room_ids) and since < move[4] <= upto]

    def loaded(self, room_id: str) -> LedgerRoom | None:
        return None

    async def shares_with(self, server: str) -> bool:
        return any(server in room.servers for room in self._rooms.values())

    async def get(self, room_id: str) -> LedgerRoom | None:
        return self._rooms.get(room_id)


class NobodySignsIn:
    def known(self, token: str) -> Caller | None:
        return None

    async def caller(self, token: str) -> Caller:
        raise AssertionError("no client comes here")


class Neighbour:
    """One server. `taken` is every transaction it answered: (origin, transaction ID, body)."""

    def __init__(
        self, host: str, authority: Authority, names: Names, folder: Path, clock: TestClock | None = None
    ) -> None:
        self.listening = Listening(None, authority.issue(host))
        self.name = f"{host}:{self.listening.port}"
        self.folder = folder / host
        self.folder.mkdir(exist_ok=True)
        self.clock = clock or TestClock()
        self.key = SigningKey.generate("one")
        self.taken: list[tuple[str, str, dict[str, Any]]] = []
        self.refuse_with: tuple[int, dict[str, Any]] | None = None
        self.refuse_event: str | None = None
        self.more_routes: list[Route] = []
        self.heard: list[str] = []
        self.strangers = Limits({"strangers": Rate(per_second=0.001, burst=100)}, self.clock)
        self.hosts: list[str | None] = []
        self._authority = authority
        self._names = names
        self._task: asyncio.Task[None] | None = None
        self.rule = AddressRule(here=True)

    async def open(self) -> None:
        self.bell = Bell()
        self.db = Database(self.folder / "relay.db", self.bell)
        self.departures = Departures(self.name)
        assert Departures.schema is not None and Keyring.schema is not None and Outbox.schema is not None
        schemas = (Departures.schema, Keyring.schema, KeptKeys.schema, Outbox.schema, Ledger.schema)
        await self.db.open(schemas, self.name)
        doors = OpenDoors()
        self.outward = Outward(self._names, self.rule, tls_context(self._authority.file))
        self.discovery = Discovery(self._names, self.outward, self.clock)
        self.backoff = Backoff(self.clock, least=5 * SECOND, most=3_600 * SECOND)
        self.connections = Connections(
            self.name, self.key, self.discovery, self.outward, self.backoff, doors, timeout=10.0
        )
        self.keyring = Keyring(self.name, self.key, self.db, self.clock, self.connections.server_keys, timeout=5.0)
        self.client = Client(self.connections, self.keyring)
        ledger = Ledger(self.db, self.name, self.key)
        if hasattr(self, "ledger"):
            ledger._rooms, ledger.count, ledger.moves = self.ledger._rooms, self.ledger.count, self.ledger.moves
        self.ledger = ledger
        self.outbox = Outbox(
            self.name,
            self.db,
            self.bell,
            self.clock,
            self.ledger,
            self.departures,
            self.connections,
            self.backoff,
            keep_seconds=0.02,
        )
        self.xmatrix = XMatrix(self.name, self.keyring, doors, self._heard_from, meets=self._meets)
        routes = [
            *Notary(self.name, self.key, self.keyring, self.clock, self._meets).routes(),
            Route("PUT", "/_matrix/federation/v1/send/{txnId}", self._take, auth="server", serves="federation"),
            Route("POST", "/_matrix/federation/v1/echo", self._echo, auth="server", serves="federation"),
            *self.more_routes,
        ]
        rim = Web(routes, NobodySignsIn(), self.xmatrix, Limits({}, self.clock, enabled=False))
        self.listening.answers = rim.listener(frozenset({"federation"}))

    async def start(self) -> None:
        await self.open()
        await self.listening.start()

    def send_out(self) -> None:
        """The outbox begins to follow the log."""
        self._task = asyncio.create_task(self.outbox.run())

    async def crash(self) -> None:
        """Ends without a last word: nothing is written down any more."""
        if self._task is not None:

            async def nothing() -> None:
                return None

            self.outbox.positions.keep = nothing  # type: ignore[method-assign]
        await self.stop()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self.listening.stop()
        await self.outward.close()
        self.keyring.close()
        await self.db.close()

    def _meets(self, address: str) -> None:
        self.strangers.spend("strangers", address)

    def _heard_from(self, server: str) -> None:
        self.heard.append(server)
        self.outbox.heard_from(server)

    async def _echo(self, request: Request) -> dict[str, Any]:
        self.hosts.append(request.http.headers.get("Host"))
        return {"origin": request.origin, "body": request.json()}

    async def _take(self, request: Request) -> Any:
        if self.refuse_with is not None:
            status, body = self.refuse_with
            return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
        body = request.json()
        if self.refuse_event is not None and self.refuse_event in request.body.decode():
            return web.Response(
                status=400, body=orjson.dumps({"errcode": "M_BAD_JSON", "error": "no"}), content_type="application/json"
            )
        self.taken.append((request.origin, request.params["txnId"], body))
        return {"pdus": {}}

    # --- what a story asks

    def texts(self) -> list[str]:
        """The texts of all events that came, in the order of their coming."""
        return [pdu["content"].get("ciphertext", pdu["type"]) for _, _, body in self.taken for pdu in body["pdus"]]

    def edus(self, edu_type: str) -> list[dict[str, Any]]:
        return [edu["content"] for _, _, body in self.taken for edu in body["edus"] if edu["edu_type"] == edu_type]


async def until(condition: Any, what: str, seconds: float = 30.0) -> None:
    """Waits for something that is bound to happen."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"this did not happen: {what}")


@contextlib.asynccontextmanager
async def two_servers(folder: Path, names: Names | None = None) -> AsyncIterator[tuple[Neighbour, Neighbour]]:
    names = names or Names()
    authority = Authority(folder)
    one, two = Neighbour("one.test", authority, names, folder), Neighbour("two.test", authority, names, folder)
    await one.start()
    await two.start()
    try:
        yield one, two
    finally:
        for server in (one, two):
            with contextlib.suppress(Exception):
                await server.stop()
