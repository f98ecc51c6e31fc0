"""Deciding a case at the desk, and answering an appeal: the form, the question whether it is meant so, and the doing.

Which measures are offered follows from what the case knows: a person here, a room, a message, a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relay.accounts.users import Users
from relay.clock import DAY
from relay.errors import InvalidParam, MissingParam
from relay.ids import server_of
from relay.moderation import case_rules as rules
from relay.moderation.acts import MEASURES
from relay.moderation.appeals import Appeals
from relay.moderation.case_rows import Case
from relay.moderation.decisions import Decisions
from relay.moderation.statements import MAX_FACTS, Chosen, Statement, require_complete
from relay.pages import desk_words
from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.web import Answer, Request

MAX_GROUND, MAX_MEDIA = 180, 400
FIELDS = ("version", "reason", "lasts", "ground_kind", "ground", "facts", "media", "outcome")
# Measures that end by themselves only where the moderator says so.
_LASTING = frozenset({"suspend", "lock", "ban", "quarantine", "block_room", "block_server"})


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a form says, before it is sure."""

    statement: Statement
    fields: list[tuple[str, str]]


class DeskDecisions:
    def __init__(self, frame: Frame, users: Users, decisions: Decisions, appeals: Appeals) -> None:
        self._frame = frame
        self._users = users
        self._decisions = decisions
        self._appeals = appeals

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
            "own_decision": appealed and bool(made) and made[-1].decider == actor,
        }

    def possible(self, case: Case) -> list[str]:
        """The measures that can be taken with what the case knows."""
        found = []
        if case.user_id is not None:
            here = self._users.is_local(case.user_id)
            found += ["warn", "suspend", "lock", "shadow"] if here else []
            found += ["kick", "ban"] if case.room_id is not None else []
            found += ["redact"] if case.event_id is not None and case.room_id is not None else []
            found += ["redact_all", "deactivate"] if here else ["block_server"]
        found.append("quarantine")
        if case.room_id is not None:
            found += ["block_room", "shut_room"]
        return found

    async def decide(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        asked = self._read(form, case, visit.user_id)
        if not form.ticked("sure"):
            return await self._ask(request, visit, case, asked, "Decide so?")
        await self._decisions.decide(case.case_id, visit.user_id, _version(form), asked.statement)
        return self._frame.redirect(f"/_relay/desk/case/{case.case_id}")

    async def answer_appeal(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        outcome = form.text("outcome", 20)
        if outcome not in ("upheld", "reversed"):
            raise MissingParam("Say whether the decision stands or is taken back.")
        made = await self._decisions.of_case(case.case_id)
        if not made:
            raise rules.NotNow("There is no decision to answer for. Load the case again.")
        facts = form.required("facts", MAX_FACTS, "why")
        statement = Statement(made[-1].reason_code, made[-1].ground, facts)
        require_complete(statement, visit.user_id, case.case_id)
        if not form.ticked("sure"):
            question = "Let the decision stand?" if outcome == "upheld" else "Take the decision back?"
            return await self._ask(request, visit, case, _Asked(statement, _fields(form)), question, appeal=True)
        await self._appeals.answer(
            case.case_id, visit.user_id, _version(form), reverse=outcome == "reversed", statement=statement
        )
        return self._frame.redirect(f"/_relay/desk/case/{case.case_id}")

    async def _ask(
        self, request: Request, visit: Visit, case: Case, asked: _Asked, question: str, *, appeal: bool = False
    ) -> Answer:
        measures = [one.measure for one in asked.statement.measures]
        return await self._frame.page(
            request, visit, "desk_decide_sure.html", case=case, decision=asked.statement, fields=asked.fields,
            question=question, appeal=appeal, final=any(one in desk_words.FINAL for one in measures), words=desk_words,
        )  # fmt: skip

    def _read(self, form: Form, case: Case, actor: str) -> _Asked:
        """Raises an ApiError that says what is missing."""
        wanted = form.every("measure")
        if not wanted:
            raise MissingParam("Say what is done: tick Nothing, or one measure at least.")
        if "none" in wanted and len(wanted) > 1:
            raise InvalidParam("You ticked Nothing and a measure beside it. Go back and choose one or the other.")
        possible = self.possible(case)
        if any(one != "none" and one not in possible for one in wanted):
            raise InvalidParam("A measure does not fit this case. Load the case again.")
        lasts, reason, kind = form.text("lasts", 10), form.text("reason", 40), form.text("ground_kind", 10)
        if reason not in desk_words.REASONS:
            raise MissingParam("Choose a reason.")
        if lasts and lasts not in desk_words.LASTS_DAYS:
            raise InvalidParam("The desk does not know this length of time. Load the case again.")
        lasts_ms = desk_words.LASTS_DAYS[lasts] * DAY if lasts else None
        ground = form.required("ground", MAX_GROUND, "which rule or law it breaks")
        statement = Statement(
            reason, f"{'law' if kind == 'law' else 'terms'}:{ground}", form.text("facts", MAX_FACTS),
            tuple(self._chosen(one, case, form, lasts_ms) for one in wanted if one != "none"),
        )  # fmt: skip
        require_complete(statement, actor, case.case_id)
        return _Asked(statement, [*_fields(form), *(("measure", one) for one in wanted)])

    def _chosen(self, measure: str, case: Case, form: Form, lasts_ms: int | None) -> Chosen:
        kind = MEASURES[measure]
        target = {
            "user": case.user_id, "event": case.event_id, "room": case.room_id,
            "server": server_of(case.user_id or ""),
            "media": form.text("media", MAX_MEDIA),
        }[kind.target]  # fmt: skip
        if not target:
            raise MissingParam("Name the file that is to be quarantined: mxc://server/ID or sha256:HEX.")
        room_id = case.room_id if kind.in_a_room else None
        return Chosen(measure, target, room_id, lasts_ms if measure in _LASTING else None)


def _fields(form: Form) -> list[tuple[str, str]]:
    return [(name, form.text(name, MAX_FACTS)) for name in FIELDS if form.ticked(name)]


def _version(form: Form) -> int | None:
    text = form.text("version", 20)
    return int(text) if text.isascii() and text.isdigit() else None
