"""A throw-away server of another make: a key, a certificate of the town's authority, and a hand that signs whatever it is told.

It proves who it is as the standard asks, joins a room, and then says things that no decent server would. What it is asked
for it does not know, apart from its key and from what a story puts into `holds`: JSON, bytes, or a function that makes one.
"""

from __future__ import annotations

import itertools
import ssl
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

from federation.xmatrix import authorization
from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.protocol.canonical import encode
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey, sign_json
from relay.protocol.versions import VERSIONS
from tests.fuzz.answers import Answer
from tests.people import path
from tests.town import House, Town, free_port

FEDERATION = "/_matrix/federation/v1"
DAY_MS = 24 * 60 * 60 * 1000

Json = dict[str, Any]


class Stranger:
    def __init__(self, town: Town) -> None:
        self.town = town
        self.port = free_port()
        self.name = f"localhost:{self.port}"
        self.key = SigningKey.generate("ed25519:stranger")
        self.user = f"@mallory:{self.name}"
        self.holds: dict[str, Any] = {}
        self.asked: list[str] = []
        self.heard: list[Json] = []
        self._numbers = itertools.count(1)

    async def opens(self) -> Stranger:
        folder = self.town.folder / f"stranger{self.port}"
        folder.mkdir(exist_ok=True)
        certificate, key = self.town.authority.certify(folder, "localhost", "127.0.0.1")
        served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        served.load_cert_chain(certificate, key)
        self._runner = web.ServerRunner(web.Server(self._answers))  # type: ignore[arg-type]
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=served).start()
        trust = ssl.create_default_context(cafile=str(Path(self.town.authority.certificate_file)))
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust))
        return self

    async def leaves_town(self) -> None:
        await self._http.close()
        await self._runner.cleanup()

    async def _answers(self, http: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(http.path)
        body = await http.read()
        if http.path == "/_matrix/key/v2/server":
            return web.json_response(self.key_answer())
        if http.path.startswith(f"{FEDERATION}/send/"):
            self.heard.append(orjson.loads(body))
            return web.json_response({"pdus": {}})
        for start, held in self.holds.items():
            if http.path.startswith(start):
                if callable(held):
                    held = await held(http, body)
                    if isinstance(held, web.StreamResponse):
                        return held
                return (
                    web.Response(body=held, content_type="application/json")
                    if isinstance(held, bytes)
                    else web.json_response(held)
                )
        return web.json_response({"errcode": "M_NOT_FOUND", "error": "not here"}, status=404)

    def key_answer(self) -> Json:
        now = time.time_ns() // 1_000_000
        answer = {
            "server_name": self.name,
            "valid_until_ts": now + DAY_MS,
            "verify_keys": {self.key.key_id: {"key": self.key.verify_key_base64}},
            "old_verify_keys": {},
        }
        return sign_json(answer, self.name, self.key)

    # --- asking

    async def asks(
        self,
        house: House,
        method: str,
        where: str,
        body: Any = None,
        *,
        key: SigningKey | None = None,
        origin: str | None = None,
        header: str | None = None,
    ) -> Answer:
        """A signed request. `body` may be bytes, which need not be JSON; `header` replaces the Authorization header."""
        raw = body if isinstance(body, bytes) else None if body is None else encode(body)
        signed = (
            authorization(method, where, self.name if origin is None else origin, house.name, raw, key or self.key)
            if header is None
            else header
        )
        url = URL(f"https://localhost:{house.federation_port}{where}", encoded=True)
        headers = {"Authorization": signed, "Content-Type": "application/json"} if signed else {}
        async with self._http.request(method, url, data=raw, headers=headers) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def sends(
        self, house: House, pdus: Any = (), edus: Any = (), *, txn: str | None = None, **more: Any
    ) -> Answer:
        body = {
            "origin": self.name,
            "origin_server_ts": time.time_ns() // 1_000_000,
            "pdus": list(pdus),
            "edus": list(edus),
            **more,
        }
        return await self.sends_raw(house, orjson.dumps(body), txn=txn)

    async def sends_raw(self, house: House, body: bytes, *, txn: str | None = None) -> Answer:
        return await self.asks(house, "PUT", f"{FEDERATION}/send/{txn or f's{next(self._numbers)}'}", body)

    # --- in a room

    async def joins(self, house: House, room_id: str) -> Room:
        """Joins like a decent server."""
        versions = "&".join(f"ver={name}" for name in VERSIONS)
        made = await self.asks(house, "GET", f"{FEDERATION}/{path('make_join', room_id, self.user)}?{versions}")
        assert made.status == 200, f"the relay lets a stranger ask for a template: {made.json}"
        version = VERSIONS[made.json["room_version"]]
        join = events.sign(made.json["event"], version, self.name, self.key)
        where = f"/_matrix/federation/v2/{path('send_join', room_id, join.id)}"
        sent = await self.asks(house, "PUT", where, join.pdu)
        assert sent.status == 200, f"the relay lets a stranger in: {sent.json}"
        state = [events.parse(pdu, version) for pdu in sent.json["state"]]
        return Room(self, house, room_id, [*state, join])


class Room:
    """What the stranger knows of a room that it is in."""

    def __init__(self, stranger: Stranger, house: House, room_id: str, state: list[Event]) -> None:
        self.stranger = stranger
        self.house = house
        self.id = room_id
        self.version = state[-1].version
        self.state = {event.key: event for event in state}
        self.last = state[-1]

    def event(
        self, type: str = "m.room.encrypted", content: Json | None = None, *, key: SigningKey | None = None, **more: Any
    ) -> Event:
        """A good event, unless told otherwise. It does not become the last one: see `said`."""
        sender = more.get("sender", self.stranger.user)
        content = ENCRYPTED if content is None else content
        keys = auth_keys(type, sender, more.get("state_key"), content, self.version)
        keys += [] if self.version.room_id_is_create else [("m.room.create", "")]
        given: Json = {
            "room_id": self.id,
            "type": type,
            "sender": sender,
            "content": dict(content),
            "prev_events": [self.last.id],
            "auth_events": [self.state[one].id for one in keys if one in self.state],
            "depth": self.last.depth + 1,
            "origin_server_ts": time.time_ns() // 1_000_000,
            **more,
        }
        return events.build(self.version, server_name=self.stranger.name, key=key or self.stranger.key, **given)

    def said(self, event: Event) -> Event:
        """From now on the next event comes after this one."""
        self.last = event
        if event.key is not None:
            self.state[event.key] = event
        return event


ENCRYPTED: Json = {
    "algorithm": "m.megolm.v1.aes-sha2",
    "ciphertext": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo",
    "session_id": "c2Vzc2lvbg",
    "device_id": "MALLORY",
    "sender_key": "a2V5",
}


def resigned(pdu: Json, stranger: Stranger, *, rehash: bool = True) -> Json:
    """A mutated event with a signature that holds, and a hash that does unless told otherwise, as far as it has them at all."""
    from relay.protocol.redaction import redact

    changed = {name: value for name, value in pdu.items() if name != "signatures"}
    if rehash:
        changed.pop("hashes", None)
        try:
            changed["hashes"] = {"sha256": events.content_hash(changed)}
        except Exception:
            changed["hashes"] = {"sha256": "AAAA"}
    try:
        covered = redact(changed, VERSIONS["12"])
        covered.pop("unsigned", None)
        changed["signatures"] = {stranger.name: {stranger.key.key_id: stranger.key.sign(encode(covered))}}
    except Exception:
        changed["signatures"] = {stranger.name: {stranger.key.key_id: "AAAA"}}
    return changed
