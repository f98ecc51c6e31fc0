"""Journey 1: what a local person sends becomes an event of the room.

seal > rules > signature > doors > append. The memory of the room answers every question of an ordinary send, so
nothing is read; the answer goes out when the write is synced to disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from relay.clock import HOUR, Clock
from relay.db import ChainBroken, Database, IntegrityError, Tx
from relay.doors import Doors, Dropped
from relay.errors import ApiError, Forbidden, InvalidParam, NotAllowed
from relay.ids import is_event_id, is_old_event_id
from relay.protocol import event as events
from relay.protocol.auth import auth_keys, check
from relay.protocol.event import Event
from relay.protocol.power import Levels
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.rooms import redactions
from relay.rooms.append import Appender
from relay.rooms.policy_server import HELD_SECONDS, Draft, PolicyServers
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import STILL_COMING, Rooms
from relay.rooms.store import LOCAL, Key, Stored

# Each try may meet another write of the same batch that fails.
MAX_TRIES = 10
MAX_PREV_EVENTS = 10


class Sender:
    def __init__(
        self, db: Database, rooms: Rooms, appender: Appender, seal: Seal, doors: Doors, clock: Clock, key: SigningKey
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._seal = seal
        self._doors = doors
        self._clock = clock
        self._key = key
        self._server_name = rooms.server_name
        # Keeps the picture behind an mxc URI; the server sets it to `Media.adopt`.
        self.adopt_avatar: Callable[[str], Awaitable[None]] | None = None
        # Get the signature of the room's policy server, where it has one; the server sets them.
        self.policies: PolicyServers | None = None

    async def adopt(self, type: str, content: Mapping[str, Any]) -> None:
        """A readable picture that waits in memory is kept once a room names it. Raises what the media part says."""
        url = content.get("url")
        if type == "m.room.avatar" and isinstance(url, str) and self.adopt_avatar is not None:
            await self.adopt_avatar(url)

    def now(self) -> int:
        return self._clock.now()

    def build(
        self,
        room: Room,
        state: Mapping[Key, Event],
        *,
        sender: str,
        type: str,
        content: dict[str, Any],
        state_key: str | None = None,
        redacts: str | None = None,
        ts: int | None = None,
    ) -> Event:
        """The next event of the room, signed and judged by the rules. `state` holds what `auth_keys` names, as far as it is
        set, and the create event. Raises NotAllowed, TooLarge, BadJson."""
        keys = auth_keys(type, sender, state_key, content, room.version)
        cited = {key: state[key] for key in keys if key in state}
        latest = sorted(room.extremities, key=lambda event_id: -room.extremities[event_id])[:MAX_PREV_EVENTS]
        event = events.build(
            room.version,
            room_id=room.room_id,
            type=type,
            sender=sender,
            content=content,
            state_key=state_key,
            prev_events=latest,
            auth_events=[one.id for one in cited.values()],
            depth=room.depth + 1,
            origin_server_ts=self._clock.now() if ts is None else ts,
            redacts=redacts,
            server_name=self._server_name,
            key=self._key,
        )
        check(event, cited, state.get(CREATE))
        return event

    async def judged(
        self,
        room: Room,
        *,
        sender: str,
        type: str,
        content: dict[str, Any],
        state_key: str | None = None,
        redacts: str | None = None,
        ts: int | None = None,
        asked: bool = False,
    ) -> Event:
        """The same with the state read from the room and the doors asked; with `asked` also the room's policy server, which
        gets little time for it. The caller holds `room.lock`."""
        if room.partial is not None and type == "m.room.member" and state_key != sender:
            raise ApiError(STILL_COMING, status=503)
        keys = [CREATE, *auth_keys(type, sender, state_key, content, room.version)]
        state = await room.state_events(keys)
        event = self.build(
            room, state, sender=sender, type=type, content=content, state_key=state_key, redacts=redacts, ts=ts
        )
        await self._doors.send(event)
        return event if self.policies is None or not asked else await self.policies.signed(room, event, HELD_SECONDS)

    async def recommended(self, room: Room, event: Event) -> Event:
        """With the signature of the room's policy server, for an event that need not be the room's latest. Raises ApiError."""
        return event if self.policies is None else await self.policies.signed(room, event)

    def draft(self, type: str, state_key: str | None) -> Draft:
        """What an event goes through that may need the signature of the room's policy server."""
        return Draft(self.policies, type, state_key)

    async def send(
        self,
        room_id: str,
        *,
        sender: str,
        type: str,
        content: dict[str, Any],
        state_key: str | None = None,
        redacts: str | None = None,
        sent_by: tuple[str, str, str] | None = None,
        endpoint: str = "",
        sealed: bool = True,
        ts: int | None = None,
        beside: Callable[[Tx, Stored], None] | None = None,
    ) -> Stored:
        """Appends one event of a local user who is in the room. `sent_by` is (user, device, transaction ID), which holds for
        one `endpoint`: what was sent before under it is returned, not sent again. `ts` is an application service's time for it.

        A state event that says what already holds is not sent again. `beside` adds statements to the same write.
        """
        if redacts is not None and not (self._seal.open and is_old_event_id(redacts)) and not is_event_id(redacts):
            # Not only a mistake: what stands here is kept in clear.
            raise InvalidParam("What is to be taken back is named by its event ID, which begins with '$'.")
        if sealed and not self._seal.clear_in(room_id, type, state_key is not None):
            content = self._seal.outgoing(type, state_key, content)
        if state_key is not None:
            await self.adopt(type, content)
        async with self.draft(type, state_key) as draft:
            for _ in range(MAX_TRIES):
                room = await self._rooms.require_joined(room_id, sender)
                await draft.prepare(room)
                async with room.lock:
                    if room.dropped:
                        draft.forget()
                        continue
                    if state_key is not None:
                        same = await self._unchanged(room, sender, type, state_key, content)
                        if same is not None:
                            return same
                    event = draft.ready(room)
                    if event is None:
                        try:
                            event = await self.judged(
                                room, sender=sender, type=type, content=content, state_key=state_key, redacts=redacts,
                                ts=ts, asked=draft.held,
                            )  # fmt: skip
                        except Dropped as dropped:
                            return Stored(dropped.event, 0, None, room.nid, None, LOCAL)
                        if await draft.put_aside(room, event):
                            continue
                    target, levels = None, None
                    if type == "m.room.redaction":
                        target = await redactions.target_of(self._db, room, event.redacts)
                        levels = await room.levels()
                        self._require_redactable(event, target, levels)
                    if room.dropped:
                        continue
                    with self._db.write(chain=room_id) as tx:
                        one = self._appender.append(tx, room, event, marks=LOCAL, sent_by=sent_by)
                        if sent_by is not None:
                            tx.run(
                                "INSERT INTO sent_transactions (user_id, device_id, txn_id, endpoint, event_nid, sent_ts) "
                                "VALUES ($1, $2, $3, $4, $5, $6)",
                                *sent_by,
                                endpoint,
                                one.nid,
                                self._clock.now() // HOUR * HOUR,
                            )
                        if levels is not None:
                            redactions.record(tx, room, one, target, levels)
                        if beside is not None:
                            beside(tx, one)
                try:
                    await tx
                    return one
                except ChainBroken:
                    continue
                except IntegrityError:
                    known = await self.sent_before(sent_by, endpoint)
                    if known is None:
                        raise
                    return known
        raise ApiError("The room is busy repairing itself. Try again.", status=503)

    async def _unchanged(
        self, room: Room, sender: str, type: str, state_key: str, content: dict[str, Any]
    ) -> Stored | None:
        before = await room.event(type, state_key)
        if before is None or before.sender != sender or before.content != content:
            return None
        return await self._rooms.event(before.id)

    def _require_redactable(self, event: Event, target: Stored | None, levels: Levels) -> None:
        if target is None:
            if levels.user(event.sender) < levels.redact:
                raise NotAllowed("redaction", "the event to take back is not known here")
        elif not redactions.applies(event, target.event, levels) or (
            target.event.sender != event.sender and levels.user(event.sender) < levels.redact
        ):
            raise Forbidden("You can take back only your own messages here. A moderator can take back others'.")

    async def sent_before(self, sent_by: tuple[str, str, str] | None, endpoint: str) -> Stored | None:
        """The event that this transaction made, if it is a retry."""
        if sent_by is None:
            return None
        event_id = await self._db.read(
            lambda query: query.value(
                "SELECT e.event_id FROM sent_transactions s JOIN events e ON e.nid = s.event_nid "
                "WHERE s.user_id = $1 AND s.device_id = $2 AND s.txn_id = $3 AND s.endpoint = $4",
                *sent_by,
                endpoint,
            )
        )
        return await self._rooms.event(event_id) if event_id else None
