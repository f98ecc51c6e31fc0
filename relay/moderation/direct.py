"""Measures that were taken without a report: at the desk, by a tool, by a rule, on the command line.

Whoever is concerned hears of them as well, and may object: so each makes a case that is decided already, with the statement of
reasons that came with it. Tools and the command line give none: then a moderator is asked to state it, and the person is told
again. Nobody is told who only sends advertising in bulk, or where a law forbids it. It is no report, and the figures don't
count it as one.
"""

from __future__ import annotations

from dataclasses import replace

from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database, Tx
from relay.moderation import case_rules as rules
from relay.moderation import notice_words as words
from relay.moderation.acts import MEASURES, Act, Reasons
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decision, Decisions
from relay.moderation.links import Links
from relay.moderation.notices import Notices
from relay.moderation.own_rooms import MODERATORS
from relay.moderation.statements import Chosen, Statement, require_complete

NOT_STATED = "terms:not stated"
BY_PERSON = "This measure was taken directly, without a report. The moderators are asked to state the reasons; you can object at once."
BY_MACHINE = "An automatic rule of this relay took this measure, for a day at most. Object, and a person looks at it and gives the reasons."


class DirectMeasures:
    def __init__(
        self,
        db: Database,
        clock: Clock,
        users: Users,
        cases: Cases,
        decisions: Decisions,
        links: Links,
        notices: Notices,
        audit_log: AuditLog,
    ) -> None:
        self._db = db
        self._clock = clock
        self._users = users
        self._cases = cases
        self._decisions = decisions
        self._links = links
        self._notices = notices
        self._audit_log = audit_log

    def taken(self, tx: Tx, act: Act) -> None:
        """`Actions.on_taken`: in the write that carries it out. What a decision carries out brings no reasons of its own."""
        concerned = act.target if MEASURES[act.measure].target == "user" else act.author
        if act.undo or concerned is None or (act.case_id is not None and act.reasons is None):
            return
        local = self._users.is_local(concerned)
        if not local and act.reasons is None:
            return  # her server is told what was decided, not what a tool did
        now = self._clock.now()
        about_event = act.target if MEASURES[act.measure].target == "event" else None
        case = self._cases.new(
            kind="direct", category="other", user_id=concerned, room_id=act.room_id, event_id=about_event
        )
        kept = rules.kept_until("other", now, now)
        self._cases.put(tx, replace(case, state=rules.DECIDED, decided_ts=now, keep_until=kept))
        chosen = Chosen(act.measure, act.target, act.room_id, act.lasts_ms, act.erase)
        reasons = act.reasons or Reasons(NOT_STATED, BY_MACHINE if act.is_machine else BY_PERSON)
        self._decisions.put_direct(tx, case, act, chosen, reasons)
        if reasons.untold:
            self._audit_log.record(
                tx, actor=act.actor, action="untold", target=concerned, reason_code=reasons.untold, case_id=case.case_id
            )
        elif local:
            sentence = words.WARNED if act.measure == "warn" else words.ABOUT_YOU
            self._tell(tx, case.case_id, concerned, sentence)
        if act.reasons is None and not act.is_machine:
            self._notices.tell(tx, MODERATORS, words.NO_REASONS, case.case_id)

    def _tell(self, tx: Tx, case_id: str, user_id: str, sentence: str) -> None:
        token = self._links.make(tx, case_id, "appeal", user_id)
        self._notices.tell(tx, user_id, sentence, case_id, link=("appeal", token))

    # --- reasons that come later

    @staticmethod
    def lacks_reasons(case: Case, decisions: list[Decision]) -> bool:
        return case.kind == "direct" and len(decisions) == 1 and decisions[0].ground == NOT_STATED

    async def state(self, case_id: str, actor: str, reasons: Reasons) -> None:
        """What a tool or the command line left out. Raises ApiError."""
        case = await self._cases.for_moderator(case_id, actor)
        decisions = await self._decisions.of_case(case_id)
        if not self.lacks_reasons(case, decisions):
            raise rules.NotNow(
                "The reasons of this measure are stated already. An objection can have it looked at again."
            )
        [decision] = decisions
        require_complete(
            Statement(decision.reason_code, reasons.ground, reasons.facts, untold=reasons.untold), actor, case_id
        )
        with self._db.write() as tx:
            self._audit_log.record(
                tx, actor=actor, action="reasons.stated", target=case_id, reason_code=decision.reason_code, case_id=case_id,
                detail={"ground": reasons.ground},
            )  # fmt: skip
            self._decisions.set_reasons(tx, decision.decision_id, reasons)
            # So that two moderators don't overwrite each other.
            self._cases.change(tx, case_id, case.version, lambda before: before)
            if case.user_id is not None and self._users.is_local(case.user_id):
                self._tell(tx, case_id, case.user_id, words.REASONS_STATED)
        await tx
