"""How a report comes in: the three endpoints of the standard, the form for people without an account, and what is added later.

Every report is a row before the answer goes out, and answer and notice tell a stranger nothing: both are the same, after a wait
of the same kind, for what does not exist and for what she could not know herself. What the reporter writes is sealed to the
moderators; where there is no key for that, it is not kept, and she is told so.
Spec: client-server-api/#reporting-content. Checks of a proof: disclosure.py.
"""

from __future__ import annotations

import random
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relay.accounts.users import Users
from relay.clock import HOUR, Clock
from relay.db import Database, Query, Tx
from relay.errors import ApiError, Forbidden, InvalidParam, LimitExceeded, TooLarge
from relay.ids import is_event_id, is_room_id, is_server_name, is_typed_user_id, is_user_id
from relay.moderation import case_rules as rules
from relay.moderation import form_limits
from relay.moderation import notice_words as words
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import NO_WORDS, WORDS_NOT_KEPT, WORDS_SEALED, Case, new_id
from relay.moderation.cases import Cases
from relay.moderation.disclosure import Disclosures
from relay.moderation.disclosure_form import KEY, MAX_BYTES, Disclosure, parse_disclosure
from relay.moderation.envelopes import Envelopes
from relay.moderation.form_limits import FormLimits
from relay.moderation.freeze import Freeze
from relay.moderation.links import Link, Links
from relay.moderation.notices import Notices
from relay.moderation.own_rooms import MODERATORS
from relay.moderation.proof import Proof
from relay.part import Part
from relay.protocol.canonical import encode
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route, get_optional_string, get_string

