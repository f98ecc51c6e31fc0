"""Hands out a file's ciphertext to a moderator who asked for it by a second click: what lies here, and by hand what lies elsewhere.

Asking another server tells it that somebody here looks at that file: so it is never done by itself, the moderator is warned
first, and nothing of it is kept (safety 1.6, points 6 and 11). Whoever looked at what, and fetched what, stands in the audit log;
where a minor may be concerned nothing is handed out at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import structlog
from aiohttp import web

from relay.db import Database
from relay.errors import ApiError, Forbidden, InvalidParam, MissingParam, NotFound, RemoteError
from relay.ids import is_opaque, is_server_name
from relay.media.remote_copies import Kept, RemoteCopies
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.disclosure import HeldMedia
from relay.pages.forms import Form
from relay.pages.frame import HEADERS
from relay.pages.visits import Visit
from relay.web import Answer, Request

log = structlog.get_logger("desk_media")

MAX_URL = 600
MAX_SHOWN_BYTES = 100 * 1024 * 1024
_TOO_LARGE = "The file is too large to be shown here."


class DeskMedia:
    def __init__(
        self, db: Database, audit_log: AuditLog, held: HeldMedia, copies: RemoteCopies, server_name: str
    ) -> None:
        self._db = db
        self._audit_log = audit_log
        self._held = held
        self._copies = copies
        self._server_name = server_name

    async def hand_out(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        server, media_id = _asked(form, case)
        reader = await self._held(server, media_id)
        if reader is None:
            raise NotFound("This relay does not hold the file.")
        with reader:
            if reader.size > MAX_SHOWN_BYTES:
                raise InvalidParam(_TOO_LARGE)
            await self._note("media.handed_out", "looked_at", visit, case, server, media_id)
            return await _send(request, reader.size, reader.blocks())

    async def fetch(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        """From the server where it lies, once, to this moderator alone. What was asked stands in the log before it is asked."""
        server, media_id = _asked(form, case)
        if server == self._server_name:
            raise NotFound("This file belongs to this relay and is not here any more.")
        if form.text("sure", 10) != "yes":
            raise MissingParam(
                "Say first that you know: the other server learns that somebody here looks at this file."
            )
        await self._note("media.fetched", "by_hand", visit, case, server, media_id)
        try:
            async with self._copies.open(server, media_id) as found:
                if isinstance(found, Kept):
                    return await _send(request, found.reader.size, found.reader.blocks())
                if found.length is not None and found.length > MAX_SHOWN_BYTES:
                    raise InvalidParam(_TOO_LARGE)
                # Not `keeping`: nobody else gets it because a moderator looked.
                async with aclosing(found.chunks()) as chunks:
                    return await _send(request, found.length, chunks)
        except RemoteError as no:
            raise ApiError(f"The server {no.server} did not give the file. It may be gone there.", status=502) from no

    async def _note(self, action: str, reason: str, visit: Visit, case: Case, server: str, media_id: str) -> None:
        with self._db.write() as tx:
            self._audit_log.record(
                tx, actor=visit.user_id, action=action, target=f"mxc://{server}/{media_id}", reason_code=reason,
                case_id=case.case_id,
            )  # fmt: skip
        await tx


def _asked(form: Form, case: Case) -> tuple[str, str]:
    """Raises Forbidden, InvalidParam."""
    if case.category == "minor":
        raise Forbidden(
            "This case may concern a minor: nothing of it is shown. Ask your lawyer which authority to tell."
        )
    server, slash, media_id = form.required("url", MAX_URL, "the file").removeprefix("mxc://").partition("/")
    if not slash or not is_server_name(server) or not is_opaque(media_id):
        raise InvalidParam("The message names no file by a Matrix address.")
    return server, media_id


async def _send(request: Request, size: int | None, blocks: AsyncIterator[bytes]) -> web.StreamResponse:
    """As bytes without a type: only the desk's script makes a picture of them."""
    answer = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/octet-stream"})
    if size is not None:
        answer.content_length = size
    await answer.prepare(request.http)
    sent = 0
    try:
        async for block in blocks:
            sent += len(block)
            if sent > MAX_SHOWN_BYTES:
                raise ConnectionError(_TOO_LARGE)
            await answer.write(block)
        await answer.write_eof()
    except (OSError, RemoteError) as error:
        # The headers are out: only a broken connection can still say that this is not the whole file.
        log.info("a file broke off on its way to the desk", exc_info=error)
        if request.http.transport is not None:
            request.http.transport.abort()
    return answer
