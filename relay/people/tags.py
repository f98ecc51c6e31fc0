"""Room tags: favourites, low priority and a person's own, kept as the room's account data `m.tag`.

Spec: client-server-api/#room-tagging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson

from relay.db import Database
from relay.errors import InvalidParam, TooLarge
from relay.ids import require_room_id
from relay.part import Part
from relay.people.account_data import MAX_CONTENT_BYTES, AccountData, require_self
from relay.web import Answer, Request, Route

TAGS = "m.tag"
MAX_TAG_BYTES = 255


class Tags(Part):
    def __init__(self, db: Database, account_data: AccountData) -> None:
        self._db = db
        self._account_data = account_data

    def routes(self) -> Iterable[Route]:
        tags = "/_matrix/client/v3/user/{user_id}/rooms/{room_id}/tags"
        yield Route("GET", tags, self._get_route)
        yield Route("PUT", f"{tags}/{{tag}}", self._put_route)
        yield Route("DELETE", f"{tags}/{{tag}}", self._delete_route)

    async def _get_route(self, request: Request) -> Answer:
        require_self(request)
        content = await self._account_data.get(request.user_id, TAGS, require_room_id(request.params["room_id"]))
        return {"tags": tags_in(content)}

    async def _put_route(self, request: Request) -> Answer:
        body = request.optional_json()
        order = body.get("order")
        if order is not None and (isinstance(order, bool) or not isinstance(order, (int, float))):
            raise InvalidParam("The order of a tag is a number between 0 and 1.")

        def put(tags: dict[str, Any], tag: str) -> None:
            tags[tag] = body

        return await self._change(request, put)

    async def _delete_route(self, request: Request) -> Answer:
        def remove(tags: dict[str, Any], tag: str) -> None:
            tags.pop(tag, None)

        return await self._change(request, remove)

    async def _change(self, request: Request, change: Callable[[dict[str, Any], str], None]) -> Answer:
        require_self(request)
        room_id, tag = require_room_id(request.params["room_id"]), request.params["tag"]
        if not 0 < len(tag.encode()) <= MAX_TAG_BYTES:
            raise InvalidParam(f"The name of a tag has 1 to {MAX_TAG_BYTES} bytes.")

        def changed(raw: bytes | None) -> bytes:
            tags = tags_in(orjson.loads(raw) if raw is not None else None)
            change(tags, tag)
            new = orjson.dumps({"tags": tags})
            if len(new) > MAX_CONTENT_BYTES:
                raise TooLarge("This room has too many tags. Remove one first.")
            return new

        with self._db.write() as tx:
            self._account_data.change(tx, request.user_id, TAGS, changed, room_id)
        await tx
        return {}


def tags_in(content: Any) -> dict[str, Any]:
    """A client may have written m.tag itself, in any shape."""
    tags = content.get("tags") if isinstance(content, dict) else None
    return tags if isinstance(tags, dict) else {}
