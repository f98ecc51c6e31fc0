"""What comes from other servers' moderators: a forwarded report, an answer, a decision about a person of ours, an objection.

All of it is signed by the server (X-Matrix). Nothing readable that they write is stored: of a decision words of fixed lists
only, evidence sealed, an objection sealed here. A forwarded report has to name an event that lies here, and one a server may
send only of rooms in which it is. Off unless `moderation.forwarding` is on, but for what concerns people of ours.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from relay.accounts.users import Users
from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import BadJson, Forbidden, InvalidParam, LimitExceeded, NotFound
from relay.ids import server_of
from relay.moderation import case_rules as rules
from relay.moderation import notice_words as words
from relay.moderation.acts import MEASURES
from relay.moderation.appeals import Appeals
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import WORDS_NOT_KEPT, WORDS_SEALED, Case, by_id
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decisions
from relay.moderation.envelope import MIN_KEYS
from relay.moderation.envelopes import Envelopes, Sealed
from relay.moderation.freeze import Freeze
from relay.moderation.links import Links
from relay.moderation.moderator_keys import CLOCK_TOLERANCE, ModeratorKeys
from relay.moderation.notices import Notices
from relay.moderation.peers import BASE, CASE_ID, Peers, SaidBefore, envelope_of
from relay.moderation.statements import is_reason_code, shared_reason
from relay.part import Part
from relay.protocol.signing import SigningKey, sign_json
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route, get_bool, get_list, get_object, get_string

MAX_FORWARD_BYTES = 512 * 1024
MAX_A_DAY = 20
# Each is told to a person of ours: the first one, and what objections changed.
MAX_DECISIONS_OF_CASE = 10
MAX_MEASURES = 10


class PeerRoutes(Part):
    def __init__(
        self,
        db: Database,
        clock: Clock,
        key: SigningKey,
        users: Users,
        rooms: Rooms,
        peers: Peers,
        keys: ModeratorKeys,
        cases: Cases,
        decisions: Decisions,
        appeals: Appeals,
        envelopes: Envelopes,
        freeze: Freeze,
        links: Links,
        notices: Notices,
        audit_log: AuditLog,
    ) -> None:
        self._db = db
        self._clock = clock
        self._key = key
        self._users = users
        self._rooms = rooms
        self._peers = peers
        self._keys = keys
        self._cases = cases
        self._decisions = decisions
        self._appeals = appeals
        self._envelopes = envelopes
        self._freeze = freeze
        self._links = links
        self._notices = notices
        self._audit_log = audit_log

    def routes(self) -> Iterable[Route]:
        def route(method: str, where: str, function: Any) -> Route:
            return Route(
                method,
                f"{BASE}/{where}",
                function,
                auth="server",
                limit="federation",
                serves="federation",
                max_body=MAX_FORWARD_BYTES,
            )

        yield route("GET", "keys", self._get_keys)
        yield route("PUT", "forward/{caseId}", self._put_forward)
        yield route("PUT", "answer/{caseId}", self._put_answer)
        yield route("PUT", "decision/{caseId}", self._put_decision)
        yield route("GET", "decision/{caseId}", self._get_decision)
        yield route("PUT", "appeal/{caseId}", self._put_appeal)

    # --- forwarded reports

    async def _get_keys(self, request: Request) -> Answer:
        """The same for everybody: a list without one person's key would tell who moderates here."""
        self._peers.require_forwarding()
        recipients = await self._keys.recipients()
        if len(recipients) < MIN_KEYS:
            raise NotFound("The moderators of this server have no keys to which anything could be sealed.")
        name = self._users.server_name
        answer = {"server": name, "ts": self._clock.now(), "keys": [one.public.text for one in recipients]}
        return sign_json(answer, name, self._key)

    async def _put_forward(self, request: Request) -> Answer:
        self._peers.require_forwarding()
        origin, body = request.origin, request.json()
        envelope = envelope_of(get_object(body, "envelope"))
        if envelope.case_id != request.params["caseId"]:
            raise InvalidParam("The envelope belongs to another case than the path names.")
        event_id, room_id = get_string(body, "event_id"), get_string(body, "room_id")
        room, stored = await self._rooms.get(room_id), await self._rooms.event(event_id)
        if room is None or stored is None or stored.event.room_id != room_id or origin not in room.servers:
            raise NotFound("This event does not lie here, or your server is not in its room.")
        sender = stored.event.sender
        counting = {one.key_id: one.user_id for one in await self._keys.recipients()}
        if len(envelope.wraps) < MIN_KEYS or set(envelope.wraps) - set(counting):
            raise InvalidParam(
                "Seal it to all keys that this server publishes now, and to no others. Ask for them again."
            )
        # The named person opens nothing of it. Where too few others are left, nothing of it is kept, and the answer is the same:
        # it does not tell who moderates here.
        envelope = replace(
            envelope, wraps={key_id: wrap for key_id, wrap in envelope.wraps.items() if counting[key_id] != sender}
        )
        kept = len(envelope.wraps) >= MIN_KEYS
        # Sent from an account here: only then its proof can be judged like one of ours.
        local = self._users.is_local(sender) and stored.local
        case = self._cases.new(
            case_id=envelope.case_id, kind="forwarded", category="other", peer=origin, user_id=sender, room_id=room_id,
            event_id=event_id, seen=(event_id,), words=WORDS_SEALED if kept else WORDS_NOT_KEPT,
            disclosure="undisclosed" if local else "needs_human",
        )  # fmt: skip

        def require_new(query: Query) -> None:
            self._still_few(query, origin)
            if query.value(
                "SELECT 1 FROM forwards WHERE (event_id = $1 AND server = $2 AND incoming = 1) OR forward_id = $3 "
                "UNION SELECT 1 FROM cases WHERE case_id = $3",
                event_id,
                origin,
                envelope.case_id,
            ):
                raise rules.NotNow("This event was forwarded already. One bundle for each event is taken.")

        with self._db.write() as tx:
            tx.call(require_new)
            self._cases.open(tx, case)
            if kept:
                self._envelopes.store(tx, Sealed(secrets.token_hex(16), "forward", envelope), actor="peer")
            self._freeze.hold(tx, case.case_id, [event_id])
            self._peers.note(tx, envelope.case_id, case.case_id, origin, event_id, incoming=True)
        await tx
        return {}

    def _still_few(self, query: Query, origin: str) -> None:
        """Inside the write: many at the same moment must not all find that there are few. Raises LimitExceeded."""
        since = self._clock.now() - DAY
        if query.value("SELECT count(*) FROM cases WHERE created_ts > $1 AND peer = $2", since, origin) >= MAX_A_DAY:
            raise LimitExceeded(DAY / 1000)

    async def _put_answer(self, request: Request) -> Answer:
        """What they decided about a report that we forwarded. Sent once more, it changes nothing and tells nobody again."""
        body, forward_id, origin = request.json(), request.params["caseId"], request.origin
        told = {**_told(body), "decided": self._moment(body)}
        case_id = await self._db.read(
            lambda query: query.value("SELECT case_id FROM forwards WHERE forward_id = $1", forward_id)
        )
        if case_id is None:
            raise NotFound("No such report was forwarded to your server.")
        case = await self._cases.get(case_id)
        with self._db.write() as tx:
            tx.call(lambda query: self._peers.take_answer(query, forward_id, origin, told))
            self._record(tx, "peer.answered", origin, case.case_id, told["reason_code"])
            for happened in self._cases.on_change:
                happened(tx, "report.peer_answered", case)
            if case.reporter is not None and self._users.is_local(case.reporter):
                token = self._links.make(tx, case.case_id, "report", case.reporter)
                self._notices.tell(tx, case.reporter, words.PEER_ANSWERED, case.case_id, link=("report", token))
        with suppress(SaidBefore):
            await tx
        return {}

    def _moment(self, body: dict[str, Any]) -> int:
        """When they decided, by their clock; never in a future that would outlast every later answer. Raises InvalidParam."""
        decided = body.get("decided")
        if type(decided) is not int or not 0 < decided <= self._clock.now() + CLOCK_TOLERANCE:
            raise InvalidParam("The key decided is when it was decided, in milliseconds, and not later than now.")
        return decided

    # --- decisions about people of ours

    async def _put_decision(self, request: Request) -> Answer:
        body, origin, case_id = request.json(), request.origin, request.params["caseId"]
        told, user_id = _told(body), get_string(body, "user_id")
        if not CASE_ID.match(case_id) or not self._users.is_local(user_id):
            raise InvalidParam("The decision names no case, or nobody who lives here.")
        if not await self._shares_room(user_id, origin):
            raise Forbidden("Your server shares no room with this person.")
        before = await self._known(case_id)
        now = self._clock.now()

        def require_takeable(query: Query) -> None:
            known = by_id(query, case_id)
            if known is None:
                self._still_few(query, origin)
            elif known.kind != "elsewhere" or known.peer != origin or known.user_id != user_id:
                raise InvalidParam("This case is another one here.")
            elif query.value("SELECT count(*) FROM decisions WHERE case_id = $1", case_id) >= MAX_DECISIONS_OF_CASE:
                raise LimitExceeded(DAY / 1000)
            if (known is None) != (before is None):
                raise rules.NotNow("The same decision is just being taken. Send it once more.")

        with self._db.write() as tx:
            tx.call(require_takeable)
            if before is None:
                case = self._cases.new(
                    case_id=case_id, kind="elsewhere", category="other", peer=origin, user_id=user_id
                )
                kept = rules.kept_until("other", now, now)
                self._cases.put(tx, replace(case, state=rules.DECIDED, decided_ts=now, keep_until=kept))
            self._decisions.put_foreign(tx, case_id, origin, now, told)
            self._record(tx, "peer.decided", user_id, case_id, told["reason_code"])
            token = self._links.make(tx, case_id, "appeal", user_id)
            verdict = {"upheld": words.APPEAL_UPHELD, "reversed": words.APPEAL_REVERSED}.get(told["verdict"])
            self._notices.tell(tx, user_id, verdict or words.ABOUT_YOU_ELSEWHERE, case_id, link=("appeal", token))
        await tx
        return {}

    async def _known(self, case_id: str) -> Case | None:
        try:
            return await self._cases.get(case_id)
        except NotFound:
            return None

    async def _shares_room(self, user_id: str, origin: str) -> bool:
        """Now or earlier: whoever was put out of the room that it is about hears of it too."""
        for room_id, one in list(self._rooms.memberships(user_id).items()):
            if one.membership in ("join", "leave", "ban"):
                room = await self._rooms.get(room_id)
                if room is not None and (origin in room.servers or server_of(room_id) == origin):
                    return True
        return False

    async def _get_decision(self, request: Request) -> Answer:
        """The reasons, for the server of the person decided on, while she reads them there."""
        case = await self._about(request, request.query.get("user_id", ""))
        decisions = [
            one for one in await self._decisions.of_case(case.case_id) if one.measures or one.verdict is not None
        ]
        if not decisions:
            raise NotFound("There is no such decision.")
        return {"ground": decisions[-1].ground, "facts": decisions[-1].facts}

    async def _put_appeal(self, request: Request) -> Answer:
        body = request.json()
        user_id = get_string(body, "user_id")
        case = await self._about(request, user_id)
        await self._appeals.file(case.case_id, user_id, get_string(body, "words"))
        return {}

    async def _about(self, request: Request, user_id: str) -> Case:
        """Raises NotFound, the same for everything that is not the asking server's."""
        case = await self._known(request.params["caseId"])
        mine = server_of(user_id) == request.origin and request.origin != self._users.server_name
        if case is None or not mine or case.user_id != user_id or case.kind == "elsewhere":
            raise NotFound("There is no such decision.")
        return case

    def _record(self, tx: Tx, action: str, target: str, case_id: str, reason_code: str) -> None:
        self._audit_log.record(
            tx, actor="peer", action=action, target=target, reason_code=reason_code, case_id=case_id, automated=True
        )


def _told(body: dict[str, Any]) -> dict[str, Any]:
    """What another server says it decided: words of fixed lists, nothing else. Raises ApiError."""
    measures = get_list(body, "measures")
    if len(measures) > MAX_MEASURES or not all(isinstance(one, str) and one in MEASURES for one in measures):
        raise InvalidParam(f"The measures are at most {MAX_MEASURES} of: {', '.join(MEASURES)}.")
    reason_code, verdict = get_string(body, "reason_code"), body.get("verdict")
    if not is_reason_code(reason_code):
        raise InvalidParam("The reason code is a short word.")
    if verdict not in (None, "upheld", "reversed"):
        raise BadJson("The verdict is upheld or reversed.")
    return {
        "measures": measures,
        "reason_code": shared_reason(reason_code),
        "automated": get_bool(body, "automated", False),
        "verdict": verdict,
    }
