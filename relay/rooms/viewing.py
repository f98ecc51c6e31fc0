"""What one person may look at in a room: whether she gets in at all, and which of its events are hers to see.

The rule itself is pure (`protocol/visibility.py`); here what held at each event is gathered. Whoever has been in the room
since before an event sees it without a query. People of ours only: what servers may see is asked in `federation`.
Ignored users and filters are the callers' business. Spec: client-server-api/#room-history-visibility.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from relay.db import Database, Query
from relay.errors import Forbidden
from relay.protocol.visibility import WORLD_READABLE, may_see, visibility_of
from relay.rooms import state, store
from relay.rooms.erasure import as_served
from relay.rooms.room import HISTORY_VISIBILITY, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import HISTORY, LOCAL, Stored

NOT_IN_ROOM = "You are not in this room, and never were. Join it first."


@dataclass(slots=True, frozen=True)
class View:
    """One person before one room. `since_pos` is when she came, where she is in it; `left_pos` when she last left."""

    room: Room
    user_id: str
    joined: bool
    since_pos: int = 0
    left_pos: int | None = None
    left_depth: int = 0
    # Whether everybody may read the room as it is now.
    open: bool = False

    @property
    def ends(self) -> bool:
        """Whether the room's life after she left is closed to her."""
        return not self.joined and not self.open

    def was_there_after(self, one: Stored) -> bool:
        """Whether she was in the room at some time after this event."""
        if self.joined:
            return True
        if self.left_pos is None or one.pos is None:
            return False
        if one.marks & HISTORY:  # It came late; where it lies in the history says when it was.
            return one.depth <= self.left_depth
        return one.pos <= self.left_pos

    def sees_all(self, events: Iterable[Stored]) -> bool:
        """Whether all of it came while she was in the room. False where that has to be looked up."""
        since = self.since_pos
        return self.joined and all(
            one.pos is not None and one.pos >= since and not one.marks & HISTORY for one in events
        )


def judged(query: Query, view: View, events: Sequence[Stored]) -> dict[str, str]:
    """Those of the events that she may see, each with her membership at it. In a reader's thread."""
    room, mine = view.room, ("m.room.member", view.user_id)
    states = state.lookup(
        query, room.nid, {one.state_nid for one in events if one.state_nid is not None}, (HISTORY_VISIBILITY, mine)
    )
    cited = {event_id for at in states.values() for event_id in at.values()}
    cited.update(one.replaces for one in events if one.replaces and one.event.key in (HISTORY_VISIBILITY, mine))
    found = store.by_ids(query, cited, room.version)

    def visibility(event_id: str | None) -> str:
        one = found.get(event_id or "")
        return visibility_of(one.event.content if one is not None else None)

    def membership(event_id: str | None) -> str | None:
        one = found.get(event_id or "")
        return one.event.membership if one is not None else None

    seen: dict[str, str] = {}
    for one in events:
        if one.state_nid is None or one.state_nid not in states:
            continue
        at, key = states[one.state_nid], one.event.key
        held, was, becomes = visibility(at.get(HISTORY_VISIBILITY)), membership(at.get(mine)), None
        own = key == mine
        if own:
            was, becomes = membership(one.replaces), one.event.membership
        elif key == HISTORY_VISIBILITY:
            held, becomes = visibility(one.replaces), visibility_of(one.event.content)
        if may_see(
            held,
            was,
            becomes if own else None,
            visibility_after=None if own else becomes,
            is_own_membership=own,
            joined_later=view.was_there_after(one),
        ):
            seen[one.id] = (becomes if own else was) or "leave"
    return seen


def recall_transactions(query: Query, events: Iterable[Stored], user_id: str) -> None:
    """Which device of hers sent each of her events, and under which transaction ID, as far as that is still known."""
    for one in events:
        if one.sent_by is None and one.marks & LOCAL and one.event.sender == user_id:
            row = query.one("SELECT user_id, device_id, txn_id FROM sent_transactions WHERE event_nid = $1", one.nid)
            if row is not None:
                one.sent_by = (row[0], row[1], row[2])


