"""Devices: a name for each sign-in that a person can recognise, and how one signs out. Nobody else ever sees the names.

Whoever keeps something for a device (keys, messages, pushers) adds a function to `on_device_deleted`; it runs inside the
write that deletes the device, so that nothing is left behind. Spec: client-server-api/#device-management.
"""

from __future__ import annotations

import string
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from secrets import choice
from typing import Any

from relay.accounts.reauth import Reauth
from relay.accounts.sessions import Issued, Sessions
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, InvalidParam, NotFound
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_list, get_optional_string, json_response

OnDeviceDeleted = Callable[[Tx, str, str], None]

GENERATED_ID_LENGTH = 10
MAX_DEVICE_ID_BYTES = 255
MAX_DISPLAY_NAME = 100
MAX_DEVICES_PER_USER = 1000
# Deleting all devices looks again for one that signed in meanwhile, this often.
MAX_SWEEPS = 3


@dataclass(slots=True, frozen=True)
class Device:
    user_id: str
    device_id: str
    display_name: str | None
    last_seen_day: int | None

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"device_id": self.device_id, "user_id": self.user_id}
        if self.display_name is not None:
            answer["display_name"] = self.display_name
        if self.last_seen_day is not None:
            answer["last_seen_ts"] = self.last_seen_day
        return answer


