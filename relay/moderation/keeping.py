"""What is kept of a case and for how long, and what is late: the loop that ends both.

When a case's time is over, its envelopes lose their keys, what was frozen is let go, the links end, and the row keeps only
what the figures count. The reporter may ask for it earlier; what may show a minor stays its year all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from relay.clock import Clock, rest
from relay.db import Database, Query, Tx
from relay.moderation import case_rules as rules
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import COLUMNS, Case, case_of
from relay.moderation.cases import Cases
from relay.moderation.disclosure import Disclosures
from relay.moderation.freeze import Freeze
from relay.moderation.links import Links
from relay.part import Part

LOOK_EVERY_SECONDS = 60.0
MAX_AT_ONCE = 100


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
            await self.look()
            await rest(self._clock, self._woken, LOOK_EVERY_SECONDS)

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
        over = await self._db.read(_over, self._clock.now())
        for case in over:
            with self._db.write() as tx:
                self._empty(tx, case)
            await tx
        return len(over) == MAX_AT_ONCE

    def _empty(self, tx: Tx, case: Case) -> None:
        """Everything that says something about somebody goes."""
        case_id, now = case.case_id, self._clock.now()
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
            reason_code="retention",
            case_id=case_id,
            automated=True,
        )
        self._cases.change(
            tx, case_id, None,
            lambda before: replace(
                before, emptied=True, state=rules.CLOSED, closed_ts=before.closed_ts or now, room_id=None, event_id=None,
                user_id=None, reporter=None, peer=None, seen=(), consent=False, assignee=None, lease_until=None,
            ),
        )  # fmt: skip

    async def withdraw(self, case: Case) -> Case:
        """The reporter asks that what she gave is removed. Raises NotNow."""
        if case.category == "minor":
            raise rules.NotNow("What may show a minor is kept for a year, also where you ask for its removal.")
        if case.state in (rules.APPEALED, rules.RE_REVIEW):
            raise rules.NotNow("Somebody objects to the decision: what belongs to it stays until that is answered.")
        now = self._clock.now()
        with self._db.write() as tx:
            self._audit_log.record(
                tx,
                actor="reporter",
                action="case.withdrawn",
                target=case.case_id,
                reason_code="by_reporter",
                case_id=case.case_id,
            )
            self._cases.change(tx, case.case_id, None, lambda before: replace(before, keep_until=now))
            tx.after(self._woken.set)
        changed: Case = await tx
        return changed


def _late(query: Query, now: int) -> list[Case]:
    rows = query.all(
        f"SELECT {COLUMNS} FROM cases WHERE is_open = 1 AND duplicate_of IS NULL AND late_told = 0 AND due_ts <= $1 "
        "ORDER BY due_ts LIMIT $2",
        now,
        MAX_AT_ONCE,
    )
    return [case for row in rows if (case := case_of(row)) is not None]


def _over(query: Query, now: int) -> list[Case]:
    """Not one that somebody objects to, nor one that a case depends on which lasts longer."""
    rows = query.all(
        f"SELECT {COLUMNS} FROM cases WHERE emptied = 0 AND keep_until <= $1 AND state NOT IN ('appealed', 're_review') "
        "ORDER BY keep_until LIMIT $2",
        now,
        MAX_AT_ONCE,
    )
    return [case for row in rows if (case := case_of(row)) is not None]
