"""The desk: the queue of cases by due time, a case with its history, and what a moderator does in it.

Evidence leaves the relay sealed and is opened in the browser (`static/evidence.js`); that it was handed out, and that a file
was looked at, stands in the audit log. Who reported is not shown: nobody needs to know it to decide.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from aiohttp import web

from relay.clock import HOUR, Clock
from relay.errors import ApiError, InvalidParam, NotFound
from relay.moderation import case_rules as rules
from relay.moderation.actions import Actions
from relay.moderation.acts import Act
from relay.moderation.audit_log import AuditLog
from relay.moderation.case_rows import Case
from relay.moderation.cases import Cases
from relay.moderation.disclosure import Disclosures
from relay.moderation.envelopes import Envelopes
from relay.moderation.safety_api import MAX_NOTE, SafetyApi
from relay.pages import desk_words
from relay.pages.desk_decisions import DeskDecisions
from relay.pages.desk_forwarding import DeskForwarding
from relay.pages.desk_media import DeskMedia
from relay.pages.desk_statements import NotWhole
from relay.pages.forms import Form
from relay.pages.frame import HEADERS, Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route

PAGE = "/_relay/desk"
PAGE_STEP = 50
MAX_FORM_BYTES = 64 * 1024
SOON_MS = 6 * HOUR
MAX_FILES = 20
SHOWS = (
    ("open", "Open, by due time"),
    ("appealed", "Appeals"),
    ("minor", "Minors"),
    ("decided", "Decided"),
    ("closed", "Closed"),
    ("all", "All, newest first"),
)

Step = Callable[[Request, Visit, Form, Case], Awaitable[Answer]]


class DeskCases(Part):
    def __init__(
        self,
        frame: Frame,
        clock: Clock,
        cases: Cases,
        disclosures: Disclosures,
        envelopes: Envelopes,
        actions: Actions,
        audit_log: AuditLog,
        api: SafetyApi,
        decisions: DeskDecisions,
        media: DeskMedia,
        handing_over: DeskForwarding,
    ) -> None:
        self._frame = frame
        self._clock = clock
        self._cases = cases
        self._disclosures = disclosures
        self._envelopes = envelopes
        self._actions = actions
        self._audit_log = audit_log
        self._api = api
        self._decisions = decisions
        self._handing_over = handing_over
        self._steps: dict[str, Step] = {
            "take": self._take,
            "release": self._release,
            "triage": self._triage,
            "minor": self._minor,
            "merge": self._merge,
            "ask-proof": self._ask_proof,
            "escalate": self._escalate,
            "close": self._close,
            "evidence": self._evidence,
            "note": self._note,
            "peer-keys": handing_over.peer_keys,
            "forward": handing_over.forward,
            "proof": handing_over.proof,
            "media": media.hand_out,
            "fetch-media": media.fetch,
            "state-reasons": decisions.state_reasons,
            "decide": decisions.decide,
            "answer-appeal": decisions.answer_appeal,
        }

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        yield Route("GET", PAGE, frame.open_to("moderator", self._queue), auth="none")
        yield Route("GET", f"{PAGE}/case/{{case_id}}", frame.open_to("moderator", self._case), auth="none")
        yield Route(
            "POST", f"{PAGE}/case/{{case_id}}/{{step}}", frame.taking("moderator", self._step), auth="none",
            max_body=MAX_FORM_BYTES,
        )  # fmt: skip

    # --- reading

    async def _queue(self, request: Request, visit: Visit) -> Answer:
        show = request.query.get("show", "open")
        title = dict(SHOWS).get(show)
        if title is None:
            raise InvalidParam("There is no such list of cases. Begin again at the desk.")
        start = request.query_int("start", 0, high=1_000_000)
        wanted: dict[str, Any] = {"state": show}
        if show == "minor":
            wanted = {"state": "open", "category": "minor"}
        elif show == "all":
            wanted = {"state": None}
        rows, total = await self._cases.queue(actor=visit.user_id, start=start, limit=PAGE_STEP, **wanted)
        now = self._clock.now()
        warnings = await self._warnings(visit.user_id)
        return await self._frame.page(
            request, visit, "desk_queue.html", rows=rows, total=total, start=start, step=PAGE_STEP, show=show, shows=SHOWS,
            title=title, words=desk_words, now=now, soon=now + SOON_MS, warnings=warnings,
        )  # fmt: skip

    async def _warnings(self, actor: str) -> list[str]:
        """What a moderator should see before any case."""
        found = []
        if await self._audit_log.restored() is not None:
            found.append(
                "A backup was restored under this relay. Look at the audit log, and say there that you know about it."
            )
        if not await self._envelopes.can_seal():
            found.append(
                "There are fewer than two moderator keys, so nobody's words and no proof can be kept. Make them: relay moderator add"
            )
        waiting = [one for one in await self._actions.waiting() if actor not in (one.act.actor, one.act.target)]
        if waiting:
            found.append(
                f"Waiting for another moderator's word: {len(waiting)}. See Measures; you can confirm or cancel."
            )
        return found

    async def _case(self, request: Request, visit: Visit) -> Answer:
        return await self._show(
            request, visit, await self._cases.for_moderator(request.params["case_id"], visit.user_id)
        )

    async def _show(
        self, request: Request, visit: Visit, case: Case, *, wrong: NotWhole | None = None, form: Form | None = None
    ) -> Answer:
        """`wrong` is said beside its field, and what the moderator had filled in stands there again."""
        now = self._clock.now()
        about = case.user_id or ""
        joined = await self._cases.same_as(case.case_id)
        envelopes = [one for which in (case, *joined) for one in await self._envelopes.of_case(which.case_id)]
        return await self._frame.page(
            request, visit, "desk_case.html", status=200 if wrong is None else wrong.status,
            wrong=wrong, given=form or Form([]), own_server=self._frame.server_name, case=case, words=desk_words, now=now, open=case.is_open,
            overdue=case.due_ts < now, proofs=await self._disclosures.of_case(case.case_id),
            envelopes=[one for one in envelopes if not one.get("forgotten")], joined=joined,
            history=await self._cases.history(case.case_id),
            strikes=len(await self._actions.strikes(about)) if about else 0,
            **await self._handing_over.shown(case),
            **await self._decisions.shown(case, visit.user_id),
        )  # fmt: skip

    # --- what a moderator does

    async def _step(self, request: Request, visit: Visit, form: Form) -> Answer:
        step = self._steps.get(request.params["step"])
        if step is None:
            raise NotFound("The desk does not know this step. Load the case again.")
        case = await self._cases.for_moderator(request.params["case_id"], visit.user_id)
        try:
            return await step(request, visit, form, case)
        except NotWhole as wrong:
            return await self._show(request, visit, case, wrong=wrong, form=form)

    def _back(self, case: Case) -> web.Response:
        return self._frame.redirect(f"{PAGE}/case/{case.case_id}")

    async def _take(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        return self._back(await self._cases.take(case.case_id, visit.user_id, version_of(form)))

    async def _release(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        return self._back(await self._cases.release(case.case_id, visit.user_id, version_of(form)))

    async def _triage(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        category = rules.require_category(form.text("category", 20))
        if case.category == "minor" != category:
            raise rules.NotNow("A case that may concern a minor stays one. Decide it as such, or ask your lawyer.")
        return self._back(await self._cases.triage(case.case_id, visit.user_id, version_of(form), category=category))

    async def _minor(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        """One press. The files that the moderator had before her are kept from everybody too."""
        await self._cases.may_show_minor(case.case_id, visit.user_id)
        for address in form.every("file")[:MAX_FILES]:
            try:
                await self._actions.take(Act("quarantine", address, visit.user_id, "minor", case_id=case.case_id))
            except ApiError:
                continue  # what a message named is no address of a file
        return self._back(case)

    async def _note(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        await self._api.note(case, visit.user_id, form.text("words", MAX_NOTE))
        return self._back(case)

    async def _ask_proof(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        await self._cases.triage(case.case_id, visit.user_id, version_of(form), state=rules.AWAITING)
        return self._back(case)

    async def _escalate(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        await self._cases.triage(case.case_id, visit.user_id, version_of(form), state=rules.ESCALATED)
        return self._back(case)

    async def _close(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        return self._back(await self._cases.close(case.case_id, visit.user_id, version_of(form)))

    async def _merge(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        text = form.required("into", 20, "the number of the other case").removeprefix("No.").strip()
        other = await self._cases.by_number(int(text)) if text.isascii() and text.isdigit() and len(text) < 16 else None
        if other is None or other.user_id == visit.user_id:  # one about herself is not there for her
            raise NotFound("There is no case of this number. The queue shows the numbers.")
        if not form.ticked("sure"):
            fields = [("into", text), ("version", form.text("version", 20))]
            return await self._frame.page(
                request, visit, "desk_join_sure.html", case=case, other=other, fields=fields, words=desk_words
            )
        await self._cases.merge(case.case_id, other.case_id, visit.user_id, version_of(form))
        return self._back(other)

    async def _evidence(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        envelopes = await self._api.evidence(case, visit.user_id)
        answer: dict[str, Any] = {"case_id": case.case_id, "envelopes": envelopes}
        if form.text("as", 10) != "file":
            return answer
        return web.Response(
            body=orjson.dumps(answer, option=orjson.OPT_INDENT_2), content_type="application/json",
            headers={**HEADERS, "Content-Disposition": f'attachment; filename="case-{case.number}.json"'},
        )  # fmt: skip


def version_of(form: Form) -> int:
    """The version that the moderator looked at."""
    text = form.text("version", 20)
    if not (text.isascii() and text.isdigit()):
        raise ApiError("This form is not whole. Load the case again, and send it once more.")
    return int(text)
