"""The rooms' tables as a part, and the endpoints that read a room as it is: its state, its members, who is where.

History is read in `timeline.py`, what answers what in `relations.py`, addresses in `directory.py`; what people do stands in
`write_routes.py`. Somebody who left reads the state of that moment. Spec: client-server-api/#getting-events-for-a-room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import orjson

from relay.clock import DAY, Clock
from relay.db import Database, Query
from relay.errors import InvalidParam, NotFound
from relay.part import Finding, Part
from relay.protocol.membership import MEMBERSHIPS
from relay.protocol.seal import Seal
from relay.rooms import format, store
from relay.rooms.resealing import reseal
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.timeline import HistoryToken
from relay.rooms.viewing import View, Viewing
from relay.web import Answer, Request, Route

SWEEP_EVERY_SECONDS = 3600.0
TRANSACTIONS_KEPT = DAY
AUDITED_AT_ONCE = 1000
MAX_FINDINGS = 1000


class RoomsPart(Part):
    schema = store.SCHEMA

    def __init__(
        self, db: Database, rooms: Rooms, viewing: Viewing, seal: Seal, clock: Clock, clear_rooms: Collection[str] = ()
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        self._seal = seal
        self._clock = clock
        self._clear_rooms = frozenset(clear_rooms)
        # Whether a readable message (sender, type, content) is the relay's own, in its own words.
        self.is_own: Callable[[Query, str, str, object], bool] | None = None

    def routes(self) -> Iterable[Route]:
        room = "/_matrix/client/v3/rooms/{roomId}"
        return (
            Route("GET", room + "/state", self._state),
            Route("GET", room + "/state/{eventType}", self._state_event),
            Route("GET", room + "/state/{eventType}/{stateKey}", self._state_event),
            Route("GET", room + "/members", self._members),
            Route("GET", room + "/joined_members", self._joined_members),
            Route("GET", "/_matrix/client/v3/joined_rooms", self._joined_rooms),
        )

    # --- state

    async def _state(self, request: Request) -> Answer:
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        entries = await self._viewing.state_for(view)
        ids = [event_id for event_id, _ in entries.values()]
        found = await self._db.read(store.by_ids, ids, view.room.version)
        shown = await format.dressed(
            self._db,
            view.room.version,
            list(found.values()),
            user_id=request.user_id,
            device_id=request.who.device_id,
            room_id=view.room.room_id,
            may_relate=False,
        )
        return orjson.dumps(shown)

    async def _state_event(self, request: Request) -> Answer:
        form = request.query.get("format", "content")
        if form not in ("content", "event"):
            raise InvalidParam("The parameter format is content or event.")
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        key = (request.params["eventType"], request.params.get("stateKey", ""))
        # What is there of a room whose members are still to come is right already.
        entry = (await self._viewing.state_now(view.room)).get(key) if view.joined else None
        if entry is None and (view.room.partial is None or not view.joined or key[0] == "m.room.member"):
            entry = (await self._viewing.state_for(view)).get(key)
        found = await self._db.read(store.by_ids, [entry[0]], view.room.version) if entry is not None else {}
        if entry is None or entry[0] not in found:
            raise NotFound("The room has no state of this type and key.")
        one = found[entry[0]]
        if form == "content":
            return format.content(one)
        shown = await format.dressed(
            self._db,
            view.room.version,
            [one],
            user_id=request.user_id,
            device_id=request.who.device_id,
            room_id=view.room.room_id,
            may_relate=False,
        )
        return orjson.dumps(shown[0])

    # --- members

    async def _members(self, request: Request) -> Answer:
        wanted, unwanted = request.query.get("membership"), request.query.get("not_membership")
        for given in (wanted, unwanted):
            if given is not None and given not in MEMBERSHIPS:
                raise InvalidParam("A membership is one of join, invite, knock, leave and ban.")
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        at = request.query.get("at")
        if view.room.partial is not None:
            await self._rooms.whole(view.room.room_id)
            view = await self._viewing.enter(request.params["roomId"], request.user_id)
        if at:
            entries = await self._state_at(view, HistoryToken.parse(at, self._db.epoch))
        else:
            entries = await self._viewing.state_for(view)
        ids = [event_id for key, (event_id, _) in entries.items() if key[0] == "m.room.member"]

        def chunk(query: Query) -> bytes:
            shown = []
            for one in store.by_ids(query, ids, view.room.version).values():
                membership = one.event.membership
                if (wanted is None or membership == wanted) and (unwanted is None or membership != unwanted):
                    shown.append(format.finished(format.shared_body(one), view.room.room_id, {}))
            return orjson.dumps({"chunk": shown})

        return await self._db.read(chunk)

    async def _state_at(self, view: View, token: HistoryToken) -> StateMap:
        """The state at a place in the history. The place before the room's beginning counts as its beginning: it is where a
        timeline begins that has the whole room in it."""
        room = view.room
        if token.depth is None:
            pos = min(token.pos, view.left_pos) if view.ends and view.left_pos is not None else token.pos
            found = await self._viewing.state_at(room, pos)
            return found or await self._first_state(room)
        state_nid = await self._db.read(
            lambda query: query.value(
                "SELECT state_nid FROM events WHERE room_nid = $1 AND pos IS NOT NULL AND (depth, pos) <= ($2, $3) AND pos <= $4 "
                f"AND (marks & {store.HIDDEN}) = 0 ORDER BY depth DESC, pos DESC LIMIT 1",
                room.nid,
                token.depth,
                token.pos,
                view.left_pos if view.ends else self._db.stable_pos(),
            )
        )
        return await (self._rooms.states.get(state_nid) if state_nid is not None else self._first_state(room))

    async def _first_state(self, room: Room) -> StateMap:
        """The state once the first person was in the room, as far as that is known."""
        state_nid = await self._db.read(
            lambda query: query.value(
                "SELECT state_nid FROM events WHERE room_nid = $1 AND pos IS NOT NULL AND type = 'm.room.member' "
                f"AND (marks & {store.HIDDEN}) = 0 ORDER BY depth, pos LIMIT 1",
                room.nid,
            )
        )
        return await self._rooms.states.get(state_nid) if state_nid is not None else {}

    async def _joined_members(self, request: Request) -> Answer:
        await self._rooms.whole(request.params["roomId"])
        room = await self._rooms.require_joined(request.params["roomId"], request.user_id)
        return {"joined": await joined_profiles(self._db, room, await self._viewing.state_now(room))}

    async def _joined_rooms(self, request: Request) -> Answer:
        return {"joined_rooms": sorted(self._rooms.joined(request.user_id))}

    # --- the loop

    async def run(self) -> None:
        while True:
            await self.forget_transactions()
            await self._clock.sleep(SWEEP_EVERY_SECONDS)

    async def forget_transactions(self) -> None:
        """Transaction IDs serve retries; nobody retries after a day."""
        with self._db.write() as tx:
            # Rows lie in the order of their events' numbers, so the first one that is young enough ends the look.
            tx.run(
                "DELETE FROM sent_transactions WHERE event_nid < COALESCE("
                "(SELECT event_nid FROM sent_transactions WHERE sent_ts > $1 ORDER BY event_nid LIMIT 1), $2)",
                self._clock.now() - TRANSACTIONS_KEPT,
                self._db.stable_pos() + 1,
            )
        await tx

    # --- relay audit, relay seal

    def reseal(self, query: Query) -> int:
        return reseal(query, self._seal, self.is_own)

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        """Every event by the rule under which it may lie on disk, and what people were told of rooms they are not in."""
        counts: dict[str, int] = {}
        findings: list[Finding] = []
        for table in store.SCHEMA.tables:
            if table.name != "events":
                number = int(query.value(f"SELECT count(*) FROM {table.name}") or 0)
                counts[f"{table.name}: {table.rule}"] = number
        self._audit_events(query, counts, findings)
        self._audit_stripped(query, counts, findings)
        if self._clear_rooms:
            known = [row[0] for row in query.all("SELECT room_id FROM rooms")]
            counts["rooms: in the clear by privacy.clear_rooms"] = sum(
                1 for room_id in known if room_id in self._clear_rooms
            )
        return counts, findings

    def _audit_events(self, query: Query, counts: dict[str, int], findings: list[Finding]) -> None:
        last = 0
        while True:
            rows = query.all(
                "SELECT e.nid, e.event_id, e.type, e.state_key, e.sender, r.room_id, e.json FROM events e "
                "JOIN rooms r ON r.nid = e.room_nid WHERE e.nid > $1 ORDER BY e.nid LIMIT $2",
                last,
                AUDITED_AT_ONCE,
            )
            for last, event_id, event_type, state_key, sender, room_id, raw in rows:  # noqa: B007
                content = orjson.loads(bytes(raw)).get("content")
                rule = self._seal.rule(event_type, state_key, content)
                if rule is None and self.is_own is not None and self.is_own(query, sender, event_type, content):
                    _count(counts, "events: the relay's own notices", 1)
                    continue
                if rule is None and self._seal.clear_in(room_id, event_type, state_key is not None):
                    _count(counts, "events: readable in a room of privacy.clear_rooms", 1)
                    continue
                if rule is None:
                    _find(findings, "events", event_id, f"readable content in an event of the type {event_type[:80]}")
                    continue
                _count(counts, f"events: {rule}", 1)
                _count(counts, "events: keys beside the listed ones", self._seal.unlisted(event_type, content))
            if len(rows) < AUDITED_AT_ONCE:
                return

    def _audit_stripped(self, query: Query, counts: dict[str, int], findings: list[Finding]) -> None:
        rows = query.all(
            "SELECT r.room_id, m.stripped FROM memberships m JOIN rooms r ON r.nid = m.room_nid WHERE m.stripped IS NOT NULL"
        )
        for room_id, raw in rows:
            for one in orjson.loads(bytes(raw)):
                rule = (
                    self._seal.rule(str(one.get("type")), one.get("state_key"), one.get("content"))
                    if isinstance(one, dict)
                    else None
                )
                if rule is None:
                    _find(
                        findings,
                        "memberships",
                        room_id,
                        "readable content in what an invited person was told of a room",
                    )
                else:
                    _count(counts, f"memberships: an invite's {rule}", 1)


async def joined_profiles(db: Database, room: Room, current: StateMap) -> dict[str, Any]:
    """Name and avatar of everybody who is in the room by its `current` state, as /joined_members names them."""
    entries = [current.get(("m.room.member", user_id)) for user_id, m in room.members.items() if m == "join"]
    ids = [entry[0] for entry in entries if entry is not None]

    def profiles(query: Query) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in store.by_ids(query, ids, room.version).values():
            if one.event.membership != "join":
                continue  # her coming is being written
            content = format.content(one)
            name, avatar = content.get("displayname"), content.get("avatar_url")
            # Null where there is none: some clients read them without asking whether they are there.
            found[one.event.state_key or ""] = {
                "display_name": name if isinstance(name, str) else None,
                "avatar_url": avatar if isinstance(avatar, str) else None,
            }
        return found

    return await db.read(profiles)


def _count(counts: dict[str, int], name: str, number: int) -> None:
    if number:
        counts[name] = counts.get(name, 0) + number


def _find(findings: list[Finding], table: str, row: str, text: str) -> None:
    if len(findings) < MAX_FINDINGS:
        findings.append(Finding(table, row, text))
