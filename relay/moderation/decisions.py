"""Deciding a case: the statement of reasons, the measures, and who is told.

The decision is a row in the write that carries out its first measure, with the case's new state and the notices: so there is
no measure without its reasons. Reports joined to the case are decided with it. What comes of each further measure is
written behind the decision. Whoever is decided on reads it over her link, or at /_relay/appeal.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from relay.accounts.users import Users
from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import ApiError, NotAllowed, NotFound
from relay.moderation import case_rules as rules
from relay.moderation import notice_words as words
from relay.moderation.actions import Actions
from relay.moderation.acts import FORBIDDEN, Act, Reasons
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.links import Links
from relay.moderation.notices import Notices
from relay.moderation.persons import Persons
from relay.moderation.statements import Chosen, Statement, require_complete
from relay.part import Part
from relay.tables import Schema, Table

_KEPT = "until the retention of the case is over, then emptied"
_COUNTED = "for good: the transparency figures count it"
DONE, WAITS, FAILED, UNDONE = "done", "waits", "failed", "undone"
Beside = Callable[[Tx], None]


@dataclass(frozen=True, slots=True)
class Taken:
    """A measure of a decision, and what came of it."""

    place: int
    chosen: Chosen
    outcome: str
    waits: str | None = None
    until_ts: int | None = None

    def as_json(self) -> dict[str, Any]:
        told = {**self.chosen.as_json(), "outcome": self.outcome}
        if self.waits is not None:
            told["waits"] = self.waits
        if self.until_ts is not None:
            told["until"] = self.until_ts
        return told


@dataclass(frozen=True, slots=True)
class Decision:
    decision_id: str
    case_id: str
    decided_ts: int
    decider: str
    automated: bool
    reason_code: str
    ground: str
    facts: str = field(repr=False)
    # The appeal that it answers, and what it answers: upheld or reversed.
    appeal_id: str | None = None
    verdict: str | None = None
    # What became of telling the other server: told, refused, or None where there is none.
    told_peer: str | None = None
    # Why the person decided on is not told, where she is not: a word of acts.UNTOLD.
    untold: str = ""
    measures: tuple[Taken, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.decision_id,
            "report_id": self.case_id,
            "decided": self.decided_ts,
            "decider": self.decider,
            **self.reasons(),
            "appeal_id": self.appeal_id,
            "verdict": self.verdict,
            "told_other_server": self.told_peer,
        }

    def reasons(self) -> dict[str, Any]:
        """The statement of reasons, without the name of who decided."""
        return {
            "measures": [one.as_json() for one in self.measures],
            "reason_code": self.reason_code,
            "ground": self.ground,
            "facts": self.facts,
            "automated": self.automated,
            "redress": f"You can object within {rules.APPEAL_WINDOW // DAY} days; somebody else looks at it again, where "
            "there is somebody else. Courts and out-of-court bodies stay open to you.",
        }


class Decisions(Part):
    schema = Schema(
        "decisions",
        tables=(
            Table(
                "decisions",
                "a decision with its statement of reasons",
                {
                    "decision_id": ("its name", _COUNTED),
                    "case_id": ("which case", _COUNTED),
                    "decided_ts": ("when", _COUNTED),
                    "decider": ("the moderator or integration", _KEPT),
                    "automated": ("whether no person decided", _COUNTED),
                    "reason_code": ("why, as a word", _COUNTED),
                    "ground": ("the clause of the terms, or the law", _KEPT),
                    "facts": ("the moderator's own words for whoever is decided on", _KEPT),
                    "appeal_id": ("the appeal that it answers", _COUNTED),
                    "verdict": ("of an appeal: upheld or reversed", _COUNTED),
                    "untold": ("why the person decided on was not told, as a word", _COUNTED),
                    "told_peer": ("what became of telling another server: pending, told, refused, not reached", _KEPT),
                },
            ),
            Table(
                "decided_measures",
                "a measure of a decision",
                {
                    "decision_id": ("which decision", _COUNTED),
                    "place": ("its order", _COUNTED),
                    "measure": ("what", _COUNTED),
                    "target": ("against whom or what", _KEPT),
                    "room_id": ("in which room", _KEPT),
                    "lasts_ms": ("for how long", _COUNTED),
                    "erase": ("whether a closed account's messages go too", _COUNTED),
                    "outcome": ("done, waits, failed or undone", _COUNTED),
                    "waits": ("what waits for a second person", _KEPT),
                    "until_ts": ("when it ends, or is carried out", _COUNTED),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE decisions (decision_id TEXT PRIMARY KEY, case_id TEXT NOT NULL, decided_ts BIGINT NOT NULL, decider TEXT,
                automated SMALLINT NOT NULL, reason_code TEXT NOT NULL, ground TEXT NOT NULL, facts TEXT NOT NULL, appeal_id TEXT,
                verdict TEXT, told_peer TEXT);
            CREATE INDEX decisions_of_case ON decisions (case_id, decided_ts);
            CREATE INDEX decisions_by_time ON decisions (decided_ts);
            CREATE TABLE decided_measures (decision_id TEXT NOT NULL, place SMALLINT NOT NULL, measure TEXT NOT NULL, target TEXT,
                room_id TEXT, lasts_ms BIGINT, erase SMALLINT NOT NULL, outcome TEXT NOT NULL, waits TEXT, until_ts BIGINT,
                PRIMARY KEY (decision_id, place))
            """,
            "ALTER TABLE decisions ADD COLUMN untold TEXT NOT NULL DEFAULT ''",
        ),
    )

    def __init__(
        self,
        db: Database,
        clock: Clock,
        users: Users,
        cases: Cases,
        actions: Actions,
        persons: Persons,
        links: Links,
        notices: Notices,
        audit_log: AuditLog,
    ) -> None:
        self._db = db
        self._clock = clock
        self._users = users
        self._cases = cases
        self._actions = actions
        self._persons = persons
        self._links = links
        self._notices = notices
        self._audit_log = audit_log
        # In the write of a decision: whoever keeps something for the person decided on (the password of an account that closes).
        self.on_decided: list[Callable[[Tx, Case, Decision], None]] = []

    # --- deciding

    async def decide(
        self,
        case_id: str,
        actor: str,
        version: int | None,
        statement: Statement,
        *,
        automated: bool = False,
        beside: Beside | None = None,
    ) -> Decision:
        """`beside` adds to the write (a webhook's ID is used up in it). Raises ApiError; then nothing was done."""
        case = await self._cases.for_moderator(case_id, actor)
        if case.duplicate_of is not None:
            raise rules.NotNow("This report is decided with the case that it is joined to. Decide that one.")
        if case.state not in rules.UNDECIDED:
            raise rules.NotNow("This case is decided already. Whoever objects can have it looked at again.")
        self._cases.require_decider(case, actor, await self._persons.at_work())
        return await self.record(case, actor, version, statement, automated=automated, beside=beside)

    async def record(
        self,
        case: Case,
        actor: str,
        version: int | None,
        statement: Statement,
        *,
        automated: bool = False,
        beside: Beside | None = None,
        appeal_id: str | None = None,
        verdict: str | None = None,
    ) -> Decision:
        automated = automated or actor.startswith(("integration:", "rule:"))
        require_complete(statement, actor, case.case_id, automated=automated)
        now = self._clock.now()
        decision = Decision(
            secrets.token_urlsafe(12), case.case_id, now, actor, automated, statement.reason_code, statement.ground,
            statement.facts, appeal_id, verdict, untold=statement.untold,
            measures=tuple(Taken(place, chosen, FAILED) for place, chosen in enumerate(statement.measures)),
        )  # fmt: skip
        joined = await self._cases.same_as(case.case_id)

        def with_it(tx: Tx) -> None:
            self._write(tx, case, joined, version, decision)
            if beside is not None:
                beside(tx)

        if statement.measures:
            await self._carry_out(case, decision, with_it)
        else:
            with self._db.write() as tx:
                self._audit(tx, case, decision)
                with_it(tx)
            await tx
        return await self.get(decision.decision_id)

    async def _carry_out(self, case: Case, decision: Decision, with_it: Beside) -> None:
        for one in decision.measures:
            first = one.place == 0

            def beside(tx: Tx, *, first: bool = first) -> None:
                if first:
                    self._audit(tx, case, decision)
                    with_it(tx)

            act = one.chosen.act(decision.decider, decision.reason_code, case.case_id, automated=decision.automated)
            try:
                outcome = await self._actions.take(act, beside=beside)
            except (ApiError, NotAllowed):
                if first:
                    raise  # nothing was written: the moderator chooses again
                continue
            with self._db.write() as tx:
                tx.run(
                    "UPDATE decided_measures SET outcome = $3, waits = $4, until_ts = $5 WHERE decision_id = $1 AND place = $2",
                    decision.decision_id,
                    one.place,
                    DONE if outcome.waits is None else WAITS,
                    outcome.waits,
                    outcome.until_ts,
                )
            await tx

    def _audit(self, tx: Tx, case: Case, decision: Decision) -> None:
        self._audit_log.record(
            tx, actor=decision.decider, action="decided" if decision.verdict is None else f"appeal.{decision.verdict}",
            target=case.case_id, reason_code=decision.reason_code, case_id=case.case_id, automated=decision.automated,
            detail={"measures": [one.chosen.as_json() for one in decision.measures], "ground": decision.ground},
        )  # fmt: skip

    def _write(self, tx: Tx, case: Case, joined: Sequence[Case], version: int | None, decision: Decision) -> None:
        now = decision.decided_ts

        def decided(before: Case) -> Case:
            rules.require_step(before.state, rules.DECIDED)
            first = before.decided_ts if before.decided_ts is not None else now
            return replace(
                before, state=rules.DECIDED, decided_ts=first, assignee=None, lease_until=None,
                keep_until=max(before.keep_until if before.decided_ts else 0, rules.kept_until(before.category, before.created_ts, now)),
            )  # fmt: skip

        for other in joined:
            if other.state in rules.UNDECIDED:
                self._cases.change(tx, other.case_id, None, decided)
        self._cases.change(tx, case.case_id, version, decided)
        self._insert(tx, decision)
        for kept in self.on_decided:
            kept(tx, case, decision)
        for told in self._cases.on_change:
            told(tx, "report.decided", replace(case, state=rules.DECIDED))
        self._tell(tx, [case, *joined], decision)

    def _insert(self, tx: Tx, decision: Decision) -> None:
        tx.run(
            "INSERT INTO decisions (decision_id, case_id, decided_ts, decider, automated, reason_code, ground, facts, appeal_id, verdict, untold) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            decision.decision_id, decision.case_id, decision.decided_ts, decision.decider, int(decision.automated), decision.reason_code,
            decision.ground, decision.facts, decision.appeal_id, decision.verdict, decision.untold,
        )  # fmt: skip
        tx.many(
            "INSERT INTO decided_measures (decision_id, place, measure, target, room_id, lasts_ms, erase, outcome) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            [
                (decision.decision_id, one.place, one.chosen.measure, one.chosen.target, one.chosen.room_id,
                 one.chosen.lasts_ms, int(one.chosen.erase), one.outcome)
                for one in decision.measures
            ],
        )  # fmt: skip

    def _tell(self, tx: Tx, cases: Sequence[Case], decision: Decision) -> None:
        """Both sides hear of it, each with a link of her own."""
        if decision.verdict is not None:
            sentence = words.APPEAL_UPHELD if decision.verdict == "upheld" else words.APPEAL_REVERSED
            to_reporter = to_subject = sentence
        else:
            to_reporter = words.DECIDED_MEASURE if decision.measures else words.DECIDED_NONE
            only_warned = {one.chosen.measure for one in decision.measures} == {"warn"}
            to_subject = words.WARNED if only_warned else words.ABOUT_YOU
        for case in cases:
            if case.reporter is not None and case.reporter != case.user_id:
                token = self._links.make(tx, case.case_id, "appeal", case.reporter)
                self._notices.tell(tx, case.reporter, to_reporter, case.case_id, link=("appeal", token))
        about = cases[0].user_id
        concerned = decision.measures or decision.verdict is not None
        if about is not None and concerned and self._users.is_local(about) and not decision.untold:
            token = self._links.make(tx, cases[0].case_id, "appeal", about)
            self._notices.tell(tx, about, to_subject, cases[0].case_id, link=("appeal", token))

    def carried_out(self, tx: Tx, act: Act) -> None:
        """`Actions.on_taken`: what waited for a second person, or for its time, waits no more."""
        tx.run(
            "UPDATE decided_measures SET outcome = $1 WHERE outcome = $2 AND measure = $3 AND target = $4 AND decision_id IN "
            "(SELECT decision_id FROM decisions WHERE case_id = $5)",
            DONE, WAITS, act.measure, act.target, act.case_id or "",
        )  # fmt: skip

    # --- taking back

    async def undo(self, decision: Decision, actor: str, reason_code: str) -> None:
        """What an appeal reverses: each measure is taken back, as far as it can be."""
        for one in decision.measures:
            try:
                if one.outcome == WAITS and one.waits is not None:
                    await self._actions.cancel(one.waits, actor)
                elif one.outcome == DONE:
                    await self._actions.take(one.chosen.act(actor, reason_code, decision.case_id, undo=True))
                else:
                    continue
            except (ApiError, NotAllowed):
                continue  # what was deleted, or has ended already
            with self._db.write() as tx:
                tx.run(
                    "UPDATE decided_measures SET outcome = $3 WHERE decision_id = $1 AND place = $2",
                    decision.decision_id,
                    one.place,
                    UNDONE,
                )
            await tx

    def put_foreign(self, tx: Tx, case_id: str, server: str, now: int, told: Mapping[str, Any]) -> None:
        """What another server decided about a person of ours: words of fixed lists; its reasons are asked for when she reads."""
        decision_id = secrets.token_urlsafe(12)
        tx.run(
            "INSERT INTO decisions (decision_id, case_id, decided_ts, decider, automated, reason_code, ground, facts, verdict) "
            "VALUES ($1, $2, $3, $4, $5, $6, '', '', $7)",
            decision_id, case_id, now, server, int(told["automated"]), told["reason_code"], told["verdict"],
        )  # fmt: skip
        tx.many(
            "INSERT INTO decided_measures (decision_id, place, measure, target, erase, outcome) VALUES ($1, $2, $3, '', 0, $4)",
            [(decision_id, place, measure, DONE) for place, measure in enumerate(told["measures"])],
        )

    def put_direct(self, tx: Tx, case: Case, act: Act, chosen: Chosen, reasons: Reasons) -> None:
        """A measure that was taken without a report: a decision, so that whoever is concerned can object to it."""
        decision = Decision(
            secrets.token_urlsafe(12), case.case_id, case.created_ts, act.actor, act.is_machine, act.reason_code, reasons.ground,
            reasons.facts, untold=reasons.untold, measures=(Taken(0, chosen, DONE),),
        )  # fmt: skip
        self._insert(tx, decision)
        for kept in self.on_decided:
            kept(tx, case, decision)

    def set_reasons(self, tx: Tx, decision_id: str, reasons: Reasons) -> None:
        """Of a measure that was taken without: once."""
        tx.run(
            "UPDATE decisions SET ground = $2, facts = $3, untold = $4 WHERE decision_id = $1",
            decision_id, reasons.ground, reasons.facts, reasons.untold,
        )  # fmt: skip

    def set_told_peer(self, tx: Tx, decision_id: str, outcome: str) -> None:
        tx.run("UPDATE decisions SET told_peer = $2 WHERE decision_id = $1", decision_id, outcome)

    # --- reading

    async def get(self, decision_id: str) -> Decision:
        found = await self._db.read(_find, "decision_id", decision_id)
        if not found:
            raise NotFound("There is no such decision.")
        return found[0]

    async def of_case(self, case_id: str) -> list[Decision]:
        """Oldest first; those after the first answer appeals. Of a joined report: those of the case that it is joined to."""
        case = await self._cases.get(case_id)
        return await self._db.read(_find, "case_id", case.duplicate_of or case_id)

    async def about(self, user_id: str) -> list[tuple[Case, Decision]]:
        """Everything that was decided about this person here, newest first: for /_relay/appeal."""

        def find(query: Query) -> list[str]:
            rows = query.all(
                "SELECT c.case_id FROM cases c WHERE c.user_id = $1 AND c.decided_ts IS NOT NULL AND c.duplicate_of IS NULL "
                "ORDER BY c.decided_ts DESC LIMIT 50",
                user_id,
            )
            return [case_id for (case_id,) in rows]

        found = []
        for case_id in await self._db.read(find):
            case = await self._cases.get(case_id)
            found += [(case, one) for one in reversed(await self.of_case(case_id))]
        shown = [(case, one) for case, one in found if one.measures or one.verdict is not None]
        return [(case, one) for case, one in shown if one.untold != FORBIDDEN]


