"""What is kept of a case and for how long, and what is late: the loop that ends both.

When a case's time is over, its envelopes lose their keys, what was frozen is let go, the links end, and the row keeps only
what the figures count. The reporter may ask for it earlier; what may show a minor stays its year all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from relay.clock import Clock, rest
from relay.db import Database, Query, Tx
from relay.moderation import case_rules as rules
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import COLUMNS, Case, by_id, case_of
from relay.moderation.cases import Cases
from relay.moderation.disclosure import Disclosures
from relay.moderation.freeze import Freeze
from relay.moderation.links import Links
from relay.part import Part

LOOK_EVERY_SECONDS = 60.0
MAX_AT_ONCE = 100
# Kinds of envelopes that hold what a reporter gave.
GIVEN_BY_HER = ("evidence", "words", "answer")


class Keeping(Part):
    def __init__(
        self,
        db: Database,
        clock: Clock,
        cases: Cases,
        disclosures: Disclosures,
        freeze: Freeze,
        links: Links,
        audit_log: AuditLog,
    ) -> None:
        self._db = db
        self._clock = clock
        self._cases = cases
        self._disclosures = disclosures
        self._freeze = freeze
        self._links = links
        self._audit_log = audit_log
        self._woken = asyncio.Event()
        # Sweeps of other parts that keep something beside the cases.
        self.sweeps = [links.sweep, freeze.sweep]
        # What else lies beside a case and goes with it.
        self.forgets: list[Callable[[Tx, str], None]] = []

    async def run(self) -> None:
        while True:
            self._woken.clear()
            began = self._clock.monotonic()
            await self.look()
            await rest(self._clock, self._woken, LOOK_EVERY_SECONDS, since=began)

    async def look(self) -> None:
        await self._tell_late()
        while await self._end_some():
            pass
        with self._db.write() as tx:
            for sweep in self.sweeps:
                sweep(tx)
        await tx

    async def _tell_late(self) -> None:
        late = await self._db.read(_late, self._clock.now())
        for case in late:
            with self._db.write() as tx:
                for told in self._cases.on_change:
                    told(tx, "report.sla_breach", case)
                self._cases.change(tx, case.case_id, None, lambda before: replace(before, late_told=True))
            await tx

    async def _end_some(self) -> bool:
        now = self._clock.now()
        over = await self._db.read(_over, now)
        for case in over:
            with self._db.write() as tx:
                tx.call(partial(_require_over, case_id=case.case_id, now=now))
                self._empty(tx, case.case_id, "retention")
            with suppress(_NotOver):
                await tx
        return len(over) == MAX_AT_ONCE

    def _empty(self, tx: Tx, case_id: str, reason_code: str) -> None:
        """Everything that says something about somebody goes."""
        now = self._clock.now()
        self._disclosures.forget(tx, case_id)
        self._freeze.release(tx, case_id)
        self._links.forget(tx, case_id)
        for forget in self.forgets:
            forget(tx, case_id)
        tx.run(
            "UPDATE decisions SET decider = '', ground = '', facts = '', told_peer = NULL WHERE case_id = $1", case_id
        )
        tx.run(
            "UPDATE decided_measures SET target = '', room_id = NULL, waits = NULL WHERE decision_id IN "
            "(SELECT decision_id FROM decisions WHERE case_id = $1)",
            case_id,
        )
        self._audit_log.record(
            tx,
            actor="relay",
            action="case.emptied",
            target=case_id,
            reason_code=reason_code,
            case_id=case_id,
            automated=True,
        )
        self._cases.leave_to_others(tx, case_id)
        self._cases.change(
            tx, case_id, None,
            lambda before: replace(
                before, emptied=True, state=rules.CLOSED, closed_ts=before.closed_ts or now, room_id=None, event_id=None,
                user_id=None, reporter=None, peer=None, seen=(), consent=False, assignee=None, lease_until=None,
            ),
        )  # fmt: skip

    async def withdraw(self, case: Case) -> Case:
        """The reporter asks that what she gave is removed. While nothing is decided, the case goes with it; what was reported by
        others as well is theirs. A decision stays, since whoever it is about may still object. Raises NotNow."""

        def require(query: Query) -> None:
            now = by_id(query, case.case_id)
            if now is None or now.emptied or now.state != case.state or now.duplicate_of != case.duplicate_of:
                raise rules.NotNow("This report has changed just now. Load the page again.")
            if now.category == "minor":
                raise rules.NotNow("What may show a minor is kept for a year, also where you ask for its removal.")
            if now.state in (rules.APPEALED, rules.RE_REVIEW):
                raise rules.NotNow("Somebody objects to the decision: what belongs to it stays until that is answered.")

        with self._db.write() as tx:
            tx.call(require)
            self._audit_log.record(
                tx,
                actor="reporter",
                action="case.withdrawn",
                target=case.case_id,
                reason_code="by_reporter",
                case_id=case.case_id,
            )
            if case.state in rules.UNDECIDED:
                self._empty(tx, case.case_id, "by_reporter")
            else:
                self._take_hers(tx, case)
        changed: Case = await tx
        return changed

    def _take_hers(self, tx: Tx, case: Case) -> None:
        """What she wrote and proved, and her name. Notes, objections and the decision are others'."""
        self._disclosures.forget(tx, case.case_id, GIVEN_BY_HER)
        self._freeze.release(tx, case.case_id)
        self._links.forget_of(tx, case.case_id, case.reporter)
        self._cases.change(tx, case.case_id, None, lambda now: replace(now, reporter=None, seen=(), consent=False))


class _NotOver(Exception):
    """Something was done with the case since it was looked at: it stays."""


def _require_over(query: Query, *, case_id: str, now: int) -> None:
    if query.value(f"SELECT 1 FROM cases WHERE case_id = $2 AND {_IS_OVER}", now, case_id) is None:
        raise _NotOver


def _late(query: Query, now: int) -> list[Case]:
    rows = query.all(
        f"SELECT {COLUMNS} FROM cases WHERE is_open = 1 AND duplicate_of IS NULL AND late_told = 0 AND due_ts <= $1 "
        "ORDER BY due_ts LIMIT $2",
        now,
        MAX_AT_ONCE,
    )
    return [case for row in rows if (case := case_of(row)) is not None]


# Not one that somebody objects to, nor one that was joined to a case which lasts longer: its proof may be the only one.
_IS_OVER = (
    "emptied = 0 AND keep_until <= $1 AND state NOT IN ('appealed', 're_review') AND NOT EXISTS (SELECT 1 FROM cases AS whole "
    "WHERE whole.case_id = cases.duplicate_of AND whole.emptied = 0 AND (whole.keep_until > $1 OR whole.state IN ('appealed', 're_review')))"
)


def _over(query: Query, now: int) -> list[Case]:
    rows = query.all(f"SELECT {COLUMNS} FROM cases WHERE {_IS_OVER} ORDER BY keep_until LIMIT $2", now, MAX_AT_ONCE)
    return [case for row in rows if (case := case_of(row)) is not None]