class Viewing:
    def __init__(self, db: Database, rooms: Rooms) -> None:
        self._db = db
        self._rooms = rooms

    # --- who gets in

    async def enter(self, room_id: str, user_id: str) -> View:
        """For reading the room: whoever is or was in it, and everybody where it is open. Raises Forbidden."""
        room = await self._rooms.get(room_id)
        if room is None or not room.known:
            raise Forbidden(NOT_IN_ROOM)
        view = await self.view(room, user_id)
        mine = self._rooms.memberships(user_id).get(room_id)
        was_there = view.left_pos is not None and not (mine is not None and mine.forgotten)
        if view.joined or was_there or view.open:
            return view
        raise Forbidden(NOT_IN_ROOM)

    async def view(self, room: Room, user_id: str) -> View:
        mine = self._rooms.memberships(user_id).get(room.room_id)
        if mine is not None and mine.membership == "join":
            return View(room, user_id, True, mine.since_pos)

        def left(query: Query) -> tuple[int | None, int]:
            pos = query.value(
                "SELECT max(pos) FROM membership_log WHERE room_nid = $1 AND user_id = $2 AND before = 'join'",
                room.nid,
                user_id,
            )
            if pos is None:
                return None, 0
            depth = query.value(
                "SELECT depth FROM events WHERE room_nid = $1 AND pos <= $2 AND pos IS NOT NULL ORDER BY pos DESC LIMIT 1",
                room.nid,
                pos,
            )
            return pos, depth or 0

        pos, depth = await self._db.read(left)
        readable = visibility_of(await room.content(*HISTORY_VISIBILITY)) == WORLD_READABLE
        is_open = readable and not self._rooms.is_closed(room.room_id)
        return View(room, user_id, False, 0, pos, depth, is_open)

    async def state_for(self, view: View) -> StateMap:
        """The room's state as she may know it: the current one, or that of the moment she left. Raises ApiError while its
        members are not known."""
        if view.room.partial is not None:
            view = replace(view, room=await self._rooms.whole(view.room.room_id) or view.room)
        if not view.ends or view.left_pos is None:
            return await self.state_now(view.room)
        return await self.state_at(view.room, view.left_pos)

    async def state_now(self, room: Room) -> StateMap:
        """The current state as it is on disk: memory runs ahead, and what is being written is nobody's to know yet."""
        return await self.state_at(room, self._db.stable_pos())

    async def state_at(self, room: Room, pos: int) -> StateMap:
        """What was the current state once everything up to `pos` had come."""
        if room.state_pos <= pos:
            return room.entries
        nid = await self._db.read(state.current_at, room.nid, pos)
        return await self._rooms.states.get(nid) if nid is not None else {}

    # --- which events

    async def visible(self, room: Room, events: Sequence[Stored], user_id: str) -> list[Stored]:
        return (await self.visible_with_memberships(room, events, user_id))[0]

    async def visible_with_memberships(
        self, room: Room, events: Sequence[Stored], user_id: str
    ) -> tuple[list[Stored], dict[str, str]]:
        """What she may see of these events of one room, and her membership at each. Spec: `unsigned.membership`"""
        if not events:
            return [], {}
        view = await self.view(room, user_id)
        if view.sees_all(events):
            return list(events), dict.fromkeys((one.id for one in events), "join")

        def look(query: Query) -> tuple[list[Stored], dict[str, str]]:
            seen = judged(query, view, events)
            return [one for one in as_served(query, user_id, events, seen) if one.id in seen], seen

        return await self._db.read(look)

    async def spoken_of(self, room: Room, shown: Iterable[Stored]) -> StateMap:
        """While a room's members are not all known: the member events of those who speak, as their own events cite them."""
        lacking = [one for one in shown if ("m.room.member", one.event.sender) not in room.entries]
        if room.partial is None or not lacking:
            return {}
        wanted = {e for one in lacking for e in one.event.auth_events}
        senders = {one.event.sender for one in lacking}

        def find(query: Query) -> StateMap:
            return {
                one.event.key: (one.id, one.nid)
                for one in store.by_ids(query, wanted, room.version).values()
                if one.event.key is not None
                and one.event.type == "m.room.member"
                and one.event.state_key in senders
                and not one.rejected
            }

        return await self._db.read(find)

    async def note_senders(self, events: Sequence[Stored], user_id: str) -> None:
        """Before events that were read from the database are shown to the person who sent some of them."""
        if any(one.sent_by is None and one.marks & LOCAL and one.event.sender == user_id for one in events):
            await self._db.read(recall_transactions, events, user_id)
