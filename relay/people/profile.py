"""Profiles: display name, avatar and further fields, shown only to people who share a room, unless the config opens them.

Name and avatar are also in the member events of the rooms, which follow a change. Spec: client-server-api/#profiles.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import orjson

from relay.accounts.users import Users
from relay.db import Database, Query, Tx
from relay.doors import Doors
from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, MissingParam, NotFound
from relay.ids import is_opaque, is_server_name, require_user_id, server_of
from relay.part import Part
from relay.remote import Remote
from relay.rooms.rooms import Rooms
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route

MAX_KEY_BYTES = 255
MAX_PROFILE_BYTES = 64 * 1024
MAX_DISPLAY_NAME = 256
MAX_AVATAR_URL = 1000
MAX_TIME_ZONE = 255
IN_ROOMS = ("displayname", "avatar_url")
_KEY = re.compile(r"(avatar_url|displayname|m\.tz|[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+)\Z")
_TIME_ZONE = re.compile(r"[A-Za-z0-9_+\-/]+\Z")


class KeyTooLarge(ApiError):
    errcode = "M_KEY_TOO_LARGE"


class ProfileTooLarge(ApiError):
    errcode = "M_PROFILE_TOO_LARGE"


class Profiles(Part):
    schema = Schema(
        "profile",
        tables=(
            Table(
                "profiles",
                "what a person shows to those who share a room",
                {
                    "user_id": ("whose profile", "until the field is removed or the account closed"),
                    "field": (
                        "display name, avatar, time zone or another field",
                        "until the field is removed or the account closed",
                    ),
                    "value": ("what stands there, as JSON", "until the field is removed or the account closed"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE profiles (
                user_id TEXT NOT NULL, field TEXT NOT NULL, value BYTES NOT NULL, PRIMARY KEY (user_id, field))
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        users: Users,
        rooms: Rooms,
        doors: Doors,
        remote: Remote | None,
        *,
        open_to_everyone: bool,
        seal_open: bool = False,
    ) -> None:
        self._db = db
        self._users = users
        self._rooms = rooms
        self._doors = doors
        self._remote = remote
        self.open_to_everyone = open_to_everyone
        self._seal_open = seal_open
        # The server sets it where application services make accounts when they are asked for one.
        self.local_user_exists: Callable[[str], Awaitable[bool]] = users.exists
        # Rewrites the member events of a user; the server sets it to what `rooms` offers.
        self.update_rooms: Callable[[str, Mapping[str, Any]], Awaitable[None]] | None = None
        # Keeps a picture that so far waits in memory; the server sets it to what `media` offers.
        self.adopt_avatar: Callable[[str], Awaitable[None]] | None = None

    def routes(self) -> Iterable[Route]:
        profile = "/_matrix/client/v3/profile/{user_id}"
        yield Route("GET", profile, self._get_all_route, auth="optional")
        yield Route("GET", f"{profile}/{{field}}", self._get_route, auth="optional")
        yield Route("PUT", f"{profile}/{{field}}", self._put_route)
        yield Route("DELETE", f"{profile}/{{field}}", self._delete_route)

    # --- for other parts

    async def of(self, user_id: str) -> dict[str, Any]:
        """All fields of a local user."""
        return await self._db.read(_fields, user_id)

    async def member_content(self, user_id: str) -> dict[str, Any]:
        """What the member events of a local user carry: displayname and avatar_url, as far as set."""
        fields = await self.of(user_id)
        return {field: fields[field] for field in IN_ROOMS if field in fields}

    def display_names(self, query: Query, user_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Name and avatar of local users, for a search that runs in a database thread."""
        found = {user_id: _fields(query, user_id) for user_id in user_ids}
        return {
            user_id: {field: fields[field] for field in IN_ROOMS if field in fields}
            for user_id, fields in found.items()
        }

    async def query_profile(self, user_id: str, field: str | None, origin: str | None = None) -> dict[str, Any]:
        """What another server gets to know. Raises Forbidden, NotFound. Spec: server-server-api/#get_matrixfederationv1queryprofile.

        `origin` is the server that asks: unless profiles are open, it shares a room with the user.
        """
        if (
            origin is not None
            and not self.open_to_everyone
            and origin not in await self._rooms.servers_sharing(user_id)
        ):
            raise Forbidden("This server shows profiles only to servers that share a room with the user.")
        return await self._local(user_id, field)

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `account.on_deactivated`: a closed account shows nothing, asked for erasure or not."""
        tx.run("DELETE FROM profiles WHERE user_id = $1", user_id)

    # --- reading

    async def _get_all_route(self, request: Request) -> Answer:
        return await self._shown(request, None)

    async def _get_route(self, request: Request) -> Answer:
        return await self._shown(request, request.params["field"])

    async def _shown(self, request: Request, field: str | None) -> dict[str, Any]:
        user_id = require_user_id(request.params["user_id"])
        viewer = request.caller.user_id if request.caller is not None else None
        if field is not None:
            _require_key(field)
        if self._users.is_local(user_id):
            await self._require_visible(viewer, user_id)
            return await self._local(user_id, field)
        if viewer is None and not (self.open_to_everyone and self._seal_open):
            raise Forbidden("Sign in to see the profiles of people on other servers.")
        if self._remote is None:
            raise NotFound("This server does not talk to others, so it can't ask for this profile.")
        return await self._remote.profile(server_of(user_id), user_id, field)

    async def _require_visible(self, viewer: str | None, user_id: str) -> None:
        if self.open_to_everyone:
            return
        # The same answer for accounts that don't exist, so that nobody can try out names.
        if viewer is None or not (viewer == user_id or await self._rooms.share_a_room(viewer, user_id)):
            raise Forbidden("This profile is shown only to people who share a room with its owner.")

    async def _local(self, user_id: str, field: str | None) -> dict[str, Any]:
        fields = await self.of(user_id)
        if not fields:
            if not await self.local_user_exists(user_id):
                raise NotFound("There is no such user on this server.")
            fields = await self.of(user_id)
        if field is None:
            return fields
        if field not in fields:
            raise NotFound("This profile has no such field.")
        return {field: fields[field]}

    # --- changing

    async def _put_route(self, request: Request) -> Answer:
        field = _require_own(request)
        body = request.json()
        if field not in body:
            raise MissingParam(f"The key {field} is missing.")
        value = body[field]
        # An empty name or avatar has always meant none.
        if field in IN_ROOMS and value == "":
            await self._change(request.user_id, field, None)
            return {}
        _require_value(field, value, any_avatar=self._seal_open)
        await self._doors.profile(request.user_id, field, value)
        if field == "avatar_url" and self.adopt_avatar is not None:
            await self.adopt_avatar(value)
        await self._change(request.user_id, field, orjson.dumps(value))
        return {}

    async def _delete_route(self, request: Request) -> Answer:
        await self._change(request.user_id, _require_own(request), None)
        return {}

    async def _change(self, user_id: str, field: str, value: bytes | None) -> None:
        """Sets or removes a field, and has the rooms follow where they show it."""

        def change(query: Query) -> bool:
            before = query.value("SELECT value FROM profiles WHERE user_id = $1 AND field = $2", user_id, field)
            if before == value:
                return False
            query.run("DELETE FROM profiles WHERE user_id = $1 AND field = $2", user_id, field)
            if value is not None:
                query.run("INSERT INTO profiles (user_id, field, value) VALUES ($1, $2, $3)", user_id, field, value)
                if len(orjson.dumps(_fields(query, user_id))) >= MAX_PROFILE_BYTES:
                    raise ProfileTooLarge(
                        f"A profile has less than {MAX_PROFILE_BYTES // 1024} KiB. Remove something from it first."
                    )
            return True

        with self._db.write() as tx:
            tx.call(change)
        if await tx and field in IN_ROOMS and self.update_rooms is not None:
            await self.update_rooms(user_id, await self.member_content(user_id))


def _fields(query: Query, user_id: str) -> dict[str, Any]:
    rows = query.all("SELECT field, value FROM profiles WHERE user_id = $1 ORDER BY field", user_id)
    return {field: orjson.loads(value) for field, value in rows}


def _require_own(request: Request) -> str:
    if request.params["user_id"] != request.user_id:
        raise Forbidden("You can change your own profile only.")
    return _require_key(request.params["field"])


def _require_key(field: str) -> str:
    """Spec: appendices/#common-namespaced-identifier-grammar."""
    if len(field.encode()) > MAX_KEY_BYTES:
        raise KeyTooLarge(f"The name of a profile field has at most {MAX_KEY_BYTES} bytes.")
    if not _KEY.match(field):
        raise InvalidParam(
            "A profile field is displayname, avatar_url, m.tz, or a name with a dot such as org.example.pronouns."
        )
    return field


def _require_value(field: str, value: Any, *, any_avatar: bool) -> None:
    if field not in ("displayname", "avatar_url", "m.tz"):
        return
    if not isinstance(value, str):
        raise BadJson(f"The key {field} is not a string.")
    if field == "displayname" and len(value) > MAX_DISPLAY_NAME:
        raise InvalidParam(f"A display name has at most {MAX_DISPLAY_NAME} characters. Take a shorter one.")
    if field == "avatar_url" and not is_mxc(value) and not (any_avatar and len(value) <= MAX_AVATAR_URL):
        raise InvalidParam("An avatar is a picture on a Matrix server: upload it, and give its mxc:// address.")
    if field == "m.tz" and (len(value) > MAX_TIME_ZONE or not _TIME_ZONE.match(value)):
        raise InvalidParam("A time zone looks like Europe/London.")


def is_mxc(uri: str) -> bool:
    if not uri.startswith("mxc://") or len(uri) > MAX_AVATAR_URL:
        return False
    server, _, media_id = uri[6:].partition("/")
    return is_server_name(server) and is_opaque(media_id)
