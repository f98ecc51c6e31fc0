"""What the operator's command line asks of moderation: `relay moderation …`, `relay report …`. Its grammar: command_line.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from relay.db import Database
from relay.errors import InvalidParam, NotFound
from relay.moderation import audit_check, statements
from relay.moderation import case_rules as rules
from relay.moderation.acts import OPERATOR
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decisions
from relay.moderation.safety_api import SafetyApi

MAX_LISTED = 10_000


class ModerationCommands:
    def __init__(
        self,
        db: Database,
        audit_log: AuditLog,
        server_name: str,
        cases: Cases,
        decisions: Decisions,
        api: SafetyApi,
    ) -> None:
        self._db = db
        self._audit_log = audit_log
        self._server_name = server_name
        self._cases = cases
        self._decisions = decisions
        self._api = api

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {
            "moderation.verify": self.verify,
            "moderation.checkpoint": self.checkpoint,
            "moderation.new-key": self.new_key,
            "moderation.restored": self.restored,
            "report.list": self.list_reports,
            "report.show": self.show_report,
            "report.decide": self.decide,
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

    async def restored(self) -> dict[str, Any]:
        return {"from_seq": await self._audit_log.note_restored(OPERATOR)}

    # --- reports

    async def list_reports(self, *, state: str = "open", category: str | None = None) -> list[dict[str, Any]]:
        if state not in ("open", "all", *rules.STATES):
            raise InvalidParam(f"The state is open, all or one of: {', '.join(rules.STATES)}.")
        if category is not None:
            rules.require_category(category)
        rows: list[dict[str, Any]] = []
        while len(rows) < MAX_LISTED:
            found, total = await self._cases.queue(
                state=None if state == "all" else state, category=category, start=len(rows), limit=200
            )
            rows += [_row(case) for case in found]
            if not found or len(rows) >= total:
                break
        return rows

    async def show_report(self, *, report: str) -> dict[str, Any]:
        return await self._api.shown(await self._meant(report))

    async def decide(self, *, report: str, decision: dict[str, Any]) -> dict[str, Any]:
        case = await self._meant(report)
        statement = statements.parse(decision, about=case.user_id)
        made = await self._decisions.decide(case.case_id, OPERATOR, None, statement)
        return made.as_json()

    async def _meant(self, report: str) -> Case:
        """By its ID, or by its number."""
        if report.isascii() and report.isdigit() and len(report) <= 12:
            case = await self._cases.by_number(int(report))
            if case is not None:
                return case
        return await self._cases.get(report)


def _row(case: Case) -> dict[str, Any]:
    return {
        "id": case.case_id,
        "number": case.number,
        "event_id": case.event_id,
        "room_id": case.room_id,
        "user_id": case.user_id,
        "category": case.category,
        "state": case.state,
        "disclosure": case.disclosure,
        "due": case.due_ts,
    }
