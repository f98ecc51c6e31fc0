"""The desk's page of what others say and what looks odd: ban lists that this relay follows, and the flags of the last day.

Both are for a person to look at; lists are chosen in relay.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.moderation.flags import Flags
from relay.moderation.policy_lists import PolicyLists
from relay.pages import desk_words
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route


class DeskLists(Part):
    def __init__(self, frame: Frame, lists: PolicyLists, flags: Flags) -> None:
        self._frame = frame
        self._lists = lists
        self._flags = flags

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_relay/desk/lists", self._frame.open_to("moderator", self._page), auth="none")

    async def _page(self, request: Request, visit: Visit) -> Answer:
        return await self._frame.page(
            request, visit, "desk_lists.html", lists=self._lists.listing(), flags=self._flags.listed(), words=desk_words
        )
