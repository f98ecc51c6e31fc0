"""The desk's page of what others say and what looks odd: ban lists that this relay follows, and the flags of the last day.

Both are for a person to look at. A list is followed, or no longer, by a form here; applying one is asked about once more.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.errors import InvalidParam
from relay.moderation.flags import Flags
from relay.moderation.list_following import ListFollowing
from relay.moderation.policy_lists import APPLY, EFFECTS, PolicyLists
from relay.pages import desk_words
from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route

PAGE = "/_relay/desk/lists"
MAX_FORM_BYTES = 16 * 1024
MAX_ROOM = 300


class DeskLists(Part):
    def __init__(self, frame: Frame, lists: PolicyLists, following: ListFollowing, flags: Flags) -> None:
        self._frame = frame
        self._lists = lists
        self._following = following
        self._flags = flags

    def routes(self) -> Iterable[Route]:
        yield Route("GET", PAGE, self._frame.open_to("moderator", self._page), auth="none")
        for name, function in (("follow", self._follow), ("unfollow", self._unfollow)):
            take = self._frame.taking("moderator", function)
            yield Route("POST", f"{PAGE}/{name}", take, auth="none", max_body=MAX_FORM_BYTES)

    async def _page(self, request: Request, visit: Visit) -> Answer:
        return await self._frame.page(
            request, visit, "desk_lists.html", lists=self._lists.listing(), flags=self._flags.listed(), words=desk_words
        )

    async def _follow(self, request: Request, visit: Visit, form: Form) -> Answer:
        room = form.required("room", MAX_ROOM, "the list's room")
        effect = form.required("effect", 20, "what to do with what it names")
        via = form.text("via", MAX_ROOM)
        if effect not in EFFECTS:
            raise InvalidParam("The desk does not know this effect. Load the page again.")
        if effect == APPLY and not form.ticked("sure"):
            return await self._frame.page(request, visit, "desk_list_sure.html", room=room, via=via)
        await self._following.follow(visit.user_id, room, effect, [via] if via else [])
        return self._frame.redirect(f"{PAGE}#lists")

    async def _unfollow(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._following.unfollow(visit.user_id, form.required("room", MAX_ROOM, "the list's room"))
        return self._frame.redirect(f"{PAGE}#lists")
