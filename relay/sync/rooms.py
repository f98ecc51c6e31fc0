"""The rooms' share of /sync: for each room its timeline since the token, and the state that goes with it.

What is the same for many people is computed once: a performer's message reaches five hundred long polls as the same
bytes. Whoever may see less, or sent the event herself, gets her own. Spec: client-server-api/#get_matrixclientv3sync.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.db import Database, Query
from relay.people.filters import Filter
from relay.protocol.event import Event
from relay.rooms import format, state, store
from relay.rooms.room import HISTORY_VISIBILITY, STRIPPED_KEYS, Room
from relay.rooms.rooms import Membership, Rooms
from relay.rooms.store import AFTER_GAP, Key, Stored
from relay.rooms.timeline import HistoryToken
from relay.rooms.viewing import Viewing

DEFAULT_TIMELINE = 10
MAX_TIMELINE = 1000
MAX_HEROES = 5
MAX_SHARED = 512
MAX_SHARED_BYTES = 8 * 2**20
MAX_LAZY_DEVICES = 5_000
MAX_LAZY_MEMBERS = 500
# With a filter on types, this many times the limit is looked through.
FILTER_DEPTH = 10


@dataclass(slots=True)
class RoomAsk:
    """One room of one /sync. `since` 0 asks for the whole state. `state_after` is the key under which the state at the
    end of the timeline is wanted; '' asks for `state`, the one at its beginning."""

    room: Room
    user_id: str
    device_id: str
    mine: Membership
    since: int
    upto: int
    filter: Filter
    full_state: bool
    state_after: str
    ignored: frozenset[str]
    upto_leave: bool = False
    # Whether she came since the last time: what her client has of the room, if anything, is from before she left.
    newly: bool = False


@dataclass(slots=True)
class RoomPart:
    """Ready JSON: `timeline` and `state` as members of the room's object, without braces around."""

    json: bytes
    empty: bool
    members_changed: bool


