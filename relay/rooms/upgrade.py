"""A room is replaced by a new one of another version: what it is moves along, who is in it follows by the tombstone.

The new room is written whole before the old one is closed, so that a failure in between leaves the old room as it was. What
each person keeps for the old room (tags, push rules) is carried over by `people/following.py` when she comes to the new one.
Spec: client-server-api/#room-upgrades (its steps are numbered here), rooms/v12/.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relay.db import Database, Query
from relay.doors import Doors
from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, NotAllowed, Refused
from relay.ids import is_user_id, random_string, require_user_id
from relay.part import Part
from relay.protocol.power import creators, read_level
from relay.protocol.seal import Seal
from relay.protocol.shapes import REPLACED
from relay.protocol.versions import VERSIONS, RoomVersion
from relay.rooms.create import MAX_CREATORS, MEGOLM, UNENCRYPTED_TYPES, Creator
from relay.rooms.room import CREATE, ENCRYPTION, JOIN_RULES, POWER_LEVELS, SERVER_ACL, Room
from relay.rooms.rooms import STILL_COMING, Rooms
from relay.rooms.send import Sender
from relay.rooms.store import Key
from relay.rooms.summary import CHILD, SPACE, via_of
from relay.web import Answer, Request, Route, get_list, get_string

TOMBSTONE = "m.room.tombstone"
CANONICAL_ALIAS: Key = ("m.room.canonical_alias", "")
MEMBER = "m.room.member"
# Step 3, in the standard's order; power levels come last, when everything else is said (see `_plan`).
CARRIED: tuple[Key, ...] = (
    SERVER_ACL,
    ENCRYPTION,
    ("m.room.name", ""),
    ("m.room.avatar", ""),
    ("m.room.topic", ""),
    ("m.room.guest_access", ""),
    ("m.room.history_visibility", ""),
    JOIN_RULES,
)
MAX_BANS = 10_000
MAX_CHILDREN = 1_000
# In version 12: above every moderator, since whoever upgrades becomes the new room's creator.
TOMBSTONE_LEVEL = 150
CREATOR_LEVEL = 100
QUIET_LEVEL = 50

_SCALARS = ("users_default", "events_default", "state_default", "ban", "redact", "kick", "invite")
_Plan = list[tuple[str, str, dict[str, Any]]]


class Upgrades(Part):
    def __init__(self, db: Database, rooms: Rooms, sender: Sender, creator: Creator, seal: Seal, doors: Doors) -> None:
        self._db = db
        self._rooms = rooms
        self._sender = sender
        self._creator = creator
        self._seal = seal
        self._doors = doors
        # (room, version, who): an impatient second request waits for the first and gets its answer.
        self._under_way: dict[tuple[str, str, str], asyncio.Future[str]] = {}

    def routes(self) -> Iterable[Route]:
        yield Route("POST", "/_matrix/client/v3/rooms/{roomId}/upgrade", self._upgrade_route, limit="joins")

    async def _upgrade_route(self, request: Request) -> Answer:
        body = request.json()
        version = VERSIONS.get(name := get_string(body, "new_version"))
        if version is None:
            raise ApiError(
                f"This server does not know room version {name[:32]!r}. It knows {', '.join(VERSIONS)}.",
                errcode="M_UNSUPPORTED_ROOM_VERSION",
            )
        more: list[str] = []
        if version.creators_privileged:
            more = [require_user_id(one) for one in get_list(body, "additional_creators", [])]
            if len(more) > MAX_CREATORS:
                raise InvalidParam(f"A room has at most {MAX_CREATORS} additional creators.")
        key = (request.params["roomId"], version.name, request.user_id)
        running = self._under_way.get(key)
        if running is not None:
            return {"replacement_room": await asyncio.shield(running)}
        task = asyncio.ensure_future(self.upgrade(request.user_id, key[0], version, list(dict.fromkeys(more))))
        self._under_way[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        # Once it began it is done to its end, whether the client waits for it or not.
        return {"replacement_room": await asyncio.shield(task)}

    def _ended(self, key: tuple[str, str, str], done: asyncio.Future[str]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # looked at, even where nobody waits for it any more

    async def upgrade(self, user_id: str, room_id: str, version: RoomVersion, more: Sequence[str] = ()) -> str:
        """The ID of the room that replaces this one. Raises Forbidden and what creating a room raises."""
        old = await self._rooms.require_joined(room_id, user_id)
        await self._require_power(old, user_id)  # 1
        creation = await self._creation(old, user_id, version, more)
        await self._doors.create_room(user_id, creation)
        aliases = await self._db.read(_aliases_of, old.nid)
        plan = await self._plan(old, user_id, version, creation, aliases)
        published = old.published
        if published:
            await self._doors.publish_room(user_id, "")
        new_id = await self._creator.write(version, user_id, creation, plan, None, published)  # 2, 3
        content = self._seal.outgoing(TOMBSTONE, "", {"body": REPLACED, "replacement_room": new_id})
        await self._sender.send(room_id, sender=user_id, type=TOMBSTONE, content=content, state_key="")  # 5
        await self._move_addresses(old, new_id, published)  # 4
        await self._close(old, user_id, aliases)  # 6
        return new_id

    async def _require_power(self, old: Room, user_id: str) -> None:
        levels = await old.levels()
        if levels.user(user_id) < levels.to_send(TOMBSTONE, True):
            raise Forbidden("You can't upgrade this room: that takes the power to send m.room.tombstone in it.")

    # --- the new room

    async def _creation(self, old: Room, user_id: str, version: RoomVersion, more: Sequence[str]) -> dict[str, Any]:
        before = await old.content(*CREATE)
        predecessor: dict[str, Any] = {"room_id": old.room_id}
        if not version.room_id_is_create and old.extremities:
            predecessor["event_id"] = max(old.extremities, key=lambda event_id: old.extremities[event_id])
        content: dict[str, Any] = {"room_version": version.name, "predecessor": predecessor}
        if isinstance(before.get("type"), str):
            content["type"] = before["type"]
        if before.get("m.federate") is False:
            content["m.federate"] = False
        if version.create_creator:
            content["creator"] = user_id
        if more:
            content["additional_creators"] = [one for one in more if one != user_id]
        content = self._seal.outgoing("m.room.create", "", content)
        if version.room_id_is_create:
            content["relay.nonce"] = random_string(16)
        return content

    async def _plan(
        self, old: Room, user_id: str, version: RoomVersion, creation: Mapping[str, Any], aliases: Sequence[str]
    ) -> _Plan:
        """(type, state key, content) of what follows the creator's join. Until power levels are set a creator may do anything
        the rules know, so they come last."""
        found = await old.state_events(CARRIED)
        plan: _Plan = []
        for key in CARRIED:
            content = found[key].content if key in found else {}
            if key == JOIN_RULES:
                content = _join_rules(content, version)
            if key == ENCRYPTION and self._seal.level != "open" and not self._seal.encryption(content):
                content = {} if creation.get("type") in UNENCRYPTED_TYPES else dict(MEGOLM)
            self._add(plan, key, content)
        alias = (await old.content(*CANONICAL_ALIAS)).get("alias")
        if aliases:
            others = [one for one in aliases if one != alias]
            named: dict[str, Any] = {"alias": alias} if alias in aliases else {}
            if named:
                self._add(plan, CANONICAL_ALIAS, named | ({"alt_aliases": others} if others else {}))
        if creation.get("type") == SPACE:
            keys = [key for key in old.state if key[0] == CHILD][:MAX_CHILDREN]
            for key, event in (await old.state_events(keys)).items():
                if via_of(event.content):
                    self._add(plan, key, event.content)
        if old.partial is not None:
            raise ApiError(STILL_COMING, status=503)
        banned = [user for user, membership in old.members.items() if membership == "ban" and user != user_id]
        plan += [(MEMBER, user, {"membership": "ban"}) for user in sorted(banned)[:MAX_BANS]]
        levels = await self._levels(old, user_id, version, creation)
        return [*plan, (*POWER_LEVELS, self._seal.outgoing(*POWER_LEVELS, levels))]

    def _add(self, plan: _Plan, key: Key, content: Mapping[str, Any]) -> None:
        """What the seal does not allow any more stays behind."""
        if not content or self._seal.leaves_out(key[0]):
            return
        try:
            plan.append((*key, self._seal.outgoing(*key, dict(content))))
        except Refused:
            return

    async def _levels(
        self, old: Room, user_id: str, version: RoomVersion, creation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The old room's levels as the new version writes them; creators' are said by the create event or said here."""
        before = await old.content(*POWER_LEVELS)
        levels: dict[str, Any] = {}
        for name in _SCALARS:
            if (level := read_level(before.get(name), old.version)) is not None:
                levels[name] = level
        for name in ("events", "notifications", "users"):
            given = before.get(name)
            read = {k: read_level(v, old.version) for k, v in given.items()} if isinstance(given, dict) else {}
            levels[name] = {k: v for k, v in read.items() if v is not None}
        if not levels["notifications"]:
            del levels["notifications"]
        users = {one: level for one, level in levels["users"].items() if is_user_id(one)}
        create = await old.event(*CREATE)
        was = creators(create) if create is not None else frozenset()
        if version.creators_privileged:
            now = {user_id, *creation.get("additional_creators", [])}
            levels["users"] = {one: level for one, level in users.items() if one not in now}
            base = levels.get("state_default", 50)
            known = levels["events"].get(TOMBSTONE, base)
            if known <= base or not old.version.creators_privileged:
                levels["events"][TOMBSTONE] = max(TOMBSTONE_LEVEL, base + 1, known)
            return levels
        if old.version.creators_privileged or POWER_LEVELS not in old.state:
            # Who stood above all levels, or had hers without being named, needs one now.
            top = max([CREATOR_LEVEL, *users.values(), *levels["events"].values()])
            users.update(dict.fromkeys((one for one in was if is_user_id(one)), top))
        levels["users"] = users
        return levels

    # --- the old room

    async def _move_addresses(self, old: Room, new_id: str, published: bool) -> None:
        new = await self._rooms.get(new_id)
        assert new is not None
        with self._db.write() as tx:
            tx.run("UPDATE aliases SET room_nid = $2 WHERE room_nid = $1", old.nid, new.nid)
            if published:
                tx.run("UPDATE rooms SET published = 0 WHERE nid = $1", old.nid)
                tx.after(lambda: setattr(old, "published", False))
        await tx

    async def _close(self, old: Room, user_id: str, aliases: Sequence[str]) -> None:
        """Nobody speaks or invites there any more, and no address leads there, as far as she who upgrades may say so."""
        levels = dict(await old.content(*POWER_LEVELS))
        default = read_level(levels.get("users_default"), old.version) or 0
        quiet = max(QUIET_LEVEL, default + 1)
        for name in ("events_default", "invite"):
            levels[name] = max(quiet, read_level(levels.get(name), old.version) or 0)
        canonical = await old.content(*CANONICAL_ALIAS)
        # Where no levels were ever set, those who have power have it from their absence.
        left: list[tuple[Key, dict[str, Any]]] = [(POWER_LEVELS, levels)] if POWER_LEVELS in old.state else []
        if canonical.get("alias") in aliases:
            left.append((CANONICAL_ALIAS, {}))
        for (type, state_key), content in left:
            try:
                await self._sender.send(old.room_id, sender=user_id, type=type, content=content, state_key=state_key)
            except (ApiError, NotAllowed, BadJson):
                continue


def _join_rules(content: Mapping[str, Any], version: RoomVersion) -> dict[str, Any]:
    """What the new version does not know becomes an invitation."""
    rule = content.get("join_rule")
    known = {
        "knock": version.knock,
        "restricted": version.restricted,
        "knock_restricted": version.knock_restricted,
    }
    if not isinstance(rule, str) or not known.get(rule, True):
        return {"join_rule": "invite"}
    return dict(content)


def _aliases_of(query: Query, room_nid: int) -> list[str]:
    return [row[0] for row in query.all("SELECT alias FROM aliases WHERE room_nid = $1 ORDER BY alias", room_nid)]
