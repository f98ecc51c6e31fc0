"""Measures that were taken without a report: at the desk, by a tool, by a rule, on the command line.

Whoever is concerned hears of them as well, and may object: so each makes a case that is decided already, with what is known of
the reasons. It is no report, and the figures don't count it as one.
"""

from __future__ import annotations

from dataclasses import replace

from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Tx
from relay.moderation import case_rules as rules
from relay.moderation import notice_words as words
from relay.moderation.acts import MEASURES, Act
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decisions
from relay.moderation.links import Links
from relay.moderation.notices import Notices
from relay.moderation.statements import Chosen

FACTS = "This measure was taken directly, without a report. If you object, somebody looks at it and gives the reasons."
GROUND = "terms:not stated"


class DirectMeasures:
    def __init__(
        self, clock: Clock, users: Users, cases: Cases, decisions: Decisions, links: Links, notices: Notices
    ) -> None:
        self._clock = clock
        self._users = users
        self._cases = cases
        self._decisions = decisions
        self._links = links
        self._notices = notices

    def taken(self, tx: Tx, act: Act) -> None:
        """`Actions.on_taken`: in the write that carries it out."""
        concerns = MEASURES[act.measure].target == "user" and self._users.is_local(act.target)
        if act.case_id is not None or act.undo or not concerns:
            return
        now = self._clock.now()
        case = self._cases.new(kind="direct", category="other", user_id=act.target, room_id=act.room_id)
        kept = rules.kept_until("other", now, now)
        self._cases.put(tx, replace(case, state=rules.DECIDED, decided_ts=now, keep_until=kept))
        chosen = Chosen(act.measure, act.target, act.room_id, act.lasts_ms, act.erase)
        self._decisions.put_direct(tx, case, act, chosen, GROUND, FACTS)
        token = self._links.make(tx, case.case_id, "appeal", act.target)
        sentence = words.WARNED if act.measure == "warn" else words.ABOUT_YOU
        self._notices.tell(tx, act.target, sentence, case.case_id, link=("appeal", token))
