"""Hands out a file's ciphertext to a moderator who asked for it by a second click: what lies here, and nothing from elsewhere.

Asking the sender's server would tell it which message was reported. Whoever looked at what stands in the audit log; where
a minor may be concerned nothing is handed out at all.
"""

from __future__ import annotations

from aiohttp import web

from relay.db import Database
from relay.errors import Forbidden, InvalidParam, NotFound
from relay.ids import is_opaque, is_server_name
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.disclosure import HeldMedia
from relay.pages.forms import Form
from relay.pages.frame import HEADERS
from relay.pages.visits import Visit
from relay.web import Answer, Request

MAX_URL = 600
MAX_SHOWN_BYTES = 100 * 1024 * 1024


class DeskMedia:
    def __init__(self, db: Database, audit_log: AuditLog, held: HeldMedia) -> None:
        self._db = db
        self._audit_log = audit_log
        self._held = held

    async def hand_out(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        if case.category == "minor":
            raise Forbidden(
                "This case may concern a minor: nothing of it is shown. Ask your lawyer which authority to tell."
            )
        server, slash, media_id = form.required("url", MAX_URL, "the file").removeprefix("mxc://").partition("/")
        if not slash or not is_server_name(server) or not is_opaque(media_id):
            raise InvalidParam("The message names no file by a Matrix address.")
        reader = await self._held(server, media_id)
        if reader is None:
            raise NotFound("This relay does not hold the file.")
        with self._db.write() as tx:
            self._audit_log.record(
                tx, actor=visit.user_id, action="media.handed_out", target=f"mxc://{server}/{media_id}", reason_code="looked_at",
                case_id=case.case_id,
            )  # fmt: skip
        await tx
        answer = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/octet-stream"})
        with reader:
            if reader.size > MAX_SHOWN_BYTES:
                raise InvalidParam("The file is too large to be shown here.")
            answer.content_length = reader.size
            await answer.prepare(request.http)
            async for block in reader.blocks():
                await answer.write(block)
        await answer.write_eof()
        return answer
