"""People with a Matrix client: each method is something a person does, over plain HTTP, as the standard writes it.

A `Person` remembers what her syncs brought, as a client would. Whatever the relay refuses is a `Refused`.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import time
from collections import defaultdict
from typing import Any
from urllib.parse import quote

import aiohttp

CLIENT = "/_matrix/client/v3"
# A condition that comes true ends the wait; a loaded machine may take its time.
PATIENCE_SECONDS = 20.0

_transactions = itertools.count(1)

Json = dict[str, Any]


class Refused(Exception):
    """The relay said no."""

    def __init__(self, status: int, body: Any, headers: Any) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body: Json = body if isinstance(body, dict) else {}
        self.errcode: str = self.body.get("errcode", "")
        self.text: str = self.body.get("error", "")
        self.headers = headers


def ciphertext(size: int = 60, **more: Any) -> Json:
    """What an encrypted message looks like to everybody without the key."""
    return {
        "algorithm": "m.megolm.v1.aes-sha2",
        "ciphertext": base64.b64encode(os.urandom(size)).decode().rstrip("="),
        "session_id": base64.b64encode(os.urandom(32)).decode().rstrip("="),
        "device_id": "DEVICE",
        "sender_key": base64.b64encode(os.urandom(32)).decode().rstrip("="),
        **more,
    }


def path(*segments: str) -> str:
    return "/".join(quote(segment, safe="") for segment in segments)


async def until(true: Any, within: float = PATIENCE_SECONDS) -> bool:
    """Whether it becomes true: a bounded wait, for what happens by itself."""
    deadline = time.monotonic() + within
    while True:
        got = true()
        if asyncio.iscoroutine(got):
            got = await got
        if got or time.monotonic() > deadline:
            return bool(got)
        await asyncio.sleep(0.02)


class Person:
    def __init__(self, http: aiohttp.ClientSession, url: str, server: str, name: str, password: str) -> None:
        self.http = http
        self.url = url
        self.server = server
        self.name = name
        self.password = password
        self.id = f"@{name}:{server}"
        self.token = ""
        self.refresh_token = ""
        self.device = ""
        self.forget_everything()

    def forget_everything(self) -> None:
        """Like a client that starts with an empty memory."""
        self.since: str | None = None
        self.timeline: dict[str, list[Json]] = defaultdict(list)
        self.state: dict[str, dict[tuple[str, str], Json]] = defaultdict(dict)
        self.typing: dict[str, list[str]] = {}
        self.receipts: dict[str, Json] = defaultdict(dict)
        self.account_data: dict[str, Json] = {}
        self.unread: dict[str, Json] = {}
        self.to_device: list[Json] = []
        self.devices_changed: set[str] = set()
        self.devices_left: set[str] = set()
        self.invites: dict[str, list[Json]] = {}
        self.knocks: dict[str, list[Json]] = {}
        self.rooms: set[str] = set()
        self.left: set[str] = set()
        self.limited: set[str] = set()
        self.prev_batch: dict[str, str] = {}

    # --- speaking

    async def calls(
        self,
        method: str,
        where: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Json | None = None,
        **query: Any,
    ) -> Json:
        """One request. A path without a leading / lies under /_matrix/client/v3."""
        _, answer = await self.asks(method, where, body, token=token, headers=headers, **query)
        return answer

    async def asks(
        self,
        method: str,
        where: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Json | None = None,
        **query: Any,
    ) -> tuple[Any, Any]:
        """The same with the response itself."""
        from yarl import URL

        url = self.url + (where if where.startswith("/") else f"{CLIENT}/{where}")
        bearer = self.token if token is None else token
        sent = dict(headers or {})
        if bearer:
            sent["Authorization"] = f"Bearer {bearer}"
        rest: Json = {"data": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        target = URL(url, encoded=True)
        if query:
            target = target.extend_query({key: str(value) for key, value in query.items() if value is not None})
        async with self.http.request(method, target, headers=sent, **rest) as answer:
            got = await answer.json() if answer.content_type == "application/json" else await answer.read()
            if answer.status >= 400:
                raise Refused(answer.status, got, answer.headers)
            return answer, got

    async def is_refused(self, doing: Any) -> Refused:
        """Does it and returns the refusal, of which there must be one."""
        try:
            got = await doing
        except Refused as refused:
            return refused
        raise AssertionError(f"this should have been refused, but was answered with {got!r}")

    # --- accounts

    async def registers(self, **more: Any) -> Json:
        body = {"username": self.name, "password": self.password, "auth": {"type": "m.login.dummy"}, **more}
        return self._signed_in(await self.calls("POST", "register", body, token=""))

    async def signs_in(self, **more: Any) -> Json:
        body = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": self.name},
            "password": self.password,
            **more,
        }
        return self._signed_in(await self.calls("POST", "login", body, token=""))

    def _signed_in(self, answer: Json) -> Json:
        assert answer["user_id"] == self.id, "the relay calls her by her name"
        self.token, self.device = answer["access_token"], answer["device_id"]
        self.refresh_token = answer.get("refresh_token", "")
        return answer

    async def on_another_device(self, **more: Any) -> Person:
        other = Person(self.http, self.url, self.server, self.name, self.password)
        await other.signs_in(**more)
        return other

    async def signs_out(self) -> None:
        await self.calls("POST", "logout", {})

    # --- rooms

    async def creates_room(self, *, with_: Person | list[Person] | None = None, **body: Any) -> str:
        """With these people in it: they are invited, and join."""
        others = [with_] if isinstance(with_, Person) else with_ or []
        room: str = (await self.calls("POST", "createRoom", body))["room_id"]
        for other in others:
            await self.invites_to(room, other)
            assert await until(lambda other=other: other.is_invited_to(room)), "the invitation arrives"
            await other.joins(room, self.server)
        return room

    async def is_invited_to(self, room: str) -> bool:
        answer = await self.calls("GET", "sync", filter='{"room":{"timeline":{"limit":1}}}')
        return room in answer.get("rooms", {}).get("invite", {})

    def membership(self, room: str, other: Person) -> str | None:
        """As her syncs told her so far."""
        event = self.state[room].get(("m.room.member", other.id))
        return event["content"]["membership"] if event is not None else None

    def name_of(self, room: str, other: Person) -> str | None:
        event = self.state[room].get(("m.room.member", other.id))
        return event["content"].get("displayname") if event is not None else None

    async def invites_to(self, room: str, other: Person | str) -> None:
        await self.calls("POST", f"{path('rooms', room)}/invite", {"user_id": _id(other)})

    async def joins(self, room: str, *via: str) -> str:
        query = "&".join(f"via={quote(server)}" for server in via)
        where = f"{path('join', room)}?{query}" if query else path("join", room)
        answer = await self.calls("POST", where, {})
        return str(answer["room_id"])

    async def knocks_on(self, room: str, *via: str) -> None:
        query = "&".join(f"via={quote(server)}" for server in via)
        await self.calls("POST", f"{path('knock', room)}?{query}", {})

    async def leaves(self, room: str) -> None:
        await self.calls("POST", f"{path('rooms', room)}/leave", {})

    async def forgets(self, room: str) -> None:
        await self.calls("POST", f"{path('rooms', room)}/forget", {})

    async def kicks(self, room: str, other: Person, **more: Any) -> None:
        await self.calls("POST", f"{path('rooms', room)}/kick", {"user_id": other.id, **more})

    async def bans(self, room: str, other: Person, **more: Any) -> None:
        await self.calls("POST", f"{path('rooms', room)}/ban", {"user_id": other.id, **more})

    async def unbans(self, room: str, other: Person) -> None:
        await self.calls("POST", f"{path('rooms', room)}/unban", {"user_id": other.id})

    async def sends(
        self, room: str, content: Json | None = None, *, type: str = "m.room.encrypted", txn: str | None = None
    ) -> str:
        """An encrypted message, unless told otherwise. Returns the event ID."""
        body = ciphertext() if content is None else content
        where = path("rooms", room, "send", type, txn or f"t{next(_transactions)}")
        return str((await self.calls("PUT", where, body))["event_id"])

    async def sets(self, room: str, type: str, content: Json, state_key: str = "") -> str:
        return str((await self.calls("PUT", path("rooms", room, "state", type, state_key), content))["event_id"])

    async def reads(self, room: str, type: str, state_key: str = "") -> Json:
        return await self.calls("GET", path("rooms", room, "state", type, state_key))

    async def redacts(self, room: str, event_id: str, **body: Any) -> str:
        where = path("rooms", room, "redact", event_id, f"t{next(_transactions)}")
        return str((await self.calls("PUT", where, body))["event_id"])

    async def event(self, room: str, event_id: str) -> Json:
        return await self.calls("GET", path("rooms", room, "event", event_id))

    async def members(self, room: str) -> dict[str, str]:
        chunk = (await self.calls("GET", f"{path('rooms', room)}/members"))["chunk"]
        return {event["state_key"]: event["content"]["membership"] for event in chunk}

    async def history(
        self, room: str, direction: str = "b", start: str | None = None, step: int = 30, most: int = 2000
    ) -> list[Json]:
        """Everything /messages gives, page by page."""
        found: list[Json] = []
        token = start
        while len(found) < most:
            page = await self.calls(
                "GET",
                f"{path('rooms', room)}/messages",
                dir=direction,
                limit=step,
                **({"from": token} if token else {}),
            )
            found += page["chunk"]
            token = page.get("end")
            if token is None:
                break
        return found

    async def is_typing(self, room: str, typing: bool = True) -> None:
        body = {"typing": typing, "timeout": 20000} if typing else {"typing": False}
        await self.calls("PUT", path("rooms", room, "typing", self.id), body)

    async def has_read(self, room: str, event_id: str, kind: str = "m.read") -> None:
        await self.calls("POST", path("rooms", room, "receipt", kind, event_id), {})

    async def tells_devices(self, type: str, messages: Json, txn: str | None = None) -> None:
        await self.calls("PUT", path("sendToDevice", type, txn or f"t{next(_transactions)}"), {"messages": messages})

    async def uploads(self, blob: bytes, content_type: str = "application/octet-stream", **query: Any) -> str:
        answer = await self.calls(
            "POST", "/_matrix/media/v3/upload", blob, headers={"Content-Type": content_type}, **query
        )
        return str(answer["content_uri"])

    async def downloads(self, uri: str, headers: Json | None = None) -> tuple[Any, bytes]:
        server, media_id = uri.removeprefix("mxc://").split("/")
        return await self.asks("GET", f"/_matrix/client/v1/media/download/{path(server, media_id)}", headers=headers)

    # --- listening

    async def syncs(self, timeout: int = 0, **query: Any) -> Json:
        """One /sync from where she stands, remembered. `timeout` in milliseconds."""
        answer = await self.calls(
            "GET", "sync", timeout=timeout, **({"since": self.since} if self.since else {}), **query
        )
        self._remembers(answer)
        return answer

    def _remembers(self, answer: Json) -> None:
        self.since = answer["next_batch"]
        rooms = answer.get("rooms", {})
        for section in ("join", "leave"):
            for room_id, room in rooms.get(section, {}).items():
                self._remembers_room(room_id, room)
        for room_id in rooms.get("join", {}):
            self.rooms.add(room_id)
            self.left.discard(room_id)
            self.invites.pop(room_id, None)
            self.knocks.pop(room_id, None)
        for room_id in rooms.get("leave", {}):
            self.rooms.discard(room_id)
            self.left.add(room_id)
            self.invites.pop(room_id, None)
        for room_id, invite in rooms.get("invite", {}).items():
            self.invites[room_id] = invite["invite_state"]["events"]
        for room_id, knock in rooms.get("knock", {}).items():
            self.knocks[room_id] = knock["knock_state"]["events"]
        for event in answer.get("account_data", {}).get("events", []):
            self.account_data[event["type"]] = event["content"]
        self.to_device += answer.get("to_device", {}).get("events", [])
        self.devices_changed |= set(answer.get("device_lists", {}).get("changed", []))
        self.devices_left |= set(answer.get("device_lists", {}).get("left", []))

    def _remembers_room(self, room_id: str, room: Json) -> None:
        timeline = room.get("timeline", {})
        if timeline.get("limited"):
            self.limited.add(room_id)
        if timeline.get("prev_batch"):
            self.prev_batch.setdefault(room_id, timeline["prev_batch"])
        for event in room.get("state", {}).get("events", []) + timeline.get("events", []):
            if "state_key" in event:
                self.state[room_id][(event["type"], event["state_key"])] = event
        self.timeline[room_id] += timeline.get("events", [])
        for event in room.get("ephemeral", {}).get("events", []):
            if event["type"] == "m.typing":
                self.typing[room_id] = event["content"]["user_ids"]
            elif event["type"] == "m.receipt":
                for event_id, kinds in event["content"].items():
                    for kind, readers in kinds.items():
                        for reader in readers:
                            self.receipts[room_id][(reader, kind)] = event_id
        if "unread_notifications" in room:
            self.unread[room_id] = room["unread_notifications"]

    def has(self, event_id: str) -> Json | None:
        return next((e for events in self.timeline.values() for e in events if e["event_id"] == event_id), None)

    async def sees(self, event_id: str, within: float = PATIENCE_SECONDS) -> Json | None:
        """The event, as soon as a sync brings it; None where none does in time."""
        await self.notices(lambda: self.has(event_id) is not None, within)
        return self.has(event_id)

    async def notices(self, what: Any, within: float = PATIENCE_SECONDS) -> bool:
        """Syncs until it is so, or for as long as she has patience."""
        deadline = time.monotonic() + within
        while not what():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await self.syncs(timeout=int(min(left, 2) * 1000))
        return True

    async def does_not_see(self, event_id: str) -> bool:
        return await self.sees(event_id, within=0.3) is None

    def ids(self, room: str) -> list[str]:
        return [event["event_id"] for event in self.timeline[room]]


def _id(other: Person | str) -> str:
    return other if isinstance(other, str) else other.id
