"""Cases: one report is one case. Their states, who looks at them, what is due, which are the same, and the queue.

A change names the version that it was decided by (`version`, the API's ETag) and fails where somebody was faster. Whoever
a case is about never sees it. Reports of the same thing are joined to the oldest open case, and decided with it.
Pure rules: case_rules.py. What is kept and for how long: keeping.py. Not here: decisions, appeals, notices.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from relay.clock import Clock
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, NotFound
from relay.moderation import case_rules as rules
from relay.moderation.audit_log import AuditLog, Entry
from relay.moderation.case_rows import COLUMNS, SCHEMA, Case, by_id, case_of
from relay.moderation.persons import Persons
from relay.part import Part

MAX_PAGE = 200

# In the write of each change, with the case as it is then: "report.created" and its kin. Webhooks, notices.
OnChange = Callable[[Tx, str, Case], None]


class Cases(Part):
    schema = SCHEMA

    def __init__(self, db: Database, clock: Clock, audit_log: AuditLog, persons: Persons) -> None:
        self._db = db
        self._clock = clock
        self._audit_log = audit_log
        self._persons = persons
        self.on_change: list[OnChange] = []

    # --- coming in

    def new(self, *, kind: rules.Kind, category: str, **known: Any) -> Case:
        """A case that is not written yet."""
        now = self._clock.now()
        due_ts = rules.due(category, now)
        return Case(
            case_id=known.pop("case_id", None) or secrets.token_urlsafe(16), kind=kind, category=category, created_ts=now,
            due_ts=due_ts, keep_until=rules.kept_until(category, now, None), **known,
        )  # fmt: skip

    def open(self, tx: Tx, case: Case, *, weight: int = 0) -> None:
        """In the write that keeps the report. Its number, and whether it is the same as another, are known after it only."""
        tx.call(lambda query: _insert(query, case, weight))
        self._audit_log.record(
            tx, actor="reporter" if case.reporter else "stranger" if case.kind == "notice" else "relay",
            action="report.created", target=case.case_id, reason_code=case.category, case_id=case.case_id,
        )  # fmt: skip
        for told in self.on_change:
            told(tx, "report.created", case)

    def put(self, tx: Tx, case: Case) -> None:
        """One that is no report: what another server has decided about a person of ours."""
        tx.call(lambda query: _insert(query, case, 0))

    async def reported_since(self, reporter: str, since_ts: int) -> int:
        return int(
            await self._db.read(
                lambda query: query.value(
                    "SELECT count(*) FROM cases WHERE reporter = $1 AND created_ts > $2", reporter, since_ts
                )
            )
        )

    # --- reading

    async def get(self, case_id: str) -> Case:
        """Raises NotFound."""
        case = await self._db.read(by_id, case_id)
        if case is None:
            raise NotFound("There is no such case. It may have been removed when its time was over.")
        return case

    async def for_moderator(self, case_id: str, actor: str) -> Case:
        """Raises NotFound also where it is about the one who asks: she must not learn that it exists."""
        case = await self.get(case_id)
        if case.user_id is not None and case.user_id == actor:
            raise NotFound("There is no such case. It may have been removed when its time was over.")
        return case

    async def by_number(self, number: int) -> Case | None:
        return await self._db.read(
            lambda query: case_of(query.one(f"SELECT {COLUMNS} FROM cases WHERE number = $1", number))
        )

    async def queue(
        self,
        *,
        state: str | None = "open",
        category: str | None = None,
        actor: str | None = None,
        start: int = 0,
        limit: int = 50,
    ) -> tuple[list[Case], int]:
        """(a page by due time, how many there are in all). `state` is a state, "open", or None for all; cases that are the
        same as another are not listed, and none that is about `actor`."""

        def find(query: Query) -> tuple[list[Case], int]:
            chosen = "is_open = 1 AND duplicate_of IS NULL" if state == "open" else "duplicate_of IS NULL"
            chosen += " AND kind <> 'elsewhere'"
            order = "sort_ts, number" if state == "open" else "number DESC"
            where = (
                f"FROM cases WHERE {chosen} AND ($1 = '' OR state = $1) AND ($2 = '' OR category = $2) "
                "AND ($3 = '' OR user_id IS NULL OR user_id <> $3)"
            )
            asked = ("" if state in (None, "open") else state, category or "", actor or "")
            rows = query.all(
                f"SELECT {COLUMNS} {where} ORDER BY {order} LIMIT $4 OFFSET $5",
                *asked,
                max(1, min(limit, MAX_PAGE)),
                max(0, start),
            )
            total = int(query.value(f"SELECT count(*) {where}", *asked))
            return [case for row in rows if (case := case_of(row)) is not None], total

        return await self._db.read(find)

    async def same_as(self, case_id: str) -> list[Case]:
        """The cases that were joined to this one."""
        return await self._db.read(
            lambda query: [
                case
                for row in query.all(f"SELECT {COLUMNS} FROM cases WHERE duplicate_of = $1 ORDER BY number", case_id)
                if (case := case_of(row)) is not None
            ]
        )

    async def history(self, case_id: str) -> list[Entry]:
        return await self._audit_log.of_case(case_id)

    async def listed_for_tools(self, after: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """What tools outside may see: no reporter, nothing of `minor` and `ncii`, and nothing about a moderator, who reads what the
        tools write. Those with a number above `after`, oldest first; and the latest number there is. Counted places would shift
        when a case goes from the list, and whoever polls would miss the next one."""
        moderators = sorted(await self._persons.moderators())
        marks = ", ".join(f"${number}" for number in range(1, len(moderators) + 1))
        apart = f" AND user_id NOT IN ({marks})" if moderators else ""

        def find(query: Query) -> tuple[list[dict[str, Any]], int]:
            where = (
                "FROM cases WHERE category NOT IN ('minor', 'ncii') AND kind = 'event' AND event_id IS NOT NULL" + apart
            )
            rows = query.all(
                f"SELECT number, room_id, event_id, user_id, category, created_ts {where} "
                f"AND number > ${len(moderators) + 1} ORDER BY number LIMIT ${len(moderators) + 2}",
                *moderators,
                after,
                max(1, min(limit, MAX_PAGE)),
            )
            keys = ("number", "room_id", "event_id", "sender", "category", "created_ts")
            return [dict(zip(keys, row, strict=True)) for row in rows], int(
                query.value(f"SELECT max(number) {where}", *moderators) or 0
            )

        return await self._db.read(find)

    async def persons_of(self) -> dict[str, set[str]]:
        """case > whom it is about: no envelope of it is ever wrapped for her."""
        rows = await self._db.read(
            lambda query: query.all("SELECT case_id, user_id FROM cases WHERE user_id IS NOT NULL")
        )
        return {case_id: {user_id} for case_id, user_id in rows}

    async def check(self) -> list[dict[str, str]]:
        """Findings for `relay check`."""
        now = self._clock.now()
        late = await self._db.read(
            lambda query: query.value(
                "SELECT count(*) FROM cases WHERE is_open = 1 AND duplicate_of IS NULL AND due_ts <= $1", now
            )
        )
        if not late:
            return []
        what = f"{late} reports are late: they should have been decided by now."
        return [
            {
                "severity": "warning",
                "what": what,
                "todo": "Look at them: relay report list, or the desk at /_relay/desk",
            }
        ]

    # --- changing

    async def take(self, case_id: str, actor: str, version: int | None = None) -> Case:
        """The case is hers for half an hour, and longer with each thing she does in it."""
        await self.for_moderator(case_id, actor)
        now = self._clock.now()

        def mine(case: Case) -> Case:
            self._require_free(case, actor, now)
            becomes = rules.RE_REVIEW if case.state == rules.APPEALED else rules.REVIEW
            if case.state not in (rules.REVIEW, rules.RE_REVIEW):
                rules.require_step(case.state, becomes)
            state = case.state if case.state in (rules.REVIEW, rules.RE_REVIEW) else becomes
            return replace(case, assignee=actor, lease_until=now + rules.LEASE, state=state)

        return await self._change(case_id, actor, version, mine, "case.taken", "lease")

    async def release(self, case_id: str, actor: str, version: int | None = None) -> Case:
        await self.for_moderator(case_id, actor)

        def free(case: Case) -> Case:
            self._require_free(case, actor, self._clock.now())
            back = {rules.REVIEW: rules.TRIAGED, rules.RE_REVIEW: rules.APPEALED}.get(case.state, case.state)
            return replace(case, assignee=None, lease_until=None, state=back)

        return await self._change(case_id, actor, version, free, "case.released", "released")

    async def triage(
        self, case_id: str, actor: str, version: int | None = None, *, category: str | None = None, state: str = rules.TRIAGED
    ) -> Case:  # fmt: skip
        """Sorted: another category, or a state such as awaiting_disclosure or escalated."""
        await self.for_moderator(case_id, actor)
        if state not in (rules.TRIAGED, rules.AWAITING, rules.ESCALATED):
            raise rules.NotNow("A case is sorted to triaged, awaiting_disclosure or escalated.")

        def sorted_(case: Case) -> Case:
            self._require_free(case, actor, self._clock.now())
            if case.state != state:
                rules.require_step(case.state, state)
            new = rules.require_category(category) if category is not None else case.category
            kept = rules.kept_until(new, case.created_ts, case.decided_ts)
            if case.category == "minor":  # whoever sorts it elsewhere must not make it go sooner
                kept = max(kept, case.keep_until)
            return replace(
                case,
                state=state,
                category=new,
                due_ts=min(case.due_ts, rules.due(new, case.created_ts)),
                keep_until=kept,
            )

        return await self._change(case_id, actor, version, sorted_, "case.sorted", category or state)

    async def may_show_minor(self, case_id: str, actor: str) -> Case:
        """At once, whoever has the case and whatever has changed in it meanwhile."""
        await self.for_moderator(case_id, actor)

        def marked(case: Case) -> Case:
            return replace(
                case, category="minor", state=rules.ESCALATED if case.state in rules.UNDECIDED else case.state,
                due_ts=min(case.due_ts, rules.due("minor", case.created_ts)),
                keep_until=max(case.keep_until, rules.kept_until("minor", case.created_ts, case.decided_ts)),
            )  # fmt: skip

        return await self._change(case_id, actor, None, marked, "case.minor", "minor")

    async def close(self, case_id: str, actor: str, version: int | None = None) -> Case:
        """Without a decision only where there is nothing to decide; the evidence stays as long as anybody may object."""
        await self.for_moderator(case_id, actor)
        now = self._clock.now()

        def shut(case: Case) -> Case:
            self._require_free(case, actor, now)
            if case.state != rules.DECIDED:
                raise rules.NotNow("Decide first: also that no measure is taken is a decision, with its reason.")
            return replace(case, state=rules.CLOSED, closed_ts=now, assignee=None, lease_until=None)

        return await self._change(case_id, actor, version, shut, "case.closed", "closed")

    async def merge(self, case_id: str, into: str, actor: str, version: int | None = None) -> Case:
        """This report is about the same as another, and is decided with it."""
        await self.for_moderator(case_id, actor)
        other = await self.for_moderator(into, actor)
        if other.case_id == case_id or other.duplicate_of is not None or other.state not in rules.UNDECIDED:
            raise rules.NotNow("A case can be joined to one that is undecided and stands for itself.")

        def joined(case: Case) -> Case:
            self._require_free(case, actor, self._clock.now())
            if None not in (case.user_id, other.user_id) and case.user_id != other.user_id:
                # Who is decided on in one would read of the other, and nobody would hear of what was done about her own.
                raise rules.NotNow("These two are about different people. Decide each by itself.")
            if case.state not in rules.UNDECIDED:
                raise rules.NotNow("This case is decided already.")
            return replace(case, duplicate_of=into, assignee=None, lease_until=None)

        return await self._change(case_id, actor, version, joined, "case.joined", "duplicate", detail={"into": into})

    def _require_free(self, case: Case, actor: str, now: int) -> None:
        """Raises NotNow where another moderator has it."""
        if case.assignee not in (None, actor) and (case.lease_until or 0) > now:
            raise rules.NotNow(
                "Another moderator has taken this case. It is free again half an hour after her last step."
            )

    def leave_to_others(self, tx: Tx, case_id: str) -> None:
        """In the write that empties a case: what was joined to it and is undecided stands in the queue again, as the oldest of it.
        Else whoever reports first could take everybody's reports away with her own."""

        def promote(query: Query) -> None:
            rows = query.all(
                f"SELECT {COLUMNS} FROM cases WHERE duplicate_of = $1 AND emptied = 0 AND state IN "
                "('new', 'triaged', 'awaiting_disclosure', 'in_review', 'escalated') ORDER BY number",
                case_id,
            )
            joined = [case for row in rows if (case := case_of(row)) is not None]
            for case in joined:
                into = joined[0].case_id if case is not joined[0] else None
                _update(query, case, replace(case, duplicate_of=into, version=case.version + 1))

        tx.call(promote)

    async def _change(
        self,
        case_id: str,
        actor: str,
        version: int | None,
        change: Callable[[Case], Case],
        action: str,
        reason_code: str,
        *,
        detail: Mapping[str, Any] | None = None,
    ) -> Case:
        with self._db.write() as tx:
            self._audit_log.record(
                tx, actor=actor, action=action, target=case_id, reason_code=reason_code, case_id=case_id,
                detail=dict(detail) if detail else None,
            )  # fmt: skip
            self.change(tx, case_id, version, change)
        changed: Case = await tx
        return changed

    def change(self, tx: Tx, case_id: str, version: int | None, change: Callable[[Case], Case]) -> None:
        """In the caller's write, whose answer it becomes: the case as it is after `change`, which may raise. Fails with Stale."""
        now = self._clock.now()

        def apply(query: Query) -> Case:
            before = by_id(query, case_id)
            if before is None:
                raise NotFound("There is no such case.")
            if version is not None and before.version != version:
                raise rules.Stale
            after = change(before)
            if after.assignee is not None:
                after = replace(after, lease_until=now + rules.LEASE)
            if before.touched_ts is None and after.state not in (rules.NEW, rules.AWAITING):
                after = replace(after, touched_ts=now)
            return _update(query, before, replace(after, version=before.version + 1))

        tx.call(apply)

    def require_decider(self, case: Case, actor: str, moderators: Collection[str]) -> None:
        """Neither the named person nor, where somebody else exists, the reporter decides. Raises Forbidden."""
        if case.user_id == actor:
            raise Forbidden("This case is about you. Another moderator decides it.")
        others = set(moderators) - {actor, case.user_id}
        if case.reporter == actor and others:
            raise Forbidden("You have reported this yourself. Let another moderator decide it.")

    async def moderators_for(self, user_id: str | None) -> list[str]:
        """Who may see a case about this person."""
        return sorted(set(await self._persons.at_work()) - {user_id})


