"""What other servers are told of our rooms' place in a space: the room, and those of its children that they could look into.

Who may look is asked of `relay/rooms/summary.py`; the tree is walked by the server that asks.
Spec: server-server-api/#get_matrixfederationv1hierarchyroomid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from relay.errors import NotFound
from relay.part import Part
from relay.rooms.room import Room
from relay.rooms.spaces import chosen_of
from relay.rooms.summary import Summaries, Summary
from relay.web import Answer, Request, Route

# Of one room; whoever wants more asks for the children themselves.
MAX_CHILDREN_TOLD = 200


class Hierarchy(Part):
    def __init__(self, summaries: Summaries) -> None:
        self._summaries = summaries

    def routes(self) -> Iterable[Route]:
        yield Route(
            "GET", "/_matrix/federation/v1/hierarchy/{roomId}", self._hierarchy, auth="server", limit="federation",
            serves="federation",
        )  # fmt: skip

    async def _hierarchy(self, request: Request) -> Answer:
        suggested_only = request.query_bool("suggested_only")
        room = await self._summaries.here(request.params["roomId"])
        summary = await self._told(room, request.origin) if room is not None else None
        if summary is None:
            raise NotFound("This server can't tell you of such a room.")
        chosen = chosen_of(summary, suggested_only)[:MAX_CHILDREN_TOLD]
        children: list[dict[str, Any]] = []
        closed: list[str] = []
        for child in chosen:
            room = await self._summaries.here(child["state_key"])
            if room is None:
                continue
            told = await self._told(room, request.origin)
            if told is None:
                closed.append(room.room_id)
            else:
                children.append(told.whole())
        return {
            "room": {**summary.told, "children_state": chosen},
            "children": children,
            "inaccessible_children": closed,
        }

    async def _told(self, room: Room, server: str) -> Summary | None:
        if not room.acl.allows(server):
            return None
        summary = await self._summaries.of(room)
        return summary if await self._summaries.open_to_server(room, summary, server) else None
