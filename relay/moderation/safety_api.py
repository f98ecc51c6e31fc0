"""The API of moderation, `/_relay/safety/v1/…`: cases, decisions, appeals, evidence, audit log, figures. docs/safety-api.md.

Thin: who may (safety_tokens.py), which version of the case (`If-Match`), then the same calls as the desk makes. A decision may
also come signed by an integration, which is a machine (integrations.py). Sending one twice with the same `Idempotency-Key`
gives the first one's answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from aiohttp import web

from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, InvalidParam, NotFound
from relay.moderation import case_rules as rules
from relay.moderation import statements
from relay.moderation.acts import MEASURES
from relay.moderation.appeals import Appeals
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decision, Decisions
from relay.moderation.disclosure import Disclosures
from relay.moderation.disclosure_form import parse_disclosure
from relay.moderation.envelopes import Envelopes
from relay.moderation.integrations import Integrations
from relay.moderation.peers import Peers
from relay.moderation.reports import MAX_REPORT_BYTES, Reports
from relay.moderation.safety_tokens import BASE, Asking, SafetyTokens
from relay.moderation.transparency import Transparency
from relay.part import Part
from relay.protocol.canonical import encode
from relay.tables import Schema, Table
from relay.web import JSON_HEADERS, Answer, Request, Route, get_bool, get_object, get_optional_string, get_string

MAX_NOTE = 10_000
MAX_KEY = 200
KEYS_KEPT = 7 * DAY
_LIFE = "7 d"


class SafetyApi(Part):
    schema = Schema(
        "safety_api",
        tables=(
            Table(
                "safety_requests",
                "a decision that was sent under an idempotency key",
                {
                    "hash": ("of who sent it, about what, and the key", _LIFE),
                    "decision_id": ("what came of it", _LIFE),
                    "ts": ("when", _LIFE),
                },
            ),
        ),
        steps=("CREATE TABLE safety_requests (hash BYTES PRIMARY KEY, decision_id TEXT NOT NULL, ts BIGINT NOT NULL)",),
    )

    def __init__(
        self,
        db: Database,
        clock: Clock,
        tokens: SafetyTokens,
        cases: Cases,
        decisions: Decisions,
        appeals: Appeals,
        disclosures: Disclosures,
        envelopes: Envelopes,
        integrations: Integrations,
        transparency: Transparency,
        peers: Peers,
        reports: Reports,
        audit_log: AuditLog,
    ) -> None:
        self._db = db
        self._clock = clock
        self._tokens = tokens
        self._cases = cases
        self._decisions = decisions
        self._appeals = appeals
        self._disclosures = disclosures
        self._envelopes = envelopes
        self._integrations = integrations
        self._transparency = transparency
        self._peers = peers
        self._reports = reports
        self._audit_log = audit_log

    def routes(self) -> Iterable[Route]:
        one = f"{BASE}/reports/{{reportId}}"
        yield Route("GET", f"{BASE}/reports", self._list, auth="none")
        yield Route("GET", one, self._show, auth="none")
        yield Route("POST", f"{one}/assign", self._assign, auth="none")
        yield Route("POST", f"{one}/sort", self._sort, auth="none")
        yield Route("POST", f"{one}/join", self._join, auth="none")
        yield Route("POST", f"{one}/close", self._close, auth="none")
        yield Route("POST", f"{one}/note", self._note, auth="none")
        yield Route("GET", f"{one}/envelopes", self._evidence, auth="none")
        yield Route("POST", f"{one}/decision", self._decide, auth="none")
        yield Route("POST", f"{one}/appeal", self._answer_appeal, auth="none")
        yield Route("POST", f"{one}/proof", self._proof, auth="none", max_body=MAX_REPORT_BYTES)
        yield Route("POST", f"{one}/forward", self._forward, auth="none")
        yield Route("GET", f"{BASE}/peers/{{server}}/keys", self._peer_keys, auth="none")
        yield Route("GET", f"{BASE}/audit", self._audit, auth="none")
        yield Route("GET", f"{BASE}/audit/checkpoint", self._checkpoint, auth="none")
        yield Route("POST", f"{BASE}/audit/acknowledge", self._acknowledge, auth="none")
        yield Route("GET", f"{BASE}/transparency/{{month}}", self._figures, auth="none")

    def sweep(self, tx: Tx) -> None:
        tx.run("DELETE FROM safety_requests WHERE ts <= $1", self._clock.now() - KEYS_KEPT)

    # --- reading

    async def _list(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "reports:read")
        state = request.query.get("state", "open")
        if state not in ("open", "all", *rules.STATES):
            raise InvalidParam(f"The parameter state is open, all or one of: {', '.join(rules.STATES)}.")
        category = request.query.get("category")
        if category is not None:
            rules.require_category(category)
        start, limit = request.query_int("from", 0, high=10**9), request.query_int("limit", 50, low=1, high=200)
        found, total = await self._cases.queue(
            state=None if state == "all" else state, category=category, actor=asking.actor, start=start, limit=limit
        )
        answer: dict[str, Any] = {"reports": [case.as_json() for case in found], "total": total}
        if start + len(found) < total:
            answer["next"] = start + len(found)
        return answer

    async def _show(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "reports:read")
        case = await self._cases.for_moderator(request.params["reportId"], asking.actor)
        return _versioned(case, await self.shown(case))

    async def shown(self, case: Case) -> dict[str, Any]:
        """Everything about a case that can be told without opening an envelope."""
        return {
            **case.as_json(),
            "known_here": await self._reports.known_here(case),
            "proofs": await self._disclosures.of_case(case.case_id),
            "decisions": [one.as_json() for one in await self._decisions.of_case(case.case_id)],
            "appeals": [one.as_json() for one in await self._appeals.of_case(case.case_id)],
            "forwards": await self._peers.of_case(case.case_id),
            "joined": [other.case_id for other in await self._cases.same_as(case.case_id)],
            "history": [
                {
                    k: v
                    for k, v in entry.as_json().items()
                    if k in ("seq", "ts", "actor", "action", "reason_code", "automated")
                }
                for entry in await self._cases.history(case.case_id)
            ],
        }

    async def _evidence(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "evidence:read")
        case = await self._cases.for_moderator(request.params["reportId"], asking.actor)
        return {"envelopes": await self.evidence(case, asking.actor)}

    async def evidence(self, case: Case, actor: str) -> list[dict[str, Any]]:
        """The sealed envelopes of a case and of those joined to it; that she fetched them stands in the log."""
        with self._db.write() as tx:
            self._audit_log.record(
                tx,
                actor=actor,
                action="evidence.fetched",
                target=case.case_id,
                reason_code=case.category,
                case_id=case.case_id,
            )
        await tx
        found = await self._envelopes.of_case(case.case_id)
        for other in await self._cases.same_as(case.case_id):
            found += await self._envelopes.of_case(other.case_id)
        return found

    # --- changing

    async def _assign(self, request: Request) -> Answer:
        asking, case_id, version = await self._asked(request, "reports:decide")
        change = self._cases.take if get_bool(request.optional_json(), "take", True) else self._cases.release
        return _changed(await change(case_id, asking.actor, version))

    async def _sort(self, request: Request) -> Answer:
        asking, case_id, version = await self._asked(request, "reports:decide")
        body = request.json()
        return _changed(
            await self._cases.triage(
                case_id,
                asking.actor,
                version,
                category=get_optional_string(body, "category"),
                state=get_string(body, "state", rules.TRIAGED),
            )
        )

    async def _join(self, request: Request) -> Answer:
        asking, case_id, version = await self._asked(request, "reports:decide")
        return _changed(await self._cases.merge(case_id, get_string(request.json(), "into"), asking.actor, version))

    async def _close(self, request: Request) -> Answer:
        asking, case_id, version = await self._asked(request, "reports:decide")
        return _changed(await self._cases.close(case_id, asking.actor, version))

    async def _note(self, request: Request) -> Answer:
        asking, case_id, _ = await self._asked(request, "reports:decide")
        case = await self._cases.for_moderator(case_id, asking.actor)
        await self.note(case, asking.actor, get_string(request.json(), "text"))
        return {}

    async def note(self, case: Case, actor: str, text: str) -> None:
        """A moderator's note, sealed like everything that people write. Raises ApiError where there is no key."""
        if not text.strip() or len(text) > MAX_NOTE:
            raise InvalidParam(f"A note has 1 to {MAX_NOTE} characters.")
        excluded = (case.user_id,) if case.user_id is not None else ()
        sealed = await self._envelopes.prepare(case.case_id, "note", encode({"by": actor, "words": text}), excluded)
        if sealed is None:
            raise rules.NotNow(
                "A note can't be kept: there are fewer than two moderators' keys. See relay moderator add."
            )
        with self._db.write() as tx:
            self._envelopes.store(tx, sealed, actor=actor)
        await tx

    async def _decide(self, request: Request) -> Answer:
        case_id = request.params["reportId"]
        if self._integrations.is_signed(request):
            return await self._decide_signed(request, case_id)
        asking, case_id, version = await self._asked(request, "reports:decide")
        case = await self._cases.for_moderator(case_id, asking.actor)
        statement = statements.parse(request.json(), about=case.user_id)
        await self._require_acting(request, asking, statement)
        return await self._once(
            request, asking.actor, case_id,
            lambda beside: self._decisions.decide(case_id, asking.actor, version, statement, beside=beside),
        )  # fmt: skip

    async def _decide_signed(self, request: Request, case_id: str) -> Answer:
        case = await self._cases.get(case_id)
        signed = await self._integrations.accept(
            request, purpose="decision", report_id=case_id, version=case.version, scope="reports:decide"
        )
        if case.category == "minor":
            raise Forbidden("A report of this category is decided by a person, at the desk.")
        statement = statements.parse(signed.body, about=case.user_id)
        made = await self._decisions.decide(
            case_id, signed.actor, case.version, statement, automated=True, beside=signed.use_up
        )
        return made.as_json()

    async def _answer_appeal(self, request: Request) -> Answer:
        asking, case_id, version = await self._asked(request, "reports:decide")
        case = await self._cases.for_moderator(case_id, asking.actor)
        body = dict(request.json())
        verdict = body.pop("verdict", None)
        if verdict not in ("upheld", "reversed"):
            raise InvalidParam("The verdict is upheld or reversed.")
        statement = statements.parse({"measures": [], **body}, about=case.user_id)
        await self._require_acting(request, asking, statement, takes_back=verdict == "reversed")
        made = await self._appeals.answer(
            case_id, asking.actor, version, reverse=verdict == "reversed", statement=statement
        )
        return made.as_json()

    async def _require_acting(
        self, request: Request, asking: Asking, statement: statements.Statement, *, takes_back: bool = False
    ) -> None:
        """What a token needs beside `reports:decide` where something is done to somebody, or no longer."""
        if asking.session:
            return
        if statement.measures or takes_back:
            await self._tokens.require(request, "users:act")
        if any(MEASURES[one.measure].target == "server" for one in statement.measures):
            await self._tokens.require(request, "federation:write")

    async def _once(
        self, request: Request, actor: str, case_id: str, decide: Callable[[Callable[[Tx], None]], Any]
    ) -> Answer:
        key = request.http.headers.get("Idempotency-Key")
        if key is None:
            return _decided(await decide(lambda tx: None))
        if not 0 < len(key) <= MAX_KEY:
            raise InvalidParam(f"An Idempotency-Key has at most {MAX_KEY} characters.")
        hashed, now = hashlib.sha256(f"{actor}\n{case_id}\n{key}".encode()).digest(), self._clock.now()
        before = await self._db.read(_sent_before, hashed)
        if before is not None:
            return _decided(await self._decisions.get(before))

        def remember(tx: Tx) -> None:
            tx.run("DELETE FROM safety_requests WHERE ts <= $1", now - KEYS_KEPT)

            def put(query: Query) -> None:
                decision_id = query.value(
                    "SELECT decision_id FROM decisions WHERE case_id = $1 ORDER BY decided_ts DESC, decision_id LIMIT 1",
                    case_id,
                )
                query.run(
                    "INSERT INTO safety_requests (hash, decision_id, ts) VALUES ($1, $2, $3)", hashed, decision_id, now
                )

            tx.call(put)

        return _decided(await decide(remember))

    async def _asked(self, request: Request, scope: str) -> tuple[Asking, str, int | None]:
        """Who asks, about which case, as it was in which version."""
        asking = await self._tokens.require(request, scope)
        given = request.http.headers.get("If-Match")
        if given is None or given.strip() == "*":
            return asking, request.params["reportId"], None
        text = given.strip().removeprefix("W/").strip('"')
        if not text.isascii() or not text.isdigit() or len(text) > 15:
            raise InvalidParam('If-Match is the ETag that the case was read with, such as "3".')
        return asking, request.params["reportId"], int(text)

    # --- other servers' moderators

    async def _proof(self, request: Request) -> Answer:
        """Of a forwarded report: what its envelope held is checked against the event that lies here."""
        asking, case_id, _ = await self._asked(request, "reports:decide")
        case = await self._cases.for_moderator(case_id, asking.actor)
        proof = await self._reports.prove_forwarded(case, asking.actor, parse_disclosure(request.json()))
        return {"result": proof.result, "proofs": [one.shown() for one in proof.items]}

    async def _forward(self, request: Request) -> Answer:
        asking, case_id, _ = await self._asked(request, "federation:write")
        body = request.json()
        return await self._peers.forward(
            case_id, asking.actor, get_string(body, "event_id"), get_object(body, "envelope")
        )

    async def _peer_keys(self, request: Request) -> Answer:
        await self._tokens.require(request, "federation:write")
        server = request.params["server"]
        keys = await self._peers.keys_of(server)
        return {"server": server, "keys": [{"key_id": one.key_id, "public": one.text} for one in keys]}

    # --- log and figures

    async def _audit(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "audit:read")
        before = request.query_int("before", 2**53 - 1, low=1)
        entries = await self._audit_log.page(
            before=before, limit=request.query_int("limit", 50, low=1, high=200), reader=asking.actor
        )
        answer: dict[str, Any] = {
            "entries": [one.as_json() for one in entries],
            "restored": await self._audit_log.restored(),
            "checkpoint": await self._audit_log.last_checkpoint(),
        }
        if entries and entries[-1].seq > 1:
            answer["next"] = entries[-1].seq
        return answer

    async def _checkpoint(self, request: Request) -> Answer:
        await self._tokens.require(request, "audit:read")
        made = await self._audit_log.checkpoint()
        if made is None:
            raise NotFound("Nothing was ever done that the audit log would hold.")
        return made.json

    async def _acknowledge(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "reports:decide")
        await self._audit_log.acknowledge_restore(asking.actor)
        return {}

    async def _figures(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        return await self._transparency.month(request.params["month"])


def _sent_before(query: Query, hashed: bytes) -> str | None:
    found: str | None = query.value("SELECT decision_id FROM safety_requests WHERE hash = $1", hashed)
    return found


def _changed(case: Case) -> Answer:
    return _versioned(case, case.as_json())


def _decided(decision: Decision) -> Answer:
    return decision.as_json()


def _versioned(case: Case, body: Mapping[str, Any]) -> Answer:
    return web.Response(body=orjson.dumps(body), headers={**JSON_HEADERS, "ETag": case.etag})
