"""Rooms that live on other servers: joining, leaving, knocking and inviting across the wire, from our side.

Spec: server-server-api/#joining-rooms, #leaving-rooms-rejecting-invites, #knocking-upon-a-room, #inviting-to-a-room.
All network comes before the room's lock. A room without encryption is left again at once (the design's section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import orjson
import structlog

from relay.db import Database, Query
from relay.errors import ApiError, BadEvent, Forbidden, InvalidParam, NotAllowed, NotFound, RemoteError
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.auth import check
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.protocol.versions import RoomVersion
from relay.remote import JoinAnswer, Remote, Template
from relay.rooms.append import Appender
from relay.rooms.gaps import authorised
from relay.rooms.intake import Intake, Taken, in_order
from relay.rooms.room import CREATE, ENCRYPTION, SERVER_ACL, STRIPPED_KEYS, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import LOCAL, REJECTED, Key

log = structlog.get_logger("afar")

MAX_SERVERS_TRIED = 8
MAX_STATE_EVENTS = 100_000
NOT_ENCRYPTED = (
    "This room is not encrypted, so this server keeps its people out of it. Ask its moderators to turn on encryption, "
    "or your operator to list it in privacy.clear_rooms."
)

# (room ID, whether it is encrypted, its type) -> whether the seal lets local people in
MayBeJoined = Callable[[str, bool, object], bool]


class Afar:
    def __init__(
        self, db: Database, rooms: Rooms, appender: Appender, intake: Intake, remote: Remote, key: SigningKey
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._intake = intake
        self._remote = remote
        self._key = key
        self._server_name = rooms.server_name

    # --- join

    async def join(
        self, user_id: str, room_id: str, servers: Sequence[str], member: Mapping[str, Any], may_be_joined: MayBeJoined
    ) -> None:
        """Raises an ApiError that says what the servers answered."""
        invite = await self._told(user_id, room_id, "invite")
        # Without a create event it tells nothing about the room.
        knows = any(e.get("type") == "m.room.create" for e in invite)
        if knows and not may_be_joined(room_id, *_encryption_and_type(invite)):
            raise Forbidden(NOT_ENCRYPTED)
        last: RemoteError | None = None
        for server in servers[:MAX_SERVERS_TRIED]:
            try:
                await self._join_through(server, user_id, room_id, member, may_be_joined)
                return
            except RemoteError as error:
                log.info("could not join through a server", server=server, status=error.status, errcode=error.errcode)
                last = error
        if last is None:
            raise NotFound("No server is known that is in this room. Ask for an invitation, or give a server in `via`.")
        if last.status in (400, 403, 404):
            raise ApiError(f"{last.server} answered: {last.text}", status=last.status, errcode=last.errcode)
        raise ApiError(
            f"None of the room's servers could be reached; the last answer: {last.text}. Try again later.", status=502
        )

    async def _join_through(
        self, server: str, user_id: str, room_id: str, member: Mapping[str, Any], may_be_joined: MayBeJoined
    ) -> None:
        template = await self._remote.make("join", server, room_id, user_id)
        pdu = self._checked_template(server, template, room_id, user_id, "join")
        content = {**member}
        authoriser = pdu["content"].get("join_authorised_via_users_server")
        if isinstance(authoriser, str) and template.version.restricted:
            content["join_authorised_via_users_server"] = authoriser
        event = self._signed(server, {**pdu, "content": content}, template.version)
        answer = await self._remote.send_join(server, event)
        if answer.event is not None:
            event = self._same_event(server, answer.event, event)
        state, chain = await self._verified_state(server, answer, event)
        current = {one.event.key: one.event for one in state if one.event.key is not None}
        create = current[CREATE]
        encrypted = ENCRYPTION in current and bool(current[ENCRYPTION].content.get("algorithm"))
        if not may_be_joined(room_id, encrypted, create.content.get("type")):
            await self._leave_through([server], user_id, room_id)
            raise Forbidden(NOT_ENCRYPTED)
        await self._record_join(room_id, template.version, event, state, chain)

    def _checked_template(
        self, server: str, template: Template, room_id: str, user_id: str, membership: Literal["join", "leave", "knock"]
    ) -> dict[str, Any]:
        pdu = template.pdu
        content = pdu.get("content")
        if (
            pdu.get("type") != "m.room.member"
            or pdu.get("room_id") != room_id
            or pdu.get("sender") != user_id
            or pdu.get("state_key") != user_id
            or not isinstance(content, dict)
            or content.get("membership") != membership
        ):
            raise RemoteError(server, 502, "its template is not the event that was asked for")
        return pdu

    def _signed(self, server: str, pdu: Mapping[str, Any], version: RoomVersion) -> Event:
        named = {
            k: pdu[k]
            for k in ("type", "room_id", "sender", "state_key", "content", "depth", "prev_events", "auth_events")
            if k in pdu
        }
        named["origin_server_ts"] = pdu.get("origin_server_ts", 0)
        if version.redact_keeps_origin:
            named["origin"] = self._server_name
        try:
            return events.sign(named, version, self._server_name, self._key)
        except BadEvent as bad:
            raise RemoteError(server, 502, f"its template is not an event: {bad.text}") from bad

    def _same_event(self, server: str, pdu: Mapping[str, Any], event: Event) -> Event:
        try:
            returned = events.parse(pdu, event.version)
        except BadEvent as bad:
            raise RemoteError(server, 502, f"it gave back something that is not an event: {bad.text}") from bad
        if returned.id != event.id:
            raise RemoteError(server, 502, "it gave back another event than it got")
        return returned

    async def _verified_state(self, server: str, answer: JoinAnswer, event: Event) -> tuple[list[Taken], list[Taken]]:
        """(the room's state before the join, the events that authorise it), each with good signatures and allowed by its own
        auth events. Spec: server-server-api/#joining-rooms (the checks on the response to send_join)."""
        if len(answer.state) > MAX_STATE_EVENTS or len(answer.auth_chain) > MAX_STATE_EVENTS:
            raise RemoteError(server, 502, "the room's state is larger than this server takes")
        state = self._intake.parsed(answer.state, event.version, event.room_id)
        state_ids = {one.id for one in state}
        chain = [
            one
            for one in self._intake.parsed(answer.auth_chain, event.version, event.room_id)
            if one.id not in state_ids
        ]
        taken = {one.event.id: one for one in await self._intake.verified([*chain, *state])}
        by_id = {e: one.event for e, one in taken.items()}
        create = next((e for e in by_id.values() if e.key == CREATE and e.id in state_ids), None)
        if create is None or create.room_id != event.room_id:
            raise RemoteError(server, 502, "the state it gave has no create event of this room")
        # The version's default where none is said. Spec: client-server-api/#mroomcreate
        if create.content.get("room_version", "1") != event.version.name:
            raise RemoteError(server, 502, "the room has another version than it said")
        rejected: set[str] = set()
        for one in in_order(by_id.values()):
            if not authorised(one, by_id, rejected, create):
                rejected.add(one.id)
                taken[one.id].marks |= REJECTED
        if create.id in rejected:
            raise RemoteError(server, 502, "the create event it gave is not valid")
        current = {
            one.key: one
            for one in by_id.values()
            if one.id in state_ids and one.id not in rejected and one.key is not None
        }
        try:
            check(event, current, create)
        except NotAllowed as no:
            raise RemoteError(server, 403, f"the state it gave does not allow the join: {no.reason}") from no
        return (
            [taken[e] for e in state_ids if e in taken and e not in rejected],
            [one for e, one in taken.items() if e not in state_ids or e in rejected],
        )

    async def _record_join(
        self, room_id: str, version: RoomVersion, event: Event, state: Sequence[Taken], chain: Sequence[Taken]
    ) -> None:
        every = [one.event.id for one in [*state, *chain]]
        in_state = {one.event.id for one in state}

        def numbers(query: Query) -> dict[str, int]:
            found = {}
            for event_id in every:
                nid = query.value("SELECT nid FROM events WHERE event_id = $1", event_id)
                if nid is not None:
                    found[event_id] = nid
            return found

        known = await self._db.read(numbers)
        room = await self._rooms.get(room_id)
        new = room is None
        if room is None:
            room = Room(self._db, self._server_name, self._db.next_pos(), room_id, version)
        async with room.lock:
            with self._db.write(chain=room_id) as tx:
                if new:
                    self._appender.new_room(tx, room)
                else:
                    tx.failed(lambda: self._rooms.drop(room))
                entries: StateMap = {}
                current: dict[Key, Event] = {}
                for one in [*chain, *state]:
                    nid = known.get(one.event.id)
                    if nid is None:
                        nid = self._appender.outlier(tx, room, one.event, marks=one.marks)
                    if not one.marks & REJECTED and one.event.key is not None and one.event.id in in_state:
                        entries[one.event.key] = (one.event.id, nid)
                        current[one.event.key] = one.event
                members = {
                    key[1]: one.membership or "leave" for key, one in current.items() if key[0] == "m.room.member"
                }
                self._appender.begin_with(tx, room, entries, members, list(current.values()), current.get(SERVER_ACL))
                tx.many(
                    "INSERT INTO gaps (room_nid, event_id, depth) VALUES ($1, $2, $3) ON CONFLICT (room_nid, event_id) DO NOTHING",
                    [(room.nid, e, event.depth - 1) for e in event.prev_events],
                )
                room.recent.clear()
                self._appender.append(tx, room, event, marks=LOCAL)
        await tx

    # --- invites to us and knocks of ours, as far as we know them

    async def _told(self, user_id: str, room_id: str, *memberships: str) -> list[dict[str, Any]]:
        """What was told of the room to somebody who is invited, or knocked."""
        mine = self._rooms.memberships(user_id).get(room_id)
        if mine is None or mine.membership not in memberships:
            return []
        raw = await self._db.read(
            lambda query: query.value(
                "SELECT stripped FROM memberships WHERE room_nid = $1 AND user_id = $2", mine.room_nid, user_id
            )
        )
        told: list[dict[str, Any]] = orjson.loads(bytes(raw)) if raw else []
        return told

    async def inviters(self, room_id: str, user_id: str) -> list[str]:
        """The server that invited this person; and those of the people who made the room what she was told of it."""
        mine = self._rooms.memberships(user_id).get(room_id)
        servers = []
        if mine is not None and mine.membership == "invite":
            invite = await self._rooms.event(mine.event_id)
            servers = [server_of(invite.event.sender)] if invite is not None else []
        servers += [server_of(one["sender"]) for one in await self._told(user_id, room_id, "invite", "knock")]
        return list(dict.fromkeys(servers))

    # --- leave and knock

    async def leave(self, user_id: str, room: Room) -> None:
        """Turns down an invite or takes back a knock. Where the other server does not answer, it is forgotten here."""
        servers = [*await self.inviters(room.room_id, user_id), *room.servers]
        if not servers and server_of(room.room_id):
            servers = [server_of(room.room_id)]
        try:
            event = await self._leave_through([s for s in servers if s != self._server_name], user_id, room.room_id)
        except (RemoteError, ApiError):
            log.info("an invite is turned down here only")
            event = None
        with self._db.write() as tx:
            self._appender.left_afar(tx, room, user_id, event)
        await tx

    async def _leave_through(self, servers: Sequence[str], user_id: str, room_id: str) -> Event:
        last: RemoteError | None = None
        for server in servers[:MAX_SERVERS_TRIED]:
            try:
                template = await self._remote.make("leave", server, room_id, user_id)
                pdu = self._checked_template(server, template, room_id, user_id, "leave")
                event = self._signed(server, {**pdu, "content": {"membership": "leave"}}, template.version)
                await self._remote.send_leave(server, event)
                return event
            except RemoteError as error:
                last = error
        raise last or NotFound("No server of this room is known.")

    async def knock(self, user_id: str, room_id: str, servers: Sequence[str], member: Mapping[str, Any]) -> None:
        last: RemoteError | None = None
        for server in servers[:MAX_SERVERS_TRIED]:
            try:
                template = await self._remote.make("knock", server, room_id, user_id)
                pdu = self._checked_template(server, template, room_id, user_id, "knock")
                event = self._signed(server, {**pdu, "content": dict(member)}, template.version)
                told = await self._remote.send_knock(server, event)
            except RemoteError as error:
                last = error
                continue
            try:
                told = await self._intake.told(told, template.version, room_id)
            except InvalidParam as bad:
                # The knock stands; nothing is told of the room.
                log.info("dropped what a server told of a room", server=server, rule=bad.text)
                told = []
            room = await self._room_for(room_id, template.version)
            with self._db.write() as tx:
                if self._rooms.loaded(room_id) is not room:
                    self._appender.new_room(tx, room)
                self._appender.invited_from_afar(tx, room, event, told)
            await tx
            return
        if last is not None:
            raise last
        raise NotFound("No server is known that is in this room. Give one in `via`.")

    async def _room_for(self, room_id: str, version: RoomVersion) -> Room:
        room = await self._rooms.get(room_id)
        return room or Room(self._db, self._server_name, self._db.next_pos(), room_id, version)

    # --- inviting people elsewhere

    async def invite(self, room: Room, event: Event) -> Event:
        """The invite as the other server has signed it. It is not recorded yet."""
        target = event.state_key or ""
        server = server_of(target)
        found = await room.state_events([*STRIPPED_KEYS, ("m.room.member", event.sender)])
        pdu = await self._remote.invite(server, event, [one.pdu for one in found.values()])
        signed = self._same_event(server, pdu, event)
        if not all(await self._remote.verified([signed])) or server not in signed.pdu["signatures"]:
            raise RemoteError(server, 502, "it gave back an invite without a valid signature")
        return signed


def _encryption_and_type(told: Sequence[Mapping[str, Any]]) -> tuple[bool, object]:
    by_type = {e.get("type"): e.get("content") for e in told}
    encryption, create = by_type.get("m.room.encryption"), by_type.get("m.room.create")
    return bool(isinstance(encryption, dict) and encryption.get("algorithm")), create.get("type") if isinstance(
        create, dict
    ) else None