def _insert(query: Query, case: Case, weight: int) -> None:
    number = int(query.value("SELECT coalesce(max(number), 0) FROM cases")) + 1
    primary = None
    if case.kind in ("event", "room", "user") and case.reporter != case.user_id:
        primary = query.value(
            "SELECT case_id FROM cases WHERE kind = $1 AND is_open = 1 AND duplicate_of IS NULL AND state IN "
            "('new', 'triaged', 'awaiting_disclosure', 'in_review', 'escalated') AND category = $5 AND coalesce(room_id, '') = $2 "
            "AND coalesce(event_id, '') = $3 AND coalesce(user_id, '') = $4 AND (reporter IS NULL OR user_id IS NULL OR reporter <> user_id) "
            "ORDER BY number LIMIT 1",
            case.kind,
            case.room_id or "",
            case.event_id or "",
            case.user_id or "",
            case.category,
        )
    placed = replace(case, number=number, duplicate_of=primary, sort_ts=rules.place_in_queue(case.due_ts, weight))
    marks = ", ".join(f"${n}" for n in range(1, len(COLUMNS.split(",")) + 1))
    query.run(f"INSERT INTO cases ({COLUMNS}) VALUES ({marks})", *placed.row())


def _update(query: Query, before: Case, after: Case) -> Case:
    moved = after.sort_ts + (after.due_ts - before.due_ts)
    after = replace(after, sort_ts=moved)
    names = COLUMNS.split(", ")
    sets = ", ".join(f"{name} = ${n}" for n, name in enumerate(names, 1) if name != "case_id")
    query.run(f"UPDATE cases SET {sets} WHERE case_id = $1", *after.row())
    return after