MAX_REPORT_BYTES = MAX_BYTES + 64 * 1024
MAX_WORDS = 10_000
MAX_FORM_FIELD = 2_000
MAX_AN_HOUR = 10
MAX_ANSWERS = 30
# All that a reporter ever does with one report: proofs that fail and changed minds too.
MAX_ADDED = 100
# How long an answer waits at least and at most, so that its time tells nothing either.
WAIT_SECONDS = (0.05, 0.25)
MAX_ASKED = 1_000
CATEGORY_KEY = "org.relay.category"
_ROOM_NAME = re.compile(r"![A-Za-z0-9._~=+/\-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class Told:
    """What somebody told: a target, a category, words, a proof."""

    kind: rules.Kind
    category: str
    words: str = ""
    room_id: str | None = None
    event_id: str | None = None
    disclosure: Disclosure | None = None


class NoOtherModerator(ApiError):
    """Told before anything is filed; the same report sent again is filed."""

    status = 400
    errcode = "ORG.RELAY.NO_OTHER_MODERATOR"


class Reports(Part):
    def __init__(
        self,
        db: Database,
        clock: Clock,
        users: Users,
        rooms: Rooms,
        cases: Cases,
        disclosures: Disclosures,
        envelopes: Envelopes,
        freeze: Freeze,
        links: Links,
        notices: Notices,
        audit_log: AuditLog,
        outside: Sequence[str],
    ) -> None:
        """`outside` are addresses to turn to where nobody here can judge."""
        self._db = db
        self._clock = clock
        self._users = users
        self._rooms = rooms
        self._cases = cases
        self._disclosures = disclosures
        self._envelopes = envelopes
        self._freeze = freeze
        self._links = links
        self._notices = notices
        self._audit_log = audit_log
        self._outside = tuple(outside)
        self._warned: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._forms = FormLimits(clock)
        self._told_of_forms: dict[str, int] = {}
        self._chance = random.SystemRandom()
        # How much a flag on this person moves the case up the queue, 0 to 100.
        self.weight: Callable[[str], Awaitable[int]] | None = None

    def routes(self) -> Iterable[Route]:
        client = "/_matrix/client/v3"
        most = MAX_REPORT_BYTES
        yield Route(
            "POST", f"{client}/rooms/{{roomId}}/report/{{eventId}}", self._event_route, limit="messages", max_body=most
        )
        yield Route("POST", f"{client}/rooms/{{roomId}}/report", self._room_route, limit="messages", max_body=most)
        yield Route("POST", f"{client}/users/{{userId}}/report", self._user_route, limit="messages", max_body=most)

    # --- the standard's endpoints

    async def _event_route(self, request: Request) -> Answer:
        room_id, event_id = request.params["roomId"], request.params["eventId"]
        return await self._taken(
            request, _told(request.json(), "event", reason_required=False, room_id=room_id, event_id=event_id)
        )

    async def _room_route(self, request: Request) -> Answer:
        return await self._taken(
            request, _told(request.json(), "room", reason_required=True, room_id=request.params["roomId"])
        )

    async def _user_route(self, request: Request) -> Answer:
        told = _told(request.json(), "user", reason_required=True)
        return await self._taken(request, told, about=request.params["userId"])

    async def _taken(self, request: Request, told: Told, *, about: str | None = None) -> Answer:
        reporter = request.user_id
        await self._require_few(reporter)
        # From now on, not from when all is done: how long it took to look is nobody's business either.
        answers_at = self._clock.monotonic() + self._chance.uniform(*WAIT_SECONDS)
        if await self._is_for_her_to_report(reporter, told, about):
            await self.file(reporter, told, about)
        await self._clock.sleep(answers_at - self._clock.monotonic())
        return {}

    async def _require_few(self, reporter: str) -> None:
        if await self._cases.reported_since(reporter, self._clock.now() - HOUR) >= MAX_AN_HOUR:
            raise LimitExceeded(HOUR / 1000)

    async def _is_for_her_to_report(self, reporter: str, told: Told, about: str | None) -> bool:
        """An event, if she was allowed to see it: what she was not makes no row, whether or not it exists. A room or a person, by
        any name that could be one: whether they are known here is not for her to learn, so it makes no difference."""
        if told.kind == "event":
            if not is_room_id(told.room_id) or not isinstance(told.event_id, str) or len(told.event_id) > 255:
                return False
            stored = await self._rooms.event(told.event_id)
            if stored is None or stored.event.room_id != told.room_id:
                return False
            return await self._disclosures.may_report(reporter, told.event_id)
        if told.kind == "room":
            return _may_be_a_room(told.room_id) or await self._rooms.get(str(told.room_id)) is not None
        return is_user_id(about) and (is_typed_user_id(about) or bool(await self._rooms.rooms_of(str(about))))

    async def known_here(self, case: Case) -> bool:
        """For moderators: whether the room or the person that it is about is known on this server; of people elsewhere, nobody
        knows."""
        if case.kind == "room":
            return case.room_id is not None and await self._rooms.get(case.room_id) is not None
        if case.user_id is None or not self._users.is_local(case.user_id):
            return True
        return await self._users.exists(case.user_id)

    # --- filing

    async def file(self, reporter: str, told: Told, about: str | None = None) -> Case:
        """One case, in one write with everything that belongs to it. Raises NoOtherModerator once."""
        seen: list[str] = []
        event = None
        if told.event_id is not None:
            stored = await self._rooms.event(told.event_id)
            if stored is not None:
                event, about = stored.event, stored.event.sender
                seen.append(told.event_id)
        await self._require_judge(reporter, about)
        case = self._cases.new(
            case_id=new_id(), kind=told.kind, category=told.category, reporter=reporter, user_id=about, room_id=told.room_id,
            event_id=told.event_id,
        )  # fmt: skip
        proof = None
        if told.disclosure is not None:
            proof = await self._disclosures.verify(
                reporter, told.disclosure, seen, about_event=told.event_id, about_user=about
            )
            seen += [one.event_id for one in proof.items if one.step != "V1" and one.event_id not in seen]
            case = replace(case, disclosure=proof.result)
        excluded = (about,) if about is not None else ()
        sealed = await self._sealed(case.case_id, "words", {"words": told.words}, excluded) if told.words else None
        prepared = await self._disclosures.prepare(case.case_id, proof, excluded) if proof is not None else None
        kept = NO_WORDS if not told.words else WORDS_SEALED if sealed is not None else WORDS_NOT_KEPT
        case = replace(case, seen=tuple(seen), words=kept)
        weight = await self.weight(about) if self.weight is not None and about is not None else 0
        with self._db.write() as tx:
            tx.call(lambda query: _still_few(query, case, MAX_AN_HOUR))
            self._cases.open(tx, case, weight=weight)
            if sealed is not None:
                self._envelopes.store(tx, sealed, actor="reporter")
            if prepared is not None and proof is not None:
                self._disclosures.store(tx, case.case_id, prepared, actor="reporter")
            if not case.is_about_reporter:
                self._freeze.hold(tx, case.case_id, seen)
                if event is not None:
                    self._freeze.hold_uploads_before(tx, case.case_id, event)
            if proof is not None:
                self._proved(tx, case, proof)
            self._thank(tx, case, reporter)
        await tx
        return case

    async def _require_judge(self, reporter: str, about: str | None) -> None:
        """Where only the named person could decide, the reporter hears it before she files; then she may."""
        if about is None or await self._cases.moderators_for(about) or not await self._cases.moderators_for(None):
            return
        key = (reporter, about)
        if key in self._warned:
            return
        self._warned[key] = None
        if len(self._warned) > MAX_ASKED:
            self._warned.popitem(last=False)
        outside = f" You can turn to: {', '.join(self._outside)}." if self._outside else ""
        raise NoOtherModerator(
            "The person whom you report is the only moderator here, and nobody else would see it." + outside
            + " To file it all the same, send the report once more."
        )  # fmt: skip

    def _thank(self, tx: Tx, case: Case, reporter: str) -> None:
        token = self._links.make(tx, case.case_id, "report", reporter)
        sentence = words.RECEIVED_NOT_KEPT if case.words == WORDS_NOT_KEPT else words.RECEIVED
        if (reporter, case.user_id or "") in self._warned:
            sentence = words.NO_OTHER_MODERATOR
        self._notices.tell(tx, reporter, sentence, case.case_id, link=("report", token))

    async def _sealed(self, case_id: str, kind: str, value: dict[str, Any], excluded: Sequence[str]) -> Any:
        return await self._envelopes.prepare(case_id, kind, encode(value), excluded)

    def _proved(self, tx: Tx, case: Case, proof: Proof) -> None:
        if proof.opened and not case.is_about_reporter:
            self._freeze.hold_named(tx, case.case_id, proof.media())
        for told in self._cases.on_change:
            told(tx, "report.disclosed", case)

    # --- the public form

    async def notice(
        self, *, category: str, where: str, text: str, contact: str, good_faith: bool, address: str = ""
    ) -> str:
        """From somebody without an account: `where` is what it is about, `contact` how to reach her. Returns a code with which
        she reads the answer. Everything she wrote is sealed; `address` is looked at in memory only. Raises ApiError."""
        rules.require_category(category)
        if not good_faith:
            raise InvalidParam("Confirm that what you say is true as far as you know.")
        for name, value in (("what it is about", where), ("how to reach you", contact)):
            if len(value) > MAX_FORM_FIELD:
                raise TooLarge(f"The field '{name}' takes {MAX_FORM_FIELD} characters at most.")
        if len(text) > MAX_WORDS:
            raise TooLarge(f"A notice has {MAX_WORDS} characters at most. Send the rest over the link that you get.")
        if not where.strip() or not text.strip():
            raise InvalidParam("Say what it is about (an address, a name) and what is wrong with it.")
        await self._admit_form(address)
        case = self._cases.new(case_id=new_id(), kind="notice", category=category, **_targets(where))
        excluded = (case.user_id,) if case.user_id is not None else ()
        sealed = await self._sealed(
            case.case_id, "words", {"where": where, "words": text, "contact": contact}, excluded
        )
        case = replace(case, words=WORDS_SEALED if sealed is not None else WORDS_NOT_KEPT)
        with self._db.write() as tx:
            tx.call(lambda query: _still_few(query, case, form_limits.OF_ALL))
            self._cases.open(tx, case)
            if sealed is not None:
                self._envelopes.store(tx, sealed, actor="stranger")
            token = self._links.make(tx, case.case_id, "receipt", None)
        await tx
        return token

    async def _admit_form(self, address: str) -> None:
        """Raises LimitExceeded. Moderators hear once an hour that the form is busy, or full."""
        try:
            self._forms.admit(address)
        except LimitExceeded:
            if self._forms.number >= form_limits.OF_ALL:
                await self._tell_of_forms(words.FORM_FULL)
            raise
        if self._forms.number >= form_limits.BUSY:
            await self._tell_of_forms(words.FORM_BUSY)

    async def _tell_of_forms(self, sentence: str) -> None:
        now = self._clock.now()
        if self._told_of_forms.get(sentence, 0) > now - HOUR:
            return
        self._told_of_forms[sentence] = now
        with self._db.write() as tx:
            self._notices.tell(tx, MODERATORS, sentence, None, count=self._forms.number)
        await tx

    # --- what comes over the link

    async def opened(self, link: Link, user_id: str | None) -> Case:
        """The case behind a reporter's link. Raises Forbidden, NotFound."""
        link.require_of(user_id)
        case = await self._cases.get(link.case_id)
        if link.purpose not in ("report", "receipt") or case.emptied:
            raise Forbidden("This link is for another page.")
        return case

    async def answer(self, link: Link, user_id: str | None, text: str) -> Case:
        """More words of the reporter, sealed. Raises ApiError where there is still no key."""
        case = await self.opened(link, user_id)
        if not text.strip():
            raise InvalidParam("Write something first.")
        if len(text) > MAX_WORDS:
            raise TooLarge(f"An answer has {MAX_WORDS} characters at most. Send it in two.")
        await self._require_few_envelopes(case)
        sealed = await self._sealed(case.case_id, "answer", {"words": text}, _excluded(case))
        if sealed is None:
            raise rules.NotNow(
                "Your words can't be kept now: the moderators have no key yet to which they could be sealed. Send them again later."
            )
        with self._db.write() as tx:
            self._envelopes.store(tx, sealed, actor="reporter")
            self._touch(tx, case, "report.answered", lambda now: replace(now, words=WORDS_SEALED))
        changed: Case = await tx
        return changed

    async def attach_proof(self, link: Link, user_id: str | None, disclosure: Disclosure) -> Proof:
        """Checked like one that came with the report. Raises ApiError."""
        case = await self.opened(link, user_id)
        if case.reporter is None:
            raise Forbidden(
                "A proof is checked against an account that could see the message. Report it from that account."
            )
        await self._require_few_envelopes(case)
        proof = await self._disclosures.verify(
            case.reporter, disclosure, case.seen, about_event=case.event_id, about_user=case.user_id
        )
        prepared = await self._disclosures.prepare(case.case_id, proof, _excluded(case))
        best = rules.better(case.disclosure, proof.result)
        is_news = proof.opened or best != case.disclosure
        seen = [one.event_id for one in proof.items if one.step != "V1"]
        with self._db.write() as tx:
            self._disclosures.store(tx, case.case_id, prepared, actor="reporter")
            if not case.is_about_reporter:
                self._freeze.hold(tx, case.case_id, seen)
            if is_news:  # moderators are not called for each try
                self._proved(tx, replace(case, disclosure=best), proof)
            self._touch(
                tx, case, None,
                lambda now: replace(
                    now, disclosure=rules.better(now.disclosure, proof.result),
                    state=rules.TRIAGED if now.state == rules.AWAITING else now.state,
                    seen=tuple(dict.fromkeys([*now.seen, *seen]))[:100],
                ),
            )  # fmt: skip
        await tx
        return proof

    async def prove_forwarded(self, case: Case, actor: str, disclosure: Disclosure) -> Proof:
        """What a moderator found in the envelope of a forwarded report, checked by the same twelve rules against what lies here."""
        if case.kind != "forwarded":
            raise Forbidden("Only the proof of a forwarded report is given by a moderator.")
        await self._require_few_envelopes(case)
        proof = await self._disclosures.verify(actor, disclosure, case.seen, about_event=case.event_id)
        prepared = await self._disclosures.prepare(case.case_id, proof, _excluded(case))
        with self._db.write() as tx:
            self._disclosures.store(tx, case.case_id, prepared, actor=actor)
            self._proved(tx, replace(case, disclosure=proof.result), proof)
            self._audit_log.record(
                tx,
                actor=actor,
                action="proof.checked",
                target=case.case_id,
                reason_code=proof.result,
                case_id=case.case_id,
            )
            self._cases.change(
                tx, case.case_id, None, lambda now: replace(now, disclosure=rules.better(now.disclosure, proof.result))
            )
        await tx
        return proof

    async def consent(self, link: Link, user_id: str | None, agreed: bool) -> Case:
        """To its being forwarded to the other person's server, after the words 'this can show who you are'."""
        case = await self.opened(link, user_id)
        if case.category == "minor":
            raise Forbidden("A report of this category is never forwarded.")
        with self._db.write() as tx:
            self._touch(tx, case, None, lambda now: replace(now, consent=agreed))
        changed: Case = await tx
        return changed

    async def card(self, link: Link, user_id: str | None) -> list[dict[str, Any]]:
        """What the proof tool wants to know of the reported messages."""
        case = await self.opened(link, user_id)
        if case.reporter is None:
            return []
        cards = [await self._disclosures.card(case.reporter, event_id, case.seen) for event_id in case.seen]
        return [card for card in cards if card is not None]

    async def taken_back(self, link: Link, user_id: str | None) -> list[dict[str, Any]]:
        """Messages of the room that were taken back lately and can still be proved."""
        case = await self.opened(link, user_id)
        if case.reporter is None or case.room_id is None:
            return []
        return await self._disclosures.taken_back(case.reporter, case.room_id)

    async def _require_few_envelopes(self, case: Case) -> None:
        if len(await self._envelopes.of_case(case.case_id)) >= MAX_ANSWERS:
            raise ApiError(
                "So much has been added to this report that no more is taken. Wait for the answer.", status=429
            )

    def _touch(self, tx: Tx, case: Case, happened: str | None, change: Any) -> None:
        tx.call(lambda query: _still_patient(query, case.case_id))
        self._audit_log.record(
            tx, actor="reporter", action=happened or "report.added", target=case.case_id, reason_code="by_link",
            case_id=case.case_id,
        )  # fmt: skip
        if happened is not None:
            for told in self._cases.on_change:
                told(tx, happened, case)
        self._cases.change(tx, case.case_id, None, change)


def _told(body: dict[str, Any], kind: rules.Kind, *, reason_required: bool, room_id: str | None = None, event_id: str | None = None) -> Told:  # fmt: skip
    """Raises ApiError. `score` of older clients is left unread."""
    reason = get_string(body, "reason") if reason_required else get_optional_string(body, "reason") or ""
    if len(reason) > MAX_WORDS:
        raise TooLarge(f"A reason has {MAX_WORDS} characters at most. Send the rest over the link in your notice room.")
    disclosure = parse_disclosure(body[KEY]) if KEY in body else None
    category = (
        disclosure.category if disclosure is not None else rules.require_category(body.get(CATEGORY_KEY, "other"))
    )
    return Told(kind, category, reason.strip(), room_id, event_id, disclosure)


def _may_be_a_room(text: object) -> bool:
    """As servers make them; the standard's own grammar lets in any text that begins with '!', and this one is stored."""
    if not is_room_id(text):
        return False
    name, colon, server = str(text).partition(":")
    return bool(_ROOM_NAME.match(name)) and (not colon or is_server_name(server))


def _targets(where: str) -> dict[str, str]:
    """Of what a stranger wrote, the identifiers of this network, so that the case can be sorted without opening it."""
    found: dict[str, str] = {}
    for word in where.replace(",", " ").split()[:50]:
        if "user_id" not in found and is_typed_user_id(word):
            found["user_id"] = word
        elif "room_id" not in found and _may_be_a_room(word):
            found["room_id"] = word
        elif "event_id" not in found and is_event_id(word):
            found["event_id"] = word
    return found


def _still_patient(query: Query, case_id: str) -> None:
    """Each thing that a reporter adds is a row of the log, which nobody can make shorter. Raises ApiError."""
    number = query.value("SELECT count(*) FROM audit_log WHERE case_id = $1 AND actor = 'reporter'", case_id)
    if number >= MAX_ADDED:
        raise ApiError("So much has been added to this report that no more is taken. Wait for the answer.", status=429)


def _still_few(query: Query, case: Case, most: int) -> None:
    """Inside the write: many at the same moment must not all find that there are few. Raises LimitExceeded."""
    number = query.value(
        "SELECT count(*) FROM cases WHERE created_ts > $1 AND coalesce(reporter, '') = $2 AND ($2 <> '' OR kind = 'notice')",
        case.created_ts - HOUR,
        case.reporter or "",
    )
    if number >= most:
        raise LimitExceeded(HOUR / 1000)


def _excluded(case: Case) -> tuple[str, ...]:
    return (case.user_id,) if case.user_id is not None else ()
