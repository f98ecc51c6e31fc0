"""What a sliding sync answer says of one room: whole where it is new on the connection, else what changed since.

Joined rooms, those she is out of (up to the moment she went), and invitations and knocks, of which only the stripped state
may be told. Not here: which rooms an answer speaks of (`sliding`). Spec: MSC4186, room results.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.db import Database, Query
from relay.people.filters import EVERYTHING
from relay.protocol.event import Event
from relay.push.unread import Unread
from relay.rooms import format
from relay.rooms.room import MAX_EVENTS_KEPT, Room
from relay.rooms.rooms import Membership, Rooms
from relay.rooms.store import HIDDEN, HISTORY, Key, Stored
from relay.rooms.timeline import HistoryToken
from relay.rooms.viewing import Viewing
from relay.sync.rooms import RoomAsk, SyncRooms
from relay.sync.sliding_asked import Config
from relay.sync.sliding_connection import MAX_MEMBERS, Sent
from relay.sync.sliding_state import MEMBER, StateIndex, Wanted, difference

# Spec: MSC4186, bump_stamp: what counts as activity.
BUMPS = frozenset(
    {
        "m.room.create", "m.room.message", "m.room.encrypted", "m.sticker", "m.call.invite", "m.poll.start", "m.beacon_info",
    }
)  # fmt: skip
NAME: Key = ("m.room.name", "")
AVATAR: Key = ("m.room.avatar", "")
# As many events as there are.
ALL = 2**31
MAX_DIFFERENCES = 512
MAX_INDEXES = 1_000
MAX_BUMPS = 20_000
# How far back activity is looked for in a room where there was none.
BUMP_DEPTH = 500

Entries = Mapping[Key, tuple[str, int]]


@dataclass(slots=True)
class Look:
    """One room of one answer. `since` is up to where the connection knows it; `live_since` what the client calls new."""

    room_id: str
    config: Config
    sent: Sent | None
    since: int
    live_since: int | None
    upto: int
    mine: Membership
    user_id: str
    device_id: str
    ignored: frozenset[str]
    dm: bool
    # What of its state is wanted, where that was looked up already, and of which state.
    selected: dict[Key, str] | None = None
    of_state: int | None = None


@dataclass(slots=True)
class Told:
    """`room` is None where there is nothing to say. Keys are those of the deployed form, but for `gone` and `membership`."""

    room: dict[str, Any] | None
    sent: Sent
    shown: Sequence[Stored] = ()


class SlidingRooms:
    def __init__(self, db: Database, rooms: Rooms, viewing: Viewing, sync_rooms: SyncRooms, unread: Unread) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        self._sync_rooms = sync_rooms
        self._unread = unread
        # (room, from, to) -> how its state differs: the same for all who wake up for one event.
        self._differences: OrderedDict[tuple[str, int, int], tuple[dict[Key, str], list[Key]]] = OrderedDict()
        # Room -> (number of its state, the index of it).
        self._indexes: OrderedDict[str, tuple[int | None, StateIndex]] = OrderedDict()
        # Room -> (up to where it was looked, the latest activity).
        self._bumps: OrderedDict[str, tuple[int, int]] = OrderedDict()

    async def warm(self, looks: Sequence[Look]) -> None:
        """Brings into memory what `tell` will want of these rooms, with two looks at the database instead of many."""
        fresh = [look for look in looks if look.sent is None and look.mine.membership == "join"]
        await self._rooms.get_all(look.room_id for look in looks if look.mine.membership == "join")
        missing: list[tuple[Room, list[str]]] = []
        for look in fresh:
            room = self._rooms.loaded(look.room_id)
            if room is None or not room.known or room.state_pos > look.upto:
                continue
            look.selected = look.config.wanted.select(self._index(room, room.entries))
            look.of_state = room.state_nid
            keys = [NAME, AVATAR]
            if look.config.wanted.lazy and look.config.limit:
                keys += [(MEMBER, one.event.sender) for one in list(room.recent)[-look.config.limit :]]
            ids = {room.entries[key][0] for key in keys if key in room.entries}
            ids.update(look.selected.values())
            absent = [event_id for event_id in ids if room.kept(event_id) is None]
            if 0 < len(absent) <= MAX_EVENTS_KEPT // 2:
                missing.append((room, absent))
        if missing:
            await self._rooms.keep_events(missing)

    async def tell(self, look: Look) -> Told:
        if look.mine.membership in ("invite", "knock"):
            return await self._stripped(look)
        room = await self._rooms.get(look.room_id)
        if look.mine.membership != "join":
            return await self._gone(look, room)
        if room is None or not room.known:
            return Told(None, _sent(look, 0, (), (0, 0)))
        return await self._joined(look, room)

    # --- she is in it

    async def _joined(self, look: Look, room: Room) -> Told:
        sent, config = look.sent, look.config
        completed = sent is not None and self._rooms.completed_since(room.room_id, look.since)
        # Whoever wants all members gets the room anew once they are known.
        initial = sent is None or sent.membership != "join" or (completed and config.wanted.everybody)
        known = None if initial else sent
        expanded = known is not None and config.limit > known.limit
        shown, limited, dressed = await self._timeline(look, room, 0 if known is None or expanded else look.since)
        state = await self._viewing.state_at(room, look.upto)
        gone: list[Key] = []
        if known is None:
            changed = None
            known_already = look.selected is not None and look.of_state == room.state_nid and state is room.entries
            wanted = (
                look.selected if known_already and look.selected else config.wanted.select(self._index(room, state))
            )
        else:
            changed, gone = await self._difference(room, look.since, look.upto)
            wanted = _of_changed(config.wanted, changed, limited)
            gone = [key for key in gone if config.wanted.match(key)]
            if config.wanted != known.wanted:
                more = config.wanted.select(self._index(room, state))
                wanted.update((key, event_id) for key, event_id in more.items() if not known.wanted.match(key))
        members = known.members if known is not None else ()
        if config.wanted.lazy:
            members = _lazy(
                {**await self._viewing.spoken_of(room, shown), **state} if room.partial else state,
                shown,
                wanted,
                members,
            )
        members_changed = completed or changed is None or any(key[0] == MEMBER for key in changed)
        unread = (await self._unread.counts(look.user_id, look.room_id, look.upto))[:2]
        made: dict[str, Any] = {}
        if known is None:
            made["initial"] = True
        if expanded:
            made["unstable_expanded_timeline"] = True
        await self._summary(look, room, state, made, changed, members_changed)
        if wanted:
            made["required_state"] = await _events(room, wanted.values())
        if gone:
            made["gone"] = gone
        if dressed or limited or known is None:
            made["timeline"] = dressed
            made["limited"] = limited
            made["prev_batch"] = str(HistoryToken.before(shown[0]) if shown else HistoryToken.at_pos(look.upto))
            made["num_live"] = _live(shown, look.live_since) + len(dressed) - len(shown)
        if (known is None and look.dm) or (known is not None and known.dm != look.dm):
            made["is_dm"] = look.dm
        if known is None or limited or expanded:
            limit = config.limit if limited else ALL
        else:
            limit = min(known.limit + len(shown), ALL)
        now = _sent(look, limit, members, unread)
        if not made and known is not None and known.counts == unread:
            return Told(None, now)
        made["notification_count"], made["highlight_count"] = unread
        made["bump_stamp"] = await self._bump_stamp(room, look)
        made["membership"] = "join"
        return Told(made, now, shown)

    async def _summary(
        self,
        look: Look,
        room: Room,
        state: Entries,
        made: dict[str, Any],
        changed: Mapping[Key, str] | None,
        members_changed: bool,
    ) -> None:
        """Name, avatar, heroes and counts, as far as they are new. `changed` None is everything."""
        wanted = [key for key in (NAME, AVATAR) if key in (state if changed is None else changed)]
        if wanted:
            found = await room.events([state[key][0] for key in wanted if key in state])
            for key, field, inside in ((NAME, "name", "name"), (AVATAR, "avatar", "url")):
                if key in wanted and key in state:
                    event = found.get(state[key][0])
                    value = event.content.get(inside) if event is not None else None
                    # Null takes away what an earlier answer told.
                    if isinstance(value, str) and value:
                        made[field] = value
                    elif changed is not None:
                        made[field] = None
        if members_changed or (changed is not None and NAME in changed):
            heroes = await self._sync_rooms.heroes(room, look.user_id)
            if heroes:
                keys: list[Key] = [(MEMBER, user_id) for user_id in heroes]
                found = await room.events([state[key][0] for key in keys if key in state])
                made["heroes"] = [_hero(user_id, found, state) for user_id in heroes]
        if members_changed and room.partial is None:
            made["joined_count"] = room.joined_count
            made["invited_count"] = sum(1 for m in room.members.values() if m == "invite")

    async def _timeline(
        self, look: Look, room: Room, since: int, upto_leave: bool = False
    ) -> tuple[list[Stored], bool, list[orjson.Fragment]]:
        ask = RoomAsk(
            room=room, user_id=look.user_id, device_id=look.device_id, mine=look.mine, since=since, upto=look.upto,
            filter=EVERYTHING, full_state=False, state_after="", ignored=look.ignored, upto_leave=upto_leave,
        )  # fmt: skip
        if look.config.limit == 0:
            # There may be more; that something is new at all is worth telling where it counts.
            newest = room.recent[-1].pos if room.recent else None
            return [], newest is not None and since < newest <= look.upto, []
        found, limited = await self._sync_rooms.timeline(ask, look.config.limit)
        hiding = [orjson.Fragment(orjson.dumps(one)) for one in self._sync_rooms.hiding(ask)]
        if not found:
            return [], limited, hiding
        shown, memberships = await self._sync_rooms.may_see(ask, found)
        dressed = await format.dressed(
            self._db, room.version, shown, user_id=look.user_id, device_id=look.device_id, room_id=None,
            memberships=memberships, may_relate=any(one not in room.recent for one in shown),
        )  # fmt: skip
        return shown, limited or len(shown) < len(found), dressed + hiding

    # --- she is out of it

    async def _gone(self, look: Look, room: Room | None) -> Told:
        sent, mine = look.sent, look.mine
        was_told = sent is not None and sent.membership == mine.membership and look.since >= mine.pos
        now = _sent(look, ALL, (), (0, 0))
        if room is None or mine.forgotten or was_told:
            return Told(None, now)
        made: dict[str, Any] = {"membership": mine.membership, "bump_stamp": mine.pos}
        own: Key = (MEMBER, look.user_id)
        was_in = room.known and bool(room.extremities) and (await self._viewing.view(room, look.user_id)).left_pos
        if not was_in or (sent is not None and sent.membership != "join"):
            # An invitation that came to nothing: she may know that, and nothing else.
            made["required_state"] = await _events(room, [mine.event_id])
            if sent is None or sent.membership != "join":
                made["initial"] = True
            return Told(made, now)
        since = look.since if sent is not None else 0
        if sent is None:
            made["initial"] = True
        shown, limited, dressed = await self._timeline(look, room, since, upto_leave=True)
        state = await self._viewing.state_at(room, mine.pos)
        if sent is None:
            wanted = look.config.wanted.select(StateIndex(state))
        else:
            changed, gone = await self._difference(room, since, mine.pos)
            wanted = _of_changed(look.config.wanted, changed, limited)
            if kept := [key for key in gone if look.config.wanted.match(key)]:
                made["gone"] = kept
        if own in state:
            # That she is out is what this is about, whatever she asked for.
            wanted[own] = state[own][0]
        if look.config.wanted.lazy:
            _lazy(state, shown, wanted, sent.members if sent is not None else ())
        made["required_state"] = await _events(room, wanted.values())
        made["timeline"], made["limited"] = dressed, limited
        made["prev_batch"] = str(HistoryToken.before(shown[0]) if shown else HistoryToken.at_pos(mine.pos))
        made["num_live"] = _live(shown, look.live_since)
        return Told(made, now, shown)

    # --- she may come in

    async def _stripped(self, look: Look) -> Told:
        sent, mine = look.sent, look.mine
        now = _sent(look, 0, (), (0, 0))
        known = sent is not None and sent.membership == mine.membership and look.since >= mine.pos
        if known and sent is not None and sent.dm == look.dm:
            return Told(None, now)
        room = await self._rooms.get(look.room_id)
        if room is None:
            return Told(None, now)
        events = await self._sync_rooms.stripped(room, look.user_id)
        made: dict[str, Any] = {
            "initial": True,
            "invite_state": events,
            "bump_stamp": mine.pos,
            "membership": mine.membership,
        }
        for event in events:
            content = event.get("content") if isinstance(event, dict) else None
            for key, field, inside in ((NAME, "name", "name"), (AVATAR, "avatar", "url")):
                if isinstance(content, dict) and (event.get("type"), event.get("state_key")) == key:
                    if isinstance(content.get(inside), str):
                        made[field] = content[inside]
        if look.dm or (sent is not None and sent.dm):
            made["is_dm"] = look.dm
        return Told(made, now)

    # --- what is remembered of rooms

    def _index(self, room: Room, state: Entries) -> StateIndex:
        if state is not room.entries:
            return StateIndex(state)
        known = self._indexes.get(room.room_id)
        if known is None or known[0] != room.state_nid or known[1].entries is not state:
            known = self._indexes[room.room_id] = (room.state_nid, StateIndex(state))
            if len(self._indexes) > MAX_INDEXES:
                self._indexes.popitem(last=False)
        return known[1]

    async def _difference(self, room: Room, since: int, upto: int) -> tuple[dict[Key, str], list[Key]]:
        """What is other in its state at `upto` than at `since`, and what is no more. The caller changes neither."""
        if room.state_pos <= since:
            return {}, []
        key = (room.room_id, since, upto)
        known = self._differences.get(key)
        if known is None:
            before = await self._viewing.state_at(room, since)
            known = difference(before, await self._viewing.state_at(room, upto))
            self._differences[key] = known
            if len(self._differences) > MAX_DIFFERENCES:
                self._differences.popitem(last=False)
        return known

    async def _bump_stamp(self, room: Room, look: Look) -> int:
        upto = look.upto
        looked, bump = self._bumps.get(room.room_id, (0, 0))
        if looked < upto:
            floor = max(looked, room.recent_floor)
            found = 0
            for one in reversed(room.recent):
                pos = one.pos or 0
                if pos <= floor:
                    break
                if pos <= upto and one.event.type in BUMPS:
                    found = pos
                    break
            if not found and looked < room.recent_floor:
                found = await self._db.read(_last_bump, room.nid, room.recent_floor)
            bump = max(bump, found)
            self._bumps[room.room_id] = (upto, bump)
            if len(self._bumps) > MAX_BUMPS:
                self._bumps.popitem(last=False)
        # Where nothing ever happened, her coming did.
        return bump or look.mine.since_pos


def _last_bump(query: Query, room_nid: int, upto: int) -> int:
    marks = ", ".join(f"'{event_type}'" for event_type in sorted(BUMPS))
    pos = query.value(
        f"SELECT max(pos) FROM (SELECT pos, type FROM events WHERE room_nid = $1 AND pos IS NOT NULL AND pos <= $2 "
        f"AND (marks & {HIDDEN | HISTORY}) = 0 ORDER BY pos DESC LIMIT {BUMP_DEPTH}) AS latest WHERE type IN ({marks})",
        room_nid,
        upto,
    )
    return int(pos or 0)


def _sent(look: Look, limit: int, members: tuple[str, ...], counts: tuple[int, int]) -> Sent:
    return Sent(None, limit, look.config.wanted, members, counts, look.dm, look.mine.membership)


def _of_changed(wanted: Wanted, changed: Mapping[Key, str], limited: bool) -> dict[Key, str]:
    """With lazy members all changes of members are told, unless there is a gap: then the client asks for them anew."""
    everybody = wanted.lazy and not limited
    return {k: event_id for k, event_id in changed.items() if (everybody and k[0] == MEMBER) or wanted.match(k)}


def _lazy(state: Entries, shown: Sequence[Stored], wanted: dict[Key, str], given: tuple[str, ...]) -> tuple[str, ...]:
    """Adds the members of whom the timeline speaks; returns who was given by now. Spec: MSC4186, lazy loaded memberships"""
    spoken_of = {one.event.sender: None for one in shown}
    spoken_of.update((one.event.state_key, None) for one in shown if one.event.type == MEMBER and one.event.state_key)
    for user_id in spoken_of:
        key = (MEMBER, user_id)
        if user_id not in given and key in state:
            wanted[key] = state[key][0]
    new = tuple(key[1] for key in wanted if key[0] == MEMBER and key[1] not in given)
    return (*given, *new)[-MAX_MEMBERS:] if new else given


def _hero(user_id: str, found: Mapping[str, Event], state: Entries) -> dict[str, Any]:
    entry = state.get((MEMBER, user_id))
    content = found[entry[0]].content if entry is not None and entry[0] in found else {}
    hero: dict[str, Any] = {"user_id": user_id}
    for field in ("displayname", "avatar_url"):
        if isinstance(content.get(field), str):
            hero[field] = content[field]
    return hero


async def _events(room: Room, event_ids: Iterable[str]) -> list[orjson.Fragment]:
    ids = list(event_ids)
    found = await room.events(ids)
    return [orjson.Fragment(format.body(found[event_id], None) + b"}") for event_id in ids if event_id in found]


def _live(shown: Sequence[Stored], since: int | None) -> int:
    return 0 if since is None else sum(1 for one in shown if (one.pos or 0) > since)
