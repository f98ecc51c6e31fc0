"""What the operator's command line asks of moderation: `relay moderation …`, `relay report …`. Its grammar: command_line.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from relay.db import Database
from relay.errors import NotFound
from relay.moderation import audit_check
from relay.moderation.audit_log import AuditLog


class ModerationCommands:
    def __init__(self, db: Database, audit_log: AuditLog, server_name: str) -> None:
        self._db = db
        self._audit_log = audit_log
        self._server_name = server_name

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {
            "moderation.verify": self.verify,
            "moderation.checkpoint": self.checkpoint,
            "moderation.new-key": self.new_key,
        }

    async def verify(self, *, held: dict[str, Any] | None = None) -> dict[str, Any]:
        """Also the newest checkpoint, to be held outside from now on."""
        verdict = await self._db.read(audit_check.verify, self._server_name, held)
        answer = verdict.as_json()
        if not verdict.found:
            made = await self._audit_log.checkpoint()
            answer["checkpoint"] = made.json if made is not None else None
        return answer

    async def checkpoint(self) -> dict[str, Any]:
        made = await self._audit_log.checkpoint()
        if made is None:
            raise NotFound("Nothing was ever done that the audit log would hold, so there is nothing to sign.")
        return made.json

    async def new_key(self) -> dict[str, Any]:
        return {"key_id": await self._audit_log.introduce_signer()}