class SyncRooms:
    def __init__(self, db: Database, rooms: Rooms, viewing: Viewing) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        # What changes an answer is part of its key (`_same_answer`); only `relay server forget` drops these.
        self._shared: OrderedDict[tuple[object, ...], RoomPart] = OrderedDict()
        self._shared_bytes = 0
        # (user, device) -> room -> whose member events it was given; only spares repetition.
        self._given: OrderedDict[tuple[str, str], dict[str, set[str]]] = OrderedDict()

    def forget_shared(self) -> None:
        """Events lost their content behind the back of what is kept here."""
        self._shared.clear()
        self._shared_bytes = 0

    async def part(self, ask: RoomAsk) -> RoomPart:
        limit = ask.filter.room.timeline.limit
        limit = min(DEFAULT_TIMELINE if limit is None else limit, MAX_TIMELINE)
        lazy = ask.filter.room.state.lazy_load_members
        shown, limited = await self.timeline(ask, limit)
        hiding = self.hiding(ask)
        shareable = (
            not hiding
            and not ask.ignored
            and not ask.upto_leave
            and (not lazy or self._lazy_adds_nothing(ask, shown))
            and ask.mine.since_pos <= (shown[0].pos or 0 if shown else ask.since)
            and not any(one.related or (one.sent_by is not None and one.sent_by[0] == ask.user_id) for one in shown)
        )
        if not shareable:
            return await self._compose(ask, shown, limited, lazy, hiding)
        key = _same_answer(ask, shown, limited)
        part = self._shared.get(key)
        if part is None:
            part = await self._compose(ask, shown, limited, lazy)
            if key not in self._shared:
                self._shared[key] = part
                self._shared_bytes += len(part.json)
            while self._shared_bytes > MAX_SHARED_BYTES or len(self._shared) > MAX_SHARED:
                self._shared_bytes -= len(self._shared.popitem(last=False)[1].json)
        return part

    def _lazy_adds_nothing(self, ask: RoomAsk, shown: Sequence[Stored]) -> bool:
        """Whether this device has the members of all who speak here, and no other state changed."""
        if not ask.since or ask.full_state or ask.room.state_pos > ask.since:
            return False
        known = self._given.get((ask.user_id, ask.device_id), {}).get(ask.room.room_id)
        if known is None or ask.filter.room.state.include_redundant_members:
            return False
        return all(one.event.sender in known for one in shown)

    # --- timeline

    async def timeline(self, ask: RoomAsk, limit: int) -> tuple[list[Stored], bool]:
        """The newest events in (since, upto], oldest first, and whether there were more."""
        room, wanted = ask.room, ask.filter.room.timeline
        if limit == 0 or not ask.filter.room.allows_room(room.room_id) or not wanted.allows_room(room.room_id):
            return [], False
        upto = min(ask.upto, ask.mine.pos) if ask.upto_leave else ask.upto
        everything = wanted.is_everything and not ask.ignored
        most = limit + 1 if everything else limit * FILTER_DEPTH
        floor = max(ask.since, room.recent_floor) if ask.since >= room.recent_floor or room.recent_floor == 0 else None
        found = None
        if floor is not None:
            found = [one for one in room.newer_than(ask.since) if (one.pos or 0) <= upto]
        elif sum(1 for one in room.recent if (one.pos or 0) <= upto) > most:
            found = [one for one in room.recent if (one.pos or 0) <= upto]
        if found is None:
            found = await self._db.read(store.latest, room.nid, room.version, ask.since, upto, most)
            await self._viewing.note_senders(found, ask.user_id)
        # Where something is missing before an event, the client has to page back, and what lies before the gap is not told. This
        # holds also when the gap has been filled: what came by paging back is in no timeline.
        gap = next((index for index in range(len(found) - 1, -1, -1) if found[index].marks & AFTER_GAP), None)
        if gap is not None:
            found = found[gap:]
        if not everything:
            found = [
                one
                for one in found
                if wanted.allows(one.event.type, one.event.sender, room.room_id, "url" in one.event.content)
                and (one.event.is_state or one.event.sender not in ask.ignored)
            ]
        return found[-limit:], len(found) > limit or gap is not None or ask.newly

    def hiding(self, ask: RoomAsk) -> list[dict[str, Any]]:
        """What takes messages off her screen that a moderator hid since. At the beginning there are none: they come hidden."""
        if not self._rooms.withheld or not ask.since:
            return []
        upto = min(ask.upto, ask.mine.pos) if ask.upto_leave else ask.upto
        found = self._rooms.hidden_in(ask.room.room_id, ask.since, upto)
        made = [format.hiding(event_id, sent_ts, ask.user_id) for event_id, sent_ts in found]
        timeline, room = ask.filter.room.timeline, ask.room.room_id
        if timeline.limit == 0 or not ask.filter.room.allows_room(room) or not timeline.allows_room(room):
            return []
        return [one for one in made if timeline.allows(one["type"], one["sender"], room, False)]

    async def may_see(self, ask: RoomAsk, shown: list[Stored]) -> tuple[list[Stored], dict[str, str]]:
        """What this person may see of it, and her membership at each event."""
        if not shown or ((shown[0].pos or 0) >= ask.mine.since_pos and ask.mine.membership == "join"):
            return shown, dict.fromkeys((one.id for one in shown), "join")
        return await self._viewing.visible_with_memberships(ask.room, shown, ask.user_id)

    # --- both together

    async def _compose(
        self, ask: RoomAsk, found: list[Stored], limited: bool, lazy: bool, hiding: Sequence[dict[str, Any]] = ()
    ) -> RoomPart:
        room = ask.room
        shown, memberships = await self.may_see(ask, found)
        if len(shown) < len(found):
            limited = True
            shown = _after_hidden_state(found, shown)
        needs_look = any(not format.plain(one) for one in shown)
        events = await format.dressed(
            self._db, room.version, shown, user_id=ask.user_id, device_id=ask.device_id, room_id=None,
            memberships=memberships, may_relate=any(one not in room.recent for one in shown) if needs_look or shown else False,
            federated=ask.filter.event_format == "federation",
        )  # fmt: skip
        first = shown[0] if shown else None
        wanted_state, members_changed = await self._state(ask, shown, first, lazy)
        prev_batch = str(HistoryToken.before(first)) if first is not None else str(HistoryToken.at_pos(ask.upto))
        made = b'"timeline":' + orjson.dumps(
            {"events": [*events, *hiding], "limited": limited, "prev_batch": prev_batch}
        )
        name = (ask.state_after or "state").encode()
        made += b',"' + name + b'":' + orjson.dumps({"events": wanted_state})
        return RoomPart(made, not shown and not wanted_state and not limited and not hiding, members_changed)

    # --- state

    async def _state(
        self, ask: RoomAsk, shown: Sequence[Stored], first: Stored | None, lazy: bool
    ) -> tuple[list[Any], bool]:
        room = ask.room
        upto = min(ask.upto, ask.mine.pos) if ask.upto_leave else ask.upto
        end = upto if ask.state_after or first is None else (first.pos or 1) - 1
        whole = ask.full_state or ask.since == 0
        ids = await self._state_ids(room, 0 if whole else ask.since, end)
        members_changed = any(key[0] == "m.room.member" for key in ids) or any(
            one.event.type == "m.room.member" for one in shown
        )
        if lazy:
            ids = await self._lazy(ask, ids, shown, end, whole)
        wanted = ask.filter.room.state
        federated = ask.filter.event_format == "federation"
        found = await room.events(ids.values())
        events = []
        for key, event_id in ids.items():
            event = found.get(event_id)
            if event is None:
                continue
            if wanted.is_everything or wanted.allows(key[0], event.sender, room.room_id, "url" in event.content):
                made = format.federation_body(event) if federated else format.body(event, None)
                events.append(orjson.Fragment(made + b"}"))
        return events, members_changed

    async def _state_ids(self, room: Room, since: int, end: int) -> dict[Key, str]:
        """What is in the state at `end` and was not at `since` (0: the whole state)."""
        if since and room.state_pos <= since:
            return {}
        after = await self._state_at(room, end)
        if since == 0:
            return {key: event_id for key, (event_id, _) in after.items()}
        before = await self._state_at(room, since)
        return {key: event_id for key, (event_id, _) in after.items() if before.get(key, ("",))[0] != event_id}

    async def _state_at(self, room: Room, pos: int) -> state.StateMap:
        if room.state_pos <= pos:
            return room.entries
        nid = await self._db.read(state.current_at, room.nid, pos)
        return await self._rooms.states.get(nid) if nid is not None else {}

    async def _lazy(
        self, ask: RoomAsk, ids: dict[Key, str], shown: Sequence[Stored], end: int, whole: bool
    ) -> dict[Key, str]:
        """Spec: client-server-api/#lazy-loading-room-members: members only where the timeline speaks of them."""
        device = (ask.user_id, ask.device_id)
        given = self._given.setdefault(device, {})
        self._given.move_to_end(device)
        if len(self._given) > MAX_LAZY_DEVICES:
            self._given.popitem(last=False)
        known = given.setdefault(ask.room.room_id, set())
        if whole or ask.filter.room.state.include_redundant_members or len(known) > MAX_LAZY_MEMBERS:
            known.clear()
        senders = {one.event.sender for one in shown}
        if whole:
            senders.add(ask.user_id)
            senders.update(await self.heroes(ask.room, ask.user_id))
        kept = {
            key: event_id
            for key, event_id in ids.items()
            if key[0] != "m.room.member" or key[1] in senders or not whole
        }
        missing = [("m.room.member", u) for u in senders if ("m.room.member", u) not in kept and u not in known]
        if missing:
            at_end = await self._state_at(ask.room, end)
            if ask.room.partial is not None:
                at_end = {**await self._viewing.spoken_of(ask.room, shown), **at_end}
            kept.update({key: at_end[key][0] for key in missing if key in at_end})
        known.update(senders)
        return kept

    async def heroes(self, room: Room, user_id: str) -> list[str]:
        """Whose names stand for a room that has none. Spec: the summary of /sync."""
        if await room.text("m.room.name", "name") or await room.text("m.room.canonical_alias", "alias"):
            return []
        present = (
            sorted(u for u, m in room.members.items() if m in ("join", "invite") and u != user_id)
            if len(room.members) < 1000
            else []
        )
        return (present or sorted(u for u in list(room.members)[:100] if u != user_id))[:MAX_HEROES]

    async def summary(self, room: Room, user_id: str) -> dict[str, Any]:
        if room.partial is not None:
            # How many there are is not known yet.
            heroes = await self.heroes(room, user_id)
            return {"m.heroes": heroes} if heroes else {}
        counts = {
            "m.joined_member_count": room.joined_count,
            "m.invited_member_count": sum(1 for m in room.members.values() if m == "invite"),
        }
        heroes = await self.heroes(room, user_id)
        return {"m.heroes": heroes, **counts} if heroes else counts

    async def stripped(self, room: Room, user_id: str) -> list[Any]:
        """What an invited or knocking person may know of the room. Spec: client-server-api/#stripped-state"""
        if not room.known or not room.local_joined:
            raw = await self._db.read(
                lambda query: query.value(
                    "SELECT stripped FROM memberships WHERE room_nid = $1 AND user_id = $2", room.nid, user_id
                )
            )
            if raw or not room.known:
                mine = self._rooms.memberships(user_id).get(room.room_id)
                found = orjson.loads(bytes(raw)) if raw else []
                events = await room.events([mine.event_id]) if mine is not None else {}
                return [*found, *(format.stripped(event) for event in events.values())]
        return stripped_events(await stripped_state(room, user_id))

    async def was_there(self, room: Room, user_id: str, since: int) -> bool:
        """Whether she was in the room at some time after `since`."""
        left = (await self._viewing.view(room, user_id)).left_pos
        return left is not None and left > since

    async def came_and_left(self, room: Room, user_id: str, since: int) -> bool:
        """Whether she was in the room after `since`, and not at `since`: then her client knows nothing of it yet."""

        def look(query: Query) -> bool:
            rows = query.all(
                "SELECT before FROM membership_log WHERE room_nid = $1 AND user_id = $2 AND pos > $3 ORDER BY pos",
                room.nid,
                user_id,
                since,
            )
            before = [row[0] for row in rows]
            return before[:1] != ["join"] and "join" in before

        return await self._db.read(look)

    async def left_from_outside(self, room: Room, mine: Membership, user_id: str) -> bytes | None:
        """What /sync says of a room that she left without having been in it; None where her leaving is in its timeline."""
        event = await self._rooms.event(mine.event_id)
        if event is not None and event.pos is not None:
            return None
        if event is None and room.known and room.extremities:
            return None
        shown = [] if event is None else [event]
        events = await format.dressed(
            self._db, room.version, shown, user_id=user_id, device_id=None, room_id=None, may_relate=False
        )
        timeline = orjson.dumps({"events": events, "limited": False})
        return b'{"timeline":' + timeline + b',"state":{"events":[]},"account_data":{"events":[]}}'

    async def visibility(self, room: Room) -> str:
        return str((await room.content(*HISTORY_VISIBILITY)).get("history_visibility", "shared"))


