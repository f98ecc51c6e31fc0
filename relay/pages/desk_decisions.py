"""Deciding a case at the desk, and answering an appeal: the form, the question whether it is meant so, and the doing.

Which measures are offered follows from what the case knows: a person here, a room, a message, a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relay.accounts.users import Users
from relay.moderation import case_rules as rules
from relay.moderation.appeals import Appeals
from relay.moderation.case_rows import Case
from relay.moderation.decisions import Decisions
from relay.moderation.direct import DirectMeasures
from relay.moderation.statements import MAX_FACTS, MIN_FACTS, Statement
from relay.pages import desk_words
from relay.pages.desk_statements import NotWhole, fields_of, reasons_of, statement_of
from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.web import Answer, Request

STANDS, TAKEN_BACK, CHANGED = "upheld", "reversed", "changed"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a form says, before it is sure."""

    statement: Statement
    fields: list[tuple[str, str]]


class DeskDecisions:
    def __init__(
        self, frame: Frame, users: Users, decisions: Decisions, appeals: Appeals, direct: DirectMeasures
    ) -> None:
        self._frame = frame
        self._users = users
        self._decisions = decisions
        self._appeals = appeals
        self._direct = direct

    async def shown(self, case: Case, actor: str) -> dict[str, Any]:
        """What the case's page shows of deciding."""
        made = await self._decisions.of_case(case.case_id)
        appealed = case.state in (rules.APPEALED, rules.RE_REVIEW)
        return {
            "decisions": made,
            "possible": self.possible(case),
            "may_decide": case.duplicate_of is None and (case.state in rules.UNDECIDED or appealed),
            "appealed": appealed,
            "appeals": await self._appeals.of_case(case.case_id),
            "lacks_reasons": self._direct.lacks_reasons(case, made),
            "own_decision": appealed and bool(made) and made[-1].decider == actor,
        }

    def possible(self, case: Case) -> list[str]:
        """The measures that can be taken with what the case knows."""
        found = []
        if case.user_id is not None:
            here = self._users.is_local(case.user_id)
            found += ["warn", "suspend", "lock", "shadow"] if here else []
            found += ["kick", "ban"] if case.room_id is not None else []
            found += ["hide"] if case.event_id is not None else []
            found += ["redact"] if case.event_id is not None and case.room_id is not None else []
            found += ["redact_all", "deactivate"] if here else ["block_server"]
        found.append("quarantine")
        if case.room_id is not None:
            found += ["block_room", "shut_room"]
        return found

    async def decide(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        statement, wanted = statement_of(form, case, visit.user_id, self.possible(case))
        if not form.ticked("sure"):
            asked = _Asked(statement, [*fields_of(form), *(("measure", one) for one in wanted)])
            return await self._ask(request, visit, case, asked, "Decide so?")
        await self._decisions.decide(case.case_id, visit.user_id, _version(form), statement)
        return self._frame.redirect(f"/_relay/desk/case/{case.case_id}")

    async def answer_appeal(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        """The decision stands, is taken back, or another takes its place."""
        outcome = form.text("outcome", 20)
        if outcome not in (STANDS, TAKEN_BACK, CHANGED):
            raise NotWhole("outcome", "Say whether the decision stands, is taken back, or is changed.")
        made = await self._decisions.of_case(case.case_id)
        if not made:
            raise rules.NotNow("There is no decision to answer for. Load the case again.")
        if outcome == CHANGED:
            statement, wanted = statement_of(form, case, visit.user_id, self.possible(case))
            if not statement.measures:
                raise NotWhole("measure", "Tick what takes its place. Where nothing does, the decision is taken back.")
            ticked = [("measure", one) for one in wanted]
        else:
            facts, ticked = form.text("facts", MAX_FACTS), []
            if len(facts) < MIN_FACTS:
                raise NotWhole("facts", f"Say why in at least {MIN_FACTS} characters: both sides read it.")
            statement = Statement(made[-1].reason_code, made[-1].ground, facts)
        if not form.ticked("sure"):
            question = {
                STANDS: "Let the decision stand?", TAKEN_BACK: "Take the decision back?", CHANGED: "Put this in its place?"
            }[outcome]  # fmt: skip
            asked = _Asked(statement, [*fields_of(form), *ticked])
            return await self._ask(request, visit, case, asked, question, appeal=True)
        await self._appeals.answer(
            case.case_id, visit.user_id, _version(form), reverse=outcome != STANDS, statement=statement
        )
        return self._frame.redirect(f"/_relay/desk/case/{case.case_id}")

    async def state_reasons(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        """Of a measure that a tool or the command line took without any."""
        made = await self._decisions.of_case(case.case_id)
        if not made:
            raise rules.NotNow("There is no measure to give reasons for. Load the case again.")
        told = reasons_of(form, reason=made[0].reason_code)
        await self._direct.state(case.case_id, visit.user_id, told.reasons)
        return self._frame.redirect(f"/_relay/desk/case/{case.case_id}")

    async def _ask(
        self, request: Request, visit: Visit, case: Case, asked: _Asked, question: str, *, appeal: bool = False
    ) -> Answer:
        measures = [one.measure for one in asked.statement.measures]
        return await self._frame.page(
            request, visit, "desk_decide_sure.html", case=case, decision=asked.statement, fields=asked.fields,
            question=question, appeal=appeal, final=any(one in desk_words.FINAL for one in measures), words=desk_words,
        )  # fmt: skip


def _version(form: Form) -> int | None:
    text = form.text("version", 20)
    return int(text) if text.isascii() and text.isdigit() else None
