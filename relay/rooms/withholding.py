"""Hiding: a message that nobody here has the power to take back is withheld from people of ours, and can be shown again.

They get its redacted form wherever they read (the mark WITHHELD; `Stored.taken_back`), and their apps a redaction in /sync
that stands in no room (`format.hiding`). Later edits come hidden (`append.py` marks them), and are shown again with the message.
The event itself stays whole, for evidence and for other servers that ask: what they may read is not for one server to decide,
and a shell that they took from us could never be made whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from relay.db import Query, Tx
from relay.errors import InvalidParam, NotFound
from relay.protocol.event import Event
from relay.rooms.rooms import Rooms, Withheld
from relay.rooms.store import WITHHELD

# Edits of one message, hidden with it.
MAX_EDITS = 1_000


class Withholding:
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    async def hide(self, event_id: str, beside: Callable[[Tx], None]) -> None:
        """Together with what the same sender made of it by editing. Raises NotFound, InvalidParam."""
        one = await self._rooms.event(event_id)
        if one is None or one.pos is None or not one.shown:
            raise NotFound("Nobody here is shown an event of this ID.")
        if one.event.is_state or one.event.type == "m.room.redaction":
            raise InvalidParam(
                "Only a message can be hidden: this event says how the room stands. Block the room, or the person's server."
            )
        await self._set(one.event, [event_id, *await self._edits(event_id)], True, beside)
        await self._set_those_on_their_way(one.event, True, lambda edit: False)

    async def show(self, event_id: str, also_hidden: Callable[[str], bool], beside: Callable[[Tx], None]) -> None:
        """`also_hidden`: whether an edit was hidden by itself too."""
        one = await self._rooms.event(event_id)
        if one is None or not one.marks & WITHHELD:
            raise NotFound("This message is not hidden.")
        edits = [edit for edit in await self._edits(event_id) if not also_hidden(edit)]
        await self._set(one.event, [event_id, *edits], False, beside)
        await self._set_those_on_their_way(one.event, False, also_hidden)

    async def _set_those_on_their_way(self, event: Event, hidden: bool, but: Callable[[str], bool]) -> None:
        """Edits that came while the message was being hidden, or shown again: what was queued for the disk before us lies there
        now, and what comes from now on is marked by what the message is."""
        with self._rooms.db.write() as tx:
            tx.call(lambda query: _edits(query, event.id, not hidden))
        late = [edit for edit in await tx if not but(edit)]
        if late:
            await self._set(event, late, hidden, lambda tx: None)

    async def _edits(self, event_id: str) -> list[str]:
        return await self._rooms.db.read(_edits, event_id, None)

    async def _set(self, event: Event, event_ids: Iterable[str], hidden: bool, beside: Callable[[Tx], None]) -> None:
        room_id, sent_ts, sender = event.room_id, event.origin_server_ts, event.sender
        room = await self._rooms.get(room_id)
        assert room is not None, "its event is here"
        ids = frozenset(event_ids)
        with self._rooms.db.write() as tx:
            pos = tx.pos()
            for event_id in sorted(ids):
                if hidden:
                    tx.run(f"UPDATE events SET marks = marks | {WITHHELD} WHERE event_id = $1", event_id)
                    tx.run(
                        "INSERT INTO withheld (event_id, room_nid, pos, sent_ts) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
                        event_id, room.nid, pos, sent_ts,
                    )  # fmt: skip
                else:
                    tx.run(f"UPDATE events SET marks = marks & ~{WITHHELD} WHERE event_id = $1", event_id)
                    tx.run("DELETE FROM withheld WHERE event_id = $1", event_id)
            beside(tx)
            tx.after(lambda: self._take(room_id, ids, hidden, Withheld(pos, sent_ts, sender)))
            tx.ring(tuple(room.local_joined), room_id)
        await tx
        # Whoever loaded the room while this was written has read it as it was before.
        if await self._rooms.get(room_id) is not room:
            self._take(room_id, ids, hidden, Withheld(pos, sent_ts, sender))

    def _take(self, room_id: str, event_ids: frozenset[str], hidden: bool, made: Withheld) -> None:
        known = self._rooms.withheld.setdefault(room_id, {})
        for event_id in event_ids:
            if hidden:
                known.setdefault(event_id, made)
            else:
                known.pop(event_id, None)
        if not known:
            del self._rooms.withheld[room_id]
        room = self._rooms.loaded(room_id)
        if room is None:
            return
        for one in room.recent:
            if one.id in event_ids:
                one.marks = one.marks | WITHHELD if hidden else one.marks & ~WITHHELD
                one.client_json = None
        for told in self._rooms.on_withheld:
            told(room)


def _edits(query: Query, event_id: str, withheld: bool | None) -> list[str]:
    """Of all of them, or only those that are, or are not, hidden now."""
    rows = query.all(
        "SELECT e.event_id, e.marks FROM events o JOIN relations r ON r.target_id = o.event_id AND r.room_nid = o.room_nid "
        "JOIN events e ON e.nid = r.event_nid WHERE o.event_id = $1 AND r.rel_type = 'm.replace' AND e.sender = o.sender "
        "AND e.pos IS NOT NULL AND e.state_key IS NULL ORDER BY e.pos LIMIT $2",
        event_id,
        MAX_EDITS,
    )
    return [event_id for event_id, marks in rows if withheld is None or bool(marks & WITHHELD) == withheld]
