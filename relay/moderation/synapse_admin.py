"""The sixteen operations of Synapse's admin API that Draupnir calls, each put to what this relay does itself.

For administrators only. What can't be undone waits here as well (202 in place of 200); a shadow ban ends after a day; a
room that is to be shut is closed at once, and left by our people when that is confirmed; its rows stay. `event_reports` names
no reporter and no reason, and nothing of the categories `minor` and `ncii`: Draupnir's management room is readable, and may
have members elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from aiohttp import web

from relay.accounts.devices import Devices
from relay.accounts.users import User, Users
from relay.db import Database, Query
from relay.errors import Forbidden, InvalidParam, MissingParam, NotFound
from relay.ids import is_room_id
from relay.moderation.actions import Actions
from relay.moderation.acts import Act, Outcome
from relay.moderation.restrictions import SHADOW, Restrictions
from relay.part import Part
from relay.rooms import format
from relay.rooms.room import CREATE, ENCRYPTION, HISTORY_VISIBILITY, JOIN_RULES, Room
from relay.rooms.rooms import Rooms
from relay.web import JSON_HEADERS, Answer, Request, Route, get_bool, get_list, get_string

MAX_PAGE = 100
REASON = "draupnir"
BASE = "/_synapse/admin"

# (after number, limit) -> (rows of number, room_id, event_id, sender, category, created_ts; the latest number)
ListsReports = Callable[[int, int], Awaitable[tuple[list[dict[str, Any]], int]]]


class SynapseAdmin(Part):
    def __init__(
        self,
        db: Database,
        users: Users,
        devices: Devices,
        rooms: Rooms,
        actions: Actions,
        restrictions: Restrictions,
        reports: ListsReports,
        speaker: Callable[[], Awaitable[str]],
    ) -> None:
        """`speaker` is the relay's own user, who stands for every reporter."""
        self._db = db
        self._users = users
        self._devices = devices
        self._rooms = rooms
        self._actions = actions
        self._restrictions = restrictions
        self._reports = reports
        self._speaker = speaker

    def routes(self) -> Iterable[Route]:
        v1, v2 = f"{BASE}/v1", f"{BASE}/v2"
        yield Route("GET", f"{v1}/users/{{userId}}/admin", self._is_admin)
        yield Route("GET", f"{v2}/users/{{userId}}", self._user_details)
        yield Route("POST", f"{v1}/deactivate/{{userId}}", self._deactivate)
        yield Route("PUT", f"{v1}/suspend/{{userId}}", self._suspend)
        yield Route("POST", f"{v1}/users/{{userId}}/shadow_ban", self._shadow)
        yield Route("DELETE", f"{v1}/users/{{userId}}/shadow_ban", self._unshadow)
        yield Route("POST", f"{v1}/user/{{userId}}/redact", self._redact)
        yield Route("GET", f"{v1}/user/redact_status/{{redactId}}", self._redact_status)
        yield Route("GET", f"{v1}/event_reports", self._event_reports)
        yield Route("GET", f"{v1}/rooms", self._list_rooms)
        yield Route("GET", f"{v1}/rooms/{{roomId}}", self._room_details)
        yield Route("GET", f"{v1}/rooms/{{roomId}}/block", self._is_blocked)
        yield Route("GET", f"{v1}/rooms/{{roomId}}/context/{{eventId}}", self._context)
        yield Route("DELETE", f"{v1}/rooms/{{roomId}}", self._delete_at_once)
        yield Route("DELETE", f"{v2}/rooms/{{roomId}}", self._delete)
        yield Route("POST", f"{v1}/rooms/{{roomId}}/make_room_admin", self._make_admin)

    # --- people

    def _admin(self, request: Request) -> str:
        if not request.who.admin:
            raise Forbidden("Only an administrator of this server may do this.")
        return request.user_id

    async def _account(self, request: Request) -> User:
        self._admin(request)
        user_id = request.params["userId"]
        if not self._users.is_local(user_id):
            raise InvalidParam("This person has no account on this server.")
        return await self._users.get(user_id)

    async def _act(self, request: Request, measure: str, target: str, **more: Any) -> Outcome:
        return await self._actions.take(Act(measure, target, self._admin(request), REASON, **more))

    async def _is_admin(self, request: Request) -> Answer:
        return {"admin": (await self._account(request)).admin}

    async def _user_details(self, request: Request) -> Answer:
        user = await self._account(request)
        days = [one.last_seen_day for one in await self._devices.list(user.user_id) if one.last_seen_day is not None]
        return {
            "name": user.user_id,
            "is_guest": False,
            "admin": user.admin,
            "user_type": None,
            "deactivated": user.deactivated,
            "erased": False,
            "shadow_banned": self._restrictions.find(SHADOW, user.user_id) is not None,
            "creation_ts": user.created_day,
            # The day is all that is known.
            "last_seen_ts": max(days, default=0),
            "locked": user.locked,
            "suspended": user.suspended,
        }

    async def _deactivate(self, request: Request) -> Answer:
        user = await self._account(request)
        erase = get_bool(request.optional_json(), "erase", False)
        outcome = await self._act(request, "deactivate", user.user_id, erase=erase)
        return _later({"id_server_unbind_result": "success"}, outcome)

    async def _suspend(self, request: Request) -> Answer:
        user, body = await self._account(request), request.json()
        if "suspend" not in body:
            raise MissingParam("The key suspend is missing: true or false.")
        suspend = get_bool(body, "suspend", True)
        await self._act(request, "suspend", user.user_id, undo=not suspend)
        return {f"user_{user.user_id}_suspended": suspend}

    async def _shadow(self, request: Request) -> Answer:
        await self._act(request, "shadow", (await self._account(request)).user_id)
        return {}

    async def _unshadow(self, request: Request) -> Answer:
        await self._act(request, "shadow", (await self._account(request)).user_id, undo=True)
        return {}

    async def _redact(self, request: Request) -> Answer:
        self._admin(request)
        rooms = get_list(request.optional_json(), "rooms", [])
        if len(rooms) > 1 or not all(is_room_id(room_id) for room_id in rooms):
            raise InvalidParam("The key rooms names one room, or none for all of them.")
        outcome = await self._act(request, "redact_all", request.params["userId"], room_id=rooms[0] if rooms else None)
        return _later({"redact_id": outcome.waits}, outcome)

    async def _redact_status(self, request: Request) -> Answer:
        self._admin(request)
        waiting = await self._actions.find(request.params["redactId"])
        if waiting is None or waiting.act.measure != "redact_all":
            raise NotFound("Nothing is known under this ID: it was cancelled, or done long ago.")
        return {
            "status": ("scheduled", "active", "complete")[waiting.state],
            "failed_redactions": {},
            "org.relay.redacted": waiting.done,
            "org.relay.failed": waiting.failed,
        }

    # --- reports

    async def _event_reports(self, request: Request) -> Answer:
        self._admin(request)
        after, limit = request.query_int("from", 0), request.query_int("limit", MAX_PAGE, low=1, high=MAX_PAGE)
        rows, latest = await self._reports(after, limit)
        speaker = await self._speaker()
        answer: dict[str, Any] = {
            "event_reports": [
                {
                    "id": row["number"],
                    "received_ts": row["created_ts"],
                    "room_id": row["room_id"],
                    "name": None,
                    "event_id": row["event_id"],
                    "sender": row["sender"],
                    "user_id": speaker,
                    "reason": f"sealed: open case {row['number']} at the desk",
                    "score": None,
                    "canonical_alias": None,
                }
                for row in rows
            ],
            # Whoever polls goes on from here when it has read everything.
            "total": latest,
        }
        if rows and rows[-1]["number"] < latest:
            answer["next_token"] = rows[-1]["number"]
        return answer

    async def _context(self, request: Request) -> Answer:
        """One event, and only if it was reported: an administrator is no member of every room."""
        self._admin(request)
        room_id, event_id = request.params["roomId"], request.params["eventId"]
        one = await self._rooms.event(event_id)
        if one is None or one.event.room_id != room_id or not await self._is_reported(event_id):
            raise NotFound("No report speaks of this event.")
        shown = format.finished(format.shared_body(one), room_id, {})
        return orjson.dumps(
            {"start": "", "end": "", "event": shown, "events_before": [], "events_after": [], "state": []}
        )

    async def _is_reported(self, event_id: str) -> bool:
        after = 0
        while True:
            rows, latest = await self._reports(after, MAX_PAGE)
            if any(row["event_id"] == event_id for row in rows):
                return True
            if not rows or rows[-1]["number"] >= latest:
                return False
            after = rows[-1]["number"]

    # --- rooms

    async def _room(self, request: Request) -> Room:
        self._admin(request)
        room = await self._rooms.get(request.params["roomId"])
        if room is None or not room.known:
            raise NotFound("Nobody on this server has been in this room.")
        return room

    async def _details(self, room: Room) -> dict[str, Any]:
        create = await room.event(*CREATE)
        room_type = create.content.get("type") if create is not None else None
        return {
            "room_id": room.room_id,
            "name": await room.text("m.room.name", "name"),
            "topic": None,
            "avatar": await room.text("m.room.avatar", "url"),
            "canonical_alias": await room.text("m.room.canonical_alias", "alias"),
            "joined_members": room.joined_count,
            "joined_local_members": len(room.local_joined),
            "version": room.version.name,
            "creator": create.sender if create is not None else None,
            "encryption": (await room.content(*ENCRYPTION)).get("algorithm"),
            "federatable": create is None or create.content.get("m.federate") is not False,
            "public": room.published,
            "join_rules": (await room.content(*JOIN_RULES)).get("join_rule"),
            "guest_access": None,
            "history_visibility": (await room.content(*HISTORY_VISIBILITY)).get("history_visibility"),
            "state_events": len(room.entries),
            "room_type": room_type if isinstance(room_type, str) else None,
            "forgotten": not room.local_joined,
        }

    async def _room_details(self, request: Request) -> Answer:
        return await self._details(await self._room(request))

    async def _list_rooms(self, request: Request) -> Answer:
        """By room ID; other orders and searches are not offered."""
        self._admin(request)
        start, limit = request.query_int("from", 0), request.query_int("limit", MAX_PAGE, low=1, high=MAX_PAGE)
        ids, total = await self._db.read(_rooms_from, start, limit)
        found = [await self._rooms.get(room_id) for room_id in ids]
        answer: dict[str, Any] = {
            "rooms": [await self._details(room) for room in found if room is not None],
            "offset": start,
            "total_rooms": total,
        }
        if start + len(ids) < total:
            answer["next_batch"] = start + len(ids)
        if start:
            answer["prev_batch"] = max(0, start - limit)
        return answer

    async def _is_blocked(self, request: Request) -> Answer:
        self._admin(request)
        return {"block": self._restrictions.closes(request.params["roomId"])}

    async def _delete(self, request: Request) -> Answer:
        outcome = await self._act(request, "shut_room", request.params["roomId"])
        return _later({"delete_id": outcome.waits}, outcome)

    async def _delete_at_once(self, request: Request) -> Answer:
        outcome = await self._act(request, "shut_room", request.params["roomId"])
        gone: list[str] = []
        return _later(
            {"kicked_users": gone, "failed_to_kick_users": gone, "local_aliases": gone, "new_room_id": None}, outcome
        )

    async def _make_admin(self, request: Request) -> Answer:
        self._admin(request)
        target = get_string(request.optional_json(), "user_id", request.user_id)
        await self._actions.make_room_admin(request.user_id, request.params["roomId"], target)
        return {}


def _rooms_from(query: Query, start: int, limit: int) -> tuple[list[str], int]:
    where = "FROM rooms WHERE state_nid IS NOT NULL"
    rows = query.all(f"SELECT room_id {where} ORDER BY room_id LIMIT $1 OFFSET $2", limit, start)
    return [room_id for (room_id,) in rows], int(query.value(f"SELECT count(*) {where}") or 0)


def _later(answer: dict[str, Any], outcome: Outcome) -> Answer:
    """202 where it waits: tools that know only success and failure take it for a success to come."""
    if outcome.waits is None:
        return answer
    body = {**answer, "org.relay.waits": outcome.as_json()}
    return web.Response(status=202, body=orjson.dumps(body), headers=JSON_HEADERS)
