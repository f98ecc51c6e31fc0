"""createRoom: a room's first events, built one on the other and written together.

Spec: client-server-api/#post_matrixclientv3createroom. `m.room.encryption` is added where it is missing; exempt are
spaces and policy rooms. At `strict` the name, topic and avatar are left out rather than refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from relay.db import Database, IntegrityError
from relay.doors import Doors
from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, NotAllowed, RemoteError
from relay.ids import is_user_id, random_string, require_user_id, server_of
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS, RoomVersion
from relay.rooms.append import Appender
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import LOCAL, Key
from relay.web import get_bool, get_list, get_object, get_optional_string

MAX_INITIAL_STATE = 100
MAX_INVITES = 100
MAX_CREATORS = 100
MEGOLM = {"algorithm": "m.megolm.v1.aes-sha2"}
UNENCRYPTED_TYPES = frozenset({"m.space", "m.policy", "support.feline.policy.lists.msc.v1"})
UNSET = ("m.room.create", "m.room.member")

# join_rule, history_visibility, guest_access; guests are forbidden where nothing is said. Spec: the presets of createRoom.
PRESETS: dict[str, tuple[str, str, str | None]] = {
    "private_chat": ("invite", "shared", "can_join"),
    "trusted_private_chat": ("invite", "shared", "can_join"),
    "public_chat": ("public", "shared", None),
}


class Profiles(Protocol):
    async def member_content(self, user_id: str) -> dict[str, Any]:
        """displayname and avatar_url of a local user, as far as set."""
        ...


class Invites(Protocol):
    async def invite(self, sender: str, room_id: str, target: str, content: dict[str, Any] | None = None) -> None: ...


class Creator:
    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        appender: Appender,
        sender: Sender,
        seal: Seal,
        doors: Doors,
        profiles: Profiles,
        key: SigningKey,
        default_version: str,
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._sender = sender
        self._seal = seal
        self._doors = doors
        self._profiles = profiles
        self._key = key
        self._default_version = default_version
        self._server_name = rooms.server_name

    async def create(self, user_id: str, body: dict[str, Any], invites: Invites) -> str:
        """Returns the room ID. Invitations that fail for one person do not undo the room."""
        version = self._version(body)
        invited = [require_user_id(u) for u in get_list(body, "invite", [])]
        if len(invited) > MAX_INVITES:
            raise InvalidParam(f"Invite at most {MAX_INVITES} people when you create a room, the others later.")
        preset = get_optional_string(body, "preset") or (
            "public_chat" if body.get("visibility") == "public" else "private_chat"
        )
        if preset not in PRESETS:
            raise InvalidParam(f"{preset!r} is not a preset. Use private_chat, trusted_private_chat or public_chat.")
        alias = self._alias(body)
        creation = self._creation_content(version, body, preset, user_id, invited)
        await self._doors.create_room(user_id, creation)
        if len(invited) == 1 and server_of(invited[0]) == self._server_name:
            # A conversation with one who takes no invites is not begun at all.
            await self._doors.invite(user_id, invited[0], "")
        plan = await self._plan(version, body, preset, user_id, invited, alias, creation)
        for type, _, content in plan:
            await self._sender.adopt(type, content)
        if alias is not None:
            if await self._db.read(lambda query: query.value("SELECT 1 FROM aliases WHERE alias = $1", alias)):
                raise ApiError("This address is taken. Choose another room alias.", errcode="M_ROOM_IN_USE")
            await self._doors.alias(user_id, alias, "")
        if body.get("visibility") == "public":
            await self._doors.publish_room(user_id, "")
        room_id = await self.write(version, user_id, creation, plan, alias, body.get("visibility") == "public")
        direct = {"is_direct": True} if get_bool(body, "is_direct", False) else {}
        for target in invited:
            try:
                await invites.invite(user_id, room_id, target, direct)
            except ApiError as no:
                if len(invited) == 1 and server_of(target) == self._server_name:
                    raise no
            except (RemoteError, NotAllowed):
                continue
        return room_id

    def _version(self, body: dict[str, Any]) -> RoomVersion:
        name = get_optional_string(body, "room_version") or self._default_version
        if name not in VERSIONS:
            raise ApiError(
                f"This server does not know room version {name!r}. It knows {', '.join(VERSIONS)}.",
                errcode="M_UNSUPPORTED_ROOM_VERSION",
            )
        return VERSIONS[name]

    def _alias(self, body: dict[str, Any]) -> str | None:
        local = get_optional_string(body, "room_alias_name")
        if local is None:
            return None
        alias = f"#{local}:{self._server_name}"
        if not local or ":" in local or "#" in local or "\x00" in local or len(alias.encode()) > 255:
            raise InvalidParam(f"{local!r} can't be a room alias. Leave out '#' and ':'.")
        return alias

    def _creation_content(
        self, version: RoomVersion, body: dict[str, Any], preset: str, user_id: str, invited: Sequence[str]
    ) -> dict[str, Any]:
        content = dict(get_object(body, "creation_content", {}))
        content.pop("creator", None)
        content["room_version"] = version.name
        if version.create_creator:
            content["creator"] = user_id
        if version.creators_privileged:
            more = [require_user_id(u) for u in get_list(content, "additional_creators", [])]
            if preset == "trusted_private_chat":
                more += [u for u in invited if u not in more]
            if len(more) > MAX_CREATORS:
                raise InvalidParam(f"A room has at most {MAX_CREATORS} additional creators.")
            if more:
                content["additional_creators"] = more
        content = self._seal.outgoing("m.room.create", "", content)
        if version.room_id_is_create:
            # Two rooms made in one millisecond would be one: the room ID is the hash of this event.
            content["relay.nonce"] = random_string(16)
        return content

    async def _plan(
        self,
        version: RoomVersion,
        body: dict[str, Any],
        preset: str,
        user_id: str,
        invited: Sequence[str],
        alias: str | None,
        creation: dict[str, Any],
    ) -> list[tuple[str, str, dict[str, Any]]]:
        """(type, state key, content) of everything that follows the creator's join, in the standard's order."""
        creators = {user_id, *creation.get("additional_creators", [])}
        initial: dict[Key, dict[str, Any]] = {}
        given = get_list(body, "initial_state", [])
        if len(given) > MAX_INITIAL_STATE:
            raise InvalidParam(f"A room begins with at most {MAX_INITIAL_STATE} initial state events.")
        for one in given:
            if (
                not isinstance(one, dict)
                or not isinstance(one.get("type"), str)
                or not isinstance(one.get("content"), dict)
            ):
                raise BadJson("Each of initial_state needs a type and a content.")
            state_key = one.get("state_key", "")
            if not isinstance(state_key, str) or one["type"] in UNSET:
                raise BadJson(f"initial_state can't set {one['type']} with this state key.")
            initial[(one["type"], state_key)] = one["content"]

        join_rule, visibility, guests = PRESETS[preset]
        planned: dict[Key, dict[str, Any]] = {
            ("m.room.power_levels", ""): self._levels(version, body, preset, user_id, creators, invited)
        }
        if alias is not None:
            planned[("m.room.canonical_alias", "")] = {"alias": alias}
        planned[("m.room.join_rules", "")] = {"join_rule": join_rule}
        planned[("m.room.history_visibility", "")] = {"history_visibility": visibility}
        if guests is not None:
            planned[("m.room.guest_access", "")] = {"guest_access": guests}
        if ("m.room.power_levels", "") in initial and "power_level_content_override" not in body:
            planned[("m.room.power_levels", "")] = initial.pop(("m.room.power_levels", ""))
        planned.update(initial)
        name, topic = get_optional_string(body, "name"), get_optional_string(body, "topic")
        if name is not None:
            planned[("m.room.name", "")] = {"name": name}
        if topic is not None:
            planned[("m.room.topic", "")] = {"topic": topic, "m.topic": {"m.text": [{"body": topic}]}}
        encryption = planned.get(("m.room.encryption", ""))
        if self._seal.level != "open":
            if encryption is None and creation.get("type") not in UNENCRYPTED_TYPES:
                planned[("m.room.encryption", "")] = dict(MEGOLM)
            elif encryption is not None and not self._seal.encryption(encryption):
                raise Forbidden("This server does not know the encryption algorithm. Use m.megolm.v1.aes-sha2.")
        return [
            (type, key, self._seal.outgoing(type, key, content))
            for (type, key), content in planned.items()
            if not self._seal.leaves_out(type)
        ]

    def _levels(
        self,
        version: RoomVersion,
        body: dict[str, Any],
        preset: str,
        user_id: str,
        creators: set[str],
        invited: Sequence[str],
    ) -> dict[str, Any]:
        users = {} if version.creators_privileged else {user_id: 100}
        if preset == "trusted_private_chat" and not version.creators_privileged:
            users.update(dict.fromkeys(invited, 100))
        levels: dict[str, Any] = {
            "users": users,
            "users_default": 0,
            "events": {
                "m.room.name": 50,
                "m.room.power_levels": 100,
                "m.room.history_visibility": 100,
                "m.room.canonical_alias": 50,
                "m.room.avatar": 50,
                # Version 12: above what a moderator can do, since the upgraded room has new creators.
                "m.room.tombstone": 150 if version.creators_privileged else 100,
                "m.room.server_acl": 100,
                "m.room.encryption": 100,
                "org.matrix.msc3401.call.member": 0,
            },
            "events_default": 0,
            "state_default": 50,
            "ban": 50,
            "kick": 50,
            "redact": 50,
            "invite": 50 if preset == "public_chat" else 0,
        }
        levels.update(get_object(body, "power_level_content_override", {}))
        named = levels.get("users")
        if not isinstance(named, dict) or not all(is_user_id(u) for u in named):
            raise BadJson("The users of power_level_content_override are not an object of user IDs.")
        if version.creators_privileged and creators & set(named):
            raise InvalidParam("In this room version creators have no entry in the power levels: leave them out.")
        return levels

    async def write(
        self,
        version: RoomVersion,
        user_id: str,
        creation: dict[str, Any],
        plan: Sequence[tuple[str, str, dict[str, Any]]],
        alias: str | None,
        published: bool,
    ) -> str:
        """The room with its create event, its creator's join and what was planned, in one write. Returns its ID."""
        member = {"membership": "join", **await self._profiles.member_content(user_id)}
        room_id = None if version.room_id_is_create else f"!{random_string(18)}:{self._server_name}"
        create = events.build(
            version,
            room_id=room_id,
            type="m.room.create",
            sender=user_id,
            content=creation,
            state_key="",
            prev_events=[],
            auth_events=[],
            depth=1,
            origin_server_ts=self._sender.now(),
            server_name=self._server_name,
            key=self._key,
        )
        state: dict[Key, Event] = {CREATE: create}
        try:
            with self._db.write(chain=create.room_id) as tx:
                room = Room(self._db, self._server_name, tx.pos(), create.room_id, version)
                self._appender.new_room(tx, room)
                self._appender.append(tx, room, create, marks=LOCAL)
                for type, key, content in [("m.room.member", user_id, member), *plan]:
                    event = self._sender.build(room, state, sender=user_id, type=type, content=content, state_key=key)
                    self._appender.append(tx, room, event, marks=LOCAL)
                    state[(type, key)] = event
                if alias is not None:
                    tx.run(
                        "INSERT INTO aliases (alias, room_nid, creator) VALUES ($1, $2, $3)", alias, room.nid, user_id
                    )
                if published:
                    tx.run("UPDATE rooms SET published = 1 WHERE nid = $1", room.nid)
                    room.published = True
        except NotAllowed as no:
            raise ApiError(f"The room can't be made like this: {no.reason}.", errcode="M_INVALID_ROOM_STATE") from no
        try:
            await tx
        except IntegrityError:
            if alias is None:
                raise
            # Somebody else took it between the look and the write.
            raise ApiError("This address is taken. Choose another room alias.", errcode="M_ROOM_IN_USE") from None
        return create.room_id