def _find(query: Query, by: str, value: str) -> list[Decision]:
    where = {"decision_id": "decision_id = $1", "case_id": "case_id = $1"}[by]
    found = []
    for row in query.all(
        "SELECT decision_id, case_id, decided_ts, decider, automated, reason_code, ground, facts, appeal_id, verdict, told_peer, untold "
        f"FROM decisions WHERE {where} ORDER BY decided_ts, decision_id",
        value,
    ):
        (
            decision_id,
            case_id,
            decided_ts,
            decider,
            automated,
            reason_code,
            ground,
            facts,
            appeal_id,
            verdict,
            told_peer,
            untold,
        ) = row
        taken = tuple(
            Taken(place, Chosen(measure, target or "", room_id, lasts_ms, bool(erase)), outcome, waits, until_ts)
            for place, measure, target, room_id, lasts_ms, erase, outcome, waits, until_ts in query.all(
                # What waited and was cancelled waits no more.
                "SELECT place, measure, target, room_id, lasts_ms, erase, CASE WHEN outcome = 'waits' AND NOT EXISTS "
                "(SELECT 1 FROM waiting_acts w WHERE w.act_id = waits) THEN 'undone' ELSE outcome END, waits, until_ts FROM decided_measures "
                "WHERE decision_id = $1 ORDER BY place",
                decision_id,
            )
        )
        found.append(
            Decision(
                decision_id,
                case_id,
                decided_ts,
                decider or "",
                bool(automated),
                reason_code,
                ground,
                facts,
                appeal_id,
                verdict,
                told_peer,
                untold,
                taken,
            )
        )
    return found
