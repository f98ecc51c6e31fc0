"""Which rooms somebody shares with another person. Spec: client-server-api/#mutual-rooms."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

from relay.errors import InvalidParam, MissingParam
from relay.ids import is_user_id
from relay.part import Part
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route

MAX_PAGE = 500


class MutualRooms(Part):
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    def routes(self) -> Iterable[Route]:
        for path in ("v1/mutual_rooms", "unstable/uk.half-shot.msc2666/user/mutual_rooms"):
            yield Route("GET", f"/_matrix/client/{path}", self._shared, limit="messages")

    async def _shared(self, request: Request) -> Answer:
        other = request.query.get("user_id")
        if other is None:
            raise MissingParam("The parameter user_id is missing: with whom?")
        if not is_user_id(other) or other == request.user_id:
            raise InvalidParam("The parameter user_id is the ID of another person. It looks like @name:server.")
        shared = sorted(await self._rooms.shared(request.user_id, other))
        after = _room_in(request.query["from"]) if "from" in request.query else ""
        rest = [room_id for room_id in shared if room_id > after]
        page = rest[:MAX_PAGE]
        answer: dict[str, Any] = {"joined": page, "count": len(shared)}
        if len(rest) > len(page):
            answer["next_batch"] = base64.urlsafe_b64encode(page[-1].encode()).decode().rstrip("=")
        return answer


def _room_in(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    except (binascii.Error, ValueError):
        raise InvalidParam("This is not a token of this endpoint. Leave `from` out to begin anew.") from None
