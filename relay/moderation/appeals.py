"""Objecting to a decision: who may, until when, who looks at it again, and what comes of it.

Both sides may object once to each decision, for 183 days. What they write is sealed. Where there is another moderator than
the one who decided, she answers; where there is none, the same person may, and the log says so. A person whose account was
closed by a decision signs in with her old password for this alone: its hash is kept until her window is over.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakValueDictionary

from relay.accounts.passwords import Passwords
from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, InvalidParam, NotFound, TooLarge
from relay.moderation import case_rules as rules
from relay.moderation import notice_words as words
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decision, Decisions
from relay.moderation.envelopes import Envelopes
from relay.moderation.links import Link
from relay.moderation.notices import Notices
from relay.moderation.persons import Persons
from relay.moderation.statements import Statement, require_complete
from relay.part import Part
from relay.protocol.canonical import encode
from relay.tables import Schema, Table

MAX_WORDS = 10_000
MAX_ASKED = 5
OPEN, UPHELD, REVERSED = "open", "upheld", "reversed"
_COUNTED = "for good: the transparency figures count it"


@dataclass(frozen=True, slots=True)
class Appeal:
    appeal_id: str
    case_id: str
    decision_id: str
    side: rules.Side
    filed_ts: int
    due_ts: int
    state: str
    words_kept: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.appeal_id,
            "report_id": self.case_id,
            "decision_id": self.decision_id,
            "side": self.side,
            "filed": self.filed_ts,
            "due": self.due_ts,
            "state": self.state,
            "words": "sealed" if self.words_kept else "not kept",
        }


class Elsewhere(Protocol):
    """`peers.py`: the server that decided."""

    async def reasons(self, case: Case, user_id: str) -> dict[str, Any]: ...
    async def object(self, case: Case, user_id: str, text: str) -> None: ...


class Appeals(Part):
    schema = Schema(
        "appeals",
        tables=(
            Table(
                "appeals",
                "somebody's objection to a decision",
                {
                    "appeal_id": ("its name", _COUNTED),
                    "case_id": ("which case", _COUNTED),
                    "decision_id": ("against which decision", _COUNTED),
                    "side": ("reporter or subject; of joined reports, the case tells which", _COUNTED),
                    "filed_ts": ("when", _COUNTED),
                    "due_ts": ("by when it has to be answered", _COUNTED),
                    "state": ("open, upheld or reversed", _COUNTED),
                    "words_kept": ("whether there was a key to which the words could be sealed", _COUNTED),
                },
            ),
            Table(
                "appeal_passwords",
                "the old password of an account that a decision closed, to sign in for objecting and nothing else",
                {
                    "user_id": ("whose", "until her time to object is over"),
                    "password_hash": ("argon2id", "until her time to object is over"),
                    "until_ts": ("when that is", "until then"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE appeals (appeal_id TEXT PRIMARY KEY, case_id TEXT NOT NULL, decision_id TEXT NOT NULL, side TEXT NOT NULL,
                filed_ts BIGINT NOT NULL, due_ts BIGINT NOT NULL, state TEXT NOT NULL, words_kept SMALLINT NOT NULL,
                UNIQUE (decision_id, side, case_id));
            CREATE INDEX appeals_of_case ON appeals (case_id);
            CREATE INDEX appeals_open ON appeals (due_ts) WHERE state = 'open';
            CREATE TABLE appeal_passwords (user_id TEXT PRIMARY KEY, password_hash TEXT NOT NULL, until_ts BIGINT NOT NULL)
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        clock: Clock,
        users: Users,
        passwords: Passwords,
        cases: Cases,
        decisions: Decisions,
        envelopes: Envelopes,
        persons: Persons,
        notices: Notices,
        audit_log: AuditLog,
    ) -> None:
        self._db = db
        self._clock = clock
        self._users = users
        self._passwords = passwords
        self._cases = cases
        self._decisions = decisions
        self._envelopes = envelopes
        self._persons = persons
        self._notices = notices
        self._audit_log = audit_log
        # Where the decision was made elsewhere; the assembly sets it.
        self.peers: Elsewhere | None = None
        # Of one case one thing at a time: what is taken back by one answer must not stand in another, and none comes between.
        self._at_work: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # --- who may

    async def opened(self, link: Link, user_id: str | None) -> tuple[Case, list[Decision]]:
        """What stands behind a link to a decision, for whoever it is for. Raises Forbidden, NotFound."""
        link.require_of(user_id)
        if link.purpose == "report":
            raise Forbidden("This link is for adding to a report. The link to the decision stands in the later notice.")
        case = await self._cases.get(link.case_id)
        if case.emptied:
            raise NotFound("What belonged to this decision was removed when its time was over.")
        return case, await self._with_reasons(case, user_id, await self._decisions.of_case(case.case_id))

    async def _with_reasons(self, case: Case, user_id: str | None, decisions: list[Decision]) -> list[Decision]:
        """Those of another server are not kept here: it is asked for its reasons now."""
        if case.kind != "elsewhere" or self.peers is None or user_id is None:
            return decisions
        told = await self.peers.reasons(case, user_id)
        return [replace(one, ground=told.get("ground", ""), facts=told.get("facts", "")) for one in decisions]

    async def of_person(self, user_id: str) -> list[tuple[Case, Decision]]:
        """What was decided about her: for /_relay/appeal, where she needs no link. Of other servers' decisions the newest few
        come with their reasons, which are asked for now."""
        found = await self._decisions.about(user_id)
        elsewhere = [number for number, (case, _) in enumerate(found) if case.kind == "elsewhere"][:MAX_ASKED]
        told = await asyncio.gather(
            *(self._with_reasons(found[number][0], user_id, [found[number][1]]) for number in elsewhere)
        )
        for number, [decision] in zip(elsewhere, told, strict=True):
            found[number] = found[number][0], decision
        return found

    async def may_appeal(self, user_id: str, password: str) -> bool:
        """Whether this was the password of an account that a decision closed. In the same time whether or not."""
        stored = await self._db.read(
            lambda query: query.value(
                "SELECT password_hash FROM appeal_passwords WHERE user_id = $1 AND until_ts > $2",
                user_id,
                self._clock.now(),
            )
        )
        return await self._passwords.matches(stored, password)

    def side_of(self, case: Case, user_id: str | None) -> rules.Side:
        if user_id is not None and user_id == case.user_id:
            return "subject"
        if user_id == case.reporter:  # also the receipt of somebody without an account
            return "reporter"
        raise Forbidden("Only whoever reported or was decided on can object.")

    # --- filing

    async def file(self, case_id: str, user_id: str | None, text: str) -> Appeal:
        """The caller has made sure who asks. Raises ApiError."""
        asked = await self._cases.get(case_id)
        case = await self._cases.get(asked.duplicate_of or case_id)
        side = self.side_of(asked, user_id)
        if len(text) > MAX_WORDS:
            raise TooLarge(f"An objection has {MAX_WORDS} characters at most.")
        if not text.strip():
            raise InvalidParam("Say why you object: a sentence is enough.")
        if case.kind == "elsewhere" and self.peers is not None and user_id is not None:
            return await self._file_elsewhere(case, user_id, text)
        async with self._alone(case.case_id):
            return await self._file_here(asked, await self._cases.get(case.case_id), user_id, side, text)

    def _alone(self, case_id: str) -> asyncio.Lock:
        lock = self._at_work.get(case_id)
        if lock is None:
            lock = self._at_work[case_id] = asyncio.Lock()
        return lock

    async def _file_here(self, asked: Case, case: Case, user_id: str | None, side: rules.Side, text: str) -> Appeal:
        decisions = await self._decisions.of_case(case.case_id)
        if not decisions or case.state not in (rules.DECIDED, rules.CLOSED, rules.APPEALED, rules.RE_REVIEW):
            raise rules.NotNow("Nothing is decided yet, so there is nothing to object to.")
        decision = decisions[-1]
        now = self._clock.now()
        if now > decision.decided_ts + rules.APPEAL_WINDOW:
            raise rules.NotNow("The time for objecting to this decision is over. Courts stay open to you.")
        excluded = (case.user_id,) if case.user_id is not None else ()
        sealed = await self._envelopes.prepare(case.case_id, "appeal", encode({"side": side, "words": text}), excluded)
        appeal = Appeal(
            secrets.token_urlsafe(12),
            asked.case_id,
            decision.decision_id,
            side,
            now,
            now + rules.APPEAL_DUE,
            OPEN,
            sealed is not None,
        )

        def put(query: Query) -> None:
            added = query.run(
                "INSERT INTO appeals (appeal_id, case_id, decision_id, side, filed_ts, due_ts, state, words_kept) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
                appeal.appeal_id, appeal.case_id, appeal.decision_id, side, now, appeal.due_ts, OPEN, int(appeal.words_kept),
            )  # fmt: skip
            if not added:
                raise rules.NotNow("You have objected to this decision already. You will hear what comes of it.")

        def appealed(before: Case) -> Case:
            if before.state in (rules.APPEALED, rules.RE_REVIEW):
                return before  # the other side was faster: both are answered together
            rules.require_step(before.state, rules.APPEALED)
            return replace(before, state=rules.APPEALED, due_ts=appeal.due_ts, closed_ts=None, late_told=False)

        with self._db.write() as tx:
            tx.call(put)
            if sealed is not None:
                self._envelopes.store(tx, sealed, actor=side)
            self._audit_log.record(
                tx,
                actor=side,
                action="appeal.filed",
                target=appeal.appeal_id,
                reason_code="objection",
                case_id=case.case_id,
            )
            self._cases.change(tx, case.case_id, None, appealed)
            for told in self._cases.on_change:
                told(tx, "report.appealed", replace(case, state=rules.APPEALED))
            self._tell(tx, case, user_id, side)
        await tx
        return appeal

    async def _file_elsewhere(self, case: Case, user_id: str, text: str) -> Appeal:
        """To the server that decided, which seals it and answers."""
        if self.peers is not None:
            await self.peers.object(case, user_id, text)
        now = self._clock.now()
        with self._db.write() as tx:
            self._audit_log.record(
                tx,
                actor="subject",
                action="appeal.sent",
                target=case.case_id,
                reason_code="objection",
                case_id=case.case_id,
            )
            self._notices.tell(tx, user_id, words.APPEAL_RECEIVED, case.case_id)
        await tx
        return Appeal(secrets.token_urlsafe(12), case.case_id, "", "subject", now, now + rules.APPEAL_DUE, OPEN, True)

    def _tell(self, tx: Tx, case: Case, user_id: str | None, side: rules.Side) -> None:
        if user_id is not None and self._users.is_local(user_id):
            self._notices.tell(tx, user_id, words.APPEAL_RECEIVED, case.case_id)
        other = case.reporter if side == "subject" else case.user_id
        if other is not None and other != user_id and self._users.is_local(other):
            self._notices.tell(tx, other, words.OTHER_SIDE_APPEALED, case.case_id)

    # --- answering

    async def open_ones(self, case_id: str | None = None) -> list[Appeal]:
        return await self._db.read(_open_ones, case_id)

    async def of_case(self, case_id: str) -> list[Appeal]:
        return await self._db.read(
            lambda query: [
                _appeal(row)
                for row in query.all(f"SELECT {_COLUMNS} FROM appeals WHERE case_id = $1 ORDER BY filed_ts", case_id)
            ]
        )

    async def answer(
        self, case_id: str, actor: str, version: int | None, *, reverse: bool, statement: Statement
    ) -> Decision:
        """Upholds the decision, or reverses it: its measures are taken back, and `statement` may name others in their place."""
        async with self._alone(case_id):
            return await self._answer(case_id, actor, version, reverse=reverse, statement=statement)

    async def _answer(
        self, case_id: str, actor: str, version: int | None, *, reverse: bool, statement: Statement
    ) -> Decision:
        case = await self._cases.for_moderator(case_id, actor)
        if case.state not in (rules.APPEALED, rules.RE_REVIEW):
            raise rules.NotNow("Nobody objects to this decision now.")
        moderators = await self._persons.at_work()
        self._cases.require_decider(case, actor, moderators)
        decisions = await self._decisions.of_case(case_id)
        before = decisions[-1]
        if before.decider == actor and set(moderators) - {actor, case.user_id, case.reporter}:
            raise Forbidden("You have made this decision. Let another moderator look at it again.")
        if not reverse and statement.measures:
            raise InvalidParam("Where the decision stays, no measure is added. Reverse it to put another in its place.")
        waiting = await self.open_ones(case_id)
        verdict = REVERSED if reverse else UPHELD

        def answered(tx: Tx) -> None:
            for one in waiting:
                tx.run("UPDATE appeals SET state = $2 WHERE appeal_id = $1", one.appeal_id, verdict)
            if before.decider == actor:
                self._audit_log.record(
                    tx,
                    actor=actor,
                    action="appeal.same_person",
                    target=case_id,
                    reason_code="nobody_else",
                    case_id=case_id,
                )

        if reverse:
            # First what was wrong goes, then what is right comes: the same measure may stand in both.
            await self._require_version(case, version)
            require_complete(statement, actor, case_id)
            await self._decisions.undo(before, actor, statement.reason_code)
        return await self._decisions.record(
            case, actor, version, statement, beside=answered, appeal_id=waiting[0].appeal_id if waiting else None, verdict=verdict
        )  # fmt: skip

    async def _require_version(self, case: Case, version: int | None) -> None:
        if version is not None and case.version != version:
            raise rules.Stale

    # --- the password of a closed account

    def keep_password(self, tx: Tx, case: Case, decision: Decision) -> None:
        """`Decisions.on_decided`: before the account closes and its hash is gone."""
        for one in decision.measures:
            if one.chosen.measure == "deactivate":
                tx.run(
                    "INSERT INTO appeal_passwords (user_id, password_hash, until_ts) SELECT user_id, password_hash, $2 FROM users "
                    "WHERE user_id = $1 AND password_hash IS NOT NULL "
                    "ON CONFLICT (user_id) DO UPDATE SET password_hash = excluded.password_hash, until_ts = excluded.until_ts",
                    one.chosen.target,
                    decision.decided_ts + rules.APPEAL_WINDOW,
                )

    def password_changed(self, tx: Tx, user_id: str) -> None:
        """`Account.on_password_changed`: between the decision and its being carried out."""
        tx.run(
            "UPDATE appeal_passwords SET password_hash = (SELECT password_hash FROM users WHERE user_id = $1) "
            "WHERE user_id = $1 AND EXISTS (SELECT 1 FROM users WHERE user_id = $1 AND password_hash IS NOT NULL)",
            user_id,
        )

    def sweep(self, tx: Tx) -> None:
        tx.run("DELETE FROM appeal_passwords WHERE until_ts <= $1", self._clock.now())


_COLUMNS = "appeal_id, case_id, decision_id, side, filed_ts, due_ts, state, words_kept"


def _appeal(row: Any) -> Appeal:
    appeal_id, case_id, decision_id, side, filed_ts, due_ts, state, words_kept = row
    return Appeal(appeal_id, case_id, decision_id, side, filed_ts, due_ts, state, bool(words_kept))


def _open_ones(query: Query, case_id: str | None) -> list[Appeal]:
    """Of a case those of the reports joined to it as well."""
    rows = query.all(
        f"SELECT {_COLUMNS} FROM appeals WHERE state = $1 AND ($2 = '' OR case_id = $2 OR case_id IN "
        "(SELECT case_id FROM cases WHERE duplicate_of = $2)) ORDER BY due_ts LIMIT 200",
        OPEN,
        case_id or "",
    )
    return [_appeal(row) for row in rows]