def _after_hidden_state(found: Sequence[Stored], shown: list[Stored]) -> list[Stored]:
    """The timeline begins behind the last state event that she may not see as a message: so the state before it has that too."""
    seen = {one.id for one in shown}
    hidden = [one.pos or 0 for one in found if one.event.is_state and one.id not in seen]
    return [one for one in shown if (one.pos or 0) > max(hidden)] if hidden else shown


def _same_answer(ask: RoomAsk, shown: Sequence[Stored], limited: bool) -> tuple[object, ...]:
    """Two people whose keys are equal get the same bytes, though their tokens may differ."""
    room = ask.room
    if ask.full_state or not ask.since:
        state_since: int | None = 0
    else:
        state_since = None if room.state_pos <= ask.since else ask.since
    return (
        room.room_id,
        ask.filter,
        ask.state_after,
        limited,
        (shown[0].nid, shown[-1].nid, len(shown)) if shown else None,
        # Whoever does not ask for redactions must not get what was taken back since.
        tuple(one.nid for one in shown if one.taken_back),
        state_since,
        room.state_pos,
        ask.upto if not shown or ask.upto < room.state_pos else None,
    )


async def stripped_state(room: Room, user_id: str) -> list[Event]:
    """The state events that an invite carries, the member events of both ends included."""
    found = await room.state_events([*STRIPPED_KEYS, ("m.room.member", user_id)])
    mine = found.get(("m.room.member", user_id))
    events = list(found.values())
    if mine is not None and mine.sender != user_id:
        inviter = await room.event("m.room.member", mine.sender)
        if inviter is not None:
            events.append(inviter)
    return events


def stripped_events(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [format.stripped(event) for event in events]
