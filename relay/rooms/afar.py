"""Rooms that live on other servers: joining, leaving, knocking and inviting across the wire, from our side.

Spec: server-server-api/#joining-rooms, #leaving-rooms-rejecting-invites, #knocking-upon-a-room, #inviting-to-a-room.
All network comes before the room's lock. A room without encryption is left again at once (the design's section 3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from relay.clock import SystemClock
from relay.db import ChainBroken, Database, Query
from relay.errors import ApiError, Forbidden, InvalidParam, NotAllowed, NotFound, RemoteError
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.auth import auth_keys, check
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.protocol.versions import RoomVersion
from relay.remote import JoinAnswer, Remote
from relay.rooms import store, templates
from relay.rooms.append import OUTLIERS_AT_ONCE, Appender
from relay.rooms.gap_rows import note_gaps
from relay.rooms.intake import Intake, sorted_out
from relay.rooms.room import CREATE, ENCRYPTION, SERVER_ACL, STRIPPED_KEYS, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import AFTER_GAP, REJECTED, Key
from relay.rooms.whole_state import WholeState

log = structlog.get_logger("afar")

MAX_SERVERS_TRIED = 8
# How long a join waits for the summary that tells whether it may be made at all.
SUMMARY_SECONDS = 2.0
# How long it waits for it where only the room's size is asked for.
SIZE_SECONDS = 0.5
# From how many members on they are left to come later.
MANY_MEMBERS = 500
# In a room of so many events they may be many, whatever is said of those who are there now.
MANY_EVENTS = 10_000
# How long the answer to the client waits for them all the same, where nobody could say that they are many.
WHOLE_SECONDS = 1.0
# What is looked at in memory; a larger answer is stored as it is looked at.
IN_MEMORY = 2_000
# Somebody waits while an invite is turned down, and may turn it down without them.
MAX_SERVERS_LEFT = 3
MAX_TRIES = 3
NOT_ENCRYPTED = (
    "This room is not encrypted, so this server keeps its people out of it. Ask its moderators to turn on encryption, "
    "or your operator to list it in privacy.clear_rooms."
)

# (room ID, whether it is encrypted, its type) -> whether the seal lets local people in
MayBeJoined = Callable[[str, bool, object], bool]


@dataclass(slots=True, frozen=True)
class _Summary:
    encrypted: bool
    room_type: object
    members: int | None


@dataclass(slots=True)
class _Given:
    """What a server told of a room: events to be stored with their marks, the state as entries where it is stored already,
    everybody's membership, and state events: all of them, or of a large room those that matter here. `cited` are the
    join's auth events."""

    known: Sequence[tuple[Event, int]]
    entries: StateMap | None
    members: dict[str, str]
    current: dict[Key, Event]
    cited: Sequence[Event]


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
        self._whole = WholeState(db, appender, intake)
        self._clock = SystemClock()
        # Hears of a room whose members are to be fetched; the server sets it to `PartialJoins.begin`.
        self.on_partial: Callable[[str], None] = lambda room_id: None

    # --- join

    async def join(
        self, user_id: str, room_id: str, servers: Sequence[str], member: Mapping[str, Any], may_be_joined: MayBeJoined
    ) -> tuple[str, Event] | None:
        """Raises an ApiError that says what the servers answered. Where somebody else of ours came to the room first, the join
        is an event like any other: it is returned with the server that took it, for the caller to place it."""
        invite = await self._told(user_id, room_id, "invite")
        # Without a create event it tells nothing about the room.
        knows = any(e.get("type") == "m.room.create" for e in invite)
        if knows and not may_be_joined(room_id, *_encryption_and_type(invite)):
            raise Forbidden(NOT_ENCRYPTED)
        ask_first = not knows and not may_be_joined(room_id, False, None)
        last: RemoteError | None = None
        for server in servers[:MAX_SERVERS_TRIED]:
            try:
                async with self._rooms.coming(room_id):
                    return await self._join_through(server, user_id, room_id, member, may_be_joined, ask_first)
            except RemoteError as error:
                log.info("could not join through a server", server=server, status=error.status, errcode=error.errcode)
                last = error
        if last is None:
            raise NotFound("No server is known that is in this room. Ask for an invitation, or give a server in `via`.")
        raise last.passed_on() or ApiError(
            f"None of the room's servers could be reached; the last answer: {last.text}. Try again later.", status=502
        )

    async def _join_through(
        self,
        server: str,
        user_id: str,
        room_id: str,
        member: Mapping[str, Any],
        may_be_joined: MayBeJoined,
        ask_first: bool,
    ) -> tuple[str, Event] | None:
        summary: _Summary | None = None
        if ask_first:
            # Asked beside the template, it costs no time of its own, and spares a room in clear a join and a leave.
            asked = asyncio.create_task(self._summarised(server, room_id))
            try:
                template = await self._remote.make("join", server, room_id, user_id)
                await asyncio.wait([asked], timeout=SUMMARY_SECONDS)
            finally:
                asked.cancel()
            summary = asked.result() if asked.done() and not asked.cancelled() else None
        else:
            template = await self._remote.make("join", server, room_id, user_id)
        if ask_first and summary is not None and not may_be_joined(room_id, summary.encrypted, summary.room_type):
            raise Forbidden(NOT_ENCRYPTED)
        templates.require_asked(server, template, room_id, user_id, "join")
        depth = template.pdu.get("depth")
        # Each of its members came by an event of their own, also those who left or were banned.
        at_most = depth if type(depth) is int else MANY_EVENTS
        if not ask_first and at_most >= MANY_MEMBERS:
            with suppress(TimeoutError):
                async with asyncio.timeout(SIZE_SECONDS):
                    summary = await self._summarised(server, room_id)
        content = {**member}
        authoriser = template.pdu["content"].get("join_authorised_via_users_server")
        if isinstance(authoriser, str) and template.version.restricted:
            content["join_authorised_via_users_server"] = authoriser
        event = templates.signed(server, template, content, self._server_name, self._key)
        # A small room is known whole in one answer; in a large one somebody is in a moment, and its members come later. Of
        # those who are there no more no summary tells.
        many = None if summary is None or summary.members is None else summary.members >= MANY_MEMBERS
        omit = at_most >= (MANY_MEMBERS if many is None else MANY_EVENTS) or bool(many)
        answer = await self._remote.send_join(server, event, omit_members=omit)
        if answer.event is not None:
            event = templates.same_event(server, answer.event, event)
        if "join_authorised_via_users_server" in content and not all(await self._remote.verified([event])):
            raise RemoteError(server, 502, "it did not sign the join that it vouches for")
        try:
            given = await self._given(server, answer, event, may_be_joined)
        except Forbidden:
            with suppress(RemoteError, ApiError):
                await self._leave_through([server], user_id, room_id)
            raise
        partial = (
            (event.id, server, frozenset(answer.servers) - {self._server_name}) if answer.members_omitted else None
        )
        if not await self._record_join(room_id, event, given, partial):
            return server, event
        if partial is not None:
            self.on_partial(room_id)
            if not many:
                # Most of these rooms are small: their members are here by the time she looks.
                with suppress(ApiError):
                    await self._rooms.whole(room_id, WHOLE_SECONDS)
        return None

    async def _summarised(self, server: str, room_id: str) -> _Summary | None:
        """None where the room's summary is not to be had, or does not tell."""
        try:
            async with asyncio.timeout(SUMMARY_SECONDS):
                told = (await self._remote.hierarchy(server, room_id, True)).get("room")
        except (RemoteError, ApiError, TimeoutError):
            return None
        # Summaries name the version and the encryption since the same release.
        if not isinstance(told, dict) or told.get("room_id") != room_id or "room_version" not in told:
            return None
        members = told.get("num_joined_members")
        return _Summary(bool(told.get("encryption")), told.get("room_type"), members if type(members) is int else None)

    async def _given(self, server: str, answer: JoinAnswer, event: Event, may_be_joined: MayBeJoined) -> _Given:
        """The room's state before the join, its events with good signatures and judged by their own auth events. Raises
        Forbidden where the seal keeps local people out. Spec: server-server-api/#joining-rooms (the checks on the response
        to send_join)."""
        if len(answer.state) + len(answer.auth_chain) > IN_MEMORY:
            given = await self._large_state(server, answer, event, may_be_joined)
        else:
            given = await self._small_state(server, answer, event)
        current = given.current
        create = current.get(CREATE)
        if create is None or create.room_id != event.room_id:
            raise RemoteError(server, 502, "the state it gave has no create event of this room")
        # The version's default where none is said. Spec: client-server-api/#mroomcreate
        if create.content.get("room_version", "1") != event.version.name:
            raise RemoteError(server, 502, "the room has another version than it said")
        held = dict(current)
        if answer.members_omitted:
            # Of the left out members the event itself names those on which it rests; they were checked like all others. What
            # it names and the answer lacks may be known here: that she was banned, say.
            told = {one.id for one in given.cited}
            known = await self._db.read(store.by_ids, [e for e in event.auth_events if e not in told], event.version)
            ours = [one.event for one in known.values() if one.event.room_id == event.room_id and not one.rejected]
            for cited in (*given.cited, *ours):
                if cited.key is not None and cited.type == "m.room.member":
                    held.setdefault(cited.key, cited)
        try:
            check(event, held, create)
        except NotAllowed as no:
            raise RemoteError(server, 403, f"the state it gave does not allow the join: {no.reason}") from no
        encrypted = ENCRYPTION in current and bool(current[ENCRYPTION].content.get("algorithm"))
        if not may_be_joined(event.room_id, encrypted, create.content.get("type")):
            raise Forbidden(NOT_ENCRYPTED)
        return given

    async def _small_state(self, server: str, answer: JoinAnswer, event: Event) -> _Given:
        # It keeps this busy for a while: in a thread, so that everybody else goes on.
        state = await asyncio.to_thread(self._intake.parsed, answer.state, event.version, event.room_id)
        state_ids = {one.id: None for one in state}
        chain = await asyncio.to_thread(self._intake.parsed, answer.auth_chain, event.version, event.room_id)
        taken = await self._intake.verified([*state, *(one for one in chain if one.id not in state_ids)])
        by_id = {one.event.id: one.event for one in taken}
        create = next((by_id[e] for e in state_ids if e in by_id and by_id[e].key == CREATE), None)
        known = await asyncio.to_thread(sorted_out, taken, {}, create)
        good = {one.id for one, marks in known if not marks & REJECTED}
        current = {one.key: one for e in state_ids if e in good and (one := by_id[e]).key is not None}
        members = {key[1]: one.membership or "leave" for key, one in current.items() if key[0] == "m.room.member"}
        return _Given(known, None, members, current, [by_id[e] for e in event.auth_events if e in good])

    async def _large_state(self, server: str, answer: JoinAnswer, event: Event, may_be_joined: MayBeJoined) -> _Given:
        """Stored as it is looked at, since it does not fit into memory at once."""
        glance = await self._whole.glance(server, answer.state, answer.auth_chain)
        if not may_be_joined(event.room_id, glance.encrypted, glance.room_type):
            raise Forbidden(NOT_ENCRYPTED)
        created = [] if glance.create is None else self._intake.parsed([glance.create], event.version, event.room_id)
        taken = await self._intake.verified(created)
        if not taken:
            raise RemoteError(server, 502, "the state it gave has no create event of this room")
        room = await self._row_of(event.room_id, event.version)
        found = await self._whole.take(server, room, answer.state, answer.auth_chain, glance, taken[0].event)
        keys = [CREATE, ENCRYPTION, SERVER_ACL, *auth_keys_of(event)]
        ids = {key: found.current[key][0] for key in keys if key in found.current}
        events_by_id = await room.events([*ids.values(), *event.auth_events])
        current = {key: events_by_id[e] for key, e in ids.items() if e in events_by_id}
        cited = [events_by_id[e] for e in event.auth_events if e in events_by_id]
        return _Given([], found.current, found.members, current, cited)

    async def _row_of(self, room_id: str, version: RoomVersion) -> Room:
        """The room, known to the database at least by name."""
        room = await self._room_for(room_id, version)
        if self._rooms.loaded(room_id) is not room:
            with self._db.write(chain=room_id) as tx:
                self._appender.new_room(tx, room)
            await tx
        return room

    async def _record_join(
        self, room_id: str, event: Event, given: _Given, partial: tuple[str, str, frozenset[str]] | None
    ) -> bool:
        """False where somebody of ours was in the room first: then its state is ours to know, not another server's to tell."""
        for _ in range(MAX_TRIES):
            room = await self._row_of(room_id, event.version)
            known = given.known
            for start in range(0, len(known), OUTLIERS_AT_ONCE):
                with self._db.write() as tx:
                    self._appender.outliers(tx, room, known[start : start + OUTLIERS_AT_ONCE])
                await tx
            entries = given.entries
            if entries is None:
                nids = await self._db.read(_numbers, [one.id for one in given.current.values()])
                entries = {key: (one.id, nids[one.id]) for key, one in given.current.items()}
            members = given.members
            mine = next((one for one in given.cited if partial is not None and one.key == event.key), None)
            if mine is not None and mine.key is not None:
                # Her invite is no other's affair, and her join follows it.
                nids = await self._db.read(_numbers, [mine.id])
                entries = {**entries, mine.key: (mine.id, nids[mine.id])}
                members = {**members, mine.key[1]: mine.membership or "leave"}
            async with room.lock:
                if room.dropped:
                    continue
                if room.known and room.local_joined:
                    return False
                with self._db.write(chain=room_id) as tx:
                    self._appender.begin_with(tx, room, entries, members, given.current.get(SERVER_ACL), partial)
                    for key, one in given.current.items():
                        if key[0] != "m.room.member":
                            room.keep(one)
                    note_gaps(tx, room, event.prev_events, event)
                    # The server that took it passes it on to the others.
                    self._appender.append(tx, room, event, marks=AFTER_GAP)
                try:
                    await tx
                    return True
                except ChainBroken:
                    continue
        raise ApiError("The room is busy repairing itself. Try again.", status=503)

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
            others = [s for s in dict.fromkeys(servers) if s != self._server_name]
            event: Event | None = await self._leave_through(others[:MAX_SERVERS_LEFT], user_id, room.room_id)
        except (RemoteError, ApiError):
            log.info("an invite is turned down here only")
            event = await self._left_here(user_id, room)
        with self._db.write() as tx:
            self._appender.left_afar(tx, room, user_id, event)
        await tx

    async def _left_here(self, user_id: str, room: Room) -> Event | None:
        """The leave as nobody else will ever see it: for her own clients, which expect an event."""
        mine = self._rooms.memberships(user_id).get(room.room_id)
        before = await self._rooms.event(mine.event_id) if mine is not None else None
        if before is None:
            return None
        return events.build(
            room.version,
            room_id=room.room_id,
            type="m.room.member",
            sender=user_id,
            content={"membership": "leave"},
            state_key=user_id,
            prev_events=[before.id],
            auth_events=[before.id],
            depth=min(before.event.depth, room.version.max_depth - 1) + 1,
            origin_server_ts=self._clock.now(),
            server_name=self._server_name,
            key=self._key,
        )

    async def _leave_through(self, servers: Sequence[str], user_id: str, room_id: str) -> Event:
        last: RemoteError | None = None
        for server in servers[:MAX_SERVERS_TRIED]:
            try:
                template = await self._remote.make("leave", server, room_id, user_id)
                templates.require_asked(server, template, room_id, user_id, "leave")
                event = templates.signed(server, template, {"membership": "leave"}, self._server_name, self._key)
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
                templates.require_asked(server, template, room_id, user_id, "knock")
                event = templates.signed(server, template, member, self._server_name, self._key)
                told = await self._remote.send_knock(server, event)
            except RemoteError as error:
                # A server that forbids it says more than one that does not know the room.
                last = last if last is not None and last.status == 403 else error
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
        signed = templates.same_event(server, pdu, event)
        if not all(await self._remote.verified([signed])) or server not in signed.pdu["signatures"]:
            raise RemoteError(server, 502, "it gave back an invite without a valid signature")
        return signed


def _numbers(query: Query, event_ids: Sequence[str]) -> dict[str, int]:
    """Raises KeyError where one is not there, which can't be: nobody takes outliers away."""
    rows = {e: query.value("SELECT nid FROM events WHERE event_id = $1", e) for e in event_ids}
    if None in rows.values():
        raise KeyError("an event that was just stored")
    return rows


def auth_keys_of(event: Event) -> list[Key]:
    return list(auth_keys(event.type, event.sender, event.state_key, event.content, event.version))


def _encryption_and_type(told: Sequence[Mapping[str, Any]]) -> tuple[bool, object]:
    by_type = {e.get("type"): e.get("content") for e in told}
    encryption, create = by_type.get("m.room.encryption"), by_type.get("m.room.create")
    return bool(isinstance(encryption, dict) and encryption.get("algorithm")), create.get("type") if isinstance(
        create, dict
    ) else None
