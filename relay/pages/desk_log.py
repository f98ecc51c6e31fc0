"""The desk's page of the audit log: what was done, by whom, and whether a backup was restored beneath it.

A browser keeps the last checkpoint that it saw, and says so loudly where the log no longer holds that row
(`static/desk.js`); it asks `/_relay/desk/log/{seq}` for the row's hash.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.errors import InvalidParam, NotFound
from relay.moderation.audit_log import AuditLog
from relay.pages import desk_words
from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route

PAGE = "/_relay/desk/log"
ROWS = 100
MAX_FORM_BYTES = 4096


class DeskLog(Part):
    def __init__(self, frame: Frame, audit_log: AuditLog) -> None:
        self._frame = frame
        self._audit_log = audit_log

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        yield Route("GET", PAGE, frame.open_to("moderator", self._page), auth="none")
        yield Route("GET", f"{PAGE}/{{seq}}", frame.open_to("moderator", self._row), auth="none")
        acknowledge = frame.taking("moderator", self._acknowledge)
        yield Route("POST", f"{PAGE}/acknowledge", acknowledge, auth="none", max_body=MAX_FORM_BYTES)

    async def _page(self, request: Request, visit: Visit) -> Answer:
        before = request.query_int("before", 0) or None
        rows = await self._audit_log.page(before=before, limit=ROWS, reader=visit.user_id)
        return await self._frame.page(
            request, visit, "desk_log.html", rows=rows, newest=rows[0] if rows and before is None else None, words=desk_words,
            further=rows[-1].seq if len(rows) == ROWS and rows[-1].seq > 1 else None,
            restored=await self._audit_log.restored(), checkpoint=await self._audit_log.last_checkpoint(),
        )  # fmt: skip

    async def _row(self, request: Request, visit: Visit) -> Answer:
        text = request.params["seq"]
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidParam("Rows of the log are numbered.")
        rows = await self._audit_log.page(before=int(text) + 1, limit=1)
        if not rows or rows[0].seq != int(text):
            raise NotFound("The log has no such row.")
        return {"seq": rows[0].seq, "hash": rows[0].hash}

    async def _acknowledge(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._audit_log.acknowledge_restore(visit.user_id)
        return self._frame.redirect(PAGE)
