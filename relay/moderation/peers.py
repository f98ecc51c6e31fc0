"""What goes to other servers' moderators: a single report with its proof, and decisions about their people.

Forwarding is off by default, is one case at a time, needs the reporter's consent, and never happens for `minor`. The evidence
is sealed to the other side's keys on a moderator's machine; no reporter, time, category or reason goes out. Of a decision only
words of fixed lists and the case's name go out; her own server asks for the reasons when the person reads them, and keeps
none. What comes in: peer_routes.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson
import structlog

from relay.clock import DAY, MINUTE, Clock, rest
from relay.db import Database, Query, Tx
from relay.errors import ApiError, Forbidden, InvalidParam, LimitExceeded, NotFound, RemoteError
from relay.ids import is_server_name, server_of
from relay.moderation import case_rules as rules
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decision, Decisions
from relay.moderation.disclosure import Disclosures
from relay.moderation.envelope import IV_BYTES, WRAP_BYTES, Envelope, NotOpened
from relay.moderation.moderator_secret import BadKey, ModeratorPublic
from relay.part import Part
from relay.remote import Remote, SpeaksSigned
from relay.rooms.rooms import Rooms
from relay.tables import Schema, Table

log = structlog.get_logger("peers")

BASE = "/_relay/federation/v1"
CASE_ID = re.compile(r"[A-Za-z0-9_-]{22,64}\Z")
MAX_ANSWER_BYTES = 256 * 1024
MAX_KEYS = 100
TIMEOUT_SECONDS = 15.0
TRIED_FOR_MS = DAY
RETRY_MS = 5 * MINUTE
LOOK_EVERY_SECONDS = 60.0
MAX_AT_ONCE = 50
MAX_PENDING = 10_000
# Of one forwarded report: the decision, and what objections to it change.
MAX_ANSWERS = 5
PENDING, TOLD, REFUSED, NOT_REACHED = "pending", "told", "refused", "not reached"
_KEPT = "until the retention of the case is over"
_READ = "The server where this was decided did not answer, so its reasons can't be shown now. Try again later."


class SaidBefore(Exception):
    """The same once more, such as a repetition whose answer was lost: nothing happens, and it is no fault."""


class Peers(Part):
    schema = Schema(
        "peers",
        tables=(
            Table(
                "forwards",
                "a report that was handed to another server's moderators, or came from them",
                {
                    "forward_id": ("its name on both sides", _KEPT),
                    "case_id": ("which case here", _KEPT),
                    "server": ("to or from whom", _KEPT),
                    "event_id": ("the one event it is about", _KEPT),
                    "incoming": ("whether it came from there", _KEPT),
                    "sent_ts": ("when", _KEPT),
                    "answer": ("what they decided, as words of fixed lists", _KEPT),
                    "answers": ("how often they have answered", _KEPT),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE forwards (forward_id TEXT PRIMARY KEY, case_id TEXT NOT NULL, server TEXT NOT NULL, event_id TEXT NOT NULL,
                incoming SMALLINT NOT NULL, sent_ts BIGINT NOT NULL, answer TEXT, UNIQUE (event_id, server, incoming));
            CREATE INDEX forwards_of_case ON forwards (case_id)
            """,
            """
            ALTER TABLE forwards ADD COLUMN answers SMALLINT NOT NULL DEFAULT 0
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        clock: Clock,
        rooms: Rooms,
        remote: Remote,
        speaks: SpeaksSigned,
        cases: Cases,
        decisions: Decisions,
        disclosures: Disclosures,
        audit_log: AuditLog,
        *,
        forwarding: bool,
    ) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._remote = remote
        self._speaks = speaks
        self._cases = cases
        self._decisions = decisions
        self._disclosures = disclosures
        self._audit_log = audit_log
        self._forwarding = forwarding
        self._woken = asyncio.Event()
        self._not_before: dict[str, int] = {}

    # --- handing a report over

    def require_forwarding(self) -> None:
        if not self._forwarding:
            raise Forbidden("This server hands no reports to others and takes none (moderation.forwarding is off).")

    async def keys_of(self, server: str) -> list[ModeratorPublic]:
        """The public keys of its moderators, signed by it. That somebody looks is all they learn: whom it is about they are told
        with the report, and leave out her key themselves. Raises RemoteError, ApiError."""
        if not is_server_name(server):
            raise InvalidParam("This is not a server name.")
        answer = await self._speaks.get(
            server, f"{BASE}/keys", forced=True, most_bytes=MAX_ANSWER_BYTES, timeout=TIMEOUT_SECONDS
        )
        if answer.get("server") != server or not await self._remote.verified_json(server, answer):
            raise RemoteError(server, 200, "its list of keys is not signed by it")
        listed = answer.get("keys")
        if not isinstance(listed, list):
            raise RemoteError(server, 200, "its list of keys is none")
        try:
            return [ModeratorPublic.read(str(one)) for one in listed[:MAX_KEYS]]
        except BadKey as bad:
            raise RemoteError(server, 200, "a key of its list is none") from bad

    async def forward(self, case_id: str, actor: str, event_id: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Hands one message's proof over, sealed on the moderator's machine. Raises ApiError, RemoteError."""
        self.require_forwarding()
        case = await self._cases.for_moderator(case_id, actor)
        if case.category == "minor":
            raise Forbidden("A report of this category is never forwarded. See docs/moderation.md for whom to ask.")
        if not case.consent:
            raise Forbidden(
                "The reporter has not agreed to its being forwarded. She can, over the link in her notice room."
            )
        stored = await self._rooms.event(event_id)
        server = server_of(stored.event.sender) if stored is not None else ""
        if stored is None or event_id not in case.seen or server == self._rooms.server_name:
            raise InvalidParam("Forward an event of this case whose sender lives on another server.")
        proved = {one["event_id"]: one["result"] for one in await self._disclosures.of_case(case_id)}
        if proved.get(event_id) not in ("verified", "verified_remote"):
            raise rules.NotNow("Only a message with a proof can be forwarded: the other side believes nothing else.")
        envelope = envelope_of(given)
        body = {"event_id": event_id, "room_id": stored.event.room_id, "envelope": envelope.json()}
        known = await self._db.read(
            lambda query: query.value(
                "SELECT 1 FROM forwards WHERE event_id = $1 AND server = $2 AND incoming = 0", event_id, server
            )
        )
        if known:
            raise rules.NotNow("This message was handed to them already.")
        await self._speaks.send(
            server, "PUT", f"{BASE}/forward/{envelope.case_id}", body, forced=True, most_bytes=MAX_ANSWER_BYTES,
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        with self._db.write() as tx:
            self.note(tx, envelope.case_id, case_id, server, event_id, incoming=False)
            self._audit_log.record(
                tx,
                actor=actor,
                action="forwarded",
                target=server,
                reason_code="consented",
                case_id=case_id,
                detail={"event_id": event_id},
            )
        await tx
        return {"id": envelope.case_id, "server": server}

    def note(self, tx: Tx, forward_id: str, case_id: str, server: str, event_id: str, *, incoming: bool) -> None:
        tx.run(
            "INSERT INTO forwards (forward_id, case_id, server, event_id, incoming, sent_ts) VALUES ($1, $2, $3, $4, $5, $6)",
            forward_id, case_id, server, event_id, int(incoming), self._clock.now(),
        )  # fmt: skip

    async def of_case(self, case_id: str) -> list[dict[str, Any]]:
        rows = await self._db.read(
            lambda query: query.all(
                "SELECT forward_id, server, event_id, incoming, answer FROM forwards WHERE case_id = $1 ORDER BY sent_ts",
                case_id,
            )
        )
        return [
            {"id": forward_id, "server": server, "event_id": event_id, "incoming": bool(incoming), "answer": answer}
            for forward_id, server, event_id, incoming, answer in rows
        ]

    async def answers(self, case_id: str) -> list[dict[str, Any]]:
        """What other servers decided about what was handed to them: server, measures, reason_code, automated, decided, verdict."""
        return [
            {**orjson.loads(one["answer"]), "server": one["server"]}
            for one in await self.of_case(case_id)
            if one["answer"] and not one["incoming"]
        ]

    def take_answer(self, query: Query, forward_id: str, server: str, told: Mapping[str, Any]) -> None:
        """In the write of it: their first answer, and a few later ones that say something else and are younger. Raises NotFound,
        SaidBefore, NotNow, LimitExceeded."""
        row = query.one(
            "SELECT answer, answers FROM forwards WHERE forward_id = $1 AND server = $2 AND incoming = 0", forward_id, server
        )  # fmt: skip
        if row is None:
            raise NotFound("No such report was forwarded to your server.")
        before, number = orjson.loads(row[0]) if row[0] else None, row[1]
        if before is not None and before == told:
            raise SaidBefore
        if before is not None and told["decided"] <= before.get("decided", 0):
            raise rules.NotNow("You have answered this report already, and not earlier than this. Nothing was changed.")
        if number >= MAX_ANSWERS:
            raise LimitExceeded(DAY / 1000)
        query.run(
            "UPDATE forwards SET answer = $2, answers = answers + 1 WHERE forward_id = $1",
            forward_id,
            orjson.dumps(told).decode(),
        )

    def forget(self, tx: Tx, case_id: str) -> None:
        tx.run("DELETE FROM forwards WHERE case_id = $1", case_id)

    # --- telling others what was decided

    def decided(self, tx: Tx, case: Case, decision: Decision) -> None:
        """`Decisions.on_decided`: another server has to hear of it."""
        if self._told_to(case, decision):
            tx.run("UPDATE decisions SET told_peer = $2 WHERE decision_id = $1", decision.decision_id, PENDING)
            tx.after(self._woken.set)

    def _told_to(self, case: Case, decision: Decision) -> dict[str, str]:
        """server > what it is told: an answer to what it forwarded, a decision about a person of its own."""
        found: dict[str, str] = {}
        concerned = (decision.measures or decision.verdict is not None) and not decision.untold
        if case.user_id is not None and concerned:
            server = server_of(case.user_id)
            if server != self._rooms.server_name:
                found[server] = "decision"
        if case.kind == "forwarded" and case.peer is not None:
            found[case.peer] = "answer"
        return found

    async def run(self) -> None:
        while True:
            self._woken.clear()
            began = self._clock.monotonic()
            await self._tell_some()
            await rest(self._clock, self._woken, LOOK_EVERY_SECONDS, since=began)

    async def _tell_some(self) -> None:
        now = self._clock.now()
        pending = await self._db.read(_pending)
        # Those whose server can't be reached keep nobody else waiting.
        for decision_id in [one for one in pending if self._not_before.get(one, 0) <= now][:MAX_AT_ONCE]:
            decision = await self._decisions.get(decision_id)
            outcome = await self._tell(await self._cases.get(decision.case_id), decision)
            if outcome == NOT_REACHED and now < decision.decided_ts + TRIED_FOR_MS:
                self._not_before[decision_id] = now + RETRY_MS
                continue
            self._not_before.pop(decision_id, None)
            with self._db.write() as tx:
                self._decisions.set_told_peer(tx, decision_id, outcome)
            await tx

    async def _tell(self, case: Case, decision: Decision) -> str:
        """The worst of what came of it."""
        outcome = TOLD
        for server, what in self._told_to(case, decision).items():
            body: dict[str, Any] = {
                "measures": [one.chosen.measure for one in decision.measures],
                "reason_code": decision.reason_code,
                "automated": decision.automated,
                "decided": decision.decided_ts,
                "verdict": decision.verdict,
            }
            if what == "decision":
                body["user_id"] = case.user_id
            try:
                await self._speaks.send(
                    server,
                    "PUT",
                    f"{BASE}/{what}/{case.case_id}",
                    body,
                    most_bytes=MAX_ANSWER_BYTES,
                    timeout=TIMEOUT_SECONDS,
                )
            except RemoteError as no:
                outcome = REFUSED if 400 <= no.status < 500 and no.status != 429 else NOT_REACHED
            except ApiError:
                outcome = REFUSED  # a server that is shut out is told nothing
        return outcome

    # --- for a person of ours, about whom another server decided

    async def reasons(self, case: Case, user_id: str) -> dict[str, Any]:
        """Ground and facts, as the other server states them now; they are kept nowhere here."""
        if case.peer is None:
            return {}
        target = f"{BASE}/decision/{case.case_id}?user_id={quote(user_id, safe='')}"
        try:
            answer = await self._speaks.get(
                case.peer, target, forced=True, most_bytes=MAX_ANSWER_BYTES, timeout=TIMEOUT_SECONDS
            )
        except (RemoteError, ApiError):
            return {"facts": _READ}
        told = {key: answer[key] for key in ("ground", "facts") if isinstance(answer.get(key), str)}
        return {key: value[:4_000] for key, value in told.items()} or {"facts": _READ}

    async def object(self, case: Case, user_id: str, text: str) -> None:
        """Her objection goes to whoever decided, who seals it; it is kept nowhere here. Raises ApiError."""
        try:
            await self._speaks.send(
                str(case.peer), "PUT", f"{BASE}/appeal/{case.case_id}", {"user_id": user_id, "words": text}, forced=True,
                most_bytes=MAX_ANSWER_BYTES, timeout=TIMEOUT_SECONDS,
            )  # fmt: skip
        except RemoteError as no:
            raise rules.NotNow(
                f"The server that decided did not take your objection: {no.text} Try again later."
            ) from no


def envelope_of(given: Mapping[str, Any]) -> Envelope:
    try:
        envelope = Envelope.read(given)
    except NotOpened as bad:
        raise InvalidParam("The envelope is not one. Seal it with this relay's own tools.") from bad
    sizes = len(envelope.iv) == IV_BYTES and all(len(wrap) == WRAP_BYTES for wrap in envelope.wraps.values())
    if (
        not sizes
        or envelope.version != 1
        or not CASE_ID.match(envelope.case_id)
        or len(envelope.body) > MAX_ANSWER_BYTES
    ):
        raise InvalidParam("The envelope has version 1 and a new random case_id of 22 characters or more.")
    return envelope


def _pending(query: Query) -> list[str]:
    rows = query.all(
        "SELECT decision_id FROM decisions WHERE told_peer = $1 ORDER BY decided_ts LIMIT $2", PENDING, MAX_PENDING
    )
    return [decision_id for (decision_id,) in rows]