class Devices(Part):
    schema = Schema(
        "devices",
        tables=(
            Table(
                "devices",
                "a device's name, which its owner chose",
                {
                    "user_id": ("whose device it is", "until the device signs out"),
                    "device_id": ("its identifier, which its keys carry", "until the device signs out"),
                    "display_name": (
                        "so that the owner recognises it; shown to nobody else",
                        "until the device signs out",
                    ),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE devices (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, display_name TEXT, PRIMARY KEY (user_id, device_id))
                CLUSTERED
            """,
        ),
    )

    def __init__(self, db: Database, sessions: Sessions, reauth: Reauth) -> None:
        self._db = db
        self._sessions = sessions
        self._reauth = reauth
        self.on_device_deleted: list[OnDeviceDeleted] = []
        # In the write with which somebody signs out everywhere: what else goes on in her name.
        self.on_all_signed_out: list[Callable[[Tx, str], None]] = []
        # Called after the commit that made a device: (user, device).
        self.on_device_added: list[Callable[[str, str], None]] = []
        # Whether this is the public part of a cross-signing key of the user; `keys` sets it.
        self.is_signing_key: Callable[[str, str], Awaitable[bool]] | None = None

    def routes(self) -> Iterable[Route]:
        client = "/_matrix/client/v3"
        yield Route("GET", f"{client}/devices", self._list_route)
        yield Route("GET", f"{client}/devices/{{device_id}}", self._get_route)
        yield Route("PUT", f"{client}/devices/{{device_id}}", self._put_route)
        yield Route("DELETE", f"{client}/devices/{{device_id}}", self._delete_route)
        yield Route("POST", f"{client}/delete_devices", self._delete_many_route)
        yield Route("POST", f"{client}/logout", self._logout_route, when_locked=True)
        yield Route("POST", f"{client}/logout/all", self._logout_all_route, when_locked=True)

    # --- reading

    async def list(self, user_id: str) -> Collection[Device]:
        return await self._db.read(self._all, user_id)

    async def get(self, user_id: str, device_id: str) -> Device | None:
        return next((device for device in await self.list(user_id) if device.device_id == device_id), None)

    async def names(self, user_id: str) -> Mapping[str, str | None]:
        """For the owner's own eyes."""
        return {device.device_id: device.display_name for device in await self.list(user_id)}

    def ids(self, query: Query, user_id: str) -> set[str]:
        """For writes that must not outlive a device: asked inside the database thread."""
        return {row[0] for row in query.all("SELECT device_id FROM devices WHERE user_id = $1", user_id)}

    def of_everybody(self, query: Query) -> Collection[tuple[str, str]]:
        return [(user_id, device_id) for user_id, device_id in query.all("SELECT user_id, device_id FROM devices")]

    def _all(self, query: Query, user_id: str) -> Collection[Device]:
        rows = query.all("SELECT device_id, display_name FROM devices WHERE user_id = $1 ORDER BY device_id", user_id)
        last_seen = self._sessions.last_seen(query, user_id)
        return [Device(user_id, device_id, name, last_seen.get(device_id)) for device_id, name in rows]

    # --- signing in and out

    async def choose_id(self, user_id: str, wanted: str | None) -> str:
        """The device ID of a new session. Raises InvalidParam, Forbidden."""
        if wanted is None:
            return "".join(choice(string.ascii_uppercase) for _ in range(GENERATED_ID_LENGTH))
        if not 0 < len(wanted.encode()) <= MAX_DEVICE_ID_BYTES or not wanted.isprintable():
            raise InvalidParam(f"A device_id has 1 to {MAX_DEVICE_ID_BYTES} printable bytes. Leave it out to get one.")
        if self.is_signing_key is not None and await self.is_signing_key(user_id, wanted):
            raise Forbidden("This device_id is the name of a cross-signing key. Leave it out to get another one.")
        return wanted

    def sign_in(self, tx: Tx, user_id: str, device_id: str, display_name: str | None, *, refreshable: bool) -> Issued:
        """A session on this device, new or known; a known one keeps its name and its keys, and loses its old tokens."""
        self.add(tx, user_id, device_id, display_name[:MAX_DISPLAY_NAME] if display_name else None)
        return self._sessions.open(tx, user_id, device_id, refreshable=refreshable)

    def add(self, tx: Tx, user_id: str, device_id: str, name: str | None) -> None:
        """A device on which nobody is signed in yet; a known one stays as it is."""

        def insert(query: Query) -> None:
            added = query.run(
                "INSERT INTO devices (user_id, device_id, display_name) VALUES ($1, $2, $3)"
                " ON CONFLICT (user_id, device_id) DO NOTHING",
                user_id,
                device_id,
                name,
            )
            if added and query.value("SELECT count(*) FROM devices WHERE user_id = $1", user_id) > MAX_DEVICES_PER_USER:
                raise Forbidden(f"You are signed in on {MAX_DEVICES_PER_USER} devices. Sign out of some of them first.")

        def tell() -> None:
            for told in self.on_device_added:
                told(user_id, device_id)

        tx.call(insert)
        if self.on_device_added:
            tx.after(tell)

    def delete(self, tx: Tx, user_id: str, device_ids: Collection[str]) -> None:
        """Their sessions, and all that anybody keeps for them."""
        for device_id in device_ids:
            for told in self.on_device_deleted:
                told(tx, user_id, device_id)
            tx.run("DELETE FROM devices WHERE user_id = $1 AND device_id = $2", user_id, device_id)
        self._sessions.end(tx, user_id, device_ids)

    async def delete_all(
        self, user_id: str, *, keep: str | None = None, also: Callable[[Tx], None] | None = None
    ) -> None:
        """Signs out everywhere, apart from the device `keep`; `also` adds to the same write."""
        for _ in range(MAX_SWEEPS):
            doomed = [device.device_id for device in await self.list(user_id) if device.device_id != keep]
            if not doomed and also is None:
                return
            with self._db.write() as tx:
                if also is not None:
                    also(tx)
                self.delete(tx, user_id, doomed)
            await tx
            also = None

    # --- endpoints

    async def _list_route(self, request: Request) -> Answer:
        return {"devices": [device.answer() for device in await self.list(request.user_id)]}

    async def _get_route(self, request: Request) -> Answer:
        return (await self._own(request)).answer()

    async def _put_route(self, request: Request) -> Answer:
        name = get_optional_string(request.json(), "display_name")
        if name is not None and len(name) > MAX_DISPLAY_NAME:
            raise InvalidParam(f"A device's name has at most {MAX_DISPLAY_NAME} characters. Take a shorter one.")
        if request.who.service and await self.get(request.user_id, request.params["device_id"]) is None:
            return await self._make_for_service(request, name)
        device = await self._own(request)
        if name is not None:
            with self._db.write() as tx:
                tx.run(
                    "UPDATE devices SET display_name = $3 WHERE user_id = $1 AND device_id = $2",
                    device.user_id,
                    device.device_id,
                    name,
                )
            await tx
        return {}

    async def _make_for_service(self, request: Request, name: str | None) -> Answer:
        """A device on which nobody signs in: its service names it. Spec: application-service-api/#creating-devices"""
        device_id = await self.choose_id(request.user_id, request.params["device_id"])
        with self._db.write() as tx:
            self.add(tx, request.user_id, device_id, name)
        await tx
        return json_response({}, status=201)

    async def _delete_route(self, request: Request) -> Answer:
        await self._reauth.require(request)
        await self._delete_known(request.user_id, {request.params["device_id"]})
        return {}

    async def _delete_many_route(self, request: Request) -> Answer:
        result = await self._reauth.require(request)
        wanted = get_list(result.body, "devices")
        if not all(isinstance(device_id, str) for device_id in wanted) or len(wanted) > MAX_DEVICES_PER_USER:
            raise InvalidParam(f"The key devices holds at most {MAX_DEVICES_PER_USER} device IDs.")
        await self._delete_known(request.user_id, set(wanted))
        return {}

    async def _logout_route(self, request: Request) -> Answer:
        with self._db.write() as tx:
            self.delete(tx, request.user_id, (request.who.device_id,))
        await tx
        return {}

    async def _logout_all_route(self, request: Request) -> Answer:
        def tell(tx: Tx) -> None:
            for told in self.on_all_signed_out:
                told(tx, request.user_id)

        await self.delete_all(request.user_id, also=tell)
        return {}

    async def _delete_known(self, user_id: str, device_ids: Collection[str]) -> None:
        known = [device.device_id for device in await self.list(user_id) if device.device_id in device_ids]
        if known:
            with self._db.write() as tx:
                self.delete(tx, user_id, known)
            await tx

    async def _own(self, request: Request) -> Device:
        device = await self.get(request.user_id, request.params["device_id"])
        if device is None:
            raise NotFound("You have no device with this ID.")
        return device
