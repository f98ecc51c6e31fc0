"""Finding people: among those who share a room with the one who searches, by user ID and display name.

There is no directory of everybody: nobody can be found by strangers, unless `privacy.profiles_open` lets those be found who
are in a room that stands in the directory. Spec: client-server-api/#user-directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from relay.accounts.users import Users
from relay.db import Database, Query
from relay.errors import BadJson
from relay.ids import localpart_of
from relay.part import Part
from relay.people.profile import IN_ROOMS, Profiles, is_mxc
from relay.protocol.versions import RoomVersion
from relay.rooms import store
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route, get_string

DEFAULT_LIMIT = 10
MAX_LIMIT = 50
MAX_TERM = 256
# Of so many people the display names are read; beyond them only user IDs are searched.
MAX_NAMES = 2_000
# Once so many people are known, no further room is looked into that she is not in herself.
MAX_STRANGERS = 20_000
# Of the published rooms, so many of the newest count.
MAX_PUBLISHED = 200
MEMBER = "m.room.member"


class UserSearch(Part):
    def __init__(self, db: Database, users: Users, rooms: Rooms, profiles: Profiles) -> None:
        self._db = db
        self._users = users
        self._rooms = rooms
        self._profiles = profiles

    def routes(self) -> Iterable[Route]:
        yield Route("POST", "/_matrix/client/v3/user_directory/search", self._search_route)

    async def _search_route(self, request: Request) -> Answer:
        body = request.json()
        term = get_string(body, "search_term").strip().casefold()[:MAX_TERM]
        limit = body.get("limit", DEFAULT_LIMIT)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise BadJson("The key limit is a whole number above 0.")
        limit = min(limit, MAX_LIMIT)
        if not term:
            return {"results": [], "limited": False}
        people, member_events = await self._people(request.user_id)
        shown = await self._db.read(self._shown, people, member_events)
        found = sorted(
            (rank, user_id) for user_id in people if (rank := _rank(term, user_id, shown.get(user_id, {}))) is not None
        )
        return {
            "results": [_result(user_id, shown.get(user_id, {})) for _, user_id in found[:limit]],
            "limited": len(found) > limit,
        }

    async def _people(self, user_id: str) -> tuple[set[str], dict[str, tuple[str, RoomVersion]]]:
        """Who shares a room (or is in a published one, where profiles are open), and of those elsewhere the member event that says their name."""
        people: set[str] = set()
        member_events: dict[str, tuple[str, RoomVersion]] = {}
        room_ids = dict.fromkeys(self._rooms.joined(user_id))
        own = len(room_ids)
        if self._profiles.open_to_everyone:
            room_ids.update(dict.fromkeys(await self._db.read(_published)))
        for number, room_id in enumerate(room_ids):
            if number >= own and len(people) >= MAX_STRANGERS:
                break
            room = await self._rooms.get(room_id)
            if room is None:
                continue
            for member, membership in room.members.items():
                if membership != "join" or member in people:
                    continue
                people.add(member)
                event_id = room.state.get((MEMBER, member))
                if event_id is not None and len(member_events) < MAX_NAMES and not self._users.is_local(member):
                    member_events[member] = (event_id, room.version)
        people.discard(user_id)
        return people, member_events

    def _shown(
        self, query: Query, people: set[str], member_events: dict[str, tuple[str, RoomVersion]]
    ) -> dict[str, dict[str, Any]]:
        local = [user_id for user_id in people if self._users.is_local(user_id)][:MAX_NAMES]
        shown = self._profiles.display_names(query, local)
        for user_id, (event_id, version) in member_events.items():
            found = store.by_ids(query, (event_id,), version).get(event_id)
            if found is not None:
                shown[user_id] = {field: found.event.content.get(field) for field in IN_ROOMS}
        return shown


def _published(query: Query) -> list[str]:
    rows = query.all("SELECT room_id FROM rooms WHERE published = 1 ORDER BY nid DESC LIMIT $1", MAX_PUBLISHED)
    return [room_id for (room_id,) in rows]


def _rank(term: str, user_id: str, shown: dict[str, Any]) -> int | None:
    """The smaller, the better; None where it does not match. Names of other servers are not checked for their type."""
    name = shown.get("displayname")
    name = name.casefold() if isinstance(name, str) else ""
    known = 0 if name else 1
    localpart = localpart_of(user_id).casefold()
    if term in (user_id.casefold(), localpart, name):
        return known
    if localpart.startswith(term) or any(word.startswith(term) for word in name.split()):
        return 2 + known
    if term in user_id.casefold() or term in name:
        return 4 + known
    return None


def _result(user_id: str, shown: dict[str, Any]) -> dict[str, Any]:
    result = {"user_id": user_id}
    name, avatar = shown.get("displayname"), shown.get("avatar_url")
    if isinstance(name, str) and name:
        result["display_name"] = name
    if isinstance(avatar, str) and is_mxc(avatar):
        result["avatar_url"] = avatar
    return result
