"""Journey 3: one look at everything that changed for one device. It reads only what lies after the token.

First, without an await, what memory says about rooms at `upto`; then each part's share and each room's part.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from relay.bell import Bell
from relay.part import Part, SyncAsk, SyncShare
from relay.people.filters import Filter
from relay.rooms.rooms import Membership, Rooms
from relay.sync.rooms import RoomAsk, SyncRooms
from relay.sync.token import Token

# (user, room, invite's event ID) -> whether her clients are not to see it.
HidesInvite = Callable[[str, str, str], Awaitable[bool]]
IgnoredBy = Callable[[str], Awaitable[frozenset[str]]]


@dataclass(slots=True)
class Gathered:
    upto: Token
    share: SyncShare
    joined: dict[str, bytes] = field(default_factory=dict)
    invited: dict[str, Any] = field(default_factory=dict)
    knocked: dict[str, Any] = field(default_factory=dict)
    left: dict[str, bytes] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        share = self.share
        return not (
            self.joined
            or self.invited
            or self.knocked
            or self.left
            or share.account_data
            or share.presence
            or share.to_device
            or share.device_lists_changed
            or share.device_lists_left
        )


class Gather:
    def __init__(
        self, rooms: Rooms, bell: Bell, sync_rooms: SyncRooms, parts: Sequence[Part], ignored_by: IgnoredBy
    ) -> None:
        self._rooms = rooms
        self._bell = bell
        self._sync_rooms = sync_rooms
        self._parts = [part for part in parts if type(part).changes is not Part.changes]
        self._ignored_by = ignored_by
        # The server sets it to `HiddenInvites.hides`, and this to whether she never heard of the invite that ended here.
        self.hides_invite: HidesInvite | None = None
        self.hides_leave: Callable[[str, str], bool] | None = None

    def forget_shared(self) -> None:
        self._sync_rooms.forget_shared()

    async def everything(
        self,
        user_id: str,
        device_id: str,
        since: Token | None,
        upto: Token,
        filter: Filter,
        *,
        full_state: bool = False,
        state_after: str = "",
    ) -> Gathered:
        pos = since.pos if since is not None else 0
        topics = self._bell.topics(user_id, pos) if since is not None and not full_state else None
        mine = self._rooms.memberships(user_id)
        looked = mine if topics is None else {room_id: mine[room_id] for room_id in topics if room_id in mine}
        joined = self._rooms.joined(user_id)
        newly = frozenset(r for r, m in looked.items() if m.membership == "join" and m.since_pos > pos)
        gone = frozenset(r for r, m in looked.items() if m.membership in ("leave", "ban") and m.pos > pos)
        looked = dict(looked)
        ask = SyncAsk(
            user_id=user_id,
            device_id=device_id,
            since=since.pos if since is not None else None,
            upto=upto.pos,
            since_typing=since.typing if since is not None else 0,
            topics=topics,
            rooms=joined,
            newly_joined=newly,
            left_rooms=gone,
        )
        ignored = await self._ignored_by(user_id)
        share = SyncShare()
        for part in self._parts:
            await part.changes(ask, share)
        _apply_filter(share, filter)
        gathered = Gathered(upto, share)
        for room_id, membership in looked.items():
            await self._room(gathered, ask, room_id, membership, filter, full_state, state_after, ignored)
        for room_id in share.rooms:
            if room_id not in gathered.joined and room_id in joined and not await self._hides(room_id, filter):
                state = (state_after or "state").encode()
                made = b'"timeline":{"events":[],"limited":false},"' + state + b'":{"events":[]}'
                self._finish(filter, gathered, room_id, made, None)
        return gathered

    async def _hides(self, room_id: str, filter: Filter) -> bool:
        room = None if filter.room.state.lazy_load_members else await self._rooms.get(room_id)
        return room is not None and room.partial is not None

    async def _room(
        self,
        gathered: Gathered,
        ask: SyncAsk,
        room_id: str,
        mine: Membership,
        filter: Filter,
        full_state: bool,
        state_after: str,
        ignored: frozenset[str],
    ) -> None:
        if not filter.room.allows_room(room_id):
            return
        pos = ask.since or 0
        new = mine.pos > pos
        if mine.membership in ("invite", "knock"):
            if new or full_state:
                await self._stripped(gathered, room_id, ask.user_id, mine)
            return
        gone = mine.membership in ("leave", "ban")
        # That she left is told to her other devices even if she forgot the room at once.
        if gone and (
            (mine.forgotten and not new)
            or not (new or filter.room.include_leave)
            or (ask.since is None and (mine.forgotten or not filter.room.include_leave))
        ):
            return
        if gone and self.hides_leave is not None and self.hides_leave(ask.user_id, room_id):
            return
        room = await self._rooms.get(room_id)
        if room is None or (gone and mine.forgotten and not await self._sync_rooms.was_there(room, ask.user_id, pos)):
            return
        if gone and (alone := await self._sync_rooms.left_from_outside(room, mine, ask.user_id)) is not None:
            # An invite that was turned down, or taken back: there is nothing else to tell.
            gathered.left[room_id] = alone
            return
        if not room.known:
            return
        lazy = filter.room.state.lazy_load_members
        if room.partial is not None and not gone and not lazy:
            # Whoever wants all members is told of the room once they are known. Spec: MSC3902
            return
        completed = not gone and ask.since is not None and self._rooms.completed_since(room_id, pos)
        newly = room_id in ask.newly_joined or (completed and not lazy)
        if gone and new and ask.since is not None:
            newly = await self._sync_rooms.came_and_left(room, ask.user_id, pos)
        part = await self._sync_rooms.part(
            RoomAsk(
                room=room,
                user_id=ask.user_id,
                device_id=ask.device_id,
                mine=mine,
                since=0 if newly else pos,
                upto=ask.upto,
                filter=filter,
                full_state=full_state or newly,
                state_after=state_after,
                ignored=ignored,
                upto_leave=gone,
                newly=newly and ask.since is not None,
            )
        )
        if gone:
            gathered.left[room_id] = b"{" + part.json + b',"account_data":{"events":[]}}'
        elif not part.empty or newly or completed or room_id in gathered.share.rooms or ask.since is None or full_state:
            summary = None
            if part.members_changed or newly or completed or ask.since is None:
                summary = await self._sync_rooms.summary(room, ask.user_id)
            self._finish(filter, gathered, room_id, part.json, summary)

    def _finish(
        self, filter: Filter, gathered: Gathered, room_id: str, made: bytes, summary: dict[str, Any] | None
    ) -> None:
        share = gathered.share.rooms.get(room_id)
        rest: dict[str, Any] = {"summary": summary or {}}
        rest["account_data"] = {"events": share.account_data if share is not None else []}
        rest["ephemeral"] = {"events": share.ephemeral if share is not None else []}
        if share is not None and share.unread is not None:
            rest["unread_notifications"] = share.unread
            threads = share.unread_threads or {}
            if threads and filter.room.timeline.unread_thread_notifications:
                # Then the room's own counts are those outside its threads.
                rest["unread_notifications"] = {
                    name: count - sum(one[name] for one in threads.values()) for name, count in share.unread.items()
                }
                rest["unread_thread_notifications"] = threads
        gathered.joined[room_id] = b"{" + made + b"," + orjson.dumps(rest)[1:]

    async def _stripped(self, gathered: Gathered, room_id: str, user_id: str, mine: Membership) -> None:
        room = await self._rooms.get(room_id)
        if room is None:
            return
        hides = self.hides_invite
        if mine.membership == "invite" and hides is not None and await hides(user_id, room_id, mine.event_id):
            return
        events = await self._sync_rooms.stripped(room, user_id)
        if mine.membership == "invite":
            gathered.invited[room_id] = {"invite_state": {"events": events}}
        else:
            gathered.knocked[room_id] = {"knock_state": {"events": events}}


def _apply_filter(share: SyncShare, filter: Filter) -> None:
    """What the client did not ask for is left out. Spec: client-server-api/#filtering"""
    if not filter.account_data.is_everything:
        share.account_data = [e for e in share.account_data if filter.account_data.allows(e["type"], "")]
    if not filter.presence.is_everything:
        share.presence = [e for e in share.presence if filter.presence.allows("m.presence", e.get("sender", ""))]
    for room_id, room in share.rooms.items():
        if not filter.room.account_data.is_everything:
            room.account_data = [
                e for e in room.account_data if filter.room.account_data.allows(e["type"], "", room_id)
            ]
        if not filter.room.ephemeral.is_everything:
            room.ephemeral = [e for e in room.ephemeral if filter.room.ephemeral.allows(e["type"], "", room_id)]
